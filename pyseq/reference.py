# SPDX-License-Identifier: Apache-2.0
"""The specification of pyseq: every operator in plain torch, one step at a time.

The fused operators of ``pyseq.functional`` have these signatures and must agree with
these functions in values and gradients. Written to be read, not to be fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from ._packed import is_quantized, unpack
from .types import (
    DIAGONAL,
    SCAN_GATES,
    STATES,
    AttendHistoryOutput,
    AttendOutput,
    AttentionState,
    CellName,
    DecoderOutput,
    DecoderStart,
    DecoderState,
    FeedName,
    HistoryName,
    LayerNormWeights,
    LayerWeights,
    OrderName,
    ScanExtras,
    ScanOutput,
    ScanStates,
    ScoreName,
    State,
    attention_parts,
    decoder_parts,
    join_parts,
    state_parts,
)


def without_padding(rows: Tensor, lengths: Tensor | None) -> Tensor:
    """``rows`` (T, B, .) with zeros from ``lengths[b]`` on: what padding holds, NaN even,
    must not matter, and a product with zero would let it through."""
    if lengths is None:
        return rows
    steps = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1)
    return rows.masked_fill((steps >= lengths.to(rows.device)).unsqueeze(2), 0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, where the weight may be quantized.

    Of int8 weights ``scale_r q_rk`` with k in runs of columns, each run is multiplied with
    ``unit * round(x / unit)``, where ``unit`` is the largest magnitude of x in that run over
    127: ``y_r = sum_runs unit * scale_r * sum_k q_rk round(x_k / unit)``.
    """
    if not is_quantized(weight):
        return torch.nn.functional.linear(x, weight, bias)
    runs = unpack(weight)
    y = x.new_zeros(*x.shape[:-1], weight.shape[0])
    for part, run in zip(x.split([run.values.shape[1] for run in runs], -1), runs, strict=True):
        values = run.values.to(x.dtype)
        if run.scales is None:
            y = y + part @ values.t()
            continue
        unit = part.abs().amax(-1, keepdim=True) / 127
        whole = torch.where(unit > 0, torch.round(part / unit), 0 * unit)
        y = y + unit * run.scales.to(x.dtype) * (whole @ values.t())
    return y if bias is None else y + bias


def cell_step(
    cell: CellName,
    x_gates: Tensor,
    r_gates: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ch: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """New ``(h, c)`` of one step, before any projection.

    ``x_gates`` and ``r_gates`` (B, G*H) are the input's and the recurrent part of the
    pre-activations; they stay apart because the GRU's candidate gate multiplies only
    the recurrent part: ``n = tanh(x_n + r * r_n)``, as cuDNN has it (Cho et al. 2014,
    arXiv 1406.1078, apply ``r`` before the product). An IndRNN differs from an RNN in its
    ``r_gates`` only. ``w_ch`` (3*H,) are an LSTM's peepholes, those of i, f and o.
    """
    if cell in ("rnn_tanh", "indrnn_tanh"):
        return torch.tanh(x_gates + r_gates), None
    if cell in ("rnn_relu", "indrnn_relu"):
        return torch.relu(x_gates + r_gates), None
    if cell == "gru_reset_before":
        r_z, r_n = r_gates.chunk(3, -1)[1:]
        _, x_z, x_n = x_gates.chunk(3, -1)
        update = torch.sigmoid(x_z + r_z)
        return (1 - update) * torch.tanh(x_n + r_n) + update * h, None
    if cell == "gru":
        x_r, x_z, x_n = x_gates.chunk(3, -1)
        r_r, r_z, r_n = r_gates.chunk(3, -1)
        reset, update = torch.sigmoid(x_r + r_r), torch.sigmoid(x_z + r_z)
        candidate = torch.tanh(x_n + reset * r_n)
        return (1 - update) * candidate + update * h, None
    i, f, g, o = (x_gates + r_gates).chunk(4, -1)
    assert c is not None
    if cell in ("slstm_sigmoid", "slstm_exp"):
        return slstm_step(i, f if cell == "slstm_exp" else logsigmoid(f), g, o, c)
    w_i, w_f, w_o = (0, 0, 0) if w_ch is None else w_ch.chunk(3)
    c_prev = c
    c = torch.sigmoid(f + w_f * c_prev) * c_prev + torch.sigmoid(i + w_i * c_prev) * torch.tanh(g)
    return torch.sigmoid(o + w_o * c) * torch.tanh(c), c


def slstm_step(
    log_i: Tensor, log_f: Tensor, z: Tensor, o: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """h and the states c, n, m side by side (B, 3*H) after a step from ``states``.

    Beck et al. 2024, arXiv 2405.04517, eq. 8 to 17. An empty state, ``n = 0``, has no scale.
    """
    c, n, m = states.chunk(3, -1)
    from_state = log_f + m.masked_fill(n == 0, -torch.inf)
    scale = torch.where(from_state < log_i, log_i, from_state)
    f, i = torch.exp(from_state - scale), torch.exp(log_i - scale)
    c, n = f * c + i * torch.tanh(z), f * n + i
    return torch.sigmoid(o) * c / n, torch.cat((c, n, scale), -1)


def recurrent_part(
    cell: CellName, x_gates: Tensor, h: Tensor, w_hh: Tensor, b_hh: Tensor | None
) -> Tensor:
    """``r_gates`` (B, G*H): the product with ``w_hh``; of an IndRNN that with a diagonal, of an
    sLSTM one for each head. In ``"gru_reset_before"`` the candidate's is with ``r * h``."""
    if cell in DIAGONAL:
        return h * w_hh + (0 if b_hh is None else b_hh)
    if cell == "gru_reset_before":
        r_gates = linear(h, w_hh, b_hh)
        hidden = h.shape[1]
        gated = torch.sigmoid((x_gates + r_gates)[:, :hidden]) * h
        last = slice(2 * hidden, None)
        candidate = linear(gated, w_hh[last], None if b_hh is None else b_hh[last])
        return torch.cat((r_gates[:, : 2 * hidden], candidate), -1)
    if w_hh.shape[1] == h.shape[1] or is_quantized(w_hh):
        return linear(h, w_hh, b_hh)
    size = w_hh.shape[1]
    heads = w_hh.unflatten(0, (-1, h.shape[1] // size, size))  # (G, heads, H / heads, H / heads)
    r_gates = torch.einsum("gnij,bnj->bgni", heads, h.unflatten(1, (-1, size))).flatten(1)
    return r_gates if b_hh is None else r_gates + b_hh


def _normed(rows: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """Layer normalisation: each row with mean 0 and variance 1, scaled and shifted."""
    return torch.nn.functional.layer_norm(rows, rows.shape[-1:], gain, bias, eps=1e-5)


def _zone_out(share: Tensor | None, t: int, old: Tensor, new: Tensor) -> Tensor:
    """``new`` with the share of ``old`` that zoneout keeps at step t."""
    if share is None:
        return new
    own = share[t if share.shape[0] > 1 else 0]
    return own * old + (1 - own) * new


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
    """One recurrent layer in one direction; see :func:`pyseq.functional.scan`.

    ``keep_every`` changes what is kept in memory, which here is everything, and no result.
    """
    steps, batch, _ = x.shape
    x = without_padding(x, lengths)
    parts = state_parts(cell, state)
    hidden = w_hh.shape[0] // SCAN_GATES[cell]
    h = parts[0] if parts else x.new_zeros(batch, hidden if w_hr is None else w_hr.shape[0])
    c: Tensor | None = None
    if cell in STATES:
        c = torch.cat(parts[1:], -1) if parts else x.new_zeros(batch, len(STATES[cell]) * hidden)
    reset_parts = state_parts(cell, reset_state)

    outputs: list[Tensor] = [h] * steps
    cells: list[Tensor] = [h] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        valid = torch.ones(batch, 1, dtype=torch.bool, device=x.device)
        if lengths is not None:
            valid = (t < lengths.to(x.device)).unsqueeze(1)
        if resets is not None:
            reset = resets[t].unsqueeze(1).to(x.device) & valid
            h = torch.where(reset, reset_parts[0] if reset_parts else torch.zeros_like(h), h)
            if c is not None:
                reset_c = torch.cat(reset_parts[1:], -1) if reset_parts else torch.zeros_like(c)
                c = torch.where(reset, reset_c, c)
        seen = h if h_mask is None else h_mask * h
        if layer_norm is None:
            x_gates = linear(x[t], w_ih, b_ih)
            r_gates = recurrent_part(cell, x_gates, seen, w_hh, b_hh)
            new_h, new_c = cell_step(cell, x_gates, r_gates, h, c, w_ch)
        else:
            norm = LayerNormWeights(*layer_norm)
            x_gates = _normed(linear(x[t], w_ih), norm.gain_ih, b_ih)
            r_gates = _normed(linear(seen, w_hh), norm.gain_hh, b_hh)
            new_h, new_c = cell_step(cell, x_gates, r_gates, h, c)
            if new_c is not None:
                output_gate = torch.sigmoid((x_gates + r_gates).chunk(4, -1)[3])
                new_h = output_gate * torch.tanh(_normed(new_c, norm.gain_c, norm.bias_c))
        if w_hr is not None:
            new_h = linear(new_h, w_hr)
        new_h = _zone_out(zoneout_h, t, h, new_h)
        if c is not None and new_c is not None:
            new_c = _zone_out(zoneout_c, t, c, new_c)
        h = torch.where(valid, new_h, h)
        c = None if c is None or new_c is None else torch.where(valid, new_c, c)
        outputs[t] = torch.where(valid, h, torch.zeros_like(h))
        if c is not None:
            cells[t] = torch.where(valid, c, torch.zeros_like(c))
    output = torch.stack(outputs)
    last = join_state(cell, h, c)
    if not return_states:
        return ScanOutput(output, last)
    all_c = None if c is None else torch.stack(cells)
    return ScanStates(output, last, join_state(cell, output, all_c))


def step(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    state: State | None = None,
    *,
    cell: CellName = "lstm",
    w_ch: Tensor | None = None,
    layer_norm: LayerNormWeights | tuple[Tensor, ...] | None = None,
) -> State:
    """The state after one step; see :func:`pyseq.functional.step`."""
    whole = scan(
        x.unsqueeze(0),
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        state=state,
        cell=cell,
        w_ch=w_ch,
        layer_norm=layer_norm,
    )
    return whole.state


def join_state(cell: CellName, h: Tensor, c: Tensor | None) -> State:
    """A state of h and what is beside it, those side by side in ``c``."""
    return h if c is None else (h, *c.chunk(len(STATES[cell]), -1))


def scan_both(
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    weights_reverse: tuple[Tensor | None, ...],
    state: State | None = None,
    *,
    cell: CellName = "lstm",
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    extras: tuple[ScanExtras, ScanExtras] | None = None,
) -> ScanOutput:
    """One recurrent layer in both directions; see :func:`pyseq.functional.scan_both`."""
    parts = state_parts(cell, state)
    outputs, states = [], []
    for direction, all_weights in enumerate((weights, weights_reverse)):
        w_ih, w_hh, b_ih, b_hh, w_hr, *w_ch = all_weights
        assert w_ih is not None
        assert w_hh is not None
        own = tuple(part[direction] for part in parts)
        result = scan(
            x,
            w_ih,
            w_hh,
            b_ih,
            b_hh,
            w_hr,
            join_parts(own) if own else None,
            cell=cell,
            lengths=lengths,
            resets=resets,
            reverse=direction == 1,
            w_ch=w_ch[0] if w_ch else None,
            **({} if extras is None else ScanExtras(*extras[direction])._asdict()),
        )
        outputs.append(result.output)
        states.append(state_parts(cell, result.state))
    last = tuple(torch.stack(part) for part in zip(*states, strict=True))
    return ScanOutput(torch.cat(outputs, -1), join_parts(last))


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
    """Attention of every query over ``memory``; see :func:`pyseq.functional.attend`."""
    steps, source = query.shape[0], memory.shape[0]
    if score == "concat" and weight_query is not None:
        query = linear(query, weight_query)
    centers = positions
    if window is not None and positions is None:
        centers = torch.arange(steps, device=query.device).unsqueeze(1)
        centers = centers if step is None else centers + step.to(query.device)
    context, weights = _attention(
        query,
        score_keys(score, keys, memory, lengths, weight, heads),
        without_padding(memory, lengths),
        _seen(memory, with_weight(score, lengths, weight, memory), centers, window),
        weight_v=weight_v,
        heads=heads,
        gaussian=None if positions is None else _gaussian(source, positions, window),
    )
    weights = weights.squeeze(2) if heads == 1 else weights
    return AttendOutput(context, weights if need_weights else None)


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
    """Attention that sees its past weights; see :func:`pyseq.functional.attend_history`."""
    (source, batch, size), steps = memory.shape, query.shape[0]
    past = query.new_zeros(batch, heads, source) if past is None else past
    contexts = [memory.new_zeros(0, batch, size)]
    all_weights = [query.new_zeros(0, batch, *(() if heads == 1 else (heads,)), source)]
    for t in range(steps):
        number = torch.full((batch,), t, device=query.device)
        counts = window is not None and positions is None
        context, weights = attend(
            query[t : t + 1],
            keys + history_keys(past, weight_history),
            memory,
            lengths,
            score="concat",
            weight_query=weight_query,
            weight_v=weight_v,
            heads=heads,
            window=window,
            positions=None if positions is None else positions[t : t + 1],
            step=None if not counts else number if step is None else number + step.to(query.device),
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


def score_keys(
    score: ScoreName,
    keys: Tensor | None,
    memory: Tensor,
    lengths: Tensor | None,
    weight: Tensor | None,
    heads: int,
) -> Tensor:
    """The keys (S, B, A) with which the score is dot, or for concat additive."""
    if score == "location":
        # a_t = softmax(W h_t): the key of a position is its row of W, whatever is there.
        assert weight is not None
        source, batch, _ = memory.shape
        rows = torch.nn.functional.pad(weight, (0, 0, 0, source))[:source]
        return rows.unsqueeze(1).expand(-1, batch, -1)
    assert keys is not None
    keys = without_padding(keys, lengths)
    if score == "general":
        assert weight is not None
        return linear(keys, weight)
    return keys / (keys.shape[-1] / heads) ** 0.5 if score == "scaled_dot" else keys


def with_weight(
    score: ScoreName, lengths: Tensor | None, weight: Tensor | None, memory: Tensor
) -> Tensor | None:
    """How many positions of each row (B,) may have a weight: for the score location none past
    the rows of its matrix. Local-p predicts its positions among these."""
    if score != "location":
        return lengths
    assert weight is not None
    if lengths is None:
        lengths = torch.full(memory.shape[1:2], memory.shape[0], device=memory.device)
    return lengths.clamp(max=weight.shape[0])


def _seen(
    memory: Tensor, lengths: Tensor | None, centers: Tensor | None, window: int | None
) -> Tensor:
    """Which positions of ``memory`` (S, B, M) each query sees: (T or 1, B, S)."""
    source, batch, _ = memory.shape
    positions = torch.arange(source, device=memory.device)
    seen = torch.ones(1, batch, source, dtype=torch.bool, device=memory.device)
    if lengths is not None:
        seen = seen & (positions < lengths.to(memory.device).unsqueeze(1))
    if centers is not None and window is not None:
        # Not within: NaN is near everything, so that it is seen in the result.
        seen = seen & ~((positions - centers.unsqueeze(2)).abs() > window)
    return seen


def predict_positions(
    query: Tensor,
    weight: Tensor,
    weight_v: Tensor,
    source: int,
    lengths: Tensor | None = None,
) -> Tensor:
    """Centres (T, B) of windows; see :func:`pyseq.functional.predict_positions`."""
    share = torch.sigmoid(torch.tanh(linear(query, weight)) @ weight_v)
    return share * (source if lengths is None else lengths.to(query.device))


def _gaussian(source: int, centers: Tensor, window: int | None) -> Tensor:
    """``exp(-(s - p)^2 / (2 sigma^2))`` (T, B, S) with ``sigma = D / 2`` around ``centers``."""
    assert window is not None
    distance = torch.arange(source, device=centers.device) - centers.unsqueeze(2)
    return torch.exp(-distance.square() / (2 * (window / 2) ** 2))


def _attention(
    query: Tensor,
    keys: Tensor,
    memory: Tensor,
    seen: Tensor,
    *,
    weight_v: Tensor | None = None,
    heads: int = 1,
    gaussian: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``context`` (T, B, M) and weights (T, B, N, S) of N heads, each of which has its own run
    of the components of query, keys and memory."""

    def split(tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (heads, tensor.shape[-1] // heads))

    if weight_v is None:
        scores = torch.einsum("tbna,sbna->tbns", split(query), split(keys))
    else:
        # (T, B, N, S, A) is what the fused operator never builds.
        energies = torch.tanh(split(query).unsqueeze(3) + split(keys).permute(1, 2, 0, 3))
        scores = torch.einsum("tbnsa,na->tbns", energies, split(weight_v))
    seen = seen.unsqueeze(2)
    # A finite mask keeps rows without any position free of NaN; the product with `seen` then
    # makes the weights of what is not seen, and of such rows, exactly zero.
    weights = torch.softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min), -1) * seen
    if gaussian is not None:
        weights = weights * gaussian.unsqueeze(2)
    return torch.einsum("tbns,sbnm->tbnm", weights, split(memory)).flatten(2), weights


def stack_step(
    cell: CellName,
    layers: Sequence[LayerWeights],
    below: Tensor,
    h: list[Tensor],
    c: list[Tensor],
    dropout_masks: Tensor | None = None,
) -> None:
    """One step of stacked cells: ``h`` and ``c`` hold each layer's state before and after."""
    for k, layer in enumerate(layers):
        x_gates = linear(below, layer.w_ih, layer.b_ih)
        r_gates = linear(h[k], layer.w_hh, layer.b_hh)
        h[k], new_c = cell_step(cell, x_gates, r_gates, h[k], c[k])
        c[k] = c[k] if new_c is None else new_c
        below = h[k]
        if dropout_masks is not None and k + 1 < len(layers):
            below = below * dropout_masks[k]


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
    """A whole attention decoder; see :func:`pyseq.functional.decode`."""
    weights_of = [LayerWeights(*layer) for layer in layers]
    if memory_rows is not None:
        keys = None if keys is None else keys[:, memory_rows]
        memory = memory[:, memory_rows]
        lengths = None if lengths is None else lengths[memory_rows]
    (source, batch, _), size = memory.shape, combine.shape[0]
    keys = score_keys(score, keys, memory, lengths, weight, heads)
    lengths = with_weight(score, lengths, weight, memory)
    memory = without_padding(memory, lengths)
    parts, fed = decoder_parts(cell, state)
    zeros = x.new_zeros(len(weights_of), batch, size)
    h_0, c_0 = (*parts, zeros, zeros)[:2]
    h, c = list(h_0.unbind(0)), list(c_0.unbind(0))
    if fed is None:
        fed = x.new_zeros(batch, size if feed == "output" else memory.shape[2])
    step, given = attention_parts(state)
    step = torch.zeros(batch, dtype=torch.int64, device=x.device) if step is None else step
    past = x.new_zeros(batch, heads, source) if given is None else given

    def attend_with(h: Tensor, number: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Context (B, M) and weights (B, N, S) of the query made of ``h`` (B, H)."""
        query = h if weight_query is None else linear(h, weight_query)
        centers = None if window is None else number.unsqueeze(0)
        gaussian = None
        if weight_position is not None and weight_position_v is not None:
            centers = predict_positions(
                h.unsqueeze(0), weight_position, weight_position_v, source, lengths
            )
            gaussian = _gaussian(source, centers, window)
        now = keys if weight_history is None else keys + history_keys(past, weight_history)
        seen = _seen(memory, lengths, centers, window)
        context, weights = _attention(
            query.unsqueeze(0),
            now,
            memory,
            seen,
            weight_v=weight_v,
            heads=heads,
            gaussian=gaussian,
        )
        return context[0], weights[0]

    outputs, all_weights = [], []
    for t, x_t in enumerate(x.unbind(0)):
        masks = None if dropout_masks is None else dropout_masks[:, t]
        if order == "bahdanau":
            fed, weights = attend_with(h[-1], step + t, past)
        below = torch.cat([x_t, fed], -1) if input_feeding else x_t
        stack_step(cell, weights_of, below, h, c, masks)
        if order == "bahdanau":
            context = fed
        else:
            context, weights = attend_with(h[-1], step + t, past)
        outputs.append(torch.tanh(linear(torch.cat([context, h[-1]], -1), combine)))
        fed = outputs[-1] if feed == "output" else context
        past = past + weights if history == "cumulative" else weights
        all_weights.append(weights.squeeze(1) if heads == 1 else weights)
    h_n = torch.stack(h)
    hidden = (h_n, torch.stack(c)) if cell == "lstm" else h_n
    attention = None
    if window is not None or history is not None:
        attention = AttentionState(step + len(x), None if history is None else past)
    return DecoderOutput(
        torch.stack(outputs),
        torch.stack(all_weights) if need_weights else None,
        DecoderState(hidden, fed, attention),
    )


def history_keys(past: Tensor, weight_history: Tensor) -> Tensor:
    """What past weights (B, N, S) add to the keys (S, B, A): a convolution over positions,
    ``sum_j U_j past_{s + j - (K - 1) / 2}`` with U (A, K), zero beyond both ends."""
    (_, heads, source), taps = past.shape, weight_history.shape[1]
    # With one more at the end, so that none is too few.
    around = torch.nn.functional.pad(past, (taps // 2, taps // 2 + 1)).unfold(2, taps, 1)
    around = around[:, :, :source]
    own = weight_history.unflatten(0, (heads, weight_history.shape[0] // heads))
    return torch.einsum("bnsk,nak->sbna", around, own).flatten(2)


def coverage_loss(weights: Tensor, past: Tensor | None = None) -> Tensor:
    """What is attended to again; see :func:`pyseq.functional.coverage_loss`."""
    covered = torch.zeros_like(weights[0]) if past is None else past
    losses = []
    for step in weights:
        losses.append(torch.minimum(step, covered).sum(-1))
        covered = covered + step
    return torch.stack(losses)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of an output layer; see :func:`pyseq.functional.linear_cross_entropy`."""
    # What ignored rows hold, NaN even, must not matter, and a product would let it through.
    ignored = (target == ignore_index).unsqueeze(1)
    return cross_entropy(
        linear(hidden.masked_fill(ignored, 0), weight, bias),
        target,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


if TYPE_CHECKING:
    from .reference_search import generate as generate
    from .reference_search import scheduled_inputs as scheduled_inputs
else:

    def __getattr__(name: str) -> Callable[..., object]:
        """What stands a floor above this module, found only when it is asked for."""
        if name in ("generate", "scheduled_inputs"):
            from . import reference_search

            return getattr(reference_search, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
