# SPDX-License-Identifier: Apache-2.0
"""Measures every workload, prints the ratios, and writes docs/benchmarks.* and the chart.

All implementations of a workload take turns in one process, so that a machine that slows
down slows all of them. ``python benchmarks/report.py --help`` lists the options.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from workloads import IMPLEMENTATIONS, Implementation, Workload, check, environment, workloads

DOCS = Path(__file__).resolve().parent.parent / "docs"

#: A timed run is repeated inside the clock until it takes this long, in seconds: the clock
#: and the call around it then weigh less than a thousandth.
SHORTEST = 1e-3
#: Every implementation runs at least so often, however long it takes.
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Measurement:
    """The times of one workload, in seconds per call."""

    op: str
    shape: str
    mode: str
    tokens: int
    rounds: int
    medians: dict[str, float]  # by implementation
    spreads: dict[str, float]  # half the distance between the quartiles

    @property
    def rivals(self) -> list[str]:
        """The other implementations."""
        return [name for name in self.medians if name != "pyseq"]

    def ratio(self, rival: str) -> float:
        """How many times faster pyseq is than ``rival``."""
        return self.medians[rival] / self.medians["pyseq"]


@dataclass(frozen=True)
class Target:
    """A speed to reach: pyseq so many times as fast as a rival."""

    op: str
    shape: str
    rival: str
    factor: float


#: Stated for training, float32 and two threads.
TARGETS = (
    Target("decode", "lstm-general-B16-H256-T30-S30", "reference", 3),
    Target("decode", "lstm-general-B1-H256-T30-S30", "reference", 8),
    Target("scan", "gru-B16-H256-T50", "torch", 2),
)


def measure(workload: Workload, seconds: float) -> Measurement:
    """Check the implementations against the reference, then time them in turns.

    Args:
        workload: what to measure.
        seconds: how long, all implementations together, after warming up.
    """
    implementations = workload.prepare()
    expected = implementations["reference"]()
    repeats = {}
    for name, run in implementations.items():
        check(run(), expected)
        repeats[name] = math.ceil(SHORTEST / max(_seconds(run, 1), 1e-7))
    times: dict[str, list[float]] = {name: [] for name in implementations}
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(times["pyseq"]) < FEWEST_ROUNDS or time.perf_counter() < end:
            for name, run in implementations.items():
                times[name].append(_seconds(run, repeats[name]))
    finally:
        gc.enable()
    return Measurement(
        workload.op,
        workload.shape,
        workload.mode,
        workload.tokens,
        len(times["pyseq"]),
        {name: statistics.median(values) for name, values in times.items()},
        {name: _spread(values) for name, values in times.items()},
    )


def _seconds(run: Implementation, repeats: int) -> float:
    """Seconds per call. On the CPU a call returns when its result is there."""
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def _spread(values: Sequence[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


# What is printed and written


def _milliseconds(measurement: Measurement, name: str) -> str:
    if name not in measurement.medians:
        return ""
    median = measurement.medians[name]
    return f"{median * 1e3:#.3g} ±{measurement.spreads[name] / median:4.0%}"


def _ratio(measurement: Measurement, rival: str) -> str:
    return f"{measurement.ratio(rival):.2f}" if rival in measurement.medians else ""


HEADER = (
    "shape",
    *(f"{name}, ms" for name in IMPLEMENTATIONS),
    *(f"{name} / pyseq" for name in IMPLEMENTATIONS[1:]),
    "tokens/s",
)


def _row(measurement: Measurement) -> tuple[str, ...]:
    return (
        measurement.shape,
        *(_milliseconds(measurement, name) for name in IMPLEMENTATIONS),
        *(_ratio(measurement, name) for name in IMPLEMENTATIONS[1:]),
        f"{measurement.tokens / measurement.medians['pyseq']:,.0f}",
    )


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


def ratio_tables(measurements: Sequence[Measurement]) -> str:
    """One table for each operator and mode."""
    kinds = dict.fromkeys((m.op, m.mode) for m in measurements)
    parts = []
    for op, mode in kinds:
        rows = [_row(m) for m in measurements if (m.op, m.mode) == (op, mode)]
        parts.append(f"### {op}, {mode}\n\n{table(HEADER, rows)}\n")
    return "\n".join(parts)


def target_table(measurements: Sequence[Measurement]) -> str:
    """Whether each target that was measured is reached."""
    found = {(m.op, m.shape): m for m in measurements if m.mode == "training"}
    rows = []
    for target in TARGETS:
        measurement = found.get((target.op, target.shape))
        if measurement is not None:
            ratio = measurement.ratio(target.rival)
            rows.append(
                (
                    f"{target.op} {target.shape}",
                    f"{target.factor:g} x {target.rival}",
                    f"{ratio:.2f}",
                    "pass" if ratio >= target.factor else "FAIL",
                )
            )
    return table(("training", "at least", "measured", "result"), rows)


def losses(measurements: Sequence[Measurement]) -> list[str]:
    """The cases in which a rival is faster, as lines of a list."""
    return [
        f"- {m.op} {m.mode} {m.shape}: {rival} is {1 / m.ratio(rival):.2f} times as fast"
        for m in measurements
        for rival in m.rivals
        if m.ratio(rival) < 1
    ]


def document(
    measurements: Sequence[Measurement], facts: Mapping[str, str | int], command: str
) -> str:
    """docs/benchmarks.md."""
    slower = losses(measurements) or ["None."]
    machine = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return f"""# Benchmarks

Written by `{command}`. Median of interleaved rounds in one process, after a warm-up and
after comparing every result, gradients included, with the reference; ± is half the distance
between the quartiles, as a part of the median. A ratio above 1 means that pyseq is faster.
`torch` is the same layer of `torch.nn`, or `scaled_dot_product_attention`; `reference` is
`pyseq.reference`, the operator written in plain torch. Tokens are time steps times rows.

{machine}

## Speeds to reach

{target_table(measurements)}

## All cases

{ratio_tables(measurements)}
## Where a rival is faster

{chr(10).join(slower)}
"""


def draw(measurements: Sequence[Measurement], facts: Mapping[str, str | int], path: Path) -> None:
    """Draw, as an SVG, how many times as fast training is: all workloads, torch's rival first."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    shown = [m for m in measurements if m.mode == "training"]
    # torch's own operator where there is one: who has it would not write a loop.
    ratios = [m.ratio("torch" if "torch" in m.medians else "reference") for m in shown]
    names = [f"{m.op} {_label(m.shape)}" for m in shown]
    colours = ["#1f6feb" if "torch" in m.medians else "#2da44e" for m in shown]
    with pyplot.rc_context({"font.size": 10, "svg.hashsalt": "pyseq", "svg.fonttype": "path"}):
        figure, axes = pyplot.subplots(figsize=(8, 0.28 * len(shown) + 1.5), layout="constrained")
        bars = axes.barh(names, ratios, color=colours, height=0.7)
        axes.bar_label(bars, [f"{ratio:.1f}x" for ratio in ratios], padding=3)
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xlim(0, max(ratios) * 1.12)
        axes.set_xlabel("times as fast, forward and backward")
        axes.set_title(
            f"pyseq against torch, {facts['threads']} threads, {facts['tier']}, {facts['dtype']}"
        )
        axes.spines[["top", "right"]].set_visible(False)
        handles = [
            pyplot.Rectangle((0, 0), 1, 1, color="#1f6feb"),
            pyplot.Rectangle((0, 0), 1, 1, color="#2da44e"),
        ]
        labels = ["against torch's own operator", "against the reference in plain torch"]
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _label(shape: str) -> str:
    return shape.replace("-", " ")


def write(
    measurements: Sequence[Measurement],
    facts: Mapping[str, str | int],
    command: str,
    folder: Path,
) -> None:
    """Write the document, its numbers and the chart."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks.md").write_text(document(measurements, facts, command), encoding="utf-8")
    numbers = {
        "environment": dict(facts),
        "command": command,
        "unit": "seconds per call",
        "measurements": [asdict(m) for m in measurements],
    }
    (folder / "benchmarks.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    draw(measurements, facts, folder / "speed.svg")


def main() -> None:
    """Measure, print and write, as the command line says."""
    parser = argparse.ArgumentParser(description="measure pyseq against torch and the reference")
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the time, and nothing is written"
    )
    parser.add_argument("--only", default="", help="a regular expression that names must hold")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each workload (default: 4)")
    parser.add_argument("--threads", type=int, help="of torch (default: all cores)")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder (default: docs)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    chosen = [workload for workload in workloads() if re.search(options.only, workload.group)]
    if not chosen:
        parser.error(f"no workload's name holds {options.only!r}")
    facts = {"date": datetime.date.today().isoformat(), **environment()}
    if float(facts["load"]) > 1:
        print(f"Beware: the load is {facts['load']}. What else runs here blurs the times.\n")
    measurements = []
    for workload in chosen:
        measurement = measure(workload, options.seconds / (10 if options.quick else 1))
        ratios = ", ".join(f"{m} {measurement.ratio(m):.2f}x" for m in measurement.rivals)
        milliseconds = measurement.medians["pyseq"] * 1e3
        print(f"{workload.group:<58} {milliseconds:9.3f} ms  {ratios}", flush=True)
        measurements.append(measurement)

    print(f"\n{ratio_tables(measurements)}\n{target_table(measurements)}")
    if options.quick or options.only:
        print("\nNothing was written: that takes a full run, without --quick and --only.")
        return
    write(measurements, facts, "make bench", options.output)
    print(f"\nWrote benchmarks.md, benchmarks.json and speed.svg to {options.output}.")


if __name__ == "__main__":
    main()
