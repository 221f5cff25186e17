# SPDX-License-Identifier: Apache-2.0
"""The modules: parity with torch.nn, ragged rows, resets, the attention decoder.

The operators have tests of their own; these look at what the modules make of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pyseq import nn, reference
from pyseq.types import DecoderState

I, H, T, B = 3, 5, 6, 4  # noqa: E741  (the letters of the docstrings)

#: Class name and the options that make it another cell.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 2}),
}
CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")
SCORES = ("dot", "general", "concat")


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """The tensors are tiny: more threads would only wait for one another."""
    set_threads(1)


def flat(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state)


def twins(kind: str, **options: Any) -> tuple[torch.nn.RNNBase, torch.nn.RNNBase]:
    """torch's module and ours, each made from the same seed, in float64."""
    name, extra = KINDS[kind]
    options = {"dtype": torch.float64, **extra, **options}
    torch.manual_seed(1)
    theirs = getattr(torch.nn, name)(I, H, **options)
    torch.manual_seed(1)
    return theirs, getattr(nn, name)(I, H, **options)


def random_state(module: torch.nn.RNNBase, batch: int | None) -> Any:
    """A state that wants gradients; without a batch dimension for None."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or H] + [H] * (module.mode == "LSTM")
    rows = () if batch is None else (batch,)
    parts = [
        torch.randn(count, *rows, size, dtype=torch.float64, requires_grad=True) for size in sizes
    ]
    return parts[0] if len(parts) == 1 else tuple(parts)


def run(
    module: torch.nn.Module, x: Tensor, state: Any, feed: Callable[[Tensor], Any]
) -> dict[str, Tensor]:
    """Outputs, and gradients of a weighted sum of them, by name.

    ``feed`` makes the module's input of ``x``, a leaf of the graph.
    """
    x = x.clone().requires_grad_()
    output, last = module(feed(x), state)
    data = output.data if isinstance(output, PackedSequence) else output
    named = {"output": data} | {f"state{i}": part for i, part in enumerate(flat(last))}
    generator = torch.Generator().manual_seed(2)
    loss = sum(
        (value * torch.randn(value.shape, generator=generator, device="cpu").to(value)).sum()
        for value in named.values()
    )
    inputs = {"x": x} | {
        f"hx{i}": part for i, part in enumerate(flat(() if state is None else state))
    }
    inputs |= dict(module.named_parameters())
    grads = torch.autograd.grad(loss, list(inputs.values()))
    return named | {f"d_{name}": grad for name, grad in zip(inputs, grads, strict=True)}


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "two-way"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_names_and_initialisation_as_torch(kind: str, bidirectional: bool) -> None:
    theirs, ours = twins(kind, num_layers=3, bidirectional=bidirectional)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert ours.extra_repr() == theirs.extra_repr()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("form", ["batched", "unbatched", "sorted", "unsorted"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["TB", "BT"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "two-way"])
@pytest.mark.parametrize("num_layers", [1, 2], ids=["L1", "L2"])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_torch(
    kind: str, num_layers: int, bidirectional: bool, batch_first: bool, form: str
) -> None:
    theirs, ours = twins(
        kind, num_layers=num_layers, bidirectional=bidirectional, batch_first=batch_first
    )
    if form == "unbatched":
        x, state = torch.randn(T, I, dtype=torch.float64), random_state(ours, None)
    else:
        shape = (B, T, I) if batch_first else (T, B, I)
        x, state = torch.randn(shape, dtype=torch.float64), random_state(ours, B)

    def feed(x: Tensor) -> Any:
        if not form.endswith("sorted"):
            return x
        lengths = torch.tensor([6, 5, 5, 1] if form == "sorted" else [2, 6, 1, 3], device="cpu")
        return pack_padded_sequence(
            x, lengths, batch_first=batch_first, enforce_sorted=form == "sorted"
        )

    assert_close(run(ours, x, state, feed), run(theirs, x, state, feed))
    assert_close(run(ours, x, None, feed), run(theirs, x, None, feed))


def test_packed_sequence_keeps_its_order() -> None:
    _, ours = twins("gru")
    x = torch.randn(T, B, I, dtype=torch.float64)
    packed = pack_padded_sequence(x, torch.tensor([2, 6, 1, 3]), enforce_sorted=False)
    output, _ = ours(packed)
    assert torch.equal(output.sorted_indices, packed.sorted_indices)
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
    assert pad_packed_sequence(output)[1].tolist() == [2, 6, 1, 3]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("kind", KINDS)
def test_matches_torch_without_bias_in_float32(kind: str) -> None:
    theirs, ours = twins(kind, bias=False, dtype=torch.float32)
    x = torch.randn(T, B, I)
    expected = run(copy.deepcopy(theirs).double(), x.double(), None, lambda x: x)
    assert_close(run(ours, x, None, lambda x: x), expected)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("batch_first", [False, True], ids=["TB", "BT"])
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_equal_each_row_alone(kind: str, batch_first: bool) -> None:
    lengths = torch.tensor([2, 6, 0, 5])
    theirs, ours = twins(kind, num_layers=2, bidirectional=True)
    ours.batch_first = batch_first
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    state = random_state(ours, B)
    output, last = ours(x.transpose(0, 1) if batch_first else x, state, lengths=lengths)
    output = output.transpose(0, 1) if batch_first else output

    rows, ends = [], []
    for row, length in enumerate(lengths.tolist()):
        hx = [part[:, row] for part in flat(state)]
        if length:
            y, end = theirs(x[:length, row], hx[0] if len(hx) == 1 else tuple(hx))
            rows.append(torch.cat([y, y.new_zeros(T - length, y.shape[1])]))
            ends.append(flat(end))
        else:
            rows.append(output.new_zeros(output[:, 0].shape))
            ends.append(hx)
    expected = {"output": torch.stack(rows, 1)}
    for i, part in enumerate(zip(*ends, strict=True)):
        expected[f"state{i}"] = torch.stack(part, 1)
    actual = {"output": output} | {f"state{i}": part for i, part in enumerate(flat(last))}
    assert_close(actual, expected)
    assert (output[2:, 0] == 0).all()

    leaves = [x, *flat(state)]
    weights = [torch.randn_like(value) for value in actual.values()]
    got, want = (
        torch.autograd.grad([*values.values()], leaves, weights) for values in (actual, expected)
    )
    names = ["x", "h", "c"]
    assert_close(dict(zip(names, got, strict=False)), dict(zip(names, want, strict=False)))


def test_lengths_of_one_sequence_may_be_a_scalar() -> None:
    _, ours = twins("lstm")
    x = torch.randn(T, I, dtype=torch.float64)
    output, (h, _) = ours(x, lengths=torch.tensor(4))
    expected, (h_4, _) = ours(x[:4])
    assert_close({"y": output[:4], "h": h}, {"y": expected, "h": h_4})
    assert (output[4:] == 0).all()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("batch_first", [False, True], ids=["TB", "BT"])
@pytest.mark.parametrize("kind", KINDS)
def test_resets_cut_the_sequence(kind: str, batch_first: bool) -> None:
    theirs, ours = twins(kind)
    ours.batch_first = batch_first
    x, state = torch.randn(T, 2, I, dtype=torch.float64), random_state(ours, 2)
    resets = torch.zeros(T, 2, dtype=torch.bool)
    resets[2, 0] = resets[5, 0] = True  # row 1 runs through

    if batch_first:
        output, last = ours(x.transpose(0, 1), state, resets=resets.t())
        output = output.transpose(0, 1)
    else:
        output, last = ours(x, state, resets=resets)

    first = [part[:, :1] for part in flat(state)]
    pieces = [theirs(x[:2, :1], first[0] if len(first) == 1 else tuple(first))]
    pieces += [theirs(x[2:5, :1]), theirs(x[5:, :1])]
    whole, whole_last = theirs(x, state)
    expected = {"y0": torch.cat([y for y, _ in pieces]), "y1": whole[:, 1:]}
    actual = {"y0": output[:, :1], "y1": output[:, 1:]}
    for i, part in enumerate(flat(last)):
        actual[f"state{i}"] = part
        ends = (flat(pieces[-1][1])[i], flat(whole_last)[i][:, 1:])
        expected[f"state{i}"] = torch.cat(ends, 1)
    assert_close(actual, expected)


def test_resets_everywhere_forget_everything() -> None:
    theirs, ours = twins("gru", num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64)
    resets = torch.ones(T, B, dtype=torch.bool)
    output, _ = ours(x, random_state(ours, B), resets=resets)
    alone = torch.cat([theirs(step.unsqueeze(0))[0] for step in x])
    assert_close({"y": output}, {"y": alone})


def test_reverse_direction_resets_before_the_step_as_it_meets_it() -> None:
    _, both = twins("lstm", bidirectional=True)
    _, one = twins("lstm")
    one.load_state_dict({name: getattr(both, f"{name}_reverse") for name in one.state_dict()})
    x = torch.randn(T, B, I, dtype=torch.float64)
    resets = torch.rand(T, B) < 0.4
    output, (h, _) = both(x, resets=resets)
    mirrored, (h_mirrored, _) = one(x.flip(0), resets=resets.flip(0))
    assert_close({"y": output[..., H:], "h": h[1]}, {"y": mirrored.flip(0), "h": h_mirrored[0]})


def test_resets_of_one_sequence_and_of_packed_rows() -> None:
    _, ours = twins("gru", bidirectional=True)
    x, resets = torch.randn(T, B, I, dtype=torch.float64), torch.rand(T, B) < 0.4
    lengths = torch.tensor([2, 6, 1, 3])
    output, last = ours(x, lengths=lengths, resets=resets)

    packed, packed_last = ours(
        pack_padded_sequence(x, lengths, enforce_sorted=False), resets=resets
    )
    assert_close({"y": pad_packed_sequence(packed)[0], "h": packed_last}, {"y": output, "h": last})
    single, single_last = ours(x[:, 1], resets=resets[:, 1])
    assert_close({"y": single, "h": single_last}, {"y": output[:, 1], "h": last[:, 1]})


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("batch_first", [False, True], ids=["TB", "BT"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_of_every_step_are_the_last_of_a_shorter_sequence(
    kind: str, batch_first: bool
) -> None:
    _, ours = twins(kind, num_layers=2, bidirectional=True)
    ours.batch_first = batch_first
    lengths = torch.tensor([2, 6, 0, 5])
    x, state = torch.randn(T, B, I, dtype=torch.float64), random_state(ours, B)
    given = x.transpose(0, 1) if batch_first else x
    output, last, states = ours(given, state, lengths=lengths, return_states=True)
    plain = ours(given, state, lengths=lengths)
    assert_close(
        dict(enumerate([output, *flat(last)])), dict(enumerate([plain[0], *flat(plain[1])]))
    )
    for part, end, first in zip(flat(states), flat(last), flat(state), strict=True):
        steps = part.transpose(1, 2) if batch_first else part
        assert steps.shape == (4, T, B, end.shape[-1])
        for row, length in enumerate(lengths.tolist()):
            assert (steps[:, length:, row] == 0).all()
            # Forward ends at the last valid step, reverse at the first one.
            for i, direction in enumerate((0, 1, 0, 1)):
                want = end[i, row] if length else first[i, row]
                got = steps[i, 0 if direction else length - 1, row] if length else want
                assert_close({"end": got}, {"end": want})
    # The first layer forward does not know of later steps.
    short = ours(given[:, :3] if batch_first else x[:3], state, lengths=lengths.clamp(max=3))[1]
    for part, end in zip(flat(states), flat(short), strict=True):
        steps = part.transpose(1, 2) if batch_first else part
        assert_close({"state": steps[0, 2, [1, 3]]}, {"state": end[0, [1, 3]]})


def test_states_of_every_step_carry_gradients_and_take_other_inputs() -> None:
    _, ours = twins("lstm", num_layers=2)
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths = torch.tensor([2, 6, 1, 5])
    _, _, (h, c) = ours(x, lengths=lengths, return_states=True)
    grads = torch.autograd.grad((h * c).sum(), list(ours.parameters()))
    assert all(grad.abs().sum() > 0 for grad in grads)
    ours.keep_every = 2
    _, _, (h_kept, c_kept) = ours(x, lengths=lengths, return_states=True)
    kept = torch.autograd.grad((h_kept * c_kept).sum(), list(ours.parameters()))
    assert_close(dict(enumerate(kept)), dict(enumerate(grads)))
    with torch.no_grad():
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        _, _, (h_packed, c_packed) = ours(packed, return_states=True)
        assert_close({"h": h_packed, "c": c_packed}, {"h": h, "c": c})
        _, _, (h_one, c_one) = ours(x[:, 1], return_states=True)
        assert_close({"h": h_one, "c": c_one}, {"h": h[:, :, 1], "c": c[:, :, 1]})


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind: str) -> None:
    _, ours = twins(kind, num_layers=2, bidirectional=True)
    output, last = ours(torch.zeros(T, 0, I, dtype=torch.float64))
    assert output.shape == (T, 0, 2 * (ours.proj_size or H))
    assert [part.shape[:2] for part in flat(last)] == [(4, 0)] * len(flat(last))


def test_dropout_is_between_layers_and_in_training_only() -> None:
    theirs, ours = twins("lstm", num_layers=2, dropout=1.0)
    x = torch.randn(T, B, I, dtype=torch.float64)
    theirs.eval()
    ours.eval()
    assert_close({"y": ours(x)[0]}, {"y": theirs(x)[0]})
    # With everything dropped the upper layer reads zeros, and its output stays.
    top = nn.LSTM(H, H, dtype=torch.float64)
    top.load_state_dict({name.replace("1", "0"): w for name, w in ours.named_parameters()
                         if name.endswith("l1")})  # fmt: skip
    ours.train()
    zeros = torch.zeros(T, B, H, dtype=torch.float64)
    assert_close({"y": ours(x)[0]}, {"y": top(zeros)[0]})
    assert torch.equal(ours(x)[1][0][0], ours.eval()(x)[1][0][0])


class Double(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("kind", ["gru", "lstm_proj"])
def test_weights_are_read_at_each_call(kind: str) -> None:
    theirs, ours = twins(kind)
    x = torch.randn(T, B, I, dtype=torch.float64)
    before = ours(x)[0]
    doubled = {name: 2 * weight for name, weight in theirs.named_parameters()}
    theirs.load_state_dict(doubled)
    expected = theirs(x)[0]

    called = torch.func.functional_call(ours, doubled, (x,))[0]
    assert_close({"y": called}, {"y": expected})
    replaced = copy.deepcopy(ours)
    for name, weight in doubled.items():
        setattr(replaced, name, torch.nn.Parameter(weight))
    assert_close({"y": replaced(x)[0]}, {"y": expected})
    for name in doubled:
        parametrize.register_parametrization(ours, name, Double())
    assert_close({"y": ours(x)[0]}, {"y": expected})
    assert_close({"y": copy.deepcopy(ours)(x)[0]}, {"y": expected})
    assert not torch.equal(before, expected)


def test_state_dicts_swap_with_torch() -> None:
    theirs, ours = twins("lstm", num_layers=2, bidirectional=True)
    torch.manual_seed(3)
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(T, B, I, dtype=torch.float64)
    assert_close({"y": ours(x)[0]}, {"y": theirs(x)[0]})


Call = Callable[[], object]
X, SHORT = torch.zeros(T, B, I), torch.zeros(1, B, H)
ERRORS: dict[str, tuple[Call, type[Exception], str]] = {
    "input-dims": (lambda: nn.GRU(I, H)(torch.zeros(I)), ValueError, "2D or 3D, got 1D"),
    "input-size": (lambda: nn.GRU(I + 1, H)(X), RuntimeError, "Expected 4, got 3"),
    "input-dtype": (lambda: nn.GRU(I, H)(X.double()), ValueError, "float64.*float32"),
    "hx-size": (
        lambda: nn.GRU(I, H)(X, torch.zeros(2, B, H)),
        RuntimeError,
        r"Expected hidden size \(1, 4, 5\), got \[2, 4, 5\]",
    ),
    "hx-dims": (lambda: nn.GRU(I, H)(X, SHORT[0]), RuntimeError, "should also be 3-D but got 2-D"),
    "hx-unbatched": (lambda: nn.GRU(I, H)(X[:, 0], SHORT), RuntimeError, "also be 2-D but got 3-D"),
    "h-size": (
        lambda: nn.LSTM(I, H)(X, (SHORT[..., 1:], SHORT)),
        RuntimeError,
        r"Expected hidden\[0\] size",
    ),
    "c-size": (
        lambda: nn.LSTM(I, H)(X, (SHORT, SHORT[..., 1:])),
        RuntimeError,
        r"Expected hidden\[1\] size",
    ),
    "lstm-hx": (lambda: nn.LSTM(I, H)(X, SHORT), ValueError, r"pair \(h, c\), got Tensor"),
    "gru-hx": (lambda: nn.GRU(I, H)(X, (SHORT, SHORT)), ValueError, "one tensor h, got tuple of 2"),
    "lstm-hx-none": (
        lambda: nn.LSTM(I, H)(X, (None, None)),
        ValueError,
        r"pair of tensors \(h, c\), got NoneType for h",
    ),
    "lengths-number": (
        lambda: nn.GRU(I, H)(X[:, 0], lengths=3),
        TypeError,
        "lengths must be a tensor, got int",
    ),
    "lengths-list": (
        lambda: nn.GRU(I, H)(X, lengths=[T] * B),
        TypeError,
        "lengths must be a tensor, got list of 4",
    ),
    "lengths-of-many": (
        lambda: nn.GRU(I, H)(X[:, 0], lengths=torch.tensor([1, 2])),
        RuntimeError,
        r"lengths must be one number for one sequence, got \(2,\)",
    ),
    "resets-list": (
        lambda: nn.GRU(I, H, batch_first=True)(X, resets=[True]),
        TypeError,
        "resets must be a tensor, got list of 1",
    ),
    "meta-dtype": (
        lambda: nn.LSTM(I, H, device="meta")(X.double().to("meta")),
        ValueError,
        r"input dtype \(torch.float64\) does not match weight dtype",
    ),
    "packed-lengths": (
        lambda: nn.GRU(I, H)(
            pack_padded_sequence(X, torch.tensor([T] * B)), lengths=torch.tensor([T] * B)
        ),
        ValueError,
        "lengths must be None",
    ),
    "nonlinearity": (lambda: nn.RNN(I, H, nonlinearity="elu"), ValueError, "'elu'. Select from"),
    "cell-nonlinearity": (lambda: nn.RNNCell(I, H, nonlinearity="elu"), ValueError, "Unknown.*elu"),
    "dropout": (lambda: nn.GRU(I, H, 2, dropout=2), ValueError, "dropout"),
    "proj": (lambda: nn.LSTM(I, H, proj_size=H), ValueError, "proj_size"),
    "cell-dims": (lambda: nn.GRUCell(I, H)(X), ValueError, "GRUCell: .* 1D or 2D, got 3D"),
    "cell-size": (lambda: nn.GRUCell(I + 1, H)(X[0]), RuntimeError, "input_size: got 3 expected 4"),
    "cell-dtype": (lambda: nn.GRUCell(I, H)(X[0].double()), ValueError, "float64.*float32"),
    "cell-hx-dims": (
        lambda: nn.GRUCell(I, H)(X[0], SHORT),
        ValueError,
        "hidden to be 1D or 2D, got 3D",
    ),
    "cell-hx": (lambda: nn.LSTMCell(I, H)(X[0], SHORT[0]), ValueError, r"pair \(h, c\)"),
    "score": (lambda: nn.Attention(3, 3, score="cosine"), ValueError, "got 'cosine'"),
    "dot-sizes": (lambda: nn.Attention(3, 4, score="dot"), ValueError, "3 and memory_size 4"),
    "attention-size": (lambda: nn.Attention(3, 4, attention_size=2), ValueError, "'concat'"),
    "no-size": (lambda: nn.Attention(0, 4), ValueError, "query_size must be .* got 0"),
    "true-size": (lambda: nn.Attention(True, 4), ValueError, "query_size must be .* got True"),
    "half-size": (lambda: nn.Attention(3, 4.0), ValueError, "memory_size must be .* got 4.0"),  # type: ignore[arg-type]
    "positions": (
        lambda: nn.Attention(3, 3, score="location"),
        ValueError,
        "max_positions must be given .*got None for 'location'",
    ),
    "no-positions": (lambda: nn.Attention(3, 3, max_positions=5), ValueError, "got 5 for 'general"),
    "heads": (lambda: nn.Attention(4, 6, heads=4), ValueError, "divide memory_size, 6, got 4"),
    "head-keys": (lambda: nn.Attention(3, 4, heads=2), ValueError, "keys, 3, got 2"),
    "no-heads": (lambda: nn.Attention(3, 4, heads=0), ValueError, "heads must be .* got 0"),
    "window": (lambda: nn.Attention(3, 4, window="local"), ValueError, "local-m.*got 'local'"),
    "window-size": (
        lambda: nn.Attention(3, 4, window="local-m", window_size=0),
        ValueError,
        "window_size must be a positive integer, got 0",
    ),
    "no-window": (lambda: nn.Attention(3, 4, window_size=2), ValueError, "got 2 without one"),
    "attention-lengths": (
        lambda: nn.Attention(3, 3)(X[..., :3], X[..., :3], [T] * B),  # type: ignore[arg-type]
        TypeError,
        "lengths must be a tensor, got list of 4",
    ),
    "project-memory": (
        lambda: nn.Score("general", 3, 4).project(torch.zeros(2, 5)),
        RuntimeError,
        r"memory must be \(S, B, M\) = \(any, any, 4\), got \(2, 5\)",
    ),
    "project-dtype": (
        lambda: nn.Score("concat", 3, 4).project(torch.zeros(2, 5, 4).double()),
        RuntimeError,
        "memory must have the dtype of the score's weight, torch.float32, got torch.float64",
    ),
    "query": (
        lambda: nn.Attention(3, 4)(torch.zeros(2, 5, 4), torch.zeros(6, 5, 4)),
        RuntimeError,
        r"query must be \(T, B, Q\) = \(any, any, 3\), got \(2, 5, 4\)",
    ),
    "memory": (
        lambda: nn.Attention(3, 4)(torch.zeros(2, 5, 3), torch.zeros(6, 4, 4)),
        RuntimeError,
        r"memory must be \(S, B, M\) = \(any, 5, 4\), got \(6, 4, 4\)",
    ),
    "decoder-cell": (lambda: nn.AttentionDecoder(3, 4, 4, cell="lstn"), ValueError, "got 'lstn'"),
    "decoder-dot": (lambda: nn.AttentionDecoder(3, 4, 5, score="dot"), ValueError, "memory_size 5"),
    "decoder-dropout": (lambda: nn.AttentionDecoder(3, 4, 4, dropout=1.5), ValueError, "got 1.5"),
    "decoder-layers": (lambda: nn.AttentionDecoder(3, 4, 4, 0), ValueError, "num_layers .* got 0"),
    "decoder-x": (
        lambda: nn.AttentionDecoder(4, H, H)(X, torch.zeros(2, B, H)),
        RuntimeError,
        r"x must be \(T, B, I\) = \(any, any, 4\)",
    ),
    "decoder-dtype": (
        lambda: nn.AttentionDecoder(I, H, H)(X.double(), torch.zeros(2, B, H)),
        ValueError,
        r"x dtype \(torch.float64\) does not match weight dtype \(torch.float32\)",
    ),
    "decoder-memory": (
        lambda: nn.AttentionDecoder(I, H, 7)(X, torch.zeros(2, B, H)),
        RuntimeError,
        r"memory must be \(S, B, M\) = \(any, 4, 7\), got \(2, 4, 5\)",
    ),
    "no-memory": (lambda: nn.AttentionDecoder(I, H, 7)(X), RuntimeError, "memory must be given"),
    "decoder-state": (
        lambda: nn.AttentionDecoder(I, H, H, cell="gru")(X, X, state=SHORT),  # type: ignore[arg-type]
        ValueError,
        r"pair \(hidden, feed\), got Tensor",
    ),
    "decoder-h": (
        lambda: nn.AttentionDecoder(I, H, I, 2, cell="gru")(X, X, state=(SHORT, None)),
        RuntimeError,
        r"h of state.hidden must be \(L, B, H\) = \(2, 4, 5\), got \(1, 4, 5\)",
    ),
    "decoder-feed": (
        lambda: nn.AttentionDecoder(I, H, I, cell="gru")(X, X, state=(SHORT, SHORT)),
        RuntimeError,
        r"state.feed must be \(B, H\) = \(4, 5\)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_expected(case: str) -> None:
    call, error, match = ERRORS[case]
    with pytest.raises(error, match=match):
        call()


# Cells


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_match_torch(kind: str, batched: bool, bias: bool) -> None:
    name, extra = KINDS[kind]
    modules = []
    for home in (torch.nn, nn):
        torch.manual_seed(1)
        modules.append(getattr(home, f"{name}Cell")(I, H, bias, dtype=torch.float64, **extra))
    theirs, ours = modules
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))

    rows = (B,) if batched else ()
    x = torch.randn(*rows, I, dtype=torch.float64, requires_grad=True)
    state: Any = torch.randn(*rows, H, dtype=torch.float64, requires_grad=True)
    if kind == "lstm":
        state = (state, torch.randn(*rows, H, dtype=torch.float64, requires_grad=True))
    results = []
    for module in modules:
        zero = flat(module(x))
        last = flat(module(x, state))
        leaves = [x, *flat(state), *module.parameters()]
        grads = torch.autograd.grad(sum(part.pow(2).sum() for part in last), leaves)
        results.append({str(i): value for i, value in enumerate([*zero, *last, *grads])})
    assert_close(results[1], results[0])


# Attention


def score_shapes(score: str | None, query: int, memory: int, size: int) -> dict[str, Any]:
    if score == "general":
        return {"score.weight": (query, memory)}
    if score == "concat":
        return {
            "score.weight_query": (size, query),
            "score.weight_memory": (size, memory),
            "score.weight_v": (size,),
        }
    return {}


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("score", SCORES)
def test_attention_is_its_formula(score: str) -> None:
    query_size, memory_size, steps = (4, 4, 7) if score == "dot" else (4, 3, 7)
    size = {"attention_size": 6} if score == "concat" else {}
    module = nn.Attention(query_size, memory_size, score=score, dtype=torch.float64, **size)
    assert shapes(module) == score_shapes(score, query_size, memory_size, 6)
    query = torch.randn(T, B, query_size, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(steps, B, memory_size, dtype=torch.float64)
    lengths = torch.tensor([7, 1, 0, 4])
    context, weights = module(query, memory, lengths, need_weights=True)
    assert module(query, memory, lengths)[1] is None

    weight = dict(module.named_parameters())
    expected_context, expected_weights = torch.zeros_like(context), torch.zeros_like(weights)
    for b, length in enumerate(lengths.tolist()):
        for t in range(T):
            q, rows = query[t, b], memory[:length, b]
            if score == "dot":
                scores = rows @ q
            elif score == "general":
                scores = rows @ (q @ weight["score.weight"])
            else:
                hidden = weight["score.weight_query"] @ q
                hidden = torch.tanh(hidden + rows @ weight["score.weight_memory"].t())
                scores = hidden @ weight["score.weight_v"]
            expected_weights[t, b, :length] = torch.softmax(scores, 0)
            expected_context[t, b] = expected_weights[t, b, :length] @ rows
    assert_close(
        {"context": context, "weights": weights},
        {"context": expected_context, "weights": expected_weights},
    )
    context.sum().backward()
    for leaf in (query, *module.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kind", ["attention", "decoder"])
def test_what_padding_of_the_memory_holds_does_not_matter(kind: str, score: str) -> None:
    query, memory = torch.randn(2, 2, 4), torch.randn(5, 2, 4)
    lengths = torch.tensor([5, 3])
    if kind == "attention":
        module: torch.nn.Module = nn.Attention(4, 4, score=score)
    else:
        module = nn.AttentionDecoder(4, 4, 4, score=score)
    tables = []
    for padding in (0.0, torch.nan):
        memory[3:, 1] = padding
        leaf = memory.clone().requires_grad_()
        output = module(query, leaf, lengths=lengths)[0]
        leaves = {"memory": leaf} | dict(module.named_parameters())
        gradients = torch.autograd.grad(output.square().sum(), list(leaves.values()))
        tables.append({"y": output} | dict(zip(leaves, gradients, strict=True)))
    assert_close(tables[1], tables[0])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("score", ["scaled_dot", "location"])
@pytest.mark.parametrize("window", [None, "local-m", "local-p"])
def test_attention_is_that_of_the_reference(window: str | None, score: str) -> None:
    options: dict[str, Any] = {"score": score, "heads": 2, "dtype": torch.float64}
    if score == "location":
        options["max_positions"] = 5
    if window is not None:
        options |= {"window": window, "window_size": 2}
    module = nn.Attention(4, 4, **options)
    query = torch.randn(T, B, 4, dtype=torch.float64)
    memory = torch.randn(7, B, 4, dtype=torch.float64)
    lengths = torch.tensor([7, 1, 0, 4])
    positions = None
    if module.positions is not None:
        own = module.positions
        limit = lengths.clamp(max=5) if score == "location" else lengths
        positions = reference.predict_positions(query, own.weight, own.weight_v, 7, limit)
    expected = reference.attend(
        query,
        None if score == "location" else memory,
        memory,
        lengths,
        score=score,  # type: ignore[arg-type]
        weight=module.score.weight,
        heads=2,
        window=module.window_size,
        positions=positions,
        need_weights=True,
    )
    context, weights = module(query, memory, lengths, need_weights=True)
    assert expected.weights is not None
    assert_close(
        {"context": context, "weights": weights},
        {"context": expected.context, "weights": expected.weights},
    )
    assert nn.Attention(4, 4, window="local-m").window_size == 10
    if not context.requires_grad:
        return  # scaled_dot has no weights
    names, parameters = zip(*module.named_parameters(), strict=True)
    actual, wanted = (
        dict(zip(names, torch.autograd.grad(y.square().sum(), parameters), strict=True))
        for y in (context, expected.context)
    )
    assert_close(actual, wanted)


def test_attention_size_defaults_to_the_query_size() -> None:
    assert shapes(nn.Attention(4, 3, score="concat")) == score_shapes("concat", 4, 3, 4)


# The decoder


def decoder(
    *, num_layers: int = 2, memory_size: int = 5, dtype: torch.dtype = torch.float64, **options: Any
) -> nn.AttentionDecoder:
    return nn.AttentionDecoder(I, H, memory_size, num_layers, dtype=dtype, **options)


def decoder_inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(T, B, I, dtype=torch.float64)
    memory = torch.randn(7, B, 5, dtype=torch.float64)
    return x, memory, torch.tensor([3, 7, 1, 5])


@pytest.mark.parametrize("input_feeding", [True, False], ids=["fed", "unfed"])
@pytest.mark.parametrize("score", [*SCORES, None])
@pytest.mark.parametrize("cell", CELLS)
def test_decoder_parameters(cell: str, score: str | None, input_feeding: bool) -> None:
    module = nn.AttentionDecoder(I, 4, 4, 2, cell=cell, score=score, input_feeding=input_feeding)
    rows = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}[cell] * 4
    first = I + 4 if input_feeding and score is not None else I
    expected: dict[str, Any] = {}
    for layer, columns in enumerate((first, 4)):
        expected |= {
            f"weight_ih_l{layer}": (rows, columns),
            f"weight_hh_l{layer}": (rows, 4),
            f"bias_ih_l{layer}": (rows,),
            f"bias_hh_l{layer}": (rows,),
        }
    expected |= score_shapes(score, 4, 4, 4)
    if score is not None:
        expected["combine.weight"] = (4, 8)
    assert shapes(module) == expected
    drawn = torch.cat([weight.flatten() for weight in module.parameters(recurse=False)])
    assert 0.45 < drawn.abs().max() <= 0.5  # 1 / sqrt(H)


def test_decoder_takes_rnn_for_rnn_tanh() -> None:
    assert decoder(cell="rnn").cell == "rnn_tanh"


@pytest.mark.usefixtures("device")
def test_decoder_is_its_definition() -> None:
    """Columns [x; fed] and [context; h], written with torch's own cell."""
    module = decoder(num_layers=1)
    cell = torch.nn.LSTMCell(I + H, H, dtype=torch.float64)
    weights = dict(module.named_parameters())
    cell.load_state_dict({name: weights[f"{name}_l0"] for name in cell.state_dict()})
    x, memory, _ = decoder_inputs()
    output, attn, state = module(x, memory, need_weights=True)

    h = c = feed = x.new_zeros(B, H)
    outputs, attns = [], []
    for step in x:
        h, c = cell(torch.cat([step, feed], 1), (h, c))
        scores = torch.einsum("bh,hm,sbm->bs", h, weights["score.weight"], memory)
        attns.append(torch.softmax(scores, 1))
        context = torch.einsum("bs,sbm->bm", attns[-1], memory)
        feed = torch.tanh(torch.cat([context, h], 1) @ weights["combine.weight"].t())
        outputs.append(feed)
    assert_close(
        {"y": output, "attn": attn, "h": state.hidden[0][0], "c": state.hidden[1][0]}
        | {"feed": state.feed},
        {"y": torch.stack(outputs), "attn": torch.stack(attns), "h": h, "c": c, "feed": feed},
    )


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("input_feeding", [True, False], ids=["fed", "unfed"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("cell", CELLS)
def test_decoder_matches_reference(cell: str, score: Any, input_feeding: bool) -> None:
    module = decoder(cell=cell, score=score, input_feeding=input_feeding)
    x, memory, lengths = decoder_inputs()
    hidden: Any = torch.randn(2, B, H, dtype=torch.float64)
    if cell == "lstm":
        hidden = (hidden, torch.randn(2, B, H, dtype=torch.float64))
    given = DecoderState(hidden, torch.randn(B, H, dtype=torch.float64))
    weights = dict(module.named_parameters())
    layers = [
        tuple(weights[f"{name}_l{k}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        for k in range(2)
    ]
    keys = memory @ weights["score.weight_memory"].t() if score == "concat" else memory
    expected = reference.decode(
        x,
        layers,
        keys,
        memory,
        weights["combine.weight"],
        cell=cell,
        score=score,
        weight=weights.get("score.weight"),
        weight_query=weights.get("score.weight_query"),
        weight_v=weights.get("score.weight_v"),
        state=given,
        lengths=lengths,
        input_feeding=input_feeding,
        need_weights=True,
    )
    actual = module(x, memory, lengths=lengths, state=given, need_weights=True)
    tables = []
    for result in (actual, expected):
        parts = [result.output, result.weights, result.state.feed, *flat(result.state.hidden)]
        grads = torch.autograd.grad(sum(part.pow(2).sum() for part in parts), weights.values())
        tables.append(
            {f"result{i}": part for i, part in enumerate(parts)}
            | {f"d_{name}": grad for name, grad in zip(weights, grads, strict=True)}
        )
    assert_close(*tables)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("score", [*SCORES, None])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_decoder_goes_on_from_its_state(cell: str, score: str | None) -> None:
    module = decoder(cell=cell, score=score)
    x, memory, lengths = decoder_inputs()
    output, attn, end = module(x, memory, lengths=lengths, need_weights=True)
    keys, state, pieces = module.project(memory), None, []
    for piece in x.split([1, 3, 2]):
        pieces.append(
            module(piece, memory, lengths=lengths, state=state, need_weights=True, keys=keys)
        )
        state = tuple(pieces[-1].state)
    actual = {"y": torch.cat([p.output for p in pieces]), "feed": pieces[-1].state.feed}
    expected = {"y": output, "feed": end.feed}
    if score is not None:
        actual["attn"] = torch.cat([p.weights for p in pieces])
        expected["attn"] = attn
    for i, part in enumerate(flat(pieces[-1].state.hidden)):
        actual[f"hidden{i}"], expected[f"hidden{i}"] = part, flat(end.hidden)[i]
    assert_close(actual, expected)
    assert torch.equal(end.feed, output[-1])


@pytest.mark.parametrize("score", ["general", None])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_decoder_takes_none_for_a_state_of_zero(cell: str, score: str | None) -> None:
    module = decoder(cell=cell, score=score)
    x, memory, _ = decoder_inputs()
    zero: Any = torch.zeros(2, B, H, dtype=torch.float64)
    zero = (zero, zero) if cell == "lstm" else zero
    feed = torch.randn(B, H, dtype=torch.float64)
    pairs = (((None, feed), (zero, feed)), ((None, None), None), ((zero, None), None))
    for short, full in pairs:
        actual, expected = (module(x, memory, state=state).output for state in (short, full))
        assert_close({"y": actual}, {"y": expected})


@pytest.mark.parametrize("score", ["concat", None])
def test_decoder_batch_first(score: str | None) -> None:
    module = decoder(score=score)
    x, memory, lengths = decoder_inputs()
    expected = module(x, memory, lengths=lengths, need_weights=True)
    module.batch_first = True
    rows = memory.transpose(0, 1)
    for keys in (None, module.project(rows)):
        actual = module(x.transpose(0, 1), rows, lengths=lengths, need_weights=True, keys=keys)
        assert_close(
            {"y": actual.output, "feed": actual.state.feed},
            {"y": expected.output.transpose(0, 1), "feed": expected.state.feed},
        )
        if score is not None:
            assert_close({"w": actual.weights}, {"w": expected.weights.transpose(0, 1)})


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("cell", CELLS)
def test_decoder_without_attention_is_the_stacked_layers(cell: str) -> None:
    module = decoder(cell=cell, score=None)
    name, extra = KINDS[cell]
    theirs = getattr(torch.nn, name)(I, H, 2, dtype=torch.float64, **extra)
    theirs.load_state_dict(module.state_dict())
    x, memory, _ = decoder_inputs()
    hidden = random_state(theirs, B)
    output, weights, state = module(x, memory, state=(hidden, None), need_weights=True)
    expected, last = theirs(x, hidden)
    assert weights is None
    assert not module.input_feeding
    assert_close(
        {"y": output} | {str(i): part for i, part in enumerate(flat(state.hidden))},
        {"y": expected} | {str(i): part for i, part in enumerate(flat(last))},
    )
    assert torch.equal(module(x).output, module(x, memory).output)


@pytest.mark.parametrize("score", ["general", None])
def test_decoder_dropout_is_between_layers_and_in_training_only(score: str | None) -> None:
    module = decoder(score=score, dropout=1.0, input_feeding=False)
    x, memory, _ = decoder_inputs()
    kept = module.eval()(x, memory).state.hidden[0]
    h = module.train()(x, memory).state.hidden[0]
    assert torch.equal(h[0], kept[0])
    # All of the lower layer dropped: the upper one reads zeros, whatever the input is.
    assert torch.equal(h[1], module(torch.randn_like(x), memory).state.hidden[0][1])
    assert not torch.equal(h[1], kept[1])

    module.dropout = 0.5
    torch.manual_seed(5)
    first = module(x, memory).output
    assert not torch.equal(first, module(x, memory).output)
    torch.manual_seed(5)
    assert torch.equal(first, module(x, memory).output)


def test_decoder_reset_parameters_draws_all_anew() -> None:
    module = decoder(score="concat")
    before = copy.deepcopy(module.state_dict())
    module.reset_parameters()
    assert not any(torch.equal(before[name], w) for name, w in module.state_dict().items())


@pytest.mark.parametrize("make", [lambda: nn.LSTM(I, H, 2, bidirectional=True), decoder])
def test_modules_compile_into_one_graph(make: Callable[..., torch.nn.Module]) -> None:
    module = make().double()
    x, memory, lengths = decoder_inputs()
    extra = (memory,) if isinstance(module, nn.AttentionDecoder) else ()
    lengths = lengths if extra else lengths.clamp(max=T)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    actual = compiled(x, *extra, lengths=lengths)[0]
    assert_close({"y": actual}, {"y": module(x, *extra, lengths=lengths)[0]})


def test_keep_every_changes_memory_and_no_result() -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(5, 6, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(9, 3, 5), torch.tensor([9, 4, 7])
    inputs = list(layer.parameters())
    output = layer(x, lengths=lengths)[0]
    expected = torch.autograd.grad(output.square().sum(), inputs)
    layer.keep_every = 4
    again = copy.deepcopy(layer)(x, lengths=lengths)[0]
    torch.testing.assert_close(again, output)
    kept = torch.autograd.grad(layer(x, lengths=lengths)[0].square().sum(), inputs)
    torch.testing.assert_close(kept, expected)
