# SPDX-License-Identifier: Apache-2.0
"""Pairs as padded batches of ids, ordered by length or shuffled."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import DataError
from ..types import PAD, START, STOP
from .extra import Extra, Sizes, extra_tensor, rows_of
from .features import Features
from .pairs import Pair
from .vocab import Vocab

SourceMarks = Literal["stop", "none", "both"]
SOURCE_MARKS: tuple[str, ...] = ("stop", "none", "both")


class Batch(NamedTuple):
    """Padded examples; the rows are in no particular order."""

    #: (B, S) int64, ends with STOP, padded with PAD; or (B, S, D), features padded with 0.
    source: Tensor
    source_lengths: Tensor  # (B,) int64, STOP included
    target_in: Tensor  # (B, T) int64, begins with START
    target_out: Tensor  # (B, T) int64, target_in shifted by one, ends with STOP
    lines: list[int]  # where each row came from
    #: (B, S) int64, the sources in ids of the target, PAD where nothing may be copied; None
    #: for a model that does not copy.
    copies: Tensor | None = None
    source_extra: Tensor | None = None  # (B, Z) or (S, B, Z), extra information for the encoder
    target_extra: Tensor | None = None  # (B, Z) or (T, B, Z), for the decoder

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
            rows_of(self.source_extra, rows, source_size),
            rows_of(self.target_extra, rows, target_size),
        )


def pad(rows: Sequence[Sequence[int]], *, value: int = PAD) -> tuple[Tensor, Tensor]:
    """Rows of numbers as one (B, S) int64 tensor padded with ``value``, and lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value), lengths


def pad_features(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Features (S, D) as one (B, S, D) tensor padded with 0, and lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    return pad_sequence(list(rows), batch_first=True), lengths


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


def encode_each(source: Vocab | Features, pairs: Sequence[Pair]) -> list[list[int] | Tensor]:
    """The sources of pairs as ids, or as features.

    Raises:
        DataError: a source names no array.
    """
    return [source.encode(pair.source) for pair in pairs]


def pad_rows(
    rows: Sequence[list[int] | Tensor], *, end: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Ids, with ``end`` behind each row, or features as one padded tensor, and lengths (B,)."""
    features = [row for row in rows if isinstance(row, Tensor)]
    if features:
        return pad_features(features)
    return pad([[*row, *end] for row in rows if not isinstance(row, Tensor)])


def content_of(source: list[int] | Tensor) -> bytes:
    """What a fingerprint is made of."""
    if isinstance(source, Tensor):
        return f"{tuple(source.shape)}".encode() + source.numpy().tobytes()
    return str(source).encode()


@dataclass(frozen=True)
class Examples:
    """Pairs as ids, kept unpadded; the two special symbols are added when collating."""

    sources: Sequence[list[int] | Tensor]  # ids, or features (S, D)
    targets: list[list[int]]
    lines: list[int]
    name: str  # the file, for messages
    copies: list[list[int]] | None = None  # the sources in ids of the target, to be copied
    extras: list[Extra] | None = None
    extra_sizes: Sizes = (None, None)

    @classmethod
    def encode(
        cls,
        pairs: Sequence[Pair],
        source_vocab: Vocab | Features,
        target_vocab: Vocab,
        *,
        name: str,
        copy: bool = False,
        extra_sizes: Sizes | None = None,
    ) -> Examples:
        """``pairs`` in the ids of two vocabularies.

        Args:
            pairs, source_vocab, target_vocab, name: see there; features take the place of a
                vocabulary, and the sources are their names.
            copy: whether tokens of the source may be copied; in a target those that the
                vocabulary lacks then have ids beyond it.
            extra_sizes: numbers of a vector of extra information. Default: as many as the first
                pair has.
        """
        if extra_sizes is None:
            first = pairs[0].extra if pairs else Extra()
            extra_sizes = (len(first.source) or None, len(first.target) or None)
        extended = [target_vocab.extend(pair.source) if copy else ([], []) for pair in pairs]
        return cls(
            encode_each(source_vocab, pairs),
            [
                target_vocab.encode(pair.target, extra=extra)
                for pair, (_, extra) in zip(pairs, extended, strict=True)
            ],
            [pair.line for pair in pairs],
            name,
            [ids for ids, _ in extended] if copy else None,
            None if extra_sizes == (None, None) else [pair.extra for pair in pairs],
            extra_sizes,
        )

    def __len__(self) -> int:
        return len(self.sources)

    def collate(self, indices: Sequence[int]) -> Batch:
        """The examples at ``indices`` as one padded batch."""
        source, source_lengths = pad_rows([self.sources[i] for i in indices], end=[STOP])
        target, _ = pad([[START, *self.targets[i], STOP] for i in indices])
        # Shorter rows still hold STOP in target_in; the loss ignores what it predicts
        # there, because target_out is PAD.
        extras = [self.extras[i] for i in indices] if self.extras is not None else []
        of_source, of_target = self.extra_sizes
        return Batch(
            source,
            source_lengths,
            target[:, :-1],
            target[:, 1:],
            [self.lines[i] for i in indices],
            None if self.copies is None else pad([[*self.copies[i], PAD] for i in indices])[0],
            extra_tensor([each.source for each in extras], of_source, steps=source.shape[1]),
            extra_tensor([each.target for each in extras], of_target, steps=target.shape[1] - 1),
        )

    def by_length(self, indices: Iterable[int]) -> list[int]:
        """``indices`` sorted by target and then source length; equal ones keep their order."""
        return sorted(indices, key=lambda i: (len(self.targets[i]), len(self.sources[i])))

    def fingerprint(self) -> str:
        """SHA-256 over all ids: tells whether two runs train on the same data."""
        digest = hashlib.sha256()
        for source, target in zip(self.sources, self.targets, strict=True):
            digest.update(content_of(source))
            digest.update(f"{target}\n".encode())
        for copied in self.copies or ():
            digest.update(f"{copied}\n".encode())
        for extra in self.extras or ():
            digest.update(f"{extra}\n".encode())
        return digest.hexdigest()


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
