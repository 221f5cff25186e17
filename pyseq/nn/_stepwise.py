# SPDX-License-Identifier: Apache-2.0
"""The attention decoder step by step, where a part of it does more than the operator knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

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

if TYPE_CHECKING:
    from .decoder import AttentionDecoder


def decode_stepwise(
    decoder: AttentionDecoder,
    x: Tensor,
    memory: Tensor,
    keys: Tensor,
    lengths: Tensor | None,
    state: DecoderStart | None,
    need_weights: bool,
    dropout_masks: Tensor | None,
) -> DecoderOutput:
    """An attentive decoder where calling ``combine`` is more than a product (it has
    hooks, or was replaced): the operator gives the context of each step, which is combined
    with the state outside of it, and what is fed is a part of x."""
    assert decoder.combine is not None
    parts, fed = decoder_parts(decoder.cell, state)
    step, past = attention_parts(state)
    # What decode takes, and what each call of it returns.
    attention = None if step is None else AttentionState(step, past)
    hidden: State | None = join_parts(parts) if parts else None
    feeds_output = decoder.input_feeding and decoder.order == "luong"
    # Read by nobody but for the check that a state which feeds has its attention too.
    unread = None if fed is None else x.new_zeros(x.shape[1], decoder.memory_size)
    unused = x.new_zeros(decoder.hidden_size, decoder.memory_size + decoder.hidden_size)
    outputs: list[Tensor] = []
    weights: list[Tensor] = []
    for t, x_t in enumerate(x.unbind(0)):
        if feeds_output:
            if fed is None:
                fed = x.new_zeros(x.shape[1], decoder.fed_size)
            x_t = torch.cat([x_t, fed], 1)
        now = decoder._decode(
            x_t.unsqueeze(0),
            memory,
            keys,
            unused,
            lengths,
            cast(DecoderStart, (hidden, unread, attention)),
            need_weights,
            None if dropout_masks is None else dropout_masks[:, t : t + 1],
            input_feeding=decoder.order == "bahdanau",
            feed="context",
        )
        last, context, attention = now.state
        hidden, h = last, state_parts(decoder.cell, last)[0][-1]
        outputs.append(decoder.combine(torch.cat([context, h], 1)).tanh())
        fed = outputs[-1] if decoder.feed == "output" else context
        if now.weights is not None:
            weights.append(now.weights[0])
    assert fed is not None  # there is a step
    return DecoderOutput(
        torch.stack(outputs),
        torch.stack(weights) if need_weights else None,
        DecoderState(last, fed, attention),
    )
