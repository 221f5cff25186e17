# SPDX-License-Identifier: Apache-2.0
"""What is one operator in the models: the decoder's loops and the loss; and where it is not."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.modules import module as _of_all_modules

from .. import functional
from .._checks import check_smoothing
from ..nn import AttentionDecoder
from ..nn._common import is_bare
from ..types import State
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


def all_are_hooked() -> bool:
    """Whether torch calls hooks around the ``forward`` of every module."""
    hooks = _of_all_modules._global_forward_hooks, _of_all_modules._global_forward_pre_hooks
    return any(hooks)


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
    state: tuple[State, Tensor | None],
    masks: Masks,
) -> Tensor:
    """See :func:`pyseq.functional.scheduled_inputs`; for one that ``is_fused``."""
    assert isinstance(decoder.rnn, AttentionDecoder)  # or it is not fused
    score, combine = decoder.rnn.score, decoder.rnn.combine
    attends = memory is not None and score is not None
    limit = None
    if memory is not None and score is not None:
        limit = score.limit(memory, lengths)
    with exact_results(decoder.embedding.weight):
        return functional.scheduled_inputs(
            tokens,
            coins,
            decoder.embedding.weight,
            decoder.rnn.layer_weights(),
            state,
            decoder.output.weight,
            decoder.output.bias,
            decoder.rnn.project(memory, lengths) if attends and memory is not None else None,
            memory if attends else None,
            None if combine is None else combine.weight,
            draws=draws,
            cell=decoder.rnn.cell,
            score=None if score is None else score.fused,
            weight_query=None if score is None else score.weight_query,
            weight_v=None if score is None else score.weight_v,
            lengths=limit,
            input_feeding=decoder.rnn.input_feeding,
            embedding_masks=masks.embedding,
            dropout_masks=masks.layers,
            output_masks=masks.output,
        )
