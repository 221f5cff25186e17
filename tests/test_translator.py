# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.translator: text in, text out, whatever the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyseq import checkpoint
from pyseq.errors import CheckpointError
from pyseq.seq2seq import Seq2Seq
from pyseq.text import Vocab
from pyseq.translator import Translator


@pytest.fixture
def translator() -> Translator:
    """Untrained, in double precision so that batches make no difference that shows."""
    model = Seq2Seq(4 + 5, 4 + 3, embedding_size=8, hidden_size=12).double()
    return Translator(model, Vocab("abcde"), Vocab("xyz"), target_tokens="space", max_length=7)


def test_lines_keep_their_order_and_do_not_depend_on_the_batch(translator: Translator) -> None:
    lines = ["abc", "", "e", "abcdeabcde", "  ", "ba"]
    whole = translator.translate(lines)
    single = [translator.translate([line])[0] for line in lines]
    in_twos = translator.translate(lines, batch_size=2)
    assert [r.text for r in whole] == [r.text for r in single] == [r.text for r in in_twos]
    assert [r.source_tokens for r in whole] == [list(line.strip()) for line in lines]
    for one, other in zip(whole, single, strict=True):
        assert one.score == pytest.approx(other.score)
    assert translator("abc") == whole[0].text
    assert translator.translate([]) == []


def test_blank_lines_give_empty_outputs(translator: Translator) -> None:
    (result,) = translator.translate([" \t "])
    assert (result.text, result.tokens, result.weights) == ("", [], None)


def test_weights_have_a_column_for_each_token_and_the_end(translator: Translator) -> None:
    for result in translator.translate(["ab", "abcde"]):
        assert result.weights is not None
        assert result.weights.shape == (len(result.tokens), len(result.source_tokens) + 1)
        sums = result.weights.sum(1)
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_lengths_are_limited(translator: Translator) -> None:
    # Without training it rambles, so the limits show.
    assert all(len(r.tokens) <= 7 for r in translator.translate(["abc", "de"]))
    assert all(len(r.tokens) <= 2 for r in translator.translate(["abc", "de"], max_length=2))
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        Translator(translator.model, Vocab("abcde"), Vocab("xyz"), max_length=0)


def test_beam_scores_are_no_worse(translator: Translator) -> None:
    greedy = translator.translate(["abc"], max_length=3)[0]
    beam = translator.translate(["abc"], max_length=3, beam_size=50)[0]
    assert beam.score >= greedy.score - 1e-12


def test_unknown_symbols(translator: Translator) -> None:
    assert translator.unknown_symbols("abß!") == ["ß", "!"]
    assert isinstance(translator("ß"), str)


def test_round_trip(translator: Translator, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="saving needs the extra 'train'")
    translator.save(tmp_path)
    loaded = Translator.load(tmp_path)
    assert loaded.translate(["abc"])[0].text == translator("abc")
    assert loaded.max_length == 7
    assert (loaded.source_tokenizer.name, loaded.target_tokenizer.name) == ("char", "space")
    checkpoint.save(tmp_path, translator.model)
    with pytest.raises(CheckpointError, match="without its vocabularies"):
        Translator.load(tmp_path)
