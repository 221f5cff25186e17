# SPDX-License-Identifier: Apache-2.0
"""What is one operator in the models: the decoder's loops and the loss; and where it is not."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import functional
from .._checks import check_smoothing
from ..nn import AttentionDecoder, Positions, Score
from ..nn._common import is_bare, weights_now
from ..nn._masks import DrawnMasks
from ..types import DecoderStart
from .masks import Masks

if TYPE_CHECKING:
    from .decoder import Decoder


def is_plain(module: torch.nn.Module, kind: type[torch.nn.Module]) -> bool:
    """Whether calling the module is its class's ``forward`` and nothing else, on weights that
    the operators can read: those of other classes of tensors may compute otherwise."""
    if type(module) is not kind:
        return False
    own = vars(module)
    if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return False
    # A loop: this is asked before every search, of which the smallest take 100 µs.
    for weight in own["_parameters"].values():
        if weight is None:
            continue
        if type(weight) is not torch.nn.Parameter or not weight.is_cpu:
            return False
        if not weight.is_floating_point():
            return False
    return True


def attends_plainly(rnn: torch.nn.Module | None) -> bool:
    """Whether a decoder's layers and attention are in all parts what the operators compute."""
    if type(rnn) is not AttentionDecoder or not is_plain(rnn, AttentionDecoder):
        return False
    own = rnn._modules
    for name, expected in (
        ("score", Score),
        ("combine", torch.nn.Linear),
        ("positions", Positions),
    ):
        module = own.get(name)
        if module is not None and not is_plain(module, expected):
            return False
    return True


def options_of(rnn: AttentionDecoder) -> dict[str, Any]:
    """How such a decoder attends, as the operators that make their own steps are told."""
    score, positions = rnn.score, rnn.positions
    query = v = past = None
    if score is not None:
        query, v, past = weights_now(score, ("weight_query", "weight_v", "weight_history"))
    return {
        "cell": rnn.cell,
        "score": None if score is None else score.fused,
        "weight_query": query,
        "weight_v": v,
        "weight_history": past,
        "weight_position": None if positions is None else positions.weight,
        "weight_position_v": None if positions is None else positions.weight_v,
        "order": rnn.order,
        "input_feeding": rnn.input_feeding,
        "feed": rnn.feed,
        "heads": 1 if score is None else score.heads,
        "window": rnn.window_size,
        "history": rnn.history,
    }


def exact_results(weight: Tensor) -> AbstractContextManager[object]:
    """Where the operators read weights like that, and give or take float32 beside them.

    They compute in float32 whatever the weights are, but round to their dtype what comes out,
    and want draws of it: too few digits for a score, or for a draw among many tokens. Under
    autocast they neither round nor mind.
    """
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return nullcontext()
    return torch.autocast(weight.device.type, torch.bfloat16)


def output_loss(
    output: torch.nn.Module,
    hidden: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The cross entropy of an output layer: :func:`pyseq.functional.linear_cross_entropy`, or
    where calling the layer is more than a product, that of what it gives.

    Args:
        hidden: (..., H).
        target: (...) int64.
    """
    if is_bare(output, torch.nn.Linear):
        return functional.linear_cross_entropy(
            hidden.flatten(0, -2),
            output.weight,
            target.flatten(),
            output.bias,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
    check_smoothing(label_smoothing)
    # What ignored rows hold, NaN even, must not matter.
    logits = output(hidden.masked_fill((target == ignore_index).unsqueeze(-1), 0))
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2),
        target.flatten(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


def scheduled_inputs(
    decoder: Decoder,
    tokens: Tensor,
    coins: Tensor,
    draws: Tensor | None,
    memory: Tensor | None,
    *,
    lengths: Tensor | None,
    state: DecoderStart,
    masks: Masks,
) -> Tensor:
    """See :func:`pyseq.functional.scheduled_inputs`; for one that ``is_fused``."""
    rnn = decoder.rnn
    assert isinstance(rnn, AttentionDecoder)  # or it is not fused
    score, combine = rnn.score, rnn.combine
    keys = limit = None
    if score is None:
        memory = None
    elif memory is not None:
        keys, limit = rnn.project(memory, lengths), score.limit(memory, lengths)
    assert not isinstance(masks.layers, DrawnMasks)  # which only other decoders draw
    with exact_results(decoder.embedding.weight):
        return functional.scheduled_inputs(
            tokens,
            coins,
            decoder.embedding.weight,
            rnn.layer_weights(),
            state,
            decoder.output.weight,
            decoder.output.bias,
            keys,
            memory,
            None if combine is None else combine.weight,
            draws=draws,
            lengths=limit,
            embedding_masks=masks.embedding,
            dropout_masks=masks.layers,
            output_masks=masks.output,
            **options_of(rnn),
        )
