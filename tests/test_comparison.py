# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.comparison: operators swapped and put back."""

from __future__ import annotations

import pytest

from pyseq import functional, reference
from pyseq.comparison import reference_operators

OPERATORS = (
    "scan",
    "scan_both",
    "attend",
    "decode",
    "generate",
    "scheduled_inputs",
    "linear",
    "linear_cross_entropy",
)


def current() -> list[object]:
    return [getattr(functional, name) for name in OPERATORS]


def test_reference_operators_are_swapped_and_restored() -> None:
    fused = current()
    with reference_operators():
        assert current() == [getattr(reference, name) for name in OPERATORS]
    assert current() == fused


def test_the_fused_operators_come_back_after_an_error() -> None:
    fused = current()
    with pytest.raises(RuntimeError, match="stop"), reference_operators():
        raise RuntimeError("stop")
    assert current() == fused
