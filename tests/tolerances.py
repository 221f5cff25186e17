# SPDX-License-Identifier: Apache-2.0
"""The one table of tolerances, and the comparison that uses it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: Largest allowed error, relative to the largest magnitude in the tensor but at least to 1:
#: some gradients are exactly zero on paper and pure rounding in practice.
TOLERANCES: dict[torch.dtype, float] = {
    # Unit roundoff 6e-8, grown by sums of up to some hundred terms and 40 steps. What is
    # expected is computed in float64, so only one side of the comparison has this error.
    torch.float32: 1e-5,
    # Unit roundoff 1e-16, on both sides, grown in the same way.
    torch.float64: 1e-13,
    # Unit roundoff 5e-4 and 4e-3, of the results alone: in between it is float32. With the score
    # general the projected keys are rounded besides.
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
}

#: The same for kernels that hold what a loop hands on in short types, as those of a device do:
#: every step rounds the state and every sum, and the gradients add that up.
STORED: dict[torch.dtype, float] = TOLERANCES | {torch.float16: 6e-3, torch.bfloat16: 5e-2}


def assert_close(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    tolerances: Mapping[torch.dtype, float] = TOLERANCES,
) -> None:
    """Check that both hold the same names, shapes and, within the table, finite values.

    ``expected`` may be of a higher precision; the dtype of ``actual`` sets the tolerance.
    """
    assert list(actual) == list(expected)
    for name, value in actual.items():
        target = expected[name]
        assert value.shape == target.shape, f"{name}: {value.shape} is not {target.shape}"
        if value.numel() == 0:
            continue
        error = (value.to(target.dtype) - target).abs().max().item()
        allowed = tolerances[value.dtype] * max(1.0, target.abs().max().item())
        # Written so that a NaN on either side fails.
        assert error <= allowed, f"{name}: error {error:.3g} is over {allowed:.3g}"


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that both hold the same names and exactly the same values."""
    assert list(actual) == list(expected)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), f"{name} differs"
