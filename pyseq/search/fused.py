# SPDX-License-Identifier: Apache-2.0
"""Searches that a model makes in one operator."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .evaluation import search_mode
from .options import Hypothesis, SearchOptions
from .protocols import FusedSearch, SearchModel
from .rules import Rules


def fused_search_of(model: SearchModel, options: SearchOptions) -> FusedSearch | None:
    """The model's, if it can search like that."""
    find: Callable[[], FusedSearch | None] | None = getattr(model, "fused_search", None)
    fused = None if find is None else find()
    if fused is not None and (options.sample or options.coverage_penalty > 0):
        # One of a model's own may know no more than the first searches did.
        known = inspect.signature(fused).parameters
        if not {"coverage_penalty", "sample"} <= known.keys():
            return None
    return fused


def _drawing(options: SearchOptions, seed: Tensor | None) -> dict[str, Any]:
    """What only some searches are told."""
    if seed is not None:
        return {
            "sample": True,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "seed": int(seed),
        }
    if options.coverage_penalty > 0:
        return {"coverage_penalty": options.coverage_penalty}
    return {}


def search_fused(
    model: SearchModel,
    fused: FusedSearch,
    source: Tensor,
    source_lengths: Tensor,
    options: SearchOptions,
    seed: Tensor | None,
) -> list[list[Hypothesis]]:
    with search_mode(model):
        encoded, state = model.encode_source(source, source_lengths)
        prefix: Tensor | None = None
        if any(options.prefix):
            prefix = Rules.of(options, source.shape[0], source.device).prefix
        found = fused(
            encoded,
            state,
            max_length=options.max_length,
            beam_size=options.beam_size,
            length_penalty=options.length_penalty,
            need_weights=options.need_weights,
            min_length=options.min_length,
            n_best=options.n_best,
            block_ngrams=options.block_ngrams,
            prefix=prefix,
            **_drawing(options, seed),
        )
    columns = (found.tokens, found.lengths, found.scores)
    widths = source_lengths.tolist()
    hypotheses: list[list[Hypothesis]] = [[] for _ in widths]
    for place, (tokens, length, score) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        row = place // options.n_best
        if hypotheses[row] and score == -math.inf and not options.sample:
            continue  # it is none
        cut = None if found.weights is None else found.weights[place, :length, : widths[row]]
        hypotheses[row].append(Hypothesis(tokens[:length], score, cut))
    return hypotheses
