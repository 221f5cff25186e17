# SPDX-License-Identifier: Apache-2.0
"""Files of pairs: read, tokenised, and split into training and validation."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError
from .extra import Extra, Sizes, parse_extra
from .tokens import Tokenizer


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
    extra_sizes: Sizes = (None, None),
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
