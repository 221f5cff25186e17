# SPDX-License-Identifier: Apache-2.0
"""Every operator can be called with tensors of a CUDA device: by kernels of its own, or by torch's
operators; and a training step asks no device what its tensors hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from no_waiting import NoWaiting
from torch import Tensor
from torch._C import _dispatch_has_computed_kernel_for_dispatch_key as has_computed
from torch._C import _dispatch_has_kernel_for_dispatch_key as has_own

from pyseq import _C, Classifier, Seq2Seq, Tagger
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


@pytest.mark.parametrize("kind", [Tagger, Classifier])
def test_labels_wait_for_nothing(kind: type[Tagger] | type[Classifier]) -> None:
    model = kind(11, num_labels=5, device="meta", **SIZES)
    source, lengths, _, _ = batch()
    labels = torch.empty((3, 5) if kind is Tagger else 3, dtype=torch.int64, device="meta")
    with NoWaiting("meta"):
        model.loss(source, lengths, labels).backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())
