# SPDX-License-Identifier: Apache-2.0
"""Attention of steps in order, which sees the weights of the steps before: attend_history."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._checks import check_like, check_positive, check_shape, check_tensor
from ..types import HISTORIES, AttendHistoryOutput, HistoryName
from . import products
from ._common import beside, check_option
from .attention import attend, check_centres


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
    beyond both ends. Everything else is as in :func:`attend` with the score concat, whose operator
    is called at each step.

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
    check_centres(window, positions, step)
    check_shape("query", query, "(T, B, Q)", (-1, -1, -1))
    check_shape("memory", memory, "(S, B, M)", (-1, query.shape[1], -1))
    source, batch, size = memory.shape
    check_shape("keys", keys, "(S, B, A)", (source, batch, -1))
    check_like("keys", keys, "query", query)
    attention_size = keys.shape[2]
    check_tensor("weight_v", weight_v)
    check_tensor("weight_history", weight_history)
    if weight_history.dim() != 2 or weight_history.shape[1] % 2 == 0:
        raise RuntimeError(
            f"weight_history must be (A, K) with an odd K, got {tuple(weight_history.shape)}"
        )
    taps = weight_history.shape[1]
    check_shape("weight_history", weight_history, "(A, K)", (attention_size, taps))
    check_like("weight_history", weight_history, "query", query)
    check_positive(heads=heads)
    if attention_size % heads:
        raise ValueError(f"heads must divide A = {attention_size}, got {heads}")
    if past is None:
        past = query.new_zeros(batch, heads, source)
    check_shape("past", past, "(B, N, S)", (batch, heads, source))
    check_like("past", past, "query", query)
    if weight_query is not None:
        sizes = (attention_size, query.shape[2])
        check_shape("weight_query", weight_query, "(A, Q)", sizes)
        check_like("weight_query", weight_query, "query", query)
        query = products.linear(query, weight_query)
    if positions is not None:
        check_shape("positions", positions, "(T, B)", query.shape[:2])
    step = beside("step", step, query)
    contexts = [query.new_empty(0, batch, size)]
    all_weights = [query.new_empty(0, batch, *(() if heads == 1 else (heads,)), source)]
    for t in range(query.shape[0]):
        number = None
        if window is not None and positions is None:
            number = torch.full((batch,), t, device=query.device)
            number = number if step is None else number + step
        context, weights = attend(
            query[t : t + 1],
            keys + reference.history_keys(past, weight_history),
            memory,
            lengths,
            score="concat",
            weight_v=weight_v,
            heads=heads,
            window=window,
            positions=None if positions is None else positions[t : t + 1],
            step=number,
            need_weights=True,
        )
        assert weights is not None
        contexts.append(context)
        all_weights.append(weights)
        now = weights.reshape(batch, heads, source)
        past = past + now if history == "cumulative" else now
    return AttendHistoryOutput(
        torch.cat(contexts), torch.cat(all_weights) if need_weights else None, past
    )
