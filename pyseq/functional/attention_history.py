# SPDX-License-Identifier: Apache-2.0
"""Attention of steps in order, which sees the weights of the steps before: attend_history."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_like, check_shape, check_tensor
from ..types import HISTORIES, AttendHistoryOutput, HistoryName
from . import products
from ._common import beside, check_option, is_short
from .attention import check_centres
from .keys import check_window


def attend_history(
    query: Tensor,
    keys: Tensor,
    memory: Tensor,
    lengths: Tensor | None = None,
    *,
    weight_v: Tensor,
    weight_history: Tensor,
    weight_query: Tensor | None = None,
    history: HistoryName = "previous",
    past: Tensor | None = None,
    heads: int = 1,
    window: int | None = None,
    positions: Tensor | None = None,
    step: Tensor | None = None,
    need_weights: bool = False,
) -> AttendHistoryOutput:
    """Attention of queries that are steps in order, with past weights in the additive score.

    ``a_ts = softmax_s v . tanh(W_q q_t + k_s + sum_j U_j past_{t, s + j - (K - 1) / 2})`` and
    ``context_t = sum_s a_ts m_s``, where ``past_t`` is ``a_{t-1}`` (location-sensitive attention)
    or with the history ``"cumulative"`` the sum of all before (coverage with K = 1), and zero
    beyond both ends. Everything else is as in :func:`attend` with the score concat. The CPU makes
    all steps in one operator; other devices call that of :func:`attend` at each step.

    Args:
        query, keys, memory, lengths, weight_query, weight_v, heads, window, positions, step,
            need_weights: as in :func:`attend`.
        weight_history: (A, K), ``U``, a convolution over positions, K odd. Each head has its own
            rows of it and its own past.
        history: ``"previous"`` or ``"cumulative"``.
        past: (B, N, S), the past of the first query, which an earlier call returned. Default: zero.

    Returns:
        ``context`` (T, B, M); ``weights`` (T, B, S), of several heads (T, B, N, S), or None; and
        ``past`` (B, N, S) after the last query.

    Raises:
        ValueError: an option is unknown or out of its range.
        RuntimeError: a tensor has the wrong shape, dtype or device.
        TypeError: what must be a tensor is none.

    Reference:
        Chorowski et al. 2015, arXiv 1506.07503, eq. 8 and 9 (with the product of the two matrices
        there as U); Shen et al. 2018, arXiv 1712.05884, section 2.3 (cumulative); Tu et al. 2016,
        arXiv 1601.04811, and See et al. 2017, arXiv 1704.04368, eq. 10 and 11 (coverage).
    """
    check_option("history", history, HISTORIES)
    check_window(window)
    check_centres(window, positions, step)
    check_shape("query", query, "(T, B, Q)", (-1, -1, -1))
    check_shape("keys", keys, "(S, B, A)", (-1, -1, -1))
    for name, tensor in (
        ("memory", memory),
        ("weight_v", weight_v),
        ("weight_history", weight_history),
    ):
        check_tensor(name, tensor)
    if past is not None:
        check_tensor("past", past)
    if weight_query is not None:
        sizes = (keys.shape[2], query.shape[2])
        check_shape("weight_query", weight_query, "(A, Q)", sizes)
        check_like("weight_query", weight_query, "query", query)
        query = products.linear(query, weight_query)
    dtype = query.dtype
    if positions is not None and is_short(query) and positions.dtype == torch.float32:
        # The operator takes one type, and rounded positions would be others.
        given = {"keys": keys, "memory": memory, "weight_v": weight_v}
        for name, each in {**given, "weight_history": weight_history, "past": past}.items():
            if each is not None:
                check_like(name, each, "query", query)
        query, keys, memory = query.float(), keys.float(), memory.float()
        weight_v, weight_history = weight_v.float(), weight_history.float()
        past = None if past is None else past.float()
    context, weights, past_n = torch.ops.pyseq.attend_history(
        query,
        keys,
        memory,
        weight_v,
        weight_history,
        beside("lengths", lengths, query),
        past,
        positions,
        window or 0,
        heads,
        beside("step", step, query),
        history,
        need_weights,
    )
    return AttendHistoryOutput(
        context.to(dtype), weights.to(dtype) if need_weights else None, past_n.to(dtype)
    )
