# SPDX-License-Identifier: Apache-2.0
"""What other people's code does with torch.nn's recurrent layers, done with ours.

Results have tests of their own (test_nn.py, test_torch_module_inputs.py); these are the ways in
which layers are made, changed, moved, watched and misused.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_cases import leaves
from tolerances import assert_close
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from pyseq import nn, revert

I, H, T, B = 3, 5, 6, 4  # noqa: E741  (the letters of the docstrings)
LAYERS, CELLS = ("RNN", "GRU", "LSTM"), ("RNNCell", "GRUCell", "LSTMCell")
X, ROW = torch.zeros(T, B, I), torch.zeros(B, I)
PACKED = pack_padded_sequence(X, torch.tensor([T] * B))


def state(name: str, *sizes: int, **options: Any) -> Any:
    """A state as the class of this name takes it, each part of these sizes."""
    part = torch.zeros(*sizes, **options)
    return (part, part) if name.startswith("LSTM") else part


def twins(name: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    """torch's module and ours with the same weights."""
    made = []
    for home in (torch.nn, nn):
        torch.manual_seed(1)
        made.append(getattr(home, name)(*(args or (I, H)), **options))
    return made[0], made[1]


# Wrong arguments

Make = Callable[..., Any]
#: For every layer: what makes a mistake with its class, and with its name.
LAYER_MISTAKES: dict[str, Callable[[Make, str], object]] = {
    "no-input-size": lambda make, name: make(0, H),
    "no-hidden-size": lambda make, name: make(I, 0),
    "no-layers": lambda make, name: make(I, H, 0),
    "input-size-type": lambda make, name: make("3", H),
    "hidden-size-type": lambda make, name: make(I, 5.0),
    "bias-type": lambda make, name: make(I, H, bias=1),
    "batch-first-type": lambda make, name: make(I, H, batch_first=None),
    "dropout-range": lambda make, name: make(I, H, 2, dropout=1.5),
    "dropout-type": lambda make, name: make(I, H, 2, dropout=True),
    "projection": lambda make, name: make(I, H, proj_size=H),
    "dimensions": lambda make, name: make(I, H)(torch.zeros(I)),
    "dimensions-4": lambda make, name: make(I, H)(torch.zeros(1, T, B, I)),
    "features": lambda make, name: make(I + 1, H)(X),
    "features-unbatched": lambda make, name: make(I + 1, H)(X[:, 0]),
    "dtype": lambda make, name: make(I, H)(X.double()),
    "dtype-integers": lambda make, name: make(I, H)(X.long()),
    "no-steps": lambda make, name: make(I, H)(X[:0]),
    "no-steps-unbatched": lambda make, name: make(I, H)(X[:0, 0]),
    "device": lambda make, name: make(I, H)(X.to("meta")),
    "device-of-weights": lambda make, name: make(I, H, device="meta")(X),
    "state-layers": lambda make, name: make(I, H)(X, state(name, 2, B, H)),
    "state-batch": lambda make, name: make(I, H)(X, state(name, 1, B + 1, H)),
    "state-batch-first": lambda make, name: make(I, H, batch_first=True)(X, state(name, 1, B, H)),
    "state-features": lambda make, name: make(I, H)(X, state(name, 1, B, H + 1)),
    "state-dimensions": lambda make, name: make(I, H)(X, state(name, B, H)),
    "state-unbatched": lambda make, name: make(I, H)(X[:, 0], state(name, 1, B, H)),
    "state-device": lambda make, name: make(I, H)(X, state(name, 1, B, H, device="meta")),
    "no-input": lambda make, name: make(I, H)(None),
}
CELL_MISTAKES: dict[str, Callable[[Make, str], object]] = {
    "input-size-type": lambda make, name: make(3.0, H),
    "dimensions": lambda make, name: make(I, H)(X),
    "features": lambda make, name: make(I + 1, H)(ROW),
    "features-unbatched": lambda make, name: make(I + 1, H)(ROW[0]),
    "features-first": lambda make, name: make(I + 1, H)(ROW, state(name, B + 1, H + 1)),
    "state-dimensions": lambda make, name: make(I, H)(ROW, state(name, 1, B, H)),
    "state-features": lambda make, name: make(I, H)(ROW, state(name, B, H + 1)),
    "state-features-unbatched": lambda make, name: make(I, H)(ROW[0], state(name, H + 1)),
    "state-batch": lambda make, name: make(I, H)(ROW, state(name, B + 1, H)),
    "state-batch-of-one": lambda make, name: make(I, H)(ROW, state(name, 1, H)),
    "no-input": lambda make, name: make(I, H)(None),
}
LSTM_MISTAKES: dict[str, Callable[[Make, str], object]] = {
    "projection-negative": lambda make, name: make(I, H, proj_size=-1),
    "c-size": lambda make, name: make(I, H)(X, (torch.zeros(1, B, H), torch.zeros(1, B, H + 1))),
    "c-of-projected": lambda make, name: make(I, H, proj_size=2)(X, state(name, 1, B, 2)),
    "c-dimensions": lambda make, name: make(I, H)(X, (torch.zeros(1, B, H), torch.zeros(B, H))),
}
MISTAKES = {
    f"{name}-{key}": (name, mistake)
    for names, mistakes in (
        (LAYERS, LAYER_MISTAKES),
        (CELLS, CELL_MISTAKES),
        (("LSTM",), LSTM_MISTAKES),
        (("RNN",), {"nonlinearity": lambda make, name: make(I, H, nonlinearity="elu")}),
        (("RNN", "GRU"), {"packed-dtype": lambda make, name: make(I, H).double()(PACKED)}),
        (("RNN", "GRU"), {"packed-features": lambda make, name: make(I + 1, H)(PACKED)}),
        (("RNN", "GRU"), {"packed-state": lambda m, n: m(I, H)(PACKED, state(n, 1, B + 1, H))}),
    )
    for name in names
    for key, mistake in mistakes.items()
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_in_torch_s_words(case: str) -> None:
    name, mistake = MISTAKES[case]
    told = []
    for home in (torch.nn, nn):
        with pytest.raises(Exception) as caught:  # noqa: PT011  (torch says which)
            mistake(getattr(home, name), name)
        told.append((caught.type, str(caught.value)))
    assert told[1] == told[0]


@pytest.mark.parametrize("name", LAYERS)
def test_warns_of_dropout_in_a_single_layer(name: str) -> None:
    told = []
    for home in (torch.nn, nn):
        with pytest.warns(UserWarning, match="num_layers greater than 1") as caught:
            getattr(home, name)(I, H, dropout=0.5)
        told.append([str(each.message) for each in caught])
    assert told[0] == told[1]


def test_packed_rows_that_torch_s_lstm_takes_for_granted() -> None:
    """torch reads memory that is not the state's here."""
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 4, 5\), got \[1, 5, 5"):
        nn.LSTM(I, H)(PACKED, state("LSTM", 1, B + 1, H))
    with pytest.raises(RuntimeError, match="Expected 4, got 3"):
        nn.LSTM(I + 1, H)(PACKED)


def test_where_the_table_says_that_errors_differ() -> None:
    """docs/migration.md, what differs."""
    with pytest.raises(ValueError, match="Unknown nonlinearity 'elu'"):
        nn.RNNCell(I, H, nonlinearity="elu")
    for made in (nn.GRU(I, H), nn.RNN(I, H)):
        with pytest.raises(ValueError, match="must be one tensor h, got tuple of 2"):
            made(X, state("LSTM", 1, B, H))
    with pytest.raises(ValueError, match=r"RNN input dtype .* does not match weight dtype"):
        nn.GRUCell(I, H)(ROW.double())
    with pytest.raises(RuntimeError, match="h_0 must have the dtype of x, Float, got Double"):
        nn.GRUCell(I, H)(ROW, torch.zeros(B, H, dtype=torch.float64))


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_without_units_gives_empty_states(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of weights without elements
        theirs, ours = getattr(torch.nn, name)(I, 0), getattr(nn, name)(I, 0)
    given = (torch.zeros(B, 0),) * 2 if name == "LSTMCell" else torch.zeros(B, 0)
    for args in ((ROW,), (ROW, given), (ROW[0],)):
        expected = dict(leaves(theirs(*args)))
        actual = dict(leaves(ours(*args)))
        assert_close(actual, expected)
        torch.stack([part.sum() for part in actual.values()]).sum().backward()
    with pytest.raises(RuntimeError, match="inconsistent input_size"):
        ours(torch.zeros(B, I + 1))


def test_results_may_be_changed_in_place_before_backward() -> None:
    theirs, ours = twins("LSTM")
    output = ours(X)[0]
    output[0] = 0
    output.relu_().sum().backward()
    expected = theirs(X)[0].clone()
    expected[0] = 0
    expected.relu_().sum().backward()
    assert_close({"d": ours.weight_ih_l0.grad}, {"d": theirs.weight_ih_l0.grad})
    assert_close({"d": ours.bias_ih_l0.grad}, {"d": theirs.bias_ih_l0.grad})


REPRS: dict[str, tuple[Callable[[], Any], str]] = {
    "lstm-cell": (lambda: nn.LSTMCell(I, H), f"LSTMCell({I}, {H})"),
    "peepholes": (lambda: nn.LSTMCell(I, H, peepholes=True), f"LSTMCell({I}, {H}, peepholes=True)"),
    "gru-cell": (
        lambda: nn.GRUCell(I, H, bias=False, reset_after=False),
        f"GRUCell({I}, {H}, bias=False, reset_after=False)",
    ),
    "indrnn-cell": (lambda: nn.IndRNNCell(I, H), f"IndRNNCell({I}, {H})"),
    "indrnn-cell-tanh": (
        lambda: nn.IndRNNCell(I, H, bias=False, nonlinearity="tanh"),
        f"IndRNNCell({I}, {H}, bias=False, nonlinearity='tanh')",
    ),
    "indrnn": (lambda: nn.IndRNN(I, H), f"IndRNN({I}, {H})"),
    "indrnn-tanh": (
        lambda: nn.IndRNN(I, H, nonlinearity="tanh"),
        f"IndRNN({I}, {H}, nonlinearity='tanh')",
    ),
    "slstm-cell": (
        lambda: nn.SLSTMCell(I, 6, num_heads=2, forget_gate="exp"),
        f"SLSTMCell({I}, 6, num_heads=2, forget_gate='exp')",
    ),
    "slstm": (lambda: nn.SLSTM(I, H, num_heads=H), f"SLSTM({I}, {H}, num_heads={H})"),
    "score": (
        lambda: nn.Score("concat", 4, 6, 8, heads=2, history_size=3),
        "Score(concat, heads=2, attention_size=8, history_size=3)",
    ),
    "score-location": (
        lambda: nn.Score("location", 4, 6, max_positions=9),
        "Score(location, max_positions=9)",
    ),
    "positions": (lambda: nn.Positions(4), "Positions(4)"),
}


@pytest.mark.parametrize("name", REPRS)
def test_repr_shows_what_is_not_the_default(name: str) -> None:
    make, expected = REPRS[name]
    assert repr(make()) == expected


# The weights, by every name that they have


@pytest.mark.parametrize("name", LAYERS)
def test_lists_of_weights(name: str) -> None:
    theirs, ours = twins(name, I, H, 2, bidirectional=True)
    for key in ("_all_weights", "_flat_weights_names"):
        assert getattr(ours, key) == getattr(theirs, key)
    for left, right in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert all(map(torch.equal, left, right))
    assert all(map(torch.equal, ours._flat_weights, theirs._flat_weights))
    assert ours._flat_weights[1] is ours.weight_hh_l0
    ours.flatten_parameters()
    ours.weight_hh_l0 = torch.nn.Parameter(2 * ours.weight_hh_l0)
    assert ours._flat_weights[1] is ours.weight_hh_l0
    with pytest.raises(AttributeError):
        ours._flat_weights = [torch.zeros(1)]  # would change nothing


def test_initialisation_by_name() -> None:
    _, ours = twins("LSTM")
    for name, weight in ours.named_parameters():
        if "weight_hh" in name:
            torch.nn.init.orthogonal_(weight)
        elif "bias" in name:
            torch.nn.init.zeros_(weight)
            weight.data[H : 2 * H] = 1
    assert_close(
        {"w": ours.weight_hh_l0.t() @ ours.weight_hh_l0},
        {"w": torch.eye(H)},
    )
    seen = []
    torch.nn.Sequential(ours).apply(lambda each: seen.append(isinstance(each, torch.nn.RNNBase)))
    assert seen == [True, False]


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_changed_weights(name: str) -> None:
    """Weight norm, spectral norm and pruning, of which each replaces an attribute."""
    x = torch.randn(T, B, I)

    def by_hook(layer: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return torch.nn.utils.weight_norm(layer, "weight_hh_l0")

    changes: list[Callable[[Any], Any]] = [
        by_hook,
        lambda layer: parametrizations.weight_norm(layer, "weight_hh_l0"),
        lambda layer: parametrizations.spectral_norm(layer, "weight_ih_l0"),
        lambda layer: parametrizations.orthogonal(layer, "weight_hh_l0"),
        lambda layer: prune.l1_unstructured(layer, "weight_hh_l0", amount=0.4),
        lambda layer: prune.random_structured(layer, "weight_ih_l0", amount=2, dim=0),
    ]
    for change in changes:
        results = []
        for layer in twins(name):
            torch.manual_seed(2)
            changed = change(layer).eval()
            output = changed(x)[0]
            grads = torch.autograd.grad(output.square().sum(), list(changed.parameters()))
            results.append({str(i): each for i, each in enumerate((output, *grads))})
        assert_close(results[1], results[0])


def test_changed_weights_compile_and_come_off() -> None:
    x = torch.randn(T, B, I)
    layer = parametrizations.weight_norm(nn.GRU(I, H), "weight_hh_l0")
    expected = {"y": layer(x)[0]}
    assert_close({"y": torch.compile(layer, backend="eager", fullgraph=True)(x)[0]}, expected)
    with parametrize.cached():
        assert_close({"y": layer(x)[0]}, expected)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert type(layer) is nn.GRU
    assert_close({"y": layer(x)[0]}, expected)


def test_dropped_weights_set_at_each_call() -> None:
    """DropConnect as language models had it: the attribute is a plain tensor."""
    _, ours = twins("LSTM")
    raw = ours.weight_hh_l0
    del ours.weight_hh_l0
    ours.register_parameter("weight_hh_l0_raw", raw)
    x = torch.randn(T, B, I)
    for share in (0.3, 0.6):
        ours.weight_hh_l0 = torch.nn.functional.dropout(raw, share)
        raw.grad = None
        ours(x)[0].sum().backward()
        assert raw.grad is not None
        dropped = ours.weight_hh_l0 == 0
        assert dropped.any()
        assert (raw.grad[dropped] == 0).all()


def test_shared_and_frozen_weights() -> None:
    _, ours = twins("LSTM", H, H, 2)
    ours.weight_hh_l1 = ours.weight_hh_l0
    ours.bias_hh_l0.requires_grad_(False)
    assert len(list(ours.parameters())) == 7
    output = ours(torch.randn(T, B, H))[0]
    output.sum().backward()
    assert ours.bias_hh_l0.grad is None
    assert ours.weight_hh_l1.grad is ours.weight_hh_l0.grad is not None


def test_only_the_state_needs_a_gradient() -> None:
    theirs, ours = twins("GRU")
    x, grads = torch.randn(T, B, I), []
    start = torch.zeros(1, B, H, requires_grad=True)
    for layer in (theirs, ours):
        layer.requires_grad_(False)
        grads.append(torch.autograd.grad(layer(x, start)[0].square().sum(), start)[0])
    assert_close({"d_hx": grads[1]}, {"d_hx": grads[0]})


# Moving, copying, sharing


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_default_dtype(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        module = getattr(nn, name)(I, H)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {weight.dtype for weight in module.parameters()} == {torch.float64}


def test_weights_that_come_after_the_layer() -> None:
    source, x = nn.LSTM(I, H, 2).requires_grad_(False), torch.randn(T, B, I)
    expected = {"y": source(x)[0]}
    on_meta = nn.LSTM(I, H, 2, device="meta")
    assert on_meta(x.to("meta"))[0].shape == (T, B, H)
    on_meta.load_state_dict(source.state_dict(), assign=True)
    assert_close({"y": on_meta(x)[0]}, expected)
    emptied = nn.LSTM(I, H, 2, device="meta").to_empty(device="cpu")
    emptied.load_state_dict(source.state_dict())
    assert_close({"y": emptied(x)[0]}, expected)
    swapped = nn.LSTM(I, H, 2)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        swapped.double().load_state_dict(source.double().state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_close({"y": swapped(x.double())[0].float()}, expected)


def test_shared_memory_and_replicas() -> None:
    layer = nn.LSTM(I, H, 2).share_memory()
    assert all(weight.is_shared() for weight in layer.parameters())
    x = torch.randn(T, B, I)
    # As DataParallel does: a copy whose weights are attributes, not parameters.
    replica = layer._replicate_for_data_parallel()
    for name, weight in layer.named_parameters():
        setattr(replica, name, 1 * weight)
    assert_close({"y": replica(x)[0]}, {"y": layer(x)[0]})
    replica(x)[0].sum().backward()
    assert layer.weight_hh_l0.grad is not None


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_copies_after_training(name: str) -> None:
    _, ours = twins(name)
    x, start = (torch.ones(B, I), torch.ones(B, H)) if name == "GRUCell" else (X + 1, None)
    ours(x, start)[0].sum().backward()
    again, before = copy.deepcopy(ours), ours(x, start)[0]
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(1)
    assert torch.equal(again(x, start)[0], before)
    assert not torch.equal(ours(x, start)[0], before)


# Training


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
def test_optimizers(options: dict[str, bool]) -> None:
    trained = []
    for layer in twins("GRU"):
        optimizer = torch.optim.AdamW(layer.parameters(), **options)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.ones(T, B, I))[0].square().sum().backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.5)
            optimizer.step()
        trained.append(layer.state_dict())
    assert_close(trained[1], trained[0])


def test_backward_in_evaluation_and_checkpointing() -> None:
    theirs, ours = twins("LSTM", I, H, 2, dropout=0.5)
    x, grads = torch.randn(T, B, I, requires_grad=True), []
    for layer in (theirs.eval(), ours.eval()):
        for call in (layer, lambda x, layer=layer: checkpoint(layer, x, use_reentrant=False)):
            grads.append(torch.autograd.grad(call(x)[0].square().sum(), x)[0])
    for grad in grads[1:]:
        assert_close({"d_x": grad}, {"d_x": grads[0]})


def test_hooks() -> None:
    seen: list[Any] = []
    for layer in twins("LSTM"):
        layer.register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
        layer.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
        layer.register_full_backward_hook(lambda module, d_in, d_out: seen.append((d_in, d_out)))
        layer(torch.ones(T, B, I, requires_grad=True))[0].sum().backward()
    (theirs_in, theirs_out), (ours_in, ours_out) = seen
    assert_close({"d_x": ours_in[0]}, {"d_x": theirs_in[0]})
    assert_close({"d_y": ours_out[0]}, {"d_y": theirs_out[0]})
    assert len(ours_in) == len(theirs_in)
    assert len(ours_out) == len(theirs_out)


def test_states_may_be_written_between_calls() -> None:
    """As policies clear those of finished episodes."""
    layer, x = nn.LSTM(I, H), torch.randn(T, B, I)
    _, (h, c) = layer(x)
    h[:, 0], c[:, 0] = 0, 0
    layer(x, (h, c))[0].sum().backward()
    with torch.inference_mode():
        _, (h, c) = layer(x)
        h[:, 0], c[:, 0] = 0, 0
        fresh = layer(x)[0][:, 0]
        assert_close({"y": layer(x, (h, c))[0][:, 0]}, {"y": fresh})


def test_states_of_one_row_for_all() -> None:
    theirs, ours = twins("LSTM", I, H, batch_first=True)
    x, start = torch.randn(B, T, I), torch.randn(1, 1, H).expand(1, B, H)
    assert_close({"y": ours(x, (start, start))[0]}, {"y": theirs(x, (start, start))[0]})
    assert_close({"y": ours(x, [start, start])[0]}, {"y": theirs(x, [start, start])[0]})


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("bidirectional", [True, False], ids=["two-way", "one-way"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["BT", "TB"])
@pytest.mark.parametrize("name", LAYERS)
def test_results_lie_in_memory_as_torch_s_do(
    name: str, batch_first: bool, bidirectional: bool, grad: bool
) -> None:
    """So that ``output.view(T, B, 2, H)`` works where it did."""
    lies = []
    for layer in twins(name, I, H, 2, batch_first=batch_first, bidirectional=bidirectional):
        with torch.set_grad_enabled(grad):
            output, last = layer(X)
        results = [output, *(last if isinstance(last, tuple) else (last,))]
        lies.append([each.is_contiguous() for each in results])
    assert lies[1] == lies[0]


# Subclasses and compilers


class Residual(nn.LSTM):
    """A layer with a forward of its own."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        output, last = super().forward(input, hx)
        return output + input, last


def test_subclass_with_a_forward_of_its_own() -> None:
    layer, x = Residual(I, I, 2), torch.randn(T, B, I)
    plain = nn.LSTM(I, I, 2)
    plain.load_state_dict(layer.state_dict())
    expected = {"y": plain(x)[0] + x}
    assert_close({"y": layer(x)[0]}, expected)
    assert_close({"y": torch.compile(layer, backend="eager", fullgraph=True)(x)[0]}, expected)


def test_compiled_calls_refuse_as_eager_ones() -> None:
    compiled = torch.compile(nn.LSTM(I, H), backend="eager")
    with pytest.raises(RuntimeError, match="Expected 3, got 4"):
        compiled(torch.zeros(T, B, I + 1))


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_trace(name: str) -> None:
    module = getattr(nn, name)(I, H)
    x = torch.randn(B, I) if name.endswith("Cell") else torch.randn(T, B, I)
    traced = torch.jit.trace(module, (x,), check_trace=False)
    other = torch.cat((x, x))
    assert_close({"y": traced(other)[0]}, {"y": module(other)[0]})


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_script_is_refused_and_revert_named(name: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(I, I), getattr(nn, name)(I, H))
    with pytest.raises(TypeError, match=rf"got pyseq's {name}; script pyseq\.revert"):
        torch.jit.script(model)
    reverted = revert(copy.deepcopy(model), log=None)
    scripted, x = torch.jit.script(reverted), ROW if name == "GRUCell" else X
    assert_close({"y": scripted(x)[0]}, {"y": model(x)[0]})


def test_packed_rows_through_a_model_that_packs() -> None:
    theirs, ours = twins("GRU", I, H, 2, bidirectional=True)
    x, lengths = torch.randn(T, B, I), torch.tensor([2, 6, 1, 3])
    outputs = []
    for layer in (theirs, ours):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, sizes = pad_packed_sequence(layer(packed)[0], total_length=T)
        assert torch.equal(sizes, lengths)
        outputs.append({"y": output})
    assert_close(outputs[1], outputs[0])


class Watched(torch.Tensor):
    """A class of tensors that sees every function that is called with one."""

    seen: list[str] = []  # noqa: RUF012  (torch calls it on the class)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_classes_of_tensors_see_the_operator(name: str) -> None:
    module = getattr(nn, name)(I, H)
    x = torch.randn(B, I) if name.endswith("Cell") else torch.randn(T, B, I)
    Watched.seen.clear()
    output = module(x.as_subclass(Watched))[0]
    assert isinstance(output, Watched)
    assert any("pyseq.scan" in each for each in Watched.seen)
    assert_close({"y": output.as_subclass(torch.Tensor)}, {"y": module(x)[0]})
