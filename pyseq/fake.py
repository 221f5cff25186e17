# SPDX-License-Identifier: Apache-2.0
"""Fake kernels: the shapes that each operator returns, for torch.compile and torch.export.

Imported by ``_library`` once the extension has registered the operators. ``csrc/ops.h``
says what the tensors are; a result without use has no elements there, and so here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.library import get_ctx, register_fake
from torch.utils._pytree import tree_leaves

from .types import SCAN_GATES, STATES

#: What acts on a scan besides its weights, in the order of ``ScanExtra`` in csrc/ops.h.
Extras = list[Tensor | None] | None
#: The masks before have no gradient.
_FIRST_WITH_GRADIENT = 3
_ZONEOUT = slice(1, 3)
_GAIN_IH = 5

P = ParamSpec("P")
R = TypeVar("R")


def _fake(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a fake kernel that refuses tensors on several devices.

    A call that mixes real tensors with those of the meta device comes here too, and would
    get back real memory that nobody wrote.
    """

    def register(kernel: Callable[P, R]) -> Callable[P, R]:
        @wraps(kernel)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            leaves = tree_leaves((args, kwargs))
            devices = {str(leaf.device) for leaf in leaves if isinstance(leaf, Tensor)}
            if len(devices) > 1:
                raise RuntimeError(
                    f"{name}: all tensors must be on one device, got {', '.join(sorted(devices))}"
                )
            return kernel(*args, **kwargs)

        register_fake(name)(checked)
        return kernel

    return register


class _Results:
    """Tensors like ``x``; wide ones, which kernels add up in and carry on, are float32 at least."""

    def __init__(self, x: Tensor, shapes: list[tuple[int, ...]]) -> None:
        self.x = x
        self.tensors = [x.new_empty(shape) for shape in shapes]

    def add(self, *shape: int, wide: bool = False) -> None:
        short = self.x.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if wide and short else self.x.dtype
        self.tensors.append(self.x.new_empty(shape, dtype=dtype))


def _steps_size(cell: str, steps: int, batch: int, hidden: int, wanted: bool) -> tuple[int, ...]:
    """The shape of c after every step."""
    return (steps, *_cell_size(cell, batch, hidden)) if wanted and cell in STATES else (0,)


def _cell_size(cell: str, batch: int, hidden: int) -> tuple[int, ...]:
    return (batch, len(STATES[cell]) * hidden) if cell in STATES else (0,)


def _sizes(cell: str, w_hh: Tensor, w_hr: Tensor | None) -> tuple[int, int, int]:
    """G*H, H and P. Quantized weights have the rows of the matrix, but other columns."""
    rows = w_hh.shape[0]
    hidden = rows // SCAN_GATES[cell]
    return rows, hidden, hidden if w_hr is None else w_hr.shape[0]


def _rows_first(tensor: Tensor, heads: int = 1) -> Tensor:
    """(S, B, D), which lies in memory as (B, S, D), as the kernels leave it, but for several
    heads, which have to be put together."""
    source, batch, size = tensor.shape
    if heads > 1:
        return tensor.new_empty(source, batch, size)
    return tensor.new_empty(batch, source, size).transpose(0, 1)


def _attn_size(steps: int, batch: int, heads: int, source: int) -> tuple[int, ...]:
    return (steps, batch, source) if heads == 1 else (steps, batch, heads, source)


@_fake("pyseq::scan")
def _scan(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: str,
    reverse: bool,
    keep_every: int = 1,
    return_states: bool = False,
    w_ch: Tensor | None = None,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    gain_ih: Tensor | None = None,
    gain_hh: Tensor | None = None,
    gain_c: Tensor | None = None,
    bias_c: Tensor | None = None,
) -> tuple[Tensor, ...]:
    steps, batch, _ = x.shape
    _, hidden, size = _sizes(cell, w_hh, w_hr)
    return (
        x.new_empty(steps, batch, size),
        x.new_empty(batch, size),
        x.new_empty(_cell_size(cell, batch, hidden)),
        x.new_empty(_steps_size(cell, steps, batch, hidden, return_states)),
    )


@_fake("pyseq::scan_forward")
def _scan_forward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: str,
    reverse: bool,
    keep_every: int = 1,
    return_states: bool = False,
    w_ch: Tensor | None = None,
    extras: Extras = None,
) -> list[Tensor]:
    steps, batch, _ = x.shape
    rows, hidden, size = _sizes(cell, w_hh, w_hr)
    results = _Results(
        x,
        [
            (steps, batch, size),
            (batch, size),
            _cell_size(cell, batch, hidden),
            _steps_size(cell, steps, batch, hidden, return_states),
        ],
    )
    if keep_every > 1:
        kept = (steps + keep_every - 1) // keep_every
        results.add(kept, batch, size)
        if cell in STATES:
            results.add(*_steps_size(cell, kept, batch, hidden, True), wide=True)
        return results.tensors

    # As in csrc/arguments.cpp: gates that are the states, and states that the gates give
    # once more, are not kept.
    here = x.device.type == "cpu"
    zones = any(extra is not None for extra in (extras or [])[_ZONEOUT])
    normalises = extras is not None and len(extras) > _GAIN_IH and extras[_GAIN_IH] is not None
    untouched = here and resets is None and not zones
    keeps_gates = not (untouched and SCAN_GATES[cell] == 1)
    replays = cell in ("lstm", "gru") and w_hr is None and not normalises
    keeps_states = not (untouched and replays)
    if keeps_gates:
        results.add(steps, batch, rows)
    if cell == "gru":
        results.add(steps, batch, hidden)
    if keeps_states:
        results.add(steps + 1, batch, size)
        if cell in STATES:
            results.add(*_steps_size(cell, steps + 1, batch, hidden, True), wide=True)
    if w_hr is not None or cell == "gru_reset_before":
        results.add(steps, batch, hidden)
    if normalises:
        results.add(steps, batch, rows)
        results.add(steps, batch, rows, wide=True)
        if cell == "lstm":
            results.add(steps, batch, hidden, wide=True)
        results.add(steps, batch, 3, 2, wide=True)
    return results.tensors


@_fake("pyseq::scan_backward")
def _scan_backward(
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    d_c_steps: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    saved: list[Tensor],
    cell: str,
    reverse: bool,
    keep_every: int,
    needs_x: bool,
    w_ch: Tensor | None = None,
    extras: Extras = None,
) -> tuple[Tensor | list[Tensor], ...]:
    batch = x.shape[1]
    rows, hidden, size = _sizes(cell, w_hh, w_hr)
    return (
        x.new_empty(x.shape if needs_x else 0),
        w_ih.new_empty(w_ih.shape),
        w_hh.new_empty(w_hh.shape),
        x.new_empty(rows),
        x.new_empty(rows),
        x.new_empty(0 if w_hr is None else w_hr.shape),
        x.new_empty(batch, size),
        x.new_empty(_cell_size(cell, batch, hidden)),
        x.new_empty(0 if w_ch is None else w_ch.shape),
        [
            x.new_empty(0 if extra is None or i < _FIRST_WITH_GRADIENT else extra.shape)
            for i, extra in enumerate(extras or ())
        ],
    )


@_fake("pyseq::scan_both")
def _scan_both(
    x: Tensor,
    weights: list[Tensor | None],
    h_0: Tensor | None,
    c_0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: str,
) -> tuple[Tensor, ...]:
    steps, batch, _ = x.shape
    w_hh = weights[1]
    assert w_hh is not None
    _, hidden, size = _sizes(cell, w_hh, weights[4])
    return (
        x.new_empty(steps, batch, 2 * size),
        x.new_empty(2, batch, size),
        x.new_empty(_steps_size(cell, 2, batch, hidden, True)),
    )


@_fake("pyseq::attend")
def _attend(
    query: Tensor,
    keys: Tensor,
    memory: Tensor,
    weight_v: Tensor | None,
    lengths: Tensor | None,
    score: str,
    positions: Tensor | None = None,
    window: int = 0,
    heads: int = 1,
    step: Tensor | None = None,
    need_weights: bool = True,
) -> tuple[Tensor, ...]:
    steps, batch, _ = query.shape
    source, _, size = memory.shape
    return (
        query.new_empty(steps, batch, size),
        query.new_empty(_attn_size(steps, batch, heads, source) if need_weights else 0),
    )


@_fake("pyseq::attend_backward")
def _attend_backward(
    d_context: Tensor | None,
    d_attn: Tensor | None,
    query: Tensor,
    keys: Tensor,
    memory: Tensor,
    weight_v: Tensor | None,
    lengths: Tensor | None,
    attn: Tensor | None,
    score: str,
    positions: Tensor | None = None,
    window: int = 0,
    heads: int = 1,
    step: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return (
        query.new_empty(query.shape),
        _rows_first(keys, heads),
        _rows_first(memory, heads),
        query.new_empty(0 if weight_v is None else weight_v.shape),
        query.new_empty(0 if positions is None else positions.shape),
    )


@_fake("pyseq::attend_history")
def _attend_history(
    query: Tensor,
    keys: Tensor,
    memory: Tensor,
    weight_v: Tensor,
    weight_history: Tensor,
    lengths: Tensor | None = None,
    past: Tensor | None = None,
    positions: Tensor | None = None,
    window: int = 0,
    heads: int = 1,
    step: Tensor | None = None,
    history: str = "previous",
    need_weights: bool = True,
) -> tuple[Tensor, ...]:
    steps, batch, _ = query.shape
    source, _, size = memory.shape
    return (
        query.new_empty(steps, batch, size),
        query.new_empty(_attn_size(steps, batch, heads, source) if need_weights else 0),
        query.new_empty(batch, heads, source),
    )


@_fake("pyseq::attend_history_backward")
def _attend_history_backward(
    d_context: Tensor | None,
    d_attn: Tensor | None,
    d_past_n: Tensor | None,
    query: Tensor,
    keys: Tensor,
    memory: Tensor,
    weight_v: Tensor,
    weight_history: Tensor,
    lengths: Tensor | None,
    past: Tensor | None,
    attn: Tensor,
    positions: Tensor | None,
    window: int,
    heads: int,
    step: Tensor | None,
    history: str,
) -> tuple[Tensor, ...]:
    return (
        query.new_empty(query.shape),
        _rows_first(keys, heads),
        _rows_first(memory, heads),
        query.new_empty(weight_v.shape),
        query.new_empty(weight_history.shape),
        query.new_empty(query.shape[1], heads, memory.shape[0]),
        query.new_empty(0 if positions is None else positions.shape),
    )


@_fake("pyseq::decode")
def _decode(
    x: Tensor,
    layers: list[Tensor],
    keys: Tensor,
    memory: Tensor,
    combine: Tensor,
    weight_query: Tensor | None,
    weight_v: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    feed: Tensor | None,
    lengths: Tensor | None,
    dropout_masks: Tensor | None,
    cell: str,
    score: str,
    input_feeding: bool,
    need_weights: bool,
    weight_history: Tensor | None = None,
    weight_position: Tensor | None = None,
    weight_position_v: Tensor | None = None,
    step: Tensor | None = None,
    past: Tensor | None = None,
    heads: int = 1,
    window: int = 0,
    history: str = "none",
    order: str = "luong",
    fed: str = "output",
    memory_rows: Tensor | None = None,
) -> tuple[Tensor, ...]:
    steps, batch, _ = x.shape
    source, _, size = memory.shape
    hidden, count = combine.shape[0], len(layers) // 4
    return (
        x.new_empty(steps, batch, hidden),
        x.new_empty(_attn_size(steps, batch, heads, source) if need_weights else 0),
        x.new_empty(count, batch, hidden),
        x.new_empty((count, batch, hidden) if cell == "lstm" else 0),
        x.new_empty((batch, size) if fed == "context" else 0),
        x.new_empty(0 if history == "none" else (batch, heads, source)),
    )


@_fake("pyseq::decode_forward")
def _decode_forward(
    x: Tensor,
    layers: list[Tensor],
    keys: Tensor,
    memory: Tensor,
    combine: Tensor,
    weight_query: Tensor | None,
    weight_v: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    feed: Tensor | None,
    lengths: Tensor | None,
    dropout_masks: Tensor | None,
    cell: str,
    score: str,
    input_feeding: bool,
    weight_history: Tensor | None = None,
    weight_position: Tensor | None = None,
    weight_position_v: Tensor | None = None,
    step: Tensor | None = None,
    past: Tensor | None = None,
    heads: int = 1,
    window: int = 0,
    history: str = "none",
    order: str = "luong",
    fed: str = "output",
) -> list[Tensor]:
    steps, batch, _ = x.shape
    source, _, size = memory.shape
    hidden, count, rows = combine.shape[0], len(layers) // 4, layers[1].shape[0]
    results = _Results(
        x,
        [
            (steps, batch, hidden),
            _attn_size(steps, batch, heads, source),
            (count, batch, hidden),
            (count, batch, hidden) if cell == "lstm" else (0,),
            (batch, size) if fed == "context" else (0,),
            (0,) if history == "none" else (batch, heads, source),
            (steps, batch, rows),
        ],
    )
    if count > 1:
        results.add(count - 1, steps, batch, rows)
    here = x.device.type == "cpu"
    if window > 0 or not here:
        results.add(steps, batch, size)
    if not here:
        results.add(count, steps + 1, batch, hidden)
        if cell == "lstm":
            results.add(count, steps + 1, batch, hidden, wide=True)
    if cell == "gru":
        results.add(count, steps, batch, hidden)
    if weight_query is not None:
        results.add(steps, batch, keys.shape[2])
    if weight_position is not None:
        results.add(steps, batch, weight_position.shape[0])
        results.add(steps, batch, wide=True)
    if history != "none":
        results.add(steps + 1, batch, heads, source, wide=True)
    return results.tensors


@_fake("pyseq::decode_backward")
def _decode_backward(
    d_output: Tensor | None,
    d_attn: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    d_feed_n: Tensor | None,
    d_past_n: Tensor | None,
    x: Tensor,
    layers: list[Tensor],
    keys: Tensor,
    memory: Tensor,
    combine: Tensor,
    weight_query: Tensor | None,
    weight_v: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    feed: Tensor | None,
    lengths: Tensor | None,
    dropout_masks: Tensor | None,
    output: Tensor,
    attn: Tensor,
    saved: list[Tensor],
    cell: str,
    score: str,
    input_feeding: bool,
    needs_x: bool,
    weight_history: Tensor | None = None,
    weight_position: Tensor | None = None,
    weight_position_v: Tensor | None = None,
    step: Tensor | None = None,
    past: Tensor | None = None,
    heads: int = 1,
    window: int = 0,
    history: str = "none",
    order: str = "luong",
    fed: str = "output",
) -> tuple[Tensor | list[Tensor], ...]:
    count, (_, batch, hidden) = len(layers) // 4, output.shape
    return (
        x.new_empty(x.shape if needs_x else 0),
        [weight.new_empty(weight.shape) for weight in layers],
        _rows_first(keys, heads),
        _rows_first(memory, heads),
        combine.new_empty(combine.shape),
        x.new_empty(0 if weight_query is None else weight_query.shape),
        x.new_empty(0 if weight_v is None else weight_v.shape),
        x.new_empty(count, batch, hidden),
        x.new_empty((count, batch, hidden) if cell == "lstm" else 0),
        x.new_empty(batch, memory.shape[2] if fed == "context" else hidden),
        x.new_empty(0 if weight_history is None else weight_history.shape),
        x.new_empty(0 if weight_position is None else weight_position.shape),
        x.new_empty(0 if weight_position_v is None else weight_position_v.shape),
        x.new_empty(0 if history == "none" else (batch, heads, memory.shape[0])),
    )


@_fake("pyseq::linear_cross_entropy")
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    return hidden.new_empty(())


@_fake("pyseq::linear_cross_entropy_forward")
def _linear_cross_entropy_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, ...]:
    return (
        hidden.new_empty(()),
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        weight.new_empty(weight.shape[0] if needs_bias else 0),
    )


@_fake("pyseq::generate")
def _generate(
    embedding: Tensor,
    layers: list[Tensor],
    keys: Tensor | None,
    memory: Tensor | None,
    combine: Tensor | None,
    output_weight: Tensor,
    output_bias: Tensor | None,
    weight_query: Tensor | None,
    weight_v: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    feed: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    score: str,
    input_feeding: bool,
    max_length: int,
    beam_size: int,
    length_penalty: float,
    need_weights: bool,
    min_length: int = 0,
    n_best: int = 1,
    block_ngrams: int = 0,
    prefix: Tensor | None = None,
    weight_history: Tensor | None = None,
    weight_position: Tensor | None = None,
    weight_position_v: Tensor | None = None,
    step: Tensor | None = None,
    past: Tensor | None = None,
    heads: int = 1,
    window: int = 0,
    history: str = "none",
    order: str = "luong",
    fed: str = "output",
    coverage_penalty: float = 0.0,
    sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    batch = h_0.shape[1] * n_best
    longest = get_ctx().new_dynamic_size()
    per_head = () if heads == 1 else (heads,)
    attn: tuple[int | torch.SymInt, ...] = (0,)
    if need_weights and memory is not None:
        attn = (batch, longest, *per_head, memory.shape[0])
    return (
        embedding.new_empty((batch, longest), dtype=torch.int64),
        embedding.new_empty(batch, dtype=torch.int64),
        embedding.new_empty(batch),
        embedding.new_empty(attn),
    )


@_fake("pyseq::scheduled_inputs")
def _scheduled_inputs(
    tokens: Tensor,
    coins: Tensor,
    draws: Tensor | None,
    embedding: Tensor,
    layers: list[Tensor],
    keys: Tensor | None,
    memory: Tensor | None,
    combine: Tensor | None,
    output_weight: Tensor,
    output_bias: Tensor | None,
    weight_query: Tensor | None,
    weight_v: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    feed: Tensor | None,
    lengths: Tensor | None,
    embedding_masks: Tensor | None,
    dropout_masks: Tensor | None,
    output_masks: Tensor | None,
    cell: str,
    score: str,
    input_feeding: bool,
    weight_history: Tensor | None = None,
    weight_position: Tensor | None = None,
    weight_position_v: Tensor | None = None,
    step: Tensor | None = None,
    past: Tensor | None = None,
    heads: int = 1,
    window: int = 0,
    history: str = "none",
    order: str = "luong",
    fed: str = "output",
) -> Tensor:
    return tokens.new_empty(tokens.shape)


@_fake("pyseq::linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_fake("pyseq::sigmoid")
@_fake("pyseq::tanh")
def _activation(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)
