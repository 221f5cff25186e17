# SPDX-License-Identifier: Apache-2.0
"""The operators of attention with past weights, for devices without kernels for them.

Registered for the dispatcher: ``pyseq::attend_history`` and its backward, step by step with the
operators of attention that such devices have. No step waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from .. import reference
from .._checks import check_like, check_positive, check_shape
from ..types import HISTORIES
from ._common import check_option, is_short


def attend_history(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """``pyseq::attend_history``: the context (T, B, M), the weights, and the past (B, N, S) after
    the last query; see :func:`pyseq.functional.attend_history`."""
    _check(query, keys, memory, weight_history, past, heads, history)
    dtype = query.dtype
    if is_short(query):  # the past adds up what these would round
        query, keys, memory = query.float(), keys.float(), memory.float()
        weight_v, weight_history = weight_v.float(), weight_history.float()
        past = None if past is None else past.float()
        positions = None if positions is None else positions.float()
    (source, batch, size), steps = memory.shape, query.shape[0]
    past = query.new_zeros(batch, heads, source) if past is None else past.clone()
    contexts = [query.new_empty(0, batch, size)]
    all_weights = [query.new_empty(0, batch, *(() if heads == 1 else (heads,)), source)]
    for t in range(steps):
        context, weights = torch.ops.pyseq.attend(
            query[t : t + 1],
            keys + reference.history_keys(past, weight_history),
            memory,
            weight_v,
            lengths,
            "concat",
            *_window(t, query, positions, window, heads, step),
            True,
        )
        contexts.append(context)
        all_weights.append(weights)
        past = _after(past, weights.view_as(past), history)
    found = torch.cat(all_weights) if need_weights else query.new_empty(0)
    return torch.cat(contexts).to(dtype), found.to(dtype), past.to(dtype)


def attend_history_backward(
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
    """``pyseq::attend_history_backward``: the gradients of query, keys, memory, weight_v,
    weight_history, past and positions, from those of the three results."""
    _check(query, keys, memory, weight_history, past, heads, history)
    (source, batch, size), steps = memory.shape, query.shape[0]
    pasts = [query.new_zeros(batch, heads, source) if past is None else past]
    for weights in attn[:-1]:
        pasts.append(_after(pasts[-1], weights.view_as(pasts[0]), history))
    if d_context is None:
        d_context = query.new_zeros(steps, batch, size)
    d_past = torch.zeros_like(pasts[0]) if d_past_n is None else d_past_n.clone()
    sums = [torch.zeros_like(each) for each in (keys, memory, weight_v, weight_history)]
    d_queries, d_positions = [query[:0]], [query[:0, :, 0]]
    # Backward may run inside autocast, which would make these products short.
    with torch.autocast(query.device.type, enabled=False):
        for t in reversed(range(steps)):
            before = pasts[t]
            d_weights = d_past.view_as(attn[t])
            d_query, *found, d_centers = torch.ops.pyseq.attend_backward(
                d_context[t : t + 1],
                (d_weights if d_attn is None else d_weights + d_attn[t]).unsqueeze(0),
                query[t : t + 1],
                keys + reference.history_keys(before, weight_history),
                memory,
                weight_v,
                lengths,
                attn[t : t + 1],
                "concat",
                *_window(t, query, positions, window, heads, step),
            )
            d_before, d_taps = _history_keys_backward(found[0], before, weight_history)
            d_past = d_past + d_before if history == "cumulative" else d_before
            for total, part in zip(sums, (*found, d_taps), strict=True):
                total += part
            d_queries.append(d_query)
            d_positions.append(d_centers)
    return (
        torch.cat(d_queries[::-1]),
        *sums,
        d_past,
        query.new_empty(0) if positions is None else torch.cat(d_positions[::-1]),
    )


def _check(
    query: Tensor,
    keys: Tensor,
    memory: Tensor,
    weight_history: Tensor,
    past: Tensor | None,
    heads: int,
    history: str,
) -> None:
    """Refuse what the operator of a step would not see."""
    check_option("history", history, HISTORIES)
    check_shape("query", query, "(T, B, A)", (-1, -1, -1))
    check_shape("memory", memory, "(S, B, M)", (-1, query.shape[1], -1))
    source, batch, _ = memory.shape
    check_shape("keys", keys, "(S, B, A)", (source, batch, query.shape[2]))
    size = keys.shape[2]
    check_positive(heads=heads)
    if size % heads:
        raise ValueError(f"heads must divide A = {size}, got {heads}")
    if weight_history.dim() != 2 or weight_history.shape[1] % 2 == 0:
        raise RuntimeError(
            f"weight_history must be (A, K) with an odd K, got {tuple(weight_history.shape)}"
        )
    check_shape("weight_history", weight_history, "(A, K)", (size, weight_history.shape[1]))
    for name, tensor in (("keys", keys), ("weight_history", weight_history), ("past", past)):
        if tensor is not None:
            check_like(name, tensor, "query", query)
    if past is not None:
        check_shape("past", past, "(B, N, S)", (batch, heads, source))


def _window(
    t: int, query: Tensor, positions: Tensor | None, window: int, heads: int, step: Tensor | None
) -> tuple[Tensor | None, int, int, Tensor | None]:
    """Positions, window, heads and step of the query t, as the operators of attention take them."""
    if positions is not None:
        return positions[t : t + 1], window, heads, None
    if window == 0:
        return None, window, heads, step
    number = torch.full((query.shape[1],), t, device=query.device)
    return None, window, heads, number if step is None else number + step


def _after(past: Tensor, weights: Tensor, history: str) -> Tensor:
    """The past after a step of these weights, both (B, N, S)."""
    return past + weights if history == "cumulative" else weights


def _history_keys_backward(
    d_keys: Tensor, past: Tensor, weight_history: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`pyseq.reference.history_keys`: of the past and the weight."""
    (_, heads, source), taps = past.shape, weight_history.shape[1]
    # With one more at the end, as there.
    around = torch.nn.functional.pad(past, (taps // 2, taps // 2 + 1)).unfold(2, taps, 1)
    split = (heads, weight_history.shape[0] // heads)
    d_own, own = d_keys.unflatten(2, split), weight_history.unflatten(0, split)
    d_around = torch.nn.functional.pad(torch.einsum("sbna,nak->bnsk", d_own, own), (0, 0, 0, 1))
    d_padded = torch.ops.aten.unfold_backward(
        d_around, (*past.shape[:2], source + taps), 2, taps, 1
    )
    d_past: Tensor = d_padded.narrow(2, taps // 2, source)
    return d_past, torch.einsum("sbna,bnsk->nak", d_own, around[:, :, :source]).flatten(0, 1)


_LIBRARY = Library("pyseq", "FRAGMENT")
for _operator in (attend_history, attend_history_backward):
    _LIBRARY.impl(_operator.__name__, _operator, "CompositeExplicitAutograd")
