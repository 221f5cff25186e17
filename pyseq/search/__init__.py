# SPDX-License-Identifier: Apache-2.0
"""Search for target sequences: greedy, sampling and beam search, for a batch of sources.

Called by ``Seq2Seq.generate``. Works on anything that has ``encode_source`` and ``step``,
which is called once a step for all hypotheses of all rows that are not finished, or on other
devices than the CPU of all rows; where a model offers a :class:`FusedSearch`, what that can do is
one operator instead.
"""

from . import operators as operators  # registers them for devices without kernels
from .ensemble import Ensemble
from .options import Hypothesis, SearchOptions, StreamedToken
from .protocols import EncodedSource, FusedSearch, SearchModel, Selectable, Step
from .rules import choose
from .searches import beam, greedy, sample, search, stream

__all__ = [
    "EncodedSource",
    "Ensemble",
    "FusedSearch",
    "Hypothesis",
    "SearchModel",
    "SearchOptions",
    "Selectable",
    "Step",
    "StreamedToken",
    "beam",
    "choose",
    "greedy",
    "sample",
    "search",
    "stream",
]
