# SPDX-License-Identifier: Apache-2.0
"""The chart of the quality page: errors by the length of the source."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .files import replaced

_COLOURS = ("#c44e52", "#4c72b0", "#55a868")


class Curve(NamedTuple):
    """One line of the chart."""

    name: str
    lengths: Sequence[float]
    errors: Sequence[Sequence[float]]  # at each length one of every seed, shares of 1


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Draw the means over seeds, and a band from the lowest to the highest.

    Args:
        curves: at most as many as there are colours, three.
        path: of the file, an SVG.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    with pyplot.rc_context({"font.size": 10, "svg.hashsalt": "pyseq", "svg.fonttype": "path"}):
        figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
        for curve, colour in zip(curves, _COLOURS, strict=False):
            means = [statistics.mean(errors) for errors in curve.errors]
            axes.plot(curve.lengths, means, "o-", color=colour, markersize=4, label=curve.name)
            axes.fill_between(
                curve.lengths,
                [min(errors) for errors in curve.errors],
                [max(errors) for errors in curve.errors],
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("letters of the source")
        axes.set_ylabel("errors in tokens")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        with replaced(path) as fresh:
            figure.savefig(fresh, format="svg", metadata={"Date": None})
        pyplot.close(figure)
