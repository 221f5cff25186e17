# SPDX-License-Identifier: Apache-2.0
"""The kernels' sigmoid and tanh against float64, over the whole range of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pyseq  # noqa: F401  registers the operators

#: Largest error in units in the last place of the right result. The float64 limit holds
#: against torch's functions, which are off by about one unit themselves.
LARGEST_ERROR = {torch.float32: 3.0, torch.float64: 4.0}


def exact_sigmoid(x: Tensor) -> Tensor:
    """Torch's own gives zero too early: its exp(-x) is infinite below -709."""
    return x.clamp(max=0).exp() / (1 + x.abs().neg().exp())


FUNCTIONS = [("sigmoid", exact_sigmoid), ("tanh", torch.tanh)]


def floats(step: int) -> Tensor:
    """Every ``step``-th finite float32, of both signs."""
    bits = torch.arange(0, 0x7F800000, step, dtype=torch.int32)
    positive = bits.view(torch.float32)
    return torch.cat([positive, -positive])


def ulps(actual: Tensor, expected: Tensor) -> float:
    """The largest error in units in the last place of ``expected`` as the dtype of ``actual``.

    Below the normal numbers the unit is that of the smallest of them.
    """
    kind = torch.finfo(actual.dtype)
    _, exponent = torch.frexp(expected.abs().clamp_min(kind.tiny))
    unit = torch.ldexp(torch.full_like(expected, kind.eps / 2), exponent)
    return ((actual.double() - expected).abs() / unit).max().item()


@pytest.mark.parametrize(("name", "exact"), FUNCTIONS)
def test_float32_over_all_magnitudes(name: str, exact: Callable[[Tensor], Tensor]) -> None:
    # A prime step meets all exponents and, over them, all patterns of the low bits.
    x = floats(331)
    actual = getattr(torch.ops.pyseq, name)(x)
    assert ulps(actual, exact(x.double())) <= LARGEST_ERROR[torch.float32]


@pytest.mark.parametrize(("name", "exact"), FUNCTIONS)
def test_float64_over_all_magnitudes(name: str, exact: Callable[[Tensor], Tensor]) -> None:
    x = torch.cat([torch.randn(500_000).double() * scale for scale in (1e-9, 1e-2, 1, 20, 400)])
    x = torch.cat([x, floats(9973).double()])
    actual = getattr(torch.ops.pyseq, name)(x)
    assert ulps(actual, exact(x)) <= LARGEST_ERROR[torch.float64]


@pytest.mark.parametrize("dtype", list(LARGEST_ERROR), ids=str)
def test_special_values(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=dtype)
    sigmoid, tanh = torch.ops.pyseq.sigmoid(x).tolist(), torch.ops.pyseq.tanh(x).tolist()
    assert sigmoid[:4] == [0.5, 0.5, 1.0, 0.0]
    assert tanh[:4] == [0.0, 0.0, 1.0, -1.0]
    assert math.copysign(1, tanh[1]) == -1
    assert math.isnan(sigmoid[4])
    assert math.isnan(tanh[4])


@pytest.mark.parametrize("dtype", list(LARGEST_ERROR), ids=str)
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_bounds_and_order(name: str, dtype: torch.dtype) -> None:
    x = floats(100_003).to(dtype).sort().values
    y = getattr(torch.ops.pyseq, name)(x)
    assert y.max() == 1
    assert y.min() == (-1 if name == "tanh" else 0)
    # Neighbours may be swapped by the rounding that the test above allows, and no more.
    slack = LARGEST_ERROR[dtype] * torch.finfo(dtype).eps
    assert (y.diff() >= -slack * y[1:].abs()).all()


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_opcheck(name: str) -> None:
    x = torch.randn(3, 5)
    operator = getattr(torch.ops.pyseq, name).default
    torch.library.opcheck(operator, (x,), test_utils=("test_schema", "test_faketensor"))
