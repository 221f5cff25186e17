# SPDX-License-Identifier: Apache-2.0
"""The attention decoder with teacher forcing: decode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_shape, check_tensor
from .._library import _C  # which registers torch.ops.pyseq
from ..types import (
    GATES,
    AttentionState,
    CellName,
    DecoderOutput,
    DecoderStart,
    DecoderState,
    FeedName,
    HistoryName,
    LayerWeights,
    OrderName,
    ScoreName,
    decoder_parts,
)
from ._attending import attending
from ._common import beside, check_option, flatten, h_and_c
from .keys import check_keys, check_score, core, core_keys

#: What the decoder of :mod:`pyseq.nn` asks before it calls the operators.
decode_whole = _C.decode_whole


def decode(
    x: Tensor,
    layers: Sequence[LayerWeights | tuple[Tensor | None, ...]],
    keys: Tensor | None,
    memory: Tensor,
    combine: Tensor,
    *,
    cell: CellName = "lstm",
    score: ScoreName = "dot",
    weight: Tensor | None = None,
    weight_query: Tensor | None = None,
    weight_v: Tensor | None = None,
    weight_history: Tensor | None = None,
    weight_position: Tensor | None = None,
    weight_position_v: Tensor | None = None,
    state: DecoderStart | None = None,
    lengths: Tensor | None = None,
    order: OrderName = "luong",
    input_feeding: bool = True,
    feed: FeedName = "output",
    heads: int = 1,
    window: int | None = None,
    history: HistoryName | None = None,
    dropout_masks: Tensor | None = None,
    need_weights: bool = False,
    memory_rows: Tensor | None = None,
) -> DecoderOutput:
    """Run a whole attention decoder with teacher forcing.

    At every step: the stacked cells, whose first input is ``[x_t; fed]`` with input feeding and
    ``x_t`` without; attention over ``memory``, giving the context ``c_t``; and
    ``out_t = tanh(W_c [c_t; h_t])`` of the top state ``h_t``. In Luong's order h_t is the query,
    and what is fed is ``out_{t-1}``, or with ``feed="context"`` ``c_{t-1}``. In Bahdanau's
    attention comes before the cells: its query is ``h_{t-1}`` and what is fed is ``c_t``.

    The attention is that of :func:`attend`, with windows around ``p_t = t`` (local-m), or with
    ``weight_position`` around ``p_t = S sigmoid(v_p . tanh(W_p q_t))`` with a Gaussian (local-p),
    where q_t is the state that asks and S the positions of the row that may have a weight: its
    length, with the score location at most R. With a ``history`` the additive score sees past
    weights, ``v . tanh(q + k_s + sum_j U_j past_{s + j - (K - 1) / 2})``, where ``past`` is those
    of the step before (location-sensitive attention), or the sum of all (coverage with K = 1).

    In float32 and without gradients ``layers``, ``combine`` and ``weight_query`` may be quantized;
    see :func:`pyseq.quantize`.

    Args:
        x: (T, B, I), floating-point, T at least 1.
        layers: for each layer ``(w_ih, w_hh, b_ih, b_hh)``: (G*H, I + F) for the first
            layer with input feeding, columns [x; fed], (G*H, I) without, (G*H, H) above;
            (G*H, H); and the biases (G*H,), which may be left out. F is H, or M where the
            context is fed.
        keys, memory, lengths, score, weight, weight_query, weight_v, heads: as in
            :func:`attend`, with the top state as the query (Q is H).
        combine: (H, M + H), ``W_c``, columns [context; h].
        cell: ``"rnn_tanh"``, ``"rnn_relu"``, ``"gru"`` or ``"lstm"``.
        weight_history: (A, K), ``U``, with a history only: a convolution over positions, K odd.
            Each head has its own rows of it and its own past.
        weight_position, weight_position_v: (P, H) and (P,), ``W_p`` and ``v_p``, with a window.
        state: ``(hidden, feed)`` or what a call returned: h (L, B, H) or for LSTM the pair
            (h, c), and (B, F), either of them None for zero; with a window or a history, where
            something is fed, a third part ``(step, weights)``: (B,) int64, how many steps there
            were, and (B, N, S) or None for zero. Default: all zero.
        order: ``"luong"`` or ``"bahdanau"``; the latter needs ``feed="context"``.
        input_feeding: whether the first layer sees what is fed.
        feed: ``"output"`` or ``"context"``.
        window: D, as in :func:`attend`.
        history: ``"previous"`` or ``"cumulative"``, score concat only.
        dropout_masks: (L - 1, T, B, H), what the output of each layer but the top one is
            multiplied with on its way up; zeros and ``1 / (1 - p)``. Default: ones.
        need_weights: also return the attention weights.
        memory_rows: (B,) int64, the row of keys, memory and lengths that each row attends to,
            which may be of another number of rows: those that attend to one share it. Default:
            its own.

    Returns:
        ``output`` (T, B, H), ``weights`` (T, B, S), of several heads (T, B, N, S), or None, and
        ``state``, from which the next call goes on.

    Raises:
        ValueError: an option is unknown or does not go with another, a weight does not go with
            the options, or the state or a layer has the wrong form.
        RuntimeError: a tensor has the wrong shape, dtype or device.
        TypeError: what must be a tensor is none.

    Reference:
        Luong et al. 2015, arXiv 1508.04025, eq. 5 to 10 and section 3.3 (input feeding);
        Bahdanau et al. 2015, arXiv 1409.0473, section 3.1 and A.1.2 (order; the output here is
        Luong's); Chorowski et al. 2015, arXiv 1506.07503, eq. 8 and 9 (location-sensitive, with
        the product of the two matrices there as U); Tu et al. 2016, arXiv 1601.04811, and
        See et al. 2017, arXiv 1704.04368, eq. 10 and 11 (coverage).
    """
    check_option("cell", cell, tuple(GATES))
    # The query is the top state, made inside the loop, so its projection happens there.
    check_score(score, weight, weight_query, weight_v)
    check_keys(score, keys)
    check_tensor("x", x)
    check_tensor("memory", memory)
    check_tensor("combine", combine)
    if weight is not None:
        check_shape("combine", combine, "(H, M + H)", (-1, -1))
    size = None if weight is None else combine.shape[0]
    keys, lengths = core_keys(score, keys, memory, lengths, weight, size, heads)
    flat = flatten(layers)
    parts, fed = decoder_parts(cell, state)
    step, more = attending(
        state,
        fed,
        weight_history=weight_history,
        weight_position=weight_position,
        weight_position_v=weight_position_v,
        order=order,
        feed=feed,
        heads=heads,
        window=window,
        history=history,
    )
    h_0, c_0 = h_and_c(parts)
    shared = {} if memory_rows is None else {"memory_rows": beside("memory_rows", memory_rows, x)}
    output, weights, h_n, c_n, feed_n, past_n = torch.ops.pyseq.decode(
        x,
        flat,
        keys,
        memory,
        combine,
        weight_query,
        weight_v,
        h_0,
        c_0,
        fed,
        beside("lengths", lengths, x),
        dropout_masks,
        cell,
        core(score),
        input_feeding,
        need_weights,
        *more,
        **shared,
    )
    attention = None
    if window is not None or history is not None:
        if step is None:
            step = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)
        attention = AttentionState(step + x.shape[0], None if history is None else past_n)
    return DecoderOutput(
        output,
        weights if need_weights else None,
        DecoderState(
            (h_n, c_n) if cell == "lstm" else h_n,
            output.select(0, -1) if feed == "output" else feed_n,
            attention,
        ),
    )
