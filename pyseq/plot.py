# SPDX-License-Identifier: Apache-2.0
"""Pictures of attention weights, by matplotlib (extra ``train``)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from .errors import require

# Tried in this order for labels; matplotlib's own font has no Chinese, Japanese, Korean.
_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Arial Unicode MS",
    "Droid Sans Fallback",
)


def save_heatmap(
    path: str | Path,
    weights: Tensor,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
) -> None:
    """Write attention weights as a PNG: target tokens downwards, source tokens across.

    Args:
        path: the file.
        weights: (T, S) attention weights, 0 to 1. Without any (T or S is 0) the picture has
            labels and title only.
        rows: T labels, the target tokens.
        columns: S labels, the source tokens.
        title: written above.

    Raises:
        ValueError: the labels do not go with the weights.
        MissingExtraError: matplotlib is not installed.
    """
    if weights.dim() != 2 or tuple(weights.shape) != (len(rows), len(columns)):
        raise ValueError(
            f"weights must be (rows, columns) = ({len(rows)}, {len(columns)}), "
            f"got {tuple(weights.shape)}"
        )
    figure_module = require("matplotlib.figure", extra="train")
    manager = require("matplotlib.font_manager", extra="train").fontManager
    installed = {font.name for font in manager.ttflist}
    fonts = [name for name in _FONTS if name in installed]
    # A figure made this way draws with Agg and leaves pyplot's global state alone.
    figure = figure_module.Figure(
        figsize=(2 + 0.35 * max(1, len(columns)), 1.5 + 0.35 * max(1, len(rows))),
        layout="constrained",
    )
    axes = figure.add_subplot()
    if weights.numel() > 0:
        image = axes.imshow(weights.detach().cpu().tolist(), vmin=0, vmax=1, cmap="viridis")
        figure.colorbar(image, label="attention weight")
    else:
        axes.set_xlim(-0.5, max(1, len(columns)) - 0.5)
    # $ would begin a formula.
    axes.set_xticks(range(len(columns)), [c.replace("$", r"\$") for c in columns], family=fonts)
    axes.set_yticks(range(len(rows)), [r.replace("$", r"\$") for r in rows], family=fonts)
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", rotation=90 if max(map(len, columns), default=0) > 2 else 0)
    axes.set_title(title.replace("$", r"\$"), family=fonts)
    with warnings.catch_warnings():
        # Without a font for its script a label shows as a box; one picture need not say
        # so once for every character.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, dpi=100, format="png")
