# SPDX-License-Identifier: Apache-2.0
"""Labels of tokens or of lines: their numbers, and batches of labelled examples.

What ``text`` has for pairs, for the tasks of ``tagger``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import read_json
from .errors import DataError
from .text import Features, Pair, Vocab, extra_tensor, pad
from .text.batches import content_of, encode_each, pad_rows
from .text.extra import check_extra, rows_of
from .types import IGNORE


class Labels:
    """The labels of a task and their numbers, from 0.

    Args:
        names: the labels.

    Raises:
        ValueError: there is none, or one is not a string, is empty or is given twice.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names: tuple[str, ...] = tuple(names)
        self._numbers: dict[str, int] = {}
        for number, name in enumerate(self.names):
            if not isinstance(name, str) or not name:
                raise ValueError(f"a label must be a string and not empty, got {name!r}")
            if self._numbers.setdefault(name, number) != number:
                raise ValueError(f"labels must differ, got {name!r} twice")
        if not self.names:
            raise ValueError("there must be at least one label, got none")

    @classmethod
    def build(cls, rows: Iterable[Sequence[str]]) -> Labels:
        """All labels of some examples, in the order of their spelling."""
        return cls(sorted({label for row in rows for label in row}))

    def encode(self, labels: Sequence[str]) -> list[int]:
        """The numbers of ``labels``.

        Raises:
            KeyError: there is no such label.
        """
        return [self._numbers[label] for label in labels]

    def decode(self, numbers: Iterable[int]) -> list[str]:
        """The labels of ``numbers``."""
        return [self.names[number] for number in numbers]

    def to_json(self) -> str:
        """One JSON object; :meth:`from_json` reads it back."""
        return json.dumps({"labels": self.names}, ensure_ascii=False, indent=0)

    @classmethod
    def from_json(cls, text: str) -> Labels:
        """The labels that :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not such an object.
        """
        content = read_json(text)
        if not isinstance(content, dict) or not isinstance(content.get("labels"), list):
            raise ValueError('labels must be a JSON object {"labels": [...]}')
        return cls(content["labels"])

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, label: object) -> bool:
        return label in self._numbers

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels) and self.names == other.names

    def __hash__(self) -> int:
        return hash(self.names)

    def __repr__(self) -> str:
        return f"Labels({len(self)} labels)"


class LabelBatch(NamedTuple):
    """Padded labelled examples; the rows are in no particular order."""

    source: Tensor  # (B, S) int64, padded with PAD; or (B, S, D), features padded with 0
    source_lengths: Tensor  # (B,) int64
    labels: Tensor  # (B, S) int64, padded with IGNORE; or (B,), one for each row
    lines: list[int]  # where each row came from
    source_extra: Tensor | None = None  # (B, Z) or (S, B, Z), extra information

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the model reads."""
        return self.source, self.source_lengths

    @property
    def options(self) -> dict[str, Tensor]:
        """What it reads besides, by the name of the argument."""
        return {} if self.source_extra is None else {"source_extra": self.source_extra}

    @property
    def expected(self) -> Tensor:
        """What it should predict."""
        return self.labels

    @property
    def counted(self) -> Tensor:
        """Which of these count, bool."""
        return self.labels != IGNORE

    def to(self, device: torch.device) -> LabelBatch:
        """The same on another device."""
        return LabelBatch(
            self.source.to(device),
            self.source_lengths.to(device),
            self.labels.to(device),
            self.lines,
            None if self.source_extra is None else self.source_extra.to(device),
        )

    def share(self, rank: int, count: int) -> LabelBatch:
        """As :meth:`pyseq.text.Batch.share`."""
        rows = slice(rank, None, count)
        lengths = self.source_lengths[rows]
        size = int(lengths.max()) if len(lengths) else 0
        labels = self.labels[rows]
        return LabelBatch(
            self.source[rows, :size],
            lengths,
            labels if labels.dim() == 1 else labels[:, :size],
            self.lines[rows],
            rows_of(self.source_extra, rows, size),
        )


@dataclass(frozen=True)
class LabelExamples:
    """Labelled lines as numbers, kept unpadded.

    ``labels`` has one for each token of a source, or, ``per_token`` being False, one alone.
    """

    sources: Sequence[list[int] | Tensor]  # ids, or features (S, D)
    labels: list[list[int]]
    lines: list[int]
    name: str  # the file, for messages
    per_token: bool
    extras: list[tuple[float, ...]] | None = None
    extra_size: int | None = None

    @classmethod
    def encode(
        cls,
        pairs: Sequence[Pair],
        vocab: Vocab | Features,
        labels: Labels,
        *,
        name: str,
        per_token: bool,
        extra_size: int | None = None,
    ) -> LabelExamples:
        """``pairs``, whose targets are labels, in numbers.

        Args:
            pairs, vocab, labels, name, per_token: see there; features take the place of a
                vocabulary, and the sources are their names.
            extra_size: numbers of a vector of extra information; None for none.

        Raises:
            DataError: a line has not the right number of labels, or one that is unknown, or not
                the extra information that is asked for.
        """
        sources = encode_each(vocab, pairs)
        check_labels(pairs, name=name, per_token=per_token, features=vocab)
        for pair, source in zip(pairs, sources, strict=True):
            place = f"{name}:{pair.line}"
            check_extra(pair.extra, (extra_size, None), (len(source), None), place=place)
            for label in pair.target:
                if label not in labels:
                    raise DataError(
                        f"{name}:{pair.line}: the label {label!r} is not one of the model's "
                        f"{len(labels)}"
                    )
        return cls(
            sources,
            [labels.encode(pair.target) for pair in pairs],
            [pair.line for pair in pairs],
            name,
            per_token,
            None if extra_size is None else [pair.extra.source for pair in pairs],
            extra_size,
        )

    def __len__(self) -> int:
        return len(self.sources)

    def collate(self, indices: Sequence[int]) -> LabelBatch:
        """The examples at ``indices`` as one padded batch."""
        source, lengths = pad_rows([self.sources[i] for i in indices])
        if self.per_token:
            labels, _ = pad([self.labels[i] for i in indices], value=IGNORE)
        else:
            labels = torch.tensor([self.labels[i][0] for i in indices], dtype=torch.int64)
        extras = [] if self.extras is None else [self.extras[i] for i in indices]
        extra = extra_tensor(extras, self.extra_size, steps=source.shape[1])
        return LabelBatch(source, lengths, labels, [self.lines[i] for i in indices], extra)

    def by_length(self, indices: Iterable[int]) -> list[int]:
        """``indices`` sorted by source length; equal ones keep their order."""
        return sorted(indices, key=lambda i: len(self.sources[i]))

    def fingerprint(self) -> str:
        """SHA-256 over all numbers: tells whether two runs train on the same data."""
        digest = hashlib.sha256()
        for source, labels in zip(self.sources, self.labels, strict=True):
            digest.update(content_of(source))
            digest.update(f"{labels}\n".encode())
        for extra in self.extras or ():
            digest.update(f"{extra}\n".encode())
        return digest.hexdigest()


def check_labels(
    pairs: Iterable[Pair],
    *,
    name: str,
    per_token: bool,
    features: Features | Vocab | None = None,
) -> None:
    """Raise unless each line has one label for each of its tokens, or one alone.

    Args:
        pairs: tokens and labels.
        name: the file, for messages.
        per_token: which of the two.
        features: what the sources name, where they are no tokens.

    Raises:
        DataError: a line has another number; the text names it.
    """
    for pair in pairs:
        source: Sequence[object] | Tensor = pair.source
        if isinstance(features, Features):
            source = features.encode(pair.source)
        steps = len(source)
        expected = steps if per_token else 1
        if len(pair.target) != expected:
            what = f"one label for each of its {expected} tokens" if per_token else "one label"
            raise DataError(f"{name}:{pair.line}: expected {what}, got {len(pair.target)}")
