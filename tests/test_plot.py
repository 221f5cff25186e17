# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.plot: heatmaps of attention weights."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch

from pyseq.errors import MissingExtraError
from pyseq.plot import save_heatmap


@pytest.mark.parametrize("columns", [["早", "上", "好", "<stop>"], ["$", "$x^$", "_", ""]])
def test_heatmap(tmp_path: Path, columns: list[str]) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'train'")
    path = tmp_path / "a.png"
    weights = torch.softmax(torch.randn(2, 4), 1).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_heatmap(path, weights, rows=["good", "morning"], columns=columns, title="$早$")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_labels_must_fit(tmp_path: Path) -> None:
    message = r"weights must be \(rows, columns\) = \(1, 4\), got \(2, 4\)"
    with pytest.raises(ValueError, match=message):
        save_heatmap(tmp_path / "a.png", torch.ones(2, 4), rows=["a"], columns=list("abcd"))


def test_missing_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib .*pip install '.\[train\]'") as raised:
        save_heatmap(tmp_path / "a.png", torch.ones(1, 1), rows=["a"], columns=["b"])
    assert "pip install 'pyseq-torch[train]'" in str(raised.value)


@pytest.mark.parametrize(("rows", "columns"), [([], ["ab", "<stop>"]), ([], ["<stop>"]), ([], [])])
def test_nothing_to_show_is_a_picture_too(
    tmp_path: Path, rows: list[str], columns: list[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'train'")
    path = tmp_path / "a.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = torch.empty(len(rows), len(columns))
        save_heatmap(path, weights, rows=rows, columns=columns, title="ab →")
    assert path.read_bytes().startswith(b"\x89PNG")
