# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.metrics: edit distance, error rates, BLEU and chrF."""

from __future__ import annotations

import sys

import pytest

from pyseq.errors import MissingExtraError
from pyseq.metrics import (
    edit_distance,
    error_rates,
    is_spans,
    label_scores,
    span_scores,
    spans,
    text_scores,
)


@pytest.mark.parametrize(
    ("hypothesis", "reference", "distance"),
    [
        ([], [], 0),
        (["a"], [], 1),
        (["HH", "AH", "L"], ["HH", "EH", "L", "OW"], 2),
        (list("kitten"), list("sitting"), 3),
    ],
)
def test_edit_distance(hypothesis: list[str], reference: list[str], distance: int) -> None:
    assert edit_distance(hypothesis, reference) == distance
    assert edit_distance(reference, hypothesis) == distance


def test_error_rates_use_the_closest_reference() -> None:
    rates = error_rates(
        [["a", "b"], ["c"], ["x", "y", "z"]],
        [[["q"], ["a", "b"]], [["c", "d"]], [["x", "y", "z", "z"], ["x", "y"]]],
    )
    # 0 edits of 2; 1 of 2; 1 of 4, the longer of two equally close references.
    assert rates.token == pytest.approx(2 / 8)
    assert rates.line == pytest.approx(2 / 3)
    assert rates.lines == 3


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [([], [], "got 0 and 0"), ([["a"]], [], "got 0 and 1"), ([["a"]], [[]], "at least one refer")],
)
def test_error_rates_refuse(hypotheses: list, references: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        error_rates(hypotheses, references)


def test_text_scores() -> None:
    lines = ["the cat sat on the mat today", "dogs bark at night and sleep by day"]
    scores = text_scores(lines, [["no", lines[0]], [lines[1]]])
    assert scores.bleu == pytest.approx(100)
    assert scores.chrf == pytest.approx(100)
    assert "tok:13a" in scores.bleu_signature
    worse = text_scores(["a cat sat on a mat today", lines[1]], [[lines[0]], [lines[1]]])
    assert 0 < worse.bleu < 100
    assert 0 < worse.chrf < 100


def test_text_scores_by_character() -> None:
    assert text_scores(["我喜欢喝绿茶"], [["我喜欢喝绿茶"]], tokenize="char").bleu == pytest.approx(
        100
    )


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(MissingExtraError, match=r"rapidfuzz .*pip install 'pyseq-torch\[train\]'"):
        edit_distance(["a"], ["b"])


def test_label_scores() -> None:
    scores = label_scores(["ABA", "C", ""], ["ABB", "A", ""])
    assert scores.lines == 3
    assert scores.accuracy == 2 / 4
    assert scores.line_accuracy == 1 / 3
    assert list(scores.labels) == ["A", "B", "C"]
    assert scores.labels["A"] == (1 / 2, 1 / 2, 1 / 2, 2)
    assert scores.labels["B"] == (1, 1 / 2, 2 / 3, 2)
    assert scores.labels["C"] == (0, 0, 0, 0)
    assert scores.macro_f1 == pytest.approx((1 / 2 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("predicted", "expected", "message"),
    [
        ([], [], "at least one label, got 0 and 0"),
        ([""], [""], "at least one label"),
        (["A"], ["A", "B"], "as many lines .* got 2 and 1"),
        (["A", "BB"], ["A", "B"], "line 2: expected 1 labels, got 2"),
    ],
)
def test_label_scores_need_as_many_labels(
    predicted: list[str], expected: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        label_scores(predicted, expected)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ("", set()),
        ("O O", set()),
        ("B-a I-a O B-b", {(0, 2, "a"), (3, 4, "b")}),
        ("B-a B-a I-a", {(0, 1, "a"), (1, 3, "a")}),
        ("I-a I-a I-b O I-a", {(0, 2, "a"), (2, 3, "b"), (4, 5, "a")}),
        ("B-a I-b B-b-c I-b-c", {(0, 1, "a"), (1, 2, "b"), (2, 4, "b-c")}),
    ],
)
def test_spans(labels: str, found: set[tuple[int, int, str]]) -> None:
    assert spans(labels.split()) == found


def test_span_scores_want_whole_spans() -> None:
    expected = [["B-a", "I-a", "O", "B-b"], ["O"], ["B-a"]]
    predicted = [["B-a", "O", "O", "B-b"], ["B-a"], ["O"]]
    assert span_scores(predicted, expected) == (1 / 3, 1 / 3, 1 / 3, 3)
    assert span_scores(expected, expected) == (1, 1, 1, 3)
    assert span_scores([["O"]], [["O"]]) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="line 2: expected 1 labels, got 2"):
        span_scores([["O"], ["O", "O"]], [["O"], ["O"]])


def test_which_labels_mark_spans() -> None:
    assert is_spans(["O", "B-a", "I-a"])
    assert is_spans(["B-a"])
    assert not is_spans(["O"])
    assert not is_spans(["O", "B-a", "NOUN"])
