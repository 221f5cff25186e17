# SPDX-License-Identifier: Apache-2.0
"""Tests of the device on which the other tests run CUDA kernels: that it computes what a device
does, and that it sees what a device would only stumble over."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_shim import build, check, pointer
from torch import Tensor

SEEDS = range(5)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("shim_kernels", tmp_path_factory.mktemp("cuda_shim"))


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(pointer(tensor))


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_meet(kernels: ctypes.CDLL, seed: int) -> None:
    kernels.shim_seed(seed)
    to = torch.zeros(2, 64, dtype=torch.int32)
    check(kernels, kernels.exchange(False, address(to)))
    assert torch.equal(to, torch.arange(63, -1, -1, dtype=torch.int32).expand(2, 64))


def test_a_missing_meeting_shows(kernels: ctypes.CDLL) -> None:
    kernels.shim_seed(0)
    to = torch.zeros(2, 64, dtype=torch.int32)
    check(kernels, kernels.exchange(True, address(to)))
    # Memory that nobody has written yet is all ones.
    assert (to == -1).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_of_blocks_meet(kernels: ctypes.CDLL, seed: int) -> None:
    kernels.shim_seed(seed)
    steps, counters = 4, torch.zeros(2, 32, dtype=torch.int32)
    sums = torch.full((steps + 1, 2, 3), -1, dtype=torch.int32)
    check(kernels, kernels.groups(steps, 0, address(counters), address(sums)))
    expected = [1, 4, 13, 40]  # each the sum of three and one
    assert sums[1:].tolist() == [[[value] * 3] * 2 for value in expected]


def test_a_wedged_barrier_is_an_error(kernels: ctypes.CDLL) -> None:
    steps, counters = 2, torch.zeros(2, 32, dtype=torch.int32)
    sums = torch.zeros(steps + 1, 2, 3, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"stuck: .* poll"):
        check(kernels, kernels.groups(steps, 1, address(counters), address(sums)))


def test_a_write_past_shared_memory_is_an_error(kernels: ctypes.CDLL) -> None:
    check(kernels, kernels.overrun(0))
    with pytest.raises(RuntimeError, match="past its shared memory"):
        check(kernels, kernels.overrun(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_matrices_multiply(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype)
    c = torch.empty(16, 8)
    check(kernels, getattr(kernels, f"multiply_{name(dtype)}")(*map(address, (a, b, c))))
    torch.testing.assert_close(c, a.float() @ b.float().t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_numbers_of_16_bits_are_rounded_as_torch_does(
    kernels: ctypes.CDLL, dtype: torch.dtype
) -> None:
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    exact = exact[exact.isfinite()]
    # Every number of the type, and what lies between them: a tie and its neighbours.
    ties = (exact[1:] + exact[:-1]) / 2
    near = [torch.nextafter(ties, torch.full_like(ties, side)) for side in (-1e38, 1e38)]
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e9, 3e38])
    x = torch.cat((exact, ties, *near, special))
    to, back = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    function = getattr(kernels, f"round_{name(dtype)}")
    check(kernels, function(*map(address, (x, to, back)), x.numel()))
    assert torch.equal(to.nan_to_num(7), x.to(dtype).nan_to_num(7))
    assert torch.equal(to.isnan(), x.isnan())
    assert torch.equal(back.nan_to_num(7), to.float().nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_the_arithmetic_of_cells(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    x = torch.cat((torch.linspace(-120, 120, 4001), torch.logspace(-30, 1, 500))).to(dtype)
    x = torch.cat((x, -x, torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])))
    y = torch.empty(4, x.numel(), dtype=dtype)
    check(kernels, getattr(kernels, f"math_{name(dtype)}")(address(x), address(y), x.numel()))
    exact = x.double()
    sigmoid, log_sigmoid = 1 / (1 + torch.exp(-exact)), torch.nn.functional.logsigmoid(exact)
    expected = torch.stack((sigmoid, exact.tanh(), log_sigmoid, exact.relu())).to(dtype)
    # Some units in the last place; of denormal numbers, that of the smallest normal one.
    tiny = torch.finfo(dtype).tiny
    rtol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=rtol, atol=rtol * tiny)
