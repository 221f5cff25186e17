# SPDX-License-Identifier: Apache-2.0
"""The operators under a second differentiation, under torch.func and in exported programs.

Fused kernels have one derivative and no batching rule. Where more is asked for, the
specification in plain torch takes their place: right, and slow. It is registered here as an
operator beside each of them, ``pyseq::scan_reference`` for ``scan``, where C++ finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.library import Library, register_vmap
from torch.utils._pytree import _register_namedtuple, tree_leaves, tree_map

from . import reference
from .types import (
    SCAN_GATES,
    STATES,
    AttendHistoryOutput,
    AttendOutput,
    AttentionState,
    CellName,
    DecoderOutput,
    DecoderState,
    FeedName,
    HistoryName,
    LayerNormWeights,
    LayerWeights,
    OrderName,
    ScoreName,
    State,
    state_parts,
)

Results = Tensor | tuple[Tensor, ...]
#: What stands for a result that a call cannot have, as in ``csrc/ops.h``.
_NOTHING = (0,)

_LIBRARY = Library("pyseq", "FRAGMENT")


def _state(cell: str, h: Tensor | None, c: Tensor | None, zero_h: Tensor, zero_c: Tensor) -> State:
    """The parts that the operators take side by side in ``c`` one by one."""
    h, count = zero_h if h is None else h, len(STATES.get(cell, ""))
    if c is None:
        return (h, *(zero_c,) * count) if count else h
    return (h, *c.chunk(count, -1)) if count else h


def _parts(cell: str, state: State, like: Tensor) -> tuple[Tensor, Tensor]:
    """``(h_n, c_n)`` as the operators return them."""
    h, *c = state_parts(cast(CellName, cell), state)
    return h, torch.cat(c, -1) if c else like.new_empty(_NOTHING)


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
    norm = None
    if gain_ih is not None and gain_hh is not None:
        norm = LayerNormWeights(gain_ih, gain_hh, gain_c, bias_c)
    batch, hidden = x.shape[1], w_hh.shape[0] // SCAN_GATES[cell]
    size = hidden if w_hr is None else w_hr.shape[0]
    zero_h, zero_c = x.new_zeros(batch, size), x.new_zeros(batch, hidden)
    output, state, *states = reference.scan(
        x,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        w_hr,
        _state(cell, h_0, c_0, zero_h, zero_c),
        cell=cast(CellName, cell),
        lengths=lengths,
        resets=resets,
        reverse=reverse,
        keep_every=keep_every,
        return_states=return_states,
        w_ch=w_ch,
        h_mask=h_mask,
        zoneout_h=zoneout_h,
        zoneout_c=zoneout_c,
        reset_state=_state(cell, reset_h, reset_c, zero_h, zero_c),
        layer_norm=norm,
    )
    c_steps = _parts(cell, states[0], x)[1] if states else x.new_empty(_NOTHING)
    return output, *_parts(cell, state, x), c_steps


def _scan_both(
    x: Tensor,
    weights: Sequence[Tensor | None],
    h_0: Tensor | None,
    c_0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: str,
) -> tuple[Tensor, ...]:
    each = len(weights) // 2
    results = []
    for direction in range(2):
        own: list[Any] = list(weights[direction * each : (direction + 1) * each])
        state = (None if part is None else part[direction] for part in (h_0, c_0))
        # w_ch and the extras, if they are there, are the last arguments of a scan too.
        before = (*state, lengths, resets, cell, direction == 1, 1, False)
        results.append(_scan(x, *own[:5], *before, *own[5:]))
    outputs, h_n, c_n, _ = zip(*results, strict=True)
    return (
        torch.cat(outputs, -1),
        torch.stack(h_n),
        torch.stack(c_n) if c_n[0].dim() > 1 else c_n[0],
    )


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
    context, weights = reference.attend(
        query,
        keys,
        memory,
        lengths,
        score=cast(ScoreName, score),
        weight_v=weight_v,
        heads=heads,
        window=window or None,
        positions=positions,
        step=step,
        need_weights=need_weights,
    )
    return context, query.new_empty(0) if weights is None else weights


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
    context, weights, past = reference.attend_history(
        query,
        keys,
        memory,
        lengths,
        weight_v=weight_v,
        weight_history=weight_history,
        history=cast(HistoryName, history),
        past=past,
        heads=heads,
        window=window or None,
        positions=positions,
        step=step,
        need_weights=need_weights,
    )
    return context, query.new_empty(_NOTHING) if weights is None else weights, past.clone()


def _decode(
    x: Tensor,
    layers: Sequence[Tensor],
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
    stack = [LayerWeights(*layers[first : first + 4]) for first in range(0, len(layers), 4)]
    zero = x.new_zeros(len(stack), x.shape[1], combine.shape[0])
    zero_step = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)
    attention = AttentionState(zero_step if step is None else step, past)
    first = _state(cell, h_0, c_0, zero, zero)
    zero_feed = x.new_zeros(x.shape[1], (memory if fed == "context" else combine.t()).shape[-1])
    output, weights, state = reference.decode(
        x,
        stack,
        keys,
        memory,
        combine,
        cell=cast(CellName, cell),
        score=cast(ScoreName, score),
        weight_query=weight_query,
        weight_v=weight_v,
        weight_history=weight_history,
        weight_position=weight_position,
        weight_position_v=weight_position_v,
        state=DecoderState(first, zero_feed if feed is None else feed, attention),
        lengths=lengths,
        order=cast(OrderName, order),
        input_feeding=input_feeding,
        feed=cast(FeedName, fed),
        heads=heads,
        window=window or None,
        history=None if history == "none" else cast(HistoryName, history),
        dropout_masks=dropout_masks,
        need_weights=need_weights,
        memory_rows=memory_rows,
    )
    nothing = x.new_empty(_NOTHING)
    last = None if state.attention is None else state.attention.weights
    return (
        output,
        nothing if weights is None else weights,
        *_parts(cell, state.hidden, x),
        state.feed if fed == "context" else nothing,
        nothing.clone() if last is None else last,
    )


def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    return reference.linear_cross_entropy(
        hidden,
        weight,
        target,
        bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


#: The specification of each operator, with the operator's own arguments and results.
REFERENCES: dict[str, Callable[..., Results]] = {
    "scan": _scan,
    "scan_both": _scan_both,
    "attend": _attend,
    "attend_history": _attend_history,
    "decode": _decode,
    "linear": reference.linear,
    "linear_cross_entropy": _linear_cross_entropy,
}


class _Info(Protocol):
    """What torch.vmap tells a batching rule."""

    batch_size: int


class _Axes(NamedTuple):
    """Where the batch is in the arguments and results of an operator that have one."""

    arguments: dict[str, int]
    results: tuple[int, ...]


_BATCH_AXES = {
    "scan": _Axes({"x": 1, "h_0": 0, "c_0": 0, "lengths": 0, "resets": 1}, (1, 0, 0, 1)),
    "scan_both": _Axes({"x": 1, "h_0": 1, "c_0": 1, "lengths": 0, "resets": 1}, (1, 1, 1)),
    "attend": _Axes(
        {"query": 1, "keys": 1, "memory": 1, "lengths": 0, "positions": 1, "step": 0}, (1, 1)
    ),
    "attend_history": _Axes(
        {"query": 1, "keys": 1, "memory": 1, "lengths": 0, "past": 0, "positions": 1, "step": 0},
        (1, 1, 0),
    ),
    "decode": _Axes(
        {"x": 1, "keys": 1, "memory": 1, "h_0": 1, "c_0": 1, "feed": 0, "lengths": 0}
        | {"dropout_masks": 2, "step": 0, "past": 0},
        (1, 1, 1, 1, 0, 0),
    ),
}


#: Weights that ``scan_both`` takes of both directions, where no such arguments are behind them.
_WITHOUT_EXTRAS = 12

#: Arguments that are for the rows of one batch, or for all of them: no larger batch goes with
#: them.
_OF_ONE_BATCH = ("h_mask", "zoneout_h", "zoneout_c", "reset_h", "reset_c", "memory_rows")


def _fold(tensor: Tensor, dim: int | None, size: int, axis: int) -> Tensor:
    """``tensor`` with its dimension ``dim``, or ``size`` copies, made part of the batch."""
    if dim is None:
        copies = tensor.unsqueeze(axis)
        tensor = copies.expand(*copies.shape[:axis], size, *copies.shape[axis + 1 :])
    else:
        tensor = tensor.movedim(dim, axis)
    return tensor.flatten(axis, axis + 1)


def _sample(value: Any, dim: Any, index: int) -> Any:
    """One sample of an argument, or of each tensor of a list."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_sample(item, own, index) for item, own in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, index)


def _batching_rule(name: str) -> Callable[..., tuple[Any, Any]]:
    """What torch.vmap runs in the place of an operator: the operator, with a larger batch if
    everything mapped over has one, else once for each sample."""
    operator = getattr(torch.ops.pyseq, name).default
    names = [argument.name for argument in operator._schema.arguments]
    axes = _BATCH_AXES.get(name, _Axes({}, ()))

    def rule(info: _Info, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        given = list(zip(names, args, in_dims, strict=False))
        mapped = {
            argument
            for argument, _, dims in given
            if any(dim is not None for dim in tree_leaves(dims))
        }
        if name == "linear" and mapped == {"x"}:
            return operator(args[0].movedim(in_dims[0], 0), *args[1:]), 0
        alone = any(argument in _OF_ONE_BATCH and value is not None for argument, value, _ in given)
        alone |= name == "scan_both" and len(args[1]) > _WITHOUT_EXTRAS
        if alone or not mapped <= axes.arguments.keys():
            samples = [
                operator(*(_sample(value, dim, index) for _, value, dim in given))
                for index in range(size)
            ]
            if not samples:
                raise RuntimeError(f"pyseq::{name} cannot be mapped over no sample, got size 0")
            results = tree_map(lambda *parts: torch.stack(parts), *samples)
            return results, tree_map(lambda _: 0, results)
        results = operator(
            *(
                value
                if value is None or argument not in axes.arguments
                else _fold(value, dim, size, axes.arguments[argument])
                for argument, value, dim in given
            )
        )
        # A result that there is not has no batch.
        dims = tuple(
            axis if result.dim() > axis else None
            for result, axis in zip(results, axes.results, strict=True)
        )
        return tuple(
            result if axis is None else result.unflatten(axis, (size, -1))
            for result, axis in zip(results, dims, strict=True)
        ), dims

    return rule


# The results of modules, by whose names a saved program knows them.
for _type in (AttendHistoryOutput, AttendOutput, AttentionState, DecoderOutput, DecoderState):
    _register_namedtuple(_type, serialized_type_name=f"pyseq.types.{_type.__name__}")

for _name, _reference in REFERENCES.items():
    _schema = str(getattr(torch.ops.pyseq, _name).default._schema)
    _LIBRARY.define(_schema.replace(f"pyseq::{_name}", f"{_name}_reference", 1))
    _LIBRARY.impl(f"{_name}_reference", _reference, "CompositeImplicitAutograd")
    register_vmap(f"pyseq::{_name}", _batching_rule(_name), lib=_LIBRARY)


def _refuse_batches(name: str) -> Callable[..., Any]:
    """What torch's older way to several gradients, which has its own tensors, meets."""

    def refuse(*_: object) -> Any:
        raise NotImplementedError(
            f"pyseq::{name} takes several gradients at once by torch.vmap around "
            "torch.autograd.grad, or torch.func.jacrev, got is_grads_batched=True, which is what "
            "torch.autograd.functional's vectorize=True sets"
        )

    return refuse


# Several gradients of one result at once: torch.vmap around torch.autograd.grad.
for _name in ("scan_backward", "attend_backward", "attend_history_backward", "decode_backward"):
    register_vmap(f"pyseq::{_name}", _batching_rule(_name), lib=_LIBRARY)
    _LIBRARY.impl(_name, _refuse_batches(_name), "Batched")
