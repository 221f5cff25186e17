# SPDX-License-Identifier: Apache-2.0
"""The bridge: what the decoder starts from, given where the encoder ended.

Used by ``Seq2Seq``; encoder and decoder may so differ in layers, sizes and directions.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import init

from ._checks import check_positive, check_shape
from ._pickled import fill_in
from .nn._common import Device, changed_options
from .recurrent import layer_cell
from .types import STATES, State, state_parts

__all__ = ["BRIDGES", "Bridge", "BridgeName"]

BridgeName = Literal["copy", "linear", "tanh", "relu", "zero", "learned"]
BRIDGES: tuple[str, ...] = ("copy", "linear", "tanh", "relu", "zero", "learned")

#: Those of which the decoder's first state says nothing of the source.
SOURCELESS: tuple[str, ...] = ("zero", "learned")


class Bridge(torch.nn.Module):
    """The first state of a decoder, ``s_0 = bridge(h)``, from the last state of an encoder.

    With ``vec(h)`` the states of all layers of the encoder side by side:

    - ``"copy"``: ``s_0 = h``, layer by layer; layers and sizes must be equal.
    - ``"linear"``: ``vec(s_0) = W vec(h) + b``.
    - ``"tanh"``: ``vec(s_0) = tanh(W vec(h) + b)``.
    - ``"relu"``: ``vec(s_0) = relu(W vec(h) + b)``.
    - ``"zero"``: ``s_0 = 0``, so that attention is all that the decoder knows of the source.
    - ``"learned"``: ``s_0`` is a parameter, the same for every source.

    The c of an LSTM is treated like h, with weights of its own; or it is made of the encoder's h
    too, and c plays no part. It is made of h as well if the encoder is no LSTM, and zero if copied
    from one that is none. The c, n and m of an sLSTM are copied from another one, and otherwise
    zero, which is an empty memory.

    Args:
        kind: one of the above.
        cell: as in :class:`pyseq.Seq2Seq`, of encoder and decoder.
        encoder_cell: that of the encoder, if it has one of its own.
        encoder_layers, encoder_size: layers and features of the encoder's state, both
            directions of a layer side by side.
        decoder_layers, decoder_size: those of the decoder's.
        c_from_h: make the c of an LSTM of h; for ``"linear"``, ``"tanh"`` and ``"relu"``.
        device, dtype: of the parameters.

    Attributes:
        weight_h, weight_c: ``W`` (decoder_layers * decoder_size, encoder_layers *
            encoder_size), or None.
        bias_h, bias_c: ``b``, or the learned state (decoder_layers * decoder_size,), or None.

    Raises:
        ValueError: the kind or the cell is unknown, a size is out of its range, or ``"copy"``
            is asked for between states of different shapes.

    Reference:
        Sutskever et al. 2014, arXiv 1409.3215, section 2 (copy); Cho et al. 2014, arXiv
        1406.1078, appendix A.1.2, and Bahdanau et al. 2015, arXiv 1409.0473, appendix A.2.2,
        of the top layer alone (tanh).
    """

    weight_h: Tensor | None
    weight_c: Tensor | None
    bias_h: Tensor | None
    bias_c: Tensor | None

    def __init__(
        self,
        kind: str,
        *,
        cell: str,
        encoder_layers: int,
        encoder_size: int,
        decoder_layers: int,
        decoder_size: int,
        c_from_h: bool = False,
        encoder_cell: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(
            encoder_layers=encoder_layers,
            encoder_size=encoder_size,
            decoder_layers=decoder_layers,
            decoder_size=decoder_size,
        )
        if kind not in BRIDGES:
            raise ValueError(f"bridge must be one of {', '.join(BRIDGES)}, got {kind!r}")
        before, after = (encoder_layers, encoder_size), (decoder_layers, decoder_size)
        if kind == "copy" and before != after:
            raise ValueError(
                "bridge 'copy' needs an encoder and a decoder of the same layers and sizes, got "
                f"{before[0]} x {before[1]} and {after[0]} x {after[1]}; 'linear' or 'tanh' map "
                "one to the other"
            )
        self.kind = cast(BridgeName, kind)
        self.cell = layer_cell(cell)
        self.encoder_cell = layer_cell(cell if encoder_cell is None else encoder_cell)
        if c_from_h and (self.cell != "lstm" or kind not in ("linear", "tanh", "relu")):
            raise ValueError(
                "c_from_h needs an lstm and one of the bridges linear, tanh, relu, got "
                f"{self.cell!r} and {kind!r}"
            )
        self.c_from_h = c_from_h
        self.encoder_layers, self.encoder_size = before
        self.decoder_layers, self.decoder_size = after
        inputs, outputs = encoder_layers * encoder_size, decoder_layers * decoder_size
        parts = ("h", "c") if self.cell == "lstm" else ("h",)
        for part in ("h", "c"):
            weight = bias = None
            if part in parts and kind in ("linear", "tanh", "relu"):
                weight = torch.nn.Parameter(
                    torch.empty(outputs, inputs, device=device, dtype=dtype)
                )
            if part in parts and kind in ("linear", "tanh", "relu", "learned"):
                bias = torch.nn.Parameter(torch.empty(outputs, device=device, dtype=dtype))
            self.register_parameter(f"weight_{part}", weight)
            self.register_parameter(f"bias_{part}", bias)
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        fill_in(self, {"c_from_h": False, "encoder_cell": self.cell})

    def reset_parameters(self) -> None:
        """Draw the weights as torch.nn.Linear does; a learned state begins at zero."""
        bound = 1 / math.sqrt(self.encoder_layers * self.encoder_size)
        for weight, bias in ((self.weight_h, self.bias_h), (self.weight_c, self.bias_c)):
            if weight is not None and bias is not None:
                init.uniform_(weight, -bound, bound)
                init.uniform_(bias, -bound, bound)
            elif bias is not None:
                init.zeros_(bias)

    def forward(self, state: State) -> State:
        """The decoder's first state.

        Args:
            state: the encoder's last one: h (layers, B, size), or for LSTM (h, c).

        Returns:
            The same of the decoder's layers and size.

        Raises:
            ValueError: the state has not the form that the cell takes.
            RuntimeError: a part of it has the wrong shape, dtype or device.
        """
        parts = state_parts(self.encoder_cell, state)
        expected = (self.encoder_layers, -1, self.encoder_size)
        for name, part in zip("hcnm", parts, strict=False):
            check_shape(f"{name} of the encoder's state", part, "(L, B, H)", expected)
        others, before = STATES.get(self.cell, ""), STATES.get(self.encoder_cell, "")
        if self.kind == "copy" and others == before:
            return state
        copies = self.kind == "copy"
        h = parts[0] if copies else self._map(parts[0], self.weight_h, self.bias_h)
        if not others:
            return h
        if others == "c" and not copies:
            part = parts[1] if before == "c" and not self.c_from_h else parts[0]
            return h, self._map(part, self.weight_c, self.bias_c)
        return h, *(torch.zeros_like(h) for _ in others)

    def _map(self, part: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """One part of the state, (encoder_layers, B, encoder_size) to the decoder's."""
        batch = part.shape[1]
        if bias is None:
            return part.new_zeros(self.decoder_layers, batch, self.decoder_size)
        if weight is None:
            rows = bias.expand(batch, -1)
        else:
            rows = torch.nn.functional.linear(part.transpose(0, 1).flatten(1), weight, bias)
        if self.kind == "tanh":
            rows = rows.tanh()
        elif self.kind == "relu":
            rows = rows.relu()
        layers = rows.reshape(batch, self.decoder_layers, self.decoder_size)
        return layers.transpose(0, 1).contiguous()

    def extra_repr(self) -> str:
        return (
            f"{self.kind!r}, {self.encoder_layers} x {self.encoder_size} to "
            f"{self.decoder_layers} x {self.decoder_size}" + changed_options(self, c_from_h=False)
        )
