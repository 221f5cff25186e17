# SPDX-License-Identifier: Apache-2.0
"""The figures that pyseq is meant to reach, and whether a run reaches them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from .measure import Measurement
from .workloads import ImplementationName


@dataclass(frozen=True)
class Target:
    """A bound on the geometric mean of a figure over many cells, and one on its lowest."""

    title: str
    rival: str  # with whom or what the figure compares
    #: The figure of a cell, larger is better; None for cells that it is not about.
    figure: Callable[[Measurement], float | None]
    mean: float | None = None
    lowest: float | None = None
    of_times: bool = False  # whether the figure grows as the time of pyseq falls


@dataclass(frozen=True)
class Outcome:
    """What a target came to in a run."""

    target: Target
    cells: int
    mean: float
    lowest: float
    worst: str  # the shape of the lowest cell
    possible: float | None  # the mean if pyseq took no longer than the floor of each cell

    @property
    def reached(self) -> bool:
        """Whether every bound is kept."""
        return self.mean >= (self.target.mean or 0) and self.lowest >= (self.target.lowest or 0)


def outcomes(measurements: Sequence[Measurement], targets: Sequence[Target]) -> list[Outcome]:
    """Of those targets that a run, with one number of threads, has cells for."""
    found = []
    for target in targets:
        figures = {m: target.figure(m) for m in measurements}
        cells = {m: figure for m, figure in figures.items() if figure is not None}
        if cells:
            worst = min(cells, key=cells.__getitem__)
            at_floor = [figure / m.efficiency for m, figure in cells.items()]
            found.append(
                Outcome(
                    target,
                    cells=len(cells),
                    mean=geometric_mean(cells.values()),
                    lowest=cells[worst],
                    worst=f"{worst.kind} {worst.shape}",
                    possible=geometric_mean(at_floor) if target.of_times else None,
                )
            )
    return found


def by_batch(measurements: Sequence[Measurement], target: Target) -> dict[str, Outcome]:
    """The target's outcome for the cells of each batch size, by its part of the shape ("B16")."""
    batches: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        if target.figure(measurement) is not None:
            part = next(p for p in measurement.shape.split("-") if p.startswith("B"))
            batches.setdefault(part, []).append(measurement)
    return {batch: outcomes(cells, [target])[0] for batch, cells in batches.items()}


def _is(measurement: Measurement, op: str, mode: str, kind: str) -> bool:
    return (measurement.op, measurement.mode) == (op, mode) and kind in ("", measurement.kind)


def _ratio(
    op: str,
    mode: str,
    kind: str,
    rival: ImplementationName,
    mean: float | None = None,
    lowest: float | None = None,
    shape: str = "",
) -> Target:
    """So many times as fast as a rival, where it was measured."""

    def figure(measurement: Measurement) -> float | None:
        measured = _is(measurement, op, mode, kind) and rival in measurement.medians
        return measurement.ratio(rival) if measured and shape in measurement.shape else None

    title = " ".join(part for part in (op, mode, kind, shape.strip("-")) if part)
    name = _RIVALS.get((op, rival), _RIVALS["", rival])
    return Target(title, name, figure, mean, lowest, of_times=True)


#: What a rival is called beside an operator.
_RIVALS: dict[tuple[str, str], str] = {
    ("", "torch"): "torch.nn",
    ("", "onnx"): "ONNX Runtime",
    ("", "compiled"): "torch.compile",
    ("", "reference"): "reference",
    ("generate", "torch"): "loop of torch.nn",
}


def _efficiency(mode: str, lowest: float) -> Target:
    """Share of the measured peak that a large LSTM layer computes at."""

    def figure(measurement: Measurement) -> float | None:
        large = measurement.shape in ("B64-H256-T50", "B64-H512-T50")
        chosen = large and _is(measurement, "scan", mode, "lstm")
        return measurement.rate / measurement.peak if chosen else None

    title = f"scan {mode} lstm B64 H256, H512"
    return Target(title, "measured peak", figure, lowest=lowest, of_times=True)


def _memory(op: str, rival: ImplementationName, lowest: float) -> Target:
    """How many times as many bytes a rival saves for backward."""

    def figure(measurement: Measurement) -> float | None:
        measured = _is(measurement, op, "training", "") and rival in measurement.saved
        return measurement.saved[rival] / measurement.saved["pyseq"] if measured else None

    return Target(f"{op} bytes saved", _RIVALS["", rival], figure, lowest=lowest)


#: Ratios of medians of one run in float32: the mean over the cells, the lowest cell.
TARGETS = (
    _ratio("scan", "inference", "lstm", "torch", 1.6, 0.95),
    _ratio("scan", "inference", "gru", "torch", 3.5, 1.2),
    _ratio("scan", "inference", "rnn", "torch", 3.5, 1.2),
    _ratio("scan", "inference", "lstm", "onnx", 1.25, 0.95),
    _ratio("scan", "inference", "gru", "onnx", 1.6, 1.0),
    _ratio("scan", "inference", "rnn", "onnx", 3.0),
    _ratio("scan", "training", "lstm", "torch", 1.6, 1.05),
    _ratio("scan", "training", "gru", "torch", 5.0, 1.1),
    _ratio("scan", "training", "rnn", "torch", 4.0, 1.1),
    _efficiency("inference", 0.7),
    _efficiency("training", 0.6),
    _ratio("decode", "training", "", "reference", 6.0, 2.3),
    _ratio("decode", "training", "", "compiled", 2.5),
    _ratio("decode", "inference", "", "reference", 8.0),
    _ratio("generate", "inference", "greedy", "torch", 15.0, shape="B1-"),
    _ratio("generate", "inference", "beam5", "torch", 8.0, shape="B1-"),
    _ratio("seq2seq", "training", "", "reference", 2.0),
    _memory("scan", "torch", 1.0),
    _memory("decode", "reference", 2.0),
)
