# SPDX-License-Identifier: Apache-2.0
"""Modules under torch.compile, torch.export and torch.jit: one graph for all lengths."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from operator_cases import leaves
from tolerances import assert_close
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from pyseq import Seq2Seq, nn
from pyseq._dropout import apply_dropout

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)

#: (T, B) of the calls. No other size is the same number: the compiler takes equal ones for one.
CALLS = ((7, 3), (9, 2), (11, 5))


def layer(make: type[torch.nn.Module], *sizes: int, keep_every: int = 1, **options: Any) -> Any:
    module: Any = make(*sizes, **options)
    module.keep_every = keep_every
    return module


class Loss(torch.nn.Module):
    """The loss of a model, which is a method and not the call of it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = model(dropout=0.0)

    def forward(self, source: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        return self.model.loss(source, lengths, tokens, tokens.roll(-1, 1))


class CopyingLoss(torch.nn.Module):
    """That of a model that copies some of its source; smoothed, so that it needs all
    probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.model = model(dropout=0.0, copy="pointer")

    def forward(self, source: Tensor, lengths: Tensor, tokens: Tensor, copies: Tensor) -> Tensor:
        target = tokens.roll(-1, 1)
        return self.model.loss(source, lengths, tokens, target, copies=copies, label_smoothing=0.1)


def model(**options: Any) -> Seq2Seq:
    return Seq2Seq(31, 33, embedding_size=13, hidden_size=16, num_layers=2, **options)


def rows(steps: int, batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(steps, batch, 4), None, torch.randint(1, steps + 1, (batch,)))  # type: ignore[return-value]


def short_rows(steps: int, batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(steps, batch, 4).transpose(0, 1).bfloat16(),)


def one_step(steps: int, batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 4),)


def queries(steps: int, batch: int) -> tuple[Tensor, ...]:
    return torch.randn(steps, batch, 4), torch.randn(steps + 10, batch, 6)


def sentences(steps: int, batch: int) -> tuple[Tensor, ...]:
    source = torch.randint(4, 31, (batch, steps))
    return source, torch.randint(1, steps + 1, (batch,)), torch.randint(4, 33, (batch, steps + 10))


def copied_sentences(steps: int, batch: int) -> tuple[Tensor, ...]:
    copies = torch.randint(0, 33, (batch, steps))
    copies[:, 0] = 33  # beyond the vocabulary, as is a token of each target
    source, lengths, target = sentences(steps, batch)
    target[:, 2] = 33
    return source, lengths, target, copies


class Subject(NamedTuple):
    """A module, its arguments for a number of steps and rows, and which dimensions are these."""

    make: Callable[[], torch.nn.Module]
    arguments: Callable[[int, int], tuple[Any, ...]]
    dynamic: tuple[tuple[int, ...] | None, ...]


SUBJECTS = {
    "rnn": Subject(lambda: nn.RNN(4, 6, 2, bidirectional=True), rows, ((0, 1), None, (0,))),
    "gru": Subject(lambda: nn.GRU(4, 6, 2), rows, ((0, 1), None, (0,))),
    "lstm": Subject(
        lambda: nn.LSTM(4, 6, 2, bidirectional=True, proj_size=5), rows, ((0, 1), None, (0,))
    ),
    "lstm-keep": Subject(lambda: layer(nn.LSTM, 4, 6, keep_every=4), rows, ((0, 1), None, (0,))),
    "lstm-bfloat16": Subject(
        lambda: nn.LSTM(4, 6, batch_first=True, dtype=torch.bfloat16), short_rows, ((0, 1),)
    ),
    "rnn-cell": Subject(lambda: nn.RNNCell(4, 6), one_step, ((0,),)),
    "gru-cell": Subject(lambda: nn.GRUCell(4, 6), one_step, ((0,),)),
    "lstm-cell": Subject(lambda: nn.LSTMCell(4, 6), one_step, ((0,),)),
    "attention": Subject(lambda: nn.Attention(4, 6, score="concat"), queries, ((0, 1), (0, 1))),
    "decoder": Subject(lambda: nn.AttentionDecoder(4, 8, 6, 2), queries, ((0, 1), (0, 1))),
    "plain-decoder": Subject(
        lambda: nn.AttentionDecoder(4, 8, 6, 2, score=None), queries, ((0, 1), (0, 1))
    ),
    "seq2seq": Subject(lambda: model(dropout=0.0), sentences, ((0, 1), (0,), (0, 1))),
    "loss": Subject(Loss, sentences, ((0, 1), (0,), (0, 1))),
    "copying": Subject(CopyingLoss, copied_sentences, ((0, 1), (0,), (0, 1), (0, 1))),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, and nothing left behind."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def results_of(function: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Tensor]:
    return dict(leaves(function(*arguments)))


def gradients_of(module: torch.nn.Module, results: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {n: w for n, w in module.named_parameters() if w.requires_grad}
    total = torch.stack([value.float().square().sum() for value in results.values()]).sum()
    gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    found = zip(weights, gradients, strict=True)
    return {name: gradient for name, gradient in found if gradient is not None}


# torch.compile


@pytest.mark.parametrize(
    ("subject", "training"),
    [
        *(pytest.param(subject, True, id=f"{n}-training") for n, subject in SUBJECTS.items()),
        # Where inference takes another way: both directions in one operator, no saved states.
        *(pytest.param(SUBJECTS[n], False, id=f"{n}-inference") for n in ("lstm", "decoder")),
    ],
)
def test_one_graph_serves_all_lengths(subject: Subject, training: bool) -> None:
    module = subject.make().train(training)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for number, (steps, batch) in enumerate(CALLS):
        arguments = subject.arguments(steps, batch)
        with (
            torch.set_grad_enabled(training),
            torch._dynamo.config.patch(error_on_recompile=number > 0),
        ):
            actual = results_of(compiled, arguments)
        expected = results_of(module, arguments)
        assert_close({n: v.detach() for n, v in actual.items()}, expected)
        if training:
            assert_close(gradients_of(module, actual), gradients_of(module, expected))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(4, 6, 2, dropout=0.5),
        lambda: nn.GRU(4, 6, variational_dropout=0.5, weight_dropout=0.5),
    ],
    ids=["dropout", "variational"],
)
def test_dropout_is_drawn_at_each_call(make: Callable[[], torch.nn.Module]) -> None:
    module = make()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(7, 3, 4)
    first, second = compiled(x)[0], compiled(x)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    third = compiled(x)[0]
    torch.manual_seed(3)
    assert torch.equal(compiled(x)[0], third)
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_models_refuse_what_cannot_be_copied() -> None:
    module = CopyingLoss().eval()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for copied, target, match in (
        (33 + 7, 4, r"copies must hold ids .* below V \+ S"),
        (-1, 4, "copies must hold ids of at least 0"),
        (33, 34, "target_out must hold, from 33 on, what the source of its own row has to copy"),
    ):
        source, _, tokens, copies = copied_sentences(7, 3)
        arguments = source, torch.full((3,), 7), tokens, copies
        with torch.no_grad():
            assert compiled(*arguments).isfinite()
            copies[1, 2], tokens[1, 4] = copied, target
            for call in (module, compiled):
                with pytest.raises(RuntimeError, match=match):
                    call(*arguments)


def test_compiled_dropout_keeps_the_mean() -> None:
    dropout = torch.compile(apply_dropout, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (100_000, 100_003):
        kept = dropout(torch.ones(size), 0.3)
        assert kept.unique().tolist() == pytest.approx([0, 1 / 0.7], rel=1e-4)
        assert kept.mean().item() == pytest.approx(1, abs=0.01)


def test_no_compiled_graph_breaks_the_second_derivative_of_eager_code() -> None:
    module = nn.LSTM(4, 6, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 3, 4, dtype=torch.float64)
    weights = list(module.parameters())
    first = torch.autograd.grad(compiled(x)[0].square().sum(), weights)
    eager = torch.autograd.grad(module(x)[0].square().sum(), weights, create_graph=True)
    torch.testing.assert_close(first, tuple(gradient.detach() for gradient in eager))
    torch.stack([gradient.square().sum() for gradient in eager]).sum().backward()
    assert module.weight_hh_l0.grad is not None


def test_code_is_generated_for_what_is_around_the_operators() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
    recurrent = nn.GRU(4, 6)
    weights = [*module.parameters(), *recurrent.parameters()]

    def run(x: Tensor) -> Tensor:
        output: Tensor = recurrent(module(x))[0]
        return output.square().sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    x = torch.randn(7, 3, 4)
    # What another version of pyseq left in the cache on disk may call operators otherwise.
    with fresh_cache():
        actual, expected = compiled(x), run(x)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, weights), torch.autograd.grad(expected, weights)
        )


# torch.export


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # torch's own use
@pytest.mark.parametrize(
    ("subject", "grad"),
    [
        *(pytest.param(subject, False, id=f"{n}-no_grad") for n, subject in SUBJECTS.items()),
        *(pytest.param(SUBJECTS[n], True, id=f"{n}-grad") for n in ("lstm", "decoder")),
    ],
)
def test_an_exported_program_serves_all_lengths(subject: Subject, grad: bool) -> None:
    module = subject.make().eval()
    shapes = tuple(
        None if sizes is None else dict.fromkeys(sizes, torch.export.Dim.AUTO)
        for sizes in subject.dynamic
    )
    file = io.BytesIO()
    with torch.set_grad_enabled(grad):
        arguments = subject.arguments(*CALLS[0])
        program = torch.export.export(module, arguments, dynamic_shapes=shapes)
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file)
        for steps, batch in CALLS[1:]:
            arguments = subject.arguments(steps, batch)
            expected = results_of(module, arguments)
            for each in (program, loaded):
                assert_close(results_of(each.module(), arguments), expected)
    names = {
        node.target.namespace
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    }
    assert "pyseq" in names


# torch.jit


@pytest.mark.parametrize(
    "name",
    [
        "rnn",
        "gru",
        "lstm",
        "lstm-bfloat16",
        "gru-cell",
        "lstm-cell",
        "seq2seq",
        "loss",
        "copying",
    ],
)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_a_traced_module_serves_all_lengths(name: str, grad: bool) -> None:
    subject = SUBJECTS[name]
    module = subject.make().eval()

    def given(steps: int, batch: int) -> tuple[Any, ...]:
        # A trace takes tensors only.
        arguments = subject.arguments(steps, batch)
        return arguments[:1] if arguments[1:2] == (None,) else arguments

    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, given(*CALLS[0]))
        for steps, batch in CALLS[1:]:
            arguments = given(steps, batch)
            actual, expected = results_of(traced, arguments), results_of(module, arguments)
            for left, right in zip(actual.values(), expected.values(), strict=True):
                torch.testing.assert_close(left, right)


def test_a_trace_may_not_return_none() -> None:
    with pytest.raises(RuntimeError, match="Only tensors, lists, tuples of tensors"):
        torch.jit.trace(nn.Attention(4, 6), queries(7, 3))


@pytest.mark.parametrize("name", [name for name in SUBJECTS if name != "loss"])
def test_scripts_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=r"torch.jit.script must be given layers of torch.nn"):
        torch.jit.script(SUBJECTS[name].make())
