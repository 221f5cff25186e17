# SPDX-License-Identifier: Apache-2.0
"""What a run is written as: tables for the screen, docs/benchmarks.md and its numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from .chart import draw
from .files import write_text
from .machine import Machine
from .measure import Measurement
from .targets import TARGETS, Outcome, by_batch, outcomes
from .workloads import IMPLEMENTATIONS, ImplementationName

#: A machine and what was measured with its number of threads.
Run = tuple[Machine, Sequence[Measurement]]

_SECTIONS = {
    "scan": "Layers: one layer, one direction, T 50, as wide as the input",
    "bidirectional": "Two layers in both directions",
    "ragged": "Ragged lengths, against packing",
    "stream": "Streaming: 50 calls for one step of one row each",
    "cell": "Cells: the same by `RNNCell`, `GRUCell` and `LSTMCell`",
    "attend": "Attention",
    "decode": "Attention decoder: LSTM, general score, input feeding",
    "seq2seq": "A whole training step of Seq2Seq, with label smoothing, clipping and Adam",
    "generate": "Search, 20 tokens long",
}

_INTRODUCTION = """\
Median of interleaved rounds in one process, after a warm-up and after comparing every result,
gradients included, with the reference; ± is half the distance between the quartiles, as a part
of the median. A ratio above 1 means that pyseq is faster; where it is slower, the ratio is
**bold**, and all such cells are listed at the end.

- `torch` is the same layer of `torch.nn` (over packed sequences, where lengths are ragged),
  `scaled_dot_product_attention`, or, for the decoder and the whole model, a loop over the steps
  of `LSTMCell`, `Linear`, `bmm` and `softmax`, with `torch.nn.LSTM` as the encoder.
- `onnx` is ONNX Runtime on the same weights, with its inputs and outputs bound in place.
- `compiled` is `torch.compile` of the reference; what it takes to compile, some minutes for each
  shape, is not counted.
- `reference` is `pyseq.reference`: the operators in plain torch.
- `GFLOP/s` counts the multiply-adds of matrix products only, two operations each.
- `of floor` is the time below which this machine cannot get, as a part of what pyseq takes: the
  larger of the time for the arithmetic, at the peak that was measured in the same rounds, and that
  for reading what each of the dependent steps has to read again (weights; keys and memory), at the
  measured bandwidth of the nearest cache that holds it. An `r` says that reading is the larger.
- `saved` is what forward keeps for backward, in MB.

In the tables of targets, means are geometric ones over the cells, and `at the floor` is what the
mean would be if pyseq took no longer than the floor: a target above that is out of reach here.
Where a mean is missed, a second table has those of each batch size: with many rows the rival may
compute near the peak itself, which leaves little to gain.
"""


def machine_line(machine: Machine) -> str:
    """What the machine can do, in one line."""
    levels = ", ".join(f"{level.name} {level.bandwidth / 1e9:.0f} GB/s" for level in machine.levels)
    peak = machine.peak / 1e9
    return f"{_threads(machine)}: multiply-adds {peak:.0f} GFLOP/s; reads {levels}"


def _threads(machine: Machine) -> str:
    return "1 thread" if machine.threads == 1 else f"{machine.threads} threads"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is aligned for reading as plain text too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|" + "|".join(
        ("-" if index == 0 else "") + "-" * (width + 1) + ("" if index == 0 else ":")
        for index, width in enumerate(widths)
    )
    return "\n".join([line(header), rule + "|", *map(line, rows)])


def _bound(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def target_table(reached: Sequence[Outcome]) -> str:
    """What each target asks for and came to."""
    rows = [
        (
            f"{outcome.target.title}, {outcome.target.rival}",
            str(outcome.cells),
            f"{outcome.mean:.2f}",
            _bound(outcome.target.mean),
            _bound(outcome.possible),
            f"{outcome.lowest:.2f}",
            _bound(outcome.target.lowest),
            outcome.worst,
            "pass" if outcome.reached else "**miss**",
        )
        for outcome in reached
    ]
    header = (
        "what, against",
        "cells",
        "mean",
        "target",
        "at the floor",
        "lowest",
        "target",
        "lowest cell",
        "",
    )
    return table(header, rows)


def missed_table(measurements: Sequence[Measurement], reached: Sequence[Outcome]) -> str | None:
    """Of each mean of times that is missed, those of the batch sizes; None if there are no two."""
    rows = []
    for outcome in reached:
        target = outcome.target
        if not target.of_times or outcome.mean >= (target.mean or 0):
            continue
        parts = by_batch(measurements, target)
        rows += [
            (
                f"{target.title}, {target.rival}",
                batch,
                str(part.cells),
                f"{part.mean:.2f}",
                _bound(part.possible),
            )
            for batch, part in parts.items()
            if len(parts) > 1
        ]
    header = ("what, against", "batch", "cells", "mean", "at the floor")
    return table(header, rows) if rows else None


def section_table(measurements: Sequence[Measurement]) -> str:
    """All cells of one operator and mode; a rival has columns if any cell has it."""
    names = [n for n in IMPLEMENTATIONS if any(n in m.medians for m in measurements)]
    savers = [n for n in names if any(n in m.saved for m in measurements)]
    header = (
        "shape",
        *(f"{name}, ms" for name in names),
        *(f"{name} / pyseq" for name in names[1:]),
        "GFLOP/s",
        "of floor",
        *(f"saved, {name}" for name in savers),
    )
    rows = [
        (
            f"{m.kind} {m.shape}",
            *(_milliseconds(m, name) for name in names),
            *(_ratio(m, name) for name in names[1:]),
            f"{m.rate / 1e9:.1f}",
            f"{m.efficiency:.0%}{'r' if m.bound_by_reading else ' '}",
            *(f"{m.saved[n] / 1e6:.2f}" if n in m.saved else "" for n in savers),
        )
        for m in measurements
    ]
    return table(header, rows)


def _milliseconds(measurement: Measurement, name: ImplementationName) -> str:
    if name not in measurement.medians:
        return ""
    median = measurement.medians[name]
    return f"{median * 1e3:#.3g} ±{measurement.spreads[name] / median:4.0%}"


def _ratio(measurement: Measurement, rival: ImplementationName) -> str:
    if rival not in measurement.medians:
        return ""
    ratio = measurement.ratio(rival)
    return f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"


def _losses(runs: Sequence[Run]) -> list[str]:
    """The cells in which a rival is faster, as lines of a list."""
    return [
        f"- {_threads(machine)}, {m.op} {m.mode} {m.kind} {m.shape}: "
        f"{rival} is {1 / m.ratio(rival):.2f} times as fast"
        for machine, measurements in runs
        for m in measurements
        for rival in m.rivals
        if m.ratio(rival) < 1
    ]


def _run_text(run: Run) -> str:
    machine, measurements = run
    parts = [f"## {_threads(machine).capitalize()}\n\n{machine_line(machine)}\n"]
    reached = outcomes(measurements, TARGETS)
    if reached:
        parts.append(f"### Targets\n\n{target_table(reached)}\n")
        missed = missed_table(measurements, reached)
        if missed is not None:
            parts.append(f"{missed}\n")
    for op, mode in dict.fromkeys((m.op, m.mode) for m in measurements):
        cells = [m for m in measurements if (m.op, m.mode) == (op, mode)]
        parts.append(f"### {_SECTIONS[op]}: {mode}\n\n{section_table(cells)}\n")
    return "\n".join(parts)


def text(runs: Sequence[Run], facts: Mapping[str, str | int], command: str) -> str:
    """docs/benchmarks.md."""
    machine = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    slower = "\n".join(_losses(runs) or ["None."])
    return (
        f"# Benchmarks\n\nWritten by `{command}`.\n\n{_INTRODUCTION}\n{machine}\n\n"
        + "\n".join(map(_run_text, runs))
        + f"\n## Where a rival is faster\n\n{slower}\n"
    )


def _numbers(measurement: Measurement) -> dict[str, object]:
    fields = asdict(measurement)
    del fields["times"], fields["peaks"]
    return {
        **fields,
        "peak": measurement.peak,
        "rounds": {name: len(values) for name, values in measurement.times.items()},
        "medians": measurement.medians,
        "spreads": measurement.spreads,
    }


def write(runs: Sequence[Run], facts: Mapping[str, str | int], command: str, folder: Path) -> None:
    """Write benchmarks.md, benchmarks.json and speed.svg."""
    write_text(folder / "benchmarks.md", text(runs, facts, command))
    numbers = {
        "environment": dict(facts),
        "command": command,
        "unit": "seconds per call",
        "machines": [asdict(machine) for machine, _ in runs],
        "measurements": [_numbers(m) for _, measurements in runs for m in measurements],
    }
    write_text(folder / "benchmarks.json", json.dumps(numbers, indent=1) + "\n")
    draw(runs[0][1], facts, folder / "speed.svg")
