# SPDX-License-Identifier: Apache-2.0
"""How good a model is on examples: its loss, what it gets right, and where it is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch

from ..distributed import AnyBatch, Processes
from ..scheduled import Sampling
from ..seq2seq import Seq2Seq
from ..tagger import AnyModel
from ..text import Examples, ExampleSet, ordered_batches
from ..types import PAD
from .updates import compute_loss

AnyExamples = ExampleSet[AnyBatch]

_ALONE = Processes()


@torch.no_grad()
def mean_loss(
    model: AnyModel, examples: AnyExamples, *, batch_size: int, processes: Processes = _ALONE
) -> float:
    """Loss of a model on examples, in nats per target token, without dropout or smoothing."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for batch in _own_batches(examples, batch_size, processes):
        count = int(batch.counted.sum())  # here, lest it wait for a device
        batch = batch.to(device_of(model))
        total += compute_loss(model, batch).item() * count
        tokens += count
    model.train(training)
    total, all_tokens = processes.sum(total, tokens)
    return total / max(1, all_tokens)


@torch.no_grad()
def accuracy(
    model: AnyModel, examples: AnyExamples, *, batch_size: int, processes: Processes = _ALONE
) -> float:
    """Share of the examples, 0 to 1, that greedy search would get right to the last token.

    It would if every token of the target is the likeliest after those before it, which one
    pass with teacher forcing shows. Of a Tagger or Classifier: of which all labels are right.
    """
    training = model.training
    model.eval()
    right, count = 0, 0
    for batch in _own_batches(examples, batch_size, processes):
        batch = batch.to(device_of(model))
        likeliest = model(*batch.inputs, **batch.options).argmax(-1)
        fits = (likeliest == batch.expected) | ~batch.counted
        right += int(fits.reshape(len(fits), -1).all(1).sum())
        count += len(fits)
    model.train(training)
    all_right, everything = processes.sum(right, count)
    return all_right / max(1, everything)


def _own_batches(
    examples: AnyExamples, batch_size: int, processes: Processes
) -> Iterator[AnyBatch]:
    """The batches for validation that fall to this process."""
    return islice(ordered_batches(examples, batch_size), processes.rank, None, processes.count)


@torch.no_grad()
def errors_by_position(
    model: Seq2Seq, examples: Examples, *, batch_size: int, free_running: bool
) -> list[float]:
    """Share of wrong tokens, 0 to 1, at each place of the target, the first one first.

    Args:
        model, examples: as in :func:`accuracy`.
        batch_size: examples computed together.
        free_running: the model reads its own likeliest tokens, as in greedy search (which goes
            on here to the end of the target), and not the truth. The difference of the two is
            what scheduled sampling is for.
    """
    training = model.training
    model.eval()
    sampling = Sampling(0.0 if free_running else 1.0)
    wrong: list[int] = []
    count: list[int] = []
    for batch in ordered_batches(examples, batch_size):
        batch = batch.to(device_of(model))
        source, lengths, target_in = batch.inputs
        target_in = model.scheduled_inputs(
            source,
            lengths,
            target_in,
            sampling,
            source_extra=batch.source_extra,
            target_extra=batch.target_extra,
            copies=batch.copies,
        )
        likeliest = model(source, lengths, target_in, **batch.options).argmax(-1)
        target_out = batch.target_out
        valid = target_out != PAD
        more = target_out.shape[1] - len(count)
        wrong += [0] * more
        count += [0] * more
        missed = ((likeliest != target_out) & valid).sum(0).tolist()
        for place, (missing, all_) in enumerate(zip(missed, valid.sum(0).tolist(), strict=True)):
            wrong[place] += missing
            count[place] += all_
    model.train(training)
    return [missing / all_ for missing, all_ in zip(wrong, count, strict=True)]


def device_of(model: AnyModel) -> torch.device:
    """Where the weights of a model are."""
    return next(model.parameters()).device
