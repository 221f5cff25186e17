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

#: Tokens, score and weights.
_Found = tuple[list[int], float, Tensor | None]


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


def _prefix(options: SearchOptions, source: Tensor) -> Tensor | None:
    """(B, P), if there is any."""
    if not any(options.prefix):
        return None
    return Rules.of(options, source.shape[0], source.device).prefix


def search_whole(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    options: SearchOptions,
    seed: Tensor | None,
) -> list[list[Hypothesis]] | None:
    """What the model finds in one call with all that comes before the search, if it can: as in
    eval mode, whatever its own."""
    find: Callable[..., list[_Found] | None] | None = getattr(model, "search_whole", None)
    if find is None or not source.is_cpu:  # on another device to read the seed would be to wait
        return None
    drawn = 0 if seed is None else int(seed)
    found = find(source, source_lengths, options, _prefix(options, source), drawn)
    return None if found is None else _by_rows(found, options)


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
            prefix=_prefix(options, source),
            **_drawing(options, seed),
        )
    widths = source_lengths.tolist()
    columns = (found.tokens, found.lengths, found.scores)
    results: list[_Found] = []
    for place, (tokens, length, score) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        width, weights = widths[place // options.n_best], found.weights
        cut = None if weights is None else weights[place, :length, :width]
        results.append((tokens[:length], score, cut))
    return _by_rows(results, options)


def _by_rows(found: list[_Found], options: SearchOptions) -> list[list[Hypothesis]]:
    """Those of each row, of ``n_best`` results for each."""
    count = options.n_best
    hypotheses: list[list[Hypothesis]] = [[] for _ in range(len(found) // count)]
    for place, (tokens, score, weights) in enumerate(found):
        row = hypotheses[place // count]
        if row and score == -math.inf and not options.sample:
            continue  # it is none
        row.append(Hypothesis(tokens, score, weights))
    return hypotheses
