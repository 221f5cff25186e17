# SPDX-License-Identifier: Apache-2.0
"""float16 and bfloat16: computed in float32, rounded once; and autocast."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from operator_cases import (
    CONSTANTS,
    AttendCase,
    Call,
    Case,
    DecodeCase,
    LinearCrossEntropyCase,
    ScanCase,
    changed,
    cotangents,
    differentiable,
    expected_of,
    leaves,
    op_of,
    outputs_of,
    run,
    small_cases,
    tracked,
)
from tolerances import TOLERANCES, assert_close, assert_same_bits
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyseq import Seq2Seq, functional, nn
from pyseq.transforms import REFERENCES

SHORT = (torch.float16, torch.bfloat16)
CASES = [
    pytest.param(replace(case, dtype=dtype), id=f"{op_of(case)}-{replace(case, dtype=dtype).id}")
    for dtype in SHORT
    for case in small_cases()
]


def in_dtype(call: Call, dtype: torch.dtype) -> Call:
    """``call`` with its floating-point inputs in ``dtype``."""
    return changed(call, lambda _, t: t.to(dtype) if t.is_floating_point() else t)


def gradients_of(call: Call, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the sum of some outputs times ``weights``."""
    call = tracked(call)
    outputs = {n: out for n, out in outputs_of(functional, call).items() if n in weights}
    inputs = {n: t for n, t in leaves(call.inputs) if t.requires_grad}
    gradients = torch.autograd.grad(
        list(outputs.values()),
        list(inputs.values()),
        [weights[name].to(output) for name, output in outputs.items()],
    )
    return dict(zip(inputs, gradients, strict=True))


# Operators


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: Case) -> None:
    call = case.call()
    expected, actual = expected_of(call), run(functional, call)
    assert_close(actual.outputs, expected.outputs)
    assert_close(actual.gradients, expected.gradients)
    for name, value in [*actual.outputs.items(), *actual.gradients.items()]:
        assert value.dtype == case.dtype, f"{name} is {value.dtype}"


@pytest.mark.parametrize(
    "case",
    # The other scores have products before the operator.
    [param for param in CASES if getattr(param.values[0], "score", "dot") in ("dot", "concat")],
)
def test_nothing_is_rounded_but_the_results(case: Case) -> None:
    if getattr(case, "score", None) == "concat":
        case = replace(case, project_query=False)  # type: ignore[call-arg]
    short = case.call()
    exact = in_dtype(short, torch.float32)
    outputs = outputs_of(functional, short)
    expected = outputs_of(functional, exact)
    assert_same_bits(outputs, {name: value.to(case.dtype) for name, value in expected.items()})
    # Some results are given twice, and autograd adds the gradients of both in their type.
    once = {n: out for n, out in outputs.items() if not n.startswith("states") and "feed" not in n}
    weights = cotangents(once)
    assert_same_bits(
        gradients_of(short, weights),
        {name: value.to(case.dtype) for name, value in gradients_of(exact, weights).items()},
    )


@pytest.mark.parametrize("case", CASES)
def test_values_without_gradients(case: Case) -> None:
    call = case.call()
    expected = outputs_of(functional, tracked(call))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            actual = outputs_of(functional, call)
        assert_same_bits(actual, {name: value.detach() for name, value in expected.items()})


@pytest.mark.parametrize("case", CASES)
def test_mixed_dtypes_are_refused(case: Case) -> None:
    call = case.call()
    for target in differentiable(call):
        allowed = {case.dtype, torch.float32} if target == "positions" else {case.dtype}
        for dtype in {*SHORT, torch.float32, torch.float64} - allowed:
            mixed = changed(
                call, lambda n, t, name=target, dtype=dtype: t.to(dtype) if n == name else t
            )
            # Projections of keys and queries are made by torch, which has words of its own.
            with pytest.raises(RuntimeError, match=r"must have the dtype of|same dtype"):
                outputs_of(functional, mixed)


@pytest.mark.parametrize("case", [param for param in CASES if "positions" in param.id])
def test_mixed_dtypes_are_refused_beside_exact_positions(case: Case) -> None:
    def exact(name: str, tensor: Tensor) -> Tensor:
        return tensor.float() if name == "positions" else tensor

    call = changed(case.call(), exact)
    assert outputs_of(functional, call)["context"].dtype == case.dtype
    for target in differentiable(call):
        if target == "positions":
            continue
        for dtype in {*SHORT, torch.float32, torch.float64} - {case.dtype}:
            mixed = changed(
                call, lambda n, t, name=target, dtype=dtype: t.to(dtype) if n == name else t
            )
            with pytest.raises(RuntimeError, match=r"must have the dtype of|same dtype"):
                outputs_of(functional, mixed)


class Recorded(TorchFunctionMode):
    """Keeps the arguments of every call of an operator of pyseq."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if str(func).startswith("pyseq."):
            self.calls.append((func.default, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "case",
    [
        ScanCase(lengths="ragged", return_states=True, dtype=torch.bfloat16),
        AttendCase(score="concat", dtype=torch.bfloat16),
        DecodeCase(layers=2, dropout=True, dtype=torch.float16),
        LinearCrossEntropyCase(ignored="some", dtype=torch.bfloat16),
    ],
    ids=op_of,
)
def test_opcheck(case: Case) -> None:
    with Recorded() as recorded:
        outputs_of(functional, tracked(case.call()))
    assert recorded.calls
    for op, args in recorded.calls:
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_linear(dtype: torch.dtype) -> None:
    inputs = [torch.randn(size, dtype=dtype, requires_grad=True) for size in ((3, 2, 4), (5, 4))]
    expected = torch.nn.functional.linear(*inputs)
    for linear in (functional.linear, lambda x, w: torch.ops.pyseq.linear(x, w, None)):
        actual = linear(*inputs)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected)
    torch.library.opcheck(torch.ops.pyseq.linear, (*inputs, None))


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_scan_both(dtype: torch.dtype) -> None:
    layer = nn.LSTM(3, 4, bidirectional=True, dtype=dtype)
    x = torch.randn(5, 2, 3, dtype=dtype)
    with torch.no_grad():
        inference = layer(x)[0]
    assert inference.dtype == dtype
    assert torch.equal(inference, layer(x)[0])


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_second_order(dtype: torch.dtype) -> None:
    def second(call: Call) -> dict[str, Tensor]:
        call = tracked(call)
        inputs = {n: t for n, t in leaves(call.inputs) if t.requires_grad}
        output = outputs_of(functional, call)["output"]
        first = torch.autograd.grad(output.float().sum(), list(inputs.values()), create_graph=True)
        squares = torch.stack([gradient.double().square().sum() for gradient in first]).sum()
        gradients = torch.autograd.grad(squares, list(inputs.values()))
        return dict(zip(inputs, gradients, strict=True))

    call = ScanCase(dtype=dtype).call()
    assert_close(second(call), second(in_dtype(call, torch.float64)))


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_gradients_of_each_sample(dtype: torch.dtype) -> None:
    call = ScanCase(dtype=dtype).call()
    x, weight = call.inputs["x"], call.inputs["w_hh"]

    def loss(w: Tensor, row: Tensor) -> Tensor:
        given = changed(call, lambda n, t: {"x": row, "w_hh": w}.get(n, t))
        return outputs_of(functional, given)["output"].float().square().sum()

    gradient = torch.func.grad(loss)
    rows = torch.stack([x, x / 2])
    actual = torch.vmap(gradient, in_dims=(None, 0))(weight, rows)
    assert actual.dtype == dtype
    expected = torch.stack([gradient(weight, row) for row in rows])
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    for case in (ScanCase(), DecodeCase()):
        call = changed(case.call(), lambda n, t: t if n in CONSTANTS else t.to(dtype))
        text = "x must be float16, bfloat16, float32 or float64, got"
        with pytest.raises(RuntimeError, match=text):
            outputs_of(functional, call)


# Modules


MODULES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[tuple[int, ...], ...]]] = {
    "rnn": (lambda: nn.RNN(4, 5, 2, bidirectional=True), ((6, 3, 4),)),
    "gru": (lambda: nn.GRU(4, 5, 2, bidirectional=True), ((6, 3, 4),)),
    "lstm": (lambda: nn.LSTM(4, 5, 2, bidirectional=True, proj_size=3), ((6, 3, 4),)),
    "rnn-cell": (lambda: nn.RNNCell(4, 5), ((3, 4),)),
    "gru-cell": (lambda: nn.GRUCell(4, 5), ((3, 4),)),
    "lstm-cell": (lambda: nn.LSTMCell(4, 5), ((3, 4),)),
    "attention": (lambda: nn.Attention(4, 5, score="concat"), ((6, 3, 4), (7, 3, 5))),
    "decoder": (lambda: nn.AttentionDecoder(4, 5, 6, 2), ((6, 3, 4), (7, 3, 6))),
    "plain-decoder": (lambda: nn.AttentionDecoder(4, 5, 6, 2, score=None), ((6, 3, 4),)),
}


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize(("make", "sizes"), MODULES.values(), ids=MODULES.keys())
def test_modules(
    make: Callable[[], torch.nn.Module], sizes: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> None:
    module = make().to(dtype)
    exact = make()
    exact.load_state_dict({name: weight.float() for name, weight in module.state_dict().items()})
    inputs = [torch.randn(size).to(dtype) for size in sizes]
    actual = dict(leaves(module(*inputs)))
    expected = dict(leaves(exact(*(tensor.float() for tensor in inputs))))
    assert all(value.dtype == dtype for value in actual.values())
    assert_close(actual, expected)
    for outputs in (actual, expected):
        torch.stack([output.float().square().sum() for output in outputs.values()]).sum().backward()
    for name, weight in module.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.dtype == dtype
    assert_close(
        {name: weight.grad for name, weight in module.named_parameters()},
        {name: weight.grad for name, weight in exact.named_parameters()},
    )


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_modules_are_those_of_torch(kind: str, dtype: torch.dtype) -> None:
    if kind == "LSTM" and dtype == torch.float16:
        pytest.skip("torch.nn.LSTM does not run in float16 on every processor")
    theirs = getattr(torch.nn, kind)(4, 5, dtype=dtype)
    ours = getattr(nn, kind)(4, 5, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn((3, 4) if "Cell" in kind else (6, 3, 4), dtype=dtype)
    with torch.no_grad():
        assert_close(dict(leaves(ours(x))), dict(leaves(theirs(x))))


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_modules_refuse_another_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="dtype"):
        nn.LSTM(4, 5, dtype=dtype)(torch.randn(6, 3, 4))
    with pytest.raises(ValueError, match="dtype"):
        nn.LSTM(4, 5)(torch.randn(6, 3, 4, dtype=dtype))


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_a_model_learns_and_generates(dtype: torch.dtype) -> None:
    model = Seq2Seq(11, 12, embedding_size=8, hidden_size=16, num_layers=2).to(dtype)
    source, target = torch.randint(4, 11, (4, 5)), torch.randint(4, 12, (4, 6))
    lengths = torch.tensor([5, 3, 4, 5])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(10):
        loss = model.loss(source, lengths, target, target.roll(-1, 1))
        assert loss.dtype == dtype
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    for beam_size in (1, 3):
        found = model.generate(source, lengths, max_length=5, beam_size=beam_size)
        assert all(math.isfinite(hypothesis.score) for hypothesis in found)


# Autocast


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("case", CASES[: len(CASES) // 2])
def test_autocast_computes_in_float32(case: Case, dtype: torch.dtype) -> None:
    exact = replace(case, dtype=torch.float32).call()
    expected = run(functional, exact)
    with torch.autocast("cpu", dtype):
        actual = run(functional, exact)
    assert_same_bits(actual.outputs, expected.outputs)
    assert_same_bits(actual.gradients, expected.gradients)


def test_autocast_takes_a_mixture() -> None:
    layer = nn.LSTM(4, 5, batch_first=True)
    project = torch.nn.Linear(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        x = project(torch.randn(2, 6, 3))
        assert x.dtype == torch.bfloat16
        output = layer(x)[0]
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, layer(x.float())[0])
    output.sum().backward()
    assert project.weight.grad is not None
    assert project.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA"])
@pytest.mark.parametrize("name", [*REFERENCES, "generate"])
def test_autocast_is_registered(name: str, key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pyseq::{name}", key)
