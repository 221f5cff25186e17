# SPDX-License-Identifier: Apache-2.0
"""One step of the recurrent layers: RNNCell, GRUCell, LSTMCell, IndRNNCell, SLSTMCell."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import init

from .. import functional
from .._packed import QuantizedName
from ..types import STATES, CellName, LayerNormWeights, State, join_parts, state_parts
from ._common import (
    Device,
    add_weight,
    changed_options,
    check_input,
    check_layer_norm,
    check_nonlinearity,
    check_not_quantized,
    check_slstm,
    norm_sizes,
    quantized_repr,
    refuse_script,
    reset_norm,
    weights_now,
)

_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Cell(torch.nn.RNNCellBase):
    """What the cells share: one step is a scan with T = 1."""

    layer_norm: bool = False
    #: As of the layers.
    _quantized: QuantizedName | None = None

    __prepare_scriptable__ = refuse_script

    @property
    def cell(self) -> CellName:
        """The cell's name in ``pyseq.functional``."""
        raise NotImplementedError

    def _add_norm(self, layer_norm: bool) -> None:
        """Make the gains and biases of layer normalisation, if it is asked for."""
        self.layer_norm = layer_norm
        if layer_norm:
            for name, size in norm_sizes(self.cell, self.hidden_size).items():
                parameter = torch.nn.Parameter(self.weight_ih.new_empty(size))
                self.register_parameter(name, parameter)
            reset_norm(self._norm())

    def _norm(self) -> LayerNormWeights:
        return LayerNormWeights(*weights_now(self, list(norm_sizes(self.cell, self.hidden_size))))

    def reset_parameters(self) -> None:
        """Draw all weights anew as torch.nn does; gains of layer normalisation begin with one."""
        check_not_quantized(self)
        super().reset_parameters()
        if self.layer_norm:
            reset_norm(self._norm())

    def extra_repr(self) -> str:
        return super().extra_repr() + changed_options(self, layer_norm=False) + quantized_repr(self)

    def weight_names(self) -> list[str]:
        """The names of all matrices."""
        return ["weight_ih", "weight_hh"]

    def _step(self, input: Tensor, hx: State | None, w_ch: Tensor | None = None) -> State:
        cell = self.cell
        if input.dim() != 2:
            parts = state_parts(cell, hx)
            self._check_dim(input, parts)
            rows = tuple(part.unsqueeze(0) for part in parts)
            last = self._step(input.unsqueeze(0), join_parts(rows) if rows else None, w_ch)
            return join_parts(tuple(part.squeeze(0) for part in state_parts(cell, last)))
        w_ih, w_hh, b_ih, b_hh = weights_now(self, _CELL_WEIGHTS)
        if input.dtype != w_ih.dtype:
            check_input("input", input, w_ih, self.training)
        try:
            if self.layer_norm:
                norm = self._norm()
                return functional.step(
                    input, w_ih, w_hh, b_ih, b_hh, hx, cell=cell, layer_norm=norm
                )
            return functional.step(input, w_ih, w_hh, b_ih, b_hh, hx, cell=cell, w_ch=w_ch)
        except RuntimeError:
            self._explain(input, state_parts(cell, hx))
            if self.hidden_size > 0:
                raise
        # Without units, which the operators refuse.
        empty = torch.nn.functional.linear(input, w_ih)  # (B, 0), differentiable
        return join_parts((empty,) * (1 + len(STATES.get(cell, ""))))

    def _check_dim(self, input: Tensor, parts: tuple[Tensor, ...]) -> None:
        """Raise unless the input is one row or a batch of them, and the state likewise."""
        name, dim = type(self).__name__, input.dim()
        if dim not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {dim}D instead")
        for index, part in enumerate(parts):
            what = "hidden" if len(parts) == 1 else f"hx[{index}]"
            if part.dim() not in (1, 2):
                raise ValueError(
                    f"{name}: Expected {what} to be 1D or 2D, got {part.dim()}D instead"
                )
            if part.dim() != dim:
                raise ValueError(
                    f"{name}: Expected {what} to be {dim}D like the input, "
                    f"got {part.dim()}D instead"
                )

    def _explain(self, input: Tensor, parts: tuple[Tensor, ...]) -> None:
        """Raise what torch.nn says of a batch (B, I) and state that the operators refuse; asked
        only when they did, as in :class:`Recurrent`."""
        self._check_dim(input, parts)
        if input.size(1) != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.size(1)} expected {self.input_size}"
            )
        for index, part in enumerate(parts):
            if part.size(0) != input.size(0):
                raise RuntimeError(
                    f"Input batch size {input.size(0)} doesn't match hidden{index} batch size "
                    f"{part.size(0)}"
                )
            if part.size(1) != self.hidden_size:
                raise RuntimeError(
                    f"hidden{index} has inconsistent hidden_size: got {part.size(1)}, "
                    f"expected {self.hidden_size}"
                )


class RNNCell(_Cell):
    """One step of :class:`RNN`; a drop-in for torch.nn.RNNCell.

    Args:
        input_size: I.
        hidden_size: H.
        bias: whether the cell has ``bias_ih`` and ``bias_hh``.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        device, dtype: of the parameters.
        layer_norm: as for :class:`RNN`; adds ``gain_ih`` and ``gain_hh`` (G*H), and in an LSTM
            cell ``gain_c`` and ``bias_c`` (H).

    Raises:
        ValueError: the nonlinearity is unknown, or options do not go together.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        layer_norm: bool = False,
    ) -> None:
        check_nonlinearity(nonlinearity)
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity
        self._add_norm(layer_norm)

    @property
    def cell(self) -> CellName:
        """The cell's name in ``pyseq.functional``."""
        return "rnn_tanh" if self.nonlinearity == "tanh" else "rnn_relu"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """New h (B, H) or (H,) from input (B, I) or (I,) and h, by default zero."""
        h = self._step(input, hx)
        assert isinstance(h, Tensor)
        return h


class GRUCell(_Cell):
    """One step of :class:`GRU`; a drop-in for torch.nn.GRUCell.

    Args: as :class:`RNNCell`, without ``nonlinearity``, and
        reset_after: as for :class:`GRU`, where layer_norm goes with True.
    """

    reset_after: bool = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)
        check_layer_norm(layer_norm, reset_after=reset_after)
        self.reset_after = reset_after
        self._add_norm(layer_norm)

    @property
    def cell(self) -> CellName:
        """The cell's name in ``pyseq.functional``."""
        return "gru" if self.reset_after else "gru_reset_before"

    def extra_repr(self) -> str:
        return super().extra_repr() + changed_options(self, reset_after=True)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """New h (B, H) or (H,) from input (B, I) or (I,) and h, by default zero."""
        h = self._step(input, hx)
        assert isinstance(h, Tensor)
        return h


class LSTMCell(_Cell):
    """One step of :class:`LSTM`; a drop-in for torch.nn.LSTMCell.

    Args: as :class:`RNNCell`, without ``nonlinearity``, and
        peepholes: whether the cell has ``weight_ch`` (3*H,); see :class:`LSTM`. Not with
            ``layer_norm``.
    """

    peepholes: bool = False
    weight_ch: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        peepholes: bool = False,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        check_layer_norm(layer_norm, peepholes=peepholes)
        self._add_norm(layer_norm)
        self.peepholes = peepholes
        if peepholes:
            add_weight(self, "weight_ch", 3 * hidden_size)

    @property
    def cell(self) -> CellName:
        """The cell's name in ``pyseq.functional``."""
        return "lstm"

    def extra_repr(self) -> str:
        return super().extra_repr() + changed_options(self, peepholes=False)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """New (h, c), each (B, H) or (H,), from input (B, I) or (I,) and (h, c)."""
        h, c = self._step(input, hx, self.weight_ch if self.peepholes else None)
        return h, c


class IndRNNCell(_Cell):
    """One step of :class:`IndRNN`.

    Args: as :class:`RNNCell`, without ``layer_norm``, where ``nonlinearity`` is ``"relu"`` by
        default; ``weight_hh`` is (H,).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "relu",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_nonlinearity(nonlinearity)
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity
        add_weight(self, "weight_hh", hidden_size)
        init.uniform_(self.weight_hh)

    def reset_parameters(self) -> None:
        """Draw all weights anew, as :class:`IndRNN` does."""
        super().reset_parameters()
        init.uniform_(self.weight_hh)

    @property
    def cell(self) -> CellName:
        """The cell's name in ``pyseq.functional``."""
        return "indrnn_relu" if self.nonlinearity == "relu" else "indrnn_tanh"

    def extra_repr(self) -> str:
        sizes = f"{self.input_size}, {self.hidden_size}"
        return sizes + changed_options(self, bias=True, nonlinearity="relu")

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """New h (B, H) or (H,) from input (B, I) or (I,) and h, by default zero."""
        h = self._step(input, hx)
        assert isinstance(h, Tensor)
        return h


class SLSTMCell(_Cell):
    """One step of :class:`SLSTM`.

    Args: as :class:`RNNCell`, without ``nonlinearity`` and ``layer_norm``, and ``num_heads`` and
        ``forget_gate`` of :class:`SLSTM`; ``weight_hh`` is (4*H, H / heads).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        num_heads: int = 1,
        forget_gate: str = "sigmoid",
    ) -> None:
        check_slstm(hidden_size, num_heads, forget_gate)
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        self.num_heads = num_heads
        self.forget_gate = forget_gate
        add_weight(self, "weight_hh", 4 * hidden_size, hidden_size // num_heads)

    @property
    def cell(self) -> CellName:
        """The cell's name in ``pyseq.functional``."""
        return "slstm_exp" if self.forget_gate == "exp" else "slstm_sigmoid"

    def extra_repr(self) -> str:
        return super().extra_repr() + changed_options(self, num_heads=1, forget_gate="sigmoid")

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """New (h, c, n, m), each (B, H) or (H,), from input (B, I) or (I,) and such a state."""
        h, c, n, m = self._step(input, hx)
        return h, c, n, m
