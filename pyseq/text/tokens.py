# SPDX-License-Identifier: Apache-2.0
"""Tokenisers: how a line of text is split, and put together again."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal

from ..types import kind

TokensName = Literal["char", "space", "word", "line"]
TOKENS: tuple[str, ...] = ("char", "space", "word", "line")

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
    "line": lambda text: [text.strip()] if text.strip() else [],
}
_JOIN: dict[str, Callable[[Sequence[str]], str]] = {
    "char": "".join,
    "space": " ".join,
    "word": _join_words,
    "line": " ".join,
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
    - ``line``: all of it is one token, such as the name of an array of features.

    Args:
        name: ``"char"``, ``"space"``, ``"word"`` or ``"line"``.

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
        """The tokens of one line.

        Raises:
            TypeError: it is no string.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, got {kind(text)}")
        return self._split(unicodedata.normalize("NFC", text))

    def join(self, tokens: Sequence[str]) -> str:
        """The line that these tokens make."""
        return self._join(tokens)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r})"
