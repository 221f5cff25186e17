# SPDX-License-Identifier: Apache-2.0
"""One scan forward and backward by the CUDA kernels on the shim, beside products in torch: what
the glue does on a device, in one launch for all steps or in some for each. The structures are
those of csrc/cuda/scan.h."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from cuda_shim import check, pointer
from torch import Tensor

KINDS = (
    "rnn_tanh",
    "rnn_relu",
    "gru",
    "lstm",
    "indrnn_tanh",
    "indrnn_relu",
    "lstm_peephole",
    "gru_reset_before",
    "slstm_sigmoid",
    "slstm_exp",
)
GATES = (1, 1, 3, 4, 1, 1, 4, 3, 4, 4)
STATES = (0, 0, 0, 1, 0, 0, 1, 0, 3, 3)
UNIT_WEIGHTS = (0, 0, 0, 0, 1, 1, 3, 0, 0, 0)


class Strided(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("step", ctypes.c_int64), ("row", ctypes.c_int64))


def structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A structure of pointers; `name:code` is of another type."""
    types = {"i": ctypes.c_int64, "k": ctypes.c_int, "b": ctypes.c_bool, "s": Strided}
    pairs = [field.partition(":") for field in fields.split()]
    listed = [(field, types.get(code, ctypes.c_void_p)) for field, _, code in pairs]
    return type(name, (ctypes.Structure,), {"_fields_": listed})


SIZES = "cell:k steps:i batch:i hidden:i state_size:i heads:i "
NORM = " gain_ih gain_hh gain_c bias_c bias x_sums r_sums c_sums moments"
Forward = structure(
    "Forward",
    SIZES
    + "reverse:b save:b w_hh w_hr apart_bias unit_weights unit_weights_stride:i lengths resets "
    "gates apart states cells inner y c_steps h_mask masked zoneout_h:s zoneout_c:s "
    "reset_h:s reset_c:s" + NORM,
)
Backward = structure(
    "Backward",
    SIZES + "reverse:b w_hh w_hr unit_weights unit_weights_stride:i lengths resets gates "
    "apart states cells d_y d_c_steps d_h d_c d_x_gates d_r_gates d_projected d_unit_weights "
    "h_mask zoneout_h:s zoneout_c:s d_reset_h d_reset_c"
    + NORM
    + " row_gain_ih row_gain_hh row_bias row_apart row_gain_c "
    "row_bias_c scratch",
)
Tiles = type(
    "Tiles",
    (ctypes.Structure,),
    {"_fields_": [(name, ctypes.c_int) for name in ("units", "rows", "threads")]},
)
Needs = type(
    "Needs",
    (ctypes.Structure,),
    {
        "_fields_": [
            ("blocks", ctypes.c_int),
            ("shared", ctypes.c_int64),
            ("barrier", ctypes.c_int64),
            ("possible", ctypes.c_bool),
        ]
    },
)
Sizes = structure("Sizes", "cell:k batch:i hidden:i state_size:i heads:i projects:b")


def fill(to: type[ctypes.Structure], values: Mapping[str, Any]) -> Any:
    """The structure with these numbers, and pointers to these tensors; what is left out is 0."""
    made = to()
    for name, value in values.items():
        if value is not None:
            setattr(made, name, pointer(value) if isinstance(value, Tensor) else value)
    made.alive = values  # as long as what points to them
    return made


def strided(tensor: Tensor | None) -> Strided:
    """Numbers for each step and row, or less: sizes of 1 serve all."""
    if tensor is None:
        return Strided()
    whole = tensor.reshape((1,) * (3 - tensor.dim()) + tensor.shape)
    step, row = (0 if whole.shape[i] == 1 else whole.stride(i) for i in (0, 1))
    return Strided(pointer(whole), step, row)


@dataclass(frozen=True)
class Layout:
    """How a persistent launch shares the work out."""

    units: int
    rows: int
    threads: int


@dataclass
class Scan:
    """A scan of ``inputs``, named as the arguments of the reference, all of one dtype.

    Without a layout products and steps alternate.
    """

    library: ctypes.CDLL
    kind: str
    inputs: Mapping[str, Tensor]
    layout: Layout | None
    lengths: Tensor | None = None
    resets: Tensor | None = None
    reverse: bool = False

    def __post_init__(self) -> None:
        x, self.w_hh = self.inputs["x"], self.inputs["w_hh"]
        index = KINDS.index(self.kind)
        self.cell, self.G, self.K, self.U = index, GATES[index], STATES[index], UNIT_WEIGHTS[index]
        self.T, self.B = x.shape[:2]
        self.H = self.w_hh.shape[0] // self.G
        self.w_hr = self.inputs.get("w_hr")
        self.P = self.H if self.w_hr is None else self.w_hr.shape[0]
        self.heads = self.H // self.w_hh.shape[1] if self.kind.startswith("slstm") else 1
        self.dtype = x.dtype
        self.wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.recurrent = not self.kind.startswith("indrnn")
        self.apart = self.kind == "gru"
        self.gated = self.kind == "gru_reset_before"
        self.normed = "gain_ih" in self.inputs
        self.norm: dict[str, Any] = {}

    def new(self, *sizes: int, wide: bool = False) -> Tensor:
        return torch.empty(*sizes, dtype=self.wide if wide else self.dtype)

    def sizes(self) -> dict[str, Any]:
        names = ("cell", "steps", "batch", "hidden", "state_size", "heads", "reverse")
        values = (self.cell, self.T, self.B, self.H, self.P, self.heads, self.reverse)
        return dict(zip(names, values, strict=True))

    def weights(self) -> dict[str, Any]:
        rows = self.w_hh
        if self.heads > 1:
            size = self.H // self.heads
            rows = rows.view(self.G, self.heads, size, size).transpose(0, 1).contiguous()
        own, mask = self.inputs.get("w_ch"), self.inputs.get("h_mask")
        if not self.recurrent:
            own, mask = (rows if mask is None else rows * mask), None
        return {
            "w_hh": rows if self.recurrent else None,
            "w_hr": self.w_hr,
            "unit_weights": own,
            "unit_weights_stride": self.H if own is not None and own.dim() == 2 else 0,
            "lengths": self.lengths,
            "resets": self.resets,
            "h_mask": mask,
        }

    def zoneouts(self) -> dict[str, Strided]:
        names = ("zoneout_h", "zoneout_c")
        return {name: strided(self.inputs.get(name)) for name in names}

    def function(self, name: str) -> Any:
        return getattr(self.library, f"{name}_{str(self.dtype).removeprefix('torch.')}")

    def launch(self, direction: str, args: ctypes.Structure) -> None:
        """All steps at once."""
        assert self.layout is not None
        tiles = Tiles(self.layout.units, self.layout.rows, self.layout.threads)
        sizes = Sizes(self.cell, self.B, self.H, self.P, self.heads, self.w_hr is not None)
        needs = (Needs * 2)()
        self.function("scan_needs")(ctypes.byref(sizes), ctypes.byref(tiles), needs)
        own = needs[("forward", "backward").index(direction)]
        assert own.possible
        counters = torch.zeros(own.barrier // 4, dtype=torch.int32)
        status = self.function(f"scan_{direction}")(
            ctypes.byref(args), ctypes.byref(tiles), ctypes.c_void_p(pointer(counters))
        )
        check(self.library, status)

    def step(self, name: str, args: ctypes.Structure, n: int, sums: Tensor | None) -> None:
        """One kernel of a step, with the sums of a product."""
        sums = None if sums is None else sums.to(self.wide).contiguous()
        address = None if sums is None else ctypes.c_void_p(pointer(sums))
        status = self.function(f"scan_{name}")(ctypes.byref(args), ctypes.c_int64(n), address)
        check(self.library, status)

    def products(self, rows: Tensor, *, transposed: bool = False) -> Tensor:
        """``rows`` (B, P) times W_hh, or (B, G*H) times its transpose, head by head."""
        size = self.P // self.heads
        weight = self.w_hh.double().view(self.G, self.heads, -1, size)
        if transposed:
            parts = rows.double().view(self.B, self.G, self.heads, -1)
            return torch.einsum("bgni,gnij->bnj", parts, weight).flatten(1)
        parts = rows.double().view(self.B, self.heads, size)
        return torch.einsum("bnj,gnij->bgni", parts, weight).flatten(1)

    def each_step_forward(self, args: Any, save: bool, tensors: Mapping[str, Any]) -> None:
        H = self.H
        for n in range(self.T):
            t = self.T - 1 - n if self.reverse else n
            slot = (self.T - n if self.reverse else n) if save else n & 1
            masked = tensors["masked"]
            sums = None
            if self.recurrent:
                sums = self.products(self.states[slot] if masked is None else masked[n & 1])
            inner = None if self.inner is None else self.inner[t if save else 0]
            if self.gated:
                assert sums is not None
                assert inner is not None
                sums[:, 2 * H :] = torch.nan  # not made yet
                self.step("gate_forward", args, n, sums)
                sums[:, 2 * H :] = self.products(inner)[:, 2 * H :]
            if self.normed:
                assert sums is not None
                self.norm["r_sums"][t if save else 0] = sums
                sums = None
            self.step("step_forward", args, n, sums)
            if self.w_hr is not None:
                assert inner is not None
                self.step("project_forward", args, n, inner.double() @ self.w_hr.double().t())

    def each_step_backward(self, args: Any, d_r_gates: Tensor, d_projected: Tensor | None) -> None:
        H = self.H
        for n in range(self.T - 1, -2, -1):
            t = self.T - 1 - n if self.reverse else n
            sums = None
            if self.recurrent and n + 1 < self.T:
                gates = d_r_gates[t - 1 if self.reverse else t + 1].clone()
                if self.gated:
                    gates[:, 2 * H :] = 0
                sums = self.products(gates, transposed=True)
            self.step("state_backward", args, n, sums)
            if d_projected is not None:
                assert self.w_hr is not None
                sums = d_projected[t].double() @ self.w_hr.double() if n >= 0 else None
                self.step("project_backward", args, n, sums)
            if self.gated and n >= 0:
                last = torch.zeros_like(d_r_gates[t])
                last[:, 2 * H :] = d_r_gates[t, :, 2 * H :]
                self.step("gate_backward", args, n, self.products(last, transposed=True))

    def first_state(self, given: Tensor | None, reset: Tensor | None, size: int) -> Tensor:
        first = torch.zeros(self.B, size, dtype=self.dtype) if given is None else given
        if self.resets is None:
            return first
        step = self.T - 1 if self.reverse else 0
        cleared = self.resets[step]
        if self.lengths is not None:
            cleared = cleared & (self.lengths > step)
        to = torch.zeros_like(first) if reset is None else reset.expand_as(first)
        return torch.where(cleared.unsqueeze(1), to, first)

    def forward(self, *, save: bool) -> dict[str, Tensor]:
        T, B, H, P, G, K = self.T, self.B, self.H, self.P, self.G, self.K
        get = self.inputs.get
        x, w_ih = self.inputs["x"], self.inputs["w_ih"]
        self.padded = x
        if self.lengths is not None:
            padding = torch.arange(T).unsqueeze(1) >= self.lengths
            self.padded = x.masked_fill(padding.unsqueeze(2), 0)
        sums = self.padded.double() @ w_ih.double().t()
        b_ih, b_hh = get("b_ih"), get("b_hh")
        apart_bias = None
        if b_ih is not None and b_hh is not None:
            both = b_ih.double() + b_hh.double()
            if self.apart:
                both[2 * H :] = b_ih[2 * H :].double()
                apart_bias = b_hh[2 * H :].clone()
            sums = sums if self.normed else sums + both
        self.gates = sums.to(self.dtype)
        if self.normed:
            kept = T if save else 1
            gains = ("gain_ih", "gain_hh", "gain_c", "bias_c")
            self.norm = {name: self.inputs.get(name) for name in gains}
            self.norm |= {
                "bias": both.to(self.dtype),
                "x_sums": self.gates,
                "r_sums": self.new(kept, B, G * H, wide=True),
                "c_sums": self.new(kept, B, H, wide=True) if K else None,
                "moments": self.new(T, B, 3, 2, wide=True) if save else None,
            }
            self.gates = self.new(kept, B, G * H)
        slots = T + 1 if save else 2
        first, last = (T, 0) if save and self.reverse else (0, T if save else T % 2)
        self.states = self.new(slots, B, P)
        self.states[first] = self.first_state(get("h_0"), get("reset_h"), P)
        self.cells = self.new(slots, B, K * H, wide=True) if K else None
        reset_c = get("reset_c")
        if self.cells is not None:
            self.cells[first] = self.first_state(get("c_0"), reset_c, K * H)
        self.apart_sums = self.new(T, B, H) if self.apart and save else None
        has_inner = self.w_hr is not None or self.gated
        self.inner = self.new(T if save else 1, B, H) if has_inner else None
        y = self.new(T, B, P)
        c_steps = self.new(T, B, K * H, wide=True) if K else None
        mask, masked = get("h_mask"), None
        if mask is not None and self.recurrent:
            masked = self.new(2, B, P)
            masked[0] = self.states[first] * mask
        wide_reset = None if reset_c is None else reset_c.to(self.wide)
        args = fill(
            Forward,
            {
                **self.sizes(),
                **self.weights(),
                **self.zoneouts(),
                **self.norm,
                "save": save,
                "apart_bias": apart_bias,
                "gates": self.gates,
                "apart": self.apart_sums,
                "states": self.states,
                "cells": self.cells,
                "inner": self.inner,
                "y": y,
                "c_steps": c_steps,
                "masked": masked,
                "reset_h": strided(get("reset_h")),
                "reset_c": strided(wide_reset),
            },
        )
        if self.layout is None:
            self.each_step_forward(args, save, args.alive)
        else:
            self.launch("forward", args)
        result = {"y": y, "h_n": self.states[last]}
        if self.cells is not None and c_steps is not None:
            result |= {"c_n": self.cells[last], "c_steps": c_steps}
        return result

    def backward(self, d: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients of the inputs, after ``forward``; ``d`` has those of its results."""
        T, B, H, P, G, K = self.T, self.B, self.H, self.P, self.G, self.K
        d_h = d["h_n"].to(self.wide, copy=True)
        d_c = d["c_n"].to(self.wide, copy=True) if K else None
        d_x_gates = self.new(T, B, G * H)
        d_r_gates = self.new(T, B, G * H) if self.apart or self.normed else d_x_gates
        d_projected = self.new(T, B, P) if self.w_hr is not None else None

        def zeros(size: int, there: bool) -> Tensor | None:
            return torch.zeros(B, size, dtype=self.wide) if there else None

        d_own = zeros(self.U * H, self.U > 0)
        d_reset_h = zeros(P, "reset_h" in self.inputs)
        d_reset_c = zeros(K * H, "reset_c" in self.inputs)
        rows = {
            name: zeros(size, self.normed)
            for name, size in (
                ("row_gain_ih", G * H),
                ("row_gain_hh", G * H),
                ("row_bias", G * H),
                ("row_apart", H),
                ("row_gain_c", H),
                ("row_bias_c", H),
            )
        }
        args = fill(
            Backward,
            {
                **self.sizes(),
                **self.weights(),
                **self.zoneouts(),
                **self.norm,
                **rows,
                "scratch": self.new(B, (2 * G + 2) * H, wide=True) if self.normed else None,
                "gates": self.gates,
                "apart": self.apart_sums,
                "states": self.states,
                "cells": self.cells,
                "d_y": d["y"].to(self.dtype),
                "d_c_steps": d["c_steps"].to(self.wide) if K else None,
                "d_h": d_h,
                "d_c": d_c,
                "d_x_gates": d_x_gates,
                "d_r_gates": d_r_gates,
                "d_projected": d_projected,
                "d_unit_weights": d_own,
                "d_reset_h": d_reset_h,
                "d_reset_c": d_reset_c,
            },
        )
        if self.layout is None:
            self.each_step_backward(args, d_r_gates, d_projected)
        else:
            self.launch("backward", args)
        before = self.states[1:] if self.reverse else self.states[:-1]
        if "h_mask" in self.inputs:
            before = before * self.inputs["h_mask"]

        def product(a: Tensor, b: Tensor) -> Tensor:
            return a.flatten(0, 1).double().t() @ b.flatten(0, 1).double()

        result = {
            "x": d_x_gates.double() @ self.inputs["w_ih"].double(),
            "w_ih": product(d_x_gates, self.padded),
            "b_ih": d_x_gates.double().sum((0, 1)),
            "b_hh": d_r_gates.double().sum((0, 1)),
            "h_0": d_h,
        }
        if d_c is not None:
            result["c_0"] = d_c
        sums = {name: row.sum(0) for name, row in rows.items() if row is not None}
        if self.normed:
            result |= {"gain_ih": sums["row_gain_ih"], "gain_hh": sums["row_gain_hh"]}
            result |= {"gain_c": sums["row_gain_c"], "bias_c": sums["row_bias_c"]}
            bias = sums["row_bias"]
            apart = torch.cat((bias[: 2 * H], sums["row_apart"])) if self.apart else bias
            result |= {"b_ih": bias, "b_hh": apart}
        if not self.recurrent:
            assert d_own is not None
            # With a mask the weights of each row are scaled.
            result["w_hh"] = (d_own * self.inputs.get("h_mask", torch.ones(()))).sum(0)
        elif self.gated:
            assert self.inner is not None
            kept = product(d_r_gates[..., : 2 * H], before)
            last = product(d_r_gates[..., 2 * H :], self.inner)
            result["w_hh"] = torch.cat((kept, last))
        else:
            whole, size = product(d_r_gates, before), P // self.heads
            blocks = whole.view(G, self.heads, -1, self.heads, size)
            own = [blocks[:, head, :, head] for head in range(self.heads)]
            result["w_hh"] = torch.stack(own, 1).flatten(0, 2)
        if self.recurrent and d_own is not None:
            result["w_ch"] = d_own.sum(0)
        if d_projected is not None:
            assert self.inner is not None
            result["w_hr"] = product(d_projected, self.inner)
        for name, rows in (("reset_h", d_reset_h), ("reset_c", d_reset_c)):
            if rows is not None:
                result[name] = rows if self.inputs[name].dim() == 2 else rows.sum(0)
        return result
