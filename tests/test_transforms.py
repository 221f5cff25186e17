# SPDX-License-Identifier: Apache-2.0
"""The operators differentiated twice and more, and under the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from operator_cases import (
    AttendCase,
    Call,
    Case,
    DecodeCase,
    LinearCrossEntropyCase,
    ScanCase,
    changed,
    differentiable,
    leaves,
    op_of,
    outputs_of,
    small_cases,
    sum_of,
    tracked,
)
from tolerances import assert_close, assert_same_bits
from torch import Tensor

from pyseq import functional, nn, reference
from pyseq.transforms import REFERENCES

SHRUNK: dict[type, tuple[int, ...]] = {
    ScanCase: (3, 2, 2, 3),
    AttendCase: (2, 3, 2, 3, 2, 2),
    DecodeCase: (2, 3, 2, 2, 3, 2, 3),
    LinearCrossEntropyCase: (4, 3, 2),
}


def shrunk(cases: Iterable[Case]) -> list[Any]:
    """The cases, with sizes for finite differences, as parameters of a test."""
    small = [replace(case, sizes=SHRUNK[type(case)]) for case in cases]  # type: ignore[arg-type]
    return [pytest.param(case, id=f"{op_of(case)}-{case.id}") for case in small]


#: Every cell and score with all options on, in float64.
CASES = shrunk(small_cases(torch.float64))
#: One call of each operator.
FEW = shrunk(
    [
        ScanCase(lengths="holes", resets="random", dtype=torch.float64),
        ScanCase(projection=2, keep_every=2, dtype=torch.float64),
        AttendCase(score="concat", lengths="holes", need_weights=True, dtype=torch.float64),
        DecodeCase(
            score="concat",
            layers=2,
            lengths="holes",
            dropout=True,
            need_weights=True,
            dtype=torch.float64,
        ),
        LinearCrossEntropyCase(ignored="some", label_smoothing=0.1, dtype=torch.float64),
    ]
)


def function_of(
    module: ModuleType, call: Call, names: Iterable[str]
) -> Callable[..., tuple[Tensor, ...]]:
    """The call as a function from the named inputs to all outputs."""

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, values, strict=True))
        return tuple(outputs_of(module, changed(call, lambda n, t: given.get(n, t))).values())

    return function


def repeated_gradients(module: ModuleType, call: Call, order: int) -> dict[str, Tensor]:
    """The gradients of a sum of the outputs, those of the squares of these, and so on."""
    call = tracked(call)
    inputs = {n: t for n, t in leaves(call.inputs) if t.requires_grad}
    total = sum_of(outputs_of(module, call))
    for _ in range(order):
        gradients = torch.autograd.grad(
            total, list(inputs.values()), create_graph=True, materialize_grads=True
        )
        total = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    return {n: g.detach() for n, g in zip(inputs, gradients, strict=True)}


# Differentiating twice and more


@pytest.mark.parametrize("case", CASES)
def test_gradgradcheck(case: Case) -> None:
    call = tracked(case.call())
    names = differentiable(call)
    inputs = [tensor for name, tensor in leaves(call.inputs) if name in names]
    assert torch.autograd.gradgradcheck(
        function_of(functional, call, names), inputs, fast_mode=True
    )


@pytest.mark.parametrize("case", CASES)
def test_second_order_is_the_references(case: Case) -> None:
    actual = repeated_gradients(functional, case.call(), 2)
    assert_close(actual, repeated_gradients(reference, case.call(), 2))


@pytest.mark.parametrize("case", FEW)
def test_third_order_is_the_references(case: Case) -> None:
    actual = repeated_gradients(functional, case.call(), 3)
    assert_close(actual, repeated_gradients(reference, case.call(), 3))


@pytest.mark.parametrize("case", CASES)
def test_first_order_has_the_same_bits_with_create_graph(case: Case) -> None:
    results = []
    for create_graph in (False, True):
        call = tracked(case.call())
        inputs = [tensor for _, tensor in leaves(call.inputs) if tensor.requires_grad]
        total = sum_of(outputs_of(functional, call))
        gradients = torch.autograd.grad(total, inputs, create_graph=create_graph)
        assert all(gradient.requires_grad == create_graph for gradient in gradients)
        results.append({str(i): gradient.detach() for i, gradient in enumerate(gradients)})
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("case", FEW)
def test_second_order_for_each_input_alone(case: Case) -> None:
    for name in differentiable(case.call()):
        results = []
        for module in (functional, reference):
            call = tracked(case.call(), [name])
            source = dict(leaves(call.inputs))[name]
            total = sum_of(outputs_of(module, call))
            (first,) = torch.autograd.grad(total, source, create_graph=True)
            if first.requires_grad:
                (second,) = torch.autograd.grad(
                    first.square().sum(), source, materialize_grads=True
                )
            else:
                second = torch.zeros_like(source)
            results.append({name: second})
        assert_close(*results)


@pytest.mark.parametrize("module", [functional, reference], ids=["fused", "reference"])
def test_frozen_weights_get_no_second_gradient(module: ModuleType) -> None:
    call = tracked(ScanCase(dtype=torch.float64).call(), ["w_hh", "x"])
    total = sum_of(outputs_of(module, call))
    (d_x,) = torch.autograd.grad(total, call.inputs["x"], create_graph=True)
    d_x.square().sum().backward()
    given = {name for name, tensor in leaves(call.inputs) if tensor.grad is not None}
    assert given == {"w_hh", "x"}


def test_one_tensor_for_several_arguments() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(3, 2, 4, dtype=torch.float64)
    results = []
    for module in (functional, reference):
        rows = inputs.clone().requires_grad_()
        context = module.attend(rows, rows, rows).context
        (first,) = torch.autograd.grad(context.pow(3).sum(), rows, create_graph=True)
        results.append(dict(enumerate(torch.autograd.grad(first.square().sum(), rows))))
    torch.testing.assert_close(*results)


def test_second_order_goes_on_into_what_made_the_inputs() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    w_hh = torch.randn(16, 4, dtype=torch.float64)

    def penalty(module: ModuleType) -> Tensor:
        x = torch.tanh(torch.ones(3, 2, 4, dtype=torch.float64) @ weight)
        output = module.scan(x, w_hh, w_hh).output
        (d_x,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        (gradient,) = torch.autograd.grad(d_x.square().sum(), weight)
        return gradient

    torch.testing.assert_close(penalty(functional), penalty(reference))


def test_second_order_under_autocast_is_in_the_inputs_dtype() -> None:
    call = ScanCase(dtype=torch.float64).call()
    expected = repeated_gradients(functional, call, 2)
    call = tracked(call)
    inputs = [tensor for _, tensor in leaves(call.inputs) if tensor.requires_grad]
    total = sum_of(outputs_of(functional, call))
    gradients = torch.autograd.grad(total, inputs, create_graph=True)
    squares = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    with torch.autocast("cpu", torch.bfloat16):
        second = torch.autograd.grad(squares, inputs)
    assert_close(dict(zip(expected, second, strict=True)), expected)


def test_second_order_of_a_module() -> None:
    torch.manual_seed(0)
    ours = nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2, dtype=torch.float64)
    theirs = torch.nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        weights = dict(module.named_parameters())
        loss = module(x)[0].square().sum()
        first = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        penalty = torch.stack([gradient.square().sum() for gradient in first]).sum()
        second = torch.autograd.grad(penalty, list(weights.values()))
        results.append(dict(zip(weights, second, strict=True)))
    assert_close(*results)


# torch.func


@pytest.mark.parametrize("case", CASES)
def test_func_vjp_is_autograds(case: Case) -> None:
    call = case.call()
    names = differentiable(call)
    inputs = [tensor for name, tensor in leaves(call.inputs) if name in names]
    function = function_of(functional, call, names)
    outputs, vjp = torch.func.vjp(function, *inputs)
    weights = tuple(torch.randn_like(output) for output in outputs)
    plain = tracked(call)
    sources = [tensor for _, tensor in leaves(plain.inputs) if tensor.requires_grad]
    results = tuple(outputs_of(functional, plain).values())
    expected = torch.autograd.grad(results, sources, weights)
    assert_close(
        dict(zip(names, vjp(weights), strict=True)), dict(zip(names, expected, strict=True))
    )
    for output, result in zip(outputs, results, strict=True):
        torch.testing.assert_close(output, result)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize("case", FEW)
def test_func_jacrev_twice_is_the_hessian(case: Case) -> None:
    call = case.call()
    name = differentiable(call)[0]
    source = dict(leaves(call.inputs))[name]

    function = function_of(functional, call, [name])

    def total(value: Tensor) -> Tensor:
        return torch.stack([output.pow(3).sum() for output in function(value)]).sum()

    expected = torch.autograd.functional.hessian(total, source)
    nested = torch.func.jacrev(torch.func.jacrev(total))(source)
    torch.testing.assert_close(nested, expected)
    torch.testing.assert_close(torch.func.hessian(total)(source), expected)


SAMPLES = 3


def mapped_inputs(call: Call, names: Iterable[str]) -> list[Tensor]:
    """SAMPLES different values of each of the named inputs, stacked."""
    inputs, stacked = dict(leaves(call.inputs)), []
    for name in names:
        value = inputs[name]
        if value.is_floating_point():
            values = [value * (1 + index) / 2 for index in range(SAMPLES)]
        else:
            values = [value.roll(index, -1) for index in range(SAMPLES)]
        stacked.append(torch.stack(values))
    return stacked


@pytest.mark.parametrize("case", CASES)
def test_func_vmap_is_a_loop(case: Case) -> None:
    call = case.call()
    every = [name for name, _ in leaves(call.inputs)]
    # Alone: the batch grows or, over a weight, the operator runs once a sample.
    for names in (*([name] for name in every), every):
        inputs = mapped_inputs(call, names)
        function = function_of(functional, call, names)
        actual = torch.vmap(function)(*inputs)
        expected = [function(*values) for values in zip(*inputs, strict=True)]
        for index, output in enumerate(actual):
            torch.testing.assert_close(
                output, torch.stack([outputs[index] for outputs in expected]), msg=str(names)
            )


@pytest.mark.parametrize("case", CASES)
def test_func_vmap_over_any_dimension(case: Case) -> None:
    call = case.call()
    names = differentiable(call)
    function = function_of(functional, call, names)
    inputs = mapped_inputs(call, names)
    expected = torch.vmap(function)(*inputs)
    moved = [tensor.movedim(0, -1) for tensor in inputs]
    actual = torch.vmap(function, in_dims=-1)(*moved)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("case", FEW)
def test_func_gradients_of_each_sample(case: Case) -> None:
    call = case.call()
    names = differentiable(call)
    inputs = mapped_inputs(call, names)
    function = function_of(functional, call, names)

    def total(*values: Tensor) -> Tensor:
        return torch.stack([output.pow(3).sum() for output in function(*values)]).sum()

    gradient = torch.func.grad(total, tuple(range(len(names))))
    actual = torch.vmap(gradient)(*inputs)
    expected = [gradient(*values) for values in zip(*inputs, strict=True)]
    for index, value in enumerate(actual):
        torch.testing.assert_close(value, torch.stack([sample[index] for sample in expected]))


@pytest.mark.parametrize("case", FEW)
def test_autograd_through_vmap(case: Case) -> None:
    call = case.call()
    names = differentiable(call)
    inputs = [tensor.requires_grad_() for tensor in mapped_inputs(call, names)]
    function = function_of(functional, call, names)
    actual = torch.autograd.grad(
        torch.stack([output.pow(3).sum() for output in torch.vmap(function)(*inputs)]).sum(), inputs
    )
    terms = [
        output.pow(3).sum() for values in zip(*inputs, strict=True) for output in function(*values)
    ]
    expected = torch.autograd.grad(torch.stack(terms).sum(), inputs)
    for value, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, other)


def test_func_vmap_in_vmap() -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 3, 4, 5, 6)
    keys = torch.randn(3, 7, 5, 6)
    inner = torch.vmap(lambda q, k: functional.attend(q, k, k).context)
    actual = torch.vmap(inner, in_dims=(0, None))(query, keys)
    expected = torch.stack(
        [
            functional.attend(q, k, k).context
            for row in query
            for q, k in zip(row, keys, strict=True)
        ]
    )
    torch.testing.assert_close(actual, expected.view(2, 3, 4, 5, 6))


def test_func_linear_takes_rows_of_any_number_of_dimensions() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 5), torch.randn(4)
    for shape in ((3, 5), (3, 2, 5), (3, 2, 2, 5)):
        x = torch.randn(shape)
        actual = torch.vmap(functional.linear, in_dims=(0, None, None))(x, weight, bias)
        torch.testing.assert_close(actual, functional.linear(x, weight, bias))


def test_func_scan_both_maps_over_the_input_and_over_weights() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(3, 4, bidirectional=True)
    weights = {name: weight.detach() for name, weight in layer.named_parameters()}
    stacked = {name: torch.stack([weight, weight / 2]) for name, weight in weights.items()}
    x = torch.randn(2, 5, 6, 3)

    def run(own: dict[str, Tensor], rows: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(layer, own, (rows,))[0]
        return output

    with torch.no_grad():
        torch.testing.assert_close(
            torch.vmap(run, in_dims=(None, 0))(weights, x),
            torch.stack([run(weights, r) for r in x]),
        )
        halves = {name: weight / 2 for name, weight in weights.items()}
        torch.testing.assert_close(
            torch.vmap(run, in_dims=(0, None))(stacked, x[0]),
            torch.stack([run(weights, x[0]), run(halves, x[0])]),
        )


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_func_gives_the_gradients_of_each_row_of_a_module(kind: str, device: torch.device) -> None:
    torch.manual_seed(0)
    layer = getattr(nn, kind)(3, 4, num_layers=2, bidirectional=True, batch_first=True).double()
    weights = {name: weight.detach() for name, weight in layer.named_parameters()}
    x, y = torch.randn(5, 6, 3, dtype=torch.float64), torch.randn(5, 6, 8, dtype=torch.float64)

    def loss(own: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
        output = torch.func.functional_call(layer, own, (row.unsqueeze(0),))[0]
        return (output.squeeze(0) - target).square().mean()

    gradients = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    for index in range(5):
        layer.zero_grad()
        (layer(x[index : index + 1])[0][0] - y[index]).square().mean().backward()
        expected = {name: weight.grad for name, weight in layer.named_parameters()}
        assert_close({n: g[index] for n, g in gradients.items()}, expected)


def test_func_maps_over_an_ensemble_of_modules() -> None:
    torch.manual_seed(0)
    layers = [nn.LSTM(3, 4, num_layers=2) for _ in range(3)]
    weights, _ = torch.func.stack_module_state(layers)  # type: ignore[arg-type]
    x = torch.randn(5, 2, 3)

    def run(own: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(layers[0], own, (x,))[0]
        return output

    expected = torch.stack([layer(x)[0] for layer in layers])
    torch.testing.assert_close(torch.vmap(run)(weights), expected)


def test_func_refuses_to_map_over_no_weight() -> None:
    x, w_ih, w_hh = torch.randn(5, 2, 3), torch.randn(0, 16, 3), torch.randn(16, 4)
    with pytest.raises(RuntimeError, match="pyseq::scan cannot be mapped over no sample"):
        torch.vmap(lambda w: functional.scan(x, w, w_hh).output)(w_ih)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize("case", FEW)
def test_func_jvp_is_refused(case: Case) -> None:
    call = case.call()
    name = differentiable(call)[0]
    source = dict(leaves(call.inputs))[name]
    with pytest.raises(NotImplementedError, match=r"pyseq::\w+ has no forward-mode derivative"):
        torch.func.jvp(function_of(functional, call, [name]), (source,), (source,))


# The specifications as operators


@pytest.mark.parametrize("case", CASES)
def test_reference_operators_agree_with_the_fused_ones(case: Case) -> None:
    call = case.call()
    seen: list[str] = []

    class Recorded(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            name = str(func).removeprefix("pyseq.")
            if name in REFERENCES:
                seen.append(name)
                other = getattr(torch.ops.pyseq, f"{name}_reference")(*args)
                torch.testing.assert_close(other, result)
            return result

    with Recorded():
        outputs_of(functional, call)
    assert call.op in seen


@pytest.mark.parametrize("name", list(REFERENCES))
def test_reference_operators_have_the_schema_of_the_fused_ones(name: str) -> None:
    fused, plain = (
        str(getattr(torch.ops.pyseq, op).default._schema) for op in (name, f"{name}_reference")
    )
    assert plain == fused.replace(f"pyseq::{name}(", f"pyseq::{name}_reference(")


@pytest.mark.parametrize("case", CASES)
def test_several_gradients_at_once(case: Case) -> None:
    """torch.vmap around torch.autograd.grad."""
    call = tracked(case.call())
    output, *_ = outputs_of(functional, call).values()
    wanted = {name: leaf for name, leaf in leaves(call.inputs) if leaf.requires_grad}
    given = torch.randn(3, *output.shape, dtype=torch.float64)
    options: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}

    def gradients(grad: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad(output, list(wanted.values()), grad, **options)
        return dict(zip(wanted, grads, strict=True))

    together = torch.vmap(gradients)(given)
    for number, grad in enumerate(given):
        own = {name: each[number] for name, each in together.items()}
        assert_close(own, gradients(grad))


@pytest.mark.parametrize("case", FEW[:-1])  # a loss has one gradient only
def test_torch_s_older_way_to_several_gradients_is_refused(case: Case) -> None:
    call = tracked(case.call())
    output, *_ = outputs_of(functional, call).values()
    wanted = [leaf for _, leaf in leaves(call.inputs) if leaf.requires_grad]
    with pytest.raises(NotImplementedError, match=r"torch\.vmap around .* is_grads_batched=True"):
        torch.autograd.grad(
            output, wanted, torch.ones(3, *output.shape, dtype=torch.float64), is_grads_batched=True
        )
