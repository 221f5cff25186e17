# SPDX-License-Identifier: Apache-2.0
"""Dropout as the modules apply it."""

from __future__ import annotations

import torch
from torch import Tensor

#: Numbers are dropped by comparing 16 random bits, so probabilities are multiples of 2^-16.
_STEPS = 1 << 16


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
    if not 0 <= probability <= 1:
        raise ValueError(f"dropout must be a probability in [0, 1], got {probability!r}")
    dropped = round(probability * _STEPS)
    if not training or dropped == 0:
        return x
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    bits = draws.random_(-(1 << 63), None).view(torch.int16)[: x.numel()].view(x.shape)
    kept = (bits >= dropped - _STEPS // 2).to(x.dtype)
    return x * (kept * (_STEPS / (_STEPS - dropped) if dropped < _STEPS else 0.0))
