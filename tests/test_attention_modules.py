# SPDX-License-Identifier: Apache-2.0
"""The states of attention modules, the layout of their tensors, and what they say about both."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tolerances import assert_close, assert_same_bits
from torch.nn.utils import prune

import pyseq
from pyseq.nn import Attention, AttentionDecoder, Positions
from pyseq.types import DecoderState

T, S, B, I, H = 4, 7, 3, 5, 6  # noqa: E741  (the letters of the docstrings)
LENGTHS = torch.tensor([7, 3, 0])
#: Decoders that need to know of the steps before.
REMEMBERING: dict[str, dict[str, Any]] = {
    "local-m": {"score": "general", "window": "local-m", "window_size": 1},
    "location-sensitive": {"score": "concat", "history": "previous", "history_size": 3},
    "coverage": {"score": "concat", "history": "cumulative", "history_size": 1},
}


def decoder(**options: Any) -> AttentionDecoder:
    torch.manual_seed(0)
    return AttentionDecoder(I, H, H, 2, dtype=torch.float64, **options)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(T, B, I, dtype=torch.float64), torch.randn(S, B, H, dtype=torch.float64)


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_state_that_lost_its_attention_is_refused(name: str) -> None:
    """Without the number of the step, or the past weights, it would start anew unnoticed."""
    module, (x, memory) = decoder(**REMEMBERING[name]), inputs()
    state = module(x[:2], memory).state
    expected = module(x, memory).output[2:]
    for whole in (state, tuple(state), state.detach()):
        assert_close({"y": module(x[2:], memory, state=whole).output}, {"y": expected})
    for lost in (tuple(state[:2]), DecoderState(*state[:2])):
        with pytest.raises(ValueError, match=r"third part \(step, weights\) .* without it"):
            module(x[2:], memory, state=lost)


@pytest.mark.parametrize("name", REMEMBERING)
def test_hidden_states_alone_are_a_start(name: str) -> None:
    module, (x, memory) = decoder(**REMEMBERING[name]), inputs()
    hidden = module(x, memory).state.hidden
    first, again = (
        module(x, memory, state=each) for each in ((hidden, None), module.start(hidden))
    )
    assert_same_bits({"y": first.output}, {"y": again.output})
    assert torch.equal(first.state.attention.step, torch.full((B,), T))


def test_a_window_around_predicted_positions_needs_no_step() -> None:
    module, (x, memory) = decoder(score="dot", window="local-p"), inputs()
    state = module(x[:2], memory).state
    expected = module(x[2:], memory, state=state).output
    assert_same_bits({"y": module(x[2:], memory, state=state[:2]).output}, {"y": expected})


@pytest.mark.parametrize("options", [{"cell": "gru"}, REMEMBERING["coverage"]], ids=["gru", "past"])
def test_a_detached_state_has_the_same_numbers_and_no_gradient(options: dict[str, Any]) -> None:
    module, (x, memory) = decoder(**options), inputs()
    state = module(x, memory).state
    leaves = torch.utils._pytree.tree_leaves
    assert state.feed.requires_grad
    for part, old in zip(leaves(state.detach()), leaves(state), strict=True):
        if part is None:  # the attention of a decoder that remembers none
            assert old is None
            continue
        assert not part.requires_grad
        assert torch.equal(part, old)


@pytest.mark.parametrize("score", ["dot", "concat"])
def test_windows_go_on_where_the_last_call_ended(score: str) -> None:
    torch.manual_seed(0)
    module = Attention(H, H, score=score, window="local-m", window_size=1, dtype=torch.float64)
    query, memory = (torch.randn(n, B, H, dtype=torch.float64) for n in (6, S))
    whole, weights = module(query, memory, LENGTHS, need_weights=True)
    for t in range(6):
        step = torch.full((B,), t)
        context, own = module(query[t : t + 1], memory, LENGTHS, True, step=step)
        assert own is not None
        # Not the same bits: a product of few rows adds up in another order.
        assert_close({"c": context[0], "w": own[0]}, {"c": whole[t], "w": weights[t]})
    rows = torch.tensor([4, 0, 2])  # each row may be elsewhere
    context, _ = module(query[:1], memory, step=rows)
    for row, step in enumerate(rows.split(1)):
        own = slice(row, row + 1)
        alone, _ = module(query[:1, own], memory[:, own], step=step)
        assert_close({"c": context[:, own]}, {"c": alone})


@pytest.mark.parametrize(
    "options",
    [{}, {"heads": 2}, {"window": "local-p", "window_size": 2}],
    ids=["plain", "heads", "local-p"],
)
def test_attention_with_the_batch_first(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module, same = (Attention(4, H, **options, batch_first=first) for first in (True, False))
    same.load_state_dict(module.state_dict())
    query, memory = torch.randn(T, B, 4), torch.randn(S, B, H)
    expected = same(query, memory, LENGTHS, need_weights=True)
    actual = module(query.transpose(0, 1), memory.transpose(0, 1), LENGTHS, need_weights=True)
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine.transpose(0, 1), theirs)
    assert module(query.transpose(0, 1), memory.transpose(0, 1))[1] is None
    assert "batch_first=True" in repr(module)


def test_errors_show_the_layout_that_was_given() -> None:
    attention = Attention(4, 6, batch_first=True)
    rnn = AttentionDecoder(3, 4, 6, batch_first=True)
    x, memory = torch.randn(2, 5, 3), torch.randn(2, 7, 6)
    calls: tuple[tuple[Any, str], ...] = (
        (lambda: attention(x, memory), r"query must be (B, T, Q) = (any, any, 4), got (2, 5, 3)"),
        (
            lambda: attention(torch.randn(3, 5, 4), memory),
            "memory must be (B, S, M) = (3, any, 6), got (2, 7, 6)",
        ),
        (lambda: rnn(memory, memory), "x must be (B, T, I) = (any, any, 3), got (2, 7, 6)"),
        (lambda: rnn(x, x), "memory must be (B, S, M) = (2, any, 6), got (2, 5, 3)"),
        (
            lambda: rnn(x, memory, keys=torch.randn(7, 2, 4)),
            "keys must be (B, S, A) = (2, any, any), got (7, 2, 4)",
        ),
        (lambda: rnn.project(x), "memory must be (B, S, M) = (any, any, 6), got (2, 5, 3)"),
    )
    for call, message in calls:
        with pytest.raises(RuntimeError) as error:
            call()
        assert message in str(error.value)


def test_dropout_that_does_nothing_warns_and_one_out_of_range_is_refused() -> None:
    with pytest.warns(UserWarning, match="got dropout=0.5 and num_layers=1"):
        AttentionDecoder(3, 4, 6, dropout=0.5)
    for make in (pyseq.Seq2Seq, pyseq.Tagger):
        with pytest.raises(ValueError, match=r"dropout must be a probability .* got 1.5"):
            make(9, 9, dropout=1.5)
        make(9, 9, dropout=0.5, num_layers=1)  # which drops more than what is between layers


def test_positions_are_not_rounded_to_short_numbers() -> None:
    """In bfloat16 there are no odd numbers above 256."""
    torch.manual_seed(0)
    query, lengths = torch.randn(8, 2, 16).bfloat16(), torch.tensor([400, 399])
    positions = Positions(16).bfloat16()
    actual = positions(query, 400, lengths)
    assert actual.dtype == torch.float32
    exact = copy.deepcopy(positions).double()(query.double(), 400, lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = copy.deepcopy(positions).float()(query.float(), 400, lengths)
    for each in (actual, cast):
        torch.testing.assert_close(each.double(), exact, rtol=0, atol=1e-3)
    module = Attention(16, 16, window="local-p", dtype=torch.bfloat16)
    context, _ = module(query.requires_grad_(), torch.randn(400, 2, 16).bfloat16(), lengths)
    context.sum().backward()
    assert context.dtype == query.grad.dtype == torch.bfloat16


def test_modules_pickled_before_there_were_options() -> None:
    """A whole module of version 0.1.0 has fewer attributes."""
    rnn = AttentionDecoder(I, H, H, score="concat")
    attention = Attention(H, H, score="concat")
    x, memory = (tensor.float() for tensor in inputs())
    expected, text = rnn(x, memory).output, repr(rnn)
    for name in ("order", "feed", "fed_size", "window", "window_size", "history", "positions"):
        del vars(rnn)[name]
    for name in ("window", "window_size", "positions", "batch_first"):
        del vars(attention)[name]
    for score in (rnn.score, attention.score):
        assert score is not None
        del vars(score)["heads"]
        del score._parameters["weight_history"]
    old = pickle.loads(pickle.dumps(rnn))
    assert torch.equal(old(x, memory).output, expected)
    assert repr(old) == text
    context, _ = pickle.loads(pickle.dumps(attention))(memory, memory)
    assert context.shape == (S, B, H)


@pytest.mark.parametrize(
    "options",
    [
        {"score": "general"},
        {"score": "dot", "input_feeding": False, "cell": "gru"},
        {"score": "concat", "order": "bahdanau", "history": "cumulative", "heads": 2},
        {"score": "general", "feed": "context", "window": "local-m", "window_size": 2},
        {"score": "general", "window": "local-p", "cell": "rnn_tanh", "dropout": 0.5},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_combination_with_a_hook_is_called(options: dict[str, Any]) -> None:
    module, (x, memory) = decoder(**options), inputs()
    masks = module.draw_dropout_masks(T, B)
    state = module(x[:2], memory).state

    def results() -> dict[str, Any]:
        more = {"lengths": LENGTHS, "need_weights": True, "dropout_masks": masks}
        out = module(x, memory, **more)
        gone_on = module(x, memory, state=state, **more)
        total = out.output.square().sum() + gone_on.output.sum()
        gradients = torch.autograd.grad(total, list(module.parameters()), retain_graph=True)
        named = {str(i): gradient for i, gradient in enumerate(gradients)}
        for name, one in (("out", out), ("on", gone_on)):
            h, *_ = one.state.hidden
            named |= {f"{name}-y": one.output, f"{name}-a": one.weights, f"{name}-h": h}
            named[f"{name}-feed"] = one.state.feed
            if one.state.attention is not None:
                named[f"{name}-step"] = one.state.attention.step.double()
        return named

    expected = results()
    calls = []
    handle = module.combine.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    assert_close(results(), expected)
    assert len(calls) == 2 * T
    handle.remove()
    # What a hook gives is what counts.
    assert module.combine is not None
    module.combine.register_forward_hook(lambda module, args, output: 0 * output)
    assert not module(x, memory).output.any()


@pytest.mark.parametrize(
    "options",
    [
        {"score": "general"},
        {"score": "dot", "order": "bahdanau", "cell": "gru"},
        {"score": "location", "max_positions": 3, "input_feeding": False, "heads": 2},
        {"score": "concat", "feed": "context", "cell": "rnn_tanh", "dropout": 0.5},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_positions_with_a_hook_are_called(options: dict[str, Any]) -> None:
    module, (x, memory) = decoder(window="local-p", window_size=2, **options), inputs()
    masks = module.draw_dropout_masks(T, B)
    state = module(x[:2], memory).state

    def results() -> dict[str, Any]:
        more = {"lengths": LENGTHS, "need_weights": True, "dropout_masks": masks}
        out = module(x, memory, **more)
        gone_on = module(x, memory, state=state, **more)
        total = out.output.square().sum() + gone_on.output.sum()
        gradients = torch.autograd.grad(total, list(module.parameters()), retain_graph=True)
        named = {str(i): gradient for i, gradient in enumerate(gradients)}
        for name, one in (("out", out), ("on", gone_on)):
            parts = one.state.hidden if module.cell == "lstm" else (one.state.hidden,)
            named |= {f"{name}-y": one.output, f"{name}-a": one.weights, f"{name}-h": parts[0]}
            named |= {f"{name}-last": parts[-1], f"{name}-feed": one.state.feed}
            assert one.state.attention is not None
            named[f"{name}-step"] = one.state.attention.step.double()
        return named

    expected = results()
    calls = []
    assert module.positions is not None
    handle = module.positions.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_close(results(), expected)
    assert len(calls) == 2 * T
    handle.remove()
    # What a hook gives is what counts: windows at the start of the memory.
    module.positions.register_forward_hook(lambda module, args, output: 0 * output)
    weights = module(x, memory, need_weights=True).weights
    assert weights is not None
    assert weights[..., 3:].count_nonzero() == 0
    assert weights[..., :3].count_nonzero() > 0


def test_positions_with_a_hook_go_without_a_history() -> None:
    module, (x, memory) = decoder(score="concat", window="local-p", history="previous"), inputs()
    assert module.positions is not None
    module.positions.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"positions must have no hooks .* history 'previous'"):
        module(x, memory)


@pytest.mark.parametrize(
    ("part", "weight"),
    [
        ("combine", "weight"),
        ("score", "weight_memory"),
        ("score", "weight_query"),
        ("positions", "weight_v"),
    ],
)
def test_parts_reparametrized_by_a_hook_are_trained(part: str, weight: str) -> None:
    module, (x, memory) = decoder(score="concat", window="local-p"), inputs()
    pruned = module.get_submodule(part)
    prune.l1_unstructured(pruned, weight, amount=1)
    outputs = []
    for _ in range(2):
        outputs.append(module(x, memory).output)
        outputs[-1].sum().backward()
        with torch.no_grad():
            gradient = getattr(pruned, f"{weight}_orig").grad
            getattr(pruned, f"{weight}_orig").sub_(gradient)
    prune.remove(pruned, weight)
    with torch.no_grad():
        outputs.append(module(x, memory).output)
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("module", ["decoder", "attention"])
def test_what_a_hook_makes_of_the_keys_counts(module: str) -> None:
    x, memory = inputs()
    whole: Any = decoder() if module == "decoder" else Attention(I, H).double()
    x = x if module == "decoder" else x[..., :I]
    whole.score.register_forward_pre_hook(lambda score, args: (0 * args[0], *args[1:]))
    _, weights, *_ = whole(x, memory, need_weights=True)
    # Of keys that are all the same every position gets as much.
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / S))


@pytest.mark.parametrize("module", ["decoder", "attention"])
def test_lengths_beyond_the_memory_are_refused_by_location_too(module: str) -> None:
    x, memory = inputs()
    options: dict[str, Any] = {"score": "location", "max_positions": 2}
    whole: Any = decoder(**options) if module == "decoder" else Attention(I, H, **options).double()
    with pytest.raises(RuntimeError, match="lengths must be between 0 and S = 7, got 8 at row 1"):
        whole(x, memory, lengths=torch.tensor([7, 8, 0]))
    with pytest.raises(TypeError, match="lengths must be a tensor, got list of 3"):
        whole(x, memory, lengths=[7, 7, 0])
