# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: a fixed seed, deterministic algorithms, poisoned memory.

Deterministic mode makes torch fill fresh memory with NaN, so that an operator that reads,
or hands out, what it never wrote is caught by any comparison. One thread unless a test asks
for more: where the cores are shared, small products wait longer than they compute.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import cuda_device  # before torch
import pytest
import torch

# What deterministic products on a CUDA device need, before there are any.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Run a test with seed 0, deterministic algorithms, NaN in fresh memory, one thread."""
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # The filling is torch's default; a test must not run without it unnoticed.
    assert torch.empty(1).isnan()
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)
    torch.set_num_threads(threads)


@pytest.fixture
def set_threads(deterministic: None) -> Callable[[int], None]:
    """``torch.set_num_threads``; undone when the test ends."""
    return torch.set_num_threads


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, deterministic: None) -> Iterator[torch.device]:
    """Where a test makes its tensors and modules unless it says otherwise: it runs on the CPU, and
    again on a CUDA device where there is one."""
    place = torch.device(request.param)
    if place.type == "cpu":  # where they are made anyway
        yield place
        return
    if reason := cuda_device.why_none():
        pytest.skip(reason)
    with place:
        yield place
