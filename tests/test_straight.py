# SPDX-License-Identifier: Apache-2.0
"""Layers and cells straight to the kernels: the same bits, and only where nothing looks on."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pyseq
from pyseq import nn
from pyseq.functional import scans

I, H = 5, 9  # noqa: E741  (the letters of the docstrings)

#: Class name and the options that make it another cell.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 4}),
    "indrnn": ("IndRNN", {}),
}
SIZES = [(1, 1), (1, 3), (6, 1), (4, 2), (3, 9), (2, 0)]
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "batch_first": {"batch_first": True},
    "two_layers": {"num_layers": 2},
    "both": {"bidirectional": True},
    "both_batch_first": {"bidirectional": True, "batch_first": True, "num_layers": 2},
}


def flat(result: Any) -> list[Tensor]:
    """The output and all parts of the last state."""
    output, state = result
    return [output, *([state] if isinstance(state, Tensor) else state)]


def layer(kind: str, **options: Any) -> nn.LSTM:
    name, extra = KINDS[kind]
    return getattr(nn, name)(I, H, **extra, **options)


def random_state(module: nn.LSTM, batch: int | None) -> Any:
    """A state for ``batch`` rows; without their dimension for None."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or H] + [H] * (module.mode == "LSTM")
    rows = () if batch is None else (batch,)
    dtype = torch.float64 if module.weight_ih_l0.dtype == torch.float64 else torch.float32
    parts = [torch.randn(count, *rows, size, dtype=dtype) for size in sizes]
    return parts[0] if len(parts) == 1 else tuple(parts)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of a layer since then went straight."""
    said: list[bool] = []
    straight = scans.scan_layers

    def recorded(*args: Any) -> Any:
        result = straight(*args)
        said.append(result is not None)
        return result

    monkeypatch.setattr(scans, "scan_layers", recorded)
    return said


@contextlib.contextmanager
def by_the_operators() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scans, "scan_layers", lambda *_: None)
        yield


def assert_same_call(module: nn.LSTM, *args: Any, **options: Any) -> None:
    """A call gives what the operators give: bits, shapes and strides."""
    with torch.no_grad():
        got = flat(module(*args, **options))
        with by_the_operators():
            expected = flat(module(*args, **options))
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
        assert ours.is_contiguous() == theirs.is_contiguous()
    places = [each.data_ptr() for each in got if each.numel() > 0]
    assert len(set(places)) == len(places)


# The same bits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_the_operators(kind: str, form: str, answers: list[bool]) -> None:
    for dtype, (steps, batch) in itertools.product((torch.float32, torch.float64), SIZES):
        module = layer(kind, dtype=dtype, **FORMS[form])
        sizes = (batch, steps, I) if module.batch_first else (steps, batch, I)
        x = torch.randn(sizes, dtype=dtype)
        assert_same_call(module, x)
        assert_same_call(module, x, random_state(module, batch))
    assert all(answers[::2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_sequence_has_no_batch(kind: str, form: str, answers: list[bool]) -> None:
    module = layer(kind, **FORMS[form])
    for steps in (1, 4):
        x = torch.randn(steps, I)
        assert_same_call(module, x)
        assert_same_call(module, x, random_state(module, None))
    assert answers == [True] * 4


@pytest.mark.parametrize("form", FORMS)
def test_ragged_rows_go_straight_too(form: str, answers: list[bool]) -> None:
    module = layer("lstm", **FORMS[form])
    lengths = torch.tensor([4, 0, 2])
    x = torch.randn((3, 4, I) if module.batch_first else (4, 3, I))
    assert_same_call(module, x, lengths=lengths)
    assert_same_call(module, x, random_state(module, 3), lengths.int())
    assert answers == [True] * 2


def test_any_strides_do(answers: list[bool]) -> None:
    module = layer("lstm", num_layers=2, bidirectional=True)
    h, c = (part.transpose(0, 2).contiguous().transpose(0, 2) for part in random_state(module, 3))
    x = torch.randn(I, 2, 3).permute(1, 2, 0)
    assert not x.is_contiguous()
    assert not h.is_contiguous()
    assert_same_call(module, x, (h, c))
    assert_same_call(module, torch.randn(2, 1, I).expand(2, 3, I), (h[:, :1].expand_as(h), c))
    assert answers == [True] * 2


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_quantized_weights_go_straight_too(weights: Any, answers: list[bool]) -> None:
    module = pyseq.quantize(layer("gru", num_layers=2), weights)
    assert_same_call(module, torch.randn(1, 1, I), random_state(module, 1))
    assert answers == [True]
    with torch.no_grad(), pytest.raises(RuntimeError, match="quantized module is for inference"):
        module.train()(torch.randn(1, 1, I))


class Counted(torch.nn.Module):
    """A parametrization that counts how often it makes its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.count += 1
        return weight * 2


@pytest.mark.parametrize("around", ["gradients", "autocast", "profiler", "dispatch_mode"])
def test_no_weight_is_made_for_a_call_that_is_handed_back(around: str, answers: list[bool]) -> None:
    module, made = layer("lstm"), Counted()
    parametrize.register_parametrization(module, "weight_hh_l0", made, unsafe=True)
    x = torch.randn(1, 1, I)
    made.count = 0
    with torch.no_grad():
        module(x)
        assert (made.count, answers) == (1, [True])
        with AROUND[around]():
            module(x)
    assert (made.count, answers) == (2, [True, False])


def test_weights_are_those_of_the_moment(answers: list[bool]) -> None:
    module = layer("lstm")
    x = torch.randn(1, 1, I)
    assert_same_call(module, x)
    module.weight_hh_l0.data.mul_(2)
    module.bias_ih_l0.data = torch.randn(4 * H)
    assert_same_call(module, x)
    parametrize.register_parametrization(module, "weight_ih_l0", torch.nn.Tanh())
    assert_same_call(module, x)
    assert_same_call(copy.deepcopy(module), x)
    assert answers == [True] * 4


@pytest.mark.parametrize("cell", ["RNNCell", "GRUCell", "LSTMCell", "IndRNNCell"])
def test_cells_give_the_bits_of_one_step(cell: str) -> None:
    module = getattr(nn, cell)(I, H)
    x, h = torch.randn(3, I), torch.randn(3, H)
    state: Any = (h, torch.randn(3, H)) if cell == "LSTMCell" else h
    with torch.no_grad():
        straight = module(x, state)
    recorded = module(x.requires_grad_(), state)
    for ours, theirs in zip(pieces(straight), pieces(recorded), strict=True):
        assert torch.equal(ours, theirs)
        assert theirs.requires_grad
        assert not ours.requires_grad


def pieces(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state)


# Only where nothing looks on


class OwnClass(torch.Tensor):
    """Tensors of a class of their own, which may see every call."""


class FunctionCalls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class OperatorCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


#: What is going on around a call that the operators have to be called for.
AROUND: dict[str, Callable[[], Any]] = {
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "function_mode": FunctionCalls,
    "dispatch_mode": OperatorCalls,
    "profiler": torch.profiler.profile,
    "default_device": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("around", AROUND)
def test_where_something_looks_on_the_operators_are_called(
    around: str, answers: list[bool]
) -> None:
    module, x = layer("lstm"), torch.randn(1, 1, I)
    with torch.no_grad():
        expected = module(x)[0]
        with AROUND[around]() as seen:
            got = module(x)[0]
    assert answers == [True, False]
    assert torch.equal(got, expected)
    assert got.requires_grad == (around == "gradients")
    if around == "dispatch_mode":
        assert "pyseq.scan.default" in seen.names
    if around == "profiler":
        assert "pyseq::scan" in {event.name for event in seen.events()}


def test_what_is_special_about_an_argument_goes_to_the_operators(answers: list[bool]) -> None:
    module = layer("lstm")
    x, (h, c) = torch.randn(1, 1, I), random_state(module, 1)
    wanted = torch.zeros(1, 1, I, requires_grad=True)
    assert module(wanted)[0].requires_grad
    with torch.no_grad():
        module(x.as_subclass(OwnClass))
        module(x, [h, c])
        module.bfloat16()(x.bfloat16())
    assert answers == [False] * 4
    module.float().requires_grad_(False)
    module(x, (h, c))
    assert answers.pop()
    assert module(x, (h.clone().requires_grad_(), c))[0].requires_grad
    assert not answers.pop()


def test_inference_mode_goes_straight(answers: list[bool]) -> None:
    module, x = layer("lstm", num_layers=2), torch.randn(2, 3, I)
    with torch.no_grad():
        expected = flat(module(x))
    with torch.inference_mode():
        first = module(x)
        second = module(first[0][..., :I], first[1])
    assert answers == [True] * 3
    assert all(each.is_inference() for each in flat(second))
    assert all(map(torch.equal, flat(first), expected))


def test_forward_mode_is_refused_as_ever() -> None:
    module, x = layer("lstm").requires_grad_(False), torch.randn(1, 1, I)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        module(forward_ad.make_dual(x, torch.ones_like(x)))


def test_transforms_and_traces_see_the_operators(answers: list[bool]) -> None:
    module, xs = layer("gru").requires_grad_(False), torch.randn(3, 1, 2, I)
    expected = torch.stack([module(x)[0] for x in xs])
    assert answers == [True] * 3
    torch.testing.assert_close(torch.func.vmap(lambda x: module(x)[0])(xs), expected)
    traced = torch.jit.trace(module, (xs[0],))
    assert "pyseq::scan" in str(traced.inlined_graph)
    assert not all(answers[3:])
    answers.clear()
    program = torch.export.export(module, (xs[0],))
    assert "pyseq.scan.default" in str(program.graph)
    assert not any(answers)


def test_options_and_other_results_go_to_the_operators(answers: list[bool]) -> None:
    x = torch.randn(2, 1, I)
    with torch.no_grad():
        layer("lstm")(x, resets=torch.zeros(2, 1, dtype=torch.bool))
        layer("lstm")(x, return_states=True)
        layer("lstm", zoneout_h=0.1)(x)
        layer("lstm", dropout=0.5, num_layers=2)(x)
        assert answers == []
        layer("lstm", dropout=0.5, num_layers=2).eval()(x)
        assert answers == [True]


@pytest.mark.parametrize(
    ("input", "hx"),
    [
        (torch.randn(1, 1, I + 1), None),
        (torch.randn(1, 1, I, dtype=torch.float64), None),
        (torch.randn(1, 1, 1, I), None),
        (torch.randn(0, 1, I), None),
        (torch.randn(1, 1, I), torch.randn(1, 1, H)),
        (torch.randn(1, 1, I), (torch.randn(1, 2, H), torch.randn(1, 2, H))),
        (torch.randn(1, 1, I), (torch.randn(2, 1, H), torch.randn(2, 1, H))),
        (torch.randn(1, 1, I), (torch.randn(1, H), torch.randn(1, H))),
        (torch.randn(1, 1, I), (torch.randn(1, 1, H), None)),
        (torch.randn(1, 1, I), (torch.randn(1, 1, H).double(), torch.randn(1, 1, H))),
    ],
)
def test_errors_are_said_in_the_same_words(input: Tensor, hx: Any) -> None:
    module, said = layer("lstm"), []
    with torch.no_grad():
        for how in (contextlib.nullcontext, by_the_operators):
            with how(), pytest.raises((RuntimeError, ValueError)) as error:
                module(input, hx)
            said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("size", [H - 3, H + 3])
def test_layers_of_different_sizes_are_refused(size: int, both: bool) -> None:
    module = layer("gru", num_layers=2, bidirectional=both)
    other = nn.GRU(2 * H if both else H, size, bidirectional=both)
    for name, weight in other.named_parameters():
        setattr(module, name.replace("_l0", "_l1"), weight)
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"{H}.* {size}"):
        module(torch.randn(2, 3, I))


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("parts", [0, 1, 3])
def test_a_state_of_other_parts_is_refused(kind: str, parts: int) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=f"the state of .*got tuple of {parts}"):
        layer(kind)(torch.randn(1, 1, I), (torch.zeros(1, 1, H),) * parts)


@pytest.mark.parametrize(
    ("names", "bidirectional", "error"),
    [
        ([], False, None),
        ([["weight_ih_l0", "weight_hh_l0"]] * 3, True, None),
        ([["weight_ih_l0"]], False, None),
        ([["weight_ih_l0", "weight_hh_l0"] * 3], False, None),
        ([None], False, TypeError),
        ([["weight_ih_l0", 3]], False, TypeError),
        ([["weight_ih_l0", []]], False, TypeError),
        ([["weight_ih_l0", "weight_hh_l9"]], False, AttributeError),
    ],
)
def test_wrong_names_of_weights_do_no_harm(
    names: Any, bidirectional: bool, error: type[Exception] | None
) -> None:
    module, x = layer("lstm"), torch.randn(2, 3, I)
    call = (module, module._parameters, names, x, None, None, "lstm", bidirectional, False, False)
    with torch.no_grad(), contextlib.nullcontext() if error is None else pytest.raises(error):
        assert scans.scan_layers(*call) is None
