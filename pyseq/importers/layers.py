# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers in the state of any module: torch.nn's, and those of haste."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import nn
from .._checks import read_json
from ..errors import CheckpointError, require
from ._layout import Weights, shapes_may_differ
from ._pickles import load_pickle

Layer = nn.RNN | nn.GRU | nn.LSTM | nn.IndRNN | nn.RNNCell | nn.GRUCell | nn.LSTMCell

_KINDS: dict[str, type[Layer]] = {
    kind.__name__: kind
    for kind in (nn.RNN, nn.GRU, nn.LSTM, nn.IndRNN, nn.RNNCell, nn.GRUCell, nn.LSTMCell)
}

# The names by which a layer is found.
_TELLING = ("weight_ih_l0", "weight_ih", "recurrent_kernel", "recurrent_scale")

# Where a file of layers says what they are.
_METADATA = "pyseq.layers"

# Where each gate of torch.nn is among haste's: i, g, f, o and z, r, g.
_HASTE_GATES: dict[str, tuple[int, ...]] = {"lstm": (0, 2, 1, 3), "gru": (1, 0, 2)}


class _Plan(NamedTuple):
    """A layer before it is built: the class in :mod:`pyseq.nn`, its arguments, its state."""

    kind: str
    arguments: dict[str, Any]
    tensors: dict[str, Tensor]


def read_layers(
    source: str | Path | Mapping[str, Any], *, nonlinearity: str = "tanh", zoneout: float = 0.0
) -> dict[str, Layer]:
    """Every recurrent layer or cell in a state dictionary, as one of :mod:`pyseq.nn`.

    Layers of torch.nn are found by ``weight_ih_l0``, its cells by ``weight_ih``, layers of haste by
    ``recurrent_kernel``; the rest of the dictionary is left alone.

    Args:
        source: the dictionary, or a file that ``torch.save`` wrote it to.
        nonlinearity: of layers of torch.nn without gates, which their weights do not tell.
        zoneout: of haste's layers, which weights do not tell either. In evaluation it is the share
            of its old value that each unit keeps in a step, so that the output depends on it.

    Returns:
        The layers by the name of their module, ``""`` for the dictionary of a layer itself, in
        eval mode.

    Raises:
        ValueError: ``nonlinearity`` or ``zoneout`` is out of its range.
        CheckpointError: there is no such layer, or one that pyseq does not have.
        OSError: the file cannot be read.
    """
    path = Path("state dictionary" if isinstance(source, Mapping) else source)
    plans = _plans(source, path, nonlinearity=nonlinearity, zoneout=zoneout)
    return {name: _build(plan, path) for name, plan in plans.items()}


def convert_layers(
    source: str | Path, out: str | Path, *, nonlinearity: str = "tanh", zoneout: float = 0.0
) -> list[str]:
    """Read layers like :func:`read_layers` and write them to a file for :func:`load_layers`.

    Args:
        source, nonlinearity, zoneout: as there.
        out: the file, of safetensors; one that is there is replaced as a whole.

    Returns:
        A line about each layer: its name, and its constructor in :mod:`pyseq.nn`.

    Raises:
        As :func:`read_layers`; OSError also if the file cannot be written.
    """
    path, target = Path(source), Path(out)
    plans = _plans(source, path, nonlinearity=nonlinearity, zoneout=zoneout)
    for plan in plans.values():
        _build(plan, path)  # so that nothing is written that cannot be loaded
    records = {name: [plan.kind, plan.arguments] for name, plan in plans.items()}
    tensors = {
        f"{name}.{key}": value.contiguous()
        for name, plan in plans.items()
        for key, value in plan.tensors.items()
    }
    data = require("safetensors.torch", extra="train").save(
        tensors, metadata={_METADATA: json.dumps(records)}
    )
    writing = target.with_name(f".{target.name}.writing")
    try:
        with open(writing, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(writing, target)
    except OSError:
        writing.unlink(missing_ok=True)
        raise
    return [
        f"{name or 'the layer'}: {plan.kind}({', '.join(map(_shown, plan.arguments.items()))})"
        for name, plan in plans.items()
    ]


def _shown(argument: tuple[str, Any]) -> str:
    return f"{argument[0]}={argument[1]!r}"


def load_layers(path: str | Path) -> dict[str, Layer]:
    """The layers that :func:`convert_layers` wrote, as :func:`read_layers` gives them.

    Raises:
        CheckpointError: the file is of another kind, or damaged.
        OSError: the file cannot be read.
    """
    path = Path(path)
    path.stat()  # safetensors' own error for a missing file has no name in it
    safetensors = require("safetensors", extra="train")
    try:
        with safetensors.safe_open(path, framework="pt") as stream:
            records = read_json((stream.metadata() or {})[_METADATA])
            keys = stream.keys()
            plans = {
                name: _Plan(
                    kind,
                    dict(arguments),
                    {
                        key.removeprefix(f"{name}."): stream.get_tensor(key)
                        for key in keys
                        if key.rpartition(".")[0] == name
                    },
                )
                for name, (kind, arguments) in records.items()
            }
        return {name: _build(plan, path) for name, plan in plans.items()}
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a file of layers: {error}") from error


def _plans(
    source: str | Path | Mapping[str, Any], path: Path, *, nonlinearity: str, zoneout: float
) -> dict[str, _Plan]:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity must be tanh or relu, got {nonlinearity!r}")
    if not 0 <= zoneout <= 1:
        raise ValueError(f"zoneout must be a probability, got {zoneout!r}")
    content: Any = source if isinstance(source, Mapping) else load_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: must be a state dictionary, got {type(content).__name__}")
    plans: dict[str, _Plan] = {}
    for name in content:
        prefix, _, last = str(name).rpartition(".")
        if last not in _TELLING or prefix in plans:
            continue
        weights = Weights(_below(content, prefix), path=path, layout="torch.nn or haste")
        with shapes_may_differ(path):
            if last == "weight_ih_l0":
                plans[prefix] = _torch_layer(weights, nonlinearity)
            elif last == "weight_ih":
                plans[prefix] = _torch_cell(weights, nonlinearity)
            else:
                plans[prefix] = _haste_layer(weights, zoneout)
            weights.finish()
    if not plans:
        names = ", ".join(map(str, content)) or "nothing"
        raise CheckpointError(f"{path}: has no recurrent layer of torch.nn or haste, but: {names}")
    return plans


def _build(plan: _Plan, path: Path) -> Layer:
    """The layer of a plan, in eval mode."""
    if plan.kind not in _KINDS:
        raise CheckpointError(
            f"{path}: a layer must be one of {', '.join(_KINDS)}, got {plan.kind}"
        )
    make: Any = _KINDS[plan.kind]
    layers = plan.arguments.get("num_layers", 1)
    if not isinstance(layers, int) or layers > len(plan.tensors):
        raise CheckpointError(f"{path}: it has {len(plan.tensors)} tensors for {layers} layers")
    try:
        with torch.device("meta"):
            expected = make(**plan.arguments).state_dict()
        for name in sorted(expected.keys() ^ plan.tensors.keys()):
            raise ValueError(f"{name} is {'missing' if name in expected else 'no weight of it'}")
        for name, tensor in expected.items():
            if tensor.shape != plan.tensors[name].shape:
                raise ValueError(
                    f"size mismatch for {name}: expected {tuple(tensor.shape)}, got "
                    f"{tuple(plan.tensors[name].shape)}"
                )
        layer: Layer = make(**plan.arguments)
        layer.load_state_dict(plan.tensors)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: cannot be read as {plan.kind}: {reason}; its weights are: "
            f"{', '.join(plan.tensors)}"
        ) from error
    layer.eval()
    return layer


def _below(content: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What belongs to a module itself, by its name there."""
    dot = f"{prefix}." if prefix else ""
    named = ((str(name), value) for name, value in content.items())
    own = {name[len(dot) :]: value for name, value in named if name.startswith(dot)}
    return {name: value for name, value in own.items() if "." not in name}


def _torch_layer(weights: Weights, nonlinearity: str) -> _Plan:
    weights.require("weight_ih_l0", "weight_hh_l0")
    tensors = {name: weights.take(name) for name in weights.names if _is_layers(name)}
    state_size = tensors["weight_hh_l0"].shape[1]
    proj_size = state_size if "weight_hr_l0" in tensors else 0
    hidden_size = tensors["weight_hr_l0"].shape[1] if proj_size else state_size
    num_layers = 1 + max(int(name.split("_l")[-1].split("_")[0]) for name in tensors)
    kind, own = _torch_kind(weights, tensors["weight_ih_l0"], hidden_size, nonlinearity)
    if proj_size and kind == "LSTM":
        own["proj_size"] = proj_size
    arguments = {
        "input_size": tensors["weight_ih_l0"].shape[1],
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "bias": "bias_ih_l0" in tensors,
        "bidirectional": "weight_ih_l0_reverse" in tensors,
        **own,
    }
    return _Plan(kind, arguments, tensors)


def _torch_cell(weights: Weights, nonlinearity: str) -> _Plan:
    """One step of ``RNNCell``, ``GRUCell`` or ``LSTMCell``."""
    weights.require("weight_ih", "weight_hh")
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    tensors = {name: weights.take(name) for name in names if name in weights}
    hidden_size = tensors["weight_hh"].shape[1]
    kind, own = _torch_kind(weights, tensors["weight_ih"], hidden_size, nonlinearity)
    arguments = {
        "input_size": tensors["weight_ih"].shape[1],
        "hidden_size": hidden_size,
        "bias": "bias_ih" in tensors,
        **own,
    }
    return _Plan(f"{kind}Cell", arguments, tensors)


def _torch_kind(
    weights: Weights, w_ih: Tensor, hidden_size: int, nonlinearity: str
) -> tuple[str, dict[str, Any]]:
    """Which class has so many rows for its units, and what else that one is told."""
    rows = w_ih.shape[0]
    if rows == 4 * hidden_size:
        return "LSTM", {}
    if rows == 3 * hidden_size:
        return "GRU", {}
    if rows == hidden_size:
        return "RNN", {"nonlinearity": nonlinearity}
    raise weights.refuse(f"{rows} rows are no gates of {hidden_size} units")


def _is_layers(name: str) -> bool:
    kind, _, _ = name.partition("_l")
    return kind in ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")


def _haste_layer(weights: Weights, zoneout: float) -> _Plan:
    """Kernels are (I, G*H) and (H, G*H), of an IndRNN (H,); a GRU has two biases, others one.

    Layer normalisation has the gains (2, G*H) of input and recurrent part, and in an LSTM gain
    and bias (H,) of c.
    """
    if "recurrent_scale" in weights:
        kernel, scale, bias = (weights.take(n) for n in ("kernel", "recurrent_scale", "bias"))
        return _Plan(
            "IndRNN",
            {
                "input_size": len(kernel),
                "hidden_size": len(scale),
                "nonlinearity": "tanh",
                "zoneout_h": zoneout,
            },
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
    normed = "gamma" in weights
    if columns == 4 * hidden_size:
        kind, gates, recurrent_bias = "LSTM", _HASTE_GATES["lstm"], torch.zeros_like(bias)
    elif columns == 3 * hidden_size:
        kind, gates, recurrent_bias = "GRU", _HASTE_GATES["gru"], weights.take("recurrent_bias")
    else:
        raise weights.refuse(f"{columns} columns are no gates of {hidden_size} units")

    def turned(each: Tensor) -> Tensor:
        parts = each.chunk(len(gates), -1)
        return torch.cat([parts[gate] for gate in gates], -1).t()

    tensors = {"weight_ih_l0": turned(kernel), "weight_hh_l0": turned(recurrent)}
    tensors |= {"bias_ih_l0": turned(bias), "bias_hh_l0": turned(recurrent_bias)}
    if normed:
        of_input, of_state = weights.take("gamma")
        tensors |= {"gain_ih_l0": turned(of_input), "gain_hh_l0": turned(of_state)}
        if columns == 4 * hidden_size:
            tensors |= {"gain_c_l0": weights.take("gamma_h"), "bias_c_l0": weights.take("beta_h")}
    arguments = {
        "input_size": len(kernel),
        "hidden_size": hidden_size,
        "zoneout_h": zoneout,
        "layer_norm": normed,
    }
    return _Plan(kind, arguments, tensors)
