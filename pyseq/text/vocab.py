# SPDX-License-Identifier: Apache-2.0
"""The symbols of one side of the pairs, and their ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from .._checks import read_json
from ..types import PAD, START, STOP, UNK

#: What the first four ids of every vocabulary are called.
SPECIALS: tuple[str, ...] = ("<pad>", "<start>", "<stop>", "<unk>")


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
        content = read_json(text)
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
