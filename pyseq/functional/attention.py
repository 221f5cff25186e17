# SPDX-License-Identifier: Apache-2.0
"""Attention of given queries: attend, and what windows and coverage need with it."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_like, check_shape, check_tensor
from ..types import AttendOutput, ScoreName
from . import products
from ._common import beside, is_short
from .keys import check_keys, check_score, check_window, core, core_keys


def attend(
    query: Tensor,
    keys: Tensor | None,
    memory: Tensor,
    lengths: Tensor | None = None,
    *,
    score: ScoreName = "dot",
    weight: Tensor | None = None,
    weight_query: Tensor | None = None,
    weight_v: Tensor | None = None,
    heads: int = 1,
    window: int | None = None,
    positions: Tensor | None = None,
    step: Tensor | None = None,
    need_weights: bool = False,
) -> AttendOutput:
    """Attention of every query over the memory of its row.

    ``a_ts = softmax_s score(q_t, k_s)`` and ``context_t = sum_s a_ts m_s``, with the score

    - dot ``q . k``, scaled_dot ``q . k / sqrt(A / N)``, general ``q . (W k)``;
    - concat ``v . tanh(W_q q + k)``;
    - location ``(W q)_s``, which depends on the position alone.

    With ``window`` D query t sees the positions s with ``|s - p_t| <= D`` only, at a cost of
    O(D). Without ``positions`` ``p_t = t`` (local-m), or ``step + t``; with them each weight, after
    the softmax, is multiplied with ``exp(-(s - p_t)^2 / (2 (D/2)^2))`` (local-p), through which p_t
    gets a gradient. Each of N heads does all this with its own A/N components of queries and keys
    (of W_q and v too) and M/N of the memory; their contexts lie side by side.

    Args:
        query: (T, B, Q).
        keys: (S, B, A). For dot and scaled_dot A is Q. For concat these are the projected keys
            ``W_m m``. For general they are not yet projected; ``weight`` does that, after
            which A is Q. For location None.
        memory: (S, B, M), what the context is a weighted sum of.
        lengths: (B,) int64, valid positions of each row, 0 to S, on any device. The others
            get exactly zero weight; a row of length 0 gets a zero context, and so does a
            query whose window lies beyond all of them.
        score: ``"dot"``, ``"scaled_dot"``, ``"general"``, ``"concat"`` or ``"location"``.
        weight: (Q, A), general; (R, Q), location, where a position from R on gets no weight.
        weight_query: (A, Q), concat only; left out, the query is projected already.
        weight_v: (A,), concat only.
        heads: N, which divides A and M.
        window: D, positions on either side of the centre, at least 1. Default: all.
        positions: (T, B), the centre p_t of each query's window, counted in positions from 0, in
            the dtype of the query, or where that is float16 or bfloat16 in float32;
            :func:`predict_positions` makes such.
        step: (B,) int64, how many queries each row had before these, for a window without
            positions: ``p_t = step + t``. Default: none.
        need_weights: also return the weights.

    Returns:
        ``context`` (T, B, M), and ``weights`` (T, B, S), of several heads (T, B, N, S), or None.

    Raises:
        ValueError: an option is unknown or out of its range, or a weight does not go with the
            score.
        RuntimeError: a tensor has the wrong shape, dtype or device.
        TypeError: what must be a tensor is none.

    Reference:
        Luong et al. 2015, arXiv 1508.04025, eq. 7 to 10 and section 3.2 (there a window that
        ends before its centre is no case; here its context is zero); concat is also the
        additive score of Bahdanau et al. 2015, arXiv 1409.0473; Vaswani et al. 2017,
        arXiv 1706.03762, eq. 1 (scaled dot) and section 3.2.2 (heads).
    """
    check_score(score, weight, weight_query, weight_v)
    check_keys(score, keys)
    check_window(window)
    check_centres(window, positions, step)
    check_tensor("query", query)
    check_tensor("memory", memory)
    size = None
    if weight is not None:
        check_shape("query", query, "(T, B, Q)", (-1, -1, -1))
        size = query.shape[-1]
    if weight_query is not None:
        assert keys is not None
        check_shape("query", query, "(T, B, Q)", (-1, -1, -1))
        check_shape("keys", keys, "(S, B, A)", (-1, -1, -1))
        sizes = (keys.shape[-1], query.shape[-1])
        check_shape("weight_query", weight_query, "(A, Q)", sizes)
        check_like("weight_query", weight_query, "query", query)
        query = products.linear(query, weight_query)
    keys, lengths = core_keys(score, keys, memory, lengths, weight, size, heads)
    dtype = query.dtype
    if positions is not None and is_short(query) and positions.dtype == torch.float32:
        # The operator takes one type, and rounded positions would be others.
        for name, tensor in (("keys", keys), ("memory", memory), ("weight_v", weight_v)):
            if tensor is not None:
                check_like(name, tensor, "query", query)
        query, keys, memory = (tensor.float() for tensor in (query, keys, memory))
        weight_v = None if weight_v is None else weight_v.float()
    context, weights = torch.ops.pyseq.attend(
        query,
        keys,
        memory,
        weight_v,
        beside("lengths", lengths, query),
        core(score),
        positions,
        window or 0,
        heads,
        None if step is None else beside("step", step, query),
        need_weights,
    )
    return AttendOutput(context.to(dtype), weights.to(dtype) if need_weights else None)


def check_centres(window: int | None, positions: Tensor | None, step: Tensor | None) -> None:
    """Check what goes with windows."""
    if positions is not None:
        check_tensor("positions", positions)
        if window is None:
            raise ValueError("positions need a window around them, got None")
    if step is not None and (window is None or positions is not None):
        raise ValueError(
            "step goes with a window without positions, got "
            + ("no window" if window is None else "positions")
        )


def predict_positions(
    query: Tensor,
    weight: Tensor,
    weight_v: Tensor,
    source: int,
    lengths: Tensor | None = None,
) -> Tensor:
    """Where in the source each query should look: ``p_t = S sigmoid(v . tanh(W q_t))``.

    Args:
        query: (T, B, Q).
        weight: (P, Q), ``W``.
        weight_v: (P,), ``v``.
        source: S, positions of the memory.
        lengths: (B,) int64, the S of each row: how many positions may have a weight, which with
            the score location is what :func:`position_limit` gives. Default: ``source``.

    Returns:
        (T, B), between 0 and S, for :func:`attend`. In float32 for a query in float16 or bfloat16,
        which cannot tell the positions of a long source apart.

    Raises:
        RuntimeError: a tensor has the wrong shape, dtype or device.
        TypeError: what must be a tensor is none.

    Reference:
        Luong et al. 2015, arXiv 1508.04025, eq. 9; section 3.1 has the score location ignore the
        words past its last, which are none of the S here.
    """
    check_shape("query", query, "(T, B, Q)", (-1, -1, -1))
    check_shape("weight", weight, "(P, Q)", (-1, query.shape[-1]))
    check_shape("weight_v", weight_v, "(P,)", weight.shape[:1])
    for name, tensor in (("weight", weight), ("weight_v", weight_v)):
        check_like(name, tensor, "query", query)
    if is_short(query):
        query, weight, weight_v = query.float(), weight.float(), weight_v.float()
    # Not a product, which autocast would round.
    energies = torch.tanh(products.linear(query, weight)) * weight_v
    share = torch.sigmoid(energies.sum(-1))
    lengths = beside("lengths", lengths, query)
    if lengths is None:
        return source * share
    check_shape("lengths", lengths, "(B,)", query.shape[1:2])
    return lengths * share


def coverage_loss(weights: Tensor, past: Tensor | None = None) -> Tensor:
    """What is attended to again: ``sum_s min(a_ts, sum_{u<t} a_us)`` at every step t.

    Added to a loss, it teaches attention to go on.

    Args:
        weights: (T, ..., S), those that :func:`decode` returns.
        past: (..., S), the sum of the weights before the first step. Default: zero.

    Returns:
        (T, ...), each between 0 and 1.

    Raises:
        RuntimeError: a tensor has the wrong shape, dtype or device.
        TypeError: what must be a tensor is none.

    Reference:
        See et al. 2017, arXiv 1704.04368, eq. 12.
    """
    check_tensor("weights", weights)
    if weights.dim() < 2:
        raise RuntimeError(f"weights must be (T, ..., S), got {tuple(weights.shape)}")
    covered = weights.cumsum(0) - weights
    if past is not None:
        check_shape("past", past, "(..., S)", weights.shape[1:])
        check_like("past", past, "weights", weights)
        covered = covered + past
    return torch.minimum(weights, covered).sum(-1)
