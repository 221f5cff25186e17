# SPDX-License-Identifier: Apache-2.0
"""Modules with short weights, for inference.

Where one row at a time is computed, a step takes as long as reading the weights does; with a
quarter or half of the bytes it is that much faster.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch

from ._packed import QUANTIZED, QuantizedName, is_quantized, pack
from .nn import (
    GRU,
    LSTM,
    RNN,
    SLSTM,
    AttentionDecoder,
    GRUCell,
    IndRNN,
    IndRNNCell,
    LSTMCell,
    RNNCell,
    SLSTMCell,
)
from .types import GATES
from .types import kind as type_name

__all__ = ["quantize"]

M = TypeVar("M", bound=torch.nn.Module)

#: Modules whose layers are scans.
_SCANS = (RNN, GRU, LSTM, RNNCell, GRUCell, LSTMCell)
#: Those among them whose recurrent weights are no matrix, or one for each head.
_NOT_QUANTIZED = (IndRNN, SLSTM, IndRNNCell, SLSTMCell)


def quantize(module: M, weights: QuantizedName = "int8") -> M:
    """A copy of ``module`` for inference, whose recurrent layers hold short weights.

    These are the weights of every :class:`pyseq.nn.RNN`, ``GRU``, ``LSTM``, their cells and
    :class:`pyseq.nn.AttentionDecoder` in it: those of the input, of the states and of Luong's
    combination. Embeddings, biases, keys and output layers stay as they are.

    With ``"int8"`` a weight takes a quarter of its bytes: each row of a matrix is
    ``scale * q`` with q from -127 to 127, and so is, at each step, each row that it is
    multiplied with, by its own largest magnitude. With ``"bfloat16"`` weights take half and
    what they are multiplied with is float32. Sums are float32, or exact integers.

    The copy is in eval mode; to train it, or to ask for a gradient through its layers, is an
    error. Its packed weights fit the instruction set that they were made for: save the module
    itself and quantize what is loaded.

    Args:
        module: on the CPU, in float32; it is not changed.
        weights: ``"int8"`` or ``"bfloat16"``.

    Raises:
        ValueError: ``weights`` is unknown; there is no such layer in ``module``; a layer is
            quantized already or parametrised, an IndRNN, an SLSTM, or a GRU with
            ``reset_after=False``; a weight is not finite.
        RuntimeError: a weight is not float32 on the CPU.
        TypeError: ``module`` is no module.

    Reference:
        Jacob et al. 2018, arXiv 1712.05877, section 2 (there with a zero point).
    """
    if weights not in QUANTIZED:
        raise ValueError(f"weights must be one of {', '.join(QUANTIZED)}, got {weights!r}")
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type_name(module)}")
    result = copy.deepcopy(module).eval().requires_grad_(False)
    found = 0
    for name, layer in result.named_modules():
        if isinstance(layer, _SCANS):
            _quantize_scan(layer, weights, name)
        elif isinstance(layer, AttentionDecoder):
            _quantize_decoder(layer, weights, name)
        elif isinstance(layer, _NOT_QUANTIZED):
            raise ValueError(
                f"{type(layer).__name__} cannot be quantized, got one in {name or 'the module'}"
            )
        else:
            continue
        found += 1
    if not found:
        raise ValueError(
            "module must hold a recurrent layer of pyseq.nn to be quantized, got "
            f"{type(module).__name__} without one"
        )
    return result


def _quantize_scan(
    layer: RNN | GRU | LSTM | RNNCell | GRUCell | LSTMCell, kind: QuantizedName, where: str
) -> None:
    if not getattr(layer, "reset_after", True):
        raise ValueError(
            "a GRU to be quantized must have reset_after=True, got False in "
            f"{where or 'the module'}"
        )
    for name in layer.weight_names():
        projection = name.startswith("weight_hr")
        rows = getattr(layer, name).shape[0]
        _replace(layer, name, kind, where, gates=1 if projection else rows // layer.hidden_size)


def _quantize_decoder(decoder: AttentionDecoder, kind: QuantizedName, where: str) -> None:
    gates, hidden = GATES[decoder.cell], decoder.hidden_size
    for number in range(decoder.num_layers):
        fed = number == 0 and decoder.input_feeding
        columns = (decoder.input_size, decoder.fed_size) if fed else None
        _replace(decoder, f"weight_ih_l{number}", kind, where, gates=gates, columns=columns)
        _replace(decoder, f"weight_hh_l{number}", kind, where, gates=gates)
    if decoder.score is not None and decoder.combine is not None:
        _replace(decoder.combine, "weight", kind, where, columns=(decoder.memory_size, hidden))
        if decoder.score.weight_query is not None:
            _replace(decoder.score, "weight_query", kind, where)


def _replace(
    module: torch.nn.Module,
    name: str,
    kind: QuantizedName,
    where: str,
    *,
    gates: int = 1,
    columns: tuple[int, ...] | None = None,
) -> None:
    """Put a buffer with quantized weights in the place of the parameter ``name``.

    Args:
        where: the name of the layer, for messages.
        gates, columns: as for :func:`pyseq._packed.pack`.
    """
    weight = getattr(module, name)
    if is_quantized(weight):
        raise ValueError(f"module must not be quantized already, got {where or 'one that'} is")
    if name not in module._parameters:
        raise ValueError(f"{name} of {where or 'the module'} must be a plain parameter")
    packed = pack(weight, kind, gates=gates, columns=columns)
    delattr(module, name)
    module.register_buffer(name, packed)
