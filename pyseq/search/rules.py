# SPDX-License-Identifier: Apache-2.0
"""Which tokens may be emitted, and which one is."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_tensor
from ..errors import SearchError
from ..types import PAD, STOP
from .options import SearchOptions, check_kind

#: What is wrong with a model whose log-probabilities hold a NaN.
NOT_FINITE = "the model's logits must be finite, got NaN or infinity"


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 if its dtype is shorter: sums of hundreds of terms need the digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def choose(logits: Tensor, draws: Tensor | None = None) -> Tensor:
    """A token (N,) for each row of logits (N, V): the likeliest, or by a draw.

    The draw is by inversion: of the tokens in their order it takes the first up to which the
    probabilities, of all that may be emitted, add up to more than ``draws``. ``<pad>`` and
    ``<start>`` may not. Whatever the logits hold, the result is a token id.

    Args:
        logits: (N, V); log-probabilities will do. Those of a dtype shorter than float32 are
            added up in float32.
        draws: (N,), uniform in [0, 1), of float32 at least, lest whole tokens lie between two
            of them. Default: the likeliest, of equal ones the first.
    """
    if draws is None:
        return logits[:, STOP:].argmax(1) + STOP
    sums = torch.softmax(widened(logits[:, STOP:]), 1).cumsum(1)
    tokens = (sums <= draws.unsqueeze(1) * sums[:, -1:]).sum(1)
    # Should rounding have made it all of them, the last one with a share of the sum.
    last = (sums < sums[:, -1:]).sum(1)
    return torch.minimum(tokens, last) + STOP


def refuse_nan(log_probs: Tensor) -> None:
    """Raise a SearchError if there is a NaN, which no comparison would choose or refuse."""
    if log_probs.isnan().any():
        raise SearchError(NOT_FINITE)


class Rules(NamedTuple):
    """What the options say of the next token."""

    min_length: int
    block_ngrams: int | None
    prefix: Tensor  # (B, P) int64, PAD beyond the end of a row's prefix
    largest: int  # token of the prefix

    @classmethod
    def of(cls, options: SearchOptions, rows: int, device: torch.device) -> Rules:
        longest = max(map(len, options.prefix), default=0)
        padded = [[*tokens, *[PAD] * (longest - len(tokens))] for tokens in options.prefix]
        if not padded:
            padded = [[]]
        prefix = torch.tensor(padded, dtype=torch.int64, device=device)
        largest = max((token for tokens in options.prefix for token in tokens), default=PAD)
        return cls(options.min_length, options.block_ngrams, prefix.expand(rows, longest), largest)

    def apply(self, log_probs: Tensor, rows: Tensor, history: Tensor, emitted: int) -> Tensor:
        """``log_probs``, minus infinity for what must not be emitted.

        ``<pad>`` and ``<start>`` never are. The others keep their probabilities, so that
        scores stay those of the model; in float32 at least, whatever the model computes in.
        Nothing waits for the device that the tensors are on.

        Args:
            log_probs: (N, V), the model's; see :func:`refuse_nan`.
            rows: (N,), the row of the batch that each hypothesis is of.
            history: (N, emitted), what each has emitted; not read without block_ngrams.
            emitted: tokens that each has emitted.

        Raises:
            ValueError: the prefix holds a token that the model does not have.
        """
        if emitted == 0 and self.largest >= log_probs.shape[1]:
            raise ValueError(
                f"prefix must hold token ids below {log_probs.shape[1]}, got {self.largest}"
            )
        log_probs = widened(log_probs)
        allowed = log_probs.clone()
        allowed[:, PAD:STOP] = -math.inf
        if emitted < self.min_length:
            allowed[:, STOP] = -math.inf
        if self.block_ngrams is not None and emitted >= self.block_ngrams:
            windows = history.unfold(1, self.block_ngrams, 1)  # (N, ngrams so far, n)
            last = history[:, emitted - self.block_ngrams + 1 :].unsqueeze(1)
            repeats = (windows[:, :, :-1] == last).all(2)
            # What would repeat nothing forbids <pad>, which never is allowed.
            allowed.scatter_(1, windows[:, :, -1].where(repeats, PAD), -math.inf)
        if emitted < self.prefix.shape[1]:
            forced = self.prefix[rows, emitted].unsqueeze(1)
            own = torch.full_like(allowed, -math.inf)
            own.scatter_(1, forced, log_probs.gather(1, forced))
            allowed = torch.where(forced == PAD, allowed, own)
        return allowed


def check_given(options: SearchOptions, source: Tensor, source_lengths: Tensor) -> None:
    """Raise unless these are what a search is given, and each row has a prefix if there are any."""
    check_kind(options)
    check_tensor("source", source)
    check_tensor("source_lengths", source_lengths)
    rows = len(source)
    if len(options.prefix) not in (0, 1, rows):
        raise ValueError(
            f"prefix must be one sequence for each of the {rows} rows, or a single one, "
            f"got {len(options.prefix)}"
        )
