# SPDX-License-Identifier: Apache-2.0
"""The searches of models on other devices than the CPU: their state stays there too.

No step waits for the device. Rows that are done stay in the batch, and change no more; whether
all of them are is looked at now and then, and late, while the next steps are under way.
"""

from __future__ import annotations

import math
from itertools import chain

import torch
from torch import Tensor

from ..errors import SearchError
from ..types import START, STOP
from .beams import Coverage
from .draws import draw, uniform
from .evaluation import search_mode
from .options import Hypothesis, SearchOptions, length_normalizer
from .protocols import SearchModel
from .rules import NOT_FINITE, Rules, choose
from .trace import Finished, Record, trace_back

#: Steps between two looks. What a look sees is known at the next one.
STEPS_A_LOOK = 8


def search_resident(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    options: SearchOptions,
    seed: Tensor | None,
) -> list[list[Hypothesis]]:
    """See :func:`pyseq.search.search`; with a seed it samples."""
    trace, finished = run_resident(model, source, source_lengths, options, seed)
    # Independent draws for a row stand side by side as if for several.
    draws = options.n_best if options.sample else 1
    found = trace_back(trace, finished, source_lengths.repeat_interleave(draws))
    return [
        list(chain.from_iterable(found[first : first + draws]))
        for first in range(0, len(found), draws)
    ]


def run_resident(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    options: SearchOptions,
    seed: Tensor | None = None,
) -> tuple[list[Record], Finished]:
    """The steps of a search and its results, on the device, when all steps are done."""
    with search_mode(model):
        if options.follows_one():
            return _follow(model, source, source_lengths, options, seed)
        return _beam_search(model, source, source_lengths, options)


class _Progress:
    """Which rows are done, and whether a model's logits were not finite, as the device has it."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self._failed = torch.zeros((), dtype=torch.bool, device=device)
        self._sent: _Sent | None = None

    def watch(self, log_probs: Tensor) -> None:
        """Remember whether there is a NaN in what a model said, (B * k, V), of unfinished rows."""
        found = log_probs.isnan().any(1).unflatten(0, (len(self.done), -1)).any(1)
        self._failed |= (found & ~self.done).any()

    def ended(self, emitted: int) -> bool:
        """Whether the search can end after so many steps, asked after each of them.

        Raises:
            SearchError: there was a NaN.
        """
        if emitted % STEPS_A_LOOK != 0:
            return False
        before, self._sent = self._sent, _Sent(torch.stack([self.done.all(), self._failed]))
        return before is not None and self._read(before)

    def check(self) -> None:
        """Wait for all steps, and raise a SearchError if there was a NaN."""
        self._read(_Sent(torch.stack([self.done.all(), self._failed])))

    @staticmethod
    def _read(sent: _Sent) -> bool:
        done, failed = sent.values()
        if failed:
            raise SearchError(NOT_FINITE)
        return done


class _Sent:
    """Flags on their way to the host."""

    def __init__(self, flags: Tensor) -> None:
        self._flags, self._arrived = flags, None
        if flags.is_cuda:
            self._flags = torch.empty_like(flags, device="cpu", pin_memory=True)
            self._flags.copy_(flags, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(flags.device))

    def values(self) -> list[bool]:
        """The flags; waits for the steps before they were sent, and for none after."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._flags.tolist()


def _follow(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    options: SearchOptions,
    seed: Tensor | None,
) -> tuple[list[Record], Finished]:
    """Greedy search, or ``n_best`` draws for each row, which stand side by side."""
    draws, device = options.n_best, source.device
    count = source.shape[0] * draws
    encoded, state = model.encode_source(source, source_lengths)
    rows = torch.arange(count, device=device)
    source_rows = rows // draws
    if draws > 1:
        encoded, state = encoded.select(source_rows), state.select(source_rows)
    rules = Rules.of(options, source.shape[0], device)
    progress = _Progress(count, device)
    tokens = torch.full_like(rows, START)
    history = rows.new_empty(count, 0)
    scores, lengths = torch.zeros(()), torch.zeros_like(rows)
    trace: list[Record] = []
    for emitted in range(1, options.max_length + 1):
        step = model.step(tokens, encoded, state, need_weights=options.need_weights)
        progress.watch(step.log_probs)
        log_probs = rules.apply(step.log_probs, source_rows, history, emitted - 1)
        if seed is None:
            tokens = choose(log_probs)
        else:
            tokens = draw(log_probs, options, uniform(seed, rows, emitted - 1))
        if emitted == 1:
            scores = log_probs.new_zeros(count)
        own = log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)
        scores = scores + own.masked_fill(progress.done, 0)
        progress.done |= tokens == STOP
        lengths = lengths + ~progress.done
        chosen = tokens.unsqueeze(1)
        trace.append(Record(rows, chosen, torch.zeros_like(chosen), _by_row(step.weights, count)))
        state = step.state
        if options.block_ngrams is not None:
            history = torch.cat([history, chosen], 1)
        if progress.ended(emitted):
            break
    progress.check()
    lengths = lengths.where(scores > -math.inf, 0)  # where everything was forbidden
    return trace, Finished.of_each_row(scores, lengths)


def _beam_search(
    model: SearchModel, source: Tensor, source_lengths: Tensor, options: SearchOptions
) -> tuple[list[Record], Finished]:
    """Beam search with ``beam_size`` hypotheses in each row at every step: in place of those that
    there are not yet stand some that have no probability."""
    batch, width, device = source.shape[0], options.beam_size, source.device
    encoded, state = model.encode_source(source, source_lengths)
    rows = torch.arange(batch, device=device)
    of_row = rows.unsqueeze(1).expand(-1, width)  # the row of each hypothesis
    encoded, state = encoded.select(of_row.flatten()), state.select(of_row.flatten())
    rules = Rules.of(options, batch, device)
    progress = _Progress(batch, device)
    tokens = torch.full((batch, width), START, device=device)
    history = tokens.new_empty(batch, width, 0)
    others = torch.arange(width, device=device) > 0
    scores, finished = torch.zeros(()), Finished.none(torch.zeros(0), 0)
    coverage = Coverage.none(options, source_lengths.to(device))
    trace: list[Record] = []
    for emitted in range(1, options.max_length + 1):
        step = model.step(
            tokens.flatten(),
            encoded,
            state,
            need_weights=options.need_weights or coverage is not None,
        )
        progress.watch(step.log_probs)
        log_probs = rules.apply(
            step.log_probs, of_row.flatten(), history.flatten(0, 1), emitted - 1
        ).unflatten(0, (batch, width))
        vocab = log_probs.shape[2]
        if emitted == 1:
            scores = log_probs.new_zeros(batch, width).masked_fill(others, -math.inf)
            finished = Finished.none(scores[:, 0], options.n_best)
        # At most `width` of the continuations are <stop>, so twice as many fill the beam.
        candidates = (scores.unsqueeze(2) + log_probs).flatten(1)
        values, index = candidates.topk(min(2 * width, candidates.shape[1]))
        parents, tokens = index // vocab, index % vocab
        is_stop = tokens == STOP

        penalty = length_normalizer(emitted, options.length_penalty)
        stopped = values.masked_fill(~is_stop, -math.inf)[:, :width]
        ranks = stopped / penalty
        covered = torch.zeros_like(scores)
        if coverage is not None:
            coverage = coverage.add(step.weights, width)
            covered = coverage.penalty(rows)
            ranks = ranks + covered.gather(1, parents[:, :width])
        _offer(finished, progress.done, ranks, stopped, emitted - 1, parents[:, :width])

        scores, which = values.masked_fill(is_stop, -math.inf).topk(width)
        parents, tokens = parents.gather(1, which), tokens.gather(1, which)
        trace.append(Record(rows, tokens, parents, _by_row(step.weights, batch)))
        if emitted == options.max_length:
            slots = torch.arange(width, device=device).expand_as(parents)
            ranks = scores / penalty + covered.gather(1, parents)
            _offer(finished, progress.done, ranks, scores, emitted, slots)
            break

        # log P only falls, the length penalty only grows and that of coverage is never above
        # zero: this is what a row can reach.
        bound = scores[:, 0] / length_normalizer(options.max_length, options.length_penalty)
        progress.done |= ~(finished.ranks[:, -1] < bound)
        if progress.ended(emitted):
            break
        before = (of_row * width + parents).flatten()
        state = step.state.select(before)
        if options.block_ngrams is not None:
            begun = history.flatten(0, 1)[before].unflatten(0, (batch, width))
            history = torch.cat([begun, tokens.unsqueeze(2)], 2)
        if coverage is not None:
            coverage = coverage.select(before, width)
    progress.check()
    if not options.need_weights:
        trace = [record._replace(weights=None) for record in trace]
    return trace, finished


def _offer(
    finished: Finished, done: Tensor, ranks: Tensor, scores: Tensor, length: int, slots: Tensor
) -> None:
    """Put the candidates of the rows that are not done where they belong."""
    rows = torch.arange(len(done), device=done.device)
    finished.offer(rows, ranks.masked_fill(done.unsqueeze(1), -math.inf), scores, length, slots)


def _by_row(weights: Tensor | None, rows: int) -> Tensor | None:
    """Weights (R * k, S) as those of each row, (R, k, S)."""
    return None if weights is None else weights.unflatten(0, (rows, -1))
