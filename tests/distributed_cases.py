# SPDX-License-Identifier: Apache-2.0
"""What each process of tests/test_distributed.py does, under torchrun: not a test by itself.

``python -m torch.distributed.run ... tests/distributed_cases.py FOLDER`` writes what rank 0 saw
to FOLDER; the last case ends process 1 without a word.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pyseq import training
from pyseq.distributed import DataParallel, Processes, joined
from pyseq.errors import TrainingError
from pyseq.labels import LabelBatch
from pyseq.scheduled import Constant
from pyseq.tagger import Classifier, Tagger
from pyseq.text import Extra, Pair
from pyseq.training import Data, Interrupted, ModelOptions, Trainer, TrainingOptions

MODEL = ModelOptions(embedding_size=8, hidden_size=12, dropout=0.0)
# The last batch of an epoch has one row, and so none for the second process.
PAIRS = Data(
    [Pair(list("abcde"[: 1 + n % 5]), list("edcba"[n % 4 :]), n + 1) for n in range(17)], "pairs"
)
OPTIONS = TrainingOptions(
    epochs=2, batch_size=8, learning_rate=0.01, label_smoothing=0.1, select="accuracy"
)


# What a model may copy, told at every step, with tables that stay as they are at first.
TOLD = Data(
    [
        pair._replace(extra=Extra(tuple(float(n % 3) for n in range(len(pair.source)))))
        for pair in PAIRS.pairs
    ],
    "pairs",
)
COPYING = replace(MODEL, copy="pointer", source_extra_size=1)
FREEZING = replace(OPTIONS, freeze_source=1, freeze_target=None)


def begin(
    out: Path | None,
    *,
    model: ModelOptions = MODEL,
    options: TrainingOptions = OPTIONS,
    data: Data = PAIRS,
) -> Trainer:
    return training.start(
        data, data, tokens=("char", "char"), model=model, options=options, out=out
    )


def at_step(trainer: Trainer, number: int, action: Callable[[], None]) -> None:
    """Call ``action`` in the middle of the ``number``-th update of this process."""
    done = 0

    def hook(*_: object) -> None:
        nonlocal done
        if trainer.model.training:
            done += 1
            if done == number:
                action()

    trainer.model.encoder.register_forward_pre_hook(hook)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}


def compare_gradients(processes: Processes) -> None:
    """Every process has the gradients of the whole batch, also of weights that thaw later."""
    model = begin(None).model.double()
    parallel = DataParallel(model, training.updates.compute_loss, processes)
    batch = begin(None).examples.collate([3, 1, 7])
    for frozen in (True, False):
        model.decoder.embedding.weight.requires_grad_(not frozen)
        model.zero_grad()
        loss, value = parallel.loss(batch, label_smoothing=0.1)
        loss.backward()
        found = gradients(model)
        model.zero_grad()
        expected = model.loss(*batch[:4], label_smoothing=0.1)
        expected.backward()
        assert abs(value - expected.item()) < 1e-12
        assert ("decoder.embedding.weight" in found) is not frozen
        torch.testing.assert_close(found, gradients(model))
    assert isinstance(parallel._parallel, DistributedDataParallel)


def compare_labels(processes: Processes) -> None:
    """The same of a model that gives labels, where a process has no row at all."""
    for kind, labels in ((Tagger, [[1, 0, 2]]), (Classifier, [1])):
        torch.manual_seed(1)
        model = kind(9, 3, embedding_size=4, hidden_size=6, dropout=0.0).double()
        parallel = DataParallel(model, training.updates.compute_loss, processes)
        source = torch.tensor([[4, 5, 8]])
        batch = LabelBatch(source, torch.tensor([3]), torch.tensor(labels), [1])
        loss, value = parallel.loss(batch, label_smoothing=0.0)
        loss.backward()
        found = gradients(model)
        model.zero_grad()
        expected = training.updates.compute_loss(model, batch)
        expected.backward()
        assert abs(value - expected.item()) < 1e-12
        torch.testing.assert_close(found, gradients(model))


def resume_exactly(folder: Path, processes: Processes) -> None:
    """A signal to process 1 alone stops all, and resuming gives the bits of a whole run."""
    model = replace(COPYING, dropout=0.3)
    options = replace(FREEZING, average="exponential", scheduled_sampling=Constant(0.5))
    begin(folder / "whole", model=model, options=options, data=TOLD).run()
    trainer = begin(folder / "parts", model=model, options=options, data=TOLD)
    if processes.rank == 1:
        at_step(trainer, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        trainer.run()
    except Interrupted as error:
        assert error.signum == signal.SIGTERM  # noqa: PT017  run by torchrun
    else:
        raise AssertionError("no process was interrupted")
    torch.manual_seed(9)  # what the process did before must not matter
    training.resume(TOLD, TOLD, out=folder / "parts").run()


def draw_masks(folder: Path, processes: Processes) -> None:
    """Dropout differs from one process to the next."""
    begin(None)
    masks = processes.gather(torch.rand(100))
    assert not torch.equal(masks[0], masks[1])


def lose_a_process(folder: Path, processes: Processes) -> None:
    """The others end with a sentence."""
    trainer = begin(folder / "lost")
    if processes.rank == 1:
        at_step(trainer, 2, lambda: os._exit(3))
    try:
        trainer.run()
    except TrainingError as error:
        (folder / "lost.txt").write_text(str(error))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as processes:
        assert processes.count == 2
        compare_gradients(processes)
        compare_labels(processes)
        draw_masks(folder, processes)
        trainer = begin(folder / "two")
        trainer.run()
        begin(folder / "copying", model=COPYING, options=FREEZING, data=TOLD).run()
        resume_exactly(folder, processes)
        lose_a_process(folder, processes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
