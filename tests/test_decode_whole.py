# SPDX-License-Identifier: Apache-2.0
"""Decoders with their keys in one call: the same bits, and only where nothing looks on."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pyseq
from pyseq import nn
from pyseq.comparison import reference_operators
from pyseq.functional import decoding
from pyseq.types import DecoderOutput

I, H, M = 5, 9, 7  # noqa: E741  (the letters of the docstrings)

FORMS: dict[str, dict[str, Any]] = {
    "general": {},
    "dot": {"score": "dot", "memory_size": H},
    "concat": {"score": "concat", "attention_size": 6},
    "gru": {"cell": "gru"},
    "rnn": {"cell": "rnn_relu", "num_layers": 2},
    "two_layers": {"num_layers": 2},
    "batch_first": {"batch_first": True},
    "without_feeding": {"input_feeding": False},
    "context_fed": {"feed": "context"},
    "bahdanau": {"order": "bahdanau", "score": "concat"},
    "heads": {"heads": 3, "memory_size": 6},
}
SIZES = [(1, 1, 1), (1, 1, 4), (3, 2, 4), (5, 9, 3), (2, 0, 3)]  # T, B, S


def decoder(form: str = "general", **options: Any) -> nn.AttentionDecoder:
    settings: dict[str, Any] = {"memory_size": M, **FORMS[form], **options}
    return nn.AttentionDecoder(I, H, **settings)


def inputs(module: nn.AttentionDecoder, steps: int, batch: int, source: int) -> tuple[Tensor, ...]:
    dtype = torch.float64 if module.weight_hh_l0.dtype == torch.float64 else torch.float32
    x = torch.randn(steps, batch, I, dtype=dtype)
    memory = torch.randn(source, batch, module.memory_size, dtype=dtype)
    return tuple(t.transpose(0, 1) for t in (x, memory)) if module.batch_first else (x, memory)


def flat(result: DecoderOutput) -> list[Tensor | None]:
    (*hidden,) = (
        result.state.hidden if isinstance(result.state.hidden, tuple) else (result.state.hidden,)
    )
    assert result.state.attention is None
    return [result.output, result.weights, *hidden, result.state.feed]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of a decoder since then went straight."""
    said: list[bool] = []
    straight = decoding.decode_whole

    def recorded(*args: Any) -> Any:
        result = straight(*args)
        said.append(result is not None)
        return result

    monkeypatch.setattr(decoding, "decode_whole", recorded)
    return said


@contextlib.contextmanager
def by_the_operators() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "decode_whole", lambda *_: None)
        yield


def assert_same_call(module: nn.AttentionDecoder, *args: Any, **options: Any) -> DecoderOutput:
    """A call gives what the operators give: bits, shapes and strides."""
    with torch.no_grad():
        got = module(*args, **options)
        with by_the_operators():
            expected = module(*args, **options)
    for ours, theirs in zip(flat(got), flat(expected), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is None or theirs is None:
            continue
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride() or ours.numel() == 0
    return got


# The same bits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_bits_are_those_of_the_operators(
    form: str, dtype: torch.dtype, answers: list[bool]
) -> None:
    for sizes in SIZES:
        module = decoder(form, dtype=dtype)
        x, memory = inputs(module, *sizes)
        first = assert_same_call(module, x, memory)
        assert_same_call(module, x, memory, state=first.state, need_weights=True)
        keys = module.project(memory)
        assert_same_call(module, x, memory, keys=keys, state=(first.state.hidden, None))
    assert answers == [True] * 3 * len(SIZES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(5, 9, 3), (3, 9, 5), (6, 1, 4), (1, 2, 4)], ids=str)
def test_values_are_those_of_the_reference(form: str, sizes: tuple[int, int, int]) -> None:
    """With more steps than positions and fewer, and with rows enough for the loop to multiply its
    input itself and too few."""
    module = decoder(form, dtype=torch.float64)
    x, memory = inputs(module, *sizes)
    lengths = torch.arange(sizes[1]) % (sizes[2] + 1)
    with torch.no_grad():
        got = module(x, memory, lengths=lengths, need_weights=True)
        with reference_operators():
            expected = module(x, memory, lengths=lengths, need_weights=True)
    for ours, theirs in zip(flat(got), flat(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 7, 16])
@pytest.mark.parametrize("source", [12, 40])
def test_bits_do_not_depend_on_the_number_of_threads(batch: int, source: int) -> None:
    module = nn.AttentionDecoder(40, 200, 72)
    x, memory = torch.randn(20, batch, 40), torch.randn(source, batch, 72)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                result = module(x, memory, need_weights=True)
                results.append([each for each in flat(result) if each is not None])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_inference_mode_goes_straight(answers: list[bool]) -> None:
    module = decoder()
    x, memory = inputs(module, 3, 2, 4)
    expected = assert_same_call(module, x, memory)
    with torch.inference_mode():
        got = module(x, memory)
        module(x, memory, state=got.state)
    assert answers == [True] * 3
    assert torch.equal(got.output, expected.output)
    assert got.output.is_inference()


@pytest.mark.parametrize("form", ["general", "concat", "batch_first"])
def test_padding_may_hold_anything(form: str, answers: list[bool]) -> None:
    module = decoder(form)
    x, memory = inputs(module, 3, 3, 4)
    lengths = torch.tensor([4, 0, 2])
    expected = assert_same_call(module, x, memory, lengths=lengths)
    rows = memory if module.batch_first else memory.transpose(0, 1)
    rows[1] = rows[2, 2:] = torch.nan
    got = assert_same_call(module, x, memory, lengths=lengths.int())
    assert torch.equal(got.output, expected.output)
    assert answers == [True] * 2


def test_any_strides_do(answers: list[bool]) -> None:
    module = decoder()
    x = torch.randn(I, 2, 3).permute(1, 2, 0)
    memory = torch.randn(3, M).expand(4, 3, M)
    assert_same_call(module, x, memory)
    assert_same_call(module, x, memory, keys=torch.randn(3, H, 4).permute(2, 0, 1))
    assert answers == [True] * 2


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_quantized_weights_go_straight_too(weights: Any, answers: list[bool]) -> None:
    module = pyseq.quantize(decoder("concat", num_layers=2).eval(), weights)
    x, memory = inputs(module, 3, 2, 4)
    assert_same_call(module, x, memory)
    assert answers == [True]
    with torch.no_grad(), pytest.raises(RuntimeError, match="quantized module is for inference"):
        module.train()(x, memory)


def test_weights_are_those_of_the_moment(answers: list[bool]) -> None:
    module = decoder()
    x, memory = inputs(module, 3, 2, 4)
    before = assert_same_call(module, x, memory).output
    assert module.score is not None
    assert module.score.weight is not None
    for weight in (module.get_parameter("weight_hh_l0"), module.score.weight):
        weight.data.mul_(2)
    assert not torch.equal(before, assert_same_call(module, x, memory).output)
    assert_same_call(copy.deepcopy(module), x, memory)
    assert_same_call(pickle.loads(pickle.dumps(module)), x, memory)
    assert answers == [True] * 4


# Only where nothing looks on


class OwnClass(torch.Tensor):
    """Tensors of a class of their own, which may see every call."""


class FunctionCalls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class OperatorCalls(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def hooks_of_all_modules() -> Iterator[None]:
    handle = register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


#: What is going on around a call that the operators have to be called for.
AROUND: dict[str, Callable[[], Any]] = {
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "function_mode": FunctionCalls,
    "dispatch_mode": OperatorCalls,
    "profiler": torch.profiler.profile,
    "hooks": hooks_of_all_modules,
}


@pytest.mark.parametrize("around", AROUND)
def test_where_something_looks_on_the_operators_are_called(
    around: str, answers: list[bool]
) -> None:
    module = decoder()
    x, memory = inputs(module, 3, 2, 4)
    with torch.no_grad():
        expected = module(x, memory).output
        with AROUND[around]():
            got = module(x, memory).output
    assert answers[0]
    assert not any(answers[1:])
    torch.testing.assert_close(got, expected)
    assert got.requires_grad == (around == "gradients")


def test_what_is_special_about_an_argument_goes_to_the_operators(answers: list[bool]) -> None:
    module = decoder("general").requires_grad_(False)
    x, memory = inputs(module, 3, 2, 4)
    assert module(x, memory.requires_grad_()).output.requires_grad
    memory.requires_grad_(False)
    module(x.as_subclass(OwnClass), memory)
    module(x, memory, state=[(torch.zeros(1, 2, H),) * 2, None])
    assert answers == [False] * 3
    module(x, memory)
    assert answers.pop()


def hooked(module: nn.AttentionDecoder) -> None:
    assert module.combine is not None
    module.combine.register_forward_hook(lambda module, args, output: 2 * output)


def pruned(module: nn.AttentionDecoder) -> None:
    assert module.score is not None
    prune.l1_unstructured(module.score, "weight", amount=0.5)


def parametrized(module: nn.AttentionDecoder) -> None:
    assert module.combine is not None
    parametrize.register_parametrization(module.combine, "weight", torch.nn.Tanh())


def replaced(module: nn.AttentionDecoder) -> None:
    module.combine = torch.nn.Sequential(torch.nn.Linear(M + H, H))  # type: ignore[assignment]


def own_keys(module: nn.AttentionDecoder) -> None:
    assert module.score is not None
    weight = module.score.weight
    assert weight is not None
    module.score.project = lambda memory, _=None: -memory @ weight.T  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [hooked, pruned, parametrized, replaced, own_keys])
def test_changed_parts_are_called(
    change: Callable[[nn.AttentionDecoder], None], answers: list[bool]
) -> None:
    module = decoder()
    x, memory = inputs(module, 3, 2, 4)
    with torch.no_grad():
        plain = module(x, memory).output
    change(module)
    assert not torch.equal(assert_same_call(module, x, memory).output, plain)
    assert answers[0]
    assert not any(answers[1:])


@pytest.mark.parametrize(
    "options",
    [{"score": "location", "max_positions": 9}, {"window": "local-m"}, {"score": None}],
    ids=["location", "window", "no_attention"],
)
def test_other_attention_goes_to_the_operators(
    options: dict[str, Any], answers: list[bool]
) -> None:
    module = decoder(**options)
    with torch.no_grad():
        module(*inputs(module, 3, 2, 4))
    assert answers == []


def test_dropout_goes_to_the_operators_in_training(answers: list[bool]) -> None:
    module = decoder("two_layers", dropout=0.5)
    x, memory = inputs(module, 3, 2, 4)
    with torch.no_grad():
        module(x, memory)
        assert answers == []
        module.eval()(x, memory)
    assert answers == [True]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, memory: ((x[..., 1:], memory), {}),
        lambda x, memory: ((x.double(), memory), {}),
        lambda x, memory: ((x[0], memory), {}),
        lambda x, memory: ((x[:0], memory), {}),
        lambda x, memory: ((x, memory[:, 1:]), {}),
        lambda x, memory: ((x, memory[..., 1:]), {}),
        lambda x, memory: ((x, None), {}),
        lambda x, memory: ((x, memory), {"lengths": torch.tensor([5, 1])}),
        lambda x, memory: ((x, memory), {"lengths": [4, 1]}),
        lambda x, memory: ((x, memory), {"keys": memory[1:]}),
        lambda x, memory: ((x, memory), {"state": (torch.zeros(1, 2, H), None)}),
        lambda x, memory: ((x, memory), {"state": ((torch.zeros(1, 1, H),) * 2, None)}),
        lambda x, memory: ((x, memory), {"state": (None, torch.zeros(2, H + 1))}),
        lambda x, memory: ((x, memory), {"state": torch.zeros(1, 2, H)}),
    ],
)
def test_errors_are_said_in_the_same_words(wrong: Any) -> None:
    module, said = decoder(), []
    args, options = wrong(*inputs(module, 3, 2, 4))
    with torch.no_grad():
        for how in (contextlib.nullcontext, by_the_operators):
            with how(), pytest.raises((RuntimeError, ValueError, TypeError)) as error:
                module(*args, **options)
            said.append(str(error.value))
    assert said[0] == said[1]
