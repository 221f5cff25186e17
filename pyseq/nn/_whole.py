# SPDX-License-Identifier: Apache-2.0
"""A decoder with its keys in one call, past Python and the dispatcher."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..functional import decoding
from ..types import DecoderOutput, DecoderStart, DecoderState
from ._common import all_are_hooked
from .score import Score

if TYPE_CHECKING:
    from .decoder import AttentionDecoder

#: Scores whose keys are the memory, or a product of it and nothing else.
_SCORES = ("dot", "general", "concat")
#: What a call in one makes no use of.
_LEFT_OUT = ("project", "limit")


def is_whole(score: torch.nn.Module | None) -> TypeGuard[Score]:
    """Whether calls in one may make the keys of ``score``."""
    return (
        type(score) is Score
        and score.name in _SCORES
        and score._parameters.get("weight_history") is None
        and vars(score).keys().isdisjoint(_LEFT_OUT)
    )


def decode_whole(
    decoder: AttentionDecoder,
    names: list[str],
    x: Tensor,
    memory: Tensor | None,
    keys: Tensor | None,
    lengths: Tensor | None,
    state: DecoderStart | None,
    need_weights: bool,
) -> DecoderOutput | None:
    """What ``decoder`` returns, steps first, where nothing looks on: around the operators Python
    takes as long as all steps of a small decoder. None if they have to be called.

    Args:
        names: of the weights of its layers, in the order of the operators.
        x, memory, keys, lengths, state, need_weights: as its ``forward`` takes them.
    """
    if is_dynamo_compiling():  # first, since it follows none of what is asked below
        return None
    score, combine = decoder._modules.get("score"), decoder._modules.get("combine")
    if (
        not is_whole(score)
        or type(combine) is not torch.nn.Linear
        or not (decoder.window is decoder.history is None)
        or (decoder.training and decoder.dropout > 0)
        or all_are_hooked()
    ):
        return None
    parts = decoding.decode_whole(
        decoder,
        decoder._parameters,
        names,
        score,
        combine,
        x,
        memory,
        keys,
        lengths,
        state,
        decoder.cell,
        decoder.order,
        decoder.feed,
        score.heads,
        decoder.input_feeding,
        decoder.batch_first,
        decoder.training,
        need_weights,
    )
    if parts is None:
        return None
    output, weights, hidden, feed = parts
    return DecoderOutput(output, weights, DecoderState(hidden, feed))
