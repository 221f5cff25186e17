# SPDX-License-Identifier: Apache-2.0
"""What a search has done, step by step, and the hypotheses that come of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .options import Hypothesis


class Record(NamedTuple):
    """One step of a search: R unfinished rows, k hypotheses in each."""

    position: Tensor  # (B,), where a row is among the R; 0 for finished ones
    tokens: Tensor  # (R, k), the tokens emitted
    parents: Tensor  # (R, k), the hypotheses of the step before that they continue
    weights: Tensor | None  # (R, k of the step before, S), attention

    @classmethod
    def of(
        cls, rows: Tensor, batch: int, tokens: Tensor, parents: Tensor, weights: Tensor | None
    ) -> Record:
        position = rows.new_zeros(batch)
        position[rows] = torch.arange(len(rows), device=rows.device)
        return cls(
            position,
            tokens,
            parents,
            None if weights is None else weights.unflatten(0, (len(rows), -1)),
        )


class Finished(NamedTuple):
    """The best finished hypotheses of each row, each (B, n), the best one first."""

    ranks: Tensor  # what they are compared by: log P over the length penalty, plus coverage's
    scores: Tensor  # log P
    lengths: Tensor  # tokens, without <stop>
    slots: Tensor  # which hypothesis of the step of the last token it is

    @classmethod
    def none(cls, like: Tensor, count: int) -> Finished:
        """Nothing yet, for rows like those of ``like`` (B,)."""
        lowest = like.new_full((*like.shape, count), -math.inf)
        zeros = torch.zeros_like(lowest, dtype=torch.int64)
        return cls(lowest, lowest.clone(), zeros, zeros.clone())

    @classmethod
    def of_each_row(cls, scores: Tensor, lengths: Tensor) -> Finished:
        """The only hypothesis of each row, by scores and lengths (B,)."""
        column, sizes = scores.unsqueeze(1), lengths.unsqueeze(1)
        return cls(column, column, sizes, torch.zeros_like(sizes))

    def offer(
        self, rows: Tensor, ranks: Tensor, scores: Tensor, length: int, slots: Tensor
    ) -> None:
        """Put candidates (R, m) of ``length`` tokens, for each of ``rows``, where they belong.

        Of equal ones those that came first stay first.
        """
        lengths = torch.full_like(slots, length)
        joined = torch.cat([self.ranks[rows], ranks], 1)
        order = joined.sort(stable=True, dim=1, descending=True).indices[:, : self.ranks.shape[1]]
        for kept, offered in zip(self, (ranks, scores, lengths, slots), strict=True):
            kept[rows] = torch.cat([kept[rows], offered], 1).gather(1, order)


def collect(trace: list[Record], finished: Finished) -> tuple[Tensor, Tensor | None]:
    """Follow the parents back from the last token of each result.

    Args:
        trace: all steps, in order, one at least.
        finished: the results.

    Returns:
        Tokens (B, n, T) and attention (B, n, T, S), if there is any, T the number of steps; beyond
        the last token of a result they hold anything.
    """
    tokens, weights = [], []
    slot = torch.zeros_like(finished.slots)
    for number, record in reversed(list(enumerate(trace, 1))):
        # Beyond the last token slot and position stay 0: valid, and cut off by who asked.
        slot = torch.where(finished.lengths == number, finished.slots, slot)
        position = record.position.unsqueeze(1)
        tokens.append(record.tokens[position, slot])
        slot = record.parents[position, slot].where(finished.lengths >= number, 0)
        if record.weights is not None:
            weights.append(record.weights[position, slot])
    return torch.stack(tokens[::-1], 2), torch.stack(weights[::-1], 2) if weights else None


def trace_back(
    trace: list[Record], finished: Finished, source_lengths: Tensor
) -> list[list[Hypothesis]]:
    """The results of each row, as the searches return them.

    Args:
        trace, finished: as for :func:`collect`; results that were not found have a score of minus
            infinity.
        source_lengths: (B,), to cut the weights.
    """
    tokens, attention = collect(trace, finished)
    columns = tokens.tolist()
    found = []
    sizes = zip(
        finished.scores.tolist(),
        finished.lengths.tolist(),
        source_lengths.tolist(),
        strict=True,
    )
    for row, (scores, lengths, source_length) in enumerate(sizes):
        best = []
        for place, (score, length) in enumerate(zip(scores, lengths, strict=True)):
            if place > 0 and score == -math.inf:
                break
            cut = None if attention is None else attention[row, place, :length, ..., :source_length]
            best.append(Hypothesis(columns[row][place][:length], score, cut))
        found.append(best)
    return found
