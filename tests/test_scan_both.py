# SPDX-License-Identifier: Apache-2.0
"""Both directions of a layer in one operator: the same bits as a scan in each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_cases import CELLS, DTYPES, ScanCase, leaves, map_leaves
from tolerances import assert_close, assert_same_bits
from torch import Tensor

from pyseq import functional, nn, reference
from pyseq.types import ScanExtras, ScanOutput

SIZES = ((1, 1, 1, 1), (5, 2, 4, 7), (4, 0, 3, 5), (13, 9, 5, 33), (3, 4, 6, 256))


def both_call(cell: Any, sizes: tuple[int, ...], **options: Any) -> dict[str, Any]:
    """Arguments of ``scan_both`` from those of two scans."""
    case = ScanCase(cell=cell, sizes=sizes, **options)
    call = case.call()
    given = dict(call.inputs)
    names = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
    weights = tuple(given.pop(name, None) for name in names)
    arguments: dict[str, Any] = {
        "x": given["x"],
        "weights": weights,
        "weights_reverse": map_leaves(lambda _, t: t.flip(0).contiguous(), weights),
        "cell": cell,
        "lengths": given.get("lengths"),
        "resets": given.get("resets"),
    }
    if "state" in given:
        arguments["state"] = map_leaves(lambda _, t: torch.stack((t, -t)), given["state"])
    return arguments


def one_by_one(module: Any, x: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """What ``scan`` of ``module`` gives in each direction, side by side."""
    weights = arguments.pop("weights"), arguments.pop("weights_reverse")
    state = arguments.pop("state", None)
    found = []
    for direction in range(2):
        own = map_leaves(lambda _, t, d=direction: t[d], state) if state is not None else None
        scan = module.scan(x, *weights[direction], own, reverse=direction == 1, **arguments)
        found.append(dict(leaves(scan._asdict())))
    return {
        name: torch.cat((value, found[1][name]), -1)
        if name == "output"
        else torch.stack((value, found[1][name]))
        for name, value in found[0].items()
    }


def tensors_of(output: ScanOutput) -> dict[str, Tensor]:
    return dict(leaves(output._asdict()))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_as_a_scan_in_each_direction(
    cell: Any,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    threads: int,
    set_threads: Callable[[int], None],
) -> None:
    set_threads(threads)
    for options in (
        {"lengths": "holes", "resets": "random"},
        {"lengths": "ragged", "state": False},
        {"bias": "none"},
    ):
        arguments = both_call(cell, sizes, dtype=dtype, **options)
        both = tensors_of(functional.scan_both(**arguments))
        assert_same_bits(both, one_by_one(functional, **arguments))
        expected = one_by_one(reference, **map_leaves(lambda _, t: _double(t), arguments))
        assert_close(both, expected)
        exact = reference.scan_both(**map_leaves(lambda _, t: _double(t), arguments))
        assert_same_bits(tensors_of(exact), expected)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def test_with_projection() -> None:
    arguments = both_call("lstm", (5, 2, 4, 7), projection=3, lengths="ragged")
    both = functional.scan_both(**arguments)
    assert both.output.shape == (5, 2, 6)
    assert_same_bits(tensors_of(both), one_by_one(functional, **arguments))


EXTRAS = ("h_mask", "zoneout_h", "zoneout_c", "reset_state", "layer_norm")


def both_with_extras(cell: Any, **options: Any) -> dict[str, Any]:
    """Each direction with the masks, states and gains that a scan takes, of its own. Large enough
    to take a thread each."""
    sizes = (5, 2, 4, 120)
    arguments = both_call(cell, sizes, lengths="ragged", resets="random")
    call = ScanCase(cell=cell, sizes=sizes, resets="random", **options).call()
    given = {name: call.inputs[name] for name in EXTRAS if name in call.inputs}
    more = map_leaves(lambda _, t: t.flip(-1), given)
    return arguments | {"extras": (ScanExtras(**given), ScanExtras(**more))}


def one_by_one_with_extras(module: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    extras = arguments.pop("extras")
    found = []
    for more in extras:
        named = dict(zip(EXTRAS, more, strict=True))
        found.append(one_by_one(module, **arguments, **named))
    arguments["extras"] = extras
    return {
        name: torch.cat((value.chunk(2, -1)[0], found[1][name].chunk(2, -1)[1]), -1)
        if name == "output"
        else torch.stack((value[0], found[1][name][1]))
        for name, value in found[0].items()
    }


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cell", ["gru", "lstm", "slstm_exp"])
def test_extras_of_each_direction(
    cell: Any, threads: int, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    arguments = both_with_extras(
        cell, mask=True, zoneout="steps", reset_state="rows", layer_norm=cell != "slstm_exp"
    )
    both = tensors_of(functional.scan_both(**arguments))
    assert_same_bits(both, one_by_one_with_extras(functional, arguments))
    own = {name: value for name, value in arguments.items() if name != "extras"}
    exact = map_leaves(lambda _, t: _double(t), own) | {
        "extras": [
            ScanExtras(*(map_leaves(lambda _, t: _double(t), each) for each in more))
            for more in arguments["extras"]
        ]
    }
    expected = one_by_one_with_extras(reference, exact)
    assert_close(both, expected)
    assert_same_bits(tensors_of(reference.scan_both(**exact)), expected)
    # Under vmap, where masks have the rows of one sample.
    mapped = torch.vmap(lambda x: functional.scan_both(**arguments | {"x": x}).output)
    x = torch.stack((arguments["x"], -arguments["x"]))
    torch.testing.assert_close(mapped(x)[0], both["output"])


@pytest.mark.parametrize("training", [True, False])
def test_layers_with_options_take_it_too(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"zoneout_h": 0.2, "layer_norm": True, "learned_state": True}
    layers = nn.LSTM(5, 6, 2, bidirectional=True, recurrent_dropout=0.3, zoneout_c=0.1, **options)
    layers.train(training)
    x, lengths, resets = torch.randn(7, 3, 5), torch.tensor([7, 2, 4]), torch.rand(7, 3) < 0.3

    def results() -> dict[str, Tensor]:
        torch.manual_seed(3)
        return dict(leaves(layers(x, lengths=lengths, resets=resets)))

    trained = results()
    calls = []
    scan_both = functional.scan_both
    monkeypatch.setattr(
        functional, "scan_both", lambda *a, **k: calls.append(1) or scan_both(*a, **k)
    )
    with torch.no_grad():
        assert_same_bits(results(), trained)
    assert len(calls) == 2


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_layers_take_it_where_no_gradient_is_wanted(
    kind: str, inference: Callable[[], Any], set_threads: Callable[[int], None]
) -> None:
    set_threads(2)
    layers = getattr(nn, kind)(5, 96, 2, bidirectional=True)  # wide enough for a thread each
    x, lengths = torch.randn(7, 3, 5), torch.tensor([7, 2, 4])
    trained = dict(leaves(layers(x, lengths=lengths)))
    with inference():
        inferred = dict(leaves(layers(x, lengths=lengths)))
    assert not any(value.requires_grad for value in inferred.values())
    assert_same_bits(inferred, trained)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_those_of_a_scan_in_each_direction(cell: Any) -> None:
    arguments = both_call(cell, (5, 2, 4, 7), lengths="ragged", resets="random")
    inputs = [t.requires_grad_() for _, t in leaves(arguments) if t.is_floating_point()]

    def gradients(results: dict[str, Tensor]) -> dict[str, Tensor]:
        total = sum(
            (value * torch.sin(torch.arange(value.numel())).view_as(value)).sum()
            for value in results.values()
        )
        assert isinstance(total, Tensor)
        return {str(i): d for i, d in enumerate(torch.autograd.grad(total, inputs))}

    both = functional.scan_both(**arguments)
    assert_same_bits(gradients(tensors_of(both)), gradients(one_by_one(functional, **arguments)))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "state": ({"state": torch.zeros(1, 2, 7)}, r"h_0 must be \(2, B, \.\), got \(1, 2, 7\)"),
    "x": ({"x": torch.zeros(5, 2)}, r"x must be \(T, B, I\), got \(5, 2\)"),
    "weights": ({"weights": (None,) * 5}, "w_ih and w_hh must be given"),
    "extras": (
        {"extras": (ScanExtras(), ScanExtras(h_mask=torch.zeros(2, 6)))},
        r"h_mask must be \(B, P\) = \(2, 7\), got \(2, 6\)",
    ),
    "too_few": ({"weights": (torch.zeros(1),)}, "weights must hold .* got 6 tensors"),
    "in_a_thread": (
        {"weights_reverse": (torch.zeros(1, 4), torch.zeros(21, 7), None, None, None)},
        r"w_ih must be \(G\*H, I\) = \(21, 4\), got \(1, 4\)",
    ),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", BAD)
def test_bad_tensors_are_refused(
    name: str, threads: int, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    changes, message = BAD[name]
    # So many steps that each direction takes a thread.
    with pytest.raises(RuntimeError, match=message):
        functional.scan_both(**(both_call("gru", (500, 2, 4, 7)) | changes))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_opcheck(cell: Any) -> None:
    arguments = both_call(cell, (5, 2, 4, 7), lengths="ragged")
    weights = [*arguments["weights"], *arguments["weights_reverse"]]
    state = arguments["state"]
    h_0, c_0 = state if cell == "lstm" else (state, None)
    torch.library.opcheck(
        torch.ops.pyseq.scan_both,
        (arguments["x"], weights, h_0, c_0, arguments["lengths"], None, cell),
    )
    gains = [torch.ones(len(arguments["weights"][0]))] * 2
    gains += [torch.ones(7)] * 2 if cell == "lstm" else [None] * 2
    extras = [None, torch.ones(2, 7), torch.full((1, 1, 7), 0.5), None, None, None, *gains]
    whole = [*arguments["weights"], *extras, *arguments["weights_reverse"], *extras]
    torch.library.opcheck(
        torch.ops.pyseq.scan_both,
        (arguments["x"], whole, h_0, c_0, arguments["lengths"], None, cell),
    )
