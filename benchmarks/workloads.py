# SPDX-License-Identifier: Apache-2.0
"""What is measured: each workload is one operator, shape and mode, by several implementations.

Shared by the pytest-benchmark files and by report.py. The implementations of a workload do
the same work on the same numbers, and their results are compared before they are timed.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import pyseq
from pyseq import functional, info, nn, reference
from pyseq.comparison import reference_operators
from pyseq.seq2seq import Seq2Seq
from pyseq.text import Batch
from pyseq.training import training_step
from pyseq.types import STOP

Mode = Literal["training", "inference"]
Results = dict[str, Tensor]
Implementation = Callable[[], Results]

#: Names of the implementations, in the order in which tables show them.
IMPLEMENTATIONS = ("pyseq", "torch", "reference")

#: Largest difference from the reference, relative to the largest magnitude in the tensor
#: but at least to 1. Weight gradients are float32 sums of some thousand terms on both sides.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Workload:
    """One operator at one shape, to train or to infer."""

    op: str  # scan, attend, decode, seq2seq or generate
    shape: str  # such as lstm-B16-H256-T50
    mode: Mode
    tokens: int  # time steps times rows of one call; for generate the most it can emit
    #: Makes the inputs, the same ones every time, and the implementations by name.
    prepare: Callable[[], dict[str, Implementation]]
    implementations: tuple[str, ...]

    @property
    def group(self) -> str:
        """The name under which rivals share a table."""
        return f"{self.op}-{self.mode}-{self.shape}"

    def __str__(self) -> str:
        return self.group


#: What the fixture ``measure`` of the benchmark files does with a case.
Measure = Callable[[Workload, str], None]


def cases(workloads: Sequence[Workload]) -> list[tuple[Workload, str]]:
    """Each implementation of each workload, as a case of its own."""
    return [(workload, impl) for workload in workloads for impl in workload.implementations]


def check(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Assert that a result is the reference's, within ``TOLERANCE``."""
    assert list(actual) == list(expected), f"{list(actual)} are not {list(expected)}"
    for name, value in actual.items():
        target = expected[name]
        assert value.shape == target.shape, f"{name}: {value.shape} is not {target.shape}"
        allowed = TOLERANCE * max(1.0, target.abs().max().item())
        error = (value - target).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3g} is over {allowed:.3g}"


def environment() -> dict[str, str | int]:
    """What the numbers depend on."""
    return {
        "pyseq": pyseq.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "tier": info.facts()["cpu tier"],
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "load": f"{os.getloadavg()[0]:.1f}",  # runnable processes in the last minute
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def workloads() -> list[Workload]:
    """Everything that is measured."""
    return [
        *scan_workloads(),
        *attend_workloads(),
        *decode_workloads(),
        *seq2seq_workloads(),
        *generate_workloads(),
    ]


def differentiated(
    call: Callable[[], Tensor], inputs: Mapping[str, Tensor], mode: Mode
) -> Implementation:
    """``call`` and, in training, its backward from a gradient of ones, as an implementation."""
    for tensor in inputs.values():
        tensor.requires_grad_(mode == "training")

    def infer() -> Results:
        with torch.no_grad():
            return {"output": call()}

    def train() -> Results:
        output = call()
        gradients = torch.autograd.grad(output.sum(), list(inputs.values()))
        return {"output": output.detach(), **dict(zip(inputs, gradients, strict=True))}

    return train if mode == "training" else infer


# scan: the layers of torch.nn against ours with the same weights


def scan_workloads() -> list[Workload]:
    """One layer, T 50, input as wide as the state."""
    return [
        _scan(cell, batch, hidden, mode)
        for mode in _MODES
        for cell in ("rnn", "gru", "lstm")
        for batch, hidden in ((1, 256), (16, 256), (64, 256), (16, 512))
    ]


_MODES: tuple[Mode, ...] = ("training", "inference")


def _scan(cell: str, batch: int, hidden: int, mode: Mode) -> Workload:
    steps = 50

    def prepare() -> dict[str, Implementation]:
        torch.manual_seed(0)
        x = torch.randn(steps, batch, hidden)
        name = cell.upper()
        theirs = getattr(torch.nn, name)(hidden, hidden)
        ours = getattr(nn, name)(hidden, hidden)
        ours.load_state_dict(theirs.state_dict())

        def plainly() -> Tensor:
            weights = (ours.weight_ih_l0, ours.weight_hh_l0, ours.bias_ih_l0, ours.bias_hh_l0)
            return reference.scan(x, *weights, cell=nn.cell_name(cell)).output

        return {
            "pyseq": differentiated(
                lambda: ours(x)[0], {"x": x, **dict(ours.named_parameters())}, mode
            ),
            "torch": differentiated(
                lambda: theirs(x)[0], {"x": x, **dict(theirs.named_parameters())}, mode
            ),
            "reference": differentiated(plainly, {"x": x, **dict(ours.named_parameters())}, mode),
        }

    shape = f"{cell}-B{batch}-H{hidden}-T{steps}"
    return Workload("scan", shape, mode, steps * batch, prepare, IMPLEMENTATIONS)


# attend: for dot torch has a fused operator too


def attend_workloads() -> list[Workload]:
    """All queries of 16 sequences at once, over memories with padding."""
    return [_attend(score, mode) for mode in _MODES for score in ("dot", "concat")]


def _attend(score: Literal["dot", "concat"], mode: Mode) -> Workload:
    steps, source, batch, size = 50, 50, 16, 256

    def prepare() -> dict[str, Implementation]:
        torch.manual_seed(0)
        lengths = torch.randint(source // 2, source + 1, (batch,))
        inputs = {
            "query": torch.randn(steps, batch, size),
            "keys": torch.randn(source, batch, size) / size**0.5,
            "memory": torch.randn(source, batch, size),
        }
        if score == "concat":
            inputs["weight_query"] = torch.randn(size, size) / size**0.5
            inputs["weight_v"] = torch.randn(size)
        valid = (torch.arange(source) < lengths.unsqueeze(1)).unsqueeze(1)

        def with_torch() -> Tensor:
            query, keys, memory = (tensor.transpose(0, 1) for tensor in inputs.values())
            context = scaled_dot_product_attention(query, keys, memory, attn_mask=valid, scale=1.0)
            return context.transpose(0, 1)

        calls = {
            "pyseq": lambda: functional.attend(**inputs, lengths=lengths, score=score).context,
            "torch": with_torch,
            "reference": lambda: reference.attend(**inputs, lengths=lengths, score=score).context,
        }
        return {name: differentiated(calls[name], inputs, mode) for name in names}

    names = IMPLEMENTATIONS if score == "dot" else ("pyseq", "reference")
    shape = f"{score}-B{batch}-A{size}-T{steps}-S{source}"
    return Workload("attend", shape, mode, steps * batch, prepare, names)


# decode: torch.nn has nothing that feeds a context back


def decode_workloads() -> list[Workload]:
    """LSTM, general score, input feeding; input, keys and memory as wide as the state."""
    return [
        _decode(batch, hidden, steps, mode)
        for mode in _MODES
        for batch, hidden, steps in (
            (1, 64, 20),
            (16, 64, 20),
            (1, 256, 30),
            (16, 256, 30),
            (64, 256, 30),
        )
    ]


def _decode(batch: int, hidden: int, steps: int, mode: Mode) -> Workload:
    def prepare() -> dict[str, Implementation]:
        torch.manual_seed(0)
        scale = hidden**-0.5
        inputs = {
            "x": torch.randn(steps, batch, hidden),
            "w_ih": torch.randn(4 * hidden, 2 * hidden) * scale,
            "w_hh": torch.randn(4 * hidden, hidden) * scale,
            "b_ih": torch.randn(4 * hidden),
            "b_hh": torch.randn(4 * hidden),
            "memory": torch.randn(steps, batch, hidden),
            "weight": torch.randn(hidden, hidden) * scale,
            "combine": torch.randn(hidden, 2 * hidden) * scale,
        }

        def run(decode: Callable[..., Any]) -> Tensor:
            layer = tuple(inputs[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh"))
            output: Tensor = decode(
                inputs["x"],
                [layer],
                inputs["memory"],
                inputs["memory"],
                inputs["combine"],
                score="general",
                weight=inputs["weight"],
            ).output
            return output

        return {
            "pyseq": differentiated(lambda: run(functional.decode), inputs, mode),
            "reference": differentiated(lambda: run(reference.decode), inputs, mode),
        }

    shape = f"lstm-general-B{batch}-H{hidden}-T{steps}-S{steps}"
    return Workload("decode", shape, mode, steps * batch, prepare, ("pyseq", "reference"))


# seq2seq and generate: the whole model, with the fused operators and with the reference's


def _model() -> Seq2Seq:
    """LSTM, general score, input feeding, a bidirectional encoder; the vocabulary 1000.

    Without dropout, so that the implementations can be compared. It never stops by itself,
    so that every search has the same number of steps.
    """
    torch.manual_seed(0)
    model = Seq2Seq(1000, 1000, embedding_size=256, hidden_size=256, dropout=0.0)
    with torch.no_grad():
        model.decoder.output.bias[STOP] = -1e4
    return model


def _tokens(batch: int, steps: int) -> Tensor:
    """Random token ids (B, T) that are not special."""
    return torch.randint(4, 1000, (batch, steps))


def _with_reference(call: Implementation) -> Implementation:
    def run() -> Results:
        with reference_operators():
            return call()

    return run


def seq2seq_workloads() -> list[Workload]:
    """One update of a translation model: forward, loss, backward, clipping, Adam."""
    batch, steps = 32, 20

    def prepare() -> dict[str, Implementation]:
        model = _model()
        lengths = torch.randint(steps // 2, steps + 1, (batch,))
        target = _tokens(batch, steps + 1)
        source = _tokens(batch, steps)
        data = Batch(source, lengths, target[:, :-1], target[:, 1:], lines=list(range(batch)))
        # A rate of zero costs as much as any other and leaves the weights as they are, so
        # that every call must give the same result.
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0)

        def step() -> Results:
            loss = training_step(model, data, optimizer, clip_norm=1e6)
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            return {"loss": torch.tensor(loss), **gradients}

        return {"pyseq": step, "reference": _with_reference(step)}

    shape = f"lstm-general-B{batch}-H256-T{steps}-S{steps}-V1000"
    return [Workload("seq2seq", shape, "training", batch * steps, prepare, ("pyseq", "reference"))]


def generate_workloads() -> list[Workload]:
    """Greedy and beam search, 20 tokens for each source of 20."""
    return [_generate(beam, batch) for beam in (1, 5) for batch in (1, 16)]


def _generate(beam_size: int, batch: int) -> Workload:
    steps = 20

    def prepare() -> dict[str, Implementation]:
        model = _model().eval()
        source, lengths = _tokens(batch, steps), torch.full((batch,), steps)

        def search() -> Results:
            found = model.generate(source, lengths, max_length=steps, beam_size=beam_size)
            # Not the tokens: two that are equally likely but for rounding may change places.
            return {"scores": torch.tensor([hypothesis.score for hypothesis in found])}

        return {"pyseq": search, "reference": _with_reference(search)}

    kind = "greedy" if beam_size == 1 else f"beam{beam_size}"
    shape = f"{kind}-B{batch}-H256-T{steps}-S{steps}-V1000"
    names = ("pyseq", "reference")
    return Workload("generate", shape, "inference", batch * steps, prepare, names)
