# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the decoder, run on the CPU through the shim, against the reference."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from cuda_decode import Call, Case, Inputs, inputs_of
from cuda_shim import build
from tolerances import STORED, assert_close, assert_same_bits
from torch import Tensor

from pyseq import reference

CASES = [
    Case(),
    Case(cell="gru", ragged=True),
    Case(cell="rnn_tanh", feeding=False),
    Case(cell="rnn_relu", fed="context"),
    Case(score="scaled_dot", ragged=True),
    Case(score="general", heads=2, hidden=8),
    Case(score="location", cell="gru"),
    Case(score="concat", layers=2, dropout=True),
    Case(score="concat", cell="gru", layers=2, dropout=True, ragged=True),
    Case(score="concat", projects=False),
    Case(score="concat", order="bahdanau", fed="context", ragged=True),
    Case(cell="gru", order="bahdanau", fed="context"),
    Case(score="concat", history="cumulative", ragged=True),
    Case(score="concat", history="previous", order="bahdanau", fed="context", heads=2),
    Case(window=1, ragged=True),
    Case(window=2, predicted=True, source=9, ragged=True),
    Case(score="concat", window=2, predicted=True, heads=2, cell="gru"),
    Case(score="general", window=1, order="bahdanau", fed="context"),
    Case(steps=1, batch=1, hidden=1, source=1, memory=1, tiles=1, groups=1),
    Case(steps=2, batch=11, hidden=13, source=7, tiles=3, groups=1),
    Case(batch=2, hidden=3, tiles=5, groups=2, cell="gru"),
    Case(score="concat", layers=2, ragged=True, dtype=torch.float32),
]
#: What is different where numbers are short: what is carried, and in which type.
SHORT = [
    Case(score="concat", history="cumulative", ragged=True, layers=2, dropout=True),
    Case(cell="gru", window=2, predicted=True, source=9, heads=2, hidden=8),
    Case(order="bahdanau", fed="context"),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("decode_kernels", tmp_path_factory.mktemp("cuda_decode"))


def expected(case: Case, inputs: Inputs, d_results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results and gradients of the reference in float64."""
    leaves = {name: leaf.double().requires_grad_() for name, leaf in inputs.leaves.items()}
    layers = [leaves[f"layers{i}"] for i in range(len(inputs.layers))]
    named = {name: leaves[name] for name in inputs.named}
    h_0, c_0, past = named.pop("h_0"), named.pop("c_0", None), named.pop("past", None)
    result = reference.decode(
        named.pop("x"),
        [tuple(layers[4 * i : 4 * i + 4]) for i in range(case.layers)],
        named.pop("keys", None),
        named.pop("memory"),
        named.pop("combine"),
        cell=case.cell,
        score=case.score,
        state=(h_0 if c_0 is None else (h_0, c_0), named.pop("feed", None), (inputs.step, past)),
        lengths=inputs.lengths,
        order=case.order,
        input_feeding=case.feeding,
        feed=case.fed,
        heads=case.heads,
        window=case.window or None,
        history=case.history,
        dropout_masks=None if inputs.masks is None else inputs.masks.double(),
        need_weights=True,
        **named,
    )
    hidden, feed_n, attention = result.state
    assert result.weights is not None
    results = {"output": result.output, "weights": result.weights}
    results["h_n"] = hidden if isinstance(hidden, Tensor) else hidden[0]
    if not isinstance(hidden, Tensor):
        results["c_n"] = hidden[1]
    results["feed_n"] = feed_n
    if attention is not None and attention.weights is not None:
        results["past_n"] = attention.weights
    gradients = torch.autograd.grad(
        list(results.values()),
        list(leaves.values()),
        [d_results[name].double() for name in results],
        materialize_grads=True,
    )
    values = {name: value.detach() for name, value in results.items()}
    return values | {f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}


def result_gradients(results: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        name: torch.randn(value.shape, dtype=torch.float64).to(value.dtype)
        for name, value in results.items()
    }


def compare(kernels: ctypes.CDLL, case: Case) -> None:
    """Check the kernels against the reference, and that no schedule changes a bit."""
    inputs = inputs_of(case)
    found: list[dict[str, Tensor]] = []
    for seed in (1, 2):
        kernels.shim_seed(seed)
        call = Call(kernels, case, inputs, save=True)
        results = {name: value.clone() for name, value in call.forward().items()}
        d_results = result_gradients(results)
        found.append(results | call.backward(d_results))
    assert_same_bits(found[1], found[0])
    # What is carried in float32 comes of what was rounded, too.
    rounded = {name: value.to(case.dtype) for name, value in found[0].items()}
    assert_close(rounded, expected(case, inputs, d_results), STORED)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_give_the_references_values_and_gradients(kernels: ctypes.CDLL, case: Case) -> None:
    compare(kernels, case)


@pytest.mark.parametrize("case", [*CASES[1::2], CASES[2], CASES[12]], ids=str)
def test_launches_of_every_step_give_the_same(kernels: ctypes.CDLL, case: Case) -> None:
    compare(kernels, replace(case, tiles=0))


@pytest.mark.parametrize("tiles", [2, 0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_short_numbers_are_added_up_in_float32(
    kernels: ctypes.CDLL, case: Case, dtype: torch.dtype, tiles: int
) -> None:
    compare(kernels, replace(case, dtype=dtype, tiles=tiles))


@pytest.mark.parametrize("tiles", [2, 0])
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_nothing_is_kept_without_gradients(kernels: ctypes.CDLL, case: Case, tiles: int) -> None:
    case = replace(case, tiles=tiles)
    inputs = inputs_of(case)
    kernels.shim_seed(3)
    kept = Call(kernels, case, inputs, save=True).forward()
    assert_same_bits(Call(kernels, case, inputs, save=False).forward(), kept)
