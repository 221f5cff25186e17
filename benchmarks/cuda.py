# SPDX-License-Identifier: Apache-2.0
"""Times a step on a CUDA device against torch's own layers, decoders written in torch and, where it
is there, FlashRNN, and writes docs/benchmarks-cuda.md after each case. ``make bench-cuda`` runs it.

Times are those of calls in a row between events of the device, divided by the steps: the host runs
ahead, as in training.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pyseq
from pyseq import functional, reference
from pyseq.types import CellName, DecoderOutput

from . import cuda_targets

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks-cuda.md"
HIDDEN = (512, 256, 1024, 768, 128, 2048)  # the first come first, in case the time runs out
BATCHES = (32, 16, 64, 1, 128)
STEPS = 128
DECODER_STEPS, DECODER_SOURCE = 32, 30
CELLS: tuple[CellName, ...] = ("lstm", "gru")
#: The name of a precision, its dtype, and whether float32 products may be rounded.
PRECISIONS = {
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
DECODER_HIDDEN = (512, 256, 1024)
FLASH_SECONDS = 90  # which FlashRNN may compile for
REPEATS = 7  # of which the median counts
REPEAT_SECONDS = 0.01  # of calls in a row


class Failed(Exception):
    """A case that could not be measured, and why."""


class Timing(NamedTuple):
    """µs a step, forward alone and with backward."""

    forward: float
    training: float


class Layer(NamedTuple):
    """One layer to measure."""

    cell: CellName
    hidden: int
    batch: int
    precision: str
    bidirectional: bool = False
    ragged: bool = False  # lengths from half of the steps on

    def __str__(self) -> str:
        kinds = [self.cell, *["bidirectional"] * self.bidirectional, *["ragged"] * self.ragged]
        return ", ".join(kinds)


class Row(NamedTuple):
    """One line of a table."""

    case: tuple[str, ...]
    pyseq: Timing
    rivals: tuple[Timing | None, ...]
    floor: float  # µs a step, forward; by the cost model
    path: str  # that forward takes, by the same


class Results(NamedTuple):
    """What there is to tell."""

    layers: list[Row]
    decoders: list[Row]
    flash: list[Row]
    failures: list[str]


def layer_cases() -> list[Layer]:
    """Sizes that the targets name first, then what cuDNN has no persistent kernel for, then all."""
    grid = [Layer(*case) for case in itertools.product(CELLS, HIDDEN, BATCHES, PRECISIONS)]
    grid.sort(key=lambda case: not 256 <= case.hidden <= 1024 or case.batch not in (16, 32))
    others = [
        Layer("lstm", 512, batch, precision, **option)
        for precision in ("float16", "bfloat16", "float32")
        for batch, option in (
            (32, {"bidirectional": True}),
            (32, {"ragged": True}),
            (31, {}),
        )
    ]
    return grid[:8] + others + grid[8:]


def microseconds(run: Callable[[], object], steps: int) -> float:
    """The median time of a call, per step."""

    def of_calls(count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / count

    of_calls(2)
    count = 1 + int(1e6 * REPEAT_SECONDS / max(of_calls(1), 1.0))
    return statistics.median(of_calls(count) for _ in range(REPEATS)) / steps


def timing(call: Callable[[], Tensor], steps: int) -> Timing:
    """Of ``call``, whose result depends on tensors that require gradients."""

    def training() -> None:
        call().sum().backward()

    with torch.no_grad():
        forward = microseconds(call, steps)
    return Timing(forward, microseconds(training, steps))


def graphed(call: Callable[[], Tensor], steps: int) -> Timing:
    """The same of a captured graph of the call, and of one of the call with its gradients."""

    def captured(run: Callable[[], object]) -> float:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return microseconds(graph.replay, steps)

    def training() -> None:
        call().sum().backward()

    with torch.no_grad():
        forward = captured(call)
    return Timing(forward, captured(training))


def near(actual: Tensor, expected: Tensor, *, rounded: bool) -> None:
    """Raise unless two implementations agree."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    if not error <= (5e-2 if rounded else 1e-4):
        raise Failed(f"the results differ by {error:.2g}")


def layer_row(case: Layer) -> Row:
    """A layer against ``torch.nn``'s, on the same weights."""
    dtype, rounded = PRECISIONS[case.precision]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = rounded
    kind: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    sizes = (case.hidden, case.hidden)
    options = {"bidirectional": case.bidirectional, **kind}
    rival = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[case.cell](*sizes, **options)
    own = {"lstm": pyseq.nn.LSTM, "gru": pyseq.nn.GRU}[case.cell](*sizes, **options)
    own.load_state_dict(rival.state_dict())
    x = torch.randn(STEPS, case.batch, case.hidden, **kind)
    lengths = None
    if case.ragged:
        lengths = torch.linspace(STEPS, STEPS // 2, case.batch).long()
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
        lengths = lengths.cuda()

    def own_call() -> Tensor:
        return own(x, lengths=lengths)[0]

    def rival_call() -> Tensor:
        return rival(packed)[0].data if case.ragged else rival(x)[0]

    with torch.no_grad():
        ours, theirs = own_call(), rival_call()
        if lengths is not None:
            valid = torch.arange(STEPS, device="cuda").unsqueeze(1) < lengths
            ours = ours[valid]  # by steps, as a packed sequence of falling lengths
        near(ours, theirs, rounded=rounded or dtype != torch.float32)
    plan = pyseq.cuda_plan(
        device="cuda",
        cell=case.cell,
        hidden_size=case.hidden,
        batch_size=case.batch,
        dtype=dtype,
        directions=1 + case.bidirectional,
        tf32=rounded,
    )
    names = (str(case), case.precision, str(case.hidden), str(case.batch))
    own_time, rival_time = timing(own_call, STEPS), timing(rival_call, STEPS)
    return Row(names, own_time, (rival_time,), plan.floor_us, plan.path)


def decoder_row(hidden: int, batch: int = 32) -> Row:
    """A decoder with general attention and input feeding against the same written in torch."""
    torch.backends.cuda.matmul.allow_tf32 = False

    def weight(*sizes: int) -> Tensor:
        return (torch.randn(*sizes, device="cuda") / hidden**0.5).requires_grad_()

    rows = 4 * hidden
    layers = [(weight(rows, 2 * hidden), weight(rows, hidden), weight(rows), weight(rows))]
    x = torch.randn(DECODER_STEPS, batch, hidden, device="cuda")
    memory = torch.randn(DECODER_SOURCE, batch, hidden, device="cuda", requires_grad=True)
    combine, general = weight(hidden, 2 * hidden), weight(hidden, hidden)

    def call(decode: Callable[..., DecoderOutput]) -> Callable[[], Tensor]:
        options: dict[str, Any] = {"score": "general", "weight": general}
        return lambda: decode(x, layers, memory, memory, combine, **options)[0]

    with torch.no_grad():
        near(call(functional.decode)(), call(reference.decode)(), rounded=False)
    plan = pyseq.cuda_plan(
        "decode", device="cuda", hidden_size=hidden, batch_size=batch, source_length=DECODER_SOURCE
    )
    own = timing(call(functional.decode), DECODER_STEPS)
    eager = call(reference.decode)
    by_step = timing(eager, DECODER_STEPS)
    try:
        by_graph = graphed(eager, DECODER_STEPS)
    except RuntimeError as error:
        if device_is_lost():
            raise
        print(f"torch's decoder in a graph, H={hidden}: {error}")
        by_graph = None
    case = ("decode", "float32", str(hidden), str(batch))
    return Row(case, own, (by_step, by_graph), plan.floor_us, plan.path)


def flash_row(hidden: int = 768, batch: int = 16) -> Row:
    """An LSTM in bfloat16 against FlashRNN's fused kernel, the product of the input left out of
    that and not of pyseq's."""
    flashrnn = importlib.import_module("flashrnn").flashrnn

    kind: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    own = pyseq.nn.LSTM(hidden, hidden, **kind)
    x = torch.randn(STEPS, batch, hidden, **kind)
    gates = torch.randn(batch, STEPS, 4, 1, hidden, **kind, requires_grad=True)
    weights = (torch.randn(4, 1, hidden, hidden, **kind) / hidden**0.5).requires_grad_()
    bias = torch.randn(4, 1, hidden, **kind, requires_grad=True)

    def rival() -> Tensor:
        return flashrnn(gates, weights, bias, function="lstm", backend="cuda_fused")[0]

    plan = pyseq.cuda_plan(
        device="cuda", hidden_size=hidden, batch_size=batch, dtype=torch.bfloat16
    )
    timed = timing(rival, STEPS)
    case = ("lstm", "bfloat16", str(hidden), str(batch))
    return Row(case, timing(lambda: own(x)[0], STEPS), (timed,), plan.floor_us, plan.path)


def number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def table(rows: list[Row], rivals: tuple[str, ...]) -> Iterator[str]:
    """Lines of Markdown."""
    heads = ["operator", "dtype", "H", "B", "path", "forward, µs", "with backward, µs"]
    heads.append("of the floor, %")
    for rival in rivals:
        heads += [f"{rival}: forward, µs", "ratio", "with backward, µs", "ratio"]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        cells = [*row.case, row.path, number(row.pyseq.forward), number(row.pyseq.training)]
        cells.append(f"{100 * row.floor / row.pyseq.forward:.0f}")
        for timed in row.rivals:
            if timed is None:
                cells += ["-"] * 4
                continue
            for own, other in zip(row.pyseq, timed, strict=True):
                cells += [number(other), f"{other / own:.2f}"]
        yield "| " + " | ".join(cells) + " |"


def document(results: Results, device: str, *, tests: str, left: int) -> str:
    """The page; ``left`` cases were not measured."""
    lines = [
        "# Benchmarks on a CUDA device",
        "",
        f"{device}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"pyseq {pyseq.__version__}, {datetime.date.today()}, by `make bench-cuda`.",
        f"Tests on the device: {tests}.",
        "",
        f"µs a step, {STEPS} steps of a layer with I = H, {DECODER_STEPS} of a decoder with "
        f"S = {DECODER_SOURCE}. A ratio above 1 is a rival that takes so many times as long. The "
        "floor, and the path that forward takes, are those of `pyseq.cuda_plan`.",
        "",
        f"Targets, of layers with H from {cuda_targets.HIDDEN[0]} to {cuda_targets.HIDDEN[-1]}:",
        "",
        *cuda_targets.table(results),
        "",
        *table(results.layers, ("torch.nn",)),
        "",
        *table(results.decoders, ("torch, eager", "torch, CUDA graph")),
        "",
    ]
    if results.flash:
        lines += [
            "FlashRNN's time is without the product of the input, pyseq's with it.",
            "",
            *table(results.flash, ("FlashRNN",)),
            "",
        ]
    if left:
        lines += [f"The time ran out before {left} more cases were measured.", ""]
    if results.failures:
        lines += ["Not measured:", "", *(f"- {failure}" for failure in results.failures), ""]
    return "\n".join(lines)


def write(page: str, output: Path) -> None:
    """The whole page or none of it."""
    part = output.with_suffix(".part")
    part.write_text(page)
    part.replace(output)


def device_is_lost() -> bool:
    """Whether a kernel's error has left the process without the device."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Case(NamedTuple):
    """What to measure, and where its line goes."""

    name: str
    row: Callable[[], Row]
    rows: list[Row]


def cases_of(results: Results) -> list[Case]:
    """Everything, the most wanted first."""
    cases = [
        Case(f"decode H={hidden}", functools.partial(decoder_row, hidden), results.decoders)
        for hidden in DECODER_HIDDEN
    ]
    cases += [
        Case(
            f"{case} {case.precision} H={case.hidden} B={case.batch}",
            functools.partial(layer_row, case),
            results.layers,
        )
        for case in layer_cases()
    ]
    return cases


def measure(cases: list[Case], results: Results, end: float, save: Callable[[int], None]) -> None:
    """Every case until ``end``, saving what there is after each."""
    for index, case in enumerate(cases):
        if time.monotonic() > end:
            return
        try:
            case.rows.append(case.row())
            print(*list(table(case.rows[-1:], ("",) * len(case.rows[-1].rivals)))[2:], flush=True)
        except Exception as error:  # whatever a library or the device comes up with
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            results.failures.append(f"{case.name}: {reason}")
            print(results.failures[-1], flush=True)
            if device_is_lost():
                results.failures.append("everything after it: the device was lost to this process")
                save(len(cases) - index - 1)
                return
        save(len(cases) - index - 1)


def main(arguments: list[str] | None = None) -> None:
    """Measure what the time allows and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="to measure for, at most")
    parser.add_argument("--output", type=Path, default=DOCUMENT)
    parser.add_argument("--tests", default="not run", help="what they said, for the page")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.cuda needs a CUDA device that torch sees; there is none.")
    if pyseq._library._C.build_info()["cuda"] == "none":
        raise SystemExit("benchmarks.cuda needs a pyseq built with CUDA kernels: PYSEQ_CUDA=1.")
    end = time.monotonic() + 60 * options.minutes
    results = Results([], [], [], [])
    device = torch.cuda.get_device_name()

    def save(left: int) -> None:
        write(document(results, device, tests=options.tests, left=left), options.output)

    cases = cases_of(results)
    if importlib.util.find_spec("flashrnn") is None:
        results.failures.append("FlashRNN: not installed")
    elif 60 * options.minutes > 2 * FLASH_SECONDS:
        cases.insert(0, Case("FlashRNN", flash_row, results.flash))
    measure(cases, results, end, save)
    if not (results.layers or results.decoders):
        raise SystemExit("nothing could be measured.")


if __name__ == "__main__":
    main()
