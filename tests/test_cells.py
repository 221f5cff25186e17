# SPDX-License-Identifier: Apache-2.0
"""The cells beyond torch.nn's, and the layers over them.

``test_functional.py`` compares their scans with the reference; here the reference and the modules
are compared with what the cells are known to come to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from operator_cases import SCAN_CELLS, ScanCase, leaves, run
from tolerances import assert_close, assert_same_bits
from torch import Tensor

import pyseq
from pyseq import functional, nn, reference

I, H, T, B = 3, 6, 7, 4  # noqa: E741  (the letters of the docstrings)

#: Layers that torch.nn does not have, by a name for them.
LAYERS: dict[str, tuple[Callable[..., torch.nn.Module], dict[str, Any]]] = {
    "peepholes": (nn.LSTM, {"peepholes": True}),
    "peepholes_proj": (nn.LSTM, {"peepholes": True, "proj_size": 2}),
    "indrnn": (nn.IndRNN, {}),
    "indrnn_tanh": (nn.IndRNN, {"nonlinearity": "tanh"}),
    "gru_reset_before": (nn.GRU, {"reset_after": False}),
    "slstm": (nn.SLSTM, {}),
    "slstm_heads": (nn.SLSTM, {"num_heads": 3, "forget_gate": "exp"}),
}


#: Layers of torch.nn's cells, normalised.
NORMALISED: dict[str, tuple[Callable[..., torch.nn.Module], dict[str, Any]]] = {
    "rnn_norm": (nn.RNN, {"layer_norm": True, "nonlinearity": "relu"}),
    "gru_norm": (nn.GRU, {"layer_norm": True}),
    "lstm_norm": (nn.LSTM, {"layer_norm": True}),
}


def layer(name: str, *args: Any, **options: Any) -> Any:
    """The layer of this name, from a fixed seed, in float64."""
    make, extra = (LAYERS | NORMALISED)[name]
    torch.manual_seed(1)
    return make(I, H, *args, **{"dtype": torch.float64, **extra, **options})


def flat(result: Any) -> dict[str, Tensor]:
    """Output and states of a layer by name."""
    return dict(leaves(result))


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """The tensors are tiny: more threads would only wait for one another."""
    set_threads(1)


# What the cells come to


@pytest.mark.parametrize("module", [functional, reference], ids=["functional", "reference"])
def test_peepholes_of_zero_are_none(module: ModuleType) -> None:
    call = ScanCase(dtype=torch.float64, lengths="ragged").call()
    plain = module.scan(**call.inputs)
    blind = module.scan(**call.inputs, w_ch=torch.zeros(3 * 7, dtype=torch.float64))
    assert_close(flat(blind._asdict()), flat(plain._asdict()))


def test_peepholes_follow_their_equations() -> None:
    torch.manual_seed(0)
    # One unit, one step, everything but the peepholes zero: the gates see c alone.
    c, weights = torch.tensor([[0.7]]).double(), torch.tensor([0.5, -1.5, 2.0]).double()
    zero = torch.zeros(4, 1, dtype=torch.float64)
    bias = torch.tensor([0.0, 0.0, 0.3, 0.0]).double()
    _, (h, c_1) = functional.scan(
        torch.zeros(1, 1, 1).double(), zero, zero, bias, state=(c * 0, c), w_ch=weights
    )
    i, f = torch.sigmoid(weights[0] * c), torch.sigmoid(weights[1] * c)
    expected = f * c + i * bias[2].tanh()
    assert_close(
        {"c": c_1, "h": h},
        {"c": expected, "h": torch.sigmoid(weights[2] * expected) * expected.tanh()},
    )


@pytest.mark.parametrize("module", [functional, reference], ids=["functional", "reference"])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_indrnn_is_an_rnn_with_a_diagonal_matrix(module: ModuleType, nonlinearity: Any) -> None:
    case = ScanCase(cell=f"indrnn_{nonlinearity}", dtype=torch.float64, resets="random")
    inputs = case.call().inputs
    diagonal = module.scan(**inputs, cell=case.cell)
    inputs["w_hh"] = torch.diag(inputs["w_hh"])
    full = module.scan(**inputs, cell=f"rnn_{nonlinearity}")
    assert_close(flat(diagonal._asdict()), flat(full._asdict()))


def test_reset_before_is_its_equation() -> None:
    inputs = (
        ScanCase(cell="gru_reset_before", sizes=(1, 3, 4, 7), dtype=torch.float64).call().inputs
    )
    x, h = inputs["x"][0], inputs["state"]
    x_r, x_z, x_n = (x @ inputs["w_ih"].t() + inputs["b_ih"]).chunk(3, -1)
    w_r, w_z, w_n = inputs["w_hh"].chunk(3)
    b_r, b_z, b_n = inputs["b_hh"].chunk(3)
    r, z = torch.sigmoid(x_r + h @ w_r.t() + b_r), torch.sigmoid(x_z + h @ w_z.t() + b_z)
    n = torch.tanh(x_n + (r * h) @ w_n.t() + b_n)
    actual = functional.scan(**inputs, cell="gru_reset_before").output[0]
    assert_close({"h": actual}, {"h": (1 - z) * n + z * h})


@pytest.mark.parametrize("forget", ["sigmoid", "exp"])
def test_slstm_is_its_definition_without_a_scale(forget: str) -> None:
    """With gates so small that nothing overflows, c and n need not be scaled."""
    cell: Any = f"slstm_{forget}"
    inputs = ScanCase(cell=cell, dtype=torch.float64, state=False).call().inputs
    x, hidden = inputs["x"], 7
    h = c = n = x.new_zeros(3, hidden)
    expected = []
    for step in x:
        gates = step @ inputs["w_ih"].t() + inputs["b_ih"] + h @ inputs["w_hh"].t() + inputs["b_hh"]
        i, f, z, o = gates.chunk(4, -1)
        keep = torch.exp(f) if forget == "exp" else torch.sigmoid(f)
        c, n = keep * c + torch.exp(i) * torch.tanh(z), keep * n + torch.exp(i)
        h = torch.sigmoid(o) * c / n
        expected.append(h)
    result = functional.scan(**inputs, cell=cell)
    assert_close({"y": result.output}, {"y": torch.stack(expected)})
    _, scaled_c, scaled_n, scale = result.state
    assert_close({"c": scaled_c * scale.exp(), "n": scaled_n * scale.exp()}, {"c": c, "n": n})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("forget", ["sigmoid", "exp"])
@pytest.mark.parametrize("size", [-1e4, -100.0, 100.0, 1e4])
def test_slstm_stays_finite_whatever_its_gates(
    size: float, forget: str, dtype: torch.dtype
) -> None:
    case = ScanCase(cell=f"slstm_{forget}", dtype=dtype, state=False, sizes=(9, 3, 4, 16))
    inputs = case.call().inputs
    inputs["x"] = (inputs["x"] * size).requires_grad_()
    inputs["w_ih"].requires_grad_()
    output, state = functional.scan(**inputs, cell=case.cell)
    assert output.abs().max() <= 1 + 1e-6
    assert all(part.isfinite().all() for part in state)
    gradients = torch.autograd.grad(output.sum(), [inputs["x"], inputs["w_ih"]])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_heads_are_blocks_of_a_matrix() -> None:
    case = ScanCase(cell="slstm_sigmoid", heads=3, sizes=(5, 3, 4, 12), dtype=torch.float64)
    inputs = case.call().inputs
    blocks = functional.scan(**inputs, cell=case.cell)
    own = inputs["w_hh"].view(4, 3, 4, 4)
    inputs["w_hh"] = torch.stack([torch.block_diag(*gate) for gate in own]).flatten(0, 1)
    assert_close(flat(blocks._asdict()), flat(functional.scan(**inputs, cell=case.cell)._asdict()))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "w_ch_of_gru": (
        {"cell": "gru", "w_ch": torch.zeros(21)},
        ValueError,
        "w_ch goes with cell lstm, got gru",
    ),
    "w_ch_shape": (
        {"cell": "lstm", "w_ch": torch.zeros(7)},
        RuntimeError,
        r"w_ch must be \(3\*H,\) = \(21,\), got \(7,\)",
    ),
    "w_ch_dtype": (
        {"cell": "lstm", "w_ch": torch.zeros(21).double()},
        RuntimeError,
        "w_ch must have the dtype of x, Float, got Double",
    ),
    "matrix_for_indrnn": (
        {"cell": "indrnn_relu", "w_hh": torch.zeros(7, 7)},
        RuntimeError,
        r"w_hh must be \(H,\), got \(7, 7\)",
    ),
    "heads": (
        {"cell": "slstm_exp", "w_hh": torch.zeros(28, 3)},
        RuntimeError,
        r"w_hh must be \(G\*H, H / heads\) with .* that divides H = 7, got \(28, 3\)",
    ),
    "state_of_slstm": (
        {"cell": "slstm_exp", "state": (torch.zeros(3, 7),) * 2},
        ValueError,
        r"the state of slstm_exp must be a tuple \(h, c, n, m\), got tuple of 2",
    ),
    "part_of_state": (
        {"cell": "slstm_exp", "state": (*(torch.zeros(3, 7),) * 3, torch.zeros(2, 7))},
        RuntimeError,
        r"part of the state must be \(..., B, H\) like c = \(3, 7\), got \(2, 7\)",
    ),
    "projection_of_indrnn": (
        {"cell": "indrnn_relu", "w_hr": torch.zeros(3, 7)},
        ValueError,
        "w_hr goes with cell lstm, got indrnn_relu",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_say_what_was_expected(name: str) -> None:
    changes, error, message = BAD[name]
    case = ScanCase(cell=changes["cell"], state=False)
    with pytest.raises(error, match=message):
        functional.scan(**(case.call().inputs | changes))


def test_decoders_refuse_the_cells_of_scans() -> None:
    with pytest.raises(ValueError, match="cell must be one of rnn_tanh, rnn_relu, gru, lstm"):
        nn.AttentionDecoder(3, 4, 4, cell="indrnn_relu")
    with pytest.raises(ValueError, match="cell must be one of rnn_tanh, rnn_relu, gru, lstm, got"):
        torch.ops.pyseq.decode(
            *[torch.zeros(1, 1, 1), [torch.zeros(1, 1)] * 4, *[torch.zeros(1, 1, 1)] * 2],
            *[torch.zeros(1, 2), *[None] * 7, "indrnn_relu", "dot", True, False],
        )


# The layers


@pytest.mark.parametrize("name", LAYERS)
def test_stacked_layers_are_the_references_scans(name: str) -> None:
    ours = layer(name, 2, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths, resets = torch.tensor([3, 7, 0, 5]), torch.rand(T, B) < 0.2
    output, last = ours(x, lengths=lengths, resets=resets)
    below, ends = x, []
    for number in range(2):
        outputs = []
        for reverse in (False, True):
            suffix = f"l{number}" + ("_reverse" if reverse else "")
            result: Any = reference.scan(
                below,
                *[
                    getattr(ours, f"{kind}_{suffix}", None)
                    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
                ],
                cell=ours.cell,
                lengths=lengths,
                resets=resets,
                reverse=reverse,
                w_ch=getattr(ours, f"weight_ch_{suffix}", None),
            )
            outputs.append(result.output)
            ends.append(flat(result.state) if isinstance(result.state, tuple) else {"h": result[1]})
        below = torch.cat(outputs, -1)
    expected = [torch.stack(part) for part in zip(*(end.values() for end in ends), strict=True)]
    actual = last if isinstance(last, tuple) else (last,)
    assert_close(dict(enumerate([output, *actual])), dict(enumerate([below, *expected])))
    gradients = torch.autograd.grad(output.square().sum(), list(ours.parameters()))
    wanted = torch.autograd.grad(below.square().sum(), list(ours.parameters()))
    names = [name for name, _ in ours.named_parameters()]
    assert_close(dict(zip(names, gradients, strict=True)), dict(zip(names, wanted, strict=True)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_inference_gives_the_bits_of_training(
    name: str, threads: int, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    ours = layer(name, 2, bidirectional=True, dtype=torch.float32)
    x, lengths = torch.randn(T, B, I), torch.tensor([3, 7, 0, 5])
    trained = flat(ours(x, lengths=lengths))
    with torch.no_grad():
        assert_same_bits(flat(ours(x, lengths=lengths)), trained)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_keep_every_kth_state_and_return_all(name: str) -> None:
    ours = layer(name, 2)
    x = torch.randn(T, B, I, dtype=torch.float64)
    inputs = list(ours.parameters())

    def gradients() -> dict[int, Tensor]:
        _, _, states = ours(x, return_states=True)
        total = torch.stack([state.square().sum() for state in flat([states]).values()]).sum()
        return dict(enumerate(torch.autograd.grad(total, inputs)))

    expected = gradients()
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    ours.keep_every = 3
    assert_close(gradients(), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_copy_save_and_compile(name: str) -> None:
    ours = layer(name, 2, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64)
    expected = flat(ours(x))
    again = layer(name, 2, bidirectional=True)
    again.reset_parameters()
    again.load_state_dict(ours.state_dict())
    assert_same_bits(flat(again(x)), expected)
    assert_same_bits(flat(copy.deepcopy(ours)(x)), expected)
    assert repr(copy.deepcopy(ours)) == repr(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert_same_bits(flat(compiled(x)), expected)


def test_parameters_of_the_new_layers() -> None:
    shapes = {name: tuple(p.shape) for name, p in layer("peepholes").named_parameters()}
    assert shapes["weight_ch_l0"] == (3 * H,)
    assert "peepholes=True" in repr(layer("peepholes"))
    indrnn = nn.IndRNN(I, 1000, 2)
    assert indrnn.weight_hh_l1.shape == (1000,)
    assert indrnn.weight_hh_l1.min() >= 0
    assert 0.95 < indrnn.weight_hh_l1.max() <= 1
    peepholes = nn.LSTM(I, 400, peepholes=True)
    for _ in range(2):
        assert 0.9 / 20 < peepholes.weight_ch_l0.abs().max() <= 1 / 20
        peepholes.reset_parameters()
    # The same weights from the same seed as without peepholes.
    torch.manual_seed(1)
    plain = nn.LSTM(I, H, dtype=torch.float64)
    assert torch.equal(plain.weight_hh_l0, layer("peepholes").weight_hh_l0)


#: Cells, with the layer that each is a step of.
STEPS: dict[str, tuple[Callable[..., torch.nn.Module], dict[str, Any]]] = {
    "peepholes": (nn.LSTMCell, {"peepholes": True}),
    "indrnn": (nn.IndRNNCell, {}),
    "indrnn_tanh": (nn.IndRNNCell, {"nonlinearity": "tanh"}),
    "gru_reset_before": (nn.GRUCell, {"reset_after": False}),
    "slstm": (nn.SLSTMCell, {}),
    "slstm_heads": (nn.SLSTMCell, {"num_heads": 3, "forget_gate": "exp"}),
    "rnn_norm": (nn.RNNCell, {"layer_norm": True, "nonlinearity": "relu"}),
    "gru_norm": (nn.GRUCell, {"layer_norm": True}),
    "lstm_norm": (nn.LSTMCell, {"layer_norm": True}),
}


@pytest.mark.parametrize("name", STEPS)
def test_cells_are_steps_of_their_layers(name: str) -> None:
    make, options = STEPS[name]
    cell = make(I, H, dtype=torch.float64, **options)
    for gain in (each for each, _ in cell.named_parameters() if each.startswith(("gain", "bias"))):
        torch.nn.init.uniform_(getattr(cell, gain))
    layers = layer(name)
    layers.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    x = torch.randn(T, B, I, dtype=torch.float64)
    state, outputs = None, []
    for step in x:
        state = cell(step, state)
        outputs.append(state if isinstance(state, Tensor) else state[0])
    output, last = layers(x)
    assert_close({"y": torch.stack(outputs)}, {"y": output})
    parts = flat([last])
    assert_close(
        dict(zip(parts, flat([state]).values(), strict=True)), {n: p[0] for n, p in parts.items()}
    )
    row = cell(x[0, 0])
    one = flat([row])
    assert all(part.shape == (H,) for part in one.values())
    cell.reset_parameters()
    assert cell.weight_hh.abs().max() <= (1 if "indrnn" in name else H**-0.5)
    assert (cell.weight_hh >= 0).all() == ("indrnn" in name)
    if "norm" in name:
        assert (cell.gain_hh == 1).all()
        assert repr(cell).endswith(", layer_norm=True)")
        again = torch.autograd.grad(cell(x[0])[0].sum(), list(cell.parameters()))
        assert all(gradient.isfinite().all() for gradient in again)


def test_cells_check_what_goes_with_layer_norm() -> None:
    with pytest.raises(ValueError, match="layer_norm goes with reset_after=True"):
        nn.GRUCell(I, H, layer_norm=True, reset_after=False)
    with pytest.raises(ValueError, match="layer_norm goes without peepholes"):
        nn.LSTMCell(I, H, layer_norm=True, peepholes=True)
    lines: list[str] = []
    pyseq.revert(nn.LSTMCell(I, H, layer_norm=True), log=lines.append)
    assert lines == ["the model itself: pyseq.nn.LSTMCell left alone, torch has no layer_norm"]


@pytest.mark.parametrize("make", [nn.SLSTM, nn.SLSTMCell])
def test_slstm_checks_its_options(make: Callable[..., torch.nn.Module]) -> None:
    with pytest.raises(ValueError, match="hidden_size must be a multiple of num_heads, 4, got 6"):
        make(I, 6, num_heads=4)
    with pytest.raises(ValueError, match="num_heads must be a positive integer, got 0"):
        make(I, 6, num_heads=0)
    with pytest.raises(ValueError, match="forget_gate must be one of sigmoid, exp, got 'relu'"):
        make(I, 6, forget_gate="relu")


def test_quantized_layers_keep_peepholes_and_refuse_the_reset_before() -> None:
    layers = nn.LSTM(32, 64, peepholes=True)
    x = torch.randn(T, B, 32)
    with torch.no_grad():
        expected = layers(x)[0]
        actual = pyseq.quantize(layers, "bfloat16")(x)[0]
    assert (actual - expected).abs().max() < 0.02
    with pytest.raises(ValueError, match="a GRU to be quantized must have reset_after=True"):
        pyseq.quantize(nn.GRU(32, 64, reset_after=False))


def test_torch_has_no_layers_for_these_cells() -> None:
    model = torch.nn.ModuleList([nn.GRU(I, H, reset_after=False), nn.LSTM(I, H, peepholes=True)])
    pyseq.revert(model)
    assert [type(each) for each in model] == [nn.GRU, nn.LSTM]


@pytest.mark.parametrize("sizes", [(9, 37, 20, 132), (60, 2, 20, 132)], ids=str)
@pytest.mark.parametrize("options", [*SCAN_CELLS, {"cell": "slstm_exp", "heads": 4}], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(
    options: dict[str, Any], sizes: Any, set_threads: Callable[[int], None]
) -> None:
    case = ScanCase(sizes=sizes, lengths="ragged", **options)
    set_threads(1)
    alone = run(functional, case.call())
    set_threads(3)
    shared = run(functional, case.call())
    assert_same_bits(shared.outputs, alone.outputs)
    assert_same_bits(shared.gradients, alone.gradients)


@pytest.mark.parametrize("options", [*SCAN_CELLS, {"cell": "slstm_exp", "heads": 4}], ids=str)
def test_a_step_is_a_scan_of_one(options: dict[str, Any]) -> None:
    call = ScanCase(sizes=(1, 3, 4, 8), dtype=torch.float64, **options).call()
    inputs, cell = call.inputs, call.options["cell"]
    x = inputs.pop("x")
    expected = reference.scan(x, **inputs, cell=cell).state
    for module in (functional, reference):
        actual = module.step(x[0], **inputs, cell=cell)
        assert type(actual) is type(expected)
        assert_close(dict(leaves(actual)), dict(leaves(expected)))
    no_state = {name: value for name, value in inputs.items() if name != "state"}
    actual = functional.step(x[0], **no_state, cell=cell)
    assert_close(dict(leaves(actual)), dict(leaves(reference.step(x[0], **no_state, cell=cell))))


def test_a_step_is_differentiable_and_says_what_it_expects() -> None:
    call = ScanCase(sizes=(1, 3, 4, 7), dtype=torch.float64).call()
    inputs = {name: value for name, value in call.inputs.items() if name != "x"}
    names = ("w_ih", "w_hh", "b_ih", "b_hh")
    tensors = [call.inputs["x"][0], *(inputs[name] for name in names), *inputs["state"]]

    def run(*given: Tensor) -> Any:
        return functional.step(*given[:5], state=given[5:])

    assert torch.autograd.gradcheck(run, [tensor.clone().requires_grad_() for tensor in tensors])
    with pytest.raises(RuntimeError, match=r"x must be \(B, I\), got \(1, 3, 4\)"):
        functional.step(call.inputs["x"], *tensors[1:5])
    with pytest.raises(ValueError, match=r"cell must be one of .* got 'lsmt'"):
        functional.step(*tensors[:5], cell="lsmt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be a pair \(h, c\)"):
        functional.step(*tensors[:5], state=tensors[5])
