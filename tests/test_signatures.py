# SPDX-License-Identifier: Apache-2.0
"""What is written down more than once, for readers and type checkers, agrees."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import pyseq
from pyseq import fake, functional, reference

#: The operators of ``pyseq.functional`` that the reference specifies.
SPECIFIED = (
    "attend",
    "attend_history",
    "coverage_loss",
    "decode",
    "generate",
    "linear",
    "linear_cross_entropy",
    "predict_positions",
    "scan",
    "scan_both",
    "scheduled_inputs",
    "step",
)
STUBS = ast.parse((Path(pyseq.__file__).parent / "_C.pyi").read_text(encoding="utf-8"))
STUB_OF = {node.name: node for node in STUBS.body if isinstance(node, ast.FunctionDef)}
OPERATORS = sorted(
    name.removeprefix("pyseq::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("pyseq::") and not name.endswith("_reference")
)


def schema(name: str) -> dict[str, Any]:
    """The names of an operator's arguments, with their defaults."""
    arguments = getattr(torch.ops.pyseq, name).default._schema.arguments
    return {
        argument.name: argument.default_value if argument.has_default_value() else inspect._empty
        for argument in arguments
    }


@pytest.mark.parametrize("name", SPECIFIED)
def test_the_reference_takes_what_the_operator_takes(name: str) -> None:
    fused, plain = (inspect.signature(getattr(m, name)) for m in (functional, reference))
    assert str(fused.replace(return_annotation=None)) == str(plain.replace(return_annotation=None))


@pytest.mark.parametrize("name", [name for name in OPERATORS if name in STUB_OF])
def test_the_stub_is_the_schema(name: str) -> None:
    arguments = STUB_OF[name].args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    defaults = [ast.literal_eval(default) for default in arguments.defaults]
    first = len(names) - len(defaults)
    stub = dict.fromkeys(names[:first], inspect._empty) | dict(
        zip(names[first:], defaults, strict=True)
    )
    assert list(stub.items()) == list(schema(name).items())


@pytest.mark.parametrize("name", [name for name in OPERATORS if hasattr(fake, f"_{name}")])
def test_the_fake_kernel_is_the_schema(name: str) -> None:
    parameters = inspect.signature(getattr(fake, f"_{name}")).parameters
    assert {key: each.default for key, each in parameters.items()} == schema(name)


def test_every_operator_has_a_fake_kernel() -> None:
    assert {name for name in OPERATORS if not hasattr(fake, f"_{name}")} == {"sigmoid", "tanh"}
