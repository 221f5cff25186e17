# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.text: tokenisers, vocabularies, files of pairs, batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyseq.errors import DataError
from pyseq.text import (
    BucketedBatches,
    Examples,
    Pair,
    Tokenizer,
    Vocab,
    encode_sources,
    hold_out,
    make_pair,
    ordered_batches,
    read_pairs,
    tokenise_pairs,
)
from pyseq.types import PAD, START, STOP, UNK


@pytest.mark.parametrize(
    ("name", "text", "tokens"),
    [
        ("char", " 早上好 ", ["早", "上", "好"]),
        ("char", "a b", ["a", " ", "b"]),
        ("char", "e\u0301", ["é"]),
        ("space", " HH  AH0\tL ", ["HH", "AH0", "L"]),
        ("word", "Don't stop, it's 3.14!", ["Don't", "stop", ",", "it's", "3.14", "!"]),
        ("word", "well-known - 'quoted'", ["well-known", "-", "'", "quoted", "'"]),
        ("word", "नमस्ते दुनिया।", ["नमस्ते", "दुनिया", "।"]),
        ("word", "end.", ["end", "."]),
        ("word", "1,000.", ["1,000", "."]),
        ("word", "", []),
        ("line", " file 7 ", ["file 7"]),
        ("line", " ", []),
    ],
)
def test_tokenizer_splits(name: str, text: str, tokens: list[str]) -> None:
    assert Tokenizer(name).split(text) == tokens


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("char", "a b c"),
        ("space", "HH AH L OW"),
        ("line", "file 7"),
        ("word", "Well, (don't) say so: 3.14 is not 22/7!".replace("/", " ")),
    ],
)
def test_tokenizer_joins_what_it_split(name: str, text: str) -> None:
    tokenizer = Tokenizer(name)
    assert tokenizer.join(tokenizer.split(text)) == text


def test_tokenizer_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match="one of char, space, word, line, got 'bpe'"):
        Tokenizer("bpe")


def test_vocab_ids_and_order() -> None:
    vocab = Vocab.build([["b", "a", "b"], ["c", "a", "b"]])
    assert vocab.symbols == ("<pad>", "<start>", "<stop>", "<unk>", "b", "a", "c")
    assert vocab.encode(["a", "?", "b"]) == [5, UNK, 4]
    assert vocab.decode([START, 5, UNK, PAD, 4, STOP, 6]) == ["a", "<unk>", "b"]
    assert len(vocab) == 7
    assert "a" in vocab
    assert "?" not in vocab


def test_vocab_limits() -> None:
    lines = [["b", "a", "b"], ["c", "a", "b"]]
    assert Vocab.build(lines, min_count=2).symbols[4:] == ("b", "a")
    assert Vocab.build(lines, max_size=5).symbols[4:] == ("b",)


def test_reserved_names_in_text_are_unknown() -> None:
    vocab = Vocab.build([["<stop>", "a", "<pad>"]])
    assert vocab.encode(["<stop>", "<pad>", "<start>", "a"]) == [UNK, UNK, UNK, 4]


def test_vocab_json_round_trip() -> None:
    vocab = Vocab.build([["早", '"', "\\", "\u2028", "'"]])
    assert Vocab.from_json(vocab.to_json()) == vocab
    for text in ("[]", '{"symbols": 3}', '{"symbols": ["a", "a"]}', '{"symbols": [1]}', "{"):
        with pytest.raises(ValueError):  # noqa: PT011 (JSON's own message or ours)
            Vocab.from_json(text)


def test_read_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_bytes("\ufeffa b\tx\tattribution\r\n\n 早 \ty\u2028z\n".encode())
    found = read_pairs(path)
    assert [pair[:3] for pair in found.pairs] == [("a b", "x", 1), ("早", "y\u2028z", 3)]
    assert [pair.columns for pair in found.pairs] == [("attribution",), ()]
    assert found.skipped == []
    pairs = tokenise_pairs(found.pairs, source=Tokenizer("space"), target=Tokenizer("char"))
    assert pairs[0] == Pair(["a", "b"], ["x"], 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"no tab here", ":2: no tab between source and target"),
        (b"\tx", ":2: the source is empty"),
        (b"x\t  ", ":2: the target is empty"),
        (b"ab\xff\tx", r":2: not valid UTF-8 \(byte 0xff at column 3\)"),
    ],
    ids=["tab", "source", "target", "utf8"],
)
def test_bad_lines(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_bytes(b"a\tb\n" + line + b"\nc\td\n")
    with pytest.raises(DataError, match=message):
        read_pairs(path)
    found = read_pairs(path, skip_bad_lines=True)
    assert [pair.source for pair in found.pairs] == ["a", "c"]
    assert len(found.skipped) == 1
    assert f"{path}:2" in found.skipped[0]


def test_files_without_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_bytes(b"\n")
    with pytest.raises(DataError, match=r"no pairs in this file$"):
        read_pairs(path)
    path.write_bytes(b"x\n")
    with pytest.raises(DataError, match="only bad lines"):
        read_pairs(path, skip_bad_lines=True)
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path / "missing.tsv")


def test_make_pair_refuses_empty_sides() -> None:
    with pytest.raises(DataError, match="pairs:7: the target is empty"):
        make_pair("a", " ", 7, name="pairs")


def test_hold_out_keeps_sources_together() -> None:
    pairs = [Pair([str(i % 20)], [str(i)], i) for i in range(60)]
    train, held = hold_out(pairs, 0.25, seed=3)
    assert len(held) == 15
    assert sorted(train + held, key=lambda pair: pair.line) == pairs
    assert not {p.source[0] for p in train} & {p.source[0] for p in held}
    assert hold_out(pairs, 0.25, seed=3) == (train, held)
    assert hold_out(pairs, 0.25, seed=4) != (train, held)
    assert hold_out(pairs, 0.0, seed=3) == (pairs, [])


def examples(count: int = 50) -> Examples:
    """Examples whose source tells their number and whose lengths vary."""
    return Examples(
        [[4 + i, *[4] * (i % 7)] for i in range(count)],
        [[4] * (1 + i % 5) for i in range(count)],
        list(range(1, count + 1)),
        "examples",
    )


def test_collate_pads_and_shifts() -> None:
    data = Examples([[4], [5, 6]], [[7, 8], [9]], [1, 2], "examples")
    batch = data.collate([1, 0])
    assert batch.source.tolist() == [[5, 6, STOP], [4, STOP, PAD]]
    assert batch.source_lengths.tolist() == [3, 2]
    assert batch.target_in.tolist() == [[START, 9, STOP], [START, 7, 8]]
    assert batch.target_out.tolist() == [[9, STOP, PAD], [7, 8, STOP]]
    assert batch.lines == [2, 1]


def test_encode_sources_ends_with_stop() -> None:
    source, lengths = encode_sources(Vocab(["a"]), [["a", "b"], []])
    assert source.tolist() == [[4, UNK, STOP], [STOP, PAD, PAD]]
    assert lengths.tolist() == [3, 1]


def test_fingerprint_tells_data_apart() -> None:
    assert examples().fingerprint() == examples().fingerprint()
    assert examples().fingerprint() != examples(49).fingerprint()


def test_batches_hold_each_example_once_an_epoch() -> None:
    batches = BucketedBatches(examples(), 8, seed=1)
    seen = [line for batch in batches for line in batch.lines]
    assert sorted(seen) == list(range(1, 51))
    assert len(batches) == 7
    batches.next_epoch()
    again = [line for batch in batches for line in batch.lines]
    assert sorted(again) == sorted(seen)
    assert again != seen


def test_batches_are_bucketed() -> None:
    padding = sum(
        int((batch.target_out == PAD).sum()) for batch in BucketedBatches(examples(), 5, seed=1)
    )
    assert padding == 0  # five target lengths, ten examples of each


def test_batches_go_on_from_a_saved_place() -> None:
    batches = BucketedBatches(examples(), 8, seed=1)
    list(batches)
    batches.next_epoch()
    iterator = iter(batches)
    for _ in range(3):
        next(iterator)
    generator_state, position = batches.state()
    rest = [batch.lines for batch in batches]
    batches.next_epoch()
    following = [batch.lines for batch in batches]

    other = BucketedBatches(examples(), 8, seed=99)
    other.restore(generator_state, position)
    assert [batch.lines for batch in other] == rest
    other.next_epoch()
    assert [batch.lines for batch in other] == following


def test_batches_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    list(BucketedBatches(examples(), 8, seed=1))
    assert torch.equal(before, torch.get_rng_state())


def test_batches_need_examples() -> None:
    with pytest.raises(DataError, match="no pairs to train on"):
        BucketedBatches(Examples([], [], [], "nothing"), 8, seed=1)


def test_ordered_batches() -> None:
    lines = [line for batch in ordered_batches(examples(), 8) for line in batch.lines]
    assert sorted(lines) == list(range(1, 51))
    assert lines[0] == 1
