# SPDX-License-Identifier: Apache-2.0
"""Every cell and option of the recurrent layers of ``nn``, as encoders and decoders take them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch

from ._checks import check_number, check_positive
from ._dropout import check_probability
from .nn import GRU, LSTM, RNN, SLSTM, IndRNN
from .nn._common import Device
from .types import CellName, kind

__all__ = ["LayerOptions"]

Layers = RNN | GRU | LSTM | IndRNN | SLSTM

#: By cell, the layers of it and what makes them so.
_LAYERS: dict[str, tuple[type[Layers], dict[str, Any]]] = {
    "rnn_tanh": (RNN, {"nonlinearity": "tanh"}),
    "rnn_relu": (RNN, {"nonlinearity": "relu"}),
    "gru": (GRU, {}),
    "gru_reset_before": (GRU, {"reset_after": False}),
    "lstm": (LSTM, {}),
    "indrnn_tanh": (IndRNN, {"nonlinearity": "tanh"}),
    "indrnn_relu": (IndRNN, {"nonlinearity": "relu"}),
    "slstm_sigmoid": (SLSTM, {"forget_gate": "sigmoid"}),
    "slstm_exp": (SLSTM, {"forget_gate": "exp"}),
}
_SHORT_NAMES = {"rnn": "rnn_tanh", "indrnn": "indrnn_relu", "slstm": "slstm_sigmoid"}

#: What the cells of models may be called.
CELLS: tuple[str, ...] = (*_LAYERS, *_SHORT_NAMES)


def layer_cell(cell: str) -> CellName:
    """``cell`` as the operators spell it; short names stand for what is the default in ``nn``.

    Raises:
        ValueError: there is no such cell.
    """
    name = _SHORT_NAMES.get(cell, cell)
    if name not in _LAYERS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    return cast(CellName, name)


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """What recurrent layers do besides running their cell.

    Args:
        residual, variational_dropout, recurrent_dropout, weight_dropout, zoneout_h, layer_norm,
            learned_state: as in :class:`pyseq.nn.RNN`.
        zoneout_c, forget_bias, peepholes: as in :class:`pyseq.nn.LSTM`.
        num_heads: as in :class:`pyseq.nn.SLSTM`.
        keep_every: k, above 1 to keep the state at every k-th step only for backward and compute
            the others again; see :func:`pyseq.functional.scan`.

    Raises:
        ValueError: a value is not of the kind of its option, or out of its range.
    """

    residual: bool = False
    variational_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    layer_norm: bool = False
    learned_state: bool = False
    forget_bias: float | None = None
    peepholes: bool = False
    num_heads: int = 1
    keep_every: int = 1

    def __post_init__(self) -> None:
        check_positive(num_heads=self.num_heads, keep_every=self.keep_every)
        for name, default in _NAMES.items():
            value = getattr(self, name)
            if isinstance(default, bool) and not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
            if isinstance(default, float):
                check_probability(name, value)
        if self.forget_bias is not None:
            check_number("forget_bias", self.forget_bias)

    @classmethod
    def of(cls, options: LayerOptions | Mapping[str, Any]) -> LayerOptions:
        """``options``, which may be a mapping of their names, as ``config.json`` has them.

        Raises:
            ValueError: there is no option of such a name.
            TypeError: it is neither.
        """
        if isinstance(options, LayerOptions):
            return options
        if not isinstance(options, Mapping):
            raise TypeError(
                "the options of layers must be a LayerOptions or a mapping of their names, got "
                f"{kind(options)}"
            )
        unknown = set(options) - set(_NAMES)
        if unknown:
            raise ValueError(
                f"the options of layers must be among {', '.join(_NAMES)}, got "
                f"{', '.join(map(repr, sorted(unknown)))}"
            )
        return cls(**options)

    @classmethod
    def parse(cls, text: str) -> LayerOptions:
        """The options written with commas between them: ``layer_norm,zoneout_h=0.1``.

        Raises:
            ValueError: there is no such option, or it has not the kind of value it takes.
        """
        found: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = part.partition("=")
            name = name.strip().replace("-", "_")
            if name not in _NAMES:
                return cls.of({name: value})  # which says so
            default = _NAMES[name]
            if isinstance(default, bool):
                if equals:
                    raise ValueError(
                        f"{name} is on where it is named, without a value: got {part!r}"
                    )
                found[name] = True
                continue
            try:
                found[name] = (int if type(default) is int else float)(value)
            except ValueError:
                raise ValueError(f"{name} must be written {name}=NUMBER, got {part!r}") from None
        return cls.of(found)

    def changed(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        own = {name: getattr(self, name) for name in _NAMES}
        return {name: value for name, value in own.items() if value != _NAMES[name]}


_NAMES: dict[str, Any] = {each.name: each.default for each in fields(LayerOptions)}


def check_layer_options(cell: CellName, options: LayerOptions) -> None:
    """Raise a ValueError if an option is given that layers of this cell do not have."""
    taken = inspect.signature(_LAYERS[cell][0]).parameters
    for name, value in options.changed().items():
        if name not in taken:
            raise ValueError(f"{name} is no option of layers of {cell}, got {value!r}")


def build_layers(
    cell: CellName,
    input_size: int,
    hidden_size: int,
    num_layers: int,
    options: LayerOptions,
    *,
    bidirectional: bool = False,
    dropout: float = 0.0,
    device: Device = None,
    dtype: torch.dtype | None = None,
) -> Layers:
    """Layers of ``cell``, whose options are those of ``nn`` by the same names.

    Raises:
        ValueError: layers of this cell do not have an option that is given.
    """
    check_layer_options(cell, options)
    kind, own = _LAYERS[cell]
    return kind(
        input_size,
        hidden_size,
        num_layers,
        dropout=dropout if num_layers > 1 else 0.0,  # it is between layers
        bidirectional=bidirectional,
        device=device,
        dtype=dtype,
        **own,
        **options.changed(),
    )
