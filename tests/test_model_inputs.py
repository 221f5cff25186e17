# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.seq2seq.inputs: tokens that are none are named, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pyseq
from pyseq.scheduled import InverseSigmoid, Linear, Sampling

LENGTHS = torch.tensor([2])
START = torch.tensor([[1]])


def tokens(*ids: float) -> Tensor:
    return torch.tensor([ids])


@pytest.mark.parametrize(
    ("source", "target", "kind", "expected"),
    [
        (tokens(4, 9), START, IndexError, "source must hold ids from 0 to V - 1 = 8, got 9"),
        (tokens(-1, 4), START, IndexError, "source must hold ids from 0 to V - 1 = 8, got -1"),
        (tokens(4, 5), tokens(1, 7), IndexError, "target_in must hold ids .* = 6, got 7"),
        (tokens(4.0, 5.0), START, RuntimeError, "source must be int64, got torch.float32"),
        (tokens(4, 5), START.bool(), RuntimeError, "target_in must be int64, got torch.bool"),
        ([[4, 5]], START, TypeError, "source must be a tensor, got list of 1"),
        (tokens(4, 5), [[1]], TypeError, "target_in must be a tensor, got list of 1"),
    ],
    ids=["large", "negative", "target", "float", "bool", "list", "target-list"],
)
def test_tokens_that_are_none(
    source: Tensor, target: Tensor, kind: type[Exception], expected: str
) -> None:
    model = pyseq.Seq2Seq(9, 7, embedding_size=4, hidden_size=4)
    with pytest.raises(kind, match=expected):
        model(source, LENGTHS, target)


def test_a_search_names_them_too() -> None:
    model = pyseq.Seq2Seq(9, 7, embedding_size=4, hidden_size=4)
    with pytest.raises(IndexError, match="source must hold ids"):
        model.generate(tokens(4, 9), LENGTHS, max_length=3)


OPTIONS = pyseq.SearchOptions(max_length=3)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda model: model.generate([[4]], LENGTHS, max_length=3), "source must be a tensor"),
        (lambda model: model.search(tokens(4), [1], OPTIONS), "source_lengths must be a tensor"),
        (
            lambda model: model.search(tokens(4), LENGTHS, {"max_length": 3}),
            "must be SearchOptions",
        ),
        (lambda model: model.stream([[4]], LENGTHS, OPTIONS), "source must be a tensor"),
        (lambda model: model.stream(tokens(4), None, OPTIONS), "lengths must be a tensor"),
        (lambda model: model.stream(tokens(4), LENGTHS, 3), "must be SearchOptions, got int"),
        (
            lambda model: pyseq.search.stream(pyseq.Ensemble([model]), tokens(4), LENGTHS, 3),
            "must be SearchOptions, got int",
        ),
        (
            lambda model: model.generate(tokens(4), LENGTHS, max_length=3, target_extra=[0.0]),
            "target_extra must be a tensor",
        ),
    ],
    ids=["source", "lengths", "options", "stream", "None", "int", "ensemble", "extra"],
)
def test_a_search_names_what_is_of_another_kind(
    call: Callable[[pyseq.Seq2Seq], object], expected: str
) -> None:
    with pytest.raises(TypeError, match=expected):
        call(pyseq.Seq2Seq(9, 7, embedding_size=4, hidden_size=4))


def test_a_search_names_a_length_that_is_none() -> None:
    model = pyseq.Seq2Seq(9, 7, embedding_size=4, hidden_size=4, target_extra_size=2)
    extra: Any = {"max_length": "3", "target_extra": torch.zeros(3, 1, 2)}
    with pytest.raises(ValueError, match="max_length must be an integer, got '3'"):
        model.generate(tokens(4), LENGTHS, **extra)


def test_labels_name_them_too() -> None:
    with pytest.raises(IndexError, match="source must hold ids"):
        pyseq.Tagger(9, 3, embedding_size=4, hidden_size=4)(tokens(4, 9), LENGTHS)


MODELS: dict[str, Callable[[Tensor], object]] = {
    "search": lambda lengths: _seq2seq().generate(tokens(4, 5), lengths, max_length=3),
    "features": lambda lengths: _seq2seq(None, source_features=2)(
        torch.ones(1, 2, 2), lengths, START
    ),
    "copies": lambda lengths: _seq2seq(copy="pointer").generate(
        tokens(4, 5), lengths, max_length=3, copies=tokens(4, 5)
    ),
    "extra": lambda lengths: _seq2seq(source_extra_size=1)(
        tokens(4, 5), lengths, START, source_extra=torch.ones(2, 1, 1)
    ),
    "tagger": lambda lengths: pyseq.Tagger(9, 3, hidden_size=4)(tokens(4, 5), lengths),
    "classifier": lambda lengths: pyseq.Classifier(9, 3, hidden_size=4, pooling="max")(
        tokens(4, 5), lengths
    ),
}


def _seq2seq(source_vocab_size: int | None = 9, **options: Any) -> pyseq.Seq2Seq:
    return pyseq.Seq2Seq(source_vocab_size, 7, embedding_size=4, hidden_size=4, **options)


@pytest.mark.parametrize("model", MODELS)
def test_lengths_are_one_for_each_row(model: str) -> None:
    for wrong in (torch.tensor([2, 2]), torch.tensor([[2]]), torch.tensor(2)):
        with pytest.raises(RuntimeError, match=r"lengths must be \(B,\) = \(1,?\), got \("):
            MODELS[model](wrong)
    with pytest.raises(TypeError, match="lengths must be a tensor, got list of 1"):
        MODELS[model]([2])  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["search", "copies", "tagger", "classifier"])
def test_lengths_are_given(model: str) -> None:
    with pytest.raises(TypeError, match="lengths must be a tensor, got NoneType"):
        MODELS[model](None)  # type: ignore[arg-type]


def test_a_bias_of_nothing() -> None:
    with pytest.raises(ValueError, match="memory_bias goes with a score, got None"):
        pyseq.Seq2Seq(9, 7, hidden_size=4, score=None, input_feeding=False, memory_bias=True)


def test_schedules_are_made_of_numbers() -> None:
    for make in (lambda: Sampling("1"), lambda: Linear("1e-4"), lambda: InverseSigmoid(None)):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="must be a number, got"):
            make()


def test_text_that_is_none() -> None:
    translator = pyseq.train([("ab", "ba")], hidden_size=4, epochs=1)
    labeler = pyseq.train_labeler([("ab", "x")], task="classify", hidden_size=4, epochs=1)
    for wrong in (3, ["ab"]):
        with pytest.raises(TypeError, match="text must be a string, got"):
            translator(wrong)  # type: ignore[arg-type]
    for of_lines in (translator.search, labeler.predict):
        with pytest.raises(TypeError, match="a sequence of strings, got the string 'ab'"):
            of_lines("ab")
