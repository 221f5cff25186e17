# SPDX-License-Identifier: Apache-2.0
"""Search for target sequences: greedy, sampling and beam search, for a batch of sources.

Called by ``Seq2Seq.generate``. Works on anything that has ``encode_source`` and ``step``,
which is called once a step for all hypotheses of all rows that are not finished; where a
model offers a :class:`FusedSearch`, what that can do is one operator instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import SearchError
from .types import PAD, START, STOP, UNK, Copies, DecoderState, GenerateOutput, kind

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


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What to look for and how; every option is for a whole batch.

    Args:
        max_length: the most tokens to emit, ``<stop>`` included.
        min_length: the fewest tokens to emit, ``<stop>`` not counted.
        beam_size: unfinished hypotheses to follow in each row; 1 without a penalty is greedy
            search.
        n_best: hypotheses to return for each row: up to ``beam_size`` of them, the best one
            first, or with ``sample`` as many independent draws.
        length_penalty: the exponent alpha of ``lp``, at least 0; 0 compares plain
            log-probabilities. See :func:`beam`.
        coverage_penalty: the factor beta of ``cp``, at least 0; above 0 it needs a model with
            attention. See :func:`beam`.
        block_ngrams: no sequence of so many tokens is emitted twice by a hypothesis.
            Default: none is blocked.
        prefix: token ids that each row begins with, one sequence for each row or a single one
            for all rows. They count as emitted tokens, also in the score, and neither
            ``min_length`` nor ``block_ngrams`` keeps one of them out.
        sample: draw each token from the model's distribution instead of searching for the
            likeliest sequence.
        temperature: what log-probabilities are divided by, above 0; less than 1 sharpens.
        top_k: draw from the so many likeliest tokens only. Default: from all.
        top_p: draw from the fewest likeliest tokens whose probabilities (at that temperature
            and among the top_k) add up to this, in (0, 1].
        need_weights: give the attention weights, if the model has attention.

    Raises:
        ValueError: an option is out of its range, or does not go with another one.

    Reference:
        Wu et al. 2016, arXiv 1609.08144, eq. 14 (penalties); Paulus et al. 2017, arXiv
        1705.04304, section 2.5 (no n-gram twice); Fan et al. 2018, arXiv 1805.04833 (top-k);
        Holtzman et al. 2020, arXiv 1904.09751, eq. 2 and 3 (top-p).
    """

    max_length: int
    min_length: int = 0
    beam_size: int = 1
    n_best: int = 1
    length_penalty: float = 0.0
    coverage_penalty: float = 0.0
    block_ngrams: int | None = None
    prefix: Sequence[Sequence[int]] = ()
    sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    need_weights: bool = True

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1 token, got {self.max_length!r}")
        if not 0 <= self.min_length <= self.max_length:
            raise ValueError(
                f"min_length must be between 0 and max_length = {self.max_length} tokens, "
                f"got {self.min_length!r}"
            )
        for name in ("beam_size", "n_best", "block_ngrams", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        for name in ("length_penalty", "coverage_penalty"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        try:
            _penalty(self.max_length, self.length_penalty)
        except OverflowError:
            raise ValueError(
                "length_penalty must be so small that ((5 + max_length) / 6) ** length_penalty "
                f"is finite, got {self.length_penalty!r}"
            ) from None
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a positive number, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        self._check_prefix()
        self._check_together()

    def _check_prefix(self) -> None:
        for sequence in self.prefix:
            if isinstance(sequence, int):
                raise ValueError(
                    f"prefix must be sequences of token ids, got {kind(sequence)} in it"
                )
            if len(sequence) > self.max_length:
                raise ValueError(
                    f"prefix must have at most max_length = {self.max_length} tokens, "
                    f"got {len(sequence)}"
                )
            for token in sequence:
                if token <= STOP:
                    raise ValueError(f"prefix must hold token ids of at least {UNK}, got {token!r}")

    def _check_together(self) -> None:
        if self.sample:
            # What compares hypotheses has no meaning for draws.
            for name in ("beam_size", "length_penalty", "coverage_penalty"):
                value, default = getattr(self, name), type(self).__dict__[name]
                if value != default:
                    raise ValueError(f"{name} must be {default} for sampling, got {value!r}")
            return
        for name in ("temperature", "top_k", "top_p"):
            value, default = getattr(self, name), type(self).__dict__[name]
            if value != default:
                raise ValueError(f"{name} must be {default} without sample=True, got {value!r}")
        if self.n_best > self.beam_size:
            raise ValueError(
                f"n_best must be at most beam_size = {self.beam_size}, got {self.n_best!r}"
            )

    def follows_one(self) -> bool:
        """Whether each result is found token by token, as greedy search and sampling do."""
        return self.beam_size == 1 and self.length_penalty == self.coverage_penalty == 0


class Hypothesis(NamedTuple):
    """A target sequence that a search has found for one source."""

    tokens: list[int]  # without <start> and <stop>
    #: Sum of the tokens' log-probabilities, in nats. That of ``<stop>`` is in it if the
    #: search reached it, which is so exactly if there are fewer than max_length tokens.
    score: float
    weights: Tensor | None  # (len(tokens), S of the row), attention; None if there is none


class StreamedToken(NamedTuple):
    """A token that :func:`stream` has found."""

    row: int  # of the batch
    token: int  # never <stop>: a row that emits it ends
    score: float  # its log-probability, in nats
    weights: Tensor | None  # (S of the row,), attention; None if there is none


class Selectable(Protocol):
    """What a search carries along for its hypotheses, a row for each of them."""

    def select(self, rows: Tensor) -> Selectable:
        """That of the given rows (N',) int64, which may repeat."""


def _select_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows of a (., N, .) tensor, laid out row by row, as the operators read memories."""
    return tensor.transpose(0, 1).index_select(0, rows).transpose(0, 1)


class EncodedSource(NamedTuple):
    """What the decoder attends to, one row per hypothesis; None without attention."""

    memory: Tensor | None  # (S, N, M)
    keys: Tensor | None  # (S, N, A), the projected memory
    lengths: Tensor | None  # (N,), valid positions
    context: Tensor | None = None  # (N, C), of a decoder that reads one at every step
    copies: Copies | None = None  # what may be copied, for a model that copies

    def select(self, rows: Tensor) -> EncodedSource:
        """The given rows (N'), which may repeat."""
        return EncodedSource(
            None if self.memory is None else _select_rows(self.memory, rows),
            None if self.keys is None else _select_rows(self.keys, rows),
            None if self.lengths is None else self.lengths.index_select(0, rows),
            None if self.context is None else self.context.index_select(0, rows),
            None if self.copies is None else self.copies.select(rows),
        )


class Step(NamedTuple):
    """One step of all hypotheses."""

    log_probs: Tensor  # (N, V), of the next token, in nats
    weights: Tensor | None  # (N, S), attention
    state: Any  # Selectable: of the kind that the step was given


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
        min_length: int,
        n_best: int,
        block_ngrams: int | None,
        prefix: Tensor | None,
    ) -> GenerateOutput:
        """The best sequences of each row of what ``encode_source`` gave."""


class SearchModel(Protocol):
    """What the searches need of a model, such as :class:`pyseq.seq2seq.Seq2Seq`.

    What it carries from step to step, ``encoded`` and ``state``, is its own affair as long as
    it is :class:`Selectable`. One that also has a method ``fused_search``, without arguments,
    may return there a :class:`FusedSearch` that does the same as the searches here do with its
    ``step``, or None where it cannot.
    """

    def modules(self) -> Iterator[torch.nn.Module]:
        """All modules of the model; they are in eval mode during a search."""

    def encode_source(self, source: Tensor, lengths: Tensor) -> tuple[Any, Any]:
        """What to attend to, and the state before the first token, for source (B, S)."""

    def step(self, tokens: Tensor, encoded: Any, state: Any, *, need_weights: bool) -> Step:
        """Read the tokens (N,) and predict the next ones."""


class _Parts(NamedTuple):
    """What each model of an ensemble carries along."""

    parts: tuple[Selectable, ...]

    def select(self, rows: Tensor) -> _Parts:
        return _Parts(tuple(part.select(rows) for part in self.parts))


class Ensemble:
    """Several models that predict together: ``p(y) = sum_i w_i p_i(y)``.

    All searches take it like a model. Attention weights are averaged likewise, if every model
    has them.

    Args:
        models: at least one, all with the same token ids on both sides.
        weights: how much each model counts, above 0; they are divided by their sum. Default:
            all the same.

    Raises:
        ValueError: there is no model, or the weights do not go with the models.
    """

    def __init__(
        self, models: Sequence[SearchModel], *, weights: Sequence[float] | None = None
    ) -> None:
        self.models = tuple(models)
        if not self.models:
            raise ValueError("models must hold at least one model, got none")
        shares = [1.0] * len(self.models) if weights is None else [float(w) for w in weights]
        if len(shares) != len(self.models) or not all(0 < w < math.inf for w in shares):
            raise ValueError(
                f"weights must be {len(self.models)} positive numbers, one for each model, "
                f"got {weights!r}"
            )
        self.weights = tuple(share / sum(shares) for share in shares)

    def modules(self) -> Iterator[torch.nn.Module]:
        """All modules of all models."""
        return chain.from_iterable(model.modules() for model in self.models)

    def encode_source(self, source: Tensor, lengths: Tensor) -> tuple[_Parts, _Parts]:
        """What each model attends to, and their states; see :class:`SearchModel`."""
        encoded, states = zip(
            *(model.encode_source(source, lengths) for model in self.models), strict=True
        )
        return _Parts(encoded), _Parts(states)

    def step(self, tokens: Tensor, encoded: _Parts, state: _Parts, *, need_weights: bool) -> Step:
        """One step of every model; see :class:`SearchModel`.

        Raises:
            ValueError: the models have different numbers of target tokens.
        """
        steps = [
            model.step(tokens, *parts, need_weights=need_weights)
            for model, *parts in zip(self.models, encoded.parts, state.parts, strict=True)
        ]
        sizes = [step.log_probs.shape[1] for step in steps]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"the models of an ensemble must have the same target tokens, got {sizes} of them"
            )
        terms = [
            step.log_probs + math.log(share)
            for step, share in zip(steps, self.weights, strict=True)
        ]
        found = [step.weights for step in steps if step.weights is not None]
        attention = None
        if len(found) == len(steps):
            attention = sum(
                (share * each for share, each in zip(self.weights, found, strict=True)),
                torch.zeros_like(found[0]),
            )
        return Step(
            torch.logsumexp(torch.stack(terms), 0),
            attention,
            _Parts(tuple(step.state for step in steps)),
        )


def search(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    options: SearchOptions,
    *,
    generator: torch.Generator | None = None,
) -> list[list[Hypothesis]]:
    """Find target sequences for each source, as :func:`greedy`, :func:`sample` and
    :func:`beam` do, with all options.

    Args:
        model: the model; dropout is off during the search, whatever its mode.
        source: (B, S) int64, token ids.
        source_lengths: (B,) int64, valid tokens of each row.
        options: what to look for and how.
        generator: source of randomness for ``options.sample``, on the device of the model.
            Default: torch's.

    Returns:
        For each row ``options.n_best`` hypotheses, the best one first; draws in their order.
        Fewer, but one at least, if the search found no more.

    Raises:
        ValueError: the prefix or the coverage penalty does not go with the sources or the
            model.
        SearchError: the model's logits are not finite; a RuntimeError.
    """
    _check_prefix_rows(options, source.shape[0])
    if source.shape[0] == 0:
        return []
    if _fuses(options):
        fused = _fused_search(model)
        if fused is not None:
            return _search_fused(model, fused, source, source_lengths, options)
    if options.follows_one():
        return _follow(model, source, source_lengths, options, generator)
    return _beam(model, source, source_lengths, options)


def stream(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    options: SearchOptions,
    *,
    generator: torch.Generator | None = None,
) -> Iterator[StreamedToken]:
    """Yield the tokens of greedy search or sampling one by one, as they are found.

    Between two tokens of a row the model makes one step. They are those that :func:`search`
    finds with the same options and the same generator. The model must not be changed before
    the end.

    Args:
        model, source, source_lengths, generator: as in :func:`search`.
        options: as in :func:`search`, of one hypothesis for each row and without penalties.

    Returns:
        An iterator: for each step one token of each unfinished row, in the order of the rows.

    Raises:
        ValueError, SearchError: as :func:`search`; the options are checked at once.
    """
    if not options.follows_one() or options.n_best != 1:
        raise ValueError(
            "a stream follows one hypothesis: beam_size and n_best must be 1 and the penalties 0, "
            f"got {options}"
        )
    _check_prefix_rows(options, source.shape[0])
    return _stream(model, source, source_lengths, options, generator)


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
        model, source, source_lengths: as in :func:`search`.
        max_length, need_weights: see :class:`SearchOptions`.

    Returns:
        One hypothesis per row.

    Raises:
        ValueError: an option is out of its range.
        SearchError: the model's logits are not finite; a RuntimeError.
    """
    options = SearchOptions(max_length=max_length, need_weights=need_weights)
    return _firsts(search(model, source, source_lengths, options))


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
        model, source, source_lengths, generator: as in :func:`search`.
        max_length, temperature, top_k, top_p, need_weights: see :class:`SearchOptions`.

    Returns:
        One hypothesis per row.

    Raises:
        ValueError: an option is out of its range.
        SearchError: the model's logits are not finite; a RuntimeError.

    Reference:
        Fan et al. 2018, arXiv 1805.04833 (top-k); Holtzman et al. 2020, arXiv 1904.09751,
        eq. 2 and 3 (top-p).
    """
    options = SearchOptions(
        max_length=max_length,
        sample=True,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        need_weights=need_weights,
    )
    return _firsts(search(model, source, source_lengths, options, generator=generator))


def beam(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    *,
    max_length: int,
    beam_size: int,
    length_penalty: float = 0.0,
    coverage_penalty: float = 0.0,
    need_weights: bool = True,
) -> list[Hypothesis]:
    """Follow the ``beam_size`` best unfinished hypotheses of each row.

    A hypothesis is finished when ``<stop>`` is among the ``beam_size`` best continuations
    of its row. Finished ones are compared by ``log P / lp + cp``, with
    ``lp = ((5 + n) / 6) ** length_penalty`` for n emitted tokens, ``<stop>`` included, and
    ``cp = coverage_penalty * sum_s log(min(sum_t a_t(s), 1))`` for the attention weights a_t
    of those n steps at the row's source positions s. A row is done when no unfinished
    hypothesis can become better than the finished ones to be returned. Those that max_length
    cuts off compete as they are.

    Args:
        model, source, source_lengths: as in :func:`search`.
        max_length, beam_size, length_penalty, coverage_penalty, need_weights: see
            :class:`SearchOptions`.

    Returns:
        The best hypothesis of each row; its score is log P, without the penalties.

    Raises:
        ValueError: an option is out of its range, or the model has no attention for the
            coverage penalty.
        SearchError: the model's logits are not finite; a RuntimeError.

    Reference:
        Wu et al. 2016, arXiv 1609.08144, eq. 14.
    """
    options = SearchOptions(
        max_length=max_length,
        beam_size=beam_size,
        length_penalty=length_penalty,
        coverage_penalty=coverage_penalty,
        need_weights=need_weights,
    )
    return _firsts(search(model, source, source_lengths, options))


def _firsts(found: list[list[Hypothesis]]) -> list[Hypothesis]:
    return [hypotheses[0] for hypotheses in found]


# In one operator


def _fuses(options: SearchOptions) -> bool:
    """Whether a :class:`FusedSearch` can search like that."""
    return not options.sample and options.coverage_penalty == 0


def _fused_search(model: SearchModel) -> FusedSearch | None:
    find: Callable[[], FusedSearch | None] | None = getattr(model, "fused_search", None)
    return None if find is None else find()


def _search_fused(
    model: SearchModel,
    fused: FusedSearch,
    source: Tensor,
    source_lengths: Tensor,
    options: SearchOptions,
) -> list[list[Hypothesis]]:
    with _search_mode(model):
        encoded, state = model.encode_source(source, source_lengths)
        prefix: Tensor | None = None
        if any(options.prefix):
            prefix = _Rules.of(options, source.shape[0], source.device).prefix
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
        )
    columns = (found.tokens, found.lengths, found.scores)
    widths = source_lengths.tolist()
    hypotheses: list[list[Hypothesis]] = [[] for _ in widths]
    for place, (tokens, length, score) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        row = place // options.n_best
        if hypotheses[row] and score == -math.inf:
            continue  # it is none
        cut = None if found.weights is None else found.weights[place, :length, : widths[row]]
        hypotheses[row].append(Hypothesis(tokens[:length], score, cut))
    return hypotheses


# Which tokens may be emitted


def choose(logits: Tensor, draws: Tensor | None = None) -> Tensor:
    """A token (N,) for each row of logits (N, V): the likeliest, or by a draw.

    The draw is by inversion: of the tokens in their order it takes the first up to which the
    probabilities, of all that may be emitted, add up to more than ``draws``. ``<pad>`` and
    ``<start>`` may not. Whatever the logits hold, the result is a token id.

    Args:
        logits: (N, V); log-probabilities will do.
        draws: (N,), uniform in [0, 1). Default: the likeliest, of equal ones the first.
    """
    if draws is None:
        return logits[:, STOP:].argmax(1) + STOP
    sums = torch.softmax(logits[:, STOP:], 1).cumsum(1)
    tokens = (sums <= draws.unsqueeze(1) * sums[:, -1:]).sum(1)
    # Should rounding have made it all of them, the last one with a share of the sum.
    last = (sums < sums[:, -1:]).sum(1)
    return torch.minimum(tokens, last) + STOP


class _Rules(NamedTuple):
    """What the options say of the next token."""

    min_length: int
    block_ngrams: int | None
    prefix: Tensor  # (B, P) int64, PAD beyond the end of a row's prefix

    @classmethod
    def of(cls, options: SearchOptions, rows: int, device: torch.device) -> _Rules:
        longest = max(map(len, options.prefix), default=0)
        padded = [[*tokens, *[PAD] * (longest - len(tokens))] for tokens in options.prefix]
        if not padded:
            padded = [[]]
        prefix = torch.tensor(padded, dtype=torch.int64, device=device)
        return cls(options.min_length, options.block_ngrams, prefix.expand(rows, longest))

    def apply(self, log_probs: Tensor, rows: Tensor, history: Tensor, emitted: int) -> Tensor:
        """``log_probs``, minus infinity for what must not be emitted.

        ``<pad>`` and ``<start>`` never are. The others keep their probabilities, so that
        scores stay those of the model.

        Args:
            log_probs: (N, V), the model's.
            rows: (N,), the row of the batch that each hypothesis is of.
            history: (N, emitted), what each has emitted; not read without block_ngrams.
            emitted: tokens that each has emitted.

        Raises:
            SearchError: there is a NaN, which no comparison would ever choose or refuse.
            ValueError: the prefix holds a token that the model does not have.
        """
        if log_probs.isnan().any():
            raise SearchError("the model's logits must be finite, got NaN or infinity")
        allowed = log_probs.clone()
        allowed[:, [PAD, START]] = -math.inf
        if emitted < self.min_length:
            allowed[:, STOP] = -math.inf
        if self.block_ngrams is not None and emitted >= self.block_ngrams:
            windows = history.unfold(1, self.block_ngrams, 1)  # (N, ngrams so far, n)
            last = history[:, emitted - self.block_ngrams + 1 :].unsqueeze(1)
            which, where = (windows[:, :, :-1] == last).all(2).nonzero(as_tuple=True)
            allowed[which, windows[which, where, -1]] = -math.inf
        if emitted < self.prefix.shape[1]:
            if emitted == 0 and self.prefix.max() >= log_probs.shape[1]:
                raise ValueError(
                    f"prefix must hold token ids below {log_probs.shape[1]}, "
                    f"got {int(self.prefix.max())}"
                )
            forced = self.prefix[rows, emitted].unsqueeze(1)
            own = torch.full_like(allowed, -math.inf)
            own.scatter_(1, forced, log_probs.gather(1, forced))
            allowed = torch.where(forced == PAD, allowed, own)
        return allowed


def _check_prefix_rows(options: SearchOptions, rows: int) -> None:
    if len(options.prefix) not in (0, 1, rows):
        raise ValueError(
            f"prefix must be one sequence for each of the {rows} rows, or a single one, "
            f"got {len(options.prefix)}"
        )


# One hypothesis for each row


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
    generator: torch.Generator | None,
) -> Iterator[_Emission]:
    """All steps of greedy search, or of ``n_best`` draws for each row, which stand side by side.

    The search's mode is left while the caller holds an emission.
    """
    draws = options.n_best
    count = source.shape[0] * draws
    with _search_mode(model):
        encoded, state = model.encode_source(source, source_lengths)
        rows = torch.arange(count, device=source.device)  # the unfinished ones
        if draws > 1:
            encoded, state = encoded.select(rows // draws), state.select(rows // draws)
    rules = _Rules.of(options, source.shape[0], source.device)
    tokens = torch.full_like(rows, START)
    history = rows.new_empty(count, 0)
    for emitted in range(options.max_length):
        with _search_mode(model):
            step = model.step(tokens, encoded, state, need_weights=options.need_weights)
            log_probs = rules.apply(step.log_probs, rows // draws, history, emitted)
            tokens = _draw(log_probs, options, generator) if options.sample else choose(log_probs)
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


def _draw(log_probs: Tensor, options: SearchOptions, generator: torch.Generator | None) -> Tensor:
    """One token (N,) from each of the distributions (N, V), sharpened and cut."""
    vocab = log_probs.shape[1]
    count = vocab if options.top_k is None else min(options.top_k, vocab)
    values, tokens = log_probs.topk(count)  # in descending order
    # Where everything is forbidden <stop> is taken, as greedy search does.
    nothing = values[:, :1] == -math.inf
    # Of the differences to the first, which no temperature makes infinite for all.
    below = (values - values[:, :1]).masked_fill(nothing, 0)
    probs = torch.softmax(below / max(options.temperature, torch.finfo(below.dtype).tiny), 1)
    # A token stays if those before it do not yet reach top_p; the first always does.
    probs = probs.where(probs.cumsum(1) - probs < options.top_p, 0)
    choice = torch.multinomial(probs, 1, generator=generator)
    return tokens.gather(1, choice).masked_fill(nothing, STOP).squeeze(1)


def _follow(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    options: SearchOptions,
    generator: torch.Generator | None,
) -> list[list[Hypothesis]]:
    draws = options.n_best
    count = source.shape[0] * draws
    trace: list[_Record] = []
    scores = torch.zeros(())
    lengths = torch.zeros(count, dtype=torch.int64, device=source.device)
    for emission in _walk(model, source, source_lengths, options, generator):
        if not trace:
            scores = torch.zeros_like(emission.scores)
        scores[emission.rows] += emission.scores
        lengths[emission.rows] += emission.tokens != STOP
        chosen = emission.tokens.unsqueeze(1)
        trace.append(
            _Record.of(emission.rows, count, chosen, torch.zeros_like(chosen), emission.weights)
        )
    lengths = lengths.where(scores > -math.inf, 0)  # where everything was forbidden
    found = _hypotheses(
        trace,
        _Finished.of_each_row(scores, lengths),
        source_lengths.repeat_interleave(draws),
    )
    return [
        list(chain.from_iterable(found[first : first + draws])) for first in range(0, count, draws)
    ]


def _stream(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    options: SearchOptions,
    generator: torch.Generator | None,
) -> Iterator[StreamedToken]:
    if source.shape[0] == 0:
        return
    widths = source_lengths.tolist()
    for emission in _walk(model, source, source_lengths, options, generator):
        columns = (emission.rows, emission.tokens, emission.scores)
        for place, (row, token, score) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            if token != STOP:
                attention = emission.weights
                cut = None if attention is None else attention[place, : widths[row]]
                yield StreamedToken(row, token, score, cut)


# Beam search


def _beam(
    model: SearchModel, source: Tensor, source_lengths: Tensor, options: SearchOptions
) -> list[list[Hypothesis]]:
    batch, beam_size = source.shape[0], options.beam_size
    with _search_mode(model):
        encoded, state = model.encode_source(source, source_lengths)
        rules = _Rules.of(options, batch, source.device)
        rows = torch.arange(batch, device=source.device)  # the unfinished ones
        tokens = torch.full((batch, 1), START, device=source.device)
        history = tokens.new_empty(batch, 1, 0)
        scores = torch.zeros(())  # (R, k), log P of each hypothesis
        finished = _Finished.none(scores.new_empty(0), 0)
        coverage = _Coverage.none(options, source_lengths.to(source.device))
        trace: list[_Record] = []
        for emitted in range(1, options.max_length + 1):
            width = tokens.shape[1]
            step = model.step(
                tokens.flatten(),
                encoded,
                state,
                need_weights=options.need_weights or coverage is not None,
            )
            if emitted == 1:
                scores = step.log_probs.new_zeros(batch, 1)
                finished = _Finished.none(scores.squeeze(1), options.n_best)
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

            penalty = _penalty(emitted, options.length_penalty)
            stopped = values.masked_fill(~is_stop, -math.inf)[:, :beam_size]
            ranks = stopped / penalty
            covered = torch.zeros_like(scores)
            if coverage is not None:
                coverage = coverage.add(step.weights)
                covered = coverage.penalty(rows)
                ranks = ranks + covered.gather(1, parents[:, :beam_size])
            finished.offer(rows, ranks, stopped, emitted - 1, parents[:, :beam_size])

            new_width = min(beam_size, values.shape[1])
            scores, which = values.masked_fill(is_stop, -math.inf).topk(new_width)
            parents, tokens = parents.gather(1, which), tokens.gather(1, which)
            trace.append(_Record.of(rows, batch, tokens, parents, step.weights))
            if emitted == options.max_length:
                ranks = scores / penalty + covered.gather(1, parents)
                slots = torch.arange(new_width, device=rows.device).expand_as(scores)
                finished.offer(rows, ranks, scores, emitted, slots)
                break

            # log P only falls, the length penalty only grows and that of coverage is never
            # above zero: this is what a row can reach.
            bound = scores[:, 0] / _penalty(options.max_length, options.length_penalty)
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
        return _hypotheses(trace, finished, source_lengths)


class _Coverage(NamedTuple):
    """How much attention each hypothesis has paid to each source position."""

    factor: float  # beta
    lengths: Tensor  # (B,), source positions of a row
    sums: Tensor | None  # (R, k, S), attention weights up to now; None before the first step

    @classmethod
    def none(cls, options: SearchOptions, lengths: Tensor) -> _Coverage | None:
        factor = options.coverage_penalty
        return cls(factor, lengths, None) if factor > 0 else None

    def add(self, weights: Tensor | None) -> _Coverage:
        """With the weights (R * k, S) of a step."""
        if weights is None:
            raise ValueError(
                "coverage_penalty needs a model with attention, got one that gives no weights"
            )
        if self.sums is None:
            return self._replace(sums=weights.unsqueeze(1))
        return self._replace(sums=self.sums + weights.view_as(self.sums))

    def penalty(self, rows: Tensor) -> Tensor:
        """``cp`` (R, k) of the hypotheses of these rows."""
        assert self.sums is not None
        positions = torch.arange(self.sums.shape[2], device=rows.device)
        padding = (positions >= self.lengths[rows].unsqueeze(1)).unsqueeze(1)
        # A weight may have underflowed: the logarithm stays finite, so that those which have
        # missed a position can still be compared.
        tiny = torch.finfo(self.sums.dtype).tiny
        return self.factor * self.sums.clamp(tiny, 1).log().masked_fill(padding, 0).sum(2)

    def select(self, before: Tensor, width: int) -> _Coverage:
        """That of the hypotheses (R' * width,), counted over all rows."""
        assert self.sums is not None
        sums = self.sums.flatten(0, 1)[before].unflatten(0, (-1, width))
        return self._replace(sums=sums)


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


class _Finished(NamedTuple):
    """The best finished hypotheses of each row, each (B, n), the best one first."""

    ranks: Tensor  # what they are compared by: log P over the length penalty, plus coverage's
    scores: Tensor  # log P
    lengths: Tensor  # tokens, without <stop>
    slots: Tensor  # which hypothesis of the step of the last token it is

    @classmethod
    def none(cls, like: Tensor, count: int) -> _Finished:
        """Nothing yet, for rows like those of ``like`` (B,)."""
        lowest = like.new_full((*like.shape, count), -math.inf)
        zeros = torch.zeros_like(lowest, dtype=torch.int64)
        return cls(lowest, lowest.clone(), zeros, zeros.clone())

    @classmethod
    def of_each_row(cls, scores: Tensor, lengths: Tensor) -> _Finished:
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


def _hypotheses(
    trace: list[_Record], finished: _Finished, source_lengths: Tensor
) -> list[list[Hypothesis]]:
    """Follow the parents back from the last token of each result.

    Args:
        trace: all steps, in order.
        finished: the results; those that were not found have a score of minus infinity.
        source_lengths: (B,), to cut the weights.
    """
    tokens, weights = [], []
    slot = torch.zeros_like(finished.slots)
    for number, record in reversed(list(enumerate(trace, 1))):
        # Beyond the last token slot and position stay 0: valid, and cut off below.
        slot = torch.where(finished.lengths == number, finished.slots, slot)
        position = record.position.unsqueeze(1)
        tokens.append(record.tokens[position, slot])
        slot = record.parents[position, slot].where(finished.lengths >= number, 0)
        if record.weights is not None:
            weights.append(record.weights[position, slot])
    columns = torch.stack(tokens[::-1], 2).tolist()
    attention = torch.stack(weights[::-1], 2) if weights else None  # (B, n, T, S)
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
            cut = None if attention is None else attention[row, place, :length, :source_length]
            best.append(Hypothesis(columns[row][place][:length], score, cut))
        found.append(best)
    return found


def _penalty(length: int, exponent: float) -> float:
    return ((5 + length) / 6) ** exponent


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
