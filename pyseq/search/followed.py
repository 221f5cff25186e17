# SPDX-License-Identifier: Apache-2.0
"""Greedy search and sampling: one hypothesis at a time, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import START, STOP
from .draws import draw, uniform
from .evaluation import search_mode
from .options import Hypothesis, SearchOptions, StreamedToken
from .protocols import SearchModel
from .rules import Rules, choose, refuse_nan
from .trace import Finished, Record, trace_back


class _Emission(NamedTuple):
    """What one step has emitted: a token for each of R unfinished rows."""

    rows: Tensor  # (R,)
    tokens: Tensor  # (R,)
    scores: Tensor  # (R,), their log-probabilities
    weights: Tensor | None  # (R, S), attention


def _walk(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    options: SearchOptions,
    seed: Tensor | None,
) -> Iterator[_Emission]:
    """All steps of greedy search, or with a seed of ``n_best`` draws for each row, which stand side
    by side.

    The search's mode is left while the caller holds an emission.
    """
    draws = options.n_best
    count = source.shape[0] * draws
    with search_mode(model):
        encoded, state = model.encode_source(source, source_lengths)
        rows = torch.arange(count, device=source.device)  # the unfinished ones
        if draws > 1:
            encoded, state = encoded.select(rows // draws), state.select(rows // draws)
    rules = Rules.of(options, source.shape[0], source.device)
    tokens = torch.full_like(rows, START)
    history = rows.new_empty(count, 0)
    for emitted in range(options.max_length):
        with search_mode(model):
            step = model.step(tokens, encoded, state, need_weights=options.need_weights)
            refuse_nan(step.log_probs)
            log_probs = rules.apply(step.log_probs, rows // draws, history, emitted)
            if seed is None:
                tokens = choose(log_probs)
            else:
                tokens = draw(log_probs, options, uniform(seed, rows, emitted))
            scores = log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)
        yield _Emission(rows, tokens, scores, step.weights)
        state = step.state
        if options.block_ngrams is not None:
            history = torch.cat([history, tokens.unsqueeze(1)], 1)
        kept = (tokens != STOP).nonzero().squeeze(1)
        if len(kept) == 0:
            return
        if len(kept) < len(rows):
            rows, tokens, history = rows[kept], tokens[kept], history[kept]
            encoded, state = encoded.select(kept), state.select(kept)


def follow(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    options: SearchOptions,
    seed: Tensor | None,
) -> list[list[Hypothesis]]:
    draws = options.n_best
    count = source.shape[0] * draws
    trace: list[Record] = []
    scores = torch.zeros(())
    lengths = torch.zeros(count, dtype=torch.int64, device=source.device)
    for emission in _walk(model, source, source_lengths, options, seed):
        if not trace:
            scores = torch.zeros_like(emission.scores)
        scores[emission.rows] += emission.scores
        lengths[emission.rows] += emission.tokens != STOP
        chosen = emission.tokens.unsqueeze(1)
        trace.append(
            Record.of(emission.rows, count, chosen, torch.zeros_like(chosen), emission.weights)
        )
    lengths = lengths.where(scores > -math.inf, 0)  # where everything was forbidden
    found = trace_back(
        trace,
        Finished.of_each_row(scores, lengths),
        source_lengths.repeat_interleave(draws),
    )
    return [
        list(chain.from_iterable(found[first : first + draws])) for first in range(0, count, draws)
    ]


def follow_streaming(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    options: SearchOptions,
    seed: Tensor | None,
) -> Iterator[StreamedToken]:
    if source.shape[0] == 0:
        return
    widths = source_lengths.tolist()
    for emission in _walk(model, source, source_lengths, options, seed):
        columns = (emission.rows, emission.tokens, emission.scores)
        for place, (row, token, score) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            if token != STOP:
                attention = emission.weights
                cut = None if attention is None else attention[place, : widths[row]]
                yield StreamedToken(row, token, score, cut)
