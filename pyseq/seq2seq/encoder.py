# SPDX-License-Identifier: Apache-2.0
"""The encoder: embedding and recurrent layers, whose outputs are the memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_positive, check_shape
from .._dropout import apply_dropout, check_probability
from .._pickled import fill_in
from ..extra import ExtraInformation, ExtraOptions, check_extra
from ..nn._common import Device, changed_options
from ..recurrent import LayerOptions, build_layers, layer_cell
from ..reference import without_padding
from ..types import PAD, State, join_parts, state_parts
from .inputs import check_source, embed, last_steps

__all__ = ["Encoder"]


_NO_OPTIONS = LayerOptions()


class Encoder(torch.nn.Module):
    """Embedding and recurrent layers: the memory is the output of the top layer.

    Args:
        vocab_size: V, number of source tokens; None with ``features``.
        embedding_size: features of a token.
        hidden_size: H, features of the memory; with both directions H/2 each.
        num_layers: L.
        cell: any of :class:`pyseq.Seq2Seq`.
        bidirectional: run each layer in both directions.
        dropout: probability of zeroing a feature of an embedding, of what goes from one
            layer to the next, and of the memory, in training.
        features: D, where the source is no tokens but vectors of D numbers, such as frames of
            speech or the outputs of another model (ELMo, BERT).
        extra: how extra information enters, if it does: into the states of the top layer, or
            with the place ``"input"`` into what the bottom layer reads.
        constant: give the memory one more feature, which is 1.
        options: what the recurrent layers do besides.
        device, dtype: of the parameters.

    Attributes:
        embedding: the table of the tokens, or the linear map ``W x + b`` of the features, to
            embedding_size numbers a step.

    Raises:
        ValueError: an option is unknown or a size is out of its range.
    """

    embedding: torch.nn.Embedding | torch.nn.Linear

    def __init__(
        self,
        vocab_size: int | None,
        *,
        embedding_size: int,
        hidden_size: int,
        num_layers: int = 1,
        cell: str = "lstm",
        bidirectional: bool = True,
        dropout: float = 0.0,
        features: int | None = None,
        extra: ExtraOptions | None = None,
        constant: bool = False,
        options: LayerOptions = _NO_OPTIONS,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if (vocab_size is None) == (features is None):
            raise ValueError(
                "the encoder reads either tokens or features: exactly one of the number of source "
                f"tokens and the number of features must be given, got {vocab_size!r} and "
                f"{features!r}"
            )
        check_positive(
            embedding_size=embedding_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
        )
        if bidirectional and hidden_size % 2:
            raise ValueError(
                "hidden_size must be even for a bidirectional encoder, which has half of it "
                f"in each direction, got {hidden_size}"
            )
        check_probability("dropout", dropout)
        self.dropout = dropout
        self.bidirectional = bidirectional
        self.constant = constant
        if vocab_size is not None:
            check_positive(vocab_size=vocab_size)
            self.embedding = torch.nn.Embedding(
                vocab_size, embedding_size, padding_idx=PAD, device=device, dtype=dtype
            )
        else:
            check_positive(features=features)
            assert features is not None
            self.embedding = torch.nn.Linear(features, embedding_size, device=device, dtype=dtype)
        self.cell = layer_cell(cell)
        self.rnn = build_layers(
            self.cell,
            embedding_size,
            hidden_size // 2 if bidirectional else hidden_size,
            num_layers,
            options,
            bidirectional=bidirectional,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        self.extra: ExtraInformation | None = None
        self.extra_at_input = extra is not None and extra.place == "input"
        if extra is not None:
            size = embedding_size if self.extra_at_input else hidden_size
            self.extra = extra.build(size, device=device, dtype=dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        fill_in(self, {"cell": self.rnn.cell})
        fill_in(self, {"extra": None, "extra_at_input": False, "constant": False})

    def extra_repr(self) -> str:
        return changed_options(self, dropout=0.0, constant=False).removeprefix(", ")

    def _join_directions(self, part: Tensor) -> Tensor:
        """(L*D, B, H/D) to (L, B, H), each layer's directions side by side."""
        if not self.bidirectional:
            return part
        both, batch, size = part.shape
        if both == 2:
            return part.transpose(0, 1).reshape(1, batch, 2 * size)
        return part.reshape(both // 2, 2, batch, size).transpose(1, 2).flatten(2)

    def forward(
        self, source: Tensor, lengths: Tensor, extra: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Encode ``source``.

        Args:
            source: (B, S) int64, token ids; or (B, S, D), features in the dtype of the
                weights, where what lies in the padding does not matter.
            lengths: (B,) int64, valid steps of each row, on any device.
            extra: extra information (B, Z), or (S, B, Z), where what lies in the padding does
                not matter.

        Returns:
            The memory (S, B, H), or (S, B, H + 1) with ``constant``, zero at padding, and the
            last state: h (L, B, H), or for LSTM (h, c) and so on, the directions side by side.
            Extra information at the output enters the h of the top layer like the memory; that of
            each step by its last valid one.

        Raises:
            RuntimeError: a tensor has the wrong shape, dtype or device.
        """
        embedding = self.embedding  # once: a module is found by name in half a microsecond
        check_source(source, embedding)
        x = source.transpose(0, 1)
        if lengths is not None and (source.dim() == 3 or extra is not None):
            # Else the first to read them are the layers, which check them.
            check_shape("lengths", lengths, "(B,)", (source.shape[0],))
        if source.dim() == 3:  # a NaN in the padding of features would reach the gradient
            x = without_padding(x, lengths)
        x = embed("source", embedding, x)
        if self.training:
            x = apply_dropout(x, self.dropout)
        check_extra("source_extra", self.extra, extra, rows=x.shape[1], steps=x.shape[0])
        if extra is not None and extra.dim() == 3:
            extra = without_padding(extra, lengths)
        if self.extra is not None and extra is not None and self.extra_at_input:
            x = self.extra(x, extra)
        memory, state = self.rnn(x, lengths=lengths)
        parts = [self._join_directions(part) for part in state_parts(self.cell, state)]
        if self.extra is not None and extra is not None and not self.extra_at_input:
            memory = without_padding(self.extra(memory, extra), lengths)
            last = extra if extra.dim() == 2 else last_steps(extra, lengths)
            top = self.extra(parts[0][-1:], last)
            parts[0] = torch.cat([parts[0][:-1], top])
        if self.training:
            memory = apply_dropout(memory, self.dropout)
        if self.constant:
            ones = without_padding(memory.new_ones(*memory.shape[:2], 1), lengths)
            memory = torch.cat([memory, ones], 2)
        return memory, join_parts(tuple(parts))
