# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.translator: text in, text out, whatever the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generate_cases import MODEL_KINDS

from pyseq import Ensemble, SearchOptions, checkpoint, search
from pyseq.errors import CheckpointError, DataError
from pyseq.seq2seq import Seq2Seq
from pyseq.text import Vocab
from pyseq.translator import Translator
from pyseq.types import STOP, UNK


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


def test_vocabularies_of_another_size_are_refused(translator: Translator) -> None:
    with pytest.raises(ValueError, match="source_vocab must have 9 symbols like the model, got 8"):
        Translator(translator.model, Vocab("abcd"), Vocab("xyz"))
    other = Seq2Seq(9, 8, hidden_size=4)
    with pytest.raises(ValueError, match="target_vocab must have 8 symbols like the model, got 7"):
        Translator(translator.model, Vocab("abcde"), Vocab("xyz"), others=[other])


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


def test_search_gives_many_for_each_line(translator: Translator) -> None:
    lines = ["abc", "", "edcba", "b"]
    options = SearchOptions(max_length=5, beam_size=4, n_best=3, min_length=1)
    found = translator.search(lines, options, prefix="x y", batch_size=2)
    assert [len(results) for results in found] == [3, 1, 3, 3]
    for line, results in zip(lines, found, strict=True):
        if line:
            assert all(r.text.startswith("x y") for r in results)
            assert len({r.text for r in results}) == 3
    alone = translator.search(["edcba"], options, prefix="x y")[0]
    assert [r.text for r in alone] == [r.text for r in found[2]]
    with pytest.raises(DataError, match="prefix: 'q' was not in the training data"):
        translator.search(lines, prefix="x q")
    with pytest.raises(ValueError, match="give the prefix as text"):
        translator.search(lines, SearchOptions(max_length=5, prefix=[[4]]))


def test_wrong_arguments_are_named(translator: Translator) -> None:
    wrong: list[tuple[Any, type[Exception], str]] = [
        (lambda: translator.search("ab"), TypeError, "sequence of strings, got the string 'ab'"),
        (lambda: translator.search(iter("ab")), TypeError, "sequence of strings, got str_"),
        (lambda: translator.search(["ab"], {}), TypeError, "must be SearchOptions, got dict"),
        (lambda: translator.stream("ab", 3), TypeError, "must be SearchOptions, got int"),
        (lambda: translator.search(["ab"], batch_size=0), ValueError, "batch_size must be .*got 0"),
        (lambda: translator.search(["ab"], batch_size="x"), ValueError, "batch_size must be an"),
    ]
    for call, error, match in wrong:
        with pytest.raises(error, match=match):
            call()


def test_draws_repeat_with_the_generator(translator: Translator) -> None:
    options = SearchOptions(max_length=7, sample=True, n_best=4)
    found = [
        translator.search(["abc", "de"], options, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    texts = [[r.text for results in one for r in results] for one in found]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("tokens", ["char", "space", "word"])
def test_a_stream_is_the_text_in_pieces(tokens: str) -> None:
    model = Seq2Seq(4 + 5, 4 + 4, embedding_size=8, hidden_size=12).double()
    translator = Translator(
        model, Vocab("abcde"), Vocab(["x", "y", "(", ","]), target_tokens=tokens, max_length=9
    )
    for options in (None, SearchOptions(max_length=9, min_length=4, block_ngrams=1)):
        for line in ("abc", "e", " "):
            pieces = list(translator.stream(line, options, prefix="x"))
            result = translator.search([line], options, prefix="x")[0][0]
            assert "".join(pieces) == result.text
            assert len(pieces) == len(result.tokens)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["global", *MODEL_KINDS])
def test_unknown_symbols_are_replaced_by_what_was_looked_at(name: str, reverse: bool) -> None:
    kind = MODEL_KINDS.get(name, {})
    model = Seq2Seq(4 + 5, 4 + 3, embedding_size=8, hidden_size=12, **kind).double()
    with torch.no_grad():
        model.decoder.output.bias[UNK] = 5  # so that nearly all it says is <unk>
    translator = Translator(model, Vocab("abcde"), Vocab("xyz"), reverse_source=reverse)
    options = SearchOptions(max_length=6, need_weights=False)
    plain = translator.search(["Qab", "cW"], replace(options, need_weights=True))
    found = translator.search(["Qab", "cW"], options, replace_unknown=True)
    for (before,), (after,) in zip(plain, found, strict=True):
        assert before.weights is not None
        assert "<unk>" in before.tokens
        looked_at = before.weights[:, :-1].argmax(1).tolist()
        expected = [
            before.source_tokens[place] if token == "<unk>" else token
            for token, place in zip(before.tokens, looked_at, strict=True)
        ]
        assert after.tokens == expected
        pieces = translator.stream("".join(after.source_tokens), options, replace_unknown=True)
        assert "".join(pieces) == after.text
    assert len({token for (after,) in found for token in after.tokens}) > 1
    blind = Seq2Seq(4 + 5, 4 + 3, embedding_size=8, hidden_size=12, score=None)
    with pytest.raises(ValueError, match="replace_unknown needs a model with attention"):
        Translator(blind, Vocab("abcde"), Vocab("xyz")).search(["a"], replace_unknown=True)


def test_ensembles(translator: Translator, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="saving needs the extra 'train'")
    translator.save(tmp_path / "a")
    other = Seq2Seq(4 + 5, 4 + 3, embedding_size=6, hidden_size=10, cell="gru").double()
    two = Translator(other, Vocab("abcde"), Vocab("xyz"), target_tokens="space", max_length=9)
    two.save(tmp_path / "b")
    together = Translator.load(tmp_path / "a", tmp_path / "b")
    source, lengths = torch.tensor([[4, 5, 6, STOP]]), torch.tensor([4])
    ensemble = Ensemble([translator.model, other])
    expected = search.greedy(ensemble, source, lengths, max_length=7)[0]
    result = together.translate(["abc"])[0]
    assert result.score == pytest.approx(expected.score)
    assert result.tokens == translator.target_vocab.decode(expected.tokens)
    with pytest.raises(ValueError, match="one folder holds one model: save the 2 models"):
        together.save(tmp_path / "c")

    changed = {
        "source_vocab": Translator(other, Vocab("abcdX"), Vocab("xyz"), target_tokens="space"),
        "target_vocab": Translator(other, Vocab("abcde"), Vocab("xyX"), target_tokens="space"),
        "char and space as in": Translator(other, Vocab("abcde"), Vocab("xyz")),
        "reverse_source": Translator(
            other, Vocab("abcde"), Vocab("xyz"), target_tokens="space", reverse_source=True
        ),
    }
    for match, one in changed.items():
        one.save(tmp_path / "c")
        with pytest.raises(CheckpointError, match=match):
            Translator.load(tmp_path / "a", tmp_path / "c")
