# SPDX-License-Identifier: Apache-2.0
"""The inputs, and the wrong inputs, with which torch tests its own recurrent modules."""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import sys
import types
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pyseq import nn

if importlib.util.find_spec("expecttest") is None:
    # torch's helpers name a base class for their own tests from it, and nothing else.
    stand_in: Any = types.ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase
    sys.modules["expecttest"] = stand_in
from torch.testing._internal import common_modules

CLASSES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
INFOS = {info.module_cls.__name__: info for info in common_modules.module_db}


@functools.cache
def samples(name: str) -> list[Any]:
    """What torch feeds to the class of this name; with packed sequences where it can."""
    torch.manual_seed(0)
    info = INFOS[name]
    packed = {"with_packed_sequence": True} if name in ("RNN", "GRU") else {}
    return list(
        info.module_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=True, training=True, **packed
        )
    )


def is_packed(sample: Any) -> bool:
    return isinstance(sample.forward_input.args[0], PackedSequence)


CASES = {
    f"{name}-{index}": (name, index) for name in CLASSES for index in range(len(samples(name)))
}


def twins(name: str, sample: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch's module and ours, from the same seed."""
    made = []
    for home in (torch.nn, nn):
        torch.manual_seed(1)
        given = sample.constructor_input
        made.append(getattr(home, name)(*given.args, **given.kwargs, dtype=torch.float64))
    return made[0], made[1]


def results(module: torch.nn.Module, *args: Any) -> dict[str, Tensor]:
    """The outputs (of a packed one its orders too), and the gradients of a weighted sum of them
    in all that may have one."""
    outputs = [leaf for leaf in tree_leaves(module(*args)) if leaf is not None]
    generator = torch.Generator().manual_seed(2)
    floating = [leaf for leaf in outputs if leaf.is_floating_point()]
    weights = [torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in floating]
    inputs = [*differentiable(args), *module.parameters()]
    grads = torch.autograd.grad(floating, inputs, weights)
    named = {f"output{i}": leaf.double() for i, leaf in enumerate(outputs)}
    return named | {f"grad{i}": grad for i, grad in enumerate(grads)}


def differentiable(args: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.requires_grad)


#: Those of one sequence alone, to which torch gives a reference.
ALONE = [key for key, (name, i) in CASES.items() if not is_packed(samples(name)[i])]
#: Those for what takes long: batch_first only transposes.
TIME_FIRST = [
    key
    for key, (name, i) in CASES.items()
    if not samples(name)[i].constructor_input.kwargs.get("batch_first")
]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, Any]:
    name, index = CASES[request.param]
    return name, samples(name)[index]


def test_results_and_gradients(case: tuple[str, Any]) -> None:
    name, sample = case
    theirs, ours = twins(name, sample)
    args = sample.forward_input.args
    assert_close(results(ours, *args), results(theirs, *args))
    assert type(ours(*args)[0]) is type(theirs(*args)[0])


@pytest.mark.parametrize("case", ALONE, indirect=True)
def test_rows_alone_and_in_a_batch(case: tuple[str, Any]) -> None:
    """Torch's own reference: one sequence is a batch of one."""
    name, sample = case
    args = sample.forward_input.args
    _, ours = twins(name, sample)
    expected = sample.reference_fn(ours, *args)
    actual = ours(*args)
    for left, right in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert_close({"y": left}, {"y": right})


def test_says_what_torch_says_of_itself(case: tuple[str, Any]) -> None:
    theirs, ours = twins(*case)
    assert repr(ours) == repr(theirs)


def test_saves_and_loads(case: tuple[str, Any]) -> None:
    name, sample = case
    _, ours = twins(name, sample)
    args = sample.forward_input.args
    expected = results(ours, *args)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    assert_close(results(torch.load(file, weights_only=False), *args), expected)
    assert_close(results(copy.deepcopy(ours), *args), expected)


def _scattered(tensor: Tensor) -> Tensor:
    """The same numbers with gaps between them in memory, as a leaf."""
    if tensor.dim() == 0 or tensor.numel() < 2:
        return tensor
    gaps = torch.stack((tensor.detach(), torch.full_like(tensor, torch.nan)), -1)
    return gaps[..., 0].requires_grad_(tensor.requires_grad)


def test_memory_with_gaps(case: tuple[str, Any]) -> None:
    name, sample = case
    _, ours = twins(name, sample)
    args = sample.forward_input.args
    expected = results(ours, *args)
    leaves, spec = tree_flatten(args)
    floating = [
        _scattered(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        for leaf in leaves
    ]
    for module in (ours, copy.deepcopy(ours)):
        assert_close(results(module, *tree_unflatten(floating, spec)), expected)
        for parameter in module.parameters():
            parameter.data = _scattered(parameter.data)
    assert_close(results(ours, *tree_unflatten(floating, spec)), expected)


@pytest.mark.parametrize("order", [1, 2], ids=["grad", "gradgrad"])
@pytest.mark.parametrize("case", TIME_FIRST, indirect=True)
def test_gradients_by_finite_differences(case: tuple[str, Any], order: int) -> None:
    name, sample = case
    _, ours = twins(name, sample)
    args = sample.forward_input.args
    leaves, spec = tree_flatten(args)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    names = [key for key, _ in ours.named_parameters()]

    def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
        values = list(leaves)
        for place, value in zip(places, inputs, strict=False):
            values[place] = value
        weights = dict(zip(names, inputs[len(places) :], strict=True))
        result = torch.func.functional_call(ours, weights, tree_unflatten(values, spec))
        return tuple(
            leaf for leaf in tree_leaves(result) if leaf is not None and leaf.requires_grad
        )

    inputs = (*(leaves[place] for place in places), *ours.parameters())
    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    assert check(outputs, inputs, fast_mode=True)


@pytest.mark.parametrize("name", CLASSES)
def test_moves_between_dtypes_and_devices(name: str) -> None:
    sample = samples(name)[0]
    theirs, ours = twins(name, sample)
    args = sample.forward_input.args
    expected = results(ours, *args)
    weights = ours.state_dict()
    again = ours.float().to("meta")
    assert {weight.device.type for weight in again.parameters()} == {"meta"}
    again = again.to_empty(device="cpu").double()
    again.load_state_dict(theirs.state_dict())
    assert_close(results(again, *args), expected)
    assert weights.keys() == again.state_dict().keys()


@pytest.mark.parametrize("name", CLASSES)
def test_takes_device_and_dtype(name: str) -> None:
    sample = samples(name)[0].constructor_input
    made = getattr(nn, name)(*sample.args, **sample.kwargs, device="meta", dtype=torch.float16)
    assert {(w.device.type, w.dtype) for w in made.parameters()} == {("meta", torch.float16)}
    skipped = torch.nn.utils.skip_init(getattr(nn, name), *sample.args, **sample.kwargs)
    assert {weight.device.type for weight in skipped.parameters()} == {"cpu"}


def errors() -> list[Any]:
    found = []
    for name in CLASSES:
        info = INFOS[name]
        made = info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=False, training=True
        )
        found += [
            pytest.param(name, error, id=f"{name}-{index}") for index, error in enumerate(made)
        ]
    return found


@pytest.mark.parametrize(("name", "error"), errors())
def test_refuses_what_torch_refuses(name: str, error: Any) -> None:
    given, fed = error.module_error_input.constructor_input, error.module_error_input.forward_input
    made = getattr(nn, name)
    if error.error_on is common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(error.error_type, match=error.error_regex):
            made(*given.args, **given.kwargs)
        return
    module = made(*given.args, **{"dtype": torch.float64, **given.kwargs})
    with pytest.raises(error.error_type, match=error.error_regex):
        module(*fed.args, **fed.kwargs)
