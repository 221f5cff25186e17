# SPDX-License-Identifier: Apache-2.0
"""The options of the recurrent layers that torch.nn does not have, and what they are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import init

from .._checks import check_number, check_positive
from .._dropout import check_probability
from .._packed import QuantizedName
from ..types import GATES, STATES, CellName, LayerNormWeights
from ._common import (
    cell_name,
    changed_options,
    check_not_quantized,
    norm_sizes,
    quantized_repr,
    reset_norm,
    set_forget_bias,
)

#: Cells by the mode of RNNBase.
CELLS_BY_MODE = {name.upper(): cell_name(name) for name in GATES}


#: Options that are checked and made floats whenever they are set.
_PROBABILITIES = frozenset(
    ("variational_dropout", "recurrent_dropout", "weight_dropout", "zoneout_h", "zoneout_c")
)


class RecurrentOptions(torch.nn.RNNBase):
    """What the recurrent layers are, besides torch.nn's arguments.

    RNNBase gives the parameters, their initialisation and the argument checks. (The
    compiler front end refuses subclasses of torch.nn.LSTM itself, not of RNNBase.)
    """

    weight_ih_l0: Tensor

    #: Whether each option that torch.nn does not have is at its default, which is that of the
    #: class; found anew when one is set.
    _plain: bool = True

    # The options that torch.nn does not have. Their defaults stand here, so that modules pickled
    # before there were such options have them too.
    residual: bool = False
    variational_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    layer_norm: bool = False
    learned_state: bool = False
    keep_every: int = 1
    forget_bias: float | None = None
    peepholes: bool = False
    reset_after: bool = True
    #: What :func:`pyseq.quantize` has made of the weights: ``"int8"``, ``"bfloat16"`` or nothing.
    _quantized: QuantizedName | None = None
    h_0: torch.nn.Parameter
    c_0: torch.nn.Parameter
    m_0: torch.nn.Parameter

    def _set_options(
        self,
        *,
        residual: bool,
        variational_dropout: float,
        weight_dropout: float,
        zoneout_h: float,
        learned_state: bool,
        keep_every: int,
        recurrent_dropout: float = 0.0,
        layer_norm: bool = False,
        zoneout_c: float = 0.0,
        forget_bias: float | None = None,
    ) -> None:
        """Check and keep the options of :class:`RNN` and :class:`LSTM`, and make what they need."""
        self.variational_dropout = variational_dropout
        self.recurrent_dropout = recurrent_dropout
        self.weight_dropout = weight_dropout
        self.zoneout_h = zoneout_h
        self.zoneout_c = zoneout_c
        directions = 2 if self.bidirectional else 1
        width = self.proj_size or self.hidden_size
        if residual and self.num_layers == 1 and self.input_size != directions * width:
            raise ValueError(
                "residual needs a layer whose input has the size of its output: num_layers "
                f"above 1, or input_size {directions * width}, got num_layers 1 and input_size "
                f"{self.input_size}"
            )
        self.residual = residual
        if forget_bias is not None and not self.bias:
            raise ValueError(
                f"forget_bias needs bias=True, got forget_bias {forget_bias!r} and no bias"
            )
        if forget_bias is not None:
            check_number("forget_bias", forget_bias)
        self.forget_bias = forget_bias
        self.keep_every = keep_every
        self.learned_state = learned_state
        if learned_state:
            count = self.num_layers * directions
            for part in self._learned_parts():
                size = width if part == "h" else self.hidden_size
                parameter = torch.nn.Parameter(self.weight_ih_l0.new_empty(count, size))
                self.register_parameter(f"{part}_0", parameter)
        self.layer_norm = layer_norm
        if layer_norm:
            for suffix in self._suffixes():
                for name, size in norm_sizes(self.cell, self.hidden_size).items():
                    parameter = torch.nn.Parameter(self.weight_ih_l0.new_empty(size))
                    self.register_parameter(f"{name}_{suffix}", parameter)
        self._reset_options()

    def _layer_norms(self) -> tuple[LayerNormWeights, ...]:
        """Those of each layer and direction as they are now, or none."""
        if not self.layer_norm:
            return ()
        names = norm_sizes(self.cell, self.hidden_size)
        return tuple(
            LayerNormWeights(*(getattr(self, f"{name}_{suffix}") for name in names))
            for suffix in self._suffixes()
        )

    def reset_parameters(self) -> None:
        """Draw all weights anew as torch.nn does; then set what the options say: learned
        states to zero, gains to one, the biases of forget gates to ``forget_bias``."""
        check_not_quantized(self)
        super().reset_parameters()
        self._reset_options()

    def _reset_options(self) -> None:
        for part in self._learned_parts() if self.learned_state else ():
            init.zeros_(getattr(self, f"{part}_0"))
        for norm in self._layer_norms():
            reset_norm(norm)
        if self.forget_bias is not None:
            names = [(f"bias_ih_{each}", f"bias_hh_{each}") for each in self._suffixes()]
            set_forget_bias(self, names, self.forget_bias)

    def _learned_parts(self) -> str:
        """The parts of the state that are parameters: of an sLSTM n is one, as whatever n is
        beside one, m can be instead, where n stays positive."""
        return "h" + STATES.get(self.cell, "").replace("n", "")

    def _learned(self) -> tuple[Tensor, ...]:
        """The learned initial state in parts, each (L*D, .), or ``()``."""
        if not self.learned_state:
            return ()
        if self.cell not in STATES:
            return (self.h_0,)
        if self.cell == "lstm":
            return self.h_0, self.c_0
        return self.h_0, self.c_0, torch.ones_like(self.c_0), self.m_0

    def extra_repr(self) -> str:
        names = (
            "residual",
            "variational_dropout",
            "recurrent_dropout",
            "weight_dropout",
            "zoneout_h",
            "zoneout_c",
            "layer_norm",
            "learned_state",
            "peepholes",
            "keep_every",
            "reset_after",
            "forget_bias",
        )
        defaults = {name: getattr(RecurrentOptions, name) for name in names}
        return super().extra_repr() + changed_options(self, **defaults) + quantized_repr(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PROBABILITIES:
            check_probability(name, value)
            value = float(value)
        elif name == "keep_every":
            check_positive(keep_every=value)
        # Past RNNBase, which would look for cuDNN's list of the weights.
        torch.nn.Module.__setattr__(self, name, value)
        if hasattr(type(self), name) and not name.startswith("_"):
            self._find_plain()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._find_plain()  # which a layer pickled by version 0.1.0 does not have

    def _find_plain(self) -> None:
        cls = type(self)
        options = (each for each in vars(self) if hasattr(cls, each) and each[0] != "_")
        self._plain = all(getattr(self, each) == getattr(cls, each) for each in options)

    @property
    def cell(self) -> CellName:
        """The cell's name in ``pyseq.functional``."""
        return CELLS_BY_MODE[self.mode] if self.reset_after else "gru_reset_before"

    def _suffixes(self) -> list[str]:
        """How the names of the weights of each layer and direction end."""
        return [
            suffix
            for layer in range(self.num_layers)
            for suffix in (f"l{layer}", f"l{layer}_reverse")[: 2 if self.bidirectional else 1]
        ]
