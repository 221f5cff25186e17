# SPDX-License-Identifier: Apache-2.0
"""The layers of torch.nn as ONNX Runtime runs them, on the same weights and threads.

Optional: neither onnx nor onnxruntime is imported before it is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .workloads import Implementation

#: Where the gates of ONNX are among torch's: for LSTM i, o, f, c in i, f, g, o; for GRU z, r, h
#: in r, z, n.
_GATES = {"rnn": (0,), "gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}


def installed() -> bool:
    """Whether onnx, which makes the model, and onnxruntime, which runs it, can be imported."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


def layer(cell: str, module: torch.nn.RNNBase, x: Tensor) -> Implementation:
    """One layer in one direction over x (T, B, I), from a state of zeros."""
    steps, batch, _ = x.shape
    output = torch.empty(steps, 1, batch, module.hidden_size)
    session = _session(cell, module, steps=steps, batch=batch, state=False)
    binding = session.io_binding()
    _bind(binding.bind_input, "X", x.detach())
    _bind(binding.bind_output, "Y", output)

    def run() -> dict[str, Tensor]:
        session.run_with_iobinding(binding)
        return {"output": output.squeeze(1)}

    return run


def stream(cell: str, module: torch.nn.RNNBase, xs: Sequence[Tensor]) -> Implementation:
    """The same called step by step, x of (1, 1, I), with the state going from call to call."""
    session = _session(cell, module, steps=1, batch=1, state=True)
    names = _state_names(cell)
    # Two states, which take turns at being read and being written; nothing is copied.
    states = [[torch.zeros(1, 1, module.hidden_size) for _ in names] for _ in range(2)]
    outputs = torch.empty(len(xs), 1, 1, module.hidden_size)
    bindings = []
    for step, x in enumerate(xs):
        binding = session.io_binding()
        _bind(binding.bind_input, "X", x.detach())
        _bind(binding.bind_output, "Y", outputs[step].unsqueeze(1))
        for name, before, after in zip(names, states[step % 2], states[1 - step % 2], strict=True):
            _bind(binding.bind_input, f"initial_{name}", before)
            _bind(binding.bind_output, f"Y_{name}", after)
        bindings.append(binding)

    def run() -> dict[str, Tensor]:
        for part in states[0]:
            part.zero_()
        for binding in bindings:
            session.run_with_iobinding(binding)
        return {"output": outputs.squeeze(1)}

    return run


def _state_names(cell: str) -> tuple[str, ...]:
    return ("h", "c") if cell == "lstm" else ("h",)


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    """Let a session read or write a float32 tensor, which must stay alive, where it is."""
    bind(name, "cpu", 0, 1, tuple(tensor.shape), tensor.data_ptr())  # 1 is FLOAT


def _session(cell: str, module: torch.nn.RNNBase, *, steps: int, batch: int, state: bool) -> Any:
    """A session of one node with the weights of a one-layer module of torch.nn."""
    import onnxruntime
    from onnx import TensorProto, checker, helper, numpy_helper

    hidden, inputs = module.hidden_size, module.input_size
    order = torch.cat([torch.arange(hidden) + gate * hidden for gate in _GATES[cell]])
    weights = {name: value.detach()[order] for name, value in module.named_parameters()}
    initializers = {
        "W": weights["weight_ih_l0"],
        "R": weights["weight_hh_l0"],
        "B": torch.cat((weights["bias_ih_l0"], weights["bias_hh_l0"])),
    }
    shapes = {
        f"{kind}_{n}": (1, batch, hidden) for n in _state_names(cell) for kind in ("initial", "Y")
    }
    read = [name for name in shapes if name.startswith("initial")] if state else []
    written = [name for name in shapes if name.startswith("Y")] if state else []

    def value(name: str, shape: tuple[int, ...]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    attributes: dict[str, Any] = {"hidden_size": hidden}
    if cell == "gru":
        attributes["linear_before_reset"] = 1  # the reset gate after the product, as in torch
    node = helper.make_node(
        cell.upper(), ["X", "W", "R", "B", "", *read], ["Y", *written], **attributes
    )
    graph = helper.make_graph(
        [node],
        cell,
        [value("X", (steps, batch, inputs)), *(value(name, shapes[name]) for name in read)],
        [value("Y", (steps, 1, batch, hidden)), *(value(name, shapes[name]) for name in written)],
        [
            numpy_helper.from_array(tensor.unsqueeze(0).contiguous().numpy(), name)
            for name, tensor in initializers.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its threads spin while a run lasts, but not on into the turns of the others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
