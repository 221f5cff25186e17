# SPDX-License-Identifier: Apache-2.0
"""Beam search, step by step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import START, STOP
from .evaluation import search_mode
from .options import Hypothesis, SearchOptions, length_normalizer
from .protocols import SearchModel
from .rules import Rules, refuse_nan, widened
from .trace import Finished, Record, trace_back


def beam_search(
    model: SearchModel, source: Tensor, source_lengths: Tensor, options: SearchOptions
) -> list[list[Hypothesis]]:
    batch, beam_size = source.shape[0], options.beam_size
    with search_mode(model):
        encoded, state = model.encode_source(source, source_lengths)
        rules = Rules.of(options, batch, source.device)
        rows = torch.arange(batch, device=source.device)  # the unfinished ones
        tokens = torch.full((batch, 1), START, device=source.device)
        history = tokens.new_empty(batch, 1, 0)
        scores = torch.zeros(())  # (R, k), log P of each hypothesis
        finished = Finished.none(scores.new_empty(0), 0)
        coverage = Coverage.none(options, source_lengths.to(source.device))
        trace: list[Record] = []
        for emitted in range(1, options.max_length + 1):
            width = tokens.shape[1]
            step = model.step(
                tokens.flatten(),
                encoded,
                state,
                need_weights=options.need_weights or coverage is not None,
            )
            if emitted == 1:
                scores = widened(step.log_probs).new_zeros(batch, 1)
                finished = Finished.none(scores.squeeze(1), options.n_best)
            refuse_nan(step.log_probs)
            log_probs = rules.apply(
                step.log_probs,
                rows.repeat_interleave(width),
                history.flatten(0, 1),
                emitted - 1,
            ).unflatten(0, (-1, width))
            vocab = log_probs.shape[2]
            # At most `width` of the continuations are <stop>, so twice the beam size is
            # enough to fill the beam with others.
            flat = (scores.unsqueeze(2) + log_probs).flatten(1)
            values, index = flat.topk(min(2 * beam_size, flat.shape[1]))
            parents, tokens = index // vocab, index % vocab
            is_stop = tokens == STOP

            penalty = length_normalizer(emitted, options.length_penalty)
            stopped = values.masked_fill(~is_stop, -math.inf)[:, :beam_size]
            ranks = stopped / penalty
            covered = torch.zeros_like(scores)
            if coverage is not None:
                coverage = coverage.add(step.weights, width)
                covered = coverage.penalty(rows)
                ranks = ranks + covered.gather(1, parents[:, :beam_size])
            finished.offer(rows, ranks, stopped, emitted - 1, parents[:, :beam_size])

            new_width = min(beam_size, values.shape[1])
            scores, which = values.masked_fill(is_stop, -math.inf).topk(new_width)
            parents, tokens = parents.gather(1, which), tokens.gather(1, which)
            trace.append(Record.of(rows, batch, tokens, parents, step.weights))
            if emitted == options.max_length:
                ranks = scores / penalty + covered.gather(1, parents)
                slots = torch.arange(new_width, device=rows.device).expand_as(scores)
                finished.offer(rows, ranks, scores, emitted, slots)
                break

            # log P only falls, the length penalty only grows and that of coverage is never
            # above zero: this is what a row can reach.
            bound = scores[:, 0] / length_normalizer(options.max_length, options.length_penalty)
            kept = (finished.ranks[rows, -1] < bound).nonzero().squeeze(1)
            if len(kept) == 0:
                break
            first = kept.unsqueeze(1) * width  # each row's first hypothesis in this step
            before = (first + parents[kept]).flatten()
            state = step.state.select(before)
            if len(kept) < len(rows) or new_width != width:
                # All hypotheses of a row have the same memory, so it is only their number
                # that matters.
                encoded = encoded.select(first.expand(-1, new_width).flatten())
            rows, tokens, scores = rows[kept], tokens[kept], scores[kept]
            if options.block_ngrams is not None:
                begun = history.flatten(0, 1)[before].unflatten(0, (-1, new_width))
                history = torch.cat([begun, tokens.unsqueeze(2)], 2)
            if coverage is not None:
                coverage = coverage.select(before, new_width)
        if not options.need_weights:
            trace = [record._replace(weights=None) for record in trace]
        return trace_back(trace, finished, source_lengths)


class Coverage(NamedTuple):
    """How much attention each hypothesis has paid to each source position."""

    factor: float  # beta
    lengths: Tensor  # (B,), source positions of a row
    sums: Tensor | None  # (R, k, S), attention weights up to now; None before the first step

    @classmethod
    def none(cls, options: SearchOptions, lengths: Tensor) -> Coverage | None:
        factor = options.coverage_penalty
        return cls(factor, lengths, None) if factor > 0 else None

    def add(self, weights: Tensor | None, width: int) -> Coverage:
        """With the weights (R * k, S), or of N heads (R * k, N, S), of a step of k = ``width``
        hypotheses for each row."""
        if weights is None:
            raise ValueError(
                "coverage_penalty needs a model with attention, got one that gives no weights"
            )
        weights = widened(weights if weights.dim() == 2 else weights.mean(1))  # over the heads
        weights = weights.unflatten(0, (-1, width))
        return self._replace(sums=weights if self.sums is None else self.sums + weights)

    def penalty(self, rows: Tensor) -> Tensor:
        """``cp`` (R, k) of the hypotheses of these rows."""
        assert self.sums is not None
        positions = torch.arange(self.sums.shape[2], device=rows.device)
        padding = (positions >= self.lengths[rows].unsqueeze(1)).unsqueeze(1)
        # A weight may have underflowed: the logarithm stays finite, so that those which have
        # missed a position can still be compared.
        tiny = torch.finfo(self.sums.dtype).tiny
        return self.factor * self.sums.clamp(tiny, 1).log().masked_fill(padding, 0).sum(2)

    def select(self, before: Tensor, width: int) -> Coverage:
        """That of the hypotheses (R' * width,), counted over all rows."""
        assert self.sums is not None
        sums = self.sums.flatten(0, 1)[before].unflatten(0, (-1, width))
        return self._replace(sums=sums)
