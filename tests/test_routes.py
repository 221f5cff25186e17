# SPDX-License-Identifier: Apache-2.0
"""Every operator can be called with tensors of a CUDA device: by kernels of its own, or by torch's
operators; and a training step asks no device what its tensors hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import cuda_device
import pytest
import torch
from no_waiting import NoWaiting
from torch import Tensor
from torch._C import _dispatch_has_computed_kernel_for_dispatch_key as has_computed
from torch._C import _dispatch_has_kernel_for_dispatch_key as has_own
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyseq import _C, Classifier, Seq2Seq, Tagger, functional
from pyseq.scheduled import Sampling
from pyseq.types import PAD

OPERATORS = sorted(
    name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pyseq::")
)
#: What csrc/cuda_ops.cpp, which is compiled where torch has CUDA, registers for it.
SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "cuda_ops.cpp"
OWN = {f"pyseq::{name}" for name in re.findall(r'm\.impl\(\s*"(\w+)"', SOURCE.read_text("utf-8"))}


def test_there_are_operators() -> None:
    assert {"pyseq::scan", "pyseq::decode_backward", "pyseq::generate"} <= set(OPERATORS)
    assert {"pyseq::scan", "pyseq::linear_cross_entropy_forward"} <= OWN <= set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_each_operator_has_a_route_for_cuda(name: str) -> None:
    built = _C.build_info()["cuda"] != "none"
    assert has_computed(name, "CUDA") or (name in OWN and not built)


@pytest.mark.parametrize("name", OPERATORS)
def test_each_operator_has_shapes_without_numbers(name: str) -> None:
    assert has_computed(name, "Meta")


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_is_for_cuda_what_it_is_for_the_cpu(name: str) -> None:
    assert has_own(name, "AutocastCUDA") == has_own(name, "AutocastCPU")


# ---- Short types -----------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """The operators of pyseq that run, and the floating-point dtypes of what they take."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, set[torch.dtype]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "pyseq":
            taken = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            found = {t.dtype for t in taken if t.is_floating_point()}
            self.calls.append((func.name(), found))
        return func(*args, **(kwargs or {}))


# Whether what a CUDA device is given, fake tensors too, has gradients.
training = pytest.param(
    True,
    marks=pytest.mark.skipif(
        not (torch.backends.cuda.is_built() or cuda_device.IS_SHIM),
        reason="torch built without CUDA aborts at gradients of its tensors",
    ),
    id="training",
)
inference = pytest.param(False, id="inference")


def short_call(op: str, dtype: torch.dtype, device: str, needs_grad: bool) -> list[Tensor]:
    """The results of an LSTM, an attention or a decoder of fake tensors."""
    T, B, E, H, S = 3, 2, 4, 5, 6

    def new(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device, requires_grad=needs_grad)

    def layer(size: int) -> tuple[Tensor, ...]:
        return new(4 * H, size), new(4 * H, H), new(4 * H), new(4 * H)

    x, state = new(T, B, E), (new(B, H), new(B, H))
    keys, memory = new(S, B, H), new(S, B, H)
    results: Any
    if op == "scan":
        results = functional.scan(x, *layer(E), state=state, cell="lstm")
    elif op == "linear":
        results = torch.ops.pyseq.linear(x, new(H, E), new(H))
    elif op == "scan_both":
        both = tuple(torch.stack((part, part)) for part in state)
        results = functional.scan_both(x, (*layer(E), None), (*layer(E), None), both, cell="lstm")
    elif op == "attend":
        results = functional.attend(new(T, B, H), keys, memory, need_weights=True)
    else:
        results = functional.decode(x, [layer(E + H)], keys, memory, new(H, 2 * H), cell="lstm")
    return [tensor for tensor in tree_leaves(results) if isinstance(tensor, Tensor)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs_grad", [inference, training])
@pytest.mark.parametrize("op", ["scan", "scan_both", "attend", "decode", "linear"])
def test_kernels_of_devices_take_short_types_as_they_are(
    op: str, needs_grad: bool, dtype: torch.dtype
) -> None:
    with FakeTensorMode(), Seen() as seen, torch.set_grad_enabled(needs_grad):
        results = short_call(op, dtype, "cuda", needs_grad)
    assert seen.calls
    assert all(found == {dtype} for _, found in seen.calls)
    assert all(result.dtype == dtype for result in results)


@pytest.mark.parametrize("needs_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("op", ["scan", "scan_both", "attend", "decode", "linear"])
def test_kernels_of_the_cpu_take_float32(op: str, needs_grad: bool) -> None:
    with FakeTensorMode(), Seen() as seen, torch.set_grad_enabled(needs_grad):
        results = short_call(op, torch.bfloat16, "cpu", needs_grad)
    assert seen.calls
    assert all(found == {torch.float32} for _, found in seen.calls)
    assert all(result.dtype == torch.bfloat16 for result in results)


@contextmanager
def autocast(device: str) -> Iterator[None]:
    """To bfloat16. ``torch.autocast`` does nothing for a device that torch does not see."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def dtypes_under_autocast(op: str, device: str, needs_grad: bool) -> list[torch.dtype]:
    with autocast(device), FakeTensorMode(), Seen() as seen:
        results = short_call(op, torch.bfloat16, device, needs_grad)
    assert seen.calls
    assert all(found == {torch.float32} for _, found in seen.calls)
    return [result.dtype for result in results]


@pytest.mark.parametrize("needs_grad", [inference, training])
@pytest.mark.parametrize("op", ["scan", "attend", "decode", "linear"])
def test_autocast_computes_in_float32_and_returns_the_same_everywhere(
    op: str, needs_grad: bool
) -> None:
    on_cpu = dtypes_under_autocast(op, "cpu", needs_grad)
    assert dtypes_under_autocast(op, "cuda", needs_grad) == on_cpu


def test_what_is_carried_on_is_kept_wide() -> None:
    """Of an LSTM on a device: c is float32, all else of the arguments' type."""
    T, B, E, H = 3, 2, 4, 5
    with FakeTensorMode():
        new = partial(torch.empty, dtype=torch.float16, device="cuda")
        weights = new(4 * H, E), new(4 * H, H), None, None, None
        call = torch.ops.pyseq.scan_forward(
            new(T, B, E), *weights, None, None, None, None, "lstm", False
        )
    shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in call[4:]]
    assert shapes == [
        ((T, B, 4 * H), torch.float16),  # gates
        ((T + 1, B, H), torch.float16),  # h
        ((T + 1, B, H), torch.float32),  # c
    ]


# ---- A training step -------------------------------------------------------------------

SIZES: dict[str, Any] = {"embedding_size": 6, "hidden_size": 8, "dropout": 0.2}


#: Of Seq2Seq.
MODELS: dict[str, dict[str, Any]] = {
    "general": {},
    "concat-two-layers-gru": {"score": "concat", "cell": "gru", "num_layers": 2},
    "no-attention": {"score": None, "input_feeding": False},
    "scanned": {"cell": "indrnn", "input_feeding": False, "num_layers": 2},
    "normed": {"encoder_options": {"layer_norm": True, "zoneout_h": 0.1}},
    "window-heads": {"window": "local-p", "window_size": 2, "heads": 2},
    "coverage": {
        "score": "concat",
        "history": "cumulative",
        "history_size": 3,
        "coverage_loss": 0.5,
    },
    "tied": {"tie_embeddings": True, "target_embedding_size": 8, "memory_bias": True},
}


def seq2seq(kind: str, **placed: Any) -> Seq2Seq:
    return Seq2Seq(11, 9, **SIZES, **MODELS[kind], **placed)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sources, lengths, what is read and what is predicted, without numbers."""
    return (
        torch.empty(3, 5, dtype=torch.int64, device="meta"),
        torch.empty(3, dtype=torch.int64, device="meta"),
        torch.empty(3, 4, dtype=torch.int64, device="meta"),
        torch.empty(3, 4, dtype=torch.int64, device="meta"),
    )


@pytest.mark.parametrize("sampling", [None, Sampling(0.5), Sampling(0.5, "sample", "sequence")])
@pytest.mark.parametrize("kind", MODELS)
def test_a_training_step_waits_for_nothing(kind: str, sampling: Sampling | None) -> None:
    model = seq2seq(kind, device="meta").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with NoWaiting("meta"):
        loss = model.loss(*batch(), label_smoothing=0.1, sampling=sampling)
        loss.backward()
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_a_training_step_is_that_of_the_cpu(kind: str, device: torch.device) -> None:
    model = seq2seq(kind, dtype=torch.float64).eval()  # since devices draw other masks
    data = torch.randint(4, 9, (3, 5)), torch.tensor([5, 2, 4]), torch.randint(4, 9, (3, 4))
    target = torch.randint(4, 9, (3, 4))
    target[1, 2:] = PAD

    def gradients(module: Seq2Seq, *tensors: Tensor) -> list[Tensor]:
        loss = module.loss(*tensors, label_smoothing=0.1)
        found = torch.autograd.grad(loss, list(module.parameters()))
        return [each.cpu() for each in (loss.detach(), *found)]

    actual = gradients(model, *data, target)
    assert all(p.device.type == device.type for p in model.parameters())
    with torch.device("cpu"):
        expected = gradients(model.cpu(), *(each.cpu() for each in (*data, target)))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", ["float16", "bfloat16", "autocast"])
@pytest.mark.parametrize("kind", ["general", "coverage", "scanned", "tied"])
def test_a_training_step_in_short_types(kind: str, form: str, device: torch.device) -> None:
    model = seq2seq(kind).eval()
    data = torch.randint(4, 9, (3, 5)), torch.tensor([5, 2, 4])
    target, predicted = torch.randint(4, 9, (2, 3, 4))
    predicted[1, 2:] = PAD

    def step(module: Seq2Seq) -> list[Tensor]:
        loss = module.loss(*data, target, predicted, label_smoothing=0.1)
        return [loss.detach(), *torch.autograd.grad(loss, list(module.parameters()))]

    expected = step(model.double())
    short = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(form)
    with autocast(device.type) if short is None else nullcontext():
        actual = step(model.to(short or torch.float32))
    assert all(each.dtype == (short or torch.float32) for each in actual[1:])
    for one, other in zip(actual, expected, strict=True):
        error = (one.double() - other).norm()
        assert error <= 0.05 * max(other.norm(), 0.02)


@pytest.mark.parametrize("kind", [Tagger, Classifier])
def test_labels_wait_for_nothing(kind: type[Tagger] | type[Classifier]) -> None:
    model = kind(11, num_labels=5, device="meta", **SIZES)
    source, lengths, _, _ = batch()
    labels = torch.empty((3, 5) if kind is Tagger else 3, dtype=torch.int64, device="meta")
    with NoWaiting("meta"):
        model.loss(source, lengths, labels).backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())
