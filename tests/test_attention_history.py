# SPDX-License-Identifier: Apache-2.0
"""Attention of steps in order that sees its past weights: the operator and the module."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cuda_device import why_none
from tolerances import assert_close, assert_same_bits
from torch import Tensor

from pyseq import functional, nn, reference
from pyseq.functional import _stepwise


@dataclass(frozen=True)
class Case:
    """Sizes and options of a call."""

    history: str = "previous"
    steps: int = 5
    batch: int = 3
    source: int = 7
    size: int = 6  # A, of the query too
    memory: int = 4
    taps: int = 3
    heads: int = 1
    window: str | None = None
    ragged: bool = False
    past: bool = False

    def __str__(self) -> str:
        sizes = f"T{self.steps}-B{self.batch}-S{self.source}-A{self.size}-K{self.taps}"
        parts = [self.history, sizes, f"N{self.heads}", self.window or "global"]
        return "-".join(parts + ["ragged"] * self.ragged + ["past"] * self.past)

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        shapes = {
            "query": (self.steps, self.batch, self.size),
            "keys": (self.source, self.batch, self.size),
            "memory": (self.source, self.batch, self.memory),
            "weight_v": (self.size,),
            "weight_history": (self.size, self.taps),
        }
        if self.past:
            shapes["past"] = (self.batch, self.heads, self.source)
        made = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
        if self.window == "local-p":
            positions = torch.rand(self.steps, self.batch, dtype=dtype)
            made["positions"] = self.source * positions
        return {name: tensor.requires_grad_() for name, tensor in made.items()}

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"history": self.history, "heads": self.heads}
        if self.window is not None:
            options["window"] = 2
        if self.window == "local-m":
            options["step"] = torch.arange(self.batch)
        if self.ragged:
            options["lengths"] = torch.tensor([self.source, 2, 0, 1])[: self.batch]
        return options


CASES = [
    Case(),
    Case(history="cumulative", taps=1),
    Case(heads=2, ragged=True, past=True),
    Case(history="cumulative", heads=3, memory=6, ragged=True, past=True, taps=5),
    Case(window="local-m", ragged=True),
    Case(history="cumulative", window="local-m", heads=2, past=True),
    Case(window="local-p", heads=2, ragged=True, past=True),
    Case(history="cumulative", window="local-p", taps=9),
    Case(steps=1, past=True),
    Case(history="cumulative", steps=1, batch=1, size=1, memory=1),
    Case(batch=0, heads=2),
    Case(steps=0, past=True),
    Case(source=1, taps=31, history="cumulative"),
    Case(source=0, heads=2, past=True),
    Case(source=40, size=33, memory=19, taps=31, ragged=True),
]
EACH = pytest.mark.parametrize("case", CASES, ids=str)


def run(
    attend: Callable[..., Any], given: dict[str, Tensor], gradients: bool = True, **options: Any
) -> dict[str, Tensor]:
    """The results, and the gradients of everything that is given."""
    result = attend(**given, need_weights=True, **options)
    found: dict[str, Tensor] = result._asdict()
    if gradients:
        total = torch.zeros((), dtype=torch.float64)
        for part in found.values():
            total = total + (part * torch.linspace(-1, 2, part.numel()).view_as(part)).sum()
        leaves = torch.autograd.grad(total, list(given.values()), materialize_grads=True)
        found |= {f"d_{name}": part for name, part in zip(given, leaves, strict=True)}
    return found


@EACH
def test_values_and_gradients_are_those_of_the_reference(case: Case) -> None:
    given = case.inputs()
    actual = run(functional.attend_history, given, **case.options())
    assert_close(actual, run(reference.attend_history, given, **case.options()))
    if case.batch > 0 and case.steps > 1 and case.source > 1:
        assert actual["d_weight_history"].abs().sum() > 0


@pytest.mark.skipif(why_none() is not None, reason=str(why_none()))
@EACH
def test_on_a_cuda_device(case: Case) -> None:
    given = case.inputs()
    expected = run(reference.attend_history, given, **case.options())
    with torch.device("cuda"):
        placed = {name: x.detach().to("cuda").requires_grad_() for name, x in given.items()}
        actual = run(functional.attend_history, placed, **case.options())
    assert_close({name: x.cpu() for name, x in actual.items()}, expected)


def keyed(case: Case, given: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of the operator."""
    options = case.options() | {"window": 0 if case.window is None else 2}
    return {name: tensor.detach() for name, tensor in given.items()} | options


def gradients(case: Case, given: dict[str, Tensor], results: tuple[Tensor, ...]) -> dict[str, Any]:
    """The arguments of the backward operator."""
    incoming = [torch.linspace(-1, 2, each.numel()).view_as(each).to(each) for each in results]
    names = ("lengths", "past", "positions", "step")
    return {
        **dict(zip(("d_context", "d_attn", "d_past_n"), incoming, strict=True)),
        **dict.fromkeys(names),
        **keyed(case, given),
        "attn": results[1],
    }


@EACH
def test_other_devices_take_step_by_step(case: Case) -> None:
    """What they run, on the CPU."""
    given = case.inputs()
    operators = torch.ops.pyseq
    with torch.no_grad():
        expected = operators.attend_history(**keyed(case, given))
        found = _stepwise.attend_history(**keyed(case, given))
        assert_close(dict(enumerate(found)), dict(enumerate(expected)))
        arguments = gradients(case, given, expected)
        expected = operators.attend_history_backward(**arguments)
        found = _stepwise.attend_history_backward(**arguments)
        assert_close(dict(enumerate(found)), dict(enumerate(expected)))
        for name in ("d_context", "d_attn", "d_past_n"):
            one = arguments | dict.fromkeys(("d_context", "d_attn", "d_past_n"))
            one[name] = arguments[name]
            expected = operators.attend_history_backward(**one)
            found = _stepwise.attend_history_backward(**one)
            assert_close(dict(enumerate(found)), dict(enumerate(expected)))


def test_short_types_are_added_up_in_float32_there_too() -> None:
    case = Case(history="cumulative", past=True)
    given = case.inputs(torch.bfloat16)
    expected = torch.ops.pyseq.attend_history(**keyed(case, given))
    found = _stepwise.attend_history(**keyed(case, given))
    assert {each.dtype for each in found} == {torch.bfloat16}
    assert_close(dict(enumerate(found)), dict(enumerate(expected)))


def test_the_reference_is_the_equation() -> None:
    """A loop over positions and taps, written out."""
    case = Case(history="cumulative", batch=1, heads=1, past=True)
    given = case.inputs()
    query, keys, memory, v, u = (
        given[name].detach() for name in ("query", "keys", "memory", "weight_v", "weight_history")
    )
    past = given["past"].detach()[0, 0].clone()
    contexts = []
    for t in range(case.steps):
        scores = torch.empty(case.source, dtype=torch.float64)
        for s in range(case.source):
            inside = query[t, 0] + keys[s, 0]
            for j in range(case.taps):
                neighbour = s + j - (case.taps - 1) // 2
                if 0 <= neighbour < case.source:
                    inside = inside + u[:, j] * past[neighbour]
            scores[s] = v @ inside.tanh()
        weights = scores.softmax(0)
        past += weights
        contexts.append(weights @ memory[:, 0])
    result = reference.attend_history(**given, history="cumulative")
    assert_close(
        {"context": result.context[:, 0], "past": result.past[0, 0]},
        {"context": torch.stack(contexts), "past": past},
    )


@pytest.mark.parametrize("history", ["previous", "cumulative"])
def test_single_queries_are_one_call(history: str) -> None:
    case = Case(history=history, heads=2, window="local-m", ragged=True)
    given = {name: tensor.detach() for name, tensor in case.inputs().items()}
    options = case.options()
    whole = functional.attend_history(**given, **options)
    first, contexts, past = options.pop("step"), [], None
    for t, query in enumerate(given.pop("query")):
        context, weights, past = functional.attend_history(
            query.unsqueeze(0), **given, **options, past=past, step=first + t
        )
        assert weights is None
        contexts.append(context)
    assert past is not None
    assert_close(
        {"context": torch.cat(contexts), "past": past},
        {"context": whole.context, "past": whole.past},
    )


@pytest.mark.parametrize("case", [CASES[3], CASES[6]], ids=str)
def test_derivatives_are_those_of_the_values(case: Case) -> None:
    given = replace(case, steps=3).inputs()
    names, tensors = zip(*given.items(), strict=True)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, tensors, strict=True))
        result = functional.attend_history(**named, need_weights=True, **case.options())
        assert result.weights is not None
        return result.context, result.weights, result.past

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


def test_what_padding_holds_does_not_matter() -> None:
    case = Case(ragged=True, heads=2)
    given, options = case.inputs(), case.options()
    expected = run(functional.attend_history, given, **options)
    padding = torch.arange(case.source).unsqueeze(1) >= options["lengths"]
    spoilt = {
        name: given[name].detach().masked_fill(padding.unsqueeze(2), torch.nan).requires_grad_()
        for name in ("keys", "memory")
    }
    actual = run(functional.attend_history, given | spoilt, **options)
    assert_close(actual, expected)
    assert actual["weights"][:, 2].eq(0).all()
    assert actual["context"][:, 2].eq(0).all()


@pytest.mark.parametrize("needs", [True, False], ids=["weights", "none"])
@pytest.mark.parametrize("case", [CASES[1], CASES[6]], ids=str)
def test_the_operators_pass_opcheck(case: Case, needs: bool) -> None:
    given = case.inputs(torch.float32)
    arguments = keyed(case, given)
    torch.library.opcheck(
        torch.ops.pyseq.attend_history.default, (), arguments | given | {"need_weights": needs}
    )
    backward = gradients(case, given, torch.ops.pyseq.attend_history(**arguments))
    torch.library.opcheck(
        torch.ops.pyseq.attend_history_backward.default,
        (),
        backward,
        test_utils=("test_schema", "test_faketensor"),
    )


def test_bits_depend_on_no_number_of_threads(set_threads: Callable[[int], None]) -> None:
    case = Case(batch=5, heads=2, steps=12, source=64, size=32, memory=32)
    given, found = case.inputs(torch.float32), []
    for threads in (1, 3):
        set_threads(threads)
        # The product that makes the gradient of the memory is torch's.
        results = run(functional.attend_history, given, **case.options())
        del results["d_memory"]
        found.append(results)
    assert_same_bits(found[1], found[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_short_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    given = Case(window="local-p", past=True).inputs(dtype)
    given["positions"] = given["positions"].detach().float().requires_grad_()
    exact = {name: tensor.detach().double() for name, tensor in given.items()}
    actual = run(functional.attend_history, given, gradients=False, window=2)
    expected = run(reference.attend_history, exact, gradients=False, window=2)
    assert {part.dtype for part in actual.values()} == {dtype}
    assert_close(actual, expected)
    actual["context"].float().sum().backward()
    assert all(
        tensor.grad is not None and tensor.grad.isfinite().all() for tensor in given.values()
    )


def test_transforms_go_through() -> None:
    case = Case(history="cumulative", heads=2)
    given = {name: tensor.detach() for name, tensor in case.inputs().items()}

    def context(query: Tensor, weight_history: Tensor) -> Tensor:
        named = given | {"query": query, "weight_history": weight_history}
        return functional.attend_history(**named, **case.options()).context

    queries = torch.stack((given["query"], -given["query"]))
    weights = torch.stack((given["weight_history"], 2 * given["weight_history"]))
    for mapped, dims in (((queries, weights[0]), (0, None)), ((queries, weights), (0, 0))):
        actual = torch.vmap(context, dims)(*mapped)
        for n in range(2):
            expected = context(queries[n], weights[0 if dims[1] is None else n])
            assert_close({"context": actual[n]}, {"context": expected})
    gradient = torch.func.grad(lambda u: context(queries[0], u).square().sum())(weights[0])
    leaf = weights[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(context(queries[0], leaf).square().sum(), leaf)
    assert_close({"gradient": gradient}, {"gradient": expected})


def test_autocast_leaves_the_operator_in_float32() -> None:
    given = Case().inputs(torch.float32)
    expected = functional.attend_history(**given).context
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(functional.attend_history(**given).context, expected)


def test_one_graph_compiles() -> None:
    given = Case(heads=2).inputs(torch.float32)

    def context(query: Tensor) -> Tensor:
        return functional.attend_history(**given | {"query": query}, heads=2).context

    compiled = torch.compile(context, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(given["query"]), context(given["query"]))


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "history": ({"history": "all"}, ValueError, "history must be one of .*got 'all'"),
    "taps": (
        {"weight_history": torch.ones(6, 2, dtype=torch.float64)},
        RuntimeError,
        r"weight_history must be \(A, K\) with an odd K, got \(6, 2\)",
    ),
    "rows": (
        {"weight_history": torch.ones(5, 3, dtype=torch.float64)},
        RuntimeError,
        r"weight_history must be \(A, K\) = \(6, 3\), got \(5, 3\)",
    ),
    "past": (
        {"past": torch.ones(3, 7, dtype=torch.float64)},
        RuntimeError,
        r"past must be \(B, N, S\) = \(3, 1, 7\), got \(3, 7\)",
    ),
    "keys_rows": (
        {"keys": torch.ones(7, 1, 6, dtype=torch.float64)},
        RuntimeError,
        r"keys must be \(S, B, A\) = \(7, 3, .*got \(7, 1, 6\)",
    ),
    "keys_dtype": (
        {"keys": torch.ones(7, 3, 6)},
        RuntimeError,
        "keys must have the dtype of query",
    ),
    "dtype": ({"past": torch.ones(3, 1, 7)}, RuntimeError, "past must have the dtype of query"),
    "heads": ({"heads": 4}, ValueError, "heads must divide A = 6, got 4"),
    "window": ({"window": 0}, ValueError, "window must be .*got 0"),
    "step": ({"step": torch.zeros(3)}, ValueError, "step goes with a window .*got no window"),
    "weight_v": ({"weight_v": None}, TypeError, "weight_v must be a tensor, got None"),
}


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_wrong_arguments_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = Case().inputs()
    with pytest.raises(error, match=message):
        functional.attend_history(**given | changes)


@pytest.mark.parametrize("name", ["history", "taps", "rows", "past", "keys_rows", "dtype", "heads"])
def test_wrong_arguments_are_refused_step_by_step(name: str) -> None:
    changes, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        _stepwise.attend_history(**Case().inputs() | changes)


# The module


def module(**options: Any) -> nn.Attention:
    how = {"score": "concat", "history": "previous", "history_size": 3, "heads": 2} | options
    return nn.Attention(6, 4, attention_size=8, dtype=torch.float64, **how)


def test_attention_is_that_of_the_reference() -> None:
    attention = module(window="local-p", window_size=2)
    query = torch.randn(5, 3, 6, dtype=torch.float64)
    memory, lengths = torch.randn(7, 3, 4, dtype=torch.float64), torch.tensor([7, 3, 0])
    score, own = attention.score, attention.positions
    assert own is not None
    assert score.weight_memory is not None
    assert score.weight_v is not None
    assert score.weight_history is not None
    expected = reference.attend_history(
        query,
        reference.linear(memory, score.weight_memory),
        memory,
        lengths,
        weight_query=score.weight_query,
        weight_v=score.weight_v,
        weight_history=score.weight_history,
        heads=2,
        window=2,
        positions=reference.predict_positions(query, own.weight, own.weight_v, 7, lengths),
        need_weights=True,
    )
    actual = attention.attend_history(query, memory, lengths, need_weights=True)
    assert_close(actual._asdict(), expected._asdict())
    names, parameters = zip(*attention.named_parameters(), strict=True)
    gradients = [
        dict(zip(names, torch.autograd.grad(each.context.square().sum(), parameters), strict=True))
        for each in (actual, expected)
    ]
    assert_close(*gradients)
    context, weights = attention(query, memory, lengths, need_weights=True)
    assert torch.equal(context, actual.context)
    assert weights.shape == (5, 3, 2, 7)


def test_queries_may_come_one_by_one() -> None:
    attention = module(history="cumulative", window="local-m", batch_first=True)
    query, memory = (torch.randn(3, n, k, dtype=torch.float64) for n, k in ((5, 6), (7, 4)))
    whole, _ = attention(query, memory)
    past, contexts = None, []
    for t in range(5):
        step = torch.full((3,), t)
        context, _, past = attention.attend_history(
            query[:, t : t + 1], memory, step=step, past=past
        )
        contexts.append(context)
    assert_close({"context": torch.cat(contexts, 1)}, {"context": whole})
    assert past is not None
    assert past.shape == (3, 2, 7)


def test_modules_pickled_before_there_was_a_history_still_work() -> None:
    attention = nn.Attention(4, 4, dtype=torch.float64)
    query = torch.randn(2, 3, 4, dtype=torch.float64)
    expected, _ = attention(query, query)
    del attention.__dict__["history"]
    context, _ = pickle.loads(pickle.dumps(attention))(query, query)
    assert torch.equal(context, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "dot"}, "history goes with score 'concat', got 'previous' with 'dot'"),
        ({"history": "all"}, "history must be one of .*got 'all'"),
        ({"history": None}, "history_size goes with a history, got 3 without one"),
        ({"history_size": 4}, "history_size must be odd .*got 4"),
    ],
    ids=["score", "history", "size", "even"],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_a_past_goes_with_a_history() -> None:
    attention = nn.Attention(4, 4)
    query = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="past goes with a history"):
        attention(query, query, past=torch.zeros(3, 1, 2))
    with pytest.raises(ValueError, match="for attention with a history, got none"):
        attention.attend_history(query, query)
    assert "history='previous'" in repr(module())
