# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers in the state of any module: torch.nn's, and those of haste."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import nn
from ..errors import CheckpointError
from ._layout import Weights, shapes_may_differ
from ._pickles import load_pickle

Layer = nn.RNN | nn.GRU | nn.LSTM | nn.IndRNN

# Where each gate of torch.nn is among haste's: i, g, f, o and z, r, g.
_HASTE_GATES: dict[str, tuple[int, ...]] = {"lstm": (0, 2, 1, 3), "gru": (1, 0, 2)}


def read_layers(
    source: str | Path | Mapping[str, Any], *, nonlinearity: str = "tanh"
) -> dict[str, Layer]:
    """Every recurrent layer in a state dictionary, as a layer of :mod:`pyseq.nn`.

    Layers of torch.nn are found by ``weight_ih_l0``, those of haste by ``recurrent_kernel``; the
    rest of the dictionary is left alone.

    Args:
        source: the dictionary, or a file that ``torch.save`` wrote it to.
        nonlinearity: of layers without gates, which their weights do not tell.

    Returns:
        The layers by the name of their module, ``""`` for the dictionary of a layer itself, in
        eval mode.

    Raises:
        CheckpointError: there is no such layer, or one that pyseq does not have.
        OSError: the file cannot be read.
    """
    path = Path("state dictionary" if isinstance(source, Mapping) else source)
    content: Any = source if isinstance(source, Mapping) else load_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: must be a state dictionary, got {type(content).__name__}")
    layers: dict[str, Layer] = {}
    for name in content:
        prefix, _, last = str(name).rpartition(".")
        if last in ("weight_ih_l0", "recurrent_kernel", "recurrent_scale") and prefix not in layers:
            weights = Weights(_below(content, prefix), path=path, layout="torch.nn or haste")
            with shapes_may_differ(path):
                if last == "weight_ih_l0":
                    layers[prefix] = _torch_layer(weights, nonlinearity)
                else:
                    layers[prefix] = _haste_layer(weights)
    if not layers:
        names = ", ".join(map(str, content)) or "nothing"
        raise CheckpointError(f"{path}: has no recurrent layer of torch.nn or haste, but: {names}")
    return layers


def _below(content: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What belongs to a module itself, by its name there."""
    dot = f"{prefix}." if prefix else ""
    own = {name[len(dot) :]: value for name, value in content.items() if name.startswith(dot)}
    return {name: value for name, value in own.items() if "." not in name}


def _torch_layer(weights: Weights, nonlinearity: str) -> Layer:
    tensors = {name: weights.take(name) for name in weights.names if _is_layers(name)}
    rows = tensors["weight_ih_l0"].shape[0]
    state_size = tensors["weight_hh_l0"].shape[1]
    proj_size = state_size if "weight_hr_l0" in tensors else 0
    hidden_size = tensors["weight_hr_l0"].shape[1] if proj_size else state_size
    num_layers = 1 + max(int(name.split("_l")[-1].split("_")[0]) for name in tensors)
    if num_layers > len(tensors):
        raise weights.refuse(f"it has {len(tensors)} tensors for {num_layers} layers")
    options: dict[str, Any] = {
        "num_layers": num_layers,
        "bias": "bias_ih_l0" in tensors,
        "bidirectional": "weight_ih_l0_reverse" in tensors,
    }
    sizes = tensors["weight_ih_l0"].shape[1], hidden_size
    layer: Layer
    if rows == 4 * hidden_size:
        layer = nn.LSTM(*sizes, proj_size=proj_size, **options)
    elif rows == 3 * hidden_size:
        layer = nn.GRU(*sizes, **options)
    elif rows == hidden_size:
        layer = nn.RNN(*sizes, nonlinearity=nonlinearity, **options)
    else:
        raise weights.refuse(f"{rows} rows are no gates of {hidden_size} units")
    return _load(weights, layer, tensors)


def _is_layers(name: str) -> bool:
    kind, _, _ = name.partition("_l")
    return kind in ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")


def _haste_layer(weights: Weights) -> Layer:
    """Kernels are (I, G*H) and (H, G*H), of an IndRNN (H,); a GRU has two biases, others one."""
    for name in ("gamma", "gamma_h"):
        if name in weights:
            raise weights.refuse(
                f"pyseq reads no layers of haste with layer normalisation ({name})"
            )
    if "recurrent_scale" in weights:
        kernel, scale, bias = (weights.take(n) for n in ("kernel", "recurrent_scale", "bias"))
        return _load(
            weights,
            nn.IndRNN(len(kernel), len(scale), nonlinearity="tanh"),
            {
                "weight_ih_l0": kernel.t(),
                "weight_hh_l0": scale,
                "bias_ih_l0": bias,
                "bias_hh_l0": torch.zeros_like(bias),
            },
        )
    recurrent = weights.take("recurrent_kernel")
    hidden_size, columns = recurrent.shape
    kernel, bias = weights.take("kernel"), weights.take("bias")
    layer: Layer
    if columns == 4 * hidden_size:
        layer, gates = nn.LSTM(len(kernel), hidden_size), _HASTE_GATES["lstm"]
        recurrent_bias = torch.zeros_like(bias)
    elif columns == 3 * hidden_size:
        layer, gates = nn.GRU(len(kernel), hidden_size), _HASTE_GATES["gru"]
        recurrent_bias = weights.take("recurrent_bias")
    else:
        raise weights.refuse(f"{columns} columns are no gates of {hidden_size} units")

    def turned(each: Tensor) -> Tensor:
        parts = each.chunk(len(gates), -1)
        return torch.cat([parts[gate] for gate in gates], -1).t()

    tensors = {"weight_ih_l0": turned(kernel), "weight_hh_l0": turned(recurrent)}
    tensors |= {"bias_ih_l0": turned(bias), "bias_hh_l0": turned(recurrent_bias)}
    return _load(weights, layer, tensors)


def _load(weights: Weights, layer: Layer, tensors: Mapping[str, Tensor]) -> Layer:
    weights.finish()
    try:
        layer.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise weights.refuse(" ".join(str(error).split())) from error
    layer.eval()
    return layer
