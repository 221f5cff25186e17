# SPDX-License-Identifier: Apache-2.0
"""The fused operators against the reference: values, gradients, refusals, registration."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from operator_cases import (
    CELLS,
    DTYPES,
    IGNORED,
    AttendCase,
    Call,
    Case,
    DecodeCase,
    LinearCrossEntropyCase,
    ScanCase,
    attend_cases,
    attentive_cases,
    changed,
    decode_cases,
    differentiable,
    expected_of,
    in_double,
    leaves,
    loss_cases,
    op_of,
    outputs_of,
    poisoned,
    run,
    scan_cases,
    small_cases,
    sum_of,
    tracked,
)
from tolerances import assert_close, assert_same_bits
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyseq import _C, functional, reference
from pyseq.transforms import REFERENCES


def by_id(cases: Iterable[Case]) -> list[Any]:
    """The cases as parameters of a test, named by their ids."""
    return [pytest.param(case, id=f"{op_of(case)}-{case.id}") for case in cases]


#: One call of each operator over sequences with everything in it.
SEQUENCES: tuple[ScanCase | AttendCase | DecodeCase, ...] = (
    ScanCase(projection=4, lengths="holes", resets="random"),
    ScanCase(cell="gru", lengths="ragged", reverse=True),
    ScanCase(lengths="ragged", resets="random", keep_every=2),
    ScanCase(
        projection=4,
        lengths="holes",
        resets="random",
        mask=True,
        zoneout="steps",
        reset_state="one",
    ),
    ScanCase(
        cell="gru",
        lengths="ragged",
        resets="random",
        reverse=True,
        keep_every=2,
        mask=True,
        zoneout="one",
        reset_state="rows",
    ),
    ScanCase(lengths="holes", resets="random", mask=True, zoneout="one", layer_norm=True),
    ScanCase(cell="gru", lengths="ragged", reverse=True, keep_every=2, layer_norm=True),
    AttendCase(score="general", lengths="holes", need_weights=True),
    AttendCase(score="concat", lengths="ragged", need_weights=True),
    AttendCase(score="location", lengths="holes", heads=2, need_weights=True),
    AttendCase(lengths="holes", window=2, positions=True, heads=2, need_weights=True),
    AttendCase(lengths="holes", window=1, step=True, heads=2, need_weights=True),
    DecodeCase(score="concat", layers=2, lengths="holes", dropout=True, need_weights=True),
    DecodeCase(cell="gru", score="general", layers=2, lengths="ragged", need_weights=True),
    DecodeCase(
        score="concat",
        lengths="holes",
        heads=2,
        window=2,
        predict=True,
        history="cumulative",
        order="bahdanau",
        feed="context",
        need_weights=True,
    ),
)
#: The same and the other operators, for what has nothing to do with sizes.
FULL: tuple[Case, ...] = (
    *SEQUENCES,
    LinearCrossEntropyCase(ignored="some", label_smoothing=0.1),
)
#: Large enough for both threads and for every part of the tiling.
LARGE: tuple[ScanCase | AttendCase | DecodeCase, ...] = (
    ScanCase(cell="lstm", sizes=(9, 37, 20, 130), lengths="ragged"),
    ScanCase(cell="gru", sizes=(9, 2, 20, 200), lengths="ragged", reverse=True),
    ScanCase(sizes=(9, 37, 20, 130), mask=True, zoneout="steps"),
    ScanCase(cell="indrnn_tanh", sizes=(9, 37, 20, 130), mask=True, keep_every=4),
    ScanCase(cell="gru_reset_before", sizes=(9, 37, 20, 130), lengths="ragged", mask=True),
    ScanCase(sizes=(9, 37, 20, 130), lengths="ragged", layer_norm=True),
    ScanCase(cell="gru", sizes=(9, 2, 20, 200), reverse=True, layer_norm=True),
    AttendCase(score="dot", sizes=(40, 50, 9, 70, 90, 70), lengths="ragged", need_weights=True),
    AttendCase(score="concat", sizes=(40, 50, 9, 70, 90, 30), lengths="ragged"),
    AttendCase(score="concat", sizes=(40, 50, 9, 35, 45, 15), heads=2, window=9, positions=True),
    DecodeCase(
        score="dot", sizes=(7, 30, 18, 20, 130, 130, 90), lengths="ragged", need_weights=True
    ),
    DecodeCase(cell="gru", score="concat", sizes=(7, 30, 2, 20, 200, 64, 90), layers=2),
    DecodeCase(
        score="concat",
        sizes=(7, 30, 3, 20, 64, 24, 40),
        lengths="ragged",
        heads=2,
        window=6,
        predict=True,
        history="previous",
    ),
    DecodeCase(
        score="concat",
        sizes=(7, 30, 2, 20, 200, 64, 90),
        order="bahdanau",
        feed="context",
        need_weights=True,
    ),
)


# Values and gradients


@pytest.mark.parametrize(
    "case",
    by_id([*scan_cases(), *attend_cases(), *decode_cases(), *attentive_cases(), *loss_cases()]),
)
def test_values_and_gradients(case: Case, set_threads: Callable[[int], None]) -> None:
    call = case.call()
    expected = expected_of(call)
    set_threads(2)
    actual = run(functional, call)
    assert_close(actual.outputs, expected.outputs)
    assert_close(actual.gradients, expected.gradients)
    for name, value in [*actual.outputs.items(), *actual.gradients.items()]:
        assert value.dtype == case.dtype, f"{name} is {value.dtype}"


@pytest.mark.parametrize("case", by_id(small_cases(torch.float64)))
def test_gradcheck(case: Case) -> None:
    shrunk: dict[type, tuple[int, ...]] = {
        ScanCase: (3, 2, 2, 3),
        AttendCase: (2, 3, 2, 3, 2, 2),
        DecodeCase: (2, 3, 2, 2, 3, 2, 3),
        LinearCrossEntropyCase: (4, 3, 2),
    }
    sizes: Any = shrunk[type(case)]
    call = tracked(replace(case, sizes=sizes).call())
    inputs = dict(leaves(call.inputs))
    names = differentiable(call)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, values, strict=True))
        return tuple(outputs_of(functional, changed(call, lambda n, t: given.get(n, t))).values())

    assert torch.autograd.gradcheck(function, [inputs[name] for name in names])


@pytest.mark.parametrize("case", by_id(FULL))
def test_gradient_of_each_output_alone(case: Case) -> None:
    call = case.call()
    for name in outputs_of(reference, call):
        expected = expected_of(call, used=[name])
        assert_close(run(functional, call, used=[name]).gradients, expected.gradients)


@pytest.mark.parametrize("case", by_id(FULL))
def test_gradient_for_each_input_alone(case: Case) -> None:
    call = case.call()
    expected = expected_of(call)
    for name in differentiable(call):
        actual = run(functional, call, wanted=[name])
        assert_close(actual.outputs, expected.outputs)
        assert_close(actual.gradients, {name: expected.gradients[name]})


@pytest.mark.parametrize("case", by_id([*FULL, *LARGE]))
def test_values_without_gradients(case: Case, set_threads: Callable[[int], None]) -> None:
    call = case.call()
    expected = outputs_of(reference, in_double(call))
    set_threads(2)
    with torch.no_grad():
        assert_close(outputs_of(functional, call), expected)
    with torch.inference_mode():
        assert_close(outputs_of(functional, call), expected)


@pytest.mark.parametrize(
    "case", by_id(case for case in (*small_cases(), *LARGE) if getattr(case, "lengths", None))
)
def test_padding_is_exactly_zero(case: Case) -> None:
    call = case.call()
    lengths = call.inputs["lengths"]
    with torch.no_grad():
        outputs = outputs_of(functional, call)
    if call.op == "scan":
        steps = torch.arange(case.sizes[0]).unsqueeze(1)
        assert outputs["output"][steps >= lengths].eq(0).all()
        return
    positions = torch.arange(call.inputs["memory"].shape[0])
    if "weights" in outputs:
        padded = positions >= lengths.unsqueeze(1)
        if call.options.get("heads", 1) > 1:
            padded = padded.unsqueeze(1)
        assert outputs["weights"][padded.expand_as(outputs["weights"])].eq(0).all()
    if call.op == "attend":
        assert outputs["context"][:, lengths == 0].eq(0).all()


@pytest.mark.parametrize(
    "case",
    by_id(
        case for case in (*FULL, *LARGE) if isinstance(case, LinearCrossEntropyCase) or case.lengths
    ),
)
def test_nan_in_padding_stays_there(case: Case) -> None:
    call = case.call()
    expected, actual = expected_of(call), run(functional, poisoned(call))
    assert_close(actual.outputs, expected.outputs)
    assert_close(actual.gradients, expected.gradients)


@pytest.mark.parametrize("module", [functional, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_reset_forgets_even_nan(cell: Any, module: ModuleType) -> None:
    call = ScanCase(cell=cell, resets="first", dtype=torch.float64).call()
    expected = run(module, call)
    nan = changed(call, lambda n, t: t * torch.nan if n.startswith("state") else t)
    actual = run(module, nan)
    assert_close(actual.outputs, expected.outputs)
    assert_close(actual.gradients, expected.gradients)


@pytest.mark.parametrize("module", [functional, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("cell", CELLS)
def test_either_half_of_a_decoders_state_may_be_left_out(cell: Any, module: ModuleType) -> None:
    call = DecodeCase(cell=cell, layers=2).call()
    hidden, feed = call.inputs["state"]
    zero = tuple(map(torch.zeros_like, hidden)) if cell == "lstm" else torch.zeros_like(hidden)
    pairs = (
        ((None, feed), (zero, feed)),
        ((hidden, None), (hidden, torch.zeros_like(feed))),
        ((None, None), None),
    )
    for short, full in pairs:
        actual, expected = (
            outputs_of(module, call._replace(inputs=call.inputs | {"state": state}))
            for state in (short, full)
        )
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("case", by_id(LARGE))
def test_nan_in_one_row_leaves_the_others_alone(
    case: Case, set_threads: Callable[[int], None]
) -> None:
    set_threads(2)
    call = case.call()
    clean = outputs_of(functional, call)
    first = "query" if call.op == "attend" else "x"
    call.inputs[first] = call.inputs[first].clone()
    call.inputs[first][0, 0] = torch.nan
    for name, value in outputs_of(functional, call).items():
        # (T, B, .), (B, .) or (L, B, .): the batch is next to last, but before the heads.
        batch = -3 if name.endswith("weights") and call.options.get("heads", 1) > 1 else -2
        rows, others = value.unbind(batch), clean[name].unbind(batch)
        assert rows[0].isnan().any(), f"{name} hides the NaN"
        assert torch.equal(torch.stack(rows[1:]), torch.stack(others[1:])), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_saturated_gates_stay_finite(cell: Any, dtype: torch.dtype) -> None:
    call = ScanCase(cell=cell, dtype=dtype).call()
    call.inputs["x"] = call.inputs["x"] * 1e6
    expected, actual = expected_of(call), run(functional, call)
    assert_close(actual.outputs, expected.outputs)
    assert_close(actual.gradients, expected.gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["attend", "decode"])
def test_huge_scores_stay_finite(op: str, dtype: torch.dtype) -> None:
    case = (
        AttendCase(dtype=dtype, sizes=(4, 5, 3, 6, 7, 6))
        if op == "attend"
        else DecodeCase(dtype=dtype)
    )
    call = replace(case, need_weights=True, lengths="holes").call()
    call.inputs["keys"] = call.inputs["keys"] * 1e4
    assert_close(run(functional, call).outputs, expected_of(call).outputs)


# Keeping few states


def saved_bytes(call: Call) -> int:
    """Of the tensors kept for backward, each memory once, without those that were given."""
    call = tracked(call)
    own = {tensor.untyped_storage().data_ptr() for _, tensor in leaves(call.inputs)}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs_of(functional, call)
    return sum(size for memory, size in sizes.items() if memory not in own)


@pytest.mark.parametrize("cell", CELLS)
def test_every_tenth_state_is_a_tenth_of_the_memory_at_most(cell: Any) -> None:
    case = ScanCase(cell=cell, sizes=(100, 4, 8, 16))
    every, tenth = saved_bytes(case.call()), saved_bytes(replace(case, keep_every=10).call())
    assert 0 < tenth <= every / 10


@pytest.mark.parametrize("name", ["h_mask", "zoneout_h", "zoneout_c"])
def test_masks_that_want_a_gradient_are_refused(name: str) -> None:
    call = ScanCase(mask=True, zoneout="steps").call()
    call.inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name} has no gradient, .* detach"):
        functional.scan(**call.inputs)
    with torch.no_grad():
        functional.scan(**call.inputs)


def test_zoneout_of_c_goes_with_a_c() -> None:
    call = ScanCase(cell="gru").call()
    with pytest.raises(ValueError, match="zoneout_c goes with cell lstm, got gru"):
        functional.scan(**call.inputs, **call.options, zoneout_c=torch.ones(1, 1, 7))


def test_a_state_to_reset_to_goes_with_resets() -> None:
    call = ScanCase().call()
    with pytest.raises(ValueError, match="must be None without them, got tuple of 2"):
        functional.scan(**call.inputs, reset_state=call.inputs["state"])
    h, c = call.inputs["state"]
    x, w_ih, w_hh, b_ih, b_hh = (call.inputs[n] for n in ("x", "w_ih", "w_hh", "b_ih", "b_hh"))
    before = (x, w_ih, w_hh, b_ih, b_hh, None, h, c, None, None, "lstm", False)
    with pytest.raises(ValueError, match="reset_h and reset_c go with resets, got none of these"):
        torch.ops.pyseq.scan(*before, reset_h=h)


def test_layer_norm_of_half_is_refused() -> None:
    call = ScanCase().call()
    message = "gain_ih and gain_hh, .* got gain_ih, gain_hh, no gain_c, no bias_c for cell lstm"
    with pytest.raises(ValueError, match=message):
        functional.scan(**call.inputs, layer_norm=(torch.ones(28), torch.ones(28)))
    call = ScanCase(cell="gru", layer_norm=True).call()
    call.inputs["layer_norm"] += (torch.ones(7), torch.ones(7))
    with pytest.raises(ValueError, match="gain_c, bias_c for cell gru"):
        functional.scan(**call.inputs, **call.options)


def test_zoneout_of_one_keeps_the_state_and_of_none_does_nothing() -> None:
    call = ScanCase().call()
    h, c = call.inputs["state"]
    kept = functional.scan(
        **call.inputs, zoneout_h=torch.ones(1, 1, 7), zoneout_c=torch.ones(1, 1, 7)
    )
    assert torch.equal(kept.output, h.expand(5, 3, 7))
    assert torch.equal(kept.state[1], c)
    plain = outputs_of(functional, call)
    zeros = {"zoneout_h": torch.zeros(1, 1, 7), "zoneout_c": torch.zeros(5, 3, 7)}
    assert_same_bits(outputs_of(functional, call._replace(inputs=call.inputs | zeros)), plain)


@pytest.mark.parametrize("keep_every", [0, -1, 1.5, 1.0, True])
def test_keep_every_is_checked(keep_every: Any) -> None:
    call = ScanCase().call()
    with pytest.raises(ValueError, match=f"must be a positive integer, got {keep_every}"):
        functional.scan(**call.inputs, keep_every=keep_every)


# The linear map


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(5,), (1, 1), (7, 5), (3, 4, 5), (2, 3, 2, 17), (0, 5), (4, 0), (40, 100)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_linear_is_that_of_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    weight = torch.randn(9, shape[-1], dtype=dtype, requires_grad=True)
    bias = torch.randn(9, dtype=dtype, requires_grad=True)
    inputs = [x, weight, bias]
    actual, expected = functional.linear(*inputs), reference.linear(*inputs)
    d_y = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, d_y), torch.autograd.grad(expected, inputs, d_y)
    )
    torch.testing.assert_close(
        functional.linear(x, weight).detach(), reference.linear(x, weight).detach()
    )


def test_linear_takes_any_strides() -> None:
    x, weight = torch.randn(6, 3, 4).permute(2, 1, 0), torch.randn(6, 10).t()[::2]
    torch.testing.assert_close(functional.linear(x, weight), reference.linear(x, weight))


def test_linear_can_be_differentiated_twice() -> None:
    torch.manual_seed(0)
    inputs = [
        torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((3, 2, 4), (5, 4))
    ]
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(functional.linear, (*inputs, bias))
    assert torch.autograd.gradgradcheck(functional.linear, (*inputs, bias))


def test_linear_passes_opcheck() -> None:
    inputs = [torch.randn(size, requires_grad=True) for size in ((3, 2, 4), (5, 4), (5,))]
    torch.library.opcheck(torch.ops.pyseq.linear, tuple(inputs))


def test_linear_says_what_was_wrong() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match=r"weight must be \(O, I\) = \(5, 3\), got \(5, 4\)"):
        functional.linear(x[:, :3], weight)
    with pytest.raises(RuntimeError, match="bias"):
        functional.linear(x, weight, torch.randn(4))
    with pytest.raises(RuntimeError, match="weight"):
        functional.linear(x, weight.double())
    with pytest.raises(RuntimeError, match="without dimensions"):
        functional.linear(torch.tensor(1.0), weight)


# The loss


def loss_call(**changes: Any) -> Call:
    """A valid call of ``linear_cross_entropy`` (N 9, V 7, H 5) with some inputs replaced."""
    call = LinearCrossEntropyCase(ignored="some", label_smoothing=0.1).call()
    return call._replace(inputs=call.inputs | changes)


def test_linear_cross_entropy_is_its_formula() -> None:
    hidden, weight, bias = torch.randn(4, 5), torch.randn(6, 5), torch.randn(6)
    target = torch.tensor([3, 0, 5, 1])
    logs = torch.log_softmax(hidden @ weight.t() + bias, -1)
    kept = [row for row in range(4) if target[row] != 0]
    terms = [0.7 * logs[row, target[row]] + 0.3 * logs[row].mean() for row in kept]
    loss = functional.linear_cross_entropy(
        hidden, weight, target, bias, ignore_index=0, label_smoothing=0.3
    )
    assert loss.shape == ()
    torch.testing.assert_close(loss, -torch.stack(terms).mean())


@pytest.mark.parametrize("module", [functional, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_no_row_is_nan_without_gradients(smoothing: float, module: ModuleType) -> None:
    for rows in (0, 3):
        inputs = [torch.randn(size, requires_grad=True) for size in ((rows, 4), (5, 4), (5,))]
        hidden, weight, bias = inputs
        target = torch.full((rows,), -100)
        loss = module.linear_cross_entropy(hidden, weight, target, bias, label_smoothing=smoothing)
        assert loss.isnan()
        for gradient in torch.autograd.grad(loss, inputs):
            assert gradient.eq(0).all()


def test_ignored_rows_get_no_gradient() -> None:
    call = LinearCrossEntropyCase(ignored="most", label_smoothing=0.1).call()
    ignored = call.inputs["target"] == IGNORED
    assert run(functional, call).gradients["hidden"][ignored].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_the_loss_of_huge_logits_is_finite(scale: float, dtype: torch.dtype) -> None:
    call = replace(LinearCrossEntropyCase(label_smoothing=0.1, dtype=dtype)).call()
    call.inputs["bias"] = call.inputs["bias"] * scale
    expected, actual = expected_of(call), run(functional, call)
    assert_close(actual.outputs, expected.outputs)
    assert_close(actual.gradients, expected.gradients)


def test_minus_infinity_forbids_a_symbol() -> None:
    call = LinearCrossEntropyCase(dtype=torch.float64).call()
    call.inputs["bias"][3] = -torch.inf
    call.inputs["target"][call.inputs["target"] == 3] = 2
    expected, actual = expected_of(call), run(functional, call)
    assert_close(actual.outputs, expected.outputs)
    assert_close(actual.gradients, expected.gradients)


def test_nan_reaches_the_loss() -> None:
    for name in ("hidden", "weight", "bias"):
        call = LinearCrossEntropyCase().call()
        call.inputs[name].view(-1)[0] = torch.nan
        assert outputs_of(functional, call)[""].isnan(), name


def test_the_loss_keeps_nothing_as_large_as_the_logits() -> None:
    call = tracked(LinearCrossEntropyCase(sizes=(400, 3000, 8)).call())
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs_of(functional, call)
    assert max(sizes) == 3000 * 8 * 4


# Repeating, order and layout


@pytest.mark.parametrize("case", by_id(LARGE))
def test_same_bits_on_every_call(case: Case, set_threads: Callable[[int], None]) -> None:
    set_threads(2)
    call = case.call()
    first = run(functional, call)
    for _ in range(20):
        again = run(functional, call)
        assert_same_bits(again.outputs, first.outputs)
        assert_same_bits(again.gradients, first.gradients)


@pytest.mark.parametrize("case", by_id(FULL))
def test_inputs_are_not_written(case: Case) -> None:
    call = case.call()
    before = {name: tensor.clone() for name, tensor in leaves(call.inputs)}
    run(functional, call)
    assert_same_bits(dict(leaves(call.inputs)), before)


@pytest.mark.parametrize("case", by_id(FULL))
def test_no_output_shares_memory_with_an_input(case: Case) -> None:
    call = case.call()
    with torch.no_grad():
        outputs = outputs_of(functional, call)
    owned = {tensor.untyped_storage().data_ptr() for _, tensor in leaves(call.inputs)}
    for name, value in outputs.items():
        assert value.untyped_storage().data_ptr() not in owned, name


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(tensor: Tensor) -> Tensor:
    """Every second number of a wider tensor, the others NaN (or true, or -1)."""
    fill = torch.nan if tensor.is_floating_point() else -1
    wide = torch.full((*tensor.shape, 2), fill, dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


def expanded(tensor: Tensor) -> Tensor:
    """The first slice of the last axis, repeated with stride 0."""
    return tensor[..., :1].expand_as(tensor)


def flipped_batch(tensor: Tensor) -> Tensor:
    """A view that does not start at the beginning of its storage."""
    return torch.cat([tensor, tensor])[tensor.shape[0] :]


@pytest.mark.parametrize("layout", [transposed, sliced, expanded, flipped_batch])
@pytest.mark.parametrize("case", by_id(FULL))
def test_layouts(case: Case, layout: Callable[[Tensor], Tensor]) -> None:
    call = changed(case.call(), lambda _, t: layout(t))
    expected, actual = expected_of(call), run(functional, call)
    assert_close(actual.outputs, expected.outputs)
    assert_close(actual.gradients, expected.gradients)


@pytest.mark.parametrize("case", by_id(FULL))
def test_gradients_of_outputs_may_be_expanded(case: Case) -> None:
    call = tracked(case.call())
    inputs = [t for _, t in leaves(call.inputs) if t.requires_grad]
    actual = torch.autograd.grad(
        [out.sum() for out in outputs_of(functional, call).values()], inputs
    )
    double = tracked(in_double(case.call()))
    expected = torch.autograd.grad(
        [out.sum() for out in outputs_of(reference, double).values()],
        [t for _, t in leaves(double.inputs) if t.requires_grad],
    )
    names = differentiable(call)
    assert_close(dict(zip(names, actual, strict=True)), dict(zip(names, expected, strict=True)))


# Autograd's corners


@pytest.mark.parametrize("case", by_id(FULL))
def test_backward_twice_gives_the_same(case: Case) -> None:
    call = tracked(case.call())
    total = sum_of(outputs_of(functional, call))
    inputs = {n: t for n, t in leaves(call.inputs) if t.requires_grad}
    first, second = (
        torch.autograd.grad(total, list(inputs.values()), retain_graph=True) for _ in range(2)
    )
    assert_same_bits(dict(zip(inputs, second, strict=True)), dict(zip(inputs, first, strict=True)))


@pytest.mark.parametrize("case", by_id(FULL))
def test_inputs_changed_before_backward_are_noticed(case: Case) -> None:
    call = tracked(case.call())
    total = sum_of(outputs_of(functional, call))
    inputs = dict(leaves(call.inputs))
    with torch.no_grad():
        name = next(name for name in ("memory", "w_hh", "weight") if name in inputs)
        inputs[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("case", by_id(FULL))
def test_outputs_changed_before_backward_give_no_wrong_gradient(case: Case) -> None:
    for name in outputs_of(reference, case.call()):
        call = tracked(case.call())
        outputs = outputs_of(functional, call)
        outputs[name].mul_(2)
        inputs = [t for _, t in leaves(call.inputs) if t.requires_grad]
        # What the operator saved must be its own, or autograd must see the change.
        try:
            gradients = torch.autograd.grad(sum_of(outputs, [name]), inputs, materialize_grads=True)
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):
                continue
            raise
        single = expected_of(case.call(), used=[name]).gradients
        expected = {key: 2 * gradient for key, gradient in single.items()}
        assert_close(dict(zip(expected, gradients, strict=True)), expected)


# Refusals


def scan_call(**changes: Any) -> Call:
    """A valid call of ``scan`` (T 5, B 3, I 4, H 7, P 6) with some inputs replaced."""
    call = ScanCase(projection=6, lengths="ragged", resets="random").call()
    return call._replace(inputs=call.inputs | changes)


def attend_call(**changes: Any) -> Call:
    """A valid call of ``attend`` (T 4, S 5, B 3, A 6, M 7, Q 6) with some inputs replaced."""
    call = AttendCase(score="concat", project_query=False, lengths="ragged").call()
    return call._replace(inputs=call.inputs | changes)


def decode_call(**changes: Any) -> Call:
    """A valid call of ``decode`` (T 4, S 5, B 3, I 6, H 7, A 8, M 9, L 2), some inputs replaced."""
    call = DecodeCase(score="concat", layers=2, lengths="ragged", dropout=True).call()
    return call._replace(inputs=call.inputs | changes)


def general_call(op: str = "attend", **changes: Any) -> Call:
    """A valid call of ``attend`` or ``decode`` with the score general, some inputs replaced."""
    case = AttendCase if op == "attend" else DecodeCase  # keys (5, 3, A), A 6 and 8; Q 8 and 7
    call = case(score="general", lengths="ragged").call()
    return call._replace(inputs=call.inputs | changes)


def location_call(**changes: Any) -> Call:
    """A valid call of ``attend`` (S 5, B 3, Q 8) with the score location, some inputs replaced."""
    call = AttendCase(score="location", lengths="ragged").call()
    return call._replace(inputs=call.inputs | changes)


def layer_call(index: int, part: int, value: Tensor | None) -> Call:
    """A call of ``decode`` with one weight of one layer replaced."""
    layers = [list(layer) for layer in decode_call().inputs["layers"]]
    layers[index][part] = value
    return decode_call(layers=[tuple(layer) for layer in layers])


def ones(*shape: int, **kind: Any) -> Tensor:
    return torch.ones(shape, **kind)


FLOAT8 = torch.float8_e4m3fn

#: Calls with one bad tensor each, and what the message must say: the tensor, and what it was.
BAD_CALLS: dict[str, tuple[Callable[[], Call], str]] = {
    "scan-x-2d": (lambda: scan_call(x=ones(5, 3)), r"\bx must .*got .*\(5, 3\)"),
    "scan-x-no-steps": (lambda: scan_call(x=ones(0, 3, 4)), r"\bx must .*got .*\(0, 3, 4\)"),
    "scan-x-batch": (lambda: scan_call(x=ones(5, 2, 4)), r"must .*2.*got .*3"),
    "scan-w_ih-rows": (lambda: scan_call(w_ih=ones(27, 4)), r"w_ih must .*28.*got .*\(27, 4\)"),
    "scan-w_ih-columns": (lambda: scan_call(w_ih=ones(28, 5)), r"w_ih must .*got .*\(28, 5\)"),
    "scan-w_hh-columns": (
        lambda: scan_call(w_hh=ones(28, 5)),
        r"w_h[hr] must .*\(\d+, \d+\).*got .*\(\d+, \d+\)",
    ),
    "scan-w_hh-1d": (lambda: scan_call(w_hh=ones(28)), r"w_hh must .*got .*\(28,?\)"),
    "scan-b_ih": (lambda: scan_call(b_ih=ones(7)), r"b_ih must .*28.*got .*\(7,?\)"),
    "scan-b_hh": (lambda: scan_call(b_hh=ones(1, 28)), r"b_hh must .*28.*got .*\(1, 28\)"),
    "scan-w_hr": (lambda: scan_call(w_hr=ones(7, 6)), r"w_h[hr] must .*got .*\(\d+, \d+\)"),
    "scan-h": (
        lambda: scan_call(state=(ones(3, 7), ones(3, 7))),
        r"h_0 must .*\(3, 6\).*got .*\(3, 7\)",
    ),
    "scan-c": (
        lambda: scan_call(state=(ones(3, 6), ones(2, 7))),
        r"c_0 must .*\(3, 7\).*got .*\(2, 7\)",
    ),
    "scan-lengths-shape": (
        lambda: scan_call(lengths=torch.tensor([5, 5])),
        r"lengths must .*3.*got .*\(2,?\)",
    ),
    "scan-lengths-dtype": (
        lambda: scan_call(lengths=ones(3, dtype=torch.bool)),
        r"lengths must .*int64.*got .*[bB]ool",
    ),
    "scan-lengths-negative": (
        lambda: scan_call(lengths=torch.tensor([5, -1, 5])),
        r"lengths must .*0.*5.*got .*-1",
    ),
    "scan-lengths-large": (
        lambda: scan_call(lengths=torch.tensor([5, 6, 5])),
        r"lengths must .*0.*5.*got .*6",
    ),
    "scan-resets-shape": (
        lambda: scan_call(resets=ones(3, 5, dtype=torch.bool)),
        r"resets must .*\(5, 3\).*got .*\(3, 5\)",
    ),
    "scan-resets-dtype": (lambda: scan_call(resets=ones(5, 3)), r"resets must .*[bB]ool.*got "),
    "scan-dtype-mix": (
        lambda: scan_call(w_hh=ones(28, 6, dtype=torch.float64)),
        r"w_hh must .*[fF]loat.*got .*([dD]ouble|float64)",
    ),
    "scan-float8": (
        lambda: changed(scan_call(), lambda _, t: t.to(FLOAT8) if t.is_floating_point() else t),
        r"\bx must .*float32.*got .*[fF]loat8",
    ),
    "scan-integers": (
        lambda: scan_call(x=ones(5, 3, 4, dtype=torch.int64)),
        r"\bx must .*float32.*got .*([lL]ong|int64)",
    ),
    "scan-complex": (
        lambda: scan_call(x=ones(5, 3, 4, dtype=torch.complex64)),
        r"\bx must .*float32.*got .*[cC]omplex",
    ),
    "attend-query-2d": (
        lambda: attend_call(query=ones(4, 6)),
        r"query must .*got .*\(4, 6\)",
    ),
    "attend-query-size": (
        lambda: attend_call(query=ones(4, 3, 5)),
        r"(query|keys) must .*got .*\(\d, 3, [56]\)",
    ),
    "scan-h_mask": (
        lambda: scan_call(h_mask=ones(1, 7)),
        r"h_mask must be \(B, P\) = \(3, 6\), got \(1, 7\)",
    ),
    "scan-zoneout_h": (
        lambda: scan_call(zoneout_h=ones(2, 1, 7)),
        r"zoneout_h must be \(T or 1, B or 1, P\) = \(5, 1, 6\), got \(2, 1, 7\)",
    ),
    "scan-zoneout_c-dim": (
        lambda: scan_call(zoneout_c=ones(7)),
        r"zoneout_c must be \(T or 1, B or 1, H\), got \(7,\)",
    ),
    "scan-reset_state": (
        lambda: scan_call(reset_state=(ones(6), ones(6))),
        r"reset_c must be \(B, H\) or \(H,\) = \(7,\), got \(6,\)",
    ),
    "scan-reset_state-rows": (
        lambda: scan_call(reset_state=(ones(2, 6), ones(7))),
        r"reset_h must be \(B, P\) or \(P,\) = \(3, 6\), got \(2, 6\)",
    ),
    "scan-h_mask-dtype": (
        lambda: scan_call(h_mask=ones(3, 6, dtype=torch.float64)),
        r"h_mask must have the dtype of x.*[fF]loat.*got .*([dD]ouble|float64)",
    ),
    "scan-gain_ih": (
        lambda: scan_call(layer_norm=(ones(7), ones(28), ones(7), ones(7))),
        r"gain_ih must be \(G\*H,\) = \(28,\), got \(7,\)",
    ),
    "attend-keys-batch": (
        lambda: attend_call(keys=ones(5, 2, 6)),
        r"keys must .*3.*got .*\(5, 2, 6\)",
    ),
    "attend-memory-batch": (
        lambda: attend_call(memory=ones(5, 2, 7)),
        r"memory must .*3.*got .*\(5, 2, 7\)",
    ),
    "attend-memory-steps": (
        lambda: attend_call(memory=ones(4, 3, 7)),
        r"(keys|memory) must .*got .*\([45], 3, [67]\)",
    ),
    "attend-weight_v": (
        lambda: attend_call(weight_v=ones(5)),
        r"weight_v must .*6.*got .*\(5,?\)",
    ),
    "attend-lengths-shape": (
        lambda: attend_call(lengths=torch.tensor([[5, 5, 5]])),
        r"lengths must .*3.*got .*\(1, 3\)",
    ),
    "attend-lengths-dtype": (
        lambda: attend_call(lengths=ones(3)),
        r"lengths must .*int64.*got .*([fF]loat)",
    ),
    "attend-lengths-negative": (
        lambda: attend_call(lengths=torch.tensor([5, -3, 5])),
        r"lengths must .*0.*5.*got .*-3",
    ),
    "attend-lengths-large": (
        lambda: attend_call(lengths=torch.tensor([99, 5, 5])),
        r"lengths must .*0.*5.*got .*99",
    ),
    "attend-dtype-mix": (
        lambda: attend_call(memory=ones(5, 3, 7, dtype=torch.float64)),
        r"memory must .*[fF]loat.*got .*([dD]ouble|float64)",
    ),
    "attend-float8": (
        lambda: changed(attend_call(), lambda _, t: t.to(FLOAT8) if t.is_floating_point() else t),
        r"query must .*float32.*got .*[fF]loat8",
    ),
    "attend-weight": (
        lambda: general_call(weight=ones(7, 6)),
        r"weight must be \(Q, A\) = \(8, 6\), got \(7, 6\)",
    ),
    "attend-weight-dtype": (
        lambda: general_call(weight=ones(8, 6, dtype=torch.float64)),
        r"weight must have the dtype of keys, torch.float32, got torch.float64",
    ),
    "attend-general-keys": (
        lambda: general_call(keys=ones(5, 6)),
        r"keys must be \(S, B, A\) = .*got \(5, 6\)",
    ),
    "attend-general-query": (
        lambda: general_call(query=ones(8)),
        r"query must be \(T, B, Q\) = .*got \(8,\)",
    ),
    "attend-general-lengths": (
        lambda: general_call(lengths=torch.tensor([5, 5])),
        r"lengths must be \(B,\) = \(3\), got \(2,\)",
    ),
    "attend-weight_query": (
        lambda: attend_call(weight_query=ones(6, 5)),
        r"weight_query must be \(A, Q\) = \(6, 6\), got \(6, 5\)",
    ),
    "attend-weight_query-dtype": (
        lambda: attend_call(weight_query=ones(6, 6, dtype=torch.float64)),
        r"weight_query must have the dtype of query, torch.float32, got torch.float64",
    ),
    "attend-positions": (
        lambda: attend_call(positions=ones(3, 4), window=2),
        r"positions must be \(T, B\) = \(4, 3\), got \(3, 4\)",
    ),
    "attend-location-weight": (
        lambda: location_call(weight=ones(5, 7)),
        r"weight must be \(R, Q\) = \(any, 8\), got \(5, 7\)",
    ),
    "attend-location-lengths": (
        lambda: location_call(lengths=torch.tensor([5, 5])),
        r"lengths must .*3.*got .*\(2,?\)",
    ),
    "decode-weight": (
        lambda: general_call("decode", weight=ones(8, 8)),
        r"weight must be \(Q, A\) = \(7, 8\), got \(8, 8\)",
    ),
    "decode-x-2d": (lambda: decode_call(x=ones(4, 3)), r"\bx must .*got .*\(4, 3\)"),
    "decode-x-no-steps": (lambda: decode_call(x=ones(0, 3, 6)), r"\bx must .*got .*\(0, 3, 6\)"),
    "decode-w_ih": (
        lambda: layer_call(0, 0, ones(28, 6)),
        r"w_ih.* must .*13.*got .*\(28, 6\)",
    ),
    "decode-w_ih-above": (
        lambda: layer_call(1, 0, ones(28, 13)),
        r"w_ih.* must .*7.*got .*\(28, 13\)",
    ),
    "decode-w_hh": (
        lambda: layer_call(1, 1, ones(28, 8)),
        r"w_hh.* must .*7.*got .*\(28, 8\)",
    ),
    "decode-b_hh": (lambda: layer_call(1, 3, ones(27)), r"b_hh.* must .*28.*got .*\(27,?\)"),
    "decode-keys": (
        lambda: decode_call(keys=ones(5, 3, 9)),
        r"(keys|weight_query|weight_v) must .*got .*\(.*[89].*\)",
    ),
    "decode-memory": (
        lambda: decode_call(memory=ones(4, 3, 9)),
        r"(keys|memory) must .*got .*\([45], 3, [89]\)",
    ),
    "decode-combine": (
        lambda: decode_call(combine=ones(7, 17)),
        r"combine must .*16.*got .*\(7, 17\)",
    ),
    "decode-weight_query": (
        lambda: decode_call(weight_query=ones(8, 6)),
        r"weight_query must .*7.*got .*\(8, 6\)",
    ),
    "decode-weight_v": (
        lambda: decode_call(weight_v=ones(7)),
        r"weight_v must .*8.*got .*\(7,?\)",
    ),
    "decode-h": (
        lambda: decode_call(state=((ones(1, 3, 7), ones(2, 3, 7)), ones(3, 7))),
        r"h_0 must .*\(2, 3, 7\).*got .*\(1, 3, 7\)",
    ),
    "decode-c": (
        lambda: decode_call(state=((ones(2, 3, 7), ones(2, 3, 8)), ones(3, 7))),
        r"c_0 must .*\(2, 3, 7\).*got .*\(2, 3, 8\)",
    ),
    "decode-feed": (
        lambda: decode_call(state=((ones(2, 3, 7), ones(2, 3, 7)), ones(3, 9))),
        r"feed must .*\(3, 7\).*got .*\(3, 9\)",
    ),
    "decode-lengths": (
        lambda: decode_call(lengths=torch.tensor([5, 6, 5])),
        r"lengths must .*0.*5.*got .*6",
    ),
    "decode-masks": (
        lambda: decode_call(dropout_masks=ones(2, 4, 3, 7)),
        r"dropout_masks must .*\(1, 4, 3, 7\).*got .*\(2, 4, 3, 7\)",
    ),
    "loss-hidden": (
        lambda: loss_call(hidden=ones(9, 1, 5)),
        r"hidden must be \(N, H\), got \(9, 1, 5\)",
    ),
    "loss-weight": (
        lambda: loss_call(weight=ones(7, 4)),
        r"weight must .*\(7, 5\), got \(7, 4\)",
    ),
    "loss-no-symbols": (
        lambda: loss_call(weight=ones(0, 5)),
        r"weight must .*V at least 1, got \(0, 5\)",
    ),
    "loss-bias": (lambda: loss_call(bias=ones(9)), r"bias must .*\(7,\), got \(9,\)"),
    "loss-target": (
        lambda: loss_call(target=torch.zeros(8, dtype=torch.int64)),
        r"target must .*\(9,\), got \(8,\)",
    ),
    "loss-target-dtype": (
        lambda: loss_call(target=ones(9)),
        r"target must be int64, got Float",
    ),
    "loss-target-large": (
        lambda: loss_call(target=torch.arange(9)),
        r"target must be from 0 to V - 1 = 6, .*got 7 at row 7",
    ),
    "loss-target-negative": (
        lambda: loss_call(target=torch.full((9,), -2)),
        r"target must be from 0 .*ignore_index = -1, got -2 at row 0",
    ),
    "loss-dtype-mix": (
        lambda: loss_call(weight=ones(7, 5, dtype=torch.float64)),
        r"weight must .*[fF]loat.*got .*([dD]ouble|float64)",
    ),
    "decode-dtype-mix": (
        lambda: decode_call(combine=ones(7, 16, dtype=torch.float64)),
        r"combine must .*[fF]loat.*got .*([dD]ouble|float64)",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_tensors_are_refused(make: Callable[[], Call], message: str) -> None:
    call = make()
    with pytest.raises(RuntimeError, match=message):
        outputs_of(functional, call)
    with pytest.raises(RuntimeError, match=message):
        run(functional, call)


def moved(call: Call, target: str) -> Call:
    """``call`` with one input on the meta device, the only second one that is always there."""
    return changed(call, lambda name, t: t.to("meta") if name == target else t)


@pytest.mark.parametrize("case", by_id(FULL))
def test_no_kernel_reads_a_tensor_of_another_device(case: Case) -> None:
    for target in differentiable(case.call()):
        try:
            outputs = outputs_of(functional, moved(case.call(), target))
        except RuntimeError as error:
            if re.search("meta|device", str(error)):
                continue
            raise
        # The dispatcher may take the whole call to the meta device, where nothing is read.
        assert all(value.is_meta for value in outputs.values()), target


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru"])
def test_projection_is_refused_but_for_lstm(cell: Any) -> None:
    call = ScanCase(cell=cell).call()
    call.inputs["w_hr"] = ones(7, 7)
    with pytest.raises((RuntimeError, ValueError), match=rf"w_hr.*{cell}|w_hr.*lstm"):
        outputs_of(functional, call)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scan_call()._replace(options={"cell": "elman"}), "cell must be .*got 'elman'"),
        (lambda: scan_call(state=ones(3, 6)), r"pair \(h, c\), got Tensor"),
        (lambda: ScanCase(cell="gru").call()._replace(options={"cell": "lstm"}), "pair"),
        (lambda: attend_call()._replace(options={"score": "cosine"}), "score must .*'cosine'"),
        (lambda: attend_call(weight=ones(6, 6)), "weight must be given .*got 'concat'"),
        (lambda: attend_call()._replace(options={"score": "dot"}), "weight_v must .*got 'dot'"),
        (lambda: attend_call(keys=None), "keys must be None for .*got 'concat'"),
        (lambda: attend_call(window=0), "window must be a positive integer, got 0"),
        (lambda: attend_call(positions=ones(4, 3)), "positions need a window .*got None"),
        (
            lambda: attend_call(step=torch.zeros(3).long()),
            r"step goes with a window .*got no window",
        ),
        (
            lambda: attend_call(window=2, positions=ones(4, 3), step=torch.zeros(3).long()),
            "step goes with a window without positions, got positions",
        ),
        (lambda: attend_call(heads=4), "heads must divide A = 6, got 4"),
        (lambda: attend_call(heads=2), "heads must divide M = 7, got 2"),
        (lambda: attend_call(heads=0), "heads must be at least 1, got 0"),
        (lambda: decode_call(layers=[]), "at least one layer, got none"),
        (lambda: decode_call(layers=[(ones(28, 13),)]), r"layers\[0\] must be .*got tuple of 1"),
        (lambda: decode_call(layers=[(None,) * 5]), r"layers\[0\] must be .*got tuple of 5"),
        (lambda: decode_call(layers=[ones(4, 7)]), r"layers\[0\] must be .*got Tensor"),
        (lambda: decode_call()._replace(options={"cell": "elman"}), "cell must .*'elman'"),
        (lambda: decode_call(state=ones(2, 3, 7)), r"pair \(hidden, feed\), got Tensor"),
        (lambda: decode_call(state=(None, 3)), "state.feed must be a tensor, got int"),
        (lambda: decode_call(state=(ones(2, 3, 7), None)), r"pair \(h, c\), got Tensor"),
        (lambda: scan_call(state=(None, None)), r"tensors \(h, c\), got NoneType for h"),
        (lambda: scan_call(state=3), r"pair \(h, c\), got int"),
        (
            lambda: loss_call()._replace(options={"label_smoothing": 1.5}),
            "label_smoothing must be from 0 to 1, got 1.5",
        ),
    ],
    ids=[
        "cell",
        "pair",
        "single",
        "score",
        "weight",
        "weight_v",
        "keys",
        "window",
        "positions",
        "step-alone",
        "step-positions",
        "heads-keys",
        "heads-memory",
        "heads-none",
        "layers",
        "layer-of-1",
        "layer-of-5",
        "layer-tensor",
        "decode-cell",
        "decode-state",
        "decode-feed",
        "decode-hidden",
        "state-of-none",
        "state-number",
        "label_smoothing",
    ],
)
def test_bad_options_are_refused(make: Callable[[], Call], message: str) -> None:
    call = make()
    with pytest.raises(ValueError, match=message):
        outputs_of(functional, call)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scan_call(lengths=[5, 5, 5]), "lengths must be a tensor, got list of 3"),
        (lambda: scan_call(resets=True), "resets must be a tensor, got bool"),
        (lambda: general_call(lengths=5), "lengths must be a tensor, got int"),
        (lambda: general_call("decode", weight=3), "weight must be a tensor, got int"),
        (lambda: layer_call(1, 0, None), r"w_ih of layers\[1\] must be a tensor, got NoneType"),
        (lambda: layer_call(0, 1, None), r"w_hh of layers\[0\] must be a tensor, got NoneType"),
        (lambda: loss_call(hidden=[1.0]), "hidden must be a tensor, got list of 1"),
        (lambda: loss_call(weight=None), "weight must be a tensor, got NoneType"),
        (lambda: loss_call(target=3), "target must be a tensor, got int"),
        (lambda: scan_call(x=None), "x must be a tensor, got NoneType"),
        (lambda: scan_call(w_ih=None), "w_ih must be a tensor, got NoneType"),
        (lambda: scan_call(w_hh=[1.0]), "w_hh must be a tensor, got list of 1"),
        (lambda: scan_call(b_hh=0.0), "b_hh must be a tensor, got float"),
        (lambda: attend_call(query=None), "query must be a tensor, got NoneType"),
        (lambda: attend_call(memory=None), "memory must be a tensor, got NoneType"),
        (lambda: decode_call(x=None), "x must be a tensor, got NoneType"),
        (lambda: decode_call(combine=None), "combine must be a tensor, got NoneType"),
    ],
    ids=[
        "lengths",
        "resets",
        "general-lengths",
        "weight",
        "w_ih",
        "w_hh",
        "hidden",
        "loss-weight",
        "loss-target",
        "scan-x",
        "scan-w_ih",
        "scan-w_hh",
        "scan-b_hh",
        "attend-query",
        "attend-memory",
        "decode-x",
        "decode-combine",
    ],
)
def test_what_is_no_tensor_is_refused(make: Callable[[], Call], message: str) -> None:
    call = make()
    with pytest.raises(TypeError, match=message):
        outputs_of(functional, call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, u: functional.step(None, w, u), "x must be a tensor, got NoneType"),
        (lambda w, u: functional.step(w[:, :3], w, None), "w_hh must be a tensor, got NoneType"),
        (lambda w, u: functional.step(w, w, u, w_ch=3), "w_ch must be a tensor, got int"),
        (lambda w, u: functional.scan_both(None, (w, u), (w, u)), "x must be a tensor, got None"),
        (lambda w, u: functional.linear(w, None), "weight must be a tensor, got NoneType"),
    ],
    ids=["step-x", "step-w_hh", "step-w_ch", "both-x", "linear"],
)
def test_what_is_no_tensor_is_refused_elsewhere(
    call: Callable[[Tensor, Tensor], object], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        call(torch.randn(8, 3), torch.randn(8, 2))


@pytest.mark.parametrize("case", by_id(SEQUENCES))
def test_lengths_may_be_of_a_narrower_integer(case: Case) -> None:
    call = case.call()
    expected = outputs_of(functional, call)
    call.inputs["lengths"] = call.inputs["lengths"].to(torch.int32)
    assert_same_bits(outputs_of(functional, call), expected)


EMPTY: tuple[Case, ...] = (
    ScanCase(sizes=(3, 2, 0, 4)),
    ScanCase(sizes=(3, 9, 0, 4)),
    ScanCase(cell="gru", sizes=(1, 2, 0, 4)),
    ScanCase(sizes=(3, 2, 4, 0)),
    ScanCase(cell="gru", sizes=(3, 0, 0, 0)),
    AttendCase(sizes=(2, 0, 3, 4, 5, 4)),
    AttendCase(score="concat", sizes=(2, 3, 3, 0, 5, 4)),
    AttendCase(sizes=(2, 3, 3, 4, 0, 4)),
    AttendCase(sizes=(0, 3, 3, 4, 5, 4)),
    DecodeCase(sizes=(2, 0, 3, 4, 5, 6, 7)),
    DecodeCase(sizes=(2, 3, 3, 0, 5, 6, 7)),
    DecodeCase(sizes=(2, 3, 3, 4, 0, 6, 7)),
    DecodeCase(sizes=(2, 3, 3, 4, 5, 6, 0)),
)


@pytest.mark.parametrize("case", by_id(EMPTY))
def test_empty_sizes_work_or_are_refused(case: Case) -> None:
    call = case.call()
    try:
        actual = run(functional, call)
    except RuntimeError as error:
        if " must " in str(error):
            return
        raise
    expected = expected_of(call)
    assert_close(actual.outputs, expected.outputs)
    assert_close(actual.gradients, expected.gradients)


# The dispatcher


class RecordCalls(TorchFunctionMode):
    """Keeps the arguments of every call of an operator of pyseq, as Python makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if str(func).startswith("pyseq."):
            self.calls.append((getattr(func, "default", func), args))
        return func(*args, **(kwargs or {}))


class RecordKernels(TorchDispatchMode):
    """Keeps the arguments of every call of an operator of pyseq below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "pyseq":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def checked_calls(case: Case) -> tuple[list[Any], list[Any]]:
    """The public operator's calls that a case leads to, and those of its kernels."""
    call = tracked(case.call())
    with RecordCalls() as public:
        outputs_of(functional, call)
    with RecordKernels() as kernels:
        sum_of(outputs_of(functional, call)).backward()
    return public.calls, kernels.calls


@pytest.mark.parametrize("case", by_id(FULL))
def test_opcheck(case: Case) -> None:
    public, kernels = checked_calls(case)
    # Keys and queries may be projected before.
    *before, name = [op.name() for op, _ in public]
    assert name == f"pyseq::{op_of(case)}"
    assert set(before) <= {"pyseq::linear"}
    for op, args in public:
        torch.library.opcheck(
            op,
            args,
            test_utils=(
                "test_schema",
                "test_autograd_registration",
                "test_faketensor",
                "test_aot_dispatch_static",
                "test_aot_dispatch_dynamic",
            ),
        )
    for op, args in kernels:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_every_operator_is_checked() -> None:
    registered = {
        name.removesuffix(".default")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("pyseq::")
    }
    seen = {op.name() for case in FULL for calls in checked_calls(case) for op, _ in calls}
    # These have files of tests of their own.
    elsewhere = {
        f"pyseq::{name}"
        for name in ("generate", "scan_both", "scheduled_inputs", "sigmoid", "tanh")
    } | {"pyseq::attend_history", "pyseq::attend_history_backward"}
    elsewhere |= {f"pyseq::{name}_reference" for name in REFERENCES}
    assert seen | elsewhere == registered


@pytest.mark.parametrize("case", by_id(FULL))
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_keeps_one_graph(case: Case, dynamic: bool) -> None:
    call = case.call()

    def step(inputs: dict[str, Any]) -> Any:
        return getattr(functional, call.op)(**inputs, **call.options)

    torch._dynamo.reset()
    # The backend that traces forward and backward but generates no code: seconds, not minutes.
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    traced = tracked(call)
    outputs = {n: t for n, t in leaves(compiled(traced.inputs)) if t.is_floating_point()}
    inputs = {n: t for n, t in leaves(traced.inputs) if t.requires_grad}
    gradients = torch.autograd.grad(sum_of(outputs), list(inputs.values()))
    expected = expected_of(call)
    assert_close(outputs, expected.outputs)
    assert_close(dict(zip(inputs, gradients, strict=True)), expected.gradients)


@pytest.mark.parametrize("op", ["scan", "attend", "decode", "linear_cross_entropy"])
def test_extension_offers_the_operators_themselves(op: str) -> None:
    assert getattr(_C, op).__doc__.endswith(f"torch.ops.pyseq.{op}\n")


def test_operator_of_the_extension_differentiates() -> None:
    query = torch.randn(3, 2, 4, requires_grad=True)
    context, weights = _C.attend(query, query, query, None, None, "dot")
    torch.testing.assert_close(context, functional.attend(query, query, query).context)
    assert weights.shape == (3, 2, 3)
    context.sum().backward()
    assert query.grad is not None


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize("case", by_id(FULL))
def test_forward_mode_is_refused(case: Case) -> None:
    call = case.call()
    with forward_ad.dual_level():
        for target in differentiable(call):
            # Projected keys are refused before the operator sees them.
            text = rf"pyseq::({call.op}|linear) has no forward-mode"
            with pytest.raises(NotImplementedError, match=text):
                outputs_of(
                    functional,
                    changed(
                        case.call(),
                        lambda name, t, target=target: (
                            forward_ad.make_dual(t, torch.ones_like(t)) if name == target else t
                        ),
                    ),
                )


@pytest.mark.parametrize("case", by_id(FULL))
def test_saved_tensors_may_come_back_in_another_layout(case: Case) -> None:
    def unpack(tensor: Tensor) -> Tensor:
        # Equal values, last dimension not contiguous.
        return torch.stack([tensor, tensor], -1)[..., 0]

    expected = run(functional, case.call())
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        actual = run(functional, case.call())
    assert_same_bits(actual.gradients, expected.gradients)


def test_backward_operator_checks_what_forward_saved() -> None:
    x, w = torch.randn(3, 2, 4), torch.randn(16, 4)
    inputs = (x, w, w, *[None] * 7)
    gates, *others = torch.ops.pyseq.scan_forward(*inputs, "lstm", False)[4:]

    def backward(*saved: Tensor) -> None:
        torch.ops.pyseq.scan_backward(
            x, None, None, None, *inputs, list(saved), "lstm", False, 1, True
        )

    with pytest.raises(RuntimeError, match=r"gates must be .*\(3, 2, 16\), got \(2, 2, 16\)"):
        backward(gates[:2], *others)
    with pytest.raises(RuntimeError, match=r"saved must be as forward gave it, with gates, got 0"):
        backward()
    with pytest.raises(RuntimeError, match=r"saved must be as forward gave it, 1 tensors, got 2"):
        backward(gates, gates)
