# SPDX-License-Identifier: Apache-2.0
"""Tests of the CUDA scan's kernels, on the CPU: their logic, not their speed, against the
reference."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from itertools import cycle
from typing import NamedTuple

import pytest
import torch
from cuda_scan import GATES, KINDS, STATES, Backward, Forward, Layout, Scan
from cuda_shim import build
from tolerances import STORED
from torch import Tensor

from pyseq import reference
from pyseq.types import LayerNormWeights

#: Units, rows of the batch and threads of a block: one block; several, of which the last ones
#: are not full; more threads than the product needs; more units than threads.
LAYOUTS = (Layout(16, 8, 64), Layout(3, 2, 64), Layout(4, 3, 128), Layout(5, 7, 32))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Case(NamedTuple):
    """A scan to compare; sizes are odd, so that nothing comes out even."""

    kind: str
    steps: int = 4
    batch: int = 5
    hidden: int = 7
    ragged: bool = False
    resets: bool = False
    reverse: bool = False
    projected: int = 0
    extras: tuple[str, ...] = ()
    normed: bool = False
    heads: int = 1

    def __str__(self) -> str:
        flags = [name for name in ("ragged", "resets", "reverse", "normed") if getattr(self, name)]
        projection = [f"P{self.projected}"] * (self.projected > 0)
        sizes = f"T{self.steps}-B{self.batch}-H{self.hidden}"
        return "-".join((self.kind, sizes, *flags, *projection, *self.extras))


SHARES = ("zoneout_h", "zoneout_c", "reset_h", "reset_c")

CASES = (
    *(Case(kind, hidden=8 if "slstm" in kind else 7, heads=2) for kind in KINDS),
    *(Case(kind, ragged=True, resets=True, reverse=True) for kind in KINDS),
    Case("lstm", projected=3),
    Case("lstm_peephole", projected=9, ragged=True, resets=True, extras=("h_mask", *SHARES)),
    Case("lstm", ragged=True, resets=True, reverse=True, extras=("h_mask", *SHARES)),
    Case("gru", ragged=True, resets=True, extras=("h_mask", "zoneout_h", "reset_h")),
    Case("gru_reset_before", ragged=True, resets=True, extras=("h_mask", "zoneout_h", "reset_h")),
    Case("indrnn_tanh", resets=True, extras=("h_mask", "zoneout_h", "reset_h")),
    Case("slstm_exp", ragged=True, resets=True, reverse=True, extras=("h_mask", "reset_c")),
    Case("lstm", steps=1, batch=1, hidden=1),
    Case("gru", steps=1, batch=3, hidden=33),
    Case("lstm", steps=2, batch=34, hidden=16),
)

#: Of products and steps that alternate only.
NORMED = (
    *(Case(kind, normed=True) for kind in ("rnn_tanh", "rnn_relu", "gru", "lstm")),
    Case("gru", normed=True, ragged=True, resets=True, reverse=True, extras=("h_mask",)),
    Case("lstm", normed=True, ragged=True, resets=True, extras=("h_mask", *SHARES)),
    Case("lstm", normed=True, ragged=True, resets=True, projected=3, extras=SHARES),
    Case("lstm", normed=True, steps=1, batch=2, hidden=300),
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("scan_kernels", tmp_path_factory.mktemp("cuda_scan"))


def make_inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    index = KINDS.index(case.kind)
    T, B, H = case.steps, case.batch, case.hidden
    P, rows, wide = case.projected or H, GATES[index] * H, STATES[index] * H
    heads = case.heads if case.kind.startswith("slstm") else 1
    diagonal = case.kind.startswith("indrnn")
    shapes: dict[str, tuple[int, ...]] = {
        "x": (T, B, 3),
        "w_ih": (rows, 3),
        "w_hh": (rows,) if diagonal else (rows, P // heads),
        "b_ih": (rows,),
        "b_hh": (rows,),
        "h_0": (B, P),
    }
    if wide:
        shapes["c_0"] = (B, wide)
    if case.kind == "lstm_peephole":
        shapes["w_ch"] = (3 * H,)
    if case.projected:
        shapes["w_hr"] = (P, H)
    if case.normed:
        shapes |= {"gain_ih": (rows,), "gain_hh": (rows,)}
        shapes |= {"gain_c": (H,), "bias_c": (H,)} if wide else {}
    extra = {
        "h_mask": (B, P),
        "zoneout_h": (T, B, P),
        "zoneout_c": (1, 1, H),
        "reset_h": (P,),
        "reset_c": (B, wide),
    }
    shapes |= {name: extra[name] for name in case.extras}
    inputs = {name: torch.randn(shape, dtype=torch.float64) * 0.5 for name, shape in shapes.items()}
    for name in ("zoneout_h", "zoneout_c"):
        if name in inputs:
            inputs[name] = inputs[name].sigmoid()
    if case.kind.startswith("slstm"):
        # The normaliser is positive.
        for name in ("c_0", "reset_c"):
            if name in inputs:
                inputs[name][:, H : 2 * H] = inputs[name][:, H : 2 * H].abs() + 1
    return {name: value.to(dtype) for name, value in inputs.items()}


def expect(
    case: Case, inputs: Mapping[str, Tensor], lengths: Tensor | None, resets: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference's results, in float64, and its inputs, to be differentiated."""
    own = {name: value.double().requires_grad_() for name, value in inputs.items()}
    cell = "lstm" if case.kind == "lstm_peephole" else case.kind
    wide = STATES[KINDS.index(case.kind)]

    def state(h: str, c: str) -> Tensor | tuple[Tensor, ...] | None:
        if h not in own and c not in own:
            return None
        first = own[h] if h in own else torch.zeros(case.projected or case.hidden).double()
        if not wide:
            return first
        rest = own[c] if c in own else torch.zeros(wide * case.hidden).double()
        parts = [first, *rest.chunk(wide, -1)]
        if parts[0].dim() != parts[1].dim():
            parts = [part.expand(case.batch, -1) for part in parts]
        return tuple(parts)

    extras = {name: own.get(name) for name in ("w_ch", "h_mask", "zoneout_h", "zoneout_c")}
    result = reference.scan(
        own["x"],
        own["w_ih"],
        own["w_hh"],
        own["b_ih"],
        own["b_hh"],
        own.get("w_hr"),
        state("h_0", "c_0"),
        cell=cell,
        lengths=lengths,
        resets=resets,
        reverse=case.reverse,
        return_states=True,
        layer_norm=tuple(own[name] for name in own if name in LayerNormWeights._fields) or None,
        reset_state=state("reset_h", "reset_c"),
        **extras,
    )
    output, last, every = result
    if not wide:
        return {"y": output, "h_n": last}, own
    return {
        "y": output,
        "h_n": last[0],
        "c_n": torch.cat(last[1:], -1),
        "c_steps": torch.cat(every[1:], -1),
    }, own


def assert_near(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    for name, target in expected.items():
        value = actual[name].double()
        assert value.shape == target.shape, name
        error = (value - target).abs().max().item()
        allowed = STORED[dtype] * max(1.0, target.abs().max().item())
        # Written so that a NaN fails.
        assert error <= allowed, f"{name}: error {error:.3g} is over {allowed:.3g}"


def compare(
    kernels: ctypes.CDLL, case: Case, layout: Layout | None, dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    kernels.shim_seed(seed)
    inputs = make_inputs(case, dtype)
    lengths = torch.randint(0, case.steps + 1, (case.batch,)) if case.ragged else None
    resets = torch.rand(case.steps, case.batch) < 0.4 if case.resets else None
    expected, own = expect(case, inputs, lengths, resets)
    scan = Scan(kernels, case.kind, inputs, layout, lengths, resets, case.reverse)
    targets = {name: value.detach() for name, value in expected.items()}
    assert_near(scan.forward(save=False), targets, dtype)
    results = scan.forward(save=True)
    assert_near(results, targets, dtype)
    d = {name: torch.randn_like(value).to(dtype).double() for name, value in targets.items()}
    if case.kind.startswith("slstm") and dtype in (torch.float16, torch.bfloat16):
        # The scale is the larger one of two sums, which short numbers may confuse: no gradient of
        # its own. That of h does not depend on it.
        d |= {name: torch.zeros_like(d[name]) for name in ("c_n", "c_steps")}
    names = [name for name in own if name not in ("h_mask", "zoneout_h", "zoneout_c")]
    gradients = torch.autograd.grad(
        list(expected.values()), [own[name] for name in names], list(d.values())
    )
    found = scan.backward(d)
    assert_near(found, dict(zip(names, gradients, strict=True)), dtype)
    return {**results, **{f"d_{name}": value for name, value in found.items()}}


def test_structures_are_as_declared(kernels: ctypes.CDLL) -> None:
    assert kernels.forward_size() == ctypes.sizeof(Forward)
    assert kernels.backward_size() == ctypes.sizeof(Backward)


@pytest.mark.parametrize(
    ("case", "layout"), list(zip(CASES, cycle(LAYOUTS), strict=False)), ids=str
)
def test_scan_is_the_references(kernels: ctypes.CDLL, case: Case, layout: Layout) -> None:
    compare(kernels, case, layout, torch.float64, seed=1)


@pytest.mark.parametrize("case", [*CASES, *NORMED], ids=str)
def test_steps_one_by_one_are_the_references(kernels: ctypes.CDLL, case: Case) -> None:
    compare(kernels, case, None, torch.float64, seed=1)


@pytest.mark.parametrize("case", [Case("lstm"), NORMED[3], NORMED[6]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
def test_steps_one_by_one_in_every_dtype(
    kernels: ctypes.CDLL, case: Case, dtype: torch.dtype
) -> None:
    compare(kernels, case, None, dtype, seed=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
def test_every_dtype(kernels: ctypes.CDLL, kind: str, dtype: torch.dtype) -> None:
    case = Case(kind, steps=3, hidden=18, batch=9, ragged=True, resets=True)
    compare(kernels, case, Layout(12, 9, 64), dtype, seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("case", [Case("lstm", ragged=True), Case("gru_reset_before")], ids=str)
def test_bits_do_not_depend_on_the_schedule(
    kernels: ctypes.CDLL, case: Case, dtype: torch.dtype
) -> None:
    found = []
    for seed in range(3):
        torch.manual_seed(0)
        found.append(compare(kernels, case, Layout(3, 2, 96), dtype, seed))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], value) for name, value in other.items())
