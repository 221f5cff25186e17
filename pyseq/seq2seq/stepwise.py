# SPDX-License-Identifier: Apache-2.0
"""What scheduled sampling reads, step by step, where no operator finds it out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..extra import Conditions
from ..search import choose
from ..types import DecoderStart
from .masks import Masks

if TYPE_CHECKING:
    from .decoder import Decoder


def inputs_step_by_step(
    decoder: Decoder,
    tokens: Tensor,
    coins: Tensor,
    draws: Tensor | None,
    memory: Tensor | None,
    *,
    lengths: Tensor | None,
    state: DecoderStart | None,
    masks: Masks,
    conditions: Conditions,
) -> Tensor:
    """See :func:`pyseq.functional.scheduled_inputs`; for any decoder."""
    fed = tokens.clone()
    keys = None if memory is None else decoder.rnn.project(memory, lengths)
    steps = len(tokens) - 1
    if tokens.device.type == "cpu":  # to look elsewhere would wait
        # Where all rows read the truth to the end nothing is to be found out.
        ends = (~coins).any(1).nonzero()
        steps = int(ends.max()) if len(ends) else 0
    for t in range(steps):
        hidden, decoded, x = decoder._hidden(
            fed[t].unsqueeze(1),
            memory,
            lengths=lengths,
            state=state,
            keys=keys,
            masks=masks.step(t),
            conditions=conditions.step(t),
        )
        predicted = decoder._predict(hidden, x, memory, conditions)[:, 0]
        chosen = choose(predicted, None if draws is None else draws[t + 1])
        fed[t + 1] = torch.where(coins[t + 1], fed[t + 1], chosen)
        state = decoded.state
    return fed
