# SPDX-License-Identifier: Apache-2.0
"""The loop: epochs, their judgement, and checkpoints from which a run goes on exactly."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..distributed import AnyBatch, DataParallel, Processes, peers_may_end
from ..errors import CheckpointError, DataError, TrainingError, require
from ..events import Events, require_tensorboard
from ..labeler import Labeler
from ..seq2seq import Seq2Seq
from ..tagger import AnyModel
from ..text import BucketedBatches
from ..translator import Translator
from .judging import AnyExamples, accuracy, device_of, mean_loss
from .options import TrainingOptions
from .reports import EpochReport
from .resuming import (
    begun_options,
    check_options,
    circumstances,
    differences,
    optimizer_tensors,
    random_tensors,
    restore_optimizer,
    restore_random,
)
from .signals import Interrupted, signals
from .updates import compute_loss, learning_rate_factor, make_average, make_optimizer, training_step

#: The folder of the last checkpoint, inside that of the best model.
LAST = "last"


class Trainer:
    """Trains the model of a translator, and can go on after any interruption.

    The folder ``out`` holds the best model (as ``options.select`` says; the latest where
    there is no validation), its subfolder ``last`` the last checkpoint with all that is needed to
    continue: weights, optimiser, random state, and the place in the data. The schedule is
    a function of the number of steps done. A run that was interrupted and resumed ends
    with the same bits as one that was not, on the same machine with the same threads.

    If torch's default process group has several processes, each makes the same trainer and calls
    the same methods: each computes some rows of every batch (with dropout of its own), so that
    the run is that of one process but for the order of sums, and the first one writes and logs.

    A new run replaces what another one left in ``out`` (:func:`start` refuses that, unless it is
    asked for), once its own first checkpoint is
    written; from then until its first epoch ends, ``out`` holds no best model.

    Args:
        translator: its model is trained, in place.
        examples: training pairs.
        validation: validation pairs, or None.
        options: how to train.
        out: the folder; without one nothing is saved.
        progress: show a progress bar on standard error if that is a terminal (needs tqdm).
        log: is called with a line of text after each epoch.
        tensorboard: a folder for curves that TensorBoard shows: losses, accuracy, learning
            rate, speed (extra ``tensorboard``). Default: none are written.
        embeddings: by side, the fingerprints of pretrained matrices with which the run begins.

    Raises:
        MissingExtraError: ``tensorboard`` was given and is not installed.
        DataError: there are no training pairs, or patience without validation pairs.
        ValueError: ``options`` freeze embeddings that the model does not have.
    """

    def __init__(
        self,
        translator: Translator | Labeler,
        examples: AnyExamples,
        validation: AnyExamples | None = None,
        *,
        options: TrainingOptions,
        out: str | Path | None = None,
        progress: bool = False,
        log: Callable[[str], None] | None = None,
        tensorboard: str | Path | None = None,
        embeddings: Mapping[str, str] | None = None,
    ) -> None:
        if tensorboard is not None:
            require_tensorboard()
        self.translator = translator
        self.model: AnyModel = translator.model
        self.options = options
        self.validation = validation if validation is not None and len(validation) else None
        if options.patience is not None and self.validation is None:
            raise DataError(
                f"{examples.name}: patience needs validation pairs to judge an epoch by, got none"
            )
        for side in ("source", "target"):
            epochs = getattr(options, f"freeze_{side}")
            if epochs != 0 and side not in self.model.embeddings():
                raise ValueError(
                    f"freeze_{side} must be 0 for a model without embeddings of the {side}, got "
                    f"{epochs!r}"
                )
        if options.scheduled_sampling is not None and not isinstance(self.model, Seq2Seq):
            raise ValueError(
                "scheduled_sampling goes with a decoder, which a labeler does not have"
            )
        self.out = None if out is None else Path(out)
        self.reports: list[EpochReport] = []
        self._processes = Processes.of_group(self._device)
        self._parallel: DataParallel | None = None
        if self._processes.count > 1:
            self._parallel = DataParallel(self.model, compute_loss, self._processes)
            self._seed_dropout(0)
        self._batches: BucketedBatches[AnyBatch] = BucketedBatches(
            examples, options.batch_size, seed=options.seed
        )
        self._data_fingerprint = examples.fingerprint()
        self._validation_fingerprint = (
            None if self.validation is None else self.validation.fingerprint()
        )
        self._optimizer = make_optimizer(self.model, options)
        self._average = make_average(self.model, options)
        self._total_steps = options.epochs * len(self._batches)
        self._step = 0  # updates done in the whole run
        self._loss_sum, self._tokens = 0.0, 0  # of the epoch under way
        self._best = math.inf  # validation loss, or share of wrong outputs
        self._rate = 0.0  # target tokens a second in the epoch under way, since it went on
        first = self._processes.is_first
        self._bar_class = require("tqdm", extra="train").tqdm if progress and first else None
        self._log = log if first else None
        self._tensorboard = tensorboard if first else None
        self._unit = "token" if isinstance(self.model, Seq2Seq) else "label"
        self._events: Events | None = None  # while the run goes on
        self._embeddings = dict(embeddings or {})

    @property
    def _device(self) -> torch.device:
        return device_of(self.model)

    @property
    def examples(self) -> AnyExamples:
        """The training pairs."""
        return self._batches.examples

    def run(self) -> list[EpochReport]:
        """Train to the end; returns one report for each epoch of the whole run.

        SIGINT (Ctrl-C) and SIGTERM finish the step under way and write the last checkpoint.

        Raises:
            Interrupted: a signal came. It is a KeyboardInterrupt.
            TrainingError: the loss, that of the validation pairs or a gradient is no longer
                finite, or a checkpoint cannot be written; the one before it is whole.
            OSError: the folder for TensorBoard cannot be written.
        """
        with peers_may_end(self._processes):
            if self._tensorboard is None:
                return self._run()
            self._events = Events(self._tensorboard, step=self._step)
            try:
                return self._run()
            finally:
                self._events.close()
                self._events = None

    def _run(self) -> list[EpochReport]:
        if self._step == 0:
            # An unwritable folder shows now and not after the first epoch, and a run that
            # fails early has something to go back to.
            self._save_last()
        if not self.reports and self.out is not None and self._processes.is_first:
            # Of an earlier run: with the checkpoint of this one beside it, it would pass for
            # the best model of this one.
            checkpoint.remove(self.out)
        if len(self.reports) >= self.options.epochs and self._log is not None:
            self._log(
                f"nothing to do: {len(self.reports)} epochs are done and {self.options.epochs} "
                "were asked for; more epochs go on from here"
            )
        with signals() as received:
            while len(self.reports) < self.options.epochs:
                if self._is_patience_over():
                    break
                signum = self._run_epoch(received)
                if signum:
                    self._save_last()
                else:
                    self._finish_epoch()
                    signum = self._stopped_by(received)  # meanwhile, which also saved
                if signum:
                    raise Interrupted(signum, self._interrupted_text(signum))
        return self.reports

    def _stopped_by(self, received: list[int]) -> int:
        """A signal that one of the processes received, the same for all; 0 if there is none."""
        return self._processes.max(received[0] if received else 0)

    def _is_patience_over(self) -> bool:
        """Whether so many epochs without a better one are done; then the log is told."""
        patience, epochs = self.options.patience, len(self.reports)
        best = max((report.epoch for report in self.reports if report.best), default=0)
        if patience is None or epochs - best < patience:
            return False
        if self._log is not None:
            self._log(
                f"stopped early after epoch {epochs}: none was better than epoch {best}; "
                "more patience goes on from here"
            )
        return True

    def _run_epoch(self, received: list[int]) -> int:
        """The rest of an epoch, or as much of it as there is before a signal, which it returns."""
        options, device = self.options, self._device
        self.model.train()
        self._freeze_embeddings()
        begin, done = time.perf_counter(), 0
        with self._bar() as bar:
            for batch in self._batches:
                count = int(batch.counted.sum())  # here, lest it wait for a device
                batch = batch.to(device)
                self._set_learning_rate()
                loss = training_step(
                    self.model,
                    batch,
                    self._optimizer,
                    clip_norm=options.clip_norm,
                    label_smoothing=options.label_smoothing,
                    sampling=options.sampling(self._step),
                    parallel=self._parallel,
                )
                if not math.isfinite(loss):
                    raise TrainingError(self._not_finite_text(loss, batch))
                self._step += 1
                if self._average is not None:
                    self._average.after_update(self._step)
                self._loss_sum += loss * count
                self._tokens += count
                done += count
                self._rate = done / (time.perf_counter() - begin)
                if self._events is not None:
                    rate = self._optimizer.param_groups[0]["lr"]
                    self._events.add(self._step, {"loss/step": loss, "learning_rate": rate})
                if bar is not None:
                    text = f"loss {loss:.3f}, {self._rate:,.0f} {self._unit}s/s"
                    bar.set_postfix_str(text, refresh=False)
                    bar.update()
                if signum := self._stopped_by(received):
                    return signum
                every = options.checkpoint_every
                if every is not None and self._step % every == 0:
                    self._save_last()
        return 0

    def _freeze_embeddings(self) -> None:
        """Decide which tables this epoch trains; those that no option names are left alone."""
        for side, table in self.model.embeddings().items():
            epochs = getattr(self.options, f"freeze_{side}")
            if epochs != 0:
                done = len(self.reports)
                table.weight.requires_grad_(epochs is not None and done >= epochs)

    def _set_learning_rate(self) -> None:
        """The optimiser's for the next step: the schedule is a function of the steps done."""
        options, epoch = self.options, len(self._batches)
        factor = learning_rate_factor(
            self._step,
            self._total_steps,
            schedule=options.schedule,
            warmup_steps=options.warmup_steps,
            halve_after=options.halve_after * epoch,
            halve_every=options.halve_every * epoch,
        )
        for group in self._optimizer.param_groups:
            group["lr"] = options.learning_rate * factor

    def take_average(self) -> None:
        """Give the model the average of its weights, if one is kept: what :meth:`run` judged.

        For the end of a run, since training would go on from the average.
        """
        if self._average is not None:
            self._average.give()

    def _finish_epoch(self) -> None:
        if self._average is None:
            self._judge_epoch()
        else:
            self._average.after_epoch()
            with self._average.given():
                self._judge_epoch()
        self._save_last()
        report = self.reports[-1]
        if self._events is not None:
            self._events.add(
                self._step,
                {
                    "loss/train": report.train_loss,
                    "loss/validation": report.valid_loss,
                    "accuracy/validation": report.valid_accuracy,
                    "tokens_per_second": self._rate or None,
                },
            )
        if self._log is not None:
            self._log(report.text(self.options.epochs, self._unit, self._rate))

    def _judge_epoch(self) -> None:
        """Validate, report, and save the model if it is the best so far."""
        valid_loss, right, best = None, None, True
        number = len(self.reports) + 1
        if self.validation is not None:
            size = self.options.batch_size
            valid_loss = mean_loss(
                self.model, self.validation, batch_size=size, processes=self._processes
            )
            if self.options.select == "accuracy":
                right = accuracy(
                    self.model, self.validation, batch_size=size, processes=self._processes
                )
            if not math.isfinite(valid_loss):
                raise TrainingError(self._not_judged_text(valid_loss, number))
            criterion = valid_loss if right is None else 1 - right
            best = criterion < self._best
            if best:
                self._best = criterion
        train_loss = self._loss_sum / max(1, self._tokens)
        self.reports.append(EpochReport(number, train_loss, valid_loss, best, right))
        self._loss_sum, self._tokens = 0.0, 0
        self._batches.next_epoch()
        # The best model first: if a kill comes in between, the last checkpoint still is
        # the one before this epoch, which then runs again and writes the same.
        if best and self.out is not None:
            self._save(self.out)

    # Checkpoints.

    def _save_last(self) -> None:
        if self.out is not None:
            self._save(self.out / LAST, self.state())
            self._processes.wait()  # whoever goes on may read what the first one wrote

    def _save(self, path: Path, training: checkpoint.TrainingState | None = None) -> None:
        if not self._processes.is_first:
            return
        try:
            self.translator.save(path, training=training)
        except OSError as error:
            raise TrainingError(
                f"{error.filename or path}: cannot write the checkpoint of "
                f"{self._place_text()}: {error.strerror}; what was saved before is untouched"
            ) from error

    def state(self) -> checkpoint.TrainingState:
        """All that :meth:`restore` needs, besides the weights."""
        generator_state, position = self._batches.state()
        tensors = {"rng.batches": generator_state}
        tensors |= random_tensors(self._processes, self._device)
        tensors |= optimizer_tensors(self.model, self._optimizer)
        if self._average is not None:
            tensors.update(self._average.state())
        record = {
            "options": asdict(self.options),
            "data": self._data_fingerprint,
            "validation": self._validation_fingerprint,
            "embeddings": self._embeddings,
            "step": self._step,
            "position": position,
            "loss_sum": self._loss_sum,
            "tokens": self._tokens,
            "best": self._best if math.isfinite(self._best) else None,
            "reports": [report._asdict() for report in self.reports],
            **circumstances(self._processes, self._device),
        }
        return checkpoint.TrainingState(tensors, record)

    def restore(self, state: checkpoint.TrainingState) -> None:
        """Go on where :meth:`state` was called; the weights must be those of that moment.

        Also sets torch's global random state. With more epochs than the run was begun with,
        the schedule is that of the longer run from here on.

        Raises:
            CheckpointError: the data or the options are not those of that run, or the
                state does not go with the model.
        """
        record, tensors = state.record, state.tensors
        if record["data"] != self._data_fingerprint:
            features = self.model.config["source_features"] is not None
            raise CheckpointError(
                f"{self.examples.name}: these are not the training pairs that the run to be "
                f"resumed was begun with: give the same file{' and the same features' * features}, "
                "and the same --valid or --valid-share and --valid-seed (of a run that version "
                "0.1.0 began, its --seed)"
            )
        if record["validation"] != self._validation_fingerprint:
            before = "" if record["validation"] else ", which had none"
            now = "none" if self.validation is None else self.validation.name
            raise CheckpointError(
                f"the validation pairs must be those of the run to be resumed{before}, got {now}: "
                "give --valid as it was given then"
            )
        check_options(self.options, begun_options(state))
        begun = record.get("embeddings", {})  # older files do not say
        for side, fingerprint in self._embeddings.items():
            if begun.get(side) != fingerprint:
                held = "other ones" if side in begun else "none"
                raise CheckpointError(
                    f"the pretrained embeddings of the {side} must be those that the run to be "
                    f"resumed was begun with, but that had {held}: leave them out, since the "
                    "checkpoint holds the matrix"
                )
        self._embeddings = dict(begun)
        self._step = record["step"]
        if not restore_random(tensors, self._processes, self._device):  # begun with fewer processes
            self._seed_dropout(self._step)
        self._batches.restore(tensors["rng.batches"], record["position"])
        restore_optimizer(tensors, self.model, self._optimizer)
        if self._average is not None:
            self._average.restore(tensors)
        self._loss_sum, self._tokens = record["loss_sum"], record["tokens"]
        self._best = math.inf if record["best"] is None else record["best"]
        self.reports = [EpochReport(**report) for report in record["reports"]]
        if self._log is not None:
            for line in differences(record, self._processes, self._device):
                self._log(line)

    def _seed_dropout(self, step: int) -> None:
        """Have each process but the first, which has the seed itself, draw masks of its own."""
        if not self._processes.is_first:
            torch.manual_seed((self.options.seed + self._processes.rank + (step << 20)) % 2**63)

    # What is said to the user.

    def _bar(self) -> AbstractContextManager[Any]:
        """A progress bar for the rest of the epoch, or None, as a context."""
        if self._bar_class is None:
            return nullcontext()
        return self._bar_class(
            total=len(self._batches),
            initial=self._batches.position,
            desc=f"epoch {len(self.reports) + 1}/{self.options.epochs}",
            unit="step",
            leave=False,
            disable=None,  # off unless standard error is a terminal
        )

    def _place_text(self) -> str:
        """Epoch and step under way, both from 1."""
        return f"epoch {len(self.reports) + 1}, step {self._batches.position}"

    def _not_finite_text(self, value: float, batch: AnyBatch) -> str:
        shown = ", ".join(map(str, sorted(batch.lines)[:10]))
        more = f" and {len(batch.lines) - 10} more" if len(batch.lines) > 10 else ""
        kept = self._kept_text("the weights of the step before are kept")
        return (
            f"{self.examples.name}: the loss or its gradient is {value} in {self._place_text()}, "
            f"in the batch of lines {shown}{more}; {kept}; a lower learning rate may help"
        )

    def _not_judged_text(self, value: float, epoch: int) -> str:
        assert self.validation is not None
        kept = self._kept_text("the model keeps the weights")
        return (
            f"{self.validation.name}: the validation loss is {value} after epoch {epoch}, so that "
            f"no epoch can be the best; {kept}; a lower learning rate may help"
        )

    def _kept_text(self, without_folder: str) -> str:
        if self.out is None:
            return without_folder
        return f"the last checkpoint is kept in {self.out / LAST}"

    def _interrupted_text(self, signum: int) -> str:
        name = signal.Signals(signum).name
        between = self._batches.position == 0 and self.reports
        place = f"epoch {len(self.reports)}" if between else self._place_text()
        where = f"stopped by {name} after {place}"
        return where if self.out is None else f"{where}; the checkpoint is in {self.out / LAST}"
