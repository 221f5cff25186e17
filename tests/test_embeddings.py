# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.embeddings: every format, what is missing, what is damaged, fingerprints."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pyseq import embeddings
from pyseq.embeddings import EmbeddingsFile, fingerprint, from_matrix, read
from pyseq.errors import DataError
from pyseq.text import Vocab
from pyseq.types import PAD, START, STOP, UNK

WORDS = ["the", "of", "Paris", "naïve", "</s>", "unwanted"]
MATRIX = np.arange(18, dtype=np.float32).reshape(6, 3) / 8 - 1
VOCAB = Vocab(["of", "the", "paris", "nai\u0308ve", "nowhere"])


def glove(folder: Path) -> Path:
    path = folder / "glove.txt"
    rows = zip(WORDS, MATRIX.tolist(), strict=True)
    path.write_text("".join(f"{word} {' '.join(map(str, row))}\n" for word, row in rows))
    return path


def word2vec(folder: Path) -> Path:
    path = folder / "vectors.vec"
    # With a space at the end of each row, as the original tool writes it.
    rows = glove(folder).read_text().replace("\n", " \n")
    path.write_text(f"6 3\n{rows}")
    return path


def binary(folder: Path, end: bytes = b"\n") -> Path:
    path = folder / "vectors.bin"
    rows = zip(WORDS, MATRIX, strict=True)
    content = (word.encode() + b" " + row.tobytes() + end for word, row in rows)
    path.write_bytes(b"6 3\n" + b"".join(content))
    return path


def binary_without_line_feeds(folder: Path) -> Path:
    return binary(folder, b"")


def numpy_files(folder: Path) -> Path:
    np.save(folder / "vectors.npy", MATRIX.astype(np.float64))
    (folder / "vectors.txt").write_text("".join(f"{word}\n" for word in WORDS))
    return folder / "vectors.npy"


def compressed(folder: Path) -> Path:
    path = folder / "vectors.bin.gz"
    path.write_bytes(gzip.compress(binary(folder).read_bytes()))
    return path


Writer = Callable[[Path], Path]
WRITERS: list[Writer] = [
    glove,
    word2vec,
    binary,
    binary_without_line_feeds,
    numpy_files,
    compressed,
]


@pytest.mark.parametrize("fold_case", [False, True], ids=["as-spelled", "folded"])
@pytest.mark.parametrize("writer", WRITERS)
def test_rows_go_to_their_symbols(writer: Writer, fold_case: bool, tmp_path: Path) -> None:
    path = writer(tmp_path)
    found = read(path, VOCAB, fold_case=fold_case)
    matrix, report = found.matrix, found.report
    assert matrix.shape == (9, 3)
    assert matrix.dtype == torch.float32
    rows = torch.from_numpy(MATRIX)
    assert torch.equal(matrix[4], rows[1])
    assert torch.equal(matrix[5], rows[0])
    assert torch.equal(matrix[6], rows[2]) == fold_case
    assert torch.equal(matrix[7], rows[3])  # the other normal form of one spelling
    assert torch.equal(matrix[STOP], rows[4])
    assert not matrix[PAD].any()
    own = rows[[0, 1, 2, 3] if fold_case else [0, 1, 3]]
    torch.testing.assert_close(matrix[UNK], own.mean(0))
    folded = ("paris", "nai\u0308ve") if fold_case else ("nai\u0308ve",)
    missing = ("nowhere",) if fold_case else ("paris", "nowhere")
    assert report == (str(path), 2, folded, missing, ("<stop>",))
    assert report.words == 5
    assert f"vectors for {4 if fold_case else 3} of 5 words" in str(report)
    assert "'nowhere'" in str(report)


def test_all_formats_give_the_same_bits(tmp_path: Path) -> None:
    matrices = [read(writer(tmp_path), VOCAB).matrix for writer in WRITERS]
    matrices.append(from_matrix(WORDS, MATRIX, VOCAB).matrix)
    matrices.append(from_matrix(WORDS, torch.from_numpy(MATRIX).double(), VOCAB).matrix)
    for matrix in matrices[1:]:
        assert torch.equal(matrix, matrices[0])


def test_rows_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read(binary(tmp_path), VOCAB).matrix
    for size in (1, 2, 3, 7, 16, 17, 18):
        monkeypatch.setattr(embeddings, "_CHUNK", size)
        assert torch.equal(read(tmp_path / "vectors.bin", VOCAB).matrix, expected)


def test_missing_rows_are_drawn_from_what_the_found_ones_are_like() -> None:
    count = 2000
    words = [f"w{i}" for i in range(2 * count)]
    matrix = np.random.default_rng(1).normal([5, -3], [0.1, 2], size=(count, 2))
    found = from_matrix(words[:count], matrix, Vocab(words))
    drawn = found.matrix[4 + count :].double()
    expected = torch.from_numpy(matrix)
    torch.testing.assert_close(drawn.mean(0), expected.mean(0), atol=0.2, rtol=0)
    torch.testing.assert_close(drawn.std(0), expected.std(0), atol=0.1, rtol=0)
    assert torch.equal(found.matrix, from_matrix(words[:count], matrix, Vocab(words)).matrix)
    other = from_matrix(words[:count], matrix, Vocab(words), seed=2).matrix
    assert torch.equal(other[4 : 4 + count], found.matrix[4 : 4 + count])
    assert not torch.equal(other[4 + count :], found.matrix[4 + count :])


def test_the_own_spelling_comes_first_wherever_it_stands() -> None:
    matrix = np.eye(3, dtype=np.float32)
    vocab = Vocab(["us", "US"])
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        words = [["Us", "us", "US"][i] for i in order]
        found = from_matrix(words, matrix[order], vocab, fold_case=True).matrix
        assert torch.equal(found[4:], torch.eye(3)[1:])
    found = from_matrix(["uS", "Us"], matrix[:2], vocab, fold_case=True).matrix
    assert torch.equal(found[4:], torch.eye(3)[[0, 0]])


def test_special_symbols_of_the_file() -> None:
    words = ["a", "<s>", "<unk>", "<start>", "<pad>"]
    matrix = np.arange(1, 6, dtype=np.float32).reshape(5, 1)
    found = from_matrix(words, matrix, Vocab("a"))
    assert found.report.specials == ("<start>", "<unk>")
    assert found.matrix[[PAD, START, UNK]].flatten().tolist() == [0, 2, 3]


@pytest.mark.parametrize("text", ["a 1 2\n. . . 3 4\n", ". . . 3 4\na 1 2\n"])
def test_words_with_spaces(text: str, tmp_path: Path) -> None:
    path = tmp_path / "glove.txt"
    path.write_text(text)
    found = read(path, Vocab(["a", ". . ."]))
    assert found.matrix[4:].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("start", [b"", b"2 2\n"], ids=["glove", "word2vec"])
def test_a_byte_order_mark_and_carriage_returns_are_no_part_of_words(
    start: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "vectors.txt"
    path.write_bytes(b"\xef\xbb\xbf" + start.replace(b"\n", b"\r\n") + b"a 1 2\r\nb 3 4\r\n")
    assert read(path, Vocab("ab")).matrix[4:].tolist() == [[1, 2], [3, 4]]


def test_a_glove_file_may_begin_like_a_header(tmp_path: Path) -> None:
    path = tmp_path / "glove.txt"
    path.write_text("7 1\n8 2\n")
    assert read(path, Vocab("78"), format="glove").matrix[4:].tolist() == [[1], [2]]
    with pytest.raises(DataError, match="truncated: the first line tells of 7 words, got 1"):
        read(path, Vocab("78"))


VALUES = np.array([1, 2], dtype="<f4").tobytes()
DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.txt", b"", ":1: expected a word and its numbers, got b''"),
    "no-numbers": ("a.txt", b"\na\n", ":2: expected a word and its numbers, got b'a'"),
    "few": ("a.txt", b"b 1 2\n\na 1\n", ":3: expected a word and 2 numbers, got 1 fields"),
    "many": ("a.txt", b"b 1 2\na 1 2 3\n", ":2: expected a word and 2 numbers, got 3 fields"),
    "word": ("a.txt", b"b 1 2\na 1 x\n", ":2: a number of 'a' is none: .*x"),
    "nan": ("a.txt", b"b 1 2\na 1 nan\n", ":2: the vector of 'a' is not finite"),
    "overflow": ("a.txt", b"b 1 2\na 1 1e39\n", ":2: the vector of 'a' is not finite"),
    "twice": ("a.txt", b"a 1\nb 2\na 1\n", r":3: 'a' is there for the second time, after .*:1$"),
    "nothing": ("a.txt", b"c 1\nd 2\n", "not one word of the vocabulary .*fold_case"),
    "vec-short": ("a.vec", b"3 1\na 1\nb 2\n", "truncated: the first line tells of 3 words, got 2"),
    "vec-long": ("a.vec", b"1 1\na 1\nb 2\n", ":3: the first line tells of 1 words, but here is"),
    "vec-size": ("a.vec", b"2 2\na 1\nb 2\n", ":2: expected a word and 2 numbers, got 1 fields"),
    "vec-space": ("a.vec", b"1 1\na b 1\n", ":2: expected a word and 1 numbers, got 2 fields"),
    "vec-zero": ("a.vec", b"1 0\na\n", ":1: the first line of a word2vec file must be"),
    "vec-huge": ("a.vec", b"1 99999999999\na 1\n", ":1: the first line of a word2vec file must"),
    "vec-binary": ("a.vec", b"1 2\na " + VALUES, "is this a binary file"),
    "bin-text": ("a.bin", b"a 1 2\n", ":1: the first line of a word2vec file must be"),
    "bin-empty": ("a.bin", b"", ":1: the first line of a word2vec file must be"),
    "bin-cut": ("a.bin", b"2 2\na " + VALUES + b"\nb " + VALUES[:-1], "row 2: truncated: .* got 1"),
    "bin-rows": ("a.bin", b"3 2\na " + VALUES, "row 2: truncated: expected 3 rows, got 1"),
    "bin-more": ("a.bin", b"1 2\na " + VALUES + b"b " + VALUES, "goes on after the 1 rows"),
    "bin-word": ("a.bin", b"1 2\n " + VALUES, "row 1: the word is empty"),
    "bin-none": ("a.bin", b"1 2\n" + b"x" * 5000, "row 1: no word where one should begin"),
    "bin-nan": ("a.bin", b"1 1\na \0\0\xc0\x7f", "row 1: the vector of 'a' is not finite"),
    "gz": ("a.txt.gz", gzip.compress(b"c 1 2\n" * 50)[:-9], "damaged"),
    "not-gz": ("a.txt.gz", b"a 1 2\n", "damaged: Not a gzipped file"),
    "npy": ("a.npy", b"a 1 2\n", "not a numpy matrix"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_refused(case: str, tmp_path: Path) -> None:
    name, content, match = DAMAGED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match) as caught:
        read(tmp_path / name, Vocab("ab"))
    assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("length", range(0, 70, 3))
def test_a_truncated_binary_file_is_never_read_as_a_whole_one(length: int, tmp_path: Path) -> None:
    path = binary_without_line_feeds(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * length // 70])
    with pytest.raises(DataError):
        read(path, VOCAB)


def test_damaged_numpy_files(tmp_path: Path) -> None:
    path = numpy_files(tmp_path)
    (tmp_path / "few.txt").write_text("the\nof\n")
    with pytest.raises(DataError, match=r"few\.txt: expected one word for each of the 6 rows of"):
        read(path, VOCAB, words=tmp_path / "few.txt")
    (tmp_path / "twice.txt").write_text("the\nof\nthe\na\nb\nc\n")
    with pytest.raises(DataError, match=r"twice\.txt:3: 'the' is there for the second time"):
        read(path, VOCAB, words=tmp_path / "twice.txt")
    (tmp_path / "bytes.txt").write_bytes(b"the\n\xff\n")
    with pytest.raises(DataError, match=r"bytes\.txt:2: not valid UTF-8"):
        read(path, VOCAB, words=tmp_path / "bytes.txt")
    np.save(path, MATRIX[0])
    with pytest.raises(DataError, match=r"expected a matrix \(N, E\) .* got float32 \(3,\)"):
        read(path, VOCAB)
    np.save(path, MATRIX.astype(np.int64))
    with pytest.raises(DataError, match=r"of floating-point numbers, got int64 \(6, 3\)"):
        read(path, VOCAB)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not a numpy matrix"):
        read(path, VOCAB)
    with pytest.raises(DataError, match="matrix: words: expected one word for each of the 6 rows"):
        from_matrix(WORDS[:-1], MATRIX, VOCAB)
    with pytest.raises(ValueError, match=r"format must be one of .* got 'elmo'"):
        read(path, VOCAB, format="elmo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="words go with a numpy matrix"):
        read(glove(tmp_path), VOCAB, words=tmp_path / "few.txt")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.txt", VOCAB)


@pytest.mark.parametrize("freeze", [False, True], ids=["trainable", "frozen"])
def test_copy_to(freeze: bool, tmp_path: Path) -> None:
    found = EmbeddingsFile(glove(tmp_path), fold_case=True).read(VOCAB)
    module = torch.nn.Embedding(9, 3, padding_idx=PAD).double()
    found.copy_to(module, freeze=freeze)
    assert torch.equal(module.weight.detach(), found.matrix.double())
    assert module.weight.requires_grad is not freeze
    with pytest.raises(ValueError, match=r"must be \(V, E\) = \(9, 4\) .* got \(9, 3\)"):
        found.copy_to(torch.nn.Embedding(9, 4))


def test_fingerprints_tell_vocabularies_and_matrices_apart() -> None:
    matrix = torch.arange(12.0).reshape(6, 2)
    first = fingerprint(Vocab("ab"), matrix)
    assert first == fingerprint(Vocab("ab"), matrix.T.contiguous().T)  # not the layout
    changed = matrix.clone()
    changed[5, 1] += 1e-6
    others = [
        fingerprint(Vocab("ba"), matrix),
        fingerprint(Vocab("ab"), changed),
        fingerprint(Vocab("ab"), matrix.double()),
    ]
    assert len({first, *others}) == 4
    assert fingerprint(Vocab("ab"), matrix.bfloat16()).startswith("sha256:")
    with pytest.raises(ValueError, match=r"one row for each of the 7 symbols, got \(6, 2\)"):
        fingerprint(Vocab("abc"), matrix)


@pytest.mark.parametrize("writer", WRITERS)
def test_damaged_bytes_give_a_matrix_or_an_error_of_ours(writer: Writer, tmp_path: Path) -> None:
    path = writer(tmp_path)
    content = path.read_bytes()
    chance = random.Random(7)
    refused: list[str] = []
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(damaged))
            damaged[place : place + chance.randint(0, 2)] = chance.randbytes(chance.randint(0, 3))
        path.write_bytes(damaged)
        try:
            matrix = read(path, VOCAB).matrix
        except DataError as error:
            refused.append(str(error))
        else:
            assert matrix.isfinite().all()
    assert len(refused) > 20
    assert all(str(tmp_path) in text for text in refused)
