# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.labels: labels and their numbers, examples, batches."""

from __future__ import annotations

import pytest
import torch

from pyseq.errors import DataError
from pyseq.labels import LabelExamples, Labels
from pyseq.text import BucketedBatches, Pair, Vocab, ordered_batches
from pyseq.types import IGNORE, PAD, UNK

PAIRS = [
    Pair(["a", "b"], ["N", "V"], 1),
    Pair(["b"], ["V"], 2),
    Pair(["c", "a", "a"], ["N"] * 3, 4),
]
CLASSES = [pair._replace(target=["good news" if len(pair.source) > 1 else "bad"]) for pair in PAIRS]
VOCAB = Vocab("ab")


def test_labels_and_their_numbers() -> None:
    labels = Labels.build([["b", "a"], ["c", "a"]])
    assert labels.names == ("a", "b", "c")
    assert labels.encode(["c", "a"]) == [2, 0]
    assert labels.decode([2, 0]) == ["c", "a"]
    assert Labels.from_json(labels.to_json()) == labels
    assert ("b" in labels, "d" in labels, len(labels)) == (True, False, 3)
    with pytest.raises(KeyError):
        labels.encode(["d"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a"], "labels must differ, got 'a' twice"),
        (["a", ""], "a label must be a string and not empty, got ''"),
        (["a", 3], "a label must be a string and not empty, got 3"),
        ([], "there must be at least one label, got none"),
    ],
)
def test_labels_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Labels(names)


@pytest.mark.parametrize("text", ["[]", '{"labels": 3}', '{"names": []}', "{"])
def test_bad_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"labels must be a JSON object|Expecting"):
        Labels.from_json(text)


def test_a_batch_of_tags() -> None:
    labels = Labels(["N", "V"])
    examples = LabelExamples.encode(PAIRS, VOCAB, labels, name="x", per_token=True)
    batch = examples.collate([1, 2])
    assert batch.source.tolist() == [[5, PAD, PAD], [UNK, 4, 4]]
    assert batch.source_lengths.tolist() == [1, 3]
    assert batch.labels.tolist() == [[1, IGNORE, IGNORE], [0, 0, 0]]
    assert batch.counted.sum() == 4
    assert batch.lines == [2, 4]
    assert batch.to(torch.device("meta")).labels.device.type == "meta"
    assert examples.by_length([2, 0, 1]) == [1, 0, 2]
    assert [b.lines for b in ordered_batches(examples, 2)] == [[2, 1], [4]]
    seen = [line for b in BucketedBatches(examples, 2, seed=1) for line in b.lines]
    assert sorted(seen) == [1, 2, 4]


def test_a_batch_of_classes() -> None:
    labels = Labels.build(pair.target for pair in CLASSES)
    examples = LabelExamples.encode(CLASSES, VOCAB, labels, name="x", per_token=False)
    batch = examples.collate([0, 1])
    assert batch.labels.tolist() == [1, 0]
    assert batch.counted.all()


def test_fingerprints_differ() -> None:
    labels = Labels(["N", "V"])
    encoded = [
        LabelExamples.encode(pairs, VOCAB, labels, name="x", per_token=True).fingerprint()
        for pairs in (PAIRS, PAIRS[:2], [PAIRS[0]._replace(target=["V", "V"]), *PAIRS[1:]])
    ]
    assert len(set(encoded)) == 3


def test_wrong_labels_are_refused() -> None:
    labels = Labels(["N"])
    with pytest.raises(DataError, match="f:1: the label 'V' is not one of the model's 1"):
        LabelExamples.encode(PAIRS, VOCAB, labels, name="f", per_token=True)
    with pytest.raises(DataError, match="f:4: expected one label for each of its 3 tokens, got 1"):
        LabelExamples.encode(
            [PAIRS[2]._replace(target=["N"])], VOCAB, labels, name="f", per_token=True
        )
    with pytest.raises(DataError, match="f:1: expected one label, got 2"):
        LabelExamples.encode(PAIRS, VOCAB, labels, name="f", per_token=False)
