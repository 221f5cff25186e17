# SPDX-License-Identifier: Apache-2.0
"""The attention decoder step by step, where a part of it does more than the operator knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from ..types import (
    AttentionState,
    DecoderOutput,
    DecoderStart,
    DecoderState,
    State,
    attention_parts,
    decoder_parts,
    join_parts,
    state_parts,
)
from ._common import is_bare
from ._masks import dropout_alone
from ._stack import scan_layers
from .score import Positions

if TYPE_CHECKING:
    from .decoder import AttentionDecoder


#: Hidden state, what is there if anything was fed, and what attention remembers.
_Before = tuple[State | None, Tensor | None, AttentionState | None]


class _Step(NamedTuple):
    """What one step gives before context and state are combined."""

    hidden: State
    context: Tensor  # (B, M)
    weights: Tensor | None  # as those of decode, of one step
    attention: AttentionState | None


def decode_stepwise(
    decoder: AttentionDecoder,
    x: Tensor,
    memory: Tensor,
    keys: Tensor,
    lengths: Tensor | None,
    state: DecoderStart | None,
    need_weights: bool,
    dropout_masks: Tensor | None,
    memory_rows: Tensor | None,
) -> DecoderOutput:
    """An attentive decoder, time-major, where calling ``combine`` or ``positions`` is more than
    their products (they have hooks, or were replaced): both are called at each step, and what is
    fed is a part of x."""
    assert decoder.combine is not None
    step_of = _fused_step
    if decoder.positions is not None and not is_bare(decoder.positions, Positions):
        if decoder.history is not None:
            raise RuntimeError(
                "positions must have no hooks in a decoder with a history, got some or another "
                f"forward, and history {decoder.history!r}"
            )
        step_of = _step_by_parts
    parts, fed = decoder_parts(decoder.cell, state)
    step, past = attention_parts(state)
    # What decode takes, and what each call of it returns.
    attention = None if step is None else AttentionState(step, past)
    hidden: State | None = join_parts(parts) if parts else None
    # Read by nobody but for the check that a state which feeds has its attention too.
    unread = None if fed is None else x.new_zeros(x.shape[1], decoder.memory_size)
    feeds_output = decoder.input_feeding and decoder.order == "luong"
    outputs: list[Tensor] = []
    weights: list[Tensor] = []
    for t, x_t in enumerate(x.unbind(0)):
        if feeds_output:
            if fed is None:
                fed = x.new_zeros(x.shape[1], decoder.fed_size)
            x_t = torch.cat([x_t, fed], 1)
        masks = None if dropout_masks is None else dropout_masks[:, t : t + 1]
        before = (hidden, unread, attention)
        now = step_of(
            decoder,
            x_t.unsqueeze(0),
            memory,
            keys,
            lengths,
            before,
            need_weights,
            masks,
            memory_rows,
        )
        hidden, attention = now.hidden, now.attention
        h = state_parts(decoder.cell, hidden)[0][-1]
        outputs.append(decoder.combine(torch.cat([now.context, h], 1)).tanh())
        fed = outputs[-1] if decoder.feed == "output" else now.context
        if now.weights is not None:
            weights.append(now.weights[0])
    assert hidden is not None  # there is a step
    assert fed is not None
    return DecoderOutput(
        torch.stack(outputs),
        torch.stack(weights) if need_weights else None,
        DecoderState(hidden, fed, attention),
    )


def _fused_step(
    decoder: AttentionDecoder,
    x: Tensor,
    memory: Tensor,
    keys: Tensor,
    lengths: Tensor | None,
    before: _Before,
    need_weights: bool,
    dropout_masks: Tensor | None,
    memory_rows: Tensor | None,
) -> _Step:
    """The operator's step (1, B, .), whose output is not read."""
    unused = x.new_zeros(decoder.hidden_size, decoder.memory_size + decoder.hidden_size)
    result = decoder._decode(
        x,
        memory,
        keys,
        unused,
        lengths,
        cast(DecoderStart, before),
        need_weights,
        dropout_masks,
        memory_rows,
        input_feeding=decoder.order == "bahdanau",
        feed="context",
    )
    last, context, attention = result.state
    return _Step(last, context, result.weights, attention)


def _step_by_parts(
    decoder: AttentionDecoder,
    x: Tensor,
    memory: Tensor,
    keys: Tensor,
    lengths: Tensor | None,
    before: _Before,
    need_weights: bool,
    dropout_masks: Tensor | None,
    memory_rows: Tensor | None,
) -> _Step:
    """The cells, and before or after them attention, which has no history."""
    assert decoder.score is not None
    if memory_rows is not None:
        memory, keys = memory[:, memory_rows], keys[:, memory_rows]
        lengths = None if lengths is None else lengths[memory_rows]
    hidden, _, attention = before
    parts = state_parts(decoder.cell, hidden)
    query = parts[0][-1:] if parts else x.new_zeros(1, x.shape[1], decoder.hidden_size)

    def run_cells(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        layers = [(*layer, None, None) for layer in decoder.layer_weights()]
        masks = None if dropout_masks is None else dropout_alone(dropout_masks)
        top, last, _ = scan_layers(x, layers, parts, cell=decoder.cell, masks=masks)
        return top, last

    if decoder.order == "luong":
        query, parts = run_cells(x)
    # Positions are predicted within the limit, as by the operator.
    limit = decoder.score.limit(memory, lengths)
    found = decoder.score.attend(
        query,
        keys,
        memory,
        limit,
        positions=decoder.positions,
        window_size=decoder.window_size,
        step=None,
        need_weights=need_weights,
    )
    if decoder.order == "bahdanau":
        _, parts = run_cells(torch.cat([x, found.context], 2))
    last = join_parts(parts)
    attention = attention or decoder.start(last).attention
    assert attention is not None  # there is a window
    return _Step(last, found.context[0], found.weights, AttentionState(attention.step + 1, None))
