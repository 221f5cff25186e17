# SPDX-License-Identifier: Apache-2.0
"""The chart of the README: how many times as fast as each rival, over all cells of an operator."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from .files import replaced
from .measure import Measurement
from .workloads import ImplementationName

_COLOURS: dict[ImplementationName, str] = {
    "torch": "#1f6feb",
    "onnx": "#bf8700",
    "compiled": "#8250df",
    "reference": "#2da44e",
}
_LABELS: dict[ImplementationName, str] = {
    "torch": "torch.nn, or a loop of its modules",
    "onnx": "ONNX Runtime",
    "compiled": "torch.compile",
    "reference": "plain torch",
}
#: The rows of the chart, by operator.
_ROWS = {
    "scan": "{kind} layer",
    "bidirectional": "two layers, both directions",
    "ragged": "ragged lengths",
    "stream": "one step per call",
    "cell": "one step of a cell",
    "attend": "attention, {kind}",
    "decode": "attention decoder",
    "seq2seq": "whole Seq2Seq step",
    "generate": "search, {kind}",
}


def _row(measurement: Measurement) -> str:
    kind = measurement.kind
    kind = kind.upper() if measurement.op == "scan" else kind.replace("beam5", "beam of 5")
    return f"{_ROWS[measurement.op].format(kind=kind)}, {measurement.mode}"


def _rivals(cells: Sequence[Measurement]) -> list[ImplementationName]:
    """Those to show: the reference only where torch has nothing of its own."""
    found = [rival for rival in _COLOURS if any(rival in m.medians for m in cells)]
    return [rival for rival in found if rival != "reference" or "torch" not in found]


def draw(measurements: Sequence[Measurement], facts: Mapping[str, str | int], path: Path) -> None:
    """Draw, as an SVG, the geometric mean and the range of the ratios of each row's cells.

    Args:
        measurements: of one number of threads.
        facts: what :func:`machine.environment` gave.
        path: of the file.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullLocator

    rows: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        rows.setdefault(_row(measurement), []).append(measurement)
    with pyplot.rc_context({"font.size": 10, "svg.hashsalt": "pyseq", "svg.fonttype": "path"}):
        height = 0.36 * len(rows) + 1.6
        figure, axes = pyplot.subplots(figsize=(8, height), layout="constrained")
        shown: dict[ImplementationName, Line2D] = {}
        for row, cells in enumerate(rows.values()):
            rivals = _rivals(cells)
            for index, rival in enumerate(rivals):
                ratios = [m.ratio(rival) for m in cells if rival in m.medians]
                mean, colour = statistics.geometric_mean(ratios), _COLOURS[rival]
                y = row + 0.34 * (index - (len(rivals) - 1) / 2)
                axes.plot([min(ratios), max(ratios)], [y, y], color=colour, alpha=0.4)
                shown[rival] = axes.plot(mean, y, "o", color=colour, markersize=4)[0]
                axes.annotate(
                    f"{mean:.1f}",
                    (max(ratios), y),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                    color=colour,
                )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set_xlabel("times as fast: geometric mean, and from the lowest to the highest cell")
        threads = f"{measurements[0].threads} thread{'s' if measurements[0].threads > 1 else ''}"
        axes.set_title(f"pyseq on {threads}, {facts['tier']}, {facts['dtype']}, against")
        axes.spines[["top", "right"]].set_visible(False)
        order = [rival for rival in _COLOURS if rival in shown]
        figure.legend(
            [shown[rival] for rival in order],
            [_LABELS[rival] for rival in order],
            loc="outside lower center",
            ncols=len(order),
            frameon=False,
        )
        with replaced(path) as fresh:
            figure.savefig(fresh, format="svg", metadata={"Date": None})
        pyplot.close(figure)
