# SPDX-License-Identifier: Apache-2.0
"""Pretrained word vectors: readers of their files, and the matrix of a vocabulary.

word2vec (text and binary), GloVe, and numpy matrices with a list of words. Files are
streamed; only the rows that a vocabulary wants are ever in memory. Used by training.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ._checks import numpy_reason
from .errors import DataError
from .text import SPECIALS, Vocab, read_lines
from .types import PAD, START, STOP, UNK

__all__ = [
    "FORMATS",
    "Embeddings",
    "EmbeddingsFile",
    "OovReport",
    "fingerprint",
    "from_matrix",
    "read",
]

FormatName = Literal["word2vec", "word2vec-binary", "glove", "numpy"]
FORMATS: tuple[str, ...] = ("word2vec", "word2vec-binary", "glove", "numpy")

#: Spellings under which files hold what the special symbols stand for.
_SPECIAL_NAMES: dict[int, tuple[str, ...]] = {
    START: ("<start>", "<s>"),
    STOP: ("<stop>", "</s>"),
    UNK: ("<unk>",),
}

# What no real file exceeds, so that one that is something else is not read into memory whole.
_LONGEST_LINE = 1 << 24  # bytes
_LONGEST_WORD = 1 << 12  # bytes
_LARGEST_SIZE = 1 << 14  # numbers of a vector
_CHUNK = 1 << 20  # bytes

Array = np.ndarray[Any, np.dtype[np.float32]]


class OovReport(NamedTuple):
    """Which words of a vocabulary have a vector, and which are out of the file's vocabulary."""

    name: str  # the file
    found: int  # words with a vector under their own spelling
    folded: tuple[str, ...]  # words that took the vector of another spelling
    missing: tuple[str, ...]  # the others, in the vocabulary's order: the most frequent first
    specials: tuple[str, ...]  # special symbols with a vector

    @property
    def words(self) -> int:
        """Words of the vocabulary, the four special symbols not counted."""
        return self.found + len(self.folded) + len(self.missing)

    def __str__(self) -> str:
        covered = self.found + len(self.folded)
        text = f"{self.name}: vectors for {covered:,} of {self.words:,} words"
        text += f" ({covered / max(1, self.words):.1%})"
        if self.folded:
            text += f", {len(self.folded):,} of them under another spelling"
        if self.missing:
            shown = ", ".join(map(repr, self.missing[:5]))
            more = ", ..." if len(self.missing) > 5 else ""
            text += f"; without: {shown}{more}"
        return text


@dataclass(frozen=True)
class Embeddings:
    """The matrix of a vocabulary: one row for each of its symbols.

    Args:
        matrix: (V, E) float32; row i belongs to symbol i.
        report: which words the file had.
        fingerprint: what :func:`fingerprint` gives for vocabulary and matrix.
    """

    matrix: Tensor
    report: OovReport
    fingerprint: str

    def copy_to(self, embedding: torch.nn.Embedding, *, freeze: bool = False) -> None:
        """Make this matrix the weights of a module.

        Args:
            embedding: with V rows of E numbers, of any floating dtype and device.
            freeze: whether training leaves the weights as they are from now on.

        Raises:
            ValueError: the module has another number of rows, or rows of another size.
        """
        expected, got = tuple(embedding.weight.shape), tuple(self.matrix.shape)
        if expected != got:
            raise ValueError(
                f"{self.report.name}: the matrix must be (V, E) = {expected} like the embedding "
                f"of the model, got {got}"
            )
        with torch.no_grad():
            embedding.weight.copy_(self.matrix)
        embedding.weight.requires_grad_(not freeze)


@dataclass(frozen=True)
class EmbeddingsFile:
    """A file of word vectors and how it is read; see :func:`read` for the fields."""

    path: str | Path
    format: FormatName | None = None
    words: str | Path | None = None
    fold_case: bool = False

    def read(self, vocab: Vocab, *, seed: int = 1) -> Embeddings:
        """What :func:`read` gives for ``vocab``."""
        return read(
            self.path,
            vocab,
            format=self.format,
            words=self.words,
            fold_case=self.fold_case,
            seed=seed,
        )


def read(
    path: str | Path,
    vocab: Vocab,
    *,
    format: FormatName | None = None,
    words: str | Path | None = None,
    fold_case: bool = False,
    seed: int = 1,
) -> Embeddings:
    """The vectors that a file has for the symbols of a vocabulary.

    Rows come from, in this order:

    - ``<pad>`` is zero, whatever the file holds.
    - A word takes the vector of the same spelling; failing that, the first one whose word
      equals it in Unicode normal form C and, with ``fold_case``, in lower case.
    - ``<start>`` and ``<stop>`` are also looked for as ``<s>`` and ``</s>``.
    - ``<unk>``, if the file has none, is the mean of the vectors found.
    - What is missing is drawn from normal distributions with the mean and the standard
      deviation that the vectors found have in each column.

    Args:
        path: the file; one that ends in ``.gz`` is decompressed on the way.
        vocab: the vocabulary.
        format: ``"word2vec"`` (text: a line with the numbers of words and of columns, then a
            word and its numbers a line), ``"word2vec-binary"``, ``"glove"`` (text without the
            first line; words may hold spaces) or ``"numpy"`` (a ``.npy`` file). Default: by
            the name, ``.npy`` and ``.bin``; of a text file by its first line.
        words: the words of a numpy matrix, UTF-8, one a line. Default: the file of the same
            name that ends in ``.txt`` instead of ``.npy``.
        fold_case: whether upper and lower case may differ where there is no equal word.
        seed: of the rows that are drawn.

    Raises:
        ValueError: ``format`` is unknown, or ``words`` is given for another one than numpy's.
        DataError: the file is damaged or of another format, a word that is wanted is there
            twice, or not one word of the vocabulary is there. The text names the line (for a
            binary file: the row). What is wrong inside a row that is not wanted may go
            unnoticed.
        OSError: the file cannot be read.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    name, collected = str(path), _Collected(vocab, fold_case=fold_case)
    is_matrix = format == "numpy" or (format is None and name.endswith(".npy"))
    if words is not None and not is_matrix:
        raise ValueError(f"words go with a numpy matrix: other files have their own, got {words!r}")
    if is_matrix:
        word_file = Path(name).with_suffix(".txt") if words is None else Path(words)
        matrix = _open_matrix(path)
        with open(word_file, "rb") as stream:
            words_of_rows = _word_lines(stream, str(word_file))
            for row in _matrix_rows(matrix, words_of_rows, name, str(word_file), collected):
                collected.offer(row)
        return collected.finish(name, matrix.shape[1], seed=seed)
    binary = format == "word2vec-binary" or (format is None and name.endswith((".bin", ".bin.gz")))
    with _opened(path) as stream:
        rows = (
            _BinaryRows(stream, name, collected)
            if binary
            else _TextRows(stream, name, collected, format)
        )
        for row in rows:
            collected.offer(row)
    return collected.finish(name, rows.size, seed=seed)


def from_matrix(
    words: Sequence[str],
    matrix: Array | Tensor,
    vocab: Vocab,
    *,
    fold_case: bool = False,
    seed: int = 1,
    name: str = "matrix",
) -> Embeddings:
    """The rows that a matrix in memory has for the symbols of a vocabulary.

    Args:
        words: N words.
        matrix: (N, E), a floating-point array or tensor; row i belongs to word i.
        vocab, fold_case, seed: as in :func:`read`.
        name: what messages call it.

    Raises:
        DataError: the numbers of words and rows differ, or as in :func:`read`.
    """
    if isinstance(matrix, Tensor):
        matrix = matrix.detach().cpu().double().numpy()
    array = _check_matrix(matrix, name)
    collected = _Collected(vocab, fold_case=fold_case)
    spelled = (word.encode("utf-8", "surrogatepass") for word in words)
    for row in _matrix_rows(array, enumerate(spelled, 1), name, f"{name}: words", collected):
        collected.offer(row)
    return collected.finish(name, array.shape[1], seed=seed)


def fingerprint(vocab: Vocab, matrix: Tensor) -> str:
    """SHA-256 over the symbols of a vocabulary and the matrix that goes with it.

    Two models read text alike only if both are the same: equal matrices with symbols in
    another order are different.

    Args:
        vocab: V symbols.
        matrix: (V, E), of any floating dtype and device.

    Raises:
        ValueError: the matrix has another number of rows.
    """
    if matrix.dim() != 2 or matrix.shape[0] != len(vocab):
        raise ValueError(
            f"matrix must have one row for each of the {len(vocab)} symbols, got "
            f"{tuple(matrix.shape)}"
        )
    digest = hashlib.sha256(json.dumps(vocab.symbols).encode())
    digest.update(f"{matrix.dtype}{tuple(matrix.shape)}".encode())
    digest.update(matrix.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return "sha256:" + digest.hexdigest()


# What the readers give, and what is kept of it.


class _Row(NamedTuple):
    """A row that may be wanted."""

    place: str  # file and line or row, for messages
    word: bytes
    vector: Array


class _Kept(NamedTuple):
    """The best row for a symbol so far."""

    rank: int  # 0: the same spelling; 1: another one
    place: str
    vector: Array


class _Collected:
    """Picks the rows for a vocabulary out of all rows of a file."""

    def __init__(self, vocab: Vocab, *, fold_case: bool) -> None:
        self._vocab = vocab
        self._fold_case = fold_case
        self._exact: dict[bytes, int] = {}
        self._similar: dict[str, list[int]] = {}
        for index, symbol in enumerate(vocab.symbols[len(SPECIALS) :], start=len(SPECIALS)):
            self._exact[symbol.encode("utf-8", "surrogatepass")] = index
            self._similar.setdefault(self._key(symbol), []).append(index)
        self._aliases = {
            name.encode(): index for index, names in _SPECIAL_NAMES.items() for name in names
        }
        self._kept: dict[int, _Kept] = {}

    def _key(self, word: str) -> str:
        word = unicodedata.normalize("NFC", word)
        return unicodedata.normalize("NFC", word.casefold()) if self._fold_case else word

    def _similar_to(self, word: bytes) -> list[int]:
        if word.isascii() and not self._fold_case:
            return []  # such a word has no other spelling
        return self._similar.get(self._key(word.decode("utf-8", "replace")), [])

    def wants(self, word: bytes) -> bool:
        """Whether the vector of this word may be needed."""
        return word in self._exact or word in self._aliases or bool(self._similar_to(word))

    def offer(self, row: _Row) -> None:
        """Keep the row where it is the best so far.

        Raises:
            DataError: the word is there for the second time.
        """
        exact = self._exact.get(row.word)
        if exact is not None:
            before = self._kept.get(exact)
            if before is not None and before.rank == 0:
                raise DataError(
                    f"{row.place}: {self._vocab.symbols[exact]!r} is there for the second time, "
                    f"after {before.place}"
                )
            self._kept[exact] = _Kept(0, row.place, row.vector)
        special = self._aliases.get(row.word)
        if special is not None:
            self._keep_first(special, row)
        for index in self._similar_to(row.word):
            self._keep_first(index, row)

    def _keep_first(self, index: int, row: _Row) -> None:
        self._kept.setdefault(index, _Kept(1, row.place, row.vector))

    def finish(self, name: str, size: int, *, seed: int) -> Embeddings:
        """The matrix, with the rows that are missing made up; see :func:`read`."""
        count = len(self._vocab)
        matrix = np.zeros((count, size), dtype=np.float32)
        words = [index for index in sorted(self._kept) if index >= len(SPECIALS)]
        if not words:
            hint = "" if self._fold_case else ", or only in another case (fold_case)"
            raise DataError(f"{name}: not one word of the vocabulary is in this file{hint}")
        for index, kept in self._kept.items():
            matrix[index] = kept.vector
        found = matrix[words].astype(np.float64)
        mean, deviation = torch.from_numpy(found.mean(0)), torch.from_numpy(found.std(0))
        result = torch.from_numpy(matrix)
        drawn = [i for i in range(count) if i not in self._kept and i not in (PAD, UNK)]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(drawn), size, generator=generator, dtype=torch.float64)
        result[drawn] = (mean + deviation * noise).float()
        if UNK not in self._kept:
            result[UNK] = mean.float()
        symbols = self._vocab.symbols
        report = OovReport(
            name,
            sum(self._kept[index].rank == 0 for index in words),
            tuple(symbols[index] for index in words if self._kept[index].rank > 0),
            tuple(symbols[index] for index in drawn if index >= len(SPECIALS)),
            tuple(symbols[index] for index in sorted(self._kept) if index < len(SPECIALS)),
        )
        return Embeddings(result, report, fingerprint(self._vocab, result))


# The files.


@contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if its name ends in ``.gz``."""
    if not str(path).endswith(".gz"):
        with open(path, "rb") as stream:
            yield stream
        return
    try:
        with gzip.open(path, "rb") as stream:
            yield cast(BinaryIO, stream)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged: {error}") from error


def _header(line: bytes) -> tuple[int, int] | None:
    """Words and columns that the first line of a word2vec file tells, or None."""
    fields = line.split()
    if len(fields) != 2 or not all(f.isdigit() and len(f) < 16 for f in fields):
        return None
    return int(fields[0]), int(fields[1])


def _check_header(header: tuple[int, int] | None, line: bytes, name: str) -> tuple[int, int]:
    if header is None or not 1 <= header[1] <= _LARGEST_SIZE:
        raise DataError(
            f"{name}:1: the first line of a word2vec file must be the numbers of words and of "
            f"columns, of these 1 to {_LARGEST_SIZE}, got {line[:60]!r}"
        )
    return header


def _check_vector(vector: Array, place: str, word: bytes) -> Array:
    if not np.isfinite(vector).all():
        raise DataError(f"{place}: the vector of {_shown(word)} is not finite")
    return vector


def _shown(word: bytes) -> str:
    return repr(word[:60].decode("utf-8", "replace"))


class _TextRows:
    """The wanted rows of a text file: word2vec's with a header, GloVe's without."""

    def __init__(
        self, stream: BinaryIO, name: str, collected: _Collected, format: FormatName | None
    ) -> None:
        self._stream = stream
        self._name = name
        self._collected = collected
        self._format = format
        self.size = 0  # columns, once iteration has begun

    def __iter__(self) -> Iterator[_Row]:
        lines = self._lines()
        number, first = next(lines, (1, b""))
        promised = None
        header = _header(first)
        if self._format == "word2vec" or (self._format is None and header is not None):
            promised, self.size = _check_header(header, first, self._name)
        else:
            self.size = _numbers_at_the_end(first.split()[1:])
            if not 1 <= self.size <= _LARGEST_SIZE:
                raise DataError(
                    f"{self._name}:{number}: expected a word and its numbers, got {first[:60]!r}"
                )
            lines = _chain((number, first), lines)
        count = 0
        for number, line in lines:
            count += 1
            if promised is not None and count > promised:
                raise DataError(
                    f"{self._name}:{number}: the first line tells of {promised} words, but here is "
                    "one more"
                )
            row = self._parse(line, number, spaces=promised is None)
            if row is not None:
                yield row
        if promised is not None and count < promised:
            raise DataError(
                f"{self._name}: truncated: the first line tells of {promised} words, got {count}"
            )

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Number and content of each line that is not blank."""
        number = 0
        while line := self._stream.readline(_LONGEST_LINE):
            number += 1
            if len(line) == _LONGEST_LINE:
                raise DataError(
                    f"{self._name}:{number}: a line of more than {_LONGEST_LINE} bytes: "
                    "this is no text file of word vectors"
                )
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
            line = line.rstrip()
            if line:
                yield number, line

    def _parse(self, line: bytes, number: int, *, spaces: bool) -> _Row | None:
        """The row of a line, None if it is not wanted.

        Args:
            spaces: whether words may hold spaces.
        """
        word, _, rest = line.partition(b" ")
        if rest.count(b" ") == self.size - 1 and not self._collected.wants(word):
            return None
        place = f"{self._name}:{number}"
        fields = line.rsplit(None, self.size)
        word = fields[0]
        extra = word.split()[1:] if len(fields) == self.size + 1 else []
        if len(fields) != self.size + 1 or (extra and (not spaces or _is_number(extra[-1]))):
            # Split anew, because a line without a word begins with a number.
            got = len(line.split()) - 1
            binary = "; is this a binary file? (format 'word2vec-binary')" if b"\0" in line else ""
            raise DataError(
                f"{place}: expected a word and {self.size} numbers, got {got} fields after "
                f"{_shown(line.split()[0])}{binary}"
            )
        if not self._collected.wants(word):
            return None
        try:
            vector = np.array([float(field) for field in fields[1:]], dtype=np.float64)
        except ValueError as error:
            raise DataError(f"{place}: a number of {_shown(word)} is none: {error}") from error
        with np.errstate(over="ignore"):  # what overflows is not finite
            single = vector.astype(np.float32)
        return _Row(place, word, _check_vector(single, place, word))


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _numbers_at_the_end(fields: Sequence[bytes]) -> int:
    """How many of the last fields are numbers; what stands before them belongs to the word."""
    return sum(1 for _ in takewhile(_is_number, reversed(fields)))


def _chain(
    first: tuple[int, bytes], others: Iterator[tuple[int, bytes]]
) -> Iterator[tuple[int, bytes]]:
    yield first
    yield from others


class _BinaryRows:
    """The wanted rows of a word2vec file whose numbers are float32, little-endian."""

    def __init__(self, stream: BinaryIO, name: str, collected: _Collected) -> None:
        self._stream = stream
        self._name = name
        self._collected = collected
        self.size = 0  # columns, once iteration has begun

    def __iter__(self) -> Iterator[_Row]:
        first = self._stream.readline(_LONGEST_WORD)
        count, self.size = _check_header(_header(first), first, self._name)
        width = 4 * self.size
        buffer, at = b"", 0
        for number in range(1, count + 1):
            place = f"{self._name}: row {number}"
            while True:
                end = buffer.find(b" ", at, at + _LONGEST_WORD)
                if end >= 0 and len(buffer) - end > width:
                    break
                if end < 0 and len(buffer) - at >= _LONGEST_WORD:
                    raise DataError(
                        f"{place}: no word where one should begin: the file is damaged or not "
                        "word2vec's binary format"
                    )
                more = self._stream.read(_CHUNK)
                if not more:
                    raise DataError(f"{place}: truncated: expected {count} rows, got {number - 1}")
                buffer, at = buffer[at:] + more, 0
            # Some writers end a row with a line feed, some do not.
            word = buffer[at:end].lstrip(b"\n")
            if not word:
                raise DataError(f"{place}: the word is empty: the file is damaged")
            if self._collected.wants(word):
                vector = np.frombuffer(buffer, dtype="<f4", count=self.size, offset=end + 1)
                vector = _check_vector(vector.astype(np.float32), place, word)
                yield _Row(place, word, vector)
            at = end + 1 + width
        if (buffer[at:] + self._stream.read(_CHUNK)).strip(b"\n"):
            raise DataError(f"{self._name}: goes on after the {count} rows that it tells of")


def _open_matrix(path: str | Path) -> Array:
    try:
        # Mapped, so that only the rows that are looked at are read.
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy parses the header as Python: it may be any
        raise DataError(f"{path}: not a numpy matrix: {numpy_reason(error)}") from error
    return _check_matrix(matrix, str(path))


def _check_matrix(matrix: Any, name: str) -> Array:
    if (
        not isinstance(matrix, np.ndarray)
        or matrix.ndim != 2
        or not np.issubdtype(matrix.dtype, np.floating)
        or matrix.shape[1] < 1
    ):
        got = (
            f"{matrix.dtype} {matrix.shape}"
            if isinstance(matrix, np.ndarray)
            else type(matrix).__name__
        )
        raise DataError(f"{name}: expected a matrix (N, E) of floating-point numbers, got {got}")
    return matrix


def _word_lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    for number, text in read_lines(stream, name=name):
        if isinstance(text, DataError):
            raise text
        yield number, text.encode()


def _matrix_rows(
    matrix: Array,
    words: Iterable[tuple[int, bytes]],
    name: str,
    word_name: str,
    collected: _Collected,
) -> Iterator[_Row]:
    """The wanted rows of a matrix with their words.

    Args:
        words: number from 1 and spelling of each.
        name, word_name: what messages call matrix and words.
    """
    number = 0
    for number, word in words:
        if number <= len(matrix) and collected.wants(word):
            place = f"{word_name}:{number}"
            with np.errstate(over="ignore"):  # what overflows is not finite
                vector = matrix[number - 1].astype(np.float32)
            yield _Row(place, word, _check_vector(vector, place, word))
    if number != len(matrix):
        raise DataError(
            f"{word_name}: expected one word for each of the {len(matrix)} rows of {name}, "
            f"got {number}"
        )
