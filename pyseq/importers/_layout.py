# SPDX-License-Identifier: Apache-2.0
"""What the readers of all layouts share: taking weights by name, vocabularies, building.

A reader takes every tensor of a checkpoint; what is left over is a part of the model that
it does not know, and the checkpoint is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..seq2seq import Seq2Seq
from ..text import SPECIALS, SourceMarks, Vocab
from ..translator import Translator
from ..types import START, STOP, CellName

# The logit of a token that the model cannot emit: exp of it is zero in every dtype.
NEVER = -1e4

# Of numbers this small tanh is the number itself in float32, as long as it is below 1e3 before:
# where a library has no tanh, the combination is scaled so, and what reads it is scaled back. A
# power of two changes no bit of a weight.
LINEAR = 2.0**-22

_CELLS: dict[int, CellName] = {4: "lstm", 3: "gru"}
_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Weights:
    """The tensors of a checkpoint by name, as float32, each to be taken once.

    Args:
        tensors: the tensors; what is no tensor is left out.
        path: the file, for messages.
        layout: the library, for messages.

    Raises:
        CheckpointError: one is not dense, or repeats numbers instead of holding them.
    """

    def __init__(self, tensors: Mapping[str, Any], *, path: Path, layout: str) -> None:
        self.path = path
        self.layout = layout
        self.names = [name for name, value in tensors.items() if isinstance(value, Tensor)]
        for name in self.names:
            given = tensors[name]
            if given.layout != torch.strided or given.is_quantized:
                raise self.refuse(f"{name} must be a plain tensor, got one of {given.layout}")
            # A file may claim any size for a tensor that repeats a few numbers.
            if given.untyped_storage().nbytes() < given.numel() * given.element_size():
                raise self.refuse(
                    f"{name} has fewer numbers in the file than its shape {tuple(given.shape)} says"
                )
        self._left = {name: tensors[name].detach() for name in self.names}

    def refuse(self, reason: str) -> CheckpointError:
        """The error that says why this checkpoint cannot be read, and what is in it."""
        return CheckpointError(
            f"{self.path}: cannot be read as a model of {self.layout}: {reason}; its weights are: "
            f"{', '.join(self.names) or 'none'}"
        )

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def require(self, *names: str) -> None:
        """Refuse the checkpoint if one of these is not left to be taken."""
        for name in names:
            if name not in self._left:
                raise self.refuse(f"{name} is missing")

    def take(self, name: str) -> Tensor:
        """The tensor of this name."""
        self.require(name)
        tensor = self._left.pop(name)
        if not tensor.is_floating_point():
            raise self.refuse(f"{name} must be floating-point numbers, got {tensor.dtype}")
        return tensor.float()

    def drop(self, *names: str) -> None:
        """Leave out tensors that say nothing new, if they are there."""
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        """Refuse the checkpoint if it has anything that was not taken."""
        if self._left:
            raise self.refuse(f"pyseq has no place for {', '.join(self._left)}")


@contextmanager
def shapes_may_differ(path: Path) -> Iterator[None]:
    """Refuse a file whose tensors have the right names and other shapes."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: its weights have other shapes than expected: {reason}"
        ) from error


class Stack(NamedTuple):
    """Recurrent layers: torch.nn's names of their weights, and what these tell."""

    cell: CellName
    layers: int
    bidirectional: bool
    input_size: int
    hidden_size: int  # of one direction
    weights: dict[str, Tensor]

    @property
    def output_size(self) -> int:
        """Features of a step."""
        return self.hidden_size * (2 if self.bidirectional else 1)


def take_stack(weights: Weights, prefix: str) -> Stack:
    """Layers under torch.nn's own names, ``weight_ih_l0`` and so on, after ``prefix``."""
    found: dict[str, Tensor] = {}
    layers = 0
    bidirectional = f"{prefix}weight_ih_l0_reverse" in weights
    while layers == 0 or f"{prefix}weight_ih_l{layers}" in weights:
        for suffix in ("", "_reverse") if bidirectional else ("",):
            for kind in _KINDS:
                name = f"{kind}_l{layers}{suffix}"
                found[name] = weights.take(prefix + name)
        layers += 1
    return _stack(weights, prefix, found, layers, bidirectional=bidirectional)


def take_cells(weights: Weights, prefix: str) -> Stack:
    """Layers that are cells of torch.nn, ``0.weight_ih`` and so on, after ``prefix``."""
    found: dict[str, Tensor] = {}
    layers = 0
    while layers == 0 or f"{prefix}{layers}.weight_ih" in weights:
        for kind in _KINDS:
            found[f"{kind}_l{layers}"] = weights.take(f"{prefix}{layers}.{kind}")
        layers += 1
    return _stack(weights, prefix, found, layers, bidirectional=False)


def _stack(
    weights: Weights, prefix: str, found: dict[str, Tensor], layers: int, *, bidirectional: bool
) -> Stack:
    rows, hidden_size = found["weight_hh_l0"].shape
    if rows % hidden_size or rows // hidden_size not in _CELLS:
        raise weights.refuse(
            f"{prefix}weight_hh must have 3 (GRU) or 4 (LSTM) rows for each of its columns, got "
            f"{rows} x {hidden_size}"
        )
    return Stack(
        _CELLS[rows // hidden_size],
        layers,
        bidirectional,
        found["weight_ih_l0"].shape[1],
        hidden_size,
        found,
    )


class Side(NamedTuple):
    """A vocabulary of pyseq, and where its rows are in the tables of a checkpoint."""

    vocab: Vocab
    rows: tuple[int | None, ...]  # None where the other vocabulary has no such symbol
    begin: int | None = None  # the symbol that targets begin with where there is no <start>

    def embedding(self, table: Tensor) -> Tensor:
        """The rows of a table in pyseq's order; zeros for what is not there."""
        chosen = _rows(table, self.rows)
        if self.begin is not None:
            chosen[START] = table[self.begin]
        return chosen

    def output(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rows of an output layer likewise; what is not there is never emitted."""
        if bias is None:
            bias = torch.zeros(len(weight))
        never = torch.tensor([NEVER if row is None else 0.0 for row in self.rows])
        return _rows(weight, self.rows), _rows(bias.unsqueeze(1), self.rows).squeeze(1) + never


def _rows(table: Tensor, rows: Sequence[int | None]) -> Tensor:
    there = torch.tensor([row is not None for row in rows])
    chosen = table[torch.tensor([0 if row is None else row for row in rows])]
    return chosen.masked_fill(~there.unsqueeze(1), 0.0)


def make_side(
    symbols: Sequence[str] | None,
    count: int,
    *,
    pad: int | None,
    start: int | None,
    stop: int | None,
    unk: int | None,
    path: Path,
    begin: int | None = None,
) -> Side:
    """The side of a vocabulary whose special symbols have these ids, of ``count`` symbols.

    Args:
        symbols: all symbols in the order of their ids; None if they are not known.
        count: rows of the tables.
        pad, start, stop, unk: ids, None where there is no such symbol.
        path: the file, for messages.
        begin: as in :class:`Side`.
    """
    if symbols is None:
        symbols = [f"#{index}" for index in range(count)]
    if len(symbols) != count:
        raise CheckpointError(
            f"{path}: the model has {count} symbols on this side, got a vocabulary of "
            f"{len(symbols)}"
        )
    special = (pad, start, stop, unk)
    ordinary = [index for index in range(count) if index not in special]
    try:
        vocab = Vocab(symbols[index] for index in ordinary)
    except ValueError as error:
        raise CheckpointError(f"{path}: its vocabulary cannot be used: {error}") from error
    assert len(SPECIALS) == len(special)
    return Side(vocab, (*special, *ordinary), begin)


def named_side(
    symbols: Sequence[str] | None,
    count: int,
    *,
    names: Mapping[str, str],
    ids: Mapping[str, int | None],
    path: Path,
    begin: int | None = None,
) -> Side:
    """As :func:`make_side`, where the special symbols are found by their names.

    Args:
        names: ``pad``, ``start``, ``stop``, ``unk`` and how they are spelled.
        ids: theirs where the symbols are not known.
        begin: as in :class:`Side`.
    """
    if symbols is None:
        found = dict(ids)
    else:
        place = {symbol: index for index, symbol in enumerate(symbols)}
        found = {special: place.get(name) for special, name in names.items()}
    return make_side(symbols, count, path=path, begin=begin, **found)


def read_symbols(path: Path | None) -> list[str] | None:
    """One symbol a line, the last one perhaps without an end."""
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not valid UTF-8") from error
    return [line.removesuffix("\r") for line in lines]


class Parts(NamedTuple):
    """A model, part by part, in pyseq's terms."""

    encoder: Stack
    decoder: Stack
    source: Side
    target: Side
    source_embedding: Tensor  # (rows, E), in the other vocabulary's order, like the others
    target_embedding: Tensor
    output: Tensor
    output_bias: Tensor | None
    bridge: str = "copy"
    bridge_weights: Mapping[str, Tensor] = {}
    bridge_c_from_h: bool = False
    score: str | None = None
    score_weights: Mapping[str, Tensor] = {}
    combine: Tensor | None = None  # (H, M + H), columns [context; h]
    combine_bias: Tensor | None = None
    combine_tanh: bool = True  # whether a tanh follows
    key_bias: Tensor | None = None
    input_feeding: bool = False


def build(weights: Weights, parts: Parts) -> Seq2Seq:
    """The model of these parts, in eval mode.

    Raises:
        CheckpointError: something was left over, or sizes do not fit.
    """
    weights.finish()
    if not parts.combine_tanh:
        parts = _without_tanh(parts)
    target = parts.target
    if target.rows[STOP] is None or (target.rows[START] is None and target.begin is None):
        raise weights.refuse("no symbol of its target vocabulary begins, or ends, a sentence")
    encoder, decoder = parts.encoder, parts.decoder
    biased = parts.combine_bias is not None or parts.key_bias is not None
    state = {f"encoder.rnn.{name}": value for name, value in encoder.weights.items()}
    state |= {f"decoder.rnn.{name}": value for name, value in decoder.weights.items()}
    state |= {f"bridge.{name}": value for name, value in parts.bridge_weights.items()}
    scores = dict(parts.score_weights)
    if biased:
        # The memory's last feature is 1: its column is the bias.
        key = "weight_memory" if "weight_memory" in scores else "weight"
        bias = parts.key_bias
        scores[key] = _with_column(
            scores[key], torch.zeros(len(scores[key])) if bias is None else bias, -1
        )
    state |= {f"decoder.rnn.score.{name}": value for name, value in scores.items()}
    if parts.combine is not None:
        combine = parts.combine
        if biased:
            bias = parts.combine_bias
            combine = _with_column(
                combine,
                torch.zeros(len(combine)) if bias is None else bias,
                combine.shape[1] - decoder.hidden_size,
            )
        state["decoder.rnn.combine.weight"] = combine
    state["encoder.embedding.weight"] = parts.source.embedding(parts.source_embedding)
    state["decoder.embedding.weight"] = parts.target.embedding(parts.target_embedding)
    output, output_bias = parts.target.output(parts.output, parts.output_bias)
    state["decoder.output.weight"], state["decoder.output.bias"] = output, output_bias
    try:
        model = Seq2Seq(
            len(parts.source.vocab),
            len(parts.target.vocab),
            source_embedding_size=parts.source_embedding.shape[1],
            target_embedding_size=parts.target_embedding.shape[1],
            hidden_size=decoder.hidden_size,
            encoder_hidden_size=encoder.output_size,
            num_layers=decoder.layers,
            encoder_num_layers=encoder.layers,
            cell=decoder.cell,
            bidirectional=encoder.bidirectional,
            score=parts.score,
            input_feeding=parts.input_feeding,
            bridge=parts.bridge,
            bridge_c_from_h=parts.bridge_c_from_h,
            memory_bias=biased,
            dropout=0.0,
        )
        model.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        raise weights.refuse(" ".join(str(error).split())) from error
    return model.eval()


def _without_tanh(parts: Parts) -> Parts:
    """The same model with a tanh behind its combination, which does nothing; see LINEAR."""
    assert parts.combine is not None
    bias, weights = parts.combine_bias, dict(parts.decoder.weights)
    if parts.input_feeding:
        inputs = weights["weight_ih_l0"].clone()
        inputs[:, parts.target_embedding.shape[1] :] /= LINEAR
        weights["weight_ih_l0"] = inputs
    return parts._replace(
        combine=parts.combine * LINEAR,
        combine_bias=None if bias is None else bias * LINEAR,
        combine_tanh=True,
        output=parts.output / LINEAR,
        decoder=parts.decoder._replace(weights=weights),
    )


def _with_column(matrix: Tensor, column: Tensor, place: int) -> Tensor:
    """``matrix`` with one more column before the one at ``place``, or behind all at -1."""
    place = matrix.shape[1] if place == -1 else place
    return torch.cat([matrix[:, :place], column.unsqueeze(1), matrix[:, place:]], 1)


def translator(
    model: Seq2Seq,
    parts: Parts,
    *,
    source_marks: SourceMarks,
    tokens: tuple[str, str] = ("space", "space"),
    max_length: int = 100,
) -> Translator:
    """The translator of an imported model."""
    return Translator(
        model,
        parts.source.vocab,
        parts.target.vocab,
        source_tokens=tokens[0],
        target_tokens=tokens[1],
        source_marks=source_marks,
        max_length=max_length,
    )
