# SPDX-License-Identifier: Apache-2.0
"""Measures every workload, prints the ratios, and writes docs/benchmarks.* and the chart.

``python -m benchmarks.report --help`` lists the options; ``--only scan-training --threads 2`` is
how to look at one group while working on it.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import document, layers, models, onnx_rival
from .machine import Machine, environment, measure_machine
from .measure import FEWEST_ROUNDS, Measurement, measure
from .targets import TARGETS, outcomes
from .workloads import IMPLEMENTATIONS, ImplementationName, Workload

PROGRAM = "python -m benchmarks.report"
DOCS = Path(__file__).resolve().parent.parent / "docs"


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="measure pyseq against its rivals")
    parser.add_argument(
        "--only",
        default="",
        metavar="PATTERN",
        help="workloads whose name holds this regular expression, such as scan-training, "
        "scan-.*-lstm-B64, decode",
    )
    parser.add_argument(
        "--threads",
        default=f"{os.cpu_count() or 1},1",
        help="numbers of threads, separated by commas (default: all cores, then one)",
    )
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="for each workload, at least (default: 1)"
    )
    parser.add_argument(
        "--passes",
        type=int,
        help="how often to go through all of it, in the same time (default: 2, and 1 for a part)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the time, at least 3 rounds"
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=IMPLEMENTATIONS[1:],
        help="leave out this rival; may be repeated (the reference still checks results)",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the workloads")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write (default: docs after a full run, nowhere after a part of one)",
    )
    return parser


def _line(measurement: Measurement) -> str:
    ratios = ", ".join(f"{name} {measurement.ratio(name):.2f}x" for name in measurement.rivals)
    milliseconds = measurement.medians["pyseq"] * 1e3
    return (
        f"{measurement.name:<52} {milliseconds:9.3f} ms {measurement.rate / 1e9:6.1f} GFLOP/s "
        f"{measurement.efficiency:4.0%} of floor  {ratios}"
    )


def _measure_all(
    chosen: Sequence[Workload], machine: Machine, options: argparse.Namespace, passes: int
) -> list[Measurement]:
    """Go through all workloads so many times: some states of a machine last for minutes."""
    print(f"\n{document.machine_line(machine)}")
    leave_out: set[ImplementationName] = set(options.without)
    if not onnx_rival.installed():
        leave_out.add("onnx")
    if machine.threads < (os.cpu_count() or 1):
        leave_out.add("compiled")  # it would be compiled anew for each number of threads
    found: dict[str, Measurement] = {}
    for number in range(passes):
        if number > 0:
            leave_out.add("compiled")
        for workload in chosen:
            measurement = measure(
                workload,
                machine,
                seconds=options.seconds / passes / (10 if options.quick else 1),
                rounds=3 if options.quick else max(2, math.ceil(FEWEST_ROUNDS / passes)),
                leave_out=leave_out,
            )
            print(_line(measurement), flush=True)
            if workload.name in found:
                measurement = found[workload.name].with_more(measurement)
            found[workload.name] = measurement
    measurements = list(found.values())
    reached = outcomes(measurements, TARGETS)
    if reached:
        print(f"\n{document.target_table(reached)}")
    return measurements


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write, as the command line says."""
    parser = _options()
    given = sys.argv[1:] if argv is None else list(argv)
    options = parser.parse_args(given)
    try:
        pattern = re.compile(options.only)
    except re.error as error:
        parser.error(f"--only must be a regular expression, got {options.only!r}: {error}")
    every = [*layers.workloads(), *models.workloads()]
    chosen = [workload for workload in every if pattern.search(workload.name)]
    if not chosen:
        parser.error(f"no workload's name holds {options.only!r}")
    if options.list:
        print("\n".join(workload.name for workload in chosen))
        return
    try:
        counts = [int(count) for count in options.threads.split(",")]
    except ValueError:
        parser.error(f"--threads must be numbers separated by commas, got {options.threads!r}")
    if min(counts) < 1:
        parser.error(f"--threads must be at least 1, got {options.threads!r}")
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds must be a positive number, got {options.seconds}")
    part = options.quick or options.only or options.without
    passes = (1 if part else 2) if options.passes is None else options.passes
    if passes < 1:
        parser.error(f"--passes must be at least 1, got {passes}")
    folder = options.output or (None if part else DOCS)
    if folder is not None:
        try:  # now, not after an hour
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--output must be a folder to write in, got {folder}: {error}")

    facts = environment()
    if float(facts["load"]) > 1:
        print(f"Beware: the load is {facts['load']}. What else runs here blurs the times.")
    begin = time.perf_counter()
    runs = []
    for threads in counts:
        torch.set_num_threads(threads)
        machine = measure_machine(threads)
        runs.append((machine, _measure_all(chosen, machine, options, passes)))
    facts["duration"] = f"{(time.perf_counter() - begin) / 60:.0f} minutes"
    if folder is None:
        print("\nNothing was written: a part of a run goes nowhere without --output.")
    else:
        command = f"{PROGRAM} {shlex.join(given)}" if given else "make bench"
        document.write(runs, facts, command, folder)


if __name__ == "__main__":
    main()
