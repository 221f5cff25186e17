# SPDX-License-Identifier: Apache-2.0
"""What is measured: each workload is one operator or model at one shape, in one mode.

The implementations of a workload do the same work on the same numbers; measure.py compares
their results before it times them. The rivals themselves are in rivals.py and onnx_rival.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyseq.comparison import reference_operators

from .floors import Cost, Mode

Results = dict[str, Tensor]
Implementation = Callable[[], Results]
ImplementationName = Literal["pyseq", "torch", "onnx", "compiled", "reference"]

#: In the order in which tables show them; document.py says what they are.
IMPLEMENTATIONS: tuple[ImplementationName, ...] = (
    "pyseq",
    "torch",
    "onnx",
    "compiled",
    "reference",
)

MODES: tuple[Mode, ...] = ("inference", "training")


@dataclass(frozen=True)
class Workload:
    """One operator at one shape, to train or to infer."""

    op: str  # scan, bidirectional, ragged, stream, cell, attend, decode, seq2seq or generate
    kind: str  # what tables do not average over: the cell, the score, the search
    shape: str  # such as B16-H256-T50
    mode: Mode
    tokens: int  # time steps times rows of one call; for generate the most it can emit
    cost: Cost  # of one call, forward and, in training, backward
    #: Makes the inputs, the same ones every time, and the implementations by name.
    prepare: Callable[[], Mapping[ImplementationName, Implementation]]
    implementations: tuple[ImplementationName, ...]

    @property
    def name(self) -> str:
        """Such as scan-training-lstm-B16-H256-T50."""
        return f"{self.op}-{self.mode}-{self.kind}-{self.shape}"

    def __str__(self) -> str:
        return self.name


def cases(workloads: Iterable[Workload]) -> list[tuple[Workload, ImplementationName]]:
    """Each implementation of each workload but the compiled ones, as a case of its own."""
    return [
        (workload, name)
        for workload in workloads
        for name in workload.implementations
        if name != "compiled"
    ]


def differentiated(
    call: Callable[[], Tensor], inputs: Mapping[str, Tensor], mode: Mode
) -> Implementation:
    """``call`` and, in training, its backward from a random gradient, as an implementation."""
    for tensor in inputs.values():
        tensor.requires_grad_(mode == "training")

    @functools.cache
    def d_output(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def infer() -> Results:
        with torch.no_grad():
            return {"output": call()}

    def train() -> Results:
        output = call()
        gradients = torch.autograd.grad(output, list(inputs.values()), d_output(output.shape))
        return {"output": output.detach(), **dict(zip(inputs, gradients, strict=True))}

    return train if mode == "training" else infer


def lazily(make: Callable[[], Implementation]) -> Implementation:
    """An implementation that is made when it is first called, since not all runs call it."""
    made = functools.cache(make)
    return lambda: made()()


def with_reference(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``call``, a module of pyseq, on the operators of ``pyseq.reference``."""

    def run() -> Tensor:
        with reference_operators():
            return call()

    return run
