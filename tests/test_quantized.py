# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.quantized: short weights in modules, against the reference of their numbers."""

from __future__ import annotations

import copy
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_tiers import TIERS, available
from torch import Tensor
from torch.nn.utils import prune

import pyseq
from pyseq import _packed, functional, nn, reference
from pyseq.comparison import reference_operators
from pyseq.types import START, CellName

KINDS = ("int8", "bfloat16")
CELLS: tuple[CellName, ...] = ("rnn_tanh", "rnn_relu", "gru", "lstm")

#: Of outputs of magnitude 1. A number that lies between two of 8 bits may be rounded up on one
#: side and down on the other, where the last bits of a state differ: 1/127 of a weight.
TOLERANCE = {"int8": 2e-3, "bfloat16": 2e-5}


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors(item)


def assert_near(actual: Any, expected: Any, tolerance: float) -> None:
    pairs = list(zip(tensors(actual), tensors(expected), strict=True))
    assert pairs
    for one, other in pairs:
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other.to(one.dtype), atol=tolerance, rtol=tolerance)


def layers(cell: CellName, *sizes: int, **options: Any) -> torch.nn.Module:
    """The module of nn that runs ``cell``."""
    if cell.startswith("rnn"):
        return nn.RNN(*sizes, nonlinearity=cell.removeprefix("rnn_"), **options)
    return {"gru": nn.GRU, "lstm": nn.LSTM}[cell](*sizes, **options)


# Packing


@pytest.mark.parametrize("rows", [1, 4, 52, 68])
@pytest.mark.parametrize("columns", [(1,), (7,), (16, 33), (64, 1)])
def test_int8_rows_are_scaled_by_their_largest_magnitude(rows: int, columns: Any) -> None:
    weight = torch.randn(rows, sum(columns)) * torch.logspace(-3, 3, rows).unsqueeze(1)
    weight[0] = 0
    packed = _packed.pack(weight, "int8", gates=4 if rows % 4 == 0 else 1, columns=columns)
    assert packed.shape[0] == rows
    runs = _packed.unpack(packed)
    for part, (values, scales) in zip(weight.split(columns, 1), runs, strict=True):
        assert values.dtype == torch.int8
        assert scales is not None
        torch.testing.assert_close(scales, part.abs().amax(1) / 127)
        nearest = torch.where(part == 0, 0, torch.round(part / scales.unsqueeze(1)))
        torch.testing.assert_close(values.float(), nearest)


def test_bfloat16_is_rounded_to_the_nearest() -> None:
    weight = torch.randn(24, 35)
    ((values, scales),) = _packed.unpack(_packed.pack(weight, "bfloat16", gates=3))
    assert scales is None
    assert torch.equal(values, weight.bfloat16())


# Layers


#: H and B.
SIZES = ((1, 1), (7, 2), (33, 3), (64, 4), (130, 5), (16, 9), (40, 30))


def compare_layers(kind: Any, cell: CellName, hidden: int, batch: int) -> None:
    """Compare with the reference of the same quantized weights."""
    module = pyseq.quantize(layers(cell, 9, hidden, 2, bidirectional=True), kind)
    x = torch.randn(6, batch, 9)
    lengths, resets = torch.randint(0, 7, (batch,)), torch.rand(6, batch) < 0.2
    with reference_operators():
        expected = module(x, lengths=lengths, resets=resets)
    assert_near(module(x, lengths=lengths, resets=resets), expected, TOLERANCE[kind])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("hidden", "batch"), SIZES)
def test_layers_are_the_reference_of_their_weights(
    kind: Any,
    cell: CellName,
    hidden: int,
    batch: int,
    threads: int,
    set_threads: Callable[[int], None],
) -> None:
    set_threads(threads)
    compare_layers(kind, cell, hidden, batch)


@pytest.mark.parametrize("capability", available())
def test_layers_on_tier(capability: str) -> None:
    """ "avx512" is without the dot products of 8 bits, which the tests above have, if any."""
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == TIERS[capability]


@pytest.mark.parametrize("kind", KINDS)
def test_projection_and_state(kind: Any) -> None:
    module = pyseq.quantize(nn.LSTM(5, 40, proj_size=21), kind)
    x, state = torch.randn(4, 3, 5), (torch.randn(1, 3, 21) * 5, torch.randn(1, 3, 40))
    with reference_operators():
        expected = module(x, state)
    assert_near(module(x, state), expected, 5 * TOLERANCE[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_cells(kind: Any, cell: Any) -> None:
    module = pyseq.quantize(cell(6, 37), kind)
    x = torch.randn(2, 6)
    with reference_operators():
        expected = module(x)
    assert_near(module(x), expected, TOLERANCE[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_one_and_more_threads_give_the_same_bits(
    kind: Any, set_threads: Callable[[int], None]
) -> None:
    for batch, hidden in ((1, 300), (2, 260), (40, 64)):
        module = pyseq.quantize(nn.LSTM(50, hidden), kind)
        x = torch.randn(9, batch, 50)
        results = []
        for threads in (1, 2, 3):
            set_threads(threads)
            results.append(list(tensors(module(x))))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(("kind", "allowed"), [("int8", 0.02), ("bfloat16", 0.005)])
@pytest.mark.parametrize("cell", CELLS)
def test_quantized_is_near_what_it_was(kind: Any, allowed: float, cell: CellName) -> None:
    module = layers(cell, 64, 128)
    x = torch.randn(20, 2, 64)
    assert_near(pyseq.quantize(module, kind)(x)[0], module(x)[0].detach(), allowed)


def test_large_states_of_relu_keep_their_precision() -> None:
    module = nn.RNN(8, 32, nonlinearity="relu")
    x = torch.randn(5, 2, 8) * 1000
    expected = module(x)[0].detach()
    actual = pyseq.quantize(module, "int8")(x)[0]
    assert (actual - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(kind: Any, bad: float) -> None:
    module = pyseq.quantize(nn.GRU(4, 20), kind)
    x = torch.randn(3, 4, 4)
    clean, _ = module(x)
    x[1, 2, 3] = bad
    output, _ = module(x)
    assert torch.equal(output[0], clean[0])
    rows = [0, 1, 3]
    assert torch.equal(output[:, rows], clean[:, rows])
    if bad != bad:
        assert output[1:, 2].isnan().all()


def test_zero_input_is_zero() -> None:
    module = pyseq.quantize(nn.LSTM(3, 17, bias=False), "int8")
    assert module(torch.zeros(4, 2, 3))[0].eq(0).all()
    assert module(torch.full((4, 2, 3), 1e-38))[0].isfinite().all()


@pytest.mark.parametrize("batch", [0, 1])
def test_no_row_and_no_input(batch: int) -> None:
    module = pyseq.quantize(nn.LSTM(3, 17), "int8")
    assert module(torch.randn(4, batch, 3))[0].shape == (4, batch, 17)


# Decoders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize(
    ("score", "feeding", "count"),
    [
        ("dot", True, 1),
        ("general", False, 2),
        ("concat", True, 3),
        ("concat", False, 1),
        (None, False, 2),
    ],
)
def test_decoders_are_the_reference_of_their_weights(
    kind: Any, cell: str, score: str | None, feeding: bool, count: int
) -> None:
    module = nn.AttentionDecoder(
        6, 35, 35, count, cell=cell, score=score, input_feeding=feeding, dropout=0.5
    )
    module = pyseq.quantize(module, kind)
    x, memory, lengths = torch.randn(5, 3, 6), torch.randn(7, 3, 35), torch.tensor([7, 0, 4])
    options: dict[str, Any] = {"lengths": lengths, "need_weights": score is not None}
    with reference_operators():
        expected = module(x, memory, **options)
    actual = module(x, memory, **options)
    assert_near(actual[::2], expected[::2], TOLERANCE[kind])
    if score is not None:
        assert_near(actual.weights, expected.weights, TOLERANCE[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_a_decoder_are_its_sequence(kind: Any) -> None:
    module = pyseq.quantize(nn.AttentionDecoder(6, 40, 40, 2), kind)
    x, memory = torch.randn(5, 2, 6), torch.randn(4, 2, 40)
    whole = module(x, memory)
    state, outputs = None, []
    for step in x:
        output, _, state = module(step.unsqueeze(0), memory, state=state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs), whole.output)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", ["general", None])
def test_a_whole_model_generates(kind: Any, score: Any) -> None:
    torch.manual_seed(2)
    model = pyseq.Seq2Seq(20, 15, embedding_size=12, hidden_size=32, score=score).eval()
    short = pyseq.quantize(model, kind)
    source, lengths = torch.randint(4, 20, (3, 6)), torch.tensor([6, 2, 5])
    target = torch.full((3, 4), START)
    assert_near(short(source, lengths, target), model(source, lengths, target).detach(), 0.05)
    assert short.decoder.is_fused()
    for beam_size in (1, 3):
        options = {"max_length": 5, "beam_size": beam_size}
        found = short.generate(source, lengths, **options)
        with reference_operators():
            expected = short.generate(source, lengths, **options)
        assert [one.tokens for one in found] == [other.tokens for other in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.score == pytest.approx(other.score, abs=20 * TOLERANCE[kind])
    assert short.loss(source, lengths, target, target + 5).isfinite()


# What a quantized module is


def test_the_module_itself_is_unchanged() -> None:
    module = nn.LSTM(4, 8).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    short = pyseq.quantize(module)
    assert module.training
    assert not short.training
    assert list(module.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_weights_take_a_quarter_or_half_of_the_bytes() -> None:
    module = nn.LSTM(256, 256, bias=False)
    full = sum(weight.numel() * 4 for weight in module.parameters())
    for kind, share in (("int8", 0.25), ("bfloat16", 0.5)):
        short = pyseq.quantize(module, kind)  # type: ignore[arg-type]
        assert not list(short.parameters())
        size = sum(weight.numel() for weight in short.buffers())
        assert share <= size / full < share + 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_and_copies(kind: Any) -> None:
    one, other = pyseq.quantize(nn.GRU(4, 8), kind), pyseq.quantize(nn.GRU(4, 8), kind)
    x = torch.randn(3, 2, 4)
    assert torch.equal(copy.deepcopy(one)(x)[0], one(x)[0])
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x)[0], one(x)[0])
    with pytest.raises(RuntimeError, match="size mismatch for weight_ih_l0"):
        one.load_state_dict(nn.GRU(4, 8).state_dict())


def test_training_is_refused() -> None:
    module = pyseq.quantize(nn.LSTM(4, 8)).train()
    with pytest.raises(RuntimeError, match="for inference: call eval"):
        module(torch.randn(3, 2, 4))
    cell = pyseq.quantize(nn.GRUCell(4, 8)).train()
    with pytest.raises(RuntimeError, match="for inference: call eval"):
        cell(torch.randn(2, 4))
    model = pyseq.quantize(pyseq.Seq2Seq(9, 9, embedding_size=4, hidden_size=8)).train()
    with pytest.raises(RuntimeError, match="for inference: call eval"):
        model(torch.full((1, 2), 5), torch.tensor([2]), torch.full((1, 2), START))


def test_gradients_are_refused() -> None:
    module = pyseq.quantize(nn.LSTM(4, 8))
    x = torch.randn(3, 2, 4, requires_grad=True)
    for keep_every in (1, 2):
        module.keep_every = keep_every
        with pytest.raises(RuntimeError, match=r"give no gradients.*torch.no_grad"):
            module(x)
    with torch.no_grad():
        assert not module(x)[0].requires_grad
    decoder = pyseq.quantize(nn.AttentionDecoder(4, 8, 8))
    with pytest.raises(RuntimeError, match=r"give no gradients.*torch.no_grad"):
        decoder(x, torch.randn(5, 2, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_quantized_says_so(kind: Any) -> None:
    for module in (nn.LSTM(4, 8), nn.GRUCell(4, 8), nn.AttentionDecoder(4, 8, 8)):
        assert "quantized" not in repr(module)
        short = pyseq.quantize(module, kind)
        assert f"quantized={kind!r}" in repr(short)
        assert f"quantized={kind!r}" in repr(copy.deepcopy(short))


@pytest.mark.parametrize(
    "module",
    [
        nn.LSTM(4, 8),
        nn.RNNCell(4, 8),
        nn.AttentionDecoder(4, 8, 8),
        nn.AttentionDecoder(4, 8, 8, score="concat"),
    ],
    ids=["layer", "cell", "decoder", "score"],
)
def test_quantized_weights_are_not_drawn_anew(module: torch.nn.Module) -> None:
    short = pyseq.quantize(module)
    before = {name: value.clone() for name, value in short.state_dict().items()}
    part = short.score if isinstance(short, nn.AttentionDecoder) else None
    drawn = part if isinstance(part, nn.Score) and part.name == "concat" else short
    with pytest.raises(RuntimeError, match=r"cannot be drawn anew: .* got a quantized"):
        drawn.reset_parameters()  # type: ignore[operator]
    assert all(torch.equal(value, before[name]) for name, value in short.state_dict().items())


def parametrised() -> torch.nn.Module:
    module = nn.LSTM(4, 8)
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    return module


def pruned() -> torch.nn.Module:
    module = nn.GRU(4, 8)
    prune.l1_unstructured(module, "weight_ih_l0", amount=0.5)
    module(torch.randn(3, 2, 4))  # from here on its weight is the result of a product
    return module


def infinite() -> torch.nn.Module:
    module = nn.GRU(4, 8)
    with torch.no_grad():
        module.weight_hh_l0[2, 3] = torch.inf
    return module


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: pyseq.quantize(nn.LSTM(4, 8), "int4"),  # type: ignore[arg-type]
            ValueError,
            "weights must be one of int8, bfloat16, got 'int4'",
        ),
        (
            lambda: pyseq.quantize(torch.nn.LSTM(4, 8)),
            ValueError,
            "recurrent layer of pyseq.nn to be quantized, got LSTM without one",
        ),
        (
            lambda: pyseq.quantize(pyseq.quantize(nn.LSTM(4, 8))),
            ValueError,
            "must not be quantized already",
        ),
        (
            lambda: pyseq.quantize(nn.LSTM(4, 8).double()),
            RuntimeError,
            "weight must be float32 on the CPU, got Double",
        ),
        (lambda: pyseq.quantize(parametrised()), ValueError, "weight_hh_l0 .*plain parameter"),
        (lambda: pyseq.quantize(pruned()), ValueError, "weight_ih_l0 .*plain parameter"),
        (lambda: pyseq.quantize(infinite()), ValueError, "weights must be finite"),
        (
            lambda: pyseq.quantize(torch.nn.Sequential(nn.LSTM(4, 8), nn.IndRNN(8, 8))),
            ValueError,
            "IndRNN cannot be quantized, got one in 1",
        ),
        (
            lambda: pyseq.quantize(nn.SLSTMCell(4, 8)),
            ValueError,
            "SLSTMCell cannot be quantized, got one in the module",
        ),
        (
            lambda: pyseq.quantize(nn.LSTM(4, 8))(torch.randn(3, 2, 4).double()),
            ValueError,
            r"does not match weight dtype .*input.to\(torch.float32\)$",
        ),
        (
            lambda: pyseq.quantize(nn.LSTM(4, 8, device="meta")),
            RuntimeError,
            "weight must be float32 on the CPU, got Float on meta",
        ),
        (
            lambda: _packed.pack(torch.randn(4, 7), "int8", columns=(7, 60000, -60000)),
            RuntimeError,
            "weight must have 0 to 65536 columns in a run, got -60000",
        ),
        (
            lambda: pyseq.quantize(torch.randn(3)),  # type: ignore[type-var]
            TypeError,
            "module must be a torch.nn.Module, got Tensor",
        ),
    ],
    ids=[
        "kind",
        "nothing",
        "twice",
        "double",
        "parametrised",
        "pruned",
        "infinite",
        "indrnn",
        "slstm",
        "input",
        "meta",
        "columns",
        "no-module",
    ],
)
def test_errors_say_what_was_expected(
    call: Callable[[], object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        call()


def packed(*columns: int, gates: int = 4) -> Tensor:
    """Quantized weights of 32 rows."""
    return _packed.pack(torch.randn(32, sum(columns)), "int8", gates=gates, columns=columns)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"w_hh": packed(9)}, r"w_hh must be \(G\*H, P\) = \(32, 8\), got \(32, 9\)"),
        ({"w_hh": packed(8, gates=1)}, r"w_hh must be .*quantized in 1 runs"),
        ({"w_hh": packed(8, 8)}, r"w_hh must be .*\(32, 16\) quantized in 2 runs"),
        ({"w_ih": torch.randn(32, 5)}, "w_ih must be quantized like w_hh, got Float"),
        ({"w_hh": torch.randn(32, 8)}, "w_ih must be floating-point like w_hh, got Byte"),
        ({"w_hh": torch.zeros(32, 99, dtype=torch.uint8)}, "w_hh must be .*got other bytes"),
        ({"w_hh": packed(8)[:, :10]}, "w_hh must be contiguous"),
        ({"x": torch.randn(3, 2, 5).double()}, "x must be float32 for quantized weights, got Dou"),
    ],
    ids=["columns", "gates", "runs", "float-ih", "float-hh", "bytes", "strides", "double"],
)
def test_operators_check_quantized_weights(changes: dict[str, Tensor], match: str) -> None:
    inputs = {
        "x": torch.randn(3, 2, 5),
        "w_ih": packed(5),
        "w_hh": packed(8),
    }
    functional.scan(**inputs)
    with pytest.raises(RuntimeError, match=match):
        functional.scan(**(inputs | changes))


def test_weights_of_another_machine_are_refused() -> None:
    weight = packed(8)
    words = weight.view(-1)[:64].view(torch.int32)
    words[3] *= 2  # units of a panel
    with pytest.raises(RuntimeError, match="w_hh was quantized for another machine"):
        functional.scan(torch.randn(3, 2, 5), packed(5), weight)


def damaged(weight: Tensor, at: int, change: int) -> Tensor:
    """``weight`` with the byte ``at`` changed."""
    copied = weight.clone()
    copied.view(-1)[at] ^= change
    return copied


HEADER = 64  # bytes before the numbers of a run


@pytest.mark.parametrize("kind", KINDS)
def test_a_header_of_other_bytes_gives_an_error_or_the_same(kind: Any) -> None:
    """Whatever they say, nothing is read beyond the tensor."""
    weight = _packed.pack(torch.randn(32, 40), kind, gates=4)
    x, w_hh = torch.randn(3, 2, 40), _packed.pack(torch.randn(32, 8), kind, gates=4)
    expected = functional.scan(x, weight, w_hh).output
    refused = 0
    for at in range(HEADER):
        for change in (1, 0x10, 0x80, 0xFF):
            try:
                found = functional.scan(x, damaged(weight, at, change), w_hh).output
            except RuntimeError:
                refused += 1
            else:
                assert torch.equal(found, expected)
    assert refused == 4 * 40  # all that is a number: the rest fills the line


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_header_is_no_less_suspected(kind: Any) -> None:
    first = _packed.pack(torch.randn(32, 7), kind, gates=4).numel()
    weight = _packed.pack(torch.randn(32, 47), kind, gates=4, columns=(7, 40))
    for at in range(first, first + 40):
        for change in (1, 0x10, 0x80, 0xFF):
            with pytest.raises(RuntimeError, match=r"got other bytes|for another machine"):
                _packed.unpack(damaged(weight, at, change))


@pytest.mark.parametrize(
    ("form", "at", "number"),
    [
        ("i", 8, 7),
        ("i", 20, -1),
        ("i", 20, 0),
        ("q", 24, 0),
        ("q", 24, 1 << 62),
        ("q", 32, -(1 << 40)),
        ("q", 32, 1 << 62),
    ],
    ids=["kind", "negative-gates", "gates", "no-units", "units", "negative-columns", "columns"],
)
def test_numbers_that_cannot_be_are_refused(form: str, at: int, number: int) -> None:
    weight = packed(8)
    struct.pack_into(form, weight.numpy().reshape(-1), at, number)
    with pytest.raises(RuntimeError, match=r"what pyseq\.quantize packed, got other bytes"):
        _packed.unpack(weight)


@pytest.mark.parametrize("columns", [(40,), (7, 33)], ids=["one", "two"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_missing_are_missed(kind: Any, columns: tuple[int, ...]) -> None:
    numbers = torch.randn(32, 40)
    weight = _packed.pack(numbers, kind, gates=4, columns=columns)
    first = _packed.pack(numbers[:, : columns[0]], kind, gates=4)
    for size in range(weight.shape[1]):
        prefix = weight.view(-1)[: 32 * size].view(32, size)
        if prefix.shape == first.shape:  # which is all of what one run takes
            assert torch.equal(prefix, first)
            continue
        with pytest.raises(RuntimeError, match="got other bytes"):
            _packed.unpack(prefix)
    for rows in (0, 16, 31):
        with pytest.raises(RuntimeError, match="got other bytes"):
            _packed.unpack(weight[:rows])


def test_a_quantized_model_is_not_saved(tmp_path: Any) -> None:
    model = pyseq.quantize(pyseq.Seq2Seq(9, 9, embedding_size=4, hidden_size=8))
    with pytest.raises(ValueError, match="quantized model cannot be saved"):
        pyseq.save(tmp_path / "model", model)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_modules_compile_into_one_graph(kind: Any) -> None:
    torch._dynamo.reset()
    module = pyseq.quantize(nn.LSTM(4, 9, bidirectional=True), kind)
    x = torch.randn(3, 2, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x)[0], module(x)[0])


def test_the_reference_of_quantized_weights_is_its_formula() -> None:
    weight, x, bias = torch.randn(6, 9), torch.randn(2, 9), torch.randn(6)
    runs = (5, 4)
    packed = _packed.pack(weight, "int8", columns=runs)
    expected = bias.expand(2, 6).clone()
    for w, part in zip(weight.split(runs, 1), x.split(runs, 1), strict=True):
        scale, unit = w.abs().amax(1) / 127, part.abs().amax(1, keepdim=True) / 127
        q = torch.round(w / scale.unsqueeze(1))
        expected += unit * scale * (torch.round(part / unit) @ q.t())
    torch.testing.assert_close(reference.linear(x, packed, bias), expected)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for kind in KINDS:
        for cell in CELLS:
            for hidden, batch in SIZES:
                compare_layers(kind, cell, hidden, batch)
    print(pyseq._library._C.cpu_tier())
