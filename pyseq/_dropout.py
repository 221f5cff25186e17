# SPDX-License-Identifier: Apache-2.0
"""Dropout as the modules apply it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Numbers are dropped by comparing 16 random bits, so probabilities are multiples of 2^-16.
_STEPS = 1 << 16
_LOWEST = -(1 << 63)  # of an int64


def check_probability(name: str, probability: float) -> None:
    """Raise a ValueError unless ``probability`` is a number in [0, 1]."""
    number = isinstance(probability, (int, float)) and not isinstance(probability, bool)
    if not number or not 0 <= probability <= 1:
        raise ValueError(f"{name} must be a probability in [0, 1], got {probability!r}")


def _hits(shape: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """Bool, each true with probability ``count / _STEPS``: four come out of one draw of 64 bits."""
    size = math.prod(shape)
    words = (size + 3) // 4
    if torch.compiler.is_compiling():
        # torch.compile knows no random_. These are the same bits: randint starts at its lowest
        # number, and leaves out the highest, where random_ takes the bits as they are.
        draws = torch.randint(_LOWEST, ~_LOWEST, (words,), device=device) ^ _LOWEST
    else:
        draws = torch.empty(words, dtype=torch.int64, device=device).random_(_LOWEST, None)
    return draws.view(torch.int16)[:size].view(shape) < count - _STEPS // 2


def bernoulli_mask(shape: tuple[int, ...], probability: float, like: Tensor) -> Tensor:
    """Ones with ``probability``, rounded to a multiple of 2^-16, and zeros.

    Drawn from torch's generator, one number after the other whatever the threads.

    Args:
        shape: of the result.
        probability: 0 to 1.
        like: gives dtype and device.
    """
    count = round(probability * _STEPS)
    if count == _STEPS:  # one more than 16 bits can be compared with
        return like.new_ones(shape)
    return _hits(shape, count, like.device).to(like.dtype)


def apply_dropout(x: Tensor, probability: float, training: bool = True) -> Tensor:
    """``x`` with each number zeroed with ``probability`` and the others divided by 1 minus it.

    What ``torch.nn.functional.dropout`` does; but that draws a number for each element, one
    after the other on the CPU, where here four come out of one draw of 64 bits. The probability
    is rounded to a multiple of 2^-16; what is kept is divided accordingly.

    Args:
        x: of any shape; where padding is zero it stays so.
        probability: 0 to 1.
        training: otherwise ``x`` is returned as it is.

    Raises:
        ValueError: ``probability`` is out of its range.
    """
    check_probability("dropout", probability)
    dropped = round(probability * _STEPS)
    if not training or dropped == 0:
        return x
    kept = _hits(x.shape, dropped, x.device).logical_not().to(x.dtype)
    return x * (kept * (_STEPS / (_STEPS - dropped) if dropped < _STEPS else 0.0))
