# SPDX-License-Identifier: Apache-2.0
"""One update of the weights, and the learning rate that it has."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..averaging import WeightAverage
from ..distributed import AnyBatch, DataParallel
from ..scheduled import Sampling
from ..seq2seq import Seq2Seq
from ..tagger import AnyModel
from .options import ScheduleName, TrainingOptions


def learning_rate_factor(
    step: int,
    total_steps: int,
    *,
    schedule: ScheduleName,
    warmup_steps: int = 0,
    halve_after: float = math.inf,
    halve_every: float = 1,
) -> float:
    """What the learning rate is multiplied with at a step, 0 to 1.

    With n = ``total_steps`` and w = ``warmup_steps``: linear ``1 - step / n``; constant 1;
    warmup ``(step + 1) / (w + 1)`` up to step w and ``(n - step) / (n - w)`` from there;
    halving ``2^-k``, k = 0 before step ``halve_after`` and else
    ``1 + floor((step - halve_after) / halve_every)``.

    Args:
        step: updates done before, 0 to ``total_steps`` - 1.
        total_steps: updates of the whole run.
        schedule: as in :class:`TrainingOptions`.
        warmup_steps, halve_after, halve_every: updates.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "halving":
        if step < halve_after:
            return 1.0
        # Beyond the exponents of a float the rate is zero.
        return math.ldexp(1.0, -1 - math.floor((step - halve_after) / halve_every))
    if schedule == "linear":
        return max(0.0, 1 - step / total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def training_step(
    model: AnyModel,
    batch: AnyBatch,
    optimizer: torch.optim.Optimizer,
    *,
    clip_norm: float,
    label_smoothing: float = 0.0,
    sampling: Sampling | None = None,
    parallel: DataParallel | None = None,
) -> float:
    """One update of the weights; returns the loss in nats per token.

    If the loss or the norm of the gradients is not finite, the weights stay as they are and
    that number is returned. With ``parallel`` every process is given the whole batch and
    computes some rows of it.
    """
    optimizer.zero_grad(set_to_none=True)
    if parallel is None:
        loss = compute_loss(model, batch, label_smoothing=label_smoothing, sampling=sampling)
        value = loss.item()
    else:
        loss, value = parallel.loss(batch, label_smoothing=label_smoothing, sampling=sampling)
    if not math.isfinite(value):
        return value
    loss.backward()
    total_norm = torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    )
    norm = total_norm.item()
    if not math.isfinite(norm):
        return norm
    if norm > clip_norm:  # else torch would multiply every gradient by 1
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_norm, total_norm)
    optimizer.step()
    return value


def compute_loss(
    model: AnyModel,
    batch: AnyBatch,
    *,
    label_smoothing: float = 0.0,
    sampling: Sampling | None = None,
) -> Tensor:
    """The loss of a batch, in nats per token."""
    # Batches and models of one task go together, which the types cannot tell.
    compute: Callable[..., Tensor] = model.loss
    own = {"sampling": sampling} if isinstance(model, Seq2Seq) else {}
    return compute(
        *batch.inputs, batch.expected, label_smoothing=label_smoothing, **own, **batch.options
    )


def make_optimizer(model: AnyModel, options: TrainingOptions) -> torch.optim.Optimizer:
    """The optimiser that the options name, over all weights."""
    rate = options.learning_rate
    if options.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=rate, fused=True)
    return torch.optim.Adam(model.parameters(), lr=rate, fused=True)


def make_average(model: AnyModel, options: TrainingOptions) -> WeightAverage | None:
    """The average of the weights that the options ask for, if any."""
    if options.average == "none":
        return None
    return WeightAverage(
        model, options.average, decay=options.average_decay, epochs=options.average_epochs
    )
