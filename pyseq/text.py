# SPDX-License-Identifier: Apache-2.0
"""From text to batches: tokenisers, vocabularies, files of pairs, bucketed batches.

Called by the translator and by training; knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .errors import DataError
from .types import PAD, START, STOP, UNK

SourceMarks = Literal["stop", "none", "both"]
SOURCE_MARKS: tuple[str, ...] = ("stop", "none", "both")

TokensName = Literal["char", "space", "word"]
TOKENS: tuple[str, ...] = ("char", "space", "word")

#: What the first four ids of every vocabulary are called.
SPECIALS: tuple[str, ...] = ("<pad>", "<start>", "<stop>", "<unk>")

# Characters that belong to a word when word characters stand on both sides of them.
_INNER = "'’-"
_INNER_NUMBER = ".,"
_NO_SPACE_BEFORE = frozenset(".,;:!?…%)]}»”、。，；：！？）】》」』")
_NO_SPACE_AFTER = frozenset("([{«“（【《「『¿¡")


def _is_word(character: str) -> bool:
    """Letters, marks, digits, the underscore, and the joiners that Indic and Persian use."""
    return character in "_\u200c\u200d" or unicodedata.category(character)[0] in "LMN"


def _split_words(text: str) -> list[str]:
    tokens: list[str] = []
    inside = False  # whether the last token is a word that may still grow
    for position, character in enumerate(text):
        before, after = text[position - 1 : position], text[position + 1 : position + 2]
        joins = (character in _INNER and after != "" and _is_word(after)) or (
            character in _INNER_NUMBER and before.isdigit() and after.isdigit()
        )
        if _is_word(character) or (inside and joins):
            if inside:
                tokens[-1] += character
            else:
                tokens.append(character)
            inside = True
        else:
            if not character.isspace():
                tokens.append(character)
            inside = False
    return tokens


def _join_words(tokens: Sequence[str]) -> str:
    text = ""
    for token in tokens:
        if text and token not in _NO_SPACE_BEFORE and text[-1] not in _NO_SPACE_AFTER:
            text += " "
        text += token
    return text


_SPLIT: dict[str, Callable[[str], list[str]]] = {
    "char": lambda text: list(text.strip()),
    "space": str.split,
    "word": _split_words,
}
_JOIN: dict[str, Callable[[Sequence[str]], str]] = {
    "char": "".join,
    "space": " ".join,
    "word": _join_words,
}


class Tokenizer:
    """Splits a line into tokens and puts tokens together again.

    Text is brought to Unicode normal form C first, so that the two spellings of an
    accented letter are one. Nothing is lower-cased.

    - ``char``: every code point, inner spaces too; spaces at both ends are dropped.
    - ``space``: what white space separates; joined by one space.
    - ``word``: runs of letters, marks and digits are words; an apostrophe or hyphen
      between two word characters belongs to the word, a point or comma between two
      digits to the number; every other character but white space is a token of its own.
      Joined by spaces, but without one before closing and after opening punctuation. A
      script that writes no spaces needs ``char``.

    Args:
        name: ``"char"``, ``"space"`` or ``"word"``.

    Raises:
        ValueError: another name.
    """

    def __init__(self, name: str) -> None:
        if name not in TOKENS:
            raise ValueError(f"tokens must be one of {', '.join(TOKENS)}, got {name!r}")
        self.name = name
        self._split = _SPLIT[name]
        self._join = _JOIN[name]

    def split(self, text: str) -> list[str]:
        """The tokens of one line."""
        return self._split(unicodedata.normalize("NFC", text))

    def join(self, tokens: Sequence[str]) -> str:
        """The line that these tokens make."""
        return self._join(tokens)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r})"


class Vocab:
    """The symbols of one side and their ids; 0..3 are ``<pad> <start> <stop> <unk>``.

    A token spelled like one of those four never gets its id: it is unknown like any
    other, so no text can end a sentence or hide as padding.

    Args:
        symbols: the ordinary symbols; the first one gets id 4.

    Raises:
        ValueError: a symbol is given twice, is not a string or is a reserved name.
    """

    def __init__(self, symbols: Iterable[str]) -> None:
        self.symbols: tuple[str, ...] = SPECIALS + tuple(symbols)
        self._ids: dict[str, int] = {}
        for index, symbol in enumerate(self.symbols[len(SPECIALS) :], start=len(SPECIALS)):
            if not isinstance(symbol, str) or symbol in SPECIALS:
                raise ValueError(f"a symbol must be a string and not reserved, got {symbol!r}")
            if self._ids.setdefault(symbol, index) != index:
                raise ValueError(f"symbols must differ, got {symbol!r} twice")

    @classmethod
    def build(
        cls, lines: Iterable[Sequence[str]], *, min_count: int = 1, max_size: int | None = None
    ) -> Vocab:
        """The vocabulary of tokenised lines, most frequent symbol first, ties by spelling.

        Args:
            lines: tokens of each line.
            min_count: leave out symbols that are seen less often.
            max_size: keep so many symbols at most, the four reserved ones included.
        """
        counts = Counter(token for line in lines for token in line)
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        kept = [s for s, count in ranked if count >= min_count and s not in SPECIALS]
        return cls(kept if max_size is None else kept[: max(0, max_size - len(SPECIALS))])

    def encode(self, tokens: Sequence[str], *, extra: Sequence[str] = ()) -> list[int]:
        """Ids of ``tokens``; unknown ones are ``UNK``.

        Args:
            tokens: the tokens.
            extra: tokens beyond the vocabulary, with the ids that follow it.
        """
        beyond = {token: len(self) + place for place, token in enumerate(extra)}
        return [self._ids.get(token, beyond.get(token, UNK)) for token in tokens]

    def extend(self, tokens: Sequence[str]) -> tuple[list[int], list[str]]:
        """Ids of ``tokens``, those of unknown ones following the vocabulary, and the latter.

        The n-th different unknown token has the id ``len(self) + n``, counted from 0: what a
        model that copies may put out for this source.
        """
        extra = list(dict.fromkeys(token for token in tokens if token not in self))
        return self.encode(tokens, extra=extra), extra

    def decode(self, ids: Iterable[int], *, extra: Sequence[str] = ()) -> list[str]:
        """Symbols of ``ids`` up to the first ``STOP``, without ``PAD`` and ``START``.

        Args:
            ids: the ids.
            extra: tokens beyond the vocabulary, as :meth:`extend` gave them.
        """
        tokens = []
        for index in ids:
            if index == STOP:
                break
            if index not in (PAD, START):
                beyond = index - len(self)
                tokens.append(self.symbols[index] if beyond < 0 else extra[beyond])
        return tokens

    def to_json(self) -> str:
        """One JSON object; :meth:`from_json` reads it back."""
        return json.dumps({"symbols": self.symbols[len(SPECIALS) :]}, ensure_ascii=False, indent=0)

    @classmethod
    def from_json(cls, text: str) -> Vocab:
        """The vocabulary that :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not such an object.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("symbols"), list):
            raise ValueError('a vocabulary must be a JSON object {"symbols": [...]}')
        return cls(content["symbols"])

    def __len__(self) -> int:
        return len(self.symbols)

    def __contains__(self, token: object) -> bool:
        return token in self._ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocab) and self.symbols == other.symbols

    def __hash__(self) -> int:
        return hash(self.symbols)

    def __repr__(self) -> str:
        return f"Vocab({len(self)} symbols)"


class Extra(NamedTuple):
    """Extra information of one pair, for the encoder and for the decoder; () for none."""

    source: tuple[float, ...] = ()
    target: tuple[float, ...] = ()


class TextPair(NamedTuple):
    """One line of a file of pairs."""

    source: str
    target: str
    line: int  # counted from 1
    columns: tuple[str, ...] = ()  # those after the target


class Pair(NamedTuple):
    """A :class:`TextPair`, tokenised."""

    source: list[str]
    target: list[str]
    line: int
    extra: Extra = Extra()


class PairsFile(NamedTuple):
    """What :func:`read_pairs` returns."""

    pairs: list[TextPair]
    skipped: list[str]  # what was wrong with each line that was left out


def read_lines(stream: Iterable[bytes], *, name: str) -> Iterator[tuple[int, str | DataError]]:
    """Number (from 1) and text of each line; an error in its place if it is not UTF-8.

    Lines end at a line feed only, so that numbers agree with those of an editor; a
    carriage return before it and a byte order mark in front of the first are dropped.
    """
    for number, raw in enumerate(stream, start=1):
        raw = raw.removesuffix(b"\n").removesuffix(b"\r")
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield (
                number,
                DataError(
                    f"{name}:{number}: not valid UTF-8 (byte {raw[error.start]:#04x} "
                    f"at column {error.start + 1})"
                ),
            )
        else:
            yield number, text


def read_pairs(path: str | Path, *, skip_bad_lines: bool = False) -> PairsFile:
    """Read a file of pairs: UTF-8, one pair a line, source and target separated by a tab.

    Further columns may hold extra information; else they are ignored, like blank lines.

    Args:
        path: the file.
        skip_bad_lines: leave out lines that have no tab, an empty side or bytes that are
            not UTF-8, instead of raising.

    Raises:
        DataError: a line is bad (the text names file and line), or no pair is left.
        OSError: the file cannot be read.
    """
    pairs: list[TextPair] = []
    skipped: list[str] = []
    with open(path, "rb") as stream:
        for number, text in read_lines(stream, name=str(path)):
            try:
                if isinstance(text, DataError):
                    raise text
                if text.strip():
                    pairs.append(_parse_pair(text, number, name=str(path)))
            except DataError as error:
                if not skip_bad_lines:
                    raise
                skipped.append(str(error))
    if not pairs:
        raise DataError(f"{path}: no pairs in this file{', only bad lines' if skipped else ''}")
    return PairsFile(pairs, skipped)


def _parse_pair(text: str, number: int, *, name: str) -> TextPair:
    columns = text.split("\t")
    if len(columns) < 2:
        raise DataError(f"{name}:{number}: no tab between source and target")
    return make_pair(columns[0], columns[1], number, name=name)._replace(columns=(*columns[2:],))


def make_pair(source: str, target: str, line: int, *, name: str) -> TextPair:
    """A pair in Unicode normal form C, without spaces at the ends of its sides.

    Raises:
        DataError: a side is empty; the text names ``name`` and ``line``.
    """
    sides = {}
    for side, text in (("source", source), ("target", target)):
        sides[side] = unicodedata.normalize("NFC", text).strip()
        if not sides[side]:
            raise DataError(f"{name}:{line}: the {side} is empty")
    return TextPair(sides["source"], sides["target"], line)


def tokenise_pairs(
    pairs: Iterable[TextPair],
    *,
    source: Tokenizer,
    target: Tokenizer,
    extra_sizes: tuple[int | None, int | None] = (None, None),
    name: str = "pairs",
) -> list[Pair]:
    """Split both sides of each pair.

    Args:
        pairs: the pairs.
        source, target: how each side is split.
        extra_sizes: numbers of extra information for the source and for the target, which are
            read from further columns; None for none.
        name: the file, for messages.

    Raises:
        DataError: a pair has not the extra information that is asked for.
    """
    return [
        Pair(
            source.split(pair.source),
            target.split(pair.target),
            pair.line,
            parse_extra(pair.columns, extra_sizes, place=f"{name}:{pair.line}"),
        )
        for pair in pairs
    ]


def parse_extra(
    columns: Sequence[str], sizes: tuple[int | None, int | None], *, place: str
) -> Extra:
    """Extra information as numbers, separated by spaces, a column for each side that has any.

    Args:
        columns: those of the source and of the target, without the ones that are not asked for.
        sizes: numbers of extra information for the source and for the target; None for none.
        place: file and line, for messages.

    Raises:
        DataError: a column is missing, or has not that many finite numbers.
    """
    found: list[tuple[float, ...]] = []
    left = iter(columns)
    for side, size in zip(("source", "target"), sizes, strict=True):
        fields = [] if size is None else next(left, "").split()
        try:
            numbers = tuple(float(field) for field in fields)
        except ValueError as error:
            raise DataError(f"{place}: extra information for the {side}: {error}") from error
        if len(numbers) != (size or 0) or not all(map(math.isfinite, numbers)):
            raise DataError(
                f"{place}: expected a column with {size} finite numbers of extra information for "
                f"the {side}, got {' '.join(fields[:5])!r}"
            )
        found.append(numbers)
    return Extra(*found)


def hold_out(pairs: Sequence[Pair], share: float, *, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split ``pairs`` into training and validation, all pairs of one source together.

    Args:
        share: part of the different sources to hold out, 0 to 1, rounded to the nearest.
        seed: fixes the choice.

    Returns:
        Training pairs and validation pairs, each in the order given.
    """
    sources = sorted({tuple(pair.source) for pair in pairs})
    chosen = set(random.Random(seed).sample(sources, round(share * len(sources))))
    return (
        [pair for pair in pairs if tuple(pair.source) not in chosen],
        [pair for pair in pairs if tuple(pair.source) in chosen],
    )


class Batch(NamedTuple):
    """Padded examples; the rows are in no particular order."""

    source: Tensor  # (B, S) int64, ends with STOP, padded with PAD
    source_lengths: Tensor  # (B,) int64, STOP included
    target_in: Tensor  # (B, T) int64, begins with START
    target_out: Tensor  # (B, T) int64, target_in shifted by one, ends with STOP
    lines: list[int]  # where each row came from
    #: (B, S) int64, the sources in ids of the target, PAD where nothing may be copied; None
    #: for a model that does not copy.
    copies: Tensor | None = None
    source_extra: Tensor | None = None  # (B, Z), extra information for the encoder
    target_extra: Tensor | None = None  # (B, Z), for the decoder

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the model reads."""
        return self.source, self.source_lengths, self.target_in

    @property
    def options(self) -> dict[str, Tensor]:
        """What it reads besides, by the name of the argument."""
        given = {
            "source_extra": self.source_extra,
            "target_extra": self.target_extra,
            "copies": self.copies,
        }
        return {name: value for name, value in given.items() if value is not None}

    @property
    def expected(self) -> Tensor:
        """What it should predict."""
        return self.target_out

    @property
    def counted(self) -> Tensor:
        """Which of these count, bool."""
        return self.target_out != PAD

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(
            self.source.to(device),
            self.source_lengths.to(device),
            self.target_in.to(device),
            self.target_out.to(device),
            self.lines,
            None if self.copies is None else self.copies.to(device),
            *(None if z is None else z.to(device) for z in (self.source_extra, self.target_extra)),
        )

    def share(self, rank: int, count: int) -> Batch:
        """Every ``count``-th row from ``rank`` on, perhaps none, with no more padding than needed.

        Rows lie in order of length, so that of ``count`` shares each has long and short ones.
        """
        rows = slice(rank, None, count)
        lengths = self.source_lengths[rows]
        source_size = int(lengths.max()) if len(lengths) else 0
        target_size = int(self.counted[rows].sum(1).max()) if len(lengths) else 0
        return Batch(
            self.source[rows, :source_size],
            lengths,
            self.target_in[rows, :target_size],
            self.target_out[rows, :target_size],
            self.lines[rows],
            None if self.copies is None else self.copies[rows, :source_size],
            *(None if z is None else z[rows] for z in (self.source_extra, self.target_extra)),
        )


def pad(rows: Sequence[Sequence[int]], *, value: int = PAD) -> tuple[Tensor, Tensor]:
    """Rows of numbers as one (B, S) int64 tensor padded with ``value``, and lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value), lengths


def encode_sources(
    vocab: Vocab, lines: Sequence[Sequence[str]], *, marks: SourceMarks = "stop"
) -> tuple[Tensor, Tensor]:
    """Tokenised sources as the encoder reads them: (B, S) int64 and lengths (B,).

    Args:
        vocab: what gives the ids.
        lines: the tokens of each.
        marks: ``"stop"``: each ends with ``STOP``, so that an empty line too has something to
            attend to; ``"both"``: it begins with ``START`` besides; ``"none"``: nothing is added.
    """
    before = [START] if marks == "both" else []
    after = [] if marks == "none" else [STOP]
    return pad([[*before, *vocab.encode(line), *after] for line in lines])


def encode_copies(vocab: Vocab, lines: Sequence[Sequence[str]]) -> tuple[Tensor, list[list[str]]]:
    """Tokenised sources as a model that copies takes them, beside :func:`encode_sources`.

    Args:
        vocab: that of the target.
        lines: the sources.

    Returns:
        (B, S) int64, ``PAD`` for the ``STOP`` at the end, and for each line the tokens that the
        vocabulary lacks, in the order of their ids.
    """
    rows = [vocab.extend(line) for line in lines]
    return pad([[*ids, PAD] for ids, _ in rows])[0], [extra for _, extra in rows]


@dataclass(frozen=True)
class Examples:
    """Pairs as ids, kept unpadded; the two special symbols are added when collating."""

    sources: list[list[int]]
    targets: list[list[int]]
    lines: list[int]
    name: str  # the file, for messages
    copies: list[list[int]] | None = None  # the sources in ids of the target, to be copied
    extras: list[Extra] | None = None

    @classmethod
    def encode(
        cls,
        pairs: Sequence[Pair],
        source_vocab: Vocab,
        target_vocab: Vocab,
        *,
        name: str,
        copy: bool = False,
    ) -> Examples:
        """``pairs`` in the ids of two vocabularies.

        Args:
            pairs, source_vocab, target_vocab, name: see there.
            copy: whether tokens of the source may be copied; in a target those that the
                vocabulary lacks then have ids beyond it.
        """
        extended = [target_vocab.extend(pair.source) if copy else ([], []) for pair in pairs]
        return cls(
            [source_vocab.encode(pair.source) for pair in pairs],
            [
                target_vocab.encode(pair.target, extra=extra)
                for pair, (_, extra) in zip(pairs, extended, strict=True)
            ],
            [pair.line for pair in pairs],
            name,
            [ids for ids, _ in extended] if copy else None,
            [pair.extra for pair in pairs] if any(any(pair.extra) for pair in pairs) else None,
        )

    def __len__(self) -> int:
        return len(self.sources)

    def collate(self, indices: Sequence[int]) -> Batch:
        """The examples at ``indices`` as one padded batch."""
        source, source_lengths = pad([[*self.sources[i], STOP] for i in indices])
        target, _ = pad([[START, *self.targets[i], STOP] for i in indices])
        # Shorter rows still hold STOP in target_in; the loss ignores what it predicts
        # there, because target_out is PAD.
        return Batch(
            source,
            source_lengths,
            target[:, :-1],
            target[:, 1:],
            [self.lines[i] for i in indices],
            None if self.copies is None else pad([[*self.copies[i], PAD] for i in indices])[0],
            *extra_tensors([] if self.extras is None else [self.extras[i] for i in indices]),
        )

    def by_length(self, indices: Iterable[int]) -> list[int]:
        """``indices`` sorted by target and then source length; equal ones keep their order."""
        return sorted(indices, key=lambda i: (len(self.targets[i]), len(self.sources[i])))

    def fingerprint(self) -> str:
        """SHA-256 over all ids: tells whether two runs train on the same data."""
        digest = hashlib.sha256()
        for source, target in zip(self.sources, self.targets, strict=True):
            digest.update(f"{source}{target}\n".encode())
        for copied in self.copies or ():
            digest.update(f"{copied}\n".encode())
        for extra in self.extras or ():
            digest.update(f"{extra}\n".encode())
        return digest.hexdigest()


def extra_tensors(extras: Sequence[Extra]) -> tuple[Tensor | None, Tensor | None]:
    """(B, Z) for the source and for the target, each None if there is none."""
    source = torch.tensor([extra.source for extra in extras])
    target = torch.tensor([extra.target for extra in extras])
    return source if source.numel() else None, target if target.numel() else None


B = TypeVar("B", covariant=True)


class ExampleSet(Protocol[B]):
    """Examples to make batches of: :class:`Examples`, or those of another task."""

    @property
    def name(self) -> str:
        """The file, for messages."""

    def __len__(self) -> int: ...

    def collate(self, indices: Sequence[int]) -> B:
        """The examples at ``indices`` as one batch."""

    def by_length(self, indices: Iterable[int]) -> list[int]:
        """``indices`` sorted by length; equal ones keep their order."""

    def fingerprint(self) -> str:
        """Tells whether two sets are the same."""


def ordered_batches(examples: ExampleSet[B], batch_size: int) -> Iterator[B]:
    """Every example once, shortest first: for validation."""
    order = examples.by_length(range(len(examples)))
    for start in range(0, len(order), batch_size):
        yield examples.collate(order[start : start + batch_size])


class BucketedBatches(Generic[B]):
    """Shuffled batches of examples of similar length, epoch after epoch.

    Each epoch shuffles the examples, sorts pools of ``POOL`` batches by length, cuts them
    into batches and shuffles the batches. All chance comes from a generator of its own,
    so the place in the data is two things: the generator's state at the beginning of the
    epoch, and how many batches of it are done.

    Args:
        examples: what to draw from; not empty.
        batch_size: rows of a batch; the last one may have fewer.
        seed: fixes the order.
    """

    POOL = 64

    def __init__(self, examples: ExampleSet[B], batch_size: int, *, seed: int) -> None:
        if not len(examples):
            raise DataError(f"{examples.name}: no pairs to train on")
        self.examples = examples
        self.batch_size = batch_size
        self.position = 0  # batches of this epoch that were handed out
        self._generator = torch.Generator().manual_seed(seed)
        self._begin_epoch()

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.examples) // self.batch_size)

    def __iter__(self) -> Iterator[B]:
        """The rest of this epoch."""
        while self.position < len(self):
            self.position += 1
            yield self.examples.collate(self._plan[self.position - 1])

    def next_epoch(self) -> None:
        """Shuffle anew and go to the first batch."""
        self.position = 0
        self._begin_epoch()

    def state(self) -> tuple[Tensor, int]:
        """Generator state (N,) uint8 at the beginning of the epoch, and batches done."""
        return self._epoch_state, self.position

    def restore(self, generator_state: Tensor, position: int) -> None:
        """Go to the place that :meth:`state` told."""
        self._generator.set_state(generator_state)
        self._begin_epoch()
        self.position = position

    def _begin_epoch(self) -> None:
        self._epoch_state = self._generator.get_state()
        shuffled = self._permutation(len(self.examples))
        size, batches = self.batch_size, []
        for start in range(0, len(shuffled), size * self.POOL):
            pool = self.examples.by_length(shuffled[start : start + size * self.POOL])
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        self._plan = [batches[i] for i in self._permutation(len(batches))]

    def _permutation(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self._generator).tolist()
