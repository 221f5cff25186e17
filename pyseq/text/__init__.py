# SPDX-License-Identifier: Apache-2.0
"""From text to batches: tokenisers, vocabularies, files of pairs, bucketed batches.

Called by the translator and by training; knows nothing of models.
"""

from .batches import (
    SOURCE_MARKS,
    Batch,
    BucketedBatches,
    Examples,
    ExampleSet,
    SourceMarks,
    encode_copies,
    encode_sources,
    ordered_batches,
    pad,
)
from .extra import Extra, extra_tensor, parse_extra
from .features import Features
from .pairs import (
    Pair,
    PairsFile,
    TextPair,
    hold_out,
    make_pair,
    read_lines,
    read_pairs,
    tokenise_pairs,
)
from .tokens import TOKENS, Tokenizer, TokensName
from .vocab import SPECIALS, Vocab

__all__ = [
    "SOURCE_MARKS",
    "SPECIALS",
    "TOKENS",
    "Batch",
    "BucketedBatches",
    "ExampleSet",
    "Examples",
    "Extra",
    "Features",
    "Pair",
    "PairsFile",
    "SourceMarks",
    "TextPair",
    "Tokenizer",
    "TokensName",
    "Vocab",
    "encode_copies",
    "encode_sources",
    "extra_tensor",
    "hold_out",
    "make_pair",
    "ordered_batches",
    "pad",
    "parse_extra",
    "read_lines",
    "read_pairs",
    "tokenise_pairs",
]
