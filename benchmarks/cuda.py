# SPDX-License-Identifier: Apache-2.0
"""Times a step on a CUDA device against torch's own layers and decoders written in torch, and
writes docs/benchmarks-cuda.md. ``make bench-cuda`` builds, tests and runs it.

Times are those of whole calls between events of the device, divided by the steps.
"""

from __future__ import annotations

import argparse
import datetime
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

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks-cuda.md"
HIDDEN = (128, 256, 512, 768, 1024, 2048)
BATCHES = (1, 16, 32, 64, 128)
STEPS = 128
CELLS: tuple[CellName, ...] = ("lstm", "gru")
#: The name of a precision, its dtype, and whether float32 products may be rounded.
PRECISIONS = (
    ("float16", torch.float16, False),
    ("bfloat16", torch.bfloat16, False),
    ("float32", torch.float32, False),
    ("tf32", torch.float32, True),
)
DECODER_HIDDEN = (256, 512, 1024)
REPEATS = 7  # of which the median counts


class Timing(NamedTuple):
    """µs a step, forward alone and with backward."""

    forward: float
    training: float


class Row(NamedTuple):
    """One line of a table."""

    case: tuple[str, ...]
    pyseq: Timing
    rivals: tuple[Timing | None, ...]
    floor: float  # µs a step, forward; by the cost model


def microseconds(run: Callable[[], object], steps: int) -> float:
    """The median time of a call, per step."""
    for _ in range(2):
        run()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times) / steps


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


def near(actual: Tensor, expected: Tensor, dtype: torch.dtype, *, rounded: bool) -> None:
    """Raise unless two implementations agree."""
    short = dtype in (torch.float16, torch.bfloat16) or rounded
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    if not error <= (5e-2 if short else 1e-4):
        raise SystemExit(f"the results differ by {error:.2g}: nothing is measured")


def layer_row(cell: CellName, hidden: int, batch: int, precision: int) -> Row:
    """A layer against ``torch.nn``'s, on the same weights."""
    name, dtype, rounded = PRECISIONS[precision]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = rounded
    kind: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    rival = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](hidden, hidden, **kind)
    own = {"lstm": pyseq.nn.LSTM, "gru": pyseq.nn.GRU}[cell](hidden, hidden, **kind)
    own.load_state_dict(rival.state_dict())
    x = torch.randn(STEPS, batch, hidden, **kind)
    with torch.no_grad():
        near(own(x)[0], rival(x)[0], dtype, rounded=rounded)
    plan = pyseq.cuda_plan(
        device="cuda", cell=cell, hidden_size=hidden, batch_size=batch, dtype=dtype, tf32=rounded
    )
    rivals = (timing(lambda: rival(x)[0], STEPS),)
    case = (cell, name, str(hidden), str(batch))
    return Row(case, timing(lambda: own(x)[0], STEPS), rivals, plan.floor_us)


def decoder_row(hidden: int, batch: int = 32, source: int = 30) -> Row:
    """A decoder with general attention and input feeding against the same written in torch."""
    torch.backends.cuda.matmul.allow_tf32 = False
    steps = 32

    def weight(*sizes: int) -> Tensor:
        return (torch.randn(*sizes, device="cuda") / hidden**0.5).requires_grad_()

    rows = 4 * hidden
    layers = [(weight(rows, 2 * hidden), weight(rows, hidden), weight(rows), weight(rows))]
    x = torch.randn(steps, batch, hidden, device="cuda")
    memory = torch.randn(source, batch, hidden, device="cuda", requires_grad=True)
    combine, general = weight(hidden, 2 * hidden), weight(hidden, hidden)

    def call(decode: Callable[..., DecoderOutput]) -> Callable[[], Tensor]:
        return lambda: decode(x, layers, None, memory, combine, score="general", weight=general)[0]

    with torch.no_grad():
        near(call(functional.decode)(), call(reference.decode)(), torch.float32, rounded=False)
    plan = pyseq.cuda_plan(
        "decode", device="cuda", hidden_size=hidden, batch_size=batch, source_length=source
    )
    eager = call(reference.decode)
    rivals = (timing(eager, steps), graphed(eager, steps))
    case = ("decode", "float32", str(hidden), str(batch))
    return Row(case, timing(call(functional.decode), steps), rivals, plan.floor_us)


def number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def table(rows: list[Row], rivals: tuple[str, ...]) -> Iterator[str]:
    """Lines of Markdown."""
    heads = ["operator", "dtype", "H", "B", "forward, µs", "with backward, µs", "of the floor, %"]
    for rival in rivals:
        heads += [f"{rival}: forward, µs", "ratio", "with backward, µs", "ratio"]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        cells = [*row.case, number(row.pyseq.forward), number(row.pyseq.training)]
        cells.append(f"{100 * row.floor / row.pyseq.forward:.0f}")
        for timed in row.rivals:
            if timed is None:
                cells += ["-"] * 4
                continue
            for own, other in zip(row.pyseq, timed, strict=True):
                cells += [number(other), f"{other / own:.2f}"]
        yield "| " + " | ".join(cells) + " |"


def document(layers: list[Row], decoders: list[Row], device: str, *, whole: bool) -> str:
    """The page."""
    lines = [
        "# Benchmarks on a CUDA device",
        "",
        f"{device}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"pyseq {pyseq.__version__}, {datetime.date.today()}, by `make bench-cuda`"
        + ("." if whole else "; the time ran out before every case was measured."),
        "",
        f"µs a step, {STEPS} steps of a layer with I = H, 32 of a decoder with S = 30. A ratio "
        "above 1 is a rival that takes so many times as long. The floor is that of the cost "
        "model, `pyseq.cuda_plan`.",
        "",
        *table(layers, ("torch.nn",)),
        "",
        *table(decoders, ("torch, eager", "torch, CUDA graph")),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure what the time allows and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="to measure for, at most")
    parser.add_argument("--output", type=Path, default=DOCUMENT)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.cuda needs a CUDA device that torch sees; there is none.")
    if pyseq._library._C.build_info()["cuda"] == "none":
        raise SystemExit("benchmarks.cuda needs a pyseq built with CUDA kernels: PYSEQ_CUDA=1.")
    end = time.monotonic() + 60 * options.minutes
    decoders = [decoder_row(hidden) for hidden in DECODER_HIDDEN]
    layers = []
    cases = list(itertools.product(CELLS, HIDDEN, BATCHES, range(len(PRECISIONS))))
    for case in cases:
        if time.monotonic() > end:
            break
        layers.append(layer_row(*case))
        print(*table(layers[-1:], ("torch.nn",)), sep="\n", flush=True)
    page = document(layers, decoders, torch.cuda.get_device_name(), whole=len(layers) == len(cases))
    part = options.output.with_suffix(".part")
    part.write_text(page)
    part.replace(options.output)


if __name__ == "__main__":
    main()
