# SPDX-License-Identifier: Apache-2.0
"""The fused operators: scan, attend, decode, generate and the loss of an output layer.

Each is one call into C++ forward and one backward, whatever the number of steps. Options are
checked here, tensors in C++. All of a call have one dtype; float16 and bfloat16 are computed in
float32. ``pyseq.reference`` has the same signatures in plain torch, which these agree with.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import has_torch_function_unary

from . import reference
from . import transforms as transforms  # registers what stands in for the operators there
from ._checks import autocasts, check_like, check_positive, check_shape, check_tensor
from ._library import _C  # which registers torch.ops.pyseq
from ._packed import computing_dtype
from .errors import SearchError
from .types import (
    FEEDS,
    GATES,
    HISTORIES,
    ORDERS,
    SCAN_GATES,
    SCORES,
    STATES,
    AttendOutput,
    AttentionState,
    CellName,
    DecoderOutput,
    DecoderStart,
    DecoderState,
    FeedName,
    GenerateOutput,
    HistoryName,
    LayerNormWeights,
    LayerWeights,
    OrderName,
    ScanOutput,
    ScanStates,
    ScoreName,
    State,
    attention_parts,
    decoder_parts,
    kind,
    state_parts,
)


def _check_option(name: str, value: object, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _h_and_c(parts: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
    """The parts of a state as ``(h, c)``, None for what is not there; those beyond c beside c."""
    if len(parts) == 2:
        return parts[0], parts[1]
    if len(parts) < 2:
        return parts[0] if parts else None, None
    h, c, *others = parts
    for part in others:
        check_shape("a part of the state", part, "(..., B, H) like c", tuple(c.shape))
    return h, torch.cat((c, *others), -1)


def _state(cell: CellName, h: Tensor, c: Tensor) -> State:
    """The inverse, for what an operator returned."""
    if cell not in STATES:
        return h
    count = len(STATES[cell])
    return (h, c) if count == 1 else (h, *c.chunk(count, -1))


def _beside(name: str, indices: Tensor | None, x: Tensor) -> Tensor | None:
    """Lengths and resets may come on any device; the kernels read them where x is."""
    if indices is None:
        return None
    check_tensor(name, indices)
    return indices.to(x.device)


def _scan_operator(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.pyseq.scan``, past its Python binding where nothing looks on there: a fifth of
    the time of a small step. The binding also says better what a wrong argument is."""
    if not is_compiling() and not has_torch_function_unary(x):
        try:
            return _C.scan(x, *others)
        except TypeError:
            pass
    return torch.ops.pyseq.scan(x, *others)


@overload
def scan(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    state: State | None = None,
    *,
    cell: CellName = "lstm",
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    keep_every: int = 1,
    return_states: Literal[False] = False,
    w_ch: Tensor | None = None,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    reset_state: State | None = None,
    layer_norm: LayerNormWeights | tuple[Tensor, ...] | None = None,
) -> ScanOutput: ...


@overload
def scan(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    state: State | None = None,
    *,
    cell: CellName = "lstm",
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    keep_every: int = 1,
    return_states: Literal[True],
    w_ch: Tensor | None = None,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    reset_state: State | None = None,
    layer_norm: LayerNormWeights | tuple[Tensor, ...] | None = None,
) -> ScanStates: ...


@overload
def scan(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    state: State | None = None,
    *,
    cell: CellName = "lstm",
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    keep_every: int = 1,
    return_states: bool,
    w_ch: Tensor | None = None,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    reset_state: State | None = None,
    layer_norm: LayerNormWeights | tuple[Tensor, ...] | None = None,
) -> ScanOutput | ScanStates: ...


def scan(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    state: State | None = None,
    *,
    cell: CellName = "lstm",
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    keep_every: int = 1,
    return_states: bool = False,
    w_ch: Tensor | None = None,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    reset_state: State | None = None,
    layer_norm: LayerNormWeights | tuple[Tensor, ...] | None = None,
) -> ScanOutput | ScanStates:
    """Run one recurrent layer over a sequence, in one direction.

    ``h_t, c_t = cell(W_ih x_t + b_ih, W_hh h_{t-1} + b_hh, h_{t-1}, c_{t-1})`` with the
    gates in torch.nn's order: LSTM i, f, g, o; GRU r, z, n. P is H, or the rows of ``w_hr``.
    In float32 and without gradients the weights may be quantized; see :func:`pyseq.quantize`.

    The cells beyond torch.nn's: ``"indrnn_relu"`` and ``"indrnn_tanh"``, whose units see of the
    state themselves alone, ``h_t = relu(W_ih x_t + b_ih + w_hh * h_{t-1} + b_hh)`` with a vector
    ``w_hh``; and ``"lstm"`` with peepholes ``w_ch``, by which its gates see c:
    ``i = sigmoid(... + w_i * c_{t-1})``, f likewise, ``o = sigmoid(... + w_o * c_t)``;
    ``"gru_reset_before"``, as GRU was published, with the reset gate before the product,
    ``n = tanh(W_in x_t + b_in + W_hn (r * h_{t-1}) + b_hn)``; and ``"slstm_sigmoid"`` and
    ``"slstm_exp"``, an LSTM whose input gate, and in the second forget gate, is an exponential::

        c_t = f c_{t-1} + i z,  n_t = f n_{t-1} + i,  h_t = o * c_t / n_t,  z = tanh(...)
        m_t = max(log f + m_{t-1}, log i): all is kept relative to exp(m_t)

    with the gates i, f, z, o and a matrix ``w_hh`` for each head: the rows of a unit have the
    columns of the units of its own head. A state with ``n = 0`` is empty: the first step from it
    sets c, n and m by itself.

    Args:
        x: (T, B, I), floating-point, T at least 1.
        w_ih: (G*H, I), the input weights; G is 1 for RNN and IndRNN, 3 for GRU, 4 for LSTM and
            sLSTM.
        w_hh: (G*H, P), the recurrent weights; (H,) for IndRNN; (G*H, H / heads) for sLSTM.
        b_ih: (G*H,), added to the input part. Default: zero.
        b_hh: (G*H,), added to the recurrent part. Default: zero.
        w_hr: (P, H), LSTM only: ``h_t = W_hr (o * tanh(c_t))``.
        state: h (B, P), for LSTM the pair h (B, P), c (B, H), for sLSTM h, c, n, m (B, H).
            Default: zero.
        cell: ``"rnn_tanh"``, ``"rnn_relu"``, ``"gru"``, ``"lstm"``, ``"indrnn_tanh"``,
            ``"indrnn_relu"``, ``"gru_reset_before"``, ``"slstm_sigmoid"`` or ``"slstm_exp"``.
        lengths: (B,) int64, valid steps of each row, 0 to T, in any order, on any device.
            Later steps leave the state as it is and give a zero output.
        resets: (T, B) bool; where true, the row's state is set to zero (or to
            ``reset_state``) before that step, in values and in gradients.
        reverse: run from the last step (of each row, ``lengths[b] - 1``) to the first.
        keep_every: k above 1 keeps for backward, besides x, the state at every k-th step
            only, instead of gates and states of all; backward runs each stretch of k steps
            forward once more. For long sequences, whose memory binds.
        return_states: also return the state after every step.
        w_ch: (3*H,), LSTM only: the peepholes of i, f and o. Default: none.
        h_mask: (B, P), the same at all steps: ``W_hh (h_mask * h_{t-1})`` in place of
            ``W_hh h_{t-1}``. What the GRU carries over, ``z * h_{t-1}``, is not masked.
        zoneout_h: (T or 1, B or 1, P), in [0, 1]: the share of the old h in the new one,
            ``h_t = zoneout_h * h_{t-1} + (1 - zoneout_h) * h``, where h is what the cell (and
            ``w_hr``) gave. Ones and zeros in training, their expectation in evaluation.
        zoneout_c: (T or 1, B or 1, H), LSTM only: the same of c. The cell's h comes of its own c.
        reset_state: what ``resets`` set the state to, of the form of ``state``, with or without
            the B. Default: zero.
        layer_norm: gains (G*H,) of ``W_ih x`` and of ``W_hh h``, and for LSTM gain (H,) and bias
            (H,) of c; see :class:`pyseq.types.LayerNormWeights`. ``gain_ih * norm(W_ih x) + b_ih``
            then stands for ``W_ih x + b_ih``, likewise ``W_hh h``, and LSTM's h is ``o *
            tanh(gain_c * norm(c) + bias_c)``, where norm takes off a row's mean and divides by
            its standard deviation (of the variance plus 1e-5), over all gates at once.

    Returns:
        ``output`` (T, B, P), and ``state`` after the last valid step, shaped as given. With
        ``return_states`` a third, ``states``: the state after every step, h (T, B, P), which
        is ``output``, or with c (T, B, H), and n and m, beside it; zero at padded steps.
        Gradients flow back from all of it.

    Raises:
        ValueError: an option is unknown or out of its range, or the state has the wrong form.
        RuntimeError: a tensor has the wrong shape, dtype or device.
        TypeError: what must be a tensor is none.

    Reference:
        Elman 1990; Cho et al. 2014, arXiv 1406.1078, eq. 5 to 8 (GRU; in ``"gru"`` the reset gate
        applies after the recurrent product, as in cuDNN); Hochreiter & Schmidhuber 1997 and Gers
        et al. 2000 (LSTM); Gers & Schmidhuber 2000, Recurrent nets that time and count
        (peepholes); Sak et al. 2014, arXiv 1402.1128, eq. 7 (projection); Li et al. 2018,
        arXiv 1803.04831, eq. 4 (IndRNN); Beck et al. 2024, arXiv 2405.04517, section 2.2 (sLSTM);
        Chen et al. 2016, arXiv 1604.06174 (keeping some states); Gal & Ghahramani 2016, arXiv
        1512.05287, eq. 7 (``h_mask``); Krueger et al. 2017, arXiv 1606.01305, section 3.2
        (zoneout); Ba et al. 2016, arXiv 1607.06450, eq. 20 to 22 (layer normalisation; their GRU,
        eq. 23 to 25, normalises the candidate apart from the other gates).
    """
    _check_option("cell", cell, SCAN_GATES)
    if keep_every < 1:
        raise ValueError(f"keep_every must be at least 1, got {keep_every!r}")
    h_0, c_0 = (None, None) if state is None else _h_and_c(state_parts(cell, state))
    extras: tuple[Tensor | None, ...] = ()
    # Reading them takes time, so none is passed if none is given.
    if not (h_mask is zoneout_h is zoneout_c is reset_state is layer_norm is None):
        extras = (
            h_mask,
            zoneout_h,
            zoneout_c,
            *_h_and_c(state_parts(cell, reset_state)),
            *(() if layer_norm is None else LayerNormWeights(*layer_norm)),
        )
    output, h_n, c_n, c_steps = _scan_operator(
        x,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        w_hr,
        h_0,
        c_0,
        None if lengths is None else _beside("lengths", lengths, x),
        None if resets is None else _beside("resets", resets, x),
        cell,
        reverse,
        keep_every,
        return_states,
        w_ch,
        *extras,
    )
    last = _state(cell, h_n, c_n)
    if not return_states:
        return ScanOutput(output, last)
    return ScanStates(output, last, _state(cell, output, c_steps))


def scan_both(
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    weights_reverse: tuple[Tensor | None, ...],
    state: State | None = None,
    *,
    cell: CellName = "lstm",
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> ScanOutput:
    """Run one recurrent layer over a sequence in both directions, without gradients.

    The same as :func:`scan` forward with ``weights`` and in reverse with ``weights_reverse``,
    and the two outputs concatenated; with two threads each direction takes one.

    Args:
        x: (T, B, I), floating-point, T at least 1.
        weights, weights_reverse: ``(w_ih, w_hh, b_ih, b_hh, w_hr)`` as in :func:`scan`, where
            the last three may be None; and ``w_ch`` after them, for both or for neither.
        state: h (2, B, P), or for LSTM the pair h (2, B, P), c (2, B, H), of the forward
            direction first. Default: zero.
        cell, lengths, resets: as in :func:`scan`.

    Returns:
        ``output`` (T, B, 2*P), and ``state`` after the last valid step of each direction,
        shaped as given.

    Raises:
        ValueError: an option is unknown, or the state has the wrong form.
        RuntimeError: a tensor has the wrong shape, dtype or device, or needs a gradient.
        TypeError: what must be a tensor is none.

    Reference:
        Schuster & Paliwal 1997, Bidirectional recurrent neural networks.
    """
    _check_option("cell", cell, SCAN_GATES)
    h_0, c_0 = _h_and_c(state_parts(cell, state))
    output, h_n, c_n = torch.ops.pyseq.scan_both(
        x,
        (*weights, *weights_reverse),
        h_0,
        c_0,
        _beside("lengths", lengths, x),
        _beside("resets", resets, x),
        cell,
    )
    return ScanOutput(output, _state(cell, h_n, c_n))


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
    need_weights: bool = False,
) -> AttendOutput:
    """Attention of every query over the memory of its row.

    ``a_ts = softmax_s score(q_t, k_s)`` and ``context_t = sum_s a_ts m_s``, with the score

    - dot ``q . k``, scaled_dot ``q . k / sqrt(A / N)``, general ``q . (W k)``;
    - concat ``v . tanh(W_q q + k)``;
    - location ``(W q)_s``, which depends on the position alone.

    With ``window`` D query t sees the positions s with ``|s - p_t| <= D`` only, at a cost of
    O(D). Without ``positions`` ``p_t = t`` (local-m); with them each weight, after the softmax,
    is multiplied with ``exp(-(s - p_t)^2 / (2 (D/2)^2))`` (local-p), through which p_t gets a
    gradient. Each of N heads does all this with its own A/N components of queries and keys
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
        positions: (T, B), the centre p_t of each query's window, counted in positions from 0;
            :func:`predict_positions` makes such.
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
    _check_score(score, weight, weight_query, weight_v)
    _check_keys(score, keys)
    _check_window(window)
    if positions is not None:
        check_tensor("positions", positions)
        if window is None:
            raise ValueError("positions need a window around them, got None")
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
        query = linear(query, weight_query)
    keys, lengths = _core_keys(score, keys, memory, lengths, weight, size, heads)
    context, weights = torch.ops.pyseq.attend(
        query,
        keys,
        memory,
        weight_v,
        _beside("lengths", lengths, query),
        _core(score),
        positions,
        window or 0,
        heads,
    )
    return AttendOutput(context, weights if need_weights else None)


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
        lengths: (B,) int64, the S of each row. Default: ``source``.

    Returns:
        (T, B), between 0 and S, for :func:`attend`.

    Raises:
        RuntimeError: a tensor has the wrong shape, dtype or device.
        TypeError: what must be a tensor is none.

    Reference:
        Luong et al. 2015, arXiv 1508.04025, eq. 9.
    """
    check_shape("query", query, "(T, B, Q)", (-1, -1, -1))
    check_shape("weight", weight, "(P, Q)", (-1, query.shape[-1]))
    check_shape("weight_v", weight_v, "(P,)", weight.shape[:1])
    for name, tensor in (("weight", weight), ("weight_v", weight_v)):
        check_like(name, tensor, "query", query)
    share = torch.sigmoid(torch.tanh(linear(query, weight)) @ weight_v)
    lengths = _beside("lengths", lengths, query)
    if lengths is None:
        return source * share
    check_shape("lengths", lengths, "(B,)", query.shape[1:2])
    return lengths * share


_PLAIN_ATTENTION = (1, 0, "none", "luong", "output")


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
) -> DecoderOutput:
    """Run a whole attention decoder with teacher forcing.

    At every step: the stacked cells, whose first input is ``[x_t; fed]`` with input feeding and
    ``x_t`` without; attention over ``memory``, giving the context ``c_t``; and
    ``out_t = tanh(W_c [c_t; h_t])`` of the top state ``h_t``. In Luong's order h_t is the query,
    and what is fed is ``out_{t-1}``, or with ``feed="context"`` ``c_{t-1}``. In Bahdanau's
    attention comes before the cells: its query is ``h_{t-1}`` and what is fed is ``c_t``.

    The attention is that of :func:`attend`, with windows around ``p_t = t`` (local-m), or with
    ``weight_position`` around ``p_t = S sigmoid(v_p . tanh(W_p q_t))`` with a Gaussian (local-p),
    where q_t is the state that asks. With a ``history`` the additive score sees past weights,
    ``v . tanh(q + k_s + sum_j U_j past_{s + j - (K - 1) / 2})``, where ``past`` is those of the
    step before (location-sensitive attention), or the sum of all (coverage with K = 1).

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
            (h, c), and (B, F), either of them None for zero; with a window or a history, a third
            part ``(step, weights)``: (B,) int64, how many steps there were, and (B, N, S).
            Default: all zero.
        order: ``"luong"`` or ``"bahdanau"``; the latter needs ``feed="context"``.
        input_feeding: whether the first layer sees what is fed.
        feed: ``"output"`` or ``"context"``.
        window: D, as in :func:`attend`.
        history: ``"previous"`` or ``"cumulative"``, score concat only.
        dropout_masks: (L - 1, T, B, H), what the output of each layer but the top one is
            multiplied with on its way up; zeros and ``1 / (1 - p)``. Default: ones.
        need_weights: also return the attention weights.

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
    _check_option("cell", cell, tuple(GATES))
    _check_option("order", order, ORDERS)
    _check_option("feed", feed, FEEDS)
    if history is not None:
        _check_option("history", history, HISTORIES)
    _check_window(window)
    # The query is the top state, made inside the loop, so its projection happens there.
    _check_score(score, weight, weight_query, weight_v)
    _check_keys(score, keys)
    if weight is not None:
        check_shape("combine", combine, "(H, M + H)", (-1, -1))
    size = None if weight is None else combine.shape[0]
    keys, lengths = _core_keys(score, keys, memory, lengths, weight, size, heads)
    flat = _flatten(layers)
    parts, fed = decoder_parts(cell, state)
    step, past = attention_parts(state)
    h_0, c_0 = _h_and_c(parts)
    # The operator's defaults are left out where they are wanted: to give them takes its time.
    more: tuple[object, ...] = ()
    others = (weight_history, weight_position, weight_position_v, step, past)
    how = (heads, window or 0, history or "none", order, feed)
    if how != _PLAIN_ATTENTION or any(other is not None for other in others):
        more = (*others, *how)
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
        _beside("lengths", lengths, x),
        dropout_masks,
        cell,
        _core(score),
        input_feeding,
        need_weights,
        *more,
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
            output[-1] if feed == "output" else feed_n,
            attention,
        ),
    )


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


def generate(
    embedding: Tensor,
    layers: Sequence[LayerWeights | tuple[Tensor | None, ...]],
    state: DecoderState | tuple[State, Tensor | None],
    output_weight: Tensor,
    output_bias: Tensor | None = None,
    keys: Tensor | None = None,
    memory: Tensor | None = None,
    combine: Tensor | None = None,
    *,
    max_length: int,
    beam_size: int = 1,
    length_penalty: float = 0.0,
    cell: CellName = "lstm",
    score: ScoreName | None = "dot",
    weight: Tensor | None = None,
    weight_query: Tensor | None = None,
    weight_v: Tensor | None = None,
    lengths: Tensor | None = None,
    input_feeding: bool = True,
    need_weights: bool = False,
    min_length: int = 0,
    n_best: int = 1,
    block_ngrams: int | None = None,
    prefix: Tensor | None = None,
) -> GenerateOutput:
    """Search for the likeliest sequences of each row with an attention decoder.

    At every step the decoder of :func:`decode` reads the embedding of the last token, first
    that of ``<start>``, and ``p(token) = softmax(W_o out_t + b)``. What beam search makes of
    it is said at :func:`pyseq.search.beam`; with one hypothesis and no length penalty it is
    greedy search. There is no gradient.

    Args:
        embedding: (V, E), floating-point, of the tokens; 0 is ``<pad>``, 1 ``<start>``,
            2 ``<stop>``.
        layers: as in :func:`decode`, with I equal to E; if score is None, stacked cells
            whose top state is the output, without combination and feeding.
        state: ``(hidden, feed)`` before the first token: h (L, B, H) or for LSTM the pair
            (h, c), and (B, H) or None for zero.
        output_weight: (V, H), ``W_o``.
        output_bias: (V,). Default: zero.
        keys, memory, combine: as in :func:`decode`; None exactly if score is None.
        max_length: the most tokens to emit, ``<stop>`` included.
        beam_size: unfinished hypotheses to follow in each row.
        length_penalty: the exponent, at least 0; 0 compares plain log-probabilities.
        cell, weight, weight_query, weight_v, lengths, input_feeding: as in :func:`decode`.
        score: as in :func:`decode`, or None for no attention.
        need_weights: also return the attention weights.
        min_length, n_best, block_ngrams: as in :class:`pyseq.search.SearchOptions`.
        prefix: (B, P) int64, tokens that each row begins with, 0 beyond the end of a row's.

    Returns:
        ``tokens`` (B, T) without ``<start>`` and ``<stop>``, ``lengths`` (B,), ``scores``
        (B,), log P without the length penalty, and ``weights`` (B, T, S) or None. With
        ``n_best`` above 1 there are B * n_best rows: those of a source together, the best one
        first; what was not found is empty, with a score of minus infinity.

    Raises:
        ValueError: an option is unknown or out of its range, a weight does not go with the
            score, or the state or a layer has the wrong form.
        RuntimeError: a tensor has the wrong shape, dtype or device.
        SearchError: the logits are not finite; a RuntimeError.
        TypeError: what must be a tensor is none.

    Reference:
        As :func:`decode`; Wu et al. 2016, arXiv 1609.08144, eq. 14 (length penalty).
    """
    h_0, c_0, feed, keys, lengths = _own_tokens(
        cell, score, weight, weight_query, weight_v, keys, memory, lengths, output_weight, state
    )
    tokens, sizes, scores, weights = torch.ops.pyseq.generate(
        embedding,
        _flatten(layers),
        keys,
        memory,
        combine,
        output_weight,
        output_bias,
        weight_query,
        weight_v,
        h_0,
        c_0,
        feed,
        _beside("lengths", lengths, embedding),
        cell,
        "none" if score is None else _core(score),
        input_feeding,
        max_length,
        beam_size,
        length_penalty,
        need_weights,
        min_length,
        n_best,
        block_ngrams or 0,
        prefix,
    )
    if scores.isnan().any():
        raise SearchError("the model's logits must be finite, got NaN or infinity")
    kept = need_weights and score is not None
    return GenerateOutput(tokens, sizes, scores, weights if kept else None)


def _own_tokens(
    cell: CellName,
    score: ScoreName | None,
    weight: Tensor | None,
    weight_query: Tensor | None,
    weight_v: Tensor | None,
    keys: Tensor | None,
    memory: Tensor | None,
    lengths: Tensor | None,
    output_weight: Tensor,
    state: DecoderState | tuple[State, Tensor | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``h_0``, ``c_0``, ``feed``, keys and lengths for an operator that runs a decoder on its
    own tokens, checked."""
    _check_option("cell", cell, GATES)
    if score is not None:
        _check_score(score, weight, weight_query, weight_v)
    if score is not None and memory is not None and (keys is not None or score == "location"):
        _check_keys(score, keys)
        check_shape("output_weight", output_weight, "(V, H)", (-1, -1))
        keys, lengths = _core_keys(score, keys, memory, lengths, weight, output_weight.shape[1])
    parts, feed = decoder_parts(cell, state)
    if not parts:
        raise ValueError("state must hold the hidden state before the first token, got None")
    return *_h_and_c(parts), feed, keys, lengths


def scheduled_inputs(
    tokens: Tensor,
    coins: Tensor,
    embedding: Tensor,
    layers: Sequence[LayerWeights | tuple[Tensor | None, ...]],
    state: DecoderState | tuple[State, Tensor | None],
    output_weight: Tensor,
    output_bias: Tensor | None = None,
    keys: Tensor | None = None,
    memory: Tensor | None = None,
    combine: Tensor | None = None,
    *,
    draws: Tensor | None = None,
    cell: CellName = "lstm",
    score: ScoreName | None = "dot",
    weight: Tensor | None = None,
    weight_query: Tensor | None = None,
    weight_v: Tensor | None = None,
    lengths: Tensor | None = None,
    input_feeding: bool = True,
    embedding_masks: Tensor | None = None,
    dropout_masks: Tensor | None = None,
    output_masks: Tensor | None = None,
) -> Tensor:
    """What an attention decoder reads that is shown the truth only now and then.

    At every step the decoder of :func:`decode` reads the embedding of a token, the first one of
    ``tokens``, and gives ``p = softmax(W_o out_t + b)``. The next token is that of ``tokens``
    where the coin is true; elsewhere the likeliest one, or if there are draws the first up to
    which the probabilities add up to more than the draw. ``<pad>`` and ``<start>`` are never
    chosen. There is no gradient; :func:`decode` on the result has that of scheduled sampling.

    Args:
        tokens: (T, B) int64, the truth, ``<start>`` first.
        coins: (T, B) bool, whether the truth is read. Those of the first step do not count.
        embedding, layers, state, output_weight, output_bias, keys, memory, combine: as in
            :func:`generate`.
        draws: (T, B), uniform in [0, 1): draw t decides what is read at step t. Default: the
            likeliest token is read.
        cell, score, weight, weight_query, weight_v, lengths, input_feeding: as in
            :func:`generate`.
        embedding_masks: (T, B, E), what the embeddings are multiplied with.
        dropout_masks: (L-1, T, B, H), as in :func:`decode`.
        output_masks: (T, B, H), what the output layer's input is multiplied with.

    Returns:
        (T, B) int64, what is read. It does not depend on the number of threads.

    Raises:
        ValueError, RuntimeError, TypeError: as :func:`generate`.

    Reference:
        Bengio et al. 2015, arXiv 1506.03099, section 2.4.
    """
    h_0, c_0, feed, keys, lengths = _own_tokens(
        cell, score, weight, weight_query, weight_v, keys, memory, lengths, output_weight, state
    )
    return torch.ops.pyseq.scheduled_inputs(
        tokens,
        coins,
        draws,
        embedding,
        _flatten(layers),
        keys,
        memory,
        combine,
        output_weight,
        output_bias,
        weight_query,
        weight_v,
        h_0,
        c_0,
        feed,
        _beside("lengths", lengths, embedding),
        embedding_masks,
        dropout_masks,
        output_masks,
        cell,
        "none" if score is None else _core(score),
        input_feeding,
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, with the products that the recurrent loops are made of.

    On some processors these are twice as fast as those of torch's library. In float32 and
    float64 on the CPU it is one operator, which can be differentiated any number of times;
    for other dtypes and devices it is :func:`torch.nn.functional.linear`.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,). Default: zero.

    Returns:
        (..., O).

    Raises:
        RuntimeError: a tensor has the wrong shape, dtype or device.
    """
    check_tensor("x", x)
    # Of short numbers torch's library multiplies twice as many at a time, and sums in float32 too.
    short = x.dtype in (torch.float16, torch.bfloat16) and not autocasts(x.device)
    if short or not _fused(x):
        return reference.linear(x, weight, bias)
    product: Tensor = torch.ops.pyseq.linear(x, weight, bias)
    return product


def _fused(x: Tensor) -> bool:
    """Whether there are kernels for the device of ``x``."""
    return x.device.type in ("cpu", "meta")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of an output layer, without ever holding the logits of all rows.

    The mean over the rows n whose target is not ``ignore_index`` of
    ``-sum_v q_nv log softmax_v(W h_n + b)``, where ``q_n`` is ``1 - s`` at the target plus
    ``s / V`` everywhere, for the label smoothing s.

    Ignored rows take no part in any product: padding costs nothing, whatever it holds.
    Where gradients are wanted they are computed in the forward pass. On the CPU this is one
    fused operator; on other devices torch computes the formula, with all logits in memory.

    Args:
        hidden: (N, H).
        weight: (V, H), V at least 1.
        target: (N,) int64, the right symbols, each from 0 to V - 1, or ``ignore_index``.
        bias: (V,). Default: zero.
        ignore_index: the target of rows that do not count.
        label_smoothing: s, the share of the target probability that is spread over all
            symbols, 0 to 1.

    Returns:
        0-dimensional, in nats. If no row counts it is NaN, as in torch, and every gradient
        is zero.

    Raises:
        ValueError: ``label_smoothing`` is out of its range.
        RuntimeError: a tensor has the wrong shape, dtype or device, or a target is no symbol.

    Reference:
        Szegedy et al. 2016, arXiv 1512.00567, section 7 (label smoothing).
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing!r}")
    check_tensor("hidden", hidden)
    if not _fused(hidden):
        return reference.linear_cross_entropy(
            hidden,
            weight,
            target,
            bias,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
    loss: Tensor = torch.ops.pyseq.linear_cross_entropy(
        hidden, weight, target, bias, ignore_index, label_smoothing
    )
    return loss


def _core(score: ScoreName) -> str:
    """The score that is left for the kernels once the keys are projected."""
    return "concat" if score == "concat" else "dot"


def _core_keys(
    score: ScoreName,
    keys: Tensor | None,
    memory: Tensor,
    lengths: Tensor | None,
    weight: Tensor | None,
    query_size: int | None,
    heads: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """The keys with which the score is :func:`_core`, and the lengths that go with them.

    ``query_size`` is Q, which only a score with a ``weight`` needs to know.
    """
    if score == "location":
        assert weight is not None
        check_shape("weight", weight, "(R, Q)", (-1, query_size or 0))
        return position_keys(weight, memory, lengths)
    assert keys is not None
    if score == "general":
        assert weight is not None
        check_shape("keys", keys, "(S, B, A)", (-1, -1, -1))
        check_shape("weight", weight, "(Q, A)", (query_size or 0, keys.shape[-1]))
        check_like("weight", weight, "keys", keys)
        return project_memory(keys, weight, lengths), lengths
    if score == "scaled_dot":
        return scale_keys(keys, heads), lengths
    return keys, lengths


def _check_window(window: int | None) -> None:
    if window is not None:
        check_positive(window=window)


def _check_keys(score: ScoreName, keys: Tensor | None) -> None:
    if (keys is None) != (score == "location"):
        raise ValueError(f"keys must be None for score 'location' and no other, got {score!r}")


def _check_score(
    score: ScoreName,
    weight: Tensor | None,
    weight_query: Tensor | None,
    weight_v: Tensor | None,
) -> None:
    """Check which weights go with ``score``."""
    _check_option("score", score, SCORES)
    if (weight is not None) != (score in ("general", "location")):
        raise ValueError(
            f"weight must be given for score 'general' or 'location' and no other, got {score!r}"
        )
    if (weight_v is not None) != (score == "concat"):
        raise ValueError(f"weight_v must be given for score 'concat' and no other, got {score!r}")
    if weight_query is not None and score != "concat":
        raise ValueError(f"weight_query goes with score 'concat', got {score!r}")


def project_memory(memory: Tensor, weight: Tensor, lengths: Tensor | None) -> Tensor:
    """``W m`` (S, B, A) of every position of ``memory`` (S, B, M), for ``weight`` (A, M).

    Padding is taken for zero. Its keys get no gradient, but in that of the weight this zero
    would meet what the padding holds, which may be NaN.

    Raises:
        RuntimeError: ``lengths`` is not (B,).
    """
    rows = memory.transpose(0, 1)
    lengths = _beside("lengths", lengths, memory)
    if lengths is not None:
        check_shape("lengths", lengths, "(B,)", (rows.shape[0],))
        padded = torch.arange(rows.shape[1], device=rows.device) >= lengths.unsqueeze(1)
        rows = rows.masked_fill(padded.unsqueeze(2), 0)
    # (B, S, .) in memory is what the kernels read.
    return linear(rows, weight).transpose(0, 1)


def scale_keys(keys: Tensor, heads: int = 1) -> Tensor:
    """``k / sqrt(A / N)`` of every key (S, B, A), with which dot is scaled_dot."""
    check_shape("keys", keys, "(S, B, A)", (-1, -1, -1))
    return keys * (heads / max(keys.shape[-1], 1)) ** 0.5


def position_keys(
    weight: Tensor, memory: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The keys with which dot is location: the row of ``weight`` (R, Q) for each position.

    Returns:
        Keys (S, B, Q), and what :func:`position_limit` makes of the lengths.

    Raises:
        RuntimeError: a tensor has the wrong shape, dtype or device.
    """
    check_shape("memory", memory, "(S, B, M)", (-1, -1, -1))
    check_shape("weight", weight, "(R, Q)", (-1, -1))
    check_like("weight", weight, "memory", memory)
    source, batch, _ = memory.shape
    rows = weight[:source]
    if rows.shape[0] < source:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, source - rows.shape[0]))
    return rows.unsqueeze(1).expand(-1, batch, -1), position_limit(weight, memory, lengths)


def position_limit(weight: Tensor, memory: Tensor, lengths: Tensor | None) -> Tensor | None:
    """The valid positions (B,) of each row of ``memory`` (S, B, M) that have a row of ``weight``
    (R, Q); None for all S."""
    if weight.shape[0] >= memory.shape[0]:
        return lengths
    if lengths is None:
        return torch.full(memory.shape[1:2], weight.shape[0], device=memory.device)
    return lengths.clamp(max=weight.shape[0])


def _flatten(layers: Sequence[LayerWeights | tuple[Tensor | None, ...]]) -> list[Tensor]:
    """(w_ih, w_hh, b_ih, b_hh) of every layer in one list, missing biases as zeros."""
    flat: list[Tensor] = []
    for number, layer in enumerate(layers):
        if not isinstance(layer, (tuple, list)) or not 2 <= len(layer) <= 4:
            raise ValueError(
                f"layers[{number}] must be (w_ih, w_hh, b_ih, b_hh), got {kind(layer)}"
            )
        w_ih, w_hh, b_ih, b_hh = LayerWeights(*layer)  # type: ignore[arg-type]  # None: see below
        check_tensor(f"w_ih of layers[{number}]", w_ih)
        check_tensor(f"w_hh of layers[{number}]", w_hh)
        if b_ih is None or b_hh is None:
            zero = w_ih.new_zeros(w_ih.shape[:1], dtype=computing_dtype(w_ih))
            b_ih, b_hh = zero if b_ih is None else b_ih, zero if b_hh is None else b_hh
        flat += [w_ih, w_hh, b_ih, b_hh]
    if not flat:
        raise ValueError("layers must hold at least one layer, got none")
    return flat
