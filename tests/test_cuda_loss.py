# SPDX-License-Identifier: Apache-2.0
"""The loss of an output layer on devices: the CUDA kernel, run on the CPU through the shim, and
what is around it, by torch's operators."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from cuda_device import why_none
from cuda_shim import build, check, pointer
from operator_cases import LinearCrossEntropyCase, changed, expected_of, loss_cases, run
from tolerances import assert_close
from torch import Tensor
from torch._C import DispatchKey

from pyseq import functional, reference

IGNORED = -100
DTYPES = (torch.float32, torch.float64)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Case(NamedTuple):
    """Sizes of a loss."""

    rows: int = 7
    vocab: int = 300  # more than a block has threads
    smoothing: float = 0.0
    bias: bool = True

    def __str__(self) -> str:
        return f"N{self.rows}-V{self.vocab}-s{self.smoothing}{'' if self.bias else '-no-bias'}"


CASES = (
    Case(),
    Case(smoothing=0.1),
    Case(rows=1, vocab=1, smoothing=0.5),
    Case(vocab=5, smoothing=1.0, bias=False),
    Case(rows=600, vocab=3, smoothing=0.2),
)


def targets(case: Case) -> Tensor:
    target = torch.randint(0, case.vocab, (case.rows,))
    target[2:4] = IGNORED
    return target


# ---- The kernel ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("loss_kernels", tmp_path_factory.mktemp("cuda_loss"))


def loss_rows(
    kernels: ctypes.CDLL, logits: Tensor, target: Tensor, smoothing: float, *, differentiates: bool
) -> tuple[Tensor, Tensor]:
    """The losses (N,), and what lies where the logits lay."""
    count = (target != IGNORED).sum()
    after, losses = logits.clone(), torch.full_like(logits[:, 0], torch.nan)
    sizes = (ctypes.c_int64 * 4)(*logits.shape, IGNORED, differentiates)
    data = (ctypes.c_void_p * 4)(*map(pointer, (target, count, after, losses)))
    launch = getattr(kernels, f"loss_rows_{name_of(logits.dtype)}")
    launch.argtypes = [ctypes.c_void_p, ctypes.c_double, ctypes.c_void_p]
    check(kernels, launch(sizes, smoothing, data))
    return losses, after


def expected_rows(logits: Tensor, target: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    own = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(
        own, target, ignore_index=IGNORED, label_smoothing=smoothing, reduction="none"
    )
    (gradient,) = torch.autograd.grad(losses.sum() / (target != IGNORED).sum(), own)
    return losses.detach(), gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", [case for case in CASES if case.rows < 100], ids=str)
def test_rows_are_torchs(kernels: ctypes.CDLL, case: Case, dtype: torch.dtype) -> None:
    kernels.shim_seed(1)
    logits = (torch.randn(case.rows, case.vocab, dtype=torch.float64) * 5).to(dtype)
    target = targets(case)
    expected, gradient = expected_rows(logits, target, case.smoothing)
    losses, after = loss_rows(kernels, logits, target, case.smoothing, differentiates=True)
    torch.testing.assert_close(losses, expected.to(dtype))
    torch.testing.assert_close(after, gradient.to(dtype))
    again, after = loss_rows(kernels, logits, target, case.smoothing, differentiates=False)
    assert torch.equal(again, losses)
    assert torch.equal(after, logits)  # nothing was written


def test_logits_of_any_size(kernels: ctypes.CDLL) -> None:
    kernels.shim_seed(2)
    logits = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 1.0, 2.0], [-1e30, -1e30, -1e30]])
    target = torch.tensor([1, 2, 0])
    expected, gradient = expected_rows(logits, target, 0.0)
    losses, after = loss_rows(kernels, logits, target, 0.0, differentiates=True)
    torch.testing.assert_close(losses, expected.float())
    torch.testing.assert_close(after, gradient.float())


@pytest.mark.parametrize("bad", [-1, 3, 2**40])
def test_a_target_that_is_no_symbol_is_nan(kernels: ctypes.CDLL, bad: int) -> None:
    kernels.shim_seed(3)
    logits = torch.randn(2, 3)
    losses, after = loss_rows(kernels, logits, torch.tensor([bad, 1]), 0.1, differentiates=True)
    assert losses.isnan().tolist() == [True, False]
    assert after.isnan().all(1).tolist() == [True, False]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_nan(kernels: ctypes.CDLL, bad: float) -> None:
    kernels.shim_seed(4)
    logits = torch.randn(2, 40)
    logits[0, 17] = bad
    losses, _ = loss_rows(kernels, logits, torch.tensor([3, 1]), 0.0, differentiates=False)
    assert losses.isnan().tolist() == [True, False]


@pytest.mark.parametrize("seed", range(3))
def test_bits_do_not_depend_on_the_schedule(kernels: ctypes.CDLL, seed: int) -> None:
    logits, target = torch.randn(3, 700), torch.tensor([5, IGNORED, 699])
    kernels.shim_seed(99)
    first = loss_rows(kernels, logits, target, 0.1, differentiates=True)
    kernels.shim_seed(seed)
    again = loss_rows(kernels, logits, target, 0.1, differentiates=True)
    assert all(map(torch.equal, first, again))


# ---- Around it -------------------------------------------------------------------------


@torch.no_grad()
def by_torch(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, smoothing: float
) -> tuple[Tensor, ...]:
    """What a device without kernels of its own computes, on the CPU: loss and gradients."""
    operator = torch.ops.pyseq.linear_cross_entropy_forward.default
    return operator._op_dk(
        DispatchKey.CompositeExplicitAutograd,
        *(hidden, weight, target, bias, IGNORED, smoothing),
        *(True, True, bias is not None),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_of_rows_are_the_reference(case: Case, dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(case.rows, 9, dtype=dtype), torch.randn(case.vocab, 9, dtype=dtype)
    bias = torch.randn(case.vocab, dtype=dtype) if case.bias else None
    target = targets(case)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    expected = reference.linear_cross_entropy(
        hidden, weight, target, bias, ignore_index=IGNORED, label_smoothing=case.smoothing
    )
    gradients = torch.autograd.grad(expected, inputs)
    with torch.no_grad():
        hidden[target == IGNORED] = torch.nan  # which must not matter
    loss, *found = by_torch(hidden.detach(), weight.detach(), target, bias, case.smoothing)
    torch.testing.assert_close(loss, expected)
    for mine, other in zip(found, gradients, strict=False):
        torch.testing.assert_close(mine, other)


def test_more_rows_than_one_chunk() -> None:
    """Of 256 rows each, with so many symbols."""
    hidden, weight = torch.randn(600, 2), torch.randn(70_000, 2)
    target = torch.randint(0, 70_000, (600,))
    loss, d_hidden, d_weight, _ = by_torch(hidden, weight, target, None, 0.1)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    expected = functional.linear_cross_entropy(hidden, weight, target, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close((d_hidden, d_weight), torch.autograd.grad(expected, inputs))


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_that_counts_is_nan_without_gradients(rows: int) -> None:
    hidden, weight, bias = torch.randn(rows, 4), torch.randn(5, 4), torch.randn(5)
    loss, *gradients = by_torch(hidden, weight, torch.full((rows,), IGNORED), bias, 0.1)
    assert loss.isnan()
    assert [g.shape for g in gradients] == [hidden.shape, weight.shape, bias.shape]
    assert not any(g.any() for g in gradients)


def test_an_unknown_symbol_is_nan_where_looking_would_wait() -> None:
    hidden, weight = torch.randn(2, 4), torch.randn(5, 4)
    loss, *gradients = by_torch(hidden, weight, torch.tensor([1, 5]), None, 0.1)
    assert loss.isnan()
    assert gradients[0].isnan().any()


@pytest.mark.skipif(why_none() is not None, reason=str(why_none()))
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.id)
        for case in (
            *loss_cases(),
            *(replace(case, dtype=torch.float16) for case in loss_cases()[::7]),
            *(replace(case, dtype=torch.bfloat16) for case in loss_cases()[::7]),
        )
    ],
)
def test_on_a_cuda_device(case: LinearCrossEntropyCase) -> None:
    """In the short types too, which are computed in float32 and rounded once."""
    call = case.call()
    expected = expected_of(call)
    actual = run(functional, changed(call, lambda _, tensor: tensor.to("cuda")))
    assert_close({name: x.cpu() for name, x in actual.outputs.items()}, expected.outputs)
    assert_close({name: x.cpu() for name, x in actual.gradients.items()}, expected.gradients)
