# SPDX-License-Identifier: Apache-2.0
"""The measurements of the machine itself. What they give is a time, so only its form is tested."""

from __future__ import annotations

import math

import pytest

from pyseq._library import _C


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rates_are_positive_numbers(threads: int) -> None:
    rates = [
        _C.multiply_add_rate(threads=threads, rounds=1000),
        # Less than a vector, an odd number of bytes, and more than a page.
        *(_C.read_rate(threads=threads, bytes=size, passes=2) for size in (1, 4097, 1 << 16)),
    ]
    assert all(0 < rate < math.inf for rate in rates)


@pytest.mark.parametrize("name", ["threads", "rounds"])
def test_multiply_add_rate_refuses_what_is_not_positive(name: str) -> None:
    options = {"threads": 1, "rounds": 1} | {name: 0}
    with pytest.raises(ValueError, match=rf"^{name} must be positive, got 0$"):
        _C.multiply_add_rate(**options)


@pytest.mark.parametrize("name", ["threads", "bytes", "passes"])
def test_read_rate_refuses_what_is_not_positive(name: str) -> None:
    options = {"threads": 1, "bytes": 64, "passes": 1} | {name: -1}
    with pytest.raises(ValueError, match=rf"^{name} must be positive, got -1$"):
        _C.read_rate(**options)
