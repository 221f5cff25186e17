# SPDX-License-Identifier: Apache-2.0
"""What to look for, and what a search returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .._checks import integer, number
from ..types import STOP, UNK, kind


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
            for all rows; a (B, P) int64 tensor will do. They count as emitted tokens, also in
            the score, and neither ``min_length`` nor ``block_ngrams`` keeps one of them out.
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
        # What is of its type already is left alone: a search may take less than setting all anew.
        for name in ("max_length", "min_length", "beam_size", "n_best", "block_ngrams", "top_k"):
            value = getattr(self, name)
            if type(value) is int or (value is None and name in ("block_ngrams", "top_k")):
                continue
            object.__setattr__(self, name, integer(name, value))
        for name in ("length_penalty", "coverage_penalty", "temperature", "top_p"):
            value = getattr(self, name)
            if type(value) is not float:
                object.__setattr__(self, name, number(name, value))
        if type(self.prefix) is not tuple or self.prefix:
            object.__setattr__(self, "prefix", _sequences(self.prefix))
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
            length_normalizer(self.max_length, self.length_penalty)
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


def check_kind(options: object) -> None:
    """Raise a TypeError for anything but the options of a search."""
    if not isinstance(options, SearchOptions):
        raise TypeError(f"options must be SearchOptions, got {kind(options)}")


class Hypothesis(NamedTuple):
    """A target sequence that a search has found for one source."""

    tokens: list[int]  # without <start> and <stop>
    #: Sum of the tokens' log-probabilities, in nats. That of ``<stop>`` is in it if the
    #: search reached it, which is so exactly if there are fewer than max_length tokens.
    #: Minus infinity, of no tokens, if the options or the model came to forbid all of them.
    score: float
    weights: Tensor | None  # (len(tokens), S of the row), attention; None if there is none


class StreamedToken(NamedTuple):
    """A token that :func:`stream` has found."""

    row: int  # of the batch
    token: int  # never <stop>: a row that emits it ends
    score: float  # its log-probability, in nats
    weights: Tensor | None  # (S of the row,), attention; None if there is none


def _sequences(prefix: Any) -> tuple[tuple[int, ...], ...]:
    """``prefix``, of any kind of sequences, as tuples."""
    try:
        rows = list(prefix)
    except TypeError:
        raise ValueError(f"prefix must be sequences of token ids, got {kind(prefix)}") from None
    found = []
    for row in rows:
        try:
            tokens = list(row)
        except TypeError:
            raise ValueError(
                f"prefix must be sequences of token ids, got {kind(row)} in it"
            ) from None
        found.append(tuple(integer("each token id of prefix", token) for token in tokens))
    return tuple(found)


def length_normalizer(length: int, exponent: float) -> float:
    return ((5 + length) / 6) ** exponent
