# SPDX-License-Identifier: Apache-2.0
"""Modules with short weights, for inference.

Where one row at a time is computed, a step takes as long as reading the weights does; with a
quarter or half of the bytes it is that much faster.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

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
    Score,
    SLSTMCell,
)
from .types import GATES
from .types import kind as type_name

__all__ = ["quantize"]

M = TypeVar("M", bound=torch.nn.Module)

#: Modules whose layers are scans.
_SCANS = (RNN, GRU, LSTM, RNNCell, GRUCell, LSTMCell)
_Scan = RNN | GRU | LSTM | RNNCell | GRUCell | LSTMCell
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

    The copy is in eval mode; to train it, to ask for a gradient through its layers, or to draw
    their weights anew (``reset_parameters``) is an error. Its packed weights fit the instruction
    set that they were made for: save the module itself and quantize what is loaded.

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
    # Before the copy, which torch refuses to make of a pruned weight.
    for matrix in _matrices(module):
        _check_plain(matrix)
    result = copy.deepcopy(module).eval().requires_grad_(False)
    found = list(_matrices(result))
    for matrix in found:
        owner, name = matrix.owner, matrix.name
        packed = pack(getattr(owner, name), weights, gates=matrix.gates, columns=matrix.columns)
        delattr(owner, name)
        owner.register_buffer(name, packed)
        matrix.layer._quantized = weights
        if isinstance(owner, Score):
            owner._quantized = weights
    if not found:
        raise ValueError(
            "module must hold a recurrent layer of pyseq.nn to be quantized, got "
            f"{type(module).__name__} without one"
        )
    return result


class _Matrix(NamedTuple):
    """A matrix that is to be quantized."""

    layer: _Scan | AttentionDecoder
    where: str  # the name of the layer, for messages
    owner: torch.nn.Module  # the layer, or a part of it
    name: str  # in the owner
    gates: int = 1  # as for :func:`pyseq._packed.pack`
    columns: tuple[int, ...] | None = None  # likewise


def _matrices(module: torch.nn.Module) -> Iterator[_Matrix]:
    """The matrices of all recurrent layers in ``module``."""
    for name, layer in module.named_modules():
        where = name or "the module"
        if isinstance(layer, _SCANS):
            yield from _matrices_of_scan(layer, where)
        elif isinstance(layer, AttentionDecoder):
            yield from _matrices_of_decoder(layer, where)
        elif isinstance(layer, _NOT_QUANTIZED):
            raise ValueError(f"{type(layer).__name__} cannot be quantized, got one in {where}")


def _matrices_of_scan(layer: _Scan, where: str) -> Iterator[_Matrix]:
    if not getattr(layer, "reset_after", True):
        raise ValueError(f"a GRU to be quantized must have reset_after=True, got False in {where}")
    for name in layer.weight_names():
        gates = 1 if name.startswith("weight_hr") else GATES[layer.cell]
        yield _Matrix(layer, where, layer, name, gates)


def _matrices_of_decoder(decoder: AttentionDecoder, where: str) -> Iterator[_Matrix]:
    gates, hidden = GATES[decoder.cell], decoder.hidden_size
    for number in range(decoder.num_layers):
        fed = number == 0 and decoder.input_feeding
        columns = (decoder.input_size, decoder.fed_size) if fed else None
        yield _Matrix(decoder, where, decoder, f"weight_ih_l{number}", gates, columns)
        yield _Matrix(decoder, where, decoder, f"weight_hh_l{number}", gates)
    if decoder.score is not None and decoder.combine is not None:
        columns = (decoder.memory_size, hidden)
        yield _Matrix(decoder, where, decoder.combine, "weight", columns=columns)
        if decoder.score.name == "concat":
            yield _Matrix(decoder, where, decoder.score, "weight_query")


def _check_plain(matrix: _Matrix) -> None:
    """Raise a ValueError unless the matrix is a parameter."""
    if matrix.name in matrix.owner._parameters:
        return
    if is_quantized(getattr(matrix.owner, matrix.name)):
        raise ValueError(f"module must not be quantized already, got {matrix.where}, which is")
    raise ValueError(f"{matrix.name} of {matrix.where} must be a plain parameter")
