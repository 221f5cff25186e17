# SPDX-License-Identifier: Apache-2.0
"""Models of torch.nn turned into pyseq's and back: same results, same objects, same names."""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

import pyseq
from pyseq import conversion, nn

I, H, T, B = 3, 5, 6, 4  # noqa: E741  (the letters of the docstrings)
CLASSES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn": ("RNN", {"num_layers": 2, "nonlinearity": "relu"}),
    "gru": ("GRU", {"bidirectional": True, "batch_first": True, "bias": False}),
    "lstm": ("LSTM", {"proj_size": 2, "num_layers": 2}),
    "rnn-cell": ("RNNCell", {"nonlinearity": "relu"}),
    "gru-cell": ("GRUCell", {"bias": False}),
    "lstm-cell": ("LSTMCell", {}),
}


class Model(torch.nn.Module):
    """Every layer and cell, one of them twice and two with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(I, I)
        self.layers = torch.nn.ModuleDict(
            {key: getattr(torch.nn, name)(I, H, **kw) for key, (name, kw) in OPTIONS.items()}
        )
        self.again = self.layers["lstm"]
        self.tied = torch.nn.GRUCell(I, H, bias=False)
        self.tied.weight_hh = self.layers["gru-cell"].weight_hh

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.embed(x)
        results = {}
        for key, layer in {**self.layers, "again": self.again, "tied": self.tied}.items():
            result = layer(x[0] if key.endswith(("cell", "tied")) else x)
            while isinstance(result, tuple):
                result = result[0]
            results[key] = result
        return results


def model() -> Model:
    torch.manual_seed(1)
    return Model().double()


def with_gradients(module: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    results = module(x)
    weights = dict(module.named_parameters())
    grads = torch.autograd.grad(sum(y.square().sum() for y in results.values()), weights.values())
    return results | {f"d_{name}": grad for name, grad in zip(weights, grads, strict=True)}


def classes(module: torch.nn.Module) -> dict[str, type]:
    return {name: type(each) for name, each in module.named_modules(remove_duplicate=False)}


def test_there_and_back() -> None:
    module, x = model(), torch.randn(T, B, I, dtype=torch.float64)
    before, kinds = with_gradients(module, x), classes(module)
    objects = dict(module.named_modules(remove_duplicate=False))
    parameters = dict(module.named_parameters(remove_duplicate=False))
    state = copy.deepcopy(module.state_dict())

    assert pyseq.convert(module, log=None) is module
    for key, (name, _) in OPTIONS.items():
        assert type(module.layers[key]) is getattr(nn, name)
    assert type(module.again) is nn.LSTM
    assert not any(type(each) in kinds.values() for each in module.layers.values())
    assert_close(with_gradients(module, x), before)
    for found, known in (
        (dict(module.named_modules(remove_duplicate=False)), objects),
        (dict(module.named_parameters(remove_duplicate=False)), parameters),
    ):
        assert list(found) == list(known)
        assert all(found[name] is known[name] for name in known)

    assert pyseq.revert(module, log=None) is module
    assert classes(module) == kinds
    assert all(torch.equal(module.state_dict()[name], weight) for name, weight in state.items())
    after = with_gradients(module, x)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [vars(each).keys() for each in module.modules()] == [
        vars(each).keys() for each in model().modules()
    ]


def test_says_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(I, I), torch.nn.GRU(I, H))
    pyseq.convert(module)
    assert capsys.readouterr().out == "1: torch.nn.GRU -> pyseq.nn.GRU\n"
    pyseq.convert(module)
    assert capsys.readouterr().out == "no recurrent layer of torch.nn found\n"
    lines: list[str] = []
    pyseq.revert(module, log=lines.append)
    pyseq.revert(module[1], log=lines.append)
    pyseq.convert(module[1], log=lines.append)
    assert lines == [
        "1: pyseq.nn.GRU -> torch.nn.GRU",
        "no recurrent layer of pyseq.nn found",
        "the model itself: torch.nn.GRU -> pyseq.nn.GRU",
    ]
    assert capsys.readouterr().out == ""


def test_needs_a_module() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
        pyseq.convert({})  # type: ignore[type-var]


@pytest.mark.parametrize("name", CLASSES)
def test_converted_has_all_that_made_has(name: str) -> None:
    """An option that pyseq adds needs its default on the class: a converted layer, or one that
    was pickled before the option came, has no other."""
    made = getattr(nn, name)(I, H)
    converted = pyseq.convert(getattr(torch.nn, name)(I, H), log=None)
    for key, value in vars(made).items():
        if not key.startswith("_"):
            assert getattr(converted, key) == value, key
    options = inspect.signature(getattr(nn, name).__init__).parameters
    known = vars(getattr(torch.nn, name)(I, H)).keys() | {"self", "device", "dtype", "proj_size"}
    for key in options.keys() - known:
        assert hasattr(getattr(nn, name), key), f"{key} has no default on the class"
    assert repr(converted) == repr(made)


def test_keeps_hooks_mode_dtype_and_what_others_put_on_it() -> None:
    layer = torch.nn.LSTM(I, H, dtype=torch.float64).eval()
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    layer.weight_hh_l0.requires_grad_(False)
    layer.remark = "mine"
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(T, B, I, dtype=torch.float64)
    expected = layer(x)[0]
    pyseq.convert(layer, log=None)
    assert_close({"y": layer(x)[0]}, {"y": expected})
    assert seen == [torch.nn.LSTM, nn.LSTM]
    assert (layer.training, layer.remark) == (False, "mine")
    assert not layer.weight_hh_l0.requires_grad
    layer(x)[0].sum().backward()
    optimizer.step()
    assert not torch.equal(layer(x)[0], expected)


def plain(layer: torch.nn.Module) -> torch.nn.Module:
    return layer


def weight_norm(layer: torch.nn.Module) -> torch.nn.Module:
    return parametrizations.weight_norm(layer, "weight_hh_l0")


def weight_norm_by_hook(layer: torch.nn.Module) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(layer, "weight_hh_l0")


def spectral_norm(layer: torch.nn.Module) -> torch.nn.Module:
    return parametrizations.spectral_norm(layer, "weight_hh_l0")


def pruned(layer: torch.nn.Module) -> torch.nn.Module:
    return prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)


@pytest.mark.parametrize("change", [plain, weight_norm, weight_norm_by_hook, spectral_norm, pruned])
def test_changed_weights_stay_changed(change: Callable[[Any], Any]) -> None:
    torch.manual_seed(1)
    layer = change(torch.nn.GRU(I, H, dtype=torch.float64)).eval()
    x = torch.randn(T, B, I, dtype=torch.float64)
    before, names = layer(x)[0], list(layer.state_dict())
    pyseq.convert(layer, log=None)
    assert isinstance(layer, nn.GRU)
    assert_close({"y": layer(x)[0]}, {"y": before})
    if not layer._forward_pre_hooks:  # which leave a weight that torch does not copy
        assert_close({"y": copy.deepcopy(layer)(x)[0]}, {"y": before})
    # The layer computes from what its weight is made of, as before.
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.01)
    moved = layer(x)[0]
    assert not torch.equal(moved, before)
    pyseq.revert(layer, log=None)
    assert isinstance(layer, torch.nn.GRU)
    assert_close({"y": layer(x)[0]}, {"y": moved})
    assert list(layer.state_dict()) == names


def test_parametrizations_come_off_a_converted_layer() -> None:
    layer = pyseq.convert(weight_norm(torch.nn.GRU(I, H)), log=None)
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert type(layer) is nn.GRU
    assert type(pyseq.revert(layer, log=None)) is torch.nn.GRU


class Wide(torch.nn.LSTM):
    """A layer of its own only in what it is made with."""

    def __init__(self, size: int) -> None:
        super().__init__(size, 2 * size, batch_first=True)
        self.size = size


class Doubled(torch.nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        output, last = super().forward(input, hx)
        return 2 * output, last


def test_subclasses() -> None:
    module = torch.nn.ModuleDict({"wide": Wide(I), "doubled": Doubled(I, H)})
    x = torch.randn(T, B, I)
    before = {name: layer(x)[0] for name, layer in module.items()}
    lines: list[str] = []
    pyseq.convert(module, log=lines.append)
    assert lines == [
        "wide: Wide -> pyseq.nn.LSTM",
        "doubled: Doubled left alone, Doubled defines forward",
    ]
    assert module["wide"].size == I
    assert_close({name: layer(x)[0] for name, layer in module.items()}, before)
    pyseq.revert(module, log=lines.append)
    assert lines[2:] == ["wide: pyseq.nn.LSTM -> Wide"]
    assert type(module["wide"]) is Wide


def test_leaves_alone_what_it_cannot_represent() -> None:
    replaced = torch.nn.GRU(I, H)
    replaced.forward = lambda x: x  # type: ignore[method-assign,assignment]
    scripted = torch.jit.script(torch.nn.LSTM(I, H))
    lines: list[str] = []
    pyseq.convert(torch.nn.ModuleList([replaced, scripted]), log=lines.append)
    assert lines == [
        "0: torch.nn.GRU left alone, its forward was replaced",
        "1: RecursiveScriptModule left alone, it is compiled by TorchScript",
    ]
    layers = torch.nn.ModuleList([nn.GRU(I, H, 2, residual=True), nn.LSTM(I, H, forget_bias=1.0)])
    layers[1].keep_every = 4
    layers.append(pyseq.quantize(nn.RNN(I, H)))
    layers.append(nn.IndRNN(I, H))
    x = torch.randn(T, B, I)
    expected = layers[1](x)[0]
    lines.clear()
    pyseq.revert(layers, log=lines.append)
    assert lines == [
        "0: pyseq.nn.GRU left alone, torch has no residual",
        "1: pyseq.nn.LSTM -> torch.nn.LSTM without forget_bias=1.0, keep_every=4",
        "2: pyseq.nn.RNN left alone, its weights are quantized",
        "3: pyseq.nn.IndRNN left alone, torch has none",
    ]
    assert_close({"y": layers[1](x)[0]}, {"y": expected})
    assert not hasattr(layers[1], "keep_every")


def test_leaves_alone_what_lies_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [conversion.has_kernels(name) for name in ("cpu", "meta", "mps")] == [True, True, False]
    # No other device is here, so one that is stands for it.
    monkeypatch.setattr(conversion, "has_kernels", lambda device: device != "meta")
    lines: list[str] = []
    model = torch.nn.ModuleList([torch.nn.GRU(I, H, device="meta"), torch.nn.GRU(I, H)])
    pyseq.convert(model, log=lines.append)
    assert lines == [
        "0: torch.nn.GRU left alone, pyseq has no kernels for meta",
        "1: torch.nn.GRU -> pyseq.nn.GRU",
    ]
    made = nn.GRU(I, H, device="meta")
    assert type(pyseq.revert(made, log=None)) is torch.nn.GRU  # back is always possible


OWN: dict[str, Callable[[], torch.nn.Module]] = {
    "seq2seq": lambda: pyseq.Seq2Seq(9, 7, embedding_size=4, hidden_size=6),
    "scanned": lambda: pyseq.Seq2Seq(
        9,
        7,
        embedding_size=4,
        hidden_size=6,
        encoder_cell="gru",
        input_feeding=False,
        bridge="zero",
        decoder_options={"keep_every": 2},
    ),
    "tagger": lambda: pyseq.Tagger(9, 3, embedding_size=4, hidden_size=6),
    "classifier": lambda: pyseq.Classifier(9, 3, embedding_size=4, hidden_size=6),
}


@pytest.mark.parametrize("name", OWN)
def test_models_of_pyseq_keep_the_layers_that_they_call(name: str) -> None:
    torch.manual_seed(1)
    module = torch.nn.ModuleDict({"ours": OWN[name]().eval(), "rnn": torch.nn.LSTM(I, H)})
    args = [torch.randint(4, 7, (2, 5)), torch.tensor([3, 5])]
    if "decoder" in module["ours"]._modules:
        args.append(torch.randint(4, 7, (2, 4)))
    expected = module["ours"](*args)
    before = classes(module)
    pyseq.convert(module, log=None)
    lines: list[str] = []
    pyseq.revert(module, log=lines.append)
    assert classes(module) == before
    assert lines[-1] == "rnn: pyseq.nn.LSTM -> torch.nn.LSTM"
    kind = {"scanned": "GRU"}.get(name, "LSTM")
    owner = "pyseq's Encoder calls it as torch's cannot be called"
    assert lines[0] == f"ours.encoder.rnn: pyseq.nn.{kind} left alone, {owner}"
    assert len(lines) == {"seq2seq": 3, "scanned": 3}.get(name, 2)  # the decoders are left alone
    assert torch.equal(module["ours"](*args), expected)


class Tagger(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = torch.nn.LSTM(I, H, 2, batch_first=True, bidirectional=True)
        self.output = torch.nn.Linear(2 * H, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.rnn(x)[0])


def test_a_converted_model_is_saved_copied_and_compiled() -> None:
    module = pyseq.convert(Tagger(), log=None)
    x = torch.randn(B, T, I)
    expected = {"y": module(x)}
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert_close({"y": torch.load(file, weights_only=False)(x)}, expected)
    assert_close({"y": copy.deepcopy(module)(x)}, expected)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert_close({"y": compiled(x)}, expected)
    packed = pack_padded_sequence(x, [6, 2, 1, 5], batch_first=True, enforce_sorted=False)
    theirs = pyseq.revert(copy.deepcopy(module), log=None)
    assert_close({"y": module.rnn(packed)[0].data}, {"y": theirs.rnn(packed)[0].data})


def test_onnx_goes_through_revert() -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="comes with the extra bench")
    pytest.importorskip("onnx", reason="comes with the extra bench")
    module = pyseq.convert(Tagger(), log=None).eval()
    plain = pyseq.revert(copy.deepcopy(module), log=None)
    x, file = torch.randn(1, T, I), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of itself
        torch.onnx.export(
            plain,
            (x,),
            file,
            dynamo=False,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {1: "T"}, "y": {1: "T"}},
        )
    session = onnxruntime.InferenceSession(file.getvalue())
    for length in (T, 2 * T):
        x = torch.randn(1, length, I)
        (y,) = session.run(None, {"x": x.numpy()})
        assert_close({"y": torch.from_numpy(y)}, {"y": module(x)})
