# SPDX-License-Identifier: Apache-2.0
"""The chart of the README: how many times as fast as each rival, over all cells of an operator."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from .measure import Measurement
from .workloads import ImplementationName

_COLOURS: dict[ImplementationName, str] = {
    "torch": "#1f6feb",
    "onnx": "#bf8700",
    "compiled": "#8250df",
    "reference": "#2da44e",
}
_LABELS: dict[ImplementationName, str] = {
    "torch": "torch.nn",
    "onnx": "ONNX Runtime",
    "compiled": "torch.compile",
    "reference": "plain torch",
}


def draw(measurements: Sequence[Measurement], facts: Mapping[str, str | int], path: Path) -> None:
    """Draw, as an SVG, the geometric mean and the range of the ratios of each group of cells.

    Args:
        measurements: of one number of threads.
        facts: what :func:`machine.environment` gave.
        path: of the file.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    groups: dict[str, list[Measurement]] = {}
    for m in measurements:
        groups.setdefault(f"{m.op} {m.kind.removesuffix('-general')}, {m.mode}", []).append(m)
    with pyplot.rc_context({"font.size": 10, "svg.hashsalt": "pyseq", "svg.fonttype": "path"}):
        height = 0.3 * len(groups) + 1.6
        figure, axes = pyplot.subplots(figsize=(8, height), layout="constrained")
        shown: dict[ImplementationName, Line2D] = {}
        for row, cells in enumerate(groups.values()):
            rivals = [n for n in _COLOURS if any(n in m.medians for m in cells)]
            for index, rival in enumerate(rivals):
                ratios = [m.ratio(rival) for m in cells if rival in m.medians]
                y = row + 0.22 * (index - (len(rivals) - 1) / 2)
                axes.plot([min(ratios), max(ratios)], [y, y], color=_COLOURS[rival], alpha=0.4)
                mean = statistics.geometric_mean(ratios)
                shown[rival] = axes.plot(mean, y, "o", color=_COLOURS[rival], markersize=5)[0]
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(range(len(groups)), list(groups))
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set_xlabel("times as fast: geometric mean, and from the lowest to the highest cell")
        threads = measurements[0].threads
        axes.set_title(f"pyseq on {threads} threads, {facts['tier']}, {facts['dtype']}, against")
        axes.spines[["top", "right"]].set_visible(False)
        order = [rival for rival in _COLOURS if rival in shown]
        figure.legend(
            [shown[rival] for rival in order],
            [_LABELS[rival] for rival in order],
            loc="outside lower center",
            ncols=len(order),
            frameon=False,
        )
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
