# SPDX-License-Identifier: Apache-2.0
"""Search for target sequences: greedy, sampling and beam search, for a batch of sources.

Called by ``Seq2Seq.generate``. Works on anything that has ``encode_source`` and ``step``,
which is called once a step for all hypotheses of all rows that are not finished; greedy and
beam search of a model that offers a :class:`FusedSearch` are one operator instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import SearchError
from .types import PAD, START, STOP, DecoderState, GenerateOutput

__all__ = [
    "EncodedSource",
    "FusedSearch",
    "Hypothesis",
    "SearchModel",
    "Step",
    "beam",
    "greedy",
    "sample",
]


class Hypothesis(NamedTuple):
    """A target sequence that a search has found for one source."""

    tokens: list[int]  # without <start> and <stop>
    #: Sum of the tokens' log-probabilities, in nats. That of ``<stop>`` is in it if the
    #: search reached it, which is so exactly if there are fewer than max_length tokens.
    score: float
    weights: Tensor | None  # (len(tokens), S of the row), attention; None if there is none


def _select_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows of a (., N, .) tensor, laid out row by row, as the operators read memories."""
    return tensor.transpose(0, 1).index_select(0, rows).transpose(0, 1)


class EncodedSource(NamedTuple):
    """What the decoder attends to, one row per hypothesis; all None without attention."""

    memory: Tensor | None  # (S, N, M)
    keys: Tensor | None  # (S, N, A), the projected memory
    lengths: Tensor | None  # (N,), valid positions

    def select(self, rows: Tensor) -> EncodedSource:
        """The given rows (N',), which may repeat."""
        return EncodedSource(
            None if self.memory is None else _select_rows(self.memory, rows),
            None if self.keys is None else _select_rows(self.keys, rows),
            None if self.lengths is None else self.lengths.index_select(0, rows),
        )


class Step(NamedTuple):
    """One step of all hypotheses."""

    log_probs: Tensor  # (N, V), of the next token, in nats
    weights: Tensor | None  # (N, S), attention
    state: DecoderState


class FusedSearch(Protocol):
    """Greedy and beam search in one operator, as :func:`pyseq.functional.generate` does it."""

    def __call__(
        self,
        encoded: EncodedSource,
        state: DecoderState,
        *,
        max_length: int,
        beam_size: int,
        length_penalty: float,
        need_weights: bool,
    ) -> GenerateOutput:
        """The best sequence of each row of what ``encode_source`` gave."""


class SearchModel(Protocol):
    """What the searches need of a model, such as :class:`pyseq.seq2seq.Seq2Seq`.

    One that also has a method ``fused_search``, without arguments, may return there a
    :class:`FusedSearch` that does the same as the searches here do with its ``step``, or
    None where it cannot.
    """

    def modules(self) -> Iterator[torch.nn.Module]:
        """All modules of the model; they are in eval mode during a search."""

    def encode_source(self, source: Tensor, lengths: Tensor) -> tuple[EncodedSource, DecoderState]:
        """What to attend to, and the state before the first token, for source (B, S)."""

    def step(
        self, tokens: Tensor, encoded: EncodedSource, state: DecoderState, *, need_weights: bool
    ) -> Step:
        """Read the tokens (N,) and predict the next ones."""


def greedy(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    *,
    max_length: int,
    need_weights: bool = True,
) -> list[Hypothesis]:
    """Take the likeliest token at every step.

    Args:
        model: the model; dropout is off during the search, whatever its mode.
        source: (B, S) int64, token ids.
        source_lengths: (B,) int64, valid tokens of each row.
        max_length: the most tokens to emit, ``<stop>`` included.
        need_weights: give the attention weights, if the model has attention.

    Returns:
        One hypothesis per row.

    Raises:
        ValueError: an option is out of its range.
        SearchError: the model's logits are not finite; a RuntimeError.
    """
    _check_max_length(max_length)
    fused = _fused_search(model)
    if fused is not None:
        return _search_fused(
            model,
            fused,
            source,
            source_lengths,
            max_length=max_length,
            beam_size=1,
            length_penalty=0.0,
            need_weights=need_weights,
        )
    return _follow(
        model,
        source,
        source_lengths,
        lambda log_probs: log_probs[:, STOP:].argmax(1) + STOP,
        max_length=max_length,
        need_weights=need_weights,
    )


def sample(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    *,
    max_length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    need_weights: bool = True,
) -> list[Hypothesis]:
    """Draw every token from the model's distribution, sharpened or cut.

    The scores are log-probabilities under the model itself, whatever the options.

    Args:
        model, source, source_lengths, max_length, need_weights: as in :func:`greedy`.
        temperature: what log-probabilities are divided by, above 0; less than 1 sharpens.
        top_k: draw from the so many likeliest tokens only. Default: from all.
        top_p: draw from the fewest likeliest tokens whose probabilities (at that
            temperature and among the top_k) add up to this, in (0, 1].
        generator: source of randomness on the device of the model. Default: torch's.

    Returns:
        One hypothesis per row.

    Raises:
        ValueError: an option is out of its range.
        SearchError: the model's logits are not finite; a RuntimeError.

    Reference:
        Fan et al. 2018, arXiv 1805.04833 (top-k); Holtzman et al. 2020, arXiv 1904.09751,
        eq. 2 and 3 (top-p).
    """
    _check_max_length(max_length)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, got {temperature!r}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k!r}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p!r}")

    def draw(log_probs: Tensor) -> Tensor:
        count = log_probs.shape[1] if top_k is None else min(top_k, log_probs.shape[1])
        values, tokens = log_probs.topk(count)  # in descending order
        probs = torch.softmax(values / temperature, 1)
        # A token stays if those before it do not yet reach top_p; the first always does.
        probs = probs.where(probs.cumsum(1) - probs < top_p, 0)
        choice = torch.multinomial(probs, 1, generator=generator)
        return tokens.gather(1, choice).squeeze(1)

    return _follow(
        model, source, source_lengths, draw, max_length=max_length, need_weights=need_weights
    )


def beam(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    *,
    max_length: int,
    beam_size: int,
    length_penalty: float = 0.0,
    need_weights: bool = True,
) -> list[Hypothesis]:
    """Follow the ``beam_size`` best unfinished hypotheses of each row.

    A hypothesis is finished when ``<stop>`` is among the ``beam_size`` best continuations
    of its row. The best one is that of the highest ``log P / lp``, with
    ``lp = ((5 + n) / 6) ** length_penalty`` for n emitted tokens, ``<stop>`` included. A row
    is done when no unfinished hypothesis can become better than its best finished one.
    Those that max_length cuts off compete as they are.

    Args:
        model, source, source_lengths, max_length, need_weights: as in :func:`greedy`.
        beam_size: unfinished hypotheses to follow in each row.
        length_penalty: the exponent, at least 0; 0 compares plain log-probabilities.

    Returns:
        The best hypothesis of each row; its score is log P, without the penalty.

    Raises:
        ValueError: an option is out of its range.
        SearchError: the model's logits are not finite; a RuntimeError.

    Reference:
        Wu et al. 2016, arXiv 1609.08144, eq. 14, without its coverage penalty.
    """
    _check_max_length(max_length)
    if beam_size < 1:
        raise ValueError(f"beam_size must be at least 1, got {beam_size!r}")
    if not 0 <= length_penalty < math.inf:
        raise ValueError(f"length_penalty must be a number of at least 0, got {length_penalty!r}")
    fused = _fused_search(model)
    if fused is not None:
        return _search_fused(
            model,
            fused,
            source,
            source_lengths,
            max_length=max_length,
            beam_size=beam_size,
            length_penalty=length_penalty,
            need_weights=need_weights,
        )
    batch = source.shape[0]
    if batch == 0:
        return []

    with _search_mode(model):
        encoded, state = model.encode_source(source, source_lengths)
        rows = torch.arange(batch, device=source.device)  # the unfinished ones
        tokens = torch.full((batch, 1), START, device=source.device)
        scores = state.feed.new_zeros(batch, 1)  # log P of each hypothesis
        best = _Best.none(scores.squeeze(1))
        trace: list[_Record] = []
        for emitted in range(1, max_length + 1):
            width = tokens.shape[1]
            step = model.step(tokens.flatten(), encoded, state, need_weights=need_weights)
            log_probs = _emittable(step.log_probs).unflatten(0, (-1, width))
            vocab = log_probs.shape[2]
            # At most `width` of the continuations are <stop>, so twice the beam size is
            # enough to fill the beam with others.
            flat = (scores.unsqueeze(2) + log_probs).flatten(1)
            values, index = flat.topk(min(2 * beam_size, flat.shape[1]))
            parents, tokens = index // vocab, index % vocab
            is_stop = tokens == STOP

            stopped = values.masked_fill(~is_stop, -math.inf)[:, :beam_size]
            stop_scores, which = stopped.max(1, keepdim=True)
            lengths = torch.full_like(rows, emitted - 1)
            penalty = _penalty(emitted, length_penalty)
            parent = parents.gather(1, which).squeeze(1)
            best.offer(rows, stop_scores.squeeze(1), penalty, lengths, parent)

            new_width = min(beam_size, values.shape[1])
            scores, which = values.masked_fill(is_stop, -math.inf).topk(new_width)
            parents, tokens = parents.gather(1, which), tokens.gather(1, which)
            trace.append(_Record.of(rows, batch, tokens, parents, step.weights))
            if emitted == max_length:
                best.offer(rows, scores[:, 0], penalty, lengths + 1, torch.zeros_like(rows))
                break

            # log P only falls and the penalty only grows: this is what a row can reach.
            bound = scores[:, 0] / _penalty(max_length, length_penalty)
            kept = (best.ranks[rows] < bound).nonzero().squeeze(1)
            if len(kept) == 0:
                break
            first = kept.unsqueeze(1) * width  # each row's first hypothesis in this step
            state = _select_state(step.state, (first + parents[kept]).flatten())
            if len(kept) < len(rows) or new_width != width:
                # All hypotheses of a row have the same memory, so it is only their number
                # that matters.
                encoded = encoded.select(first.expand(-1, new_width).flatten())
            rows, tokens, scores = rows[kept], tokens[kept], scores[kept]
        return _hypotheses(trace, best.scores, best.lengths, best.slots, source_lengths)


def _fused_search(model: SearchModel) -> FusedSearch | None:
    find: Callable[[], FusedSearch | None] | None = getattr(model, "fused_search", None)
    return None if find is None else find()


def _search_fused(
    model: SearchModel,
    fused: FusedSearch,
    source: Tensor,
    source_lengths: Tensor,
    *,
    max_length: int,
    beam_size: int,
    length_penalty: float,
    need_weights: bool,
) -> list[Hypothesis]:
    """One hypothesis per row, by a search in one operator."""
    if source.shape[0] == 0:
        return []
    with _search_mode(model):
        encoded, state = model.encode_source(source, source_lengths)
        found = fused(
            encoded,
            state,
            max_length=max_length,
            beam_size=beam_size,
            length_penalty=length_penalty,
            need_weights=need_weights,
        )
    columns = (found.tokens, found.lengths, found.scores, source_lengths)
    hypotheses = []
    for row, (tokens, length, score, source_length) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        cut = None if found.weights is None else found.weights[row, :length, :source_length]
        hypotheses.append(Hypothesis(tokens[:length], score, cut))
    return hypotheses


def _follow(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    choose: Callable[[Tensor], Tensor],
    *,
    max_length: int,
    need_weights: bool,
) -> list[Hypothesis]:
    """One hypothesis per row; ``choose`` picks the next tokens (N,) by log_probs (N, V)."""
    batch = source.shape[0]
    if batch == 0:
        return []
    with _search_mode(model):
        encoded, state = model.encode_source(source, source_lengths)
        rows = torch.arange(batch, device=source.device)  # the unfinished ones
        tokens = torch.full((batch,), START, device=source.device)
        scores = state.feed.new_zeros(batch)
        lengths = torch.zeros_like(rows)
        trace: list[_Record] = []
        for _ in range(max_length):
            step = model.step(tokens, encoded, state, need_weights=need_weights)
            log_probs = _emittable(step.log_probs)
            tokens = choose(log_probs)
            chosen = tokens.unsqueeze(1)
            scores[rows] += log_probs.gather(1, chosen).squeeze(1)
            parents = torch.zeros_like(chosen)
            trace.append(_Record.of(rows, batch, chosen, parents, step.weights))

            going = tokens != STOP
            lengths[rows] += going
            state = step.state
            kept = going.nonzero().squeeze(1)
            if len(kept) == 0:
                break
            if len(kept) < len(rows):
                rows, tokens = rows[kept], tokens[kept]
                encoded, state = encoded.select(kept), _select_state(state, kept)
        return _hypotheses(trace, scores, lengths, torch.zeros_like(lengths), source_lengths)


class _Record(NamedTuple):
    """One step of a search: R unfinished rows, k hypotheses in each."""

    position: Tensor  # (B,), where a row is among the R; 0 for finished ones
    tokens: Tensor  # (R, k), the tokens emitted
    parents: Tensor  # (R, k), the hypotheses of the step before that they continue
    weights: Tensor | None  # (R, k of the step before, S), attention

    @classmethod
    def of(
        cls, rows: Tensor, batch: int, tokens: Tensor, parents: Tensor, weights: Tensor | None
    ) -> _Record:
        position = rows.new_zeros(batch)
        position[rows] = torch.arange(len(rows), device=rows.device)
        return cls(
            position,
            tokens,
            parents,
            None if weights is None else weights.unflatten(0, (len(rows), -1)),
        )


class _Best(NamedTuple):
    """The best finished hypothesis of each row, each (B,)."""

    ranks: Tensor  # log P over the length penalty, by which they are compared
    scores: Tensor  # log P
    lengths: Tensor  # tokens, without <stop>
    slots: Tensor  # which hypothesis of the step of the last token it is

    @classmethod
    def none(cls, like: Tensor) -> _Best:
        lowest = torch.full_like(like, -math.inf)
        zeros = torch.zeros_like(like, dtype=torch.int64)
        return cls(lowest, lowest.clone(), zeros, zeros.clone())

    def offer(
        self, rows: Tensor, scores: Tensor, penalty: float, lengths: Tensor, slots: Tensor
    ) -> None:
        """Put one candidate (R,) for each of ``rows`` where it is better."""
        ranks = scores / penalty
        better = ranks > self.ranks[rows]
        for kept, offered in zip(self, (ranks, scores, lengths, slots), strict=True):
            kept[rows[better]] = offered[better]


def _hypotheses(
    trace: list[_Record], scores: Tensor, lengths: Tensor, slots: Tensor, source_lengths: Tensor
) -> list[Hypothesis]:
    """Follow the parents back from the last token of each row's result.

    Args:
        trace: all steps, in order.
        scores, lengths, slots: (B,) log P, number of tokens, and the hypothesis that the
            last token belongs to.
        source_lengths: (B,), to cut the weights.
    """
    tokens, weights = [], []
    slot = torch.zeros_like(slots)
    for number, record in reversed(list(enumerate(trace, 1))):
        # Beyond a row's last token slot and position stay 0: valid, and cut off below.
        slot = torch.where(lengths == number, slots, slot)
        tokens.append(record.tokens[record.position, slot])
        slot = record.parents[record.position, slot].where(lengths >= number, 0)
        if record.weights is not None:
            weights.append(record.weights[record.position, slot])
    columns = torch.stack(tokens[::-1], 1).tolist()
    attention = torch.stack(weights[::-1], 1) if weights else None  # (B, T, S)
    found = []
    sizes = zip(scores.tolist(), lengths.tolist(), source_lengths.tolist(), strict=True)
    for row, (score, length, source_length) in enumerate(sizes):
        cut = None if attention is None else attention[row, :length, :source_length]
        found.append(Hypothesis(columns[row][:length], score, cut))
    return found


def _select_state(state: DecoderState, rows: Tensor) -> DecoderState:
    hidden = state.hidden
    if isinstance(hidden, Tensor):
        selected = hidden.index_select(1, rows)
        return DecoderState(selected, state.feed.index_select(0, rows))
    h, c = hidden
    return DecoderState(
        (h.index_select(1, rows), c.index_select(1, rows)), state.feed.index_select(0, rows)
    )


def _emittable(log_probs: Tensor) -> Tensor:
    """``<pad>`` and ``<start>`` are never emitted; the others keep their probabilities.

    Raises:
        SearchError: there is a NaN, which no comparison would ever choose or refuse.
    """
    if log_probs.isnan().any():
        raise SearchError("the model's logits must be finite, got NaN or infinity")
    log_probs = log_probs.clone()
    log_probs[:, [PAD, START]] = -math.inf
    return log_probs


def _penalty(length: int, exponent: float) -> float:
    return ((5 + length) / 6) ** exponent


def _check_max_length(max_length: int) -> None:
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1 token, got {max_length!r}")


@contextmanager
def _search_mode(model: SearchModel) -> Iterator[None]:
    """No gradients, and every module of the model in eval mode until the end."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
