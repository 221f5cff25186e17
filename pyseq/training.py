# SPDX-License-Identifier: Apache-2.0
"""Training: the loop, its schedules, and runs that can be interrupted and resumed exactly.

``train`` is the short way from pairs of strings to a translator; the command line builds
the same ``Trainer`` from files.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import checkpoint
from .averaging import AVERAGES, AverageName, WeightAverage
from .bridge import BridgeName
from .copying import CopyName
from .distributed import AnyBatch, DataParallel, Processes, peers_may_end
from .embeddings import Embeddings, EmbeddingsFile
from .errors import CheckpointError, DataError, TrainingError, require
from .events import Events, require_tensorboard
from .extra import ExtraMode, ExtraPlace
from .labeler import Labeler
from .labels import Labels, check_labels
from .scheduled import (
    CHOICES,
    COINS,
    ChoiceName,
    CoinName,
    Sampling,
    Schedule,
    from_record,
)
from .seq2seq import Seq2Seq
from .tagger import AnyModel, Classifier, PoolingName, Tagger
from .text import (
    BucketedBatches,
    Examples,
    ExampleSet,
    Pair,
    TextPair,
    Tokenizer,
    Vocab,
    make_pair,
    ordered_batches,
    tokenise_pairs,
)
from .translator import Translator
from .types import PAD, CellName, FeedName, HistoryName, OrderName, ScoreName, WindowName

OptimizerName = Literal["adam", "sgd"]
OPTIMIZERS: tuple[str, ...] = ("adam", "sgd")

AnyExamples = ExampleSet[AnyBatch]

ScheduleName = Literal["linear", "constant", "warmup", "halving"]
SCHEDULES: tuple[str, ...] = ("linear", "constant", "warmup", "halving")

SelectName = Literal["loss", "accuracy"]
SELECTIONS: tuple[str, ...] = ("loss", "accuracy")

#: Options that may differ when a run is resumed.
FREE_ON_RESUME: tuple[str, ...] = ("epochs", "checkpoint_every", "patience")

_ALONE = Processes()

#: The folder of the last checkpoint, inside that of the best model.
LAST = "last"


@dataclass(frozen=True)
class ModelOptions:
    """What a model is made of; see :class:`pyseq.Seq2Seq`."""

    embedding_size: int = 256
    hidden_size: int = 256
    num_layers: int = 1
    cell: CellName = "lstm"
    bidirectional: bool = True
    score: ScoreName | None = "general"
    input_feeding: bool = True
    dropout: float = 0.1
    source_embedding_size: int | None = None
    target_embedding_size: int | None = None
    encoder_hidden_size: int | None = None
    encoder_num_layers: int | None = None
    bridge: BridgeName = "copy"
    tie_embeddings: bool = False
    context_every_step: bool = False
    copy: CopyName | None = None
    source_extra_size: int | None = None
    target_extra_size: int | None = None
    extra_mode: ExtraMode = "concat"
    extra_hidden_size: int | None = None
    extra_place: ExtraPlace = "output"
    attention_size: int | None = None
    max_positions: int | None = None
    order: OrderName = "luong"
    feed: FeedName | None = None
    heads: int = 1
    window: WindowName | None = None
    window_size: int | None = None
    history: HistoryName | None = None
    history_size: int | None = None
    coverage_loss: float = 0.0

    def build(self, source_vocab: Vocab, target_vocab: Vocab) -> Seq2Seq:
        """A new model for these vocabularies, weights drawn from torch's global generator."""
        return Seq2Seq(len(source_vocab), len(target_vocab), **asdict(self))


TaskName = Literal["tag", "classify"]
TASKS: tuple[str, ...] = ("tag", "classify")

#: How the text of a task is split unless something else is asked for.
LABELER_TOKENS: dict[str, str] = {"tag": "space", "classify": "word"}


@dataclass(frozen=True)
class LabelerOptions:
    """What a model of labels is made of; see :class:`pyseq.Tagger` and ``Classifier``."""

    embedding_size: int = 256
    hidden_size: int = 256
    num_layers: int = 1
    cell: CellName = "lstm"
    bidirectional: bool = True
    dropout: float = 0.1
    pooling: PoolingName | None = None  # of a Classifier; None for "last"

    def build(self, task: TaskName, source_vocab: Vocab, labels: Labels) -> Tagger | Classifier:
        """A new model of a task, weights drawn from torch's global generator.

        Raises:
            ValueError: an option is out of its range, or ``pooling`` is given for a Tagger.
        """
        given = asdict(self)
        pooling = given.pop("pooling")
        if task == "classify":
            return Classifier(len(source_vocab), len(labels), **given, pooling=pooling or "last")
        if pooling is not None:
            raise ValueError(f"pooling goes with the task 'classify', got {pooling!r} for 'tag'")
        return Tagger(len(source_vocab), len(labels), **given)


@dataclass(frozen=True)
class TrainingOptions:
    """How a model is trained.

    Args:
        epochs: passes over the training pairs.
        batch_size: pairs of a batch.
        learning_rate: the optimiser's, at its highest.
        schedule: ``"linear"`` falls from the learning rate to zero over the whole run,
            ``"constant"`` stays, ``"warmup"`` rises for ``warmup_steps`` and then falls
            like ``"linear"``, ``"halving"`` stays for ``halve_after`` epochs, is halved
            then and once more every ``halve_every`` epochs.
        warmup_steps: steps.
        halve_after, halve_every: epochs, for ``"halving"``; fractions count.
        clip_norm: gradients are scaled down to this Euclidean norm.
        label_smoothing: share of the target probability that is spread over all symbols.
        seed: of the weights, of dropout and of the order of the data.
        checkpoint_every: steps between checkpoints within an epoch. Default: none.
        select: the best epoch is the one with the least validation ``"loss"``, or, where
            whole outputs are right or wrong, of the highest :func:`accuracy`: a model that
            grows surer of itself may have a rising loss and still get more outputs right.
        optimizer: ``"adam"``, or ``"sgd"`` without momentum, which wants a learning rate near 1.
        freeze_source, freeze_target: for so many epochs at the beginning the embeddings of that
            side stay as they are, as suits pretrained ones; None for all epochs. A tied matrix
            is frozen in the output layer, too.
        patience: stop after this many epochs in a row that are not better than the best one
            before them, on the validation pairs. Default: never.
        average: an average of the weights is judged after each epoch and saved as the best
            model, while training goes on with the weights themselves: ``"exponential"`` over
            the updates, or over the last ``"epochs"``; see
            :class:`pyseq.averaging.WeightAverage`.
        average_decay: of the exponential average.
        average_epochs: epochs that count.
        scheduled_sampling: a schedule of :mod:`pyseq.scheduled`, such as
            ``InverseSigmoid(2000)``: how often the decoder reads the truth, by the number of
            updates done. Default: always, which is teacher forcing.
        sampling_choice: what it reads else: its likeliest token, ``"argmax"``, or one drawn
            from its distribution, ``"sample"``.
        sampling_coin: whether that is decided for each ``"token"`` or for each ``"sequence"``.

    Raises:
        ValueError: an option is out of its range.

    Reference:
        SGD with halving: Luong et al. 2015, arXiv 1508.04025, section 4.1 (rate 1, 10 epochs,
        halved every epoch after the fifth; with dropout 12 and the eighth; norm clipped to 5),
        and Sutskever et al. 2014, arXiv 1409.3215, section 3.4 (rate 0.7, 7.5 epochs, every half
        epoch after the fifth). Their gradient is that of the loss summed over a sentence, here
        it is averaged over tokens, which clipping to a norm mostly hides.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    schedule: ScheduleName = "linear"
    warmup_steps: int = 0
    clip_norm: float = 5.0
    label_smoothing: float = 0.0
    seed: int = 1
    checkpoint_every: int | None = None
    select: SelectName = "loss"
    optimizer: OptimizerName = "adam"
    halve_after: float = 5
    halve_every: float = 1
    patience: int | None = None
    average: AverageName = "none"
    average_decay: float = 0.999
    average_epochs: int = 5
    scheduled_sampling: Schedule | None = None
    sampling_choice: ChoiceName = "argmax"
    sampling_coin: CoinName = "token"

    def sampling(self, updates: int) -> Sampling | None:
        """What the decoder reads after so many updates; None for the truth alone."""
        if self.scheduled_sampling is None:
            return None
        return Sampling(self.scheduled_sampling(updates), self.sampling_choice, self.sampling_coin)

    freeze_source: int | None = 0
    freeze_target: int | None = 0

    def __post_init__(self) -> None:
        if self.sampling_choice not in CHOICES:
            raise ValueError(
                f"sampling_choice must be one of {', '.join(CHOICES)}, got {self.sampling_choice!r}"
            )
        if self.sampling_coin not in COINS:
            raise ValueError(
                f"sampling_coin must be one of {', '.join(COINS)}, got {self.sampling_coin!r}"
            )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}"
            )
        if self.select not in SELECTIONS:
            raise ValueError(f"select must be one of {', '.join(SELECTIONS)}, got {self.select!r}")
        if self.average not in AVERAGES:
            raise ValueError(f"average must be one of {', '.join(AVERAGES)}, got {self.average!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}"
            )
        for name in ("epochs", "batch_size", "average_epochs"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "clip_norm", "halve_every"):
            value = getattr(self, name)
            _check(name, value, value > 0 and math.isfinite(value), "above 0 and finite")
        _check("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "at least 0")
        for name in ("label_smoothing", "average_decay"):
            value = getattr(self, name)
            _check(name, value, 0 <= value < 1, "at least 0 and below 1")
        _check("seed", self.seed, 0 <= self.seed < 2**63, "at least 0 and below 2**63")
        after = self.halve_after
        _check("halve_after", after, after >= 0 and math.isfinite(after), "at least 0 and finite")
        for name in ("freeze_source", "freeze_target"):
            value = getattr(self, name)
            _check(name, value, value is None or value >= 0, "at least 0 or None")
        for name in ("checkpoint_every", "patience"):
            value = getattr(self, name)
            _check(name, value, value is None or value >= 1, "at least 1 or None")


def _check(name: str, value: object, valid: bool, allowed: str) -> None:
    if not valid:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


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
        loss = _loss(model, batch, label_smoothing=label_smoothing, sampling=sampling)
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


def _loss(
    model: AnyModel,
    batch: AnyBatch,
    *,
    label_smoothing: float = 0.0,
    sampling: Sampling | None = None,
) -> Tensor:
    # Batches and models of one task go together, which the types cannot tell.
    compute: Callable[..., Tensor] = model.loss
    own = {"sampling": sampling} if isinstance(model, Seq2Seq) else {}
    return compute(
        *batch.inputs, batch.expected, label_smoothing=label_smoothing, **own, **batch.options
    )


@torch.no_grad()
def mean_loss(
    model: AnyModel, examples: AnyExamples, *, batch_size: int, processes: Processes = _ALONE
) -> float:
    """Loss of a model on examples, in nats per target token, without dropout or smoothing."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for batch in _own_batches(examples, batch_size, processes):
        batch = batch.to(_device(model))
        count = int(batch.counted.sum())
        total += _loss(model, batch).item() * count
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
        batch = batch.to(_device(model))
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
        batch = batch.to(_device(model))
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


def _device(model: AnyModel) -> torch.device:
    return next(model.parameters()).device


def _optimizer(model: AnyModel, options: TrainingOptions) -> torch.optim.Optimizer:
    rate = options.learning_rate
    if options.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=rate, fused=True)
    return torch.optim.Adam(model.parameters(), lr=rate, fused=True)


def _average(model: AnyModel, options: TrainingOptions) -> WeightAverage | None:
    if options.average == "none":
        return None
    return WeightAverage(
        model, options.average, decay=options.average_decay, epochs=options.average_epochs
    )


class EpochReport(NamedTuple):
    """What one epoch came to."""

    epoch: int  # from 1
    train_loss: float  # nats per target token, with dropout and smoothing, over the epoch
    valid_loss: float | None  # nats per target token; None without validation pairs
    best: bool  # whether this is the best epoch so far
    valid_accuracy: float | None = None  # where it selects the best epoch


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop by a signal and has written its last checkpoint.

    How to go on is for the caller to say: it knows by what command it was started.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


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

    A new run replaces what another one left in ``out``, once its own first checkpoint is
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
        self._processes = Processes.of_group(_device(self.model))
        self._parallel: DataParallel | None = None
        if self._processes.count > 1:
            self._parallel = DataParallel(self.model, _loss, self._processes)
            self._seed_dropout(0)
        self._batches: BucketedBatches[AnyBatch] = BucketedBatches(
            examples, options.batch_size, seed=options.seed
        )
        self._data_fingerprint = examples.fingerprint()
        self._validation_fingerprint = (
            None if self.validation is None else self.validation.fingerprint()
        )
        self._optimizer = _optimizer(self.model, options)
        self._average = _average(self.model, options)
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
    def examples(self) -> AnyExamples:
        """The training pairs."""
        return self._batches.examples

    def run(self) -> list[EpochReport]:
        """Train to the end; returns one report for each epoch of the whole run.

        SIGINT (Ctrl-C) and SIGTERM finish the step under way and write the last checkpoint.

        Raises:
            Interrupted: a signal came. It is a KeyboardInterrupt.
            TrainingError: the loss or a gradient is no longer finite, or a checkpoint cannot
                be written; the one before it is whole.
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
        with _signals() as received:
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
        options, device = self.options, _device(self.model)
        self.model.train()
        self._freeze_embeddings()
        begin, done = time.perf_counter(), 0
        with self._bar() as bar:
            for batch in self._batches:
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
                count = int(batch.counted.sum())
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
                    "tokens_per_second": self._rate,
                },
            )
        if self._log is not None:
            self._log(self._epoch_text(report))

    def _judge_epoch(self) -> None:
        """Validate, report, and save the model if it is the best so far."""
        valid_loss, right, best = None, None, True
        if self.validation is not None:
            size = self.options.batch_size
            valid_loss = mean_loss(
                self.model, self.validation, batch_size=size, processes=self._processes
            )
            if self.options.select == "accuracy":
                right = accuracy(
                    self.model, self.validation, batch_size=size, processes=self._processes
                )
            criterion = valid_loss if right is None else 1 - right
            best = criterion < self._best
            if best:
                self._best = criterion
        train_loss = self._loss_sum / max(1, self._tokens)
        number = len(self.reports) + 1
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
        for rank, rng_state in enumerate(self._processes.gather(torch.get_rng_state())):
            tensors[_rng_name(rank)] = rng_state
        for name, values in self._optimizer_state().items():
            for key, value in values.items():
                tensors[f"optimizer.{key}.{name}"] = value
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
            "threads": torch.get_num_threads(),
            "processes": self._processes.count,
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
            raise CheckpointError(
                f"{self.examples.name}: these are not the training pairs that the run to be "
                "resumed was begun with: give the same file, and the same --valid or --valid-share"
            )
        if record["validation"] != self._validation_fingerprint:
            before = "" if record["validation"] else ", which had none"
            now = "none" if self.validation is None else self.validation.name
            raise CheckpointError(
                f"the validation pairs must be those of the run to be resumed{before}, got {now}: "
                "give --valid as it was given then"
            )
        self._check_options(begun_options(state))
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
        own = tensors.get(_rng_name(self._processes.rank))
        if own is None:  # begun with fewer processes
            self._seed_dropout(self._step)
        else:
            torch.set_rng_state(own)
        self._batches.restore(tensors["rng.batches"], record["position"])
        self._restore_optimizer(tensors)
        if self._average is not None:
            self._average.restore(tensors)
        self._loss_sum, self._tokens = record["loss_sum"], record["tokens"]
        self._best = math.inf if record["best"] is None else record["best"]
        self.reports = [EpochReport(**report) for report in record["reports"]]
        if self._log is not None and record["threads"] != torch.get_num_threads():
            self._log(
                f"the run was begun with {record['threads']} threads and goes on with "
                f"{torch.get_num_threads()}: the last bits of its numbers may differ"
            )
        count = record.get("processes", 1)  # older versions knew one
        if self._log is not None and count != self._processes.count:
            self._log(
                f"the run was begun with {count} processes and goes on with "
                f"{self._processes.count}: its dropout and the last bits of its numbers differ"
            )

    def _seed_dropout(self, step: int) -> None:
        """Have each process but the first, which has the seed itself, draw masks of its own."""
        if not self._processes.is_first:
            torch.manual_seed((self.options.seed + self._processes.rank + (step << 20)) % 2**63)

    def _check_options(self, saved: TrainingOptions) -> None:
        before = asdict(saved)
        for name, value in asdict(self.options).items():
            if name not in FREE_ON_RESUME and before[name] != value:
                raise CheckpointError(
                    f"{name} must be {before[name]!r} as in the run to be resumed, got {value!r}"
                )

    def _optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """The optimiser's tensors by parameter name, Adam's ``step``, ``exp_avg`` and
        ``exp_avg_sq``; SGD has none."""
        state = self._optimizer.state
        return {name: state[p] for name, p in self.model.named_parameters() if p in state}

    def _restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        saved: dict[int, dict[str, Tensor]] = {}
        for index, (name, _) in enumerate(self.model.named_parameters()):
            values = {
                key: tensors[f"optimizer.{key}.{name}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.{key}.{name}" in tensors
            }
            if values:
                saved[index] = values
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": saved, "param_groups": groups})

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

    def _epoch_text(self, report: EpochReport) -> str:
        text = f"epoch {report.epoch}/{self.options.epochs}: loss {report.train_loss:.4f}"
        if report.valid_loss is not None:
            text += f", validation {report.valid_loss:.4f}"
        text += f" nats/{self._unit}"
        if report.valid_accuracy is not None:
            text += f", {report.valid_accuracy:.2%} right"
        if report.valid_loss is not None and report.best:
            text += " (best)"
        return f"{text}, {self._rate:,.0f} {self._unit}s/s"

    def _place_text(self) -> str:
        """Epoch and step under way, both from 1."""
        return f"epoch {len(self.reports) + 1}, step {self._batches.position}"

    def _not_finite_text(self, value: float, batch: AnyBatch) -> str:
        shown = ", ".join(map(str, sorted(batch.lines)[:10]))
        more = f" and {len(batch.lines) - 10} more" if len(batch.lines) > 10 else ""
        kept = (
            "the weights of the step before are kept"
            if self.out is None
            else f"the last checkpoint is kept in {self.out / LAST}"
        )
        return (
            f"{self.examples.name}: the loss or its gradient is {value} in {self._place_text()}, "
            f"in the batch of lines {shown}{more}; {kept}; a lower learning rate may help"
        )

    def _interrupted_text(self, signum: int) -> str:
        name = signal.Signals(signum).name
        between = self._batches.position == 0 and self.reports
        place = f"epoch {len(self.reports)}" if between else self._place_text()
        where = f"stopped by {name} after {place}"
        return where if self.out is None else f"{where}; the checkpoint is in {self.out / LAST}"


def _rng_name(rank: int) -> str:
    """Of the global generator's state among the tensors of a training state."""
    return "rng.torch" if rank == 0 else f"rng.torch.{rank}"


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of stopping; a second signal acts at once.

    Only the main thread may set handlers; elsewhere nothing is collected. What the process
    was told to ignore (``nohup``, a shell's background job) stays ignored.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


class Data(NamedTuple):
    """Tokenised pairs and where they came from."""

    pairs: list[Pair]
    name: str  # the file, for messages


def start(
    data: Data,
    validation: Data | None = None,
    *,
    tokens: tuple[str, str],
    reverse_source: bool = False,
    min_count: int = 1,
    model: ModelOptions,
    options: TrainingOptions,
    out: str | Path | None = None,
    progress: bool = False,
    log: Callable[[str], None] | None = None,
    tensorboard: str | Path | None = None,
    source_embeddings: EmbeddingsFile | None = None,
    target_embeddings: EmbeddingsFile | None = None,
) -> Trainer:
    """A trainer at the beginning of a run: vocabularies and model are new.

    Seeds torch's global generator.

    Args:
        data, validation: the pairs; the vocabularies are those of ``data``.
        tokens: how source and target were split.
        reverse_source: read sources backwards, in training and ever after, which brings their
            first tokens close to those of the target (Sutskever et al. 2014, arXiv 1409.3215,
            section 3.3); for a model without attention and with an encoder of one direction.
        min_count: symbols that are seen less often are ``<unk>``; a model that copies learns
            from them to copy what it does not know.
        model: what the model is made of.
        options, out, progress, log, tensorboard: as for :class:`Trainer`.
        source_embeddings, target_embeddings: pretrained vectors with which the embeddings of
            that side begin; they set its embedding size.

    Raises:
        DataError: there are no pairs, or a file of vectors cannot be used.
        ValueError: the model asks for another embedding size than a file has.
    """
    if not data.pairs:
        raise DataError(f"{data.name}: no pairs to train on")
    _check("min_count", min_count, min_count >= 1, "at least 1")
    source_vocab = Vocab.build((pair.source for pair in data.pairs), min_count=min_count)
    target_vocab = Vocab.build((pair.target for pair in data.pairs), min_count=min_count)
    pretrained = _read_embeddings(
        {"source": (source_embeddings, source_vocab), "target": (target_embeddings, target_vocab)},
        options.seed,
        log,
    )
    for side, found in pretrained.items():
        model = _with_embedding_size(model, side, found)
    torch.manual_seed(options.seed)
    longest = max(len(pair.target) for pair in data.pairs)
    translator = Translator(
        model.build(source_vocab, target_vocab),
        source_vocab,
        target_vocab,
        source_tokens=tokens[0],
        target_tokens=tokens[1],
        # Half as long again as anything seen; longer outputs are loops.
        max_length=longest + longest // 2 + 1,
        reverse_source=reverse_source,
    )
    tables = translator.model.embeddings()
    for side, found in pretrained.items():
        found.copy_to(tables[side])
    return _trainer(
        translator,
        data,
        validation,
        options=options,
        out=out,
        progress=progress,
        log=log,
        tensorboard=tensorboard,
        embeddings=_fingerprints(pretrained),
    )


def tokenise_labels(pairs: Iterable[TextPair], *, task: TaskName, tokens: str) -> list[Pair]:
    """Split the text of each line, and the labels of a tagger, which spaces separate.

    Args:
        pairs: text and labels.
        task: ``"tag"`` or ``"classify"``.
        tokens: how the text is split.
    """
    tokenizer = Tokenizer(tokens)
    return [
        Pair(
            tokenizer.split(pair.source),
            pair.target.split() if task == "tag" else [pair.target],
            pair.line,
        )
        for pair in pairs
    ]


def start_labeler(
    data: Data,
    validation: Data | None = None,
    *,
    task: TaskName,
    tokens: str,
    model: LabelerOptions,
    options: TrainingOptions,
    out: str | Path | None = None,
    progress: bool = False,
    log: Callable[[str], None] | None = None,
    tensorboard: str | Path | None = None,
    source_embeddings: EmbeddingsFile | None = None,
) -> Trainer:
    """A trainer at the beginning of a run that teaches labels; vocabulary and model are new.

    Seeds torch's global generator.

    Args:
        data, validation: tokens and, as targets, their labels or the one of the line. The
            vocabulary is that of ``data``, the labels are those of both.
        task: ``"tag"``, a label for each token, or ``"classify"``, one for the line.
        tokens: how the source was split.
        model: what the model is made of.
        options, out, progress, log, tensorboard: as for :class:`Trainer`.
        source_embeddings: as for :func:`start`.

    Raises:
        DataError: there are no examples, one has not the right number of labels, or a file of
            vectors cannot be used.
        ValueError: the task is unknown, or an option does not go with it.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if not data.pairs:
        raise DataError(f"{data.name}: no pairs to train on")
    parts = [data] if validation is None else [data, validation]
    for part in parts:
        check_labels(part.pairs, name=part.name, per_token=task == "tag")
    source_vocab = Vocab.build(pair.source for pair in data.pairs)
    labels = Labels.build(pair.target for part in parts for pair in part.pairs)
    pretrained = _read_embeddings({"source": (source_embeddings, source_vocab)}, options.seed, log)
    if "source" in pretrained:
        model = replace(model, embedding_size=pretrained["source"].matrix.shape[1])
    torch.manual_seed(options.seed)
    labeler = Labeler(
        model.build(task, source_vocab, labels), source_vocab, labels, source_tokens=tokens
    )
    for side, found in pretrained.items():
        found.copy_to(labeler.model.embeddings()[side])
    return _trainer(
        labeler,
        data,
        validation,
        options=options,
        out=out,
        progress=progress,
        log=log,
        tensorboard=tensorboard,
        embeddings=_fingerprints(pretrained),
    )


def _read_embeddings(
    files: Mapping[str, tuple[EmbeddingsFile | None, Vocab]],
    seed: int,
    log: Callable[[str], None] | None,
) -> dict[str, Embeddings]:
    """By side, what the files that are given hold for the vocabularies."""
    found = {}
    for side, (file, vocab) in files.items():
        if file is not None:
            found[side] = file.read(vocab, seed=seed)
            if log is not None:
                log(f"{side} embeddings: {found[side].report}")
    return found


def _fingerprints(pretrained: Mapping[str, Embeddings]) -> dict[str, str]:
    return {side: found.fingerprint for side, found in pretrained.items()}


def _with_embedding_size(model: ModelOptions, side: str, found: Embeddings) -> ModelOptions:
    name, size = f"{side}_embedding_size", found.matrix.shape[1]
    asked = getattr(model, name)
    if asked not in (None, size):
        raise ValueError(
            f"{name} must be that of the vectors in {found.report.name}, {size}, got {asked}"
        )
    if side == "source":
        return replace(model, source_embedding_size=size)
    return replace(model, target_embedding_size=size)


def last_checkpoint(out: str | Path) -> tuple[checkpoint.Saved, checkpoint.TrainingState]:
    """What the last checkpoint in ``out`` holds, and the part of it that is for training.

    Raises:
        CheckpointError: there is no such checkpoint, or it has no training state.
    """
    folder = Path(out) / LAST
    saved = checkpoint.load(folder)
    if saved.training is None:
        raise CheckpointError(f"{folder}: this model was saved without its training state")
    return saved, saved.training


def begun_options(state: checkpoint.TrainingState) -> TrainingOptions:
    """How the run of this state is trained; what its version did not know is at its default.

    Raises:
        CheckpointError: the state has options that this version does not know.
    """
    try:
        options = dict(state.record["options"])
        if options.get("scheduled_sampling") is not None:
            options["scheduled_sampling"] = from_record(options["scheduled_sampling"])
        return TrainingOptions(**options)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the training state has no valid options: {error}") from error


def resume(
    data: Data,
    validation: Data | None = None,
    *,
    out: str | Path,
    epochs: int | None = None,
    checkpoint_every: int | None = None,
    patience: int | None = None,
    progress: bool = False,
    log: Callable[[str], None] | None = None,
    tensorboard: str | Path | None = None,
    source_embeddings: EmbeddingsFile | None = None,
    target_embeddings: EmbeddingsFile | None = None,
) -> Trainer:
    """A trainer that goes on from the last checkpoint in ``out``.

    Model, vocabularies and options are those of the checkpoint.

    Args:
        data, validation: the pairs that the run was begun with.
        out, progress, log, tensorboard: as for :class:`Trainer`.
        epochs: epochs of the whole run. Default: as begun.
        checkpoint_every: steps between checkpoints within an epoch. Default: as begun.
        patience: epochs without a better one until the run stops. Default: as begun.
        source_embeddings, target_embeddings: need not be given, since the checkpoint has the
            matrices; if they are, they must be those that the run was begun with.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not one of this data or of
            these vectors.
        DataError: a file of vectors cannot be used.
    """
    saved, state = last_checkpoint(out)
    folder = Path(out) / LAST
    translator: Translator | Labeler
    if isinstance(saved.model, Seq2Seq):
        translator = Translator.from_saved(saved, folder)
    else:
        translator = Labeler.from_saved(saved, folder)
    try:
        options = begun_options(state)
        options = replace(
            options,
            epochs=epochs or options.epochs,
            checkpoint_every=checkpoint_every or options.checkpoint_every,
            patience=patience or options.patience,
        )
        files = {"source": (source_embeddings, translator.source_vocab)}
        if isinstance(translator, Translator):
            files["target"] = (target_embeddings, translator.target_vocab)
        elif target_embeddings is not None:
            raise CheckpointError(f"{folder}: this model has no target to embed")
        given = _read_embeddings(files, options.seed, None)
        trainer = _trainer(
            translator,
            data,
            validation,
            options=options,
            out=out,
            progress=progress,
            log=log,
            tensorboard=tensorboard,
            embeddings=_fingerprints(given),
        )
        trainer.restore(state)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: the training state is incomplete: {error}") from error
    return trainer


def _trainer(
    translator: Translator | Labeler,
    data: Data,
    validation: Data | None,
    *,
    options: TrainingOptions,
    out: str | Path | None,
    progress: bool,
    log: Callable[[str], None] | None,
    tensorboard: str | Path | None,
    embeddings: Mapping[str, str],
) -> Trainer:
    return Trainer(
        translator,
        translator.encode(data.pairs, name=data.name),
        None if validation is None else translator.encode(validation.pairs, name=validation.name),
        options=options,
        out=out,
        progress=progress,
        log=log,
        tensorboard=tensorboard,
        embeddings=embeddings,
    )


def _text_pair(pair: Any, line: int, *, name: str, extras: int = 0) -> TextPair:
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) != 2 + extras
        or not all(isinstance(side, str) for side in pair[:2])
    ):
        numbers = f" and extra information {extras} times" if extras else ""
        raise DataError(f"{name}:{line}: a pair must be two strings{numbers}, got {pair!r}")
    columns = (each if isinstance(each, str) else " ".join(map(str, each)) for each in pair[2:])
    return make_pair(pair[0], pair[1], line, name=name)._replace(columns=tuple(columns))


def _embeddings_file(given: EmbeddingsFile | str | Path | None) -> EmbeddingsFile | None:
    return EmbeddingsFile(given) if isinstance(given, (str, Path)) else given


#: Source and target, and extra information for either or both.
_AnyPair = (
    tuple[str, str]
    | tuple[str, str, Sequence[float] | str]
    | tuple[str, str, Sequence[float] | str, Sequence[float] | str]
)


def train(
    pairs: Sequence[_AnyPair],
    *,
    validation: Sequence[_AnyPair] | None = None,
    tokens: str | tuple[str, str] = "char",
    reverse_source: bool = False,
    min_count: int = 1,
    embedding_size: int = ModelOptions.embedding_size,
    hidden_size: int = ModelOptions.hidden_size,
    num_layers: int = ModelOptions.num_layers,
    cell: CellName = ModelOptions.cell,
    bidirectional: bool = ModelOptions.bidirectional,
    score: ScoreName | None = ModelOptions.score,
    input_feeding: bool = ModelOptions.input_feeding,
    dropout: float = ModelOptions.dropout,
    source_embedding_size: int | None = ModelOptions.source_embedding_size,
    target_embedding_size: int | None = ModelOptions.target_embedding_size,
    encoder_hidden_size: int | None = ModelOptions.encoder_hidden_size,
    encoder_num_layers: int | None = ModelOptions.encoder_num_layers,
    bridge: BridgeName = ModelOptions.bridge,
    tie_embeddings: bool = ModelOptions.tie_embeddings,
    context_every_step: bool = ModelOptions.context_every_step,
    copy: CopyName | None = ModelOptions.copy,
    source_extra_size: int | None = ModelOptions.source_extra_size,
    target_extra_size: int | None = ModelOptions.target_extra_size,
    extra_mode: ExtraMode = ModelOptions.extra_mode,
    extra_hidden_size: int | None = ModelOptions.extra_hidden_size,
    extra_place: ExtraPlace = ModelOptions.extra_place,
    attention_size: int | None = ModelOptions.attention_size,
    max_positions: int | None = ModelOptions.max_positions,
    order: OrderName = ModelOptions.order,
    feed: FeedName | None = ModelOptions.feed,
    heads: int = ModelOptions.heads,
    window: WindowName | None = ModelOptions.window,
    window_size: int | None = ModelOptions.window_size,
    history: HistoryName | None = ModelOptions.history,
    history_size: int | None = ModelOptions.history_size,
    coverage_loss: float = ModelOptions.coverage_loss,
    epochs: int = TrainingOptions.epochs,
    batch_size: int = TrainingOptions.batch_size,
    learning_rate: float = TrainingOptions.learning_rate,
    seed: int = TrainingOptions.seed,
    freeze_source: int | None = TrainingOptions.freeze_source,
    freeze_target: int | None = TrainingOptions.freeze_target,
    source_embeddings: EmbeddingsFile | str | Path | None = None,
    target_embeddings: EmbeddingsFile | str | Path | None = None,
    out: str | Path | None = None,
    log: Callable[[str], None] | None = None,
) -> Translator:
    """Train a translator from pairs of strings.

    Args:
        pairs: source and target of each pair; for a model with extra information followed by
            its numbers for the source, for the target, or for both in this order, as a sequence
            each or as text with spaces between.
        validation: pairs that choose the best epoch. Default: the last epoch is taken.
        tokens: how text is split, for both sides or for (source, target): ``"char"``,
            ``"space"`` or ``"word"``; see :class:`pyseq.text.Tokenizer`.
        reverse_source, min_count: see :func:`start`.
        embedding_size, hidden_size, num_layers, cell, bidirectional, score, input_feeding,
            dropout, source_embedding_size, target_embedding_size, encoder_hidden_size,
            encoder_num_layers, bridge, tie_embeddings, context_every_step, copy,
            source_extra_size, target_extra_size, extra_mode, extra_hidden_size, extra_place,
            attention_size, max_positions, order, feed, heads, window, window_size, history,
            history_size, coverage_loss: as for :class:`pyseq.Seq2Seq`.
        epochs, batch_size, learning_rate, seed, freeze_source, freeze_target: see
            :class:`TrainingOptions`.
        source_embeddings, target_embeddings: a file of pretrained vectors for that side, or how
            it is read, :class:`pyseq.embeddings.EmbeddingsFile`.
        out: save the best model there and checkpoints in its subfolder ``last``.
        log: is called with a line of text after each epoch, ``print`` for example.

    Returns:
        The translator, with the weights of the best epoch if ``out`` and ``validation`` are
        given and of the last epoch otherwise.

    Raises:
        DataError: a pair is not two strings, a side is empty, there are no pairs, or a file of
            vectors cannot be used. It is a ValueError.
        ValueError: an option is out of its range.
        TrainingError: the loss is no longer finite.
        Interrupted: Ctrl-C; a KeyboardInterrupt.
    """
    given: Sequence[str] = (tokens, tokens) if isinstance(tokens, str) else tokens
    if len(given) != 2:
        raise ValueError(f"tokens must be one name or a pair (source, target), got {tokens!r}")
    sides = (given[0], given[1])
    source, target = Tokenizer(sides[0]), Tokenizer(sides[1])

    sizes = (source_extra_size, target_extra_size)
    extras = sum(size is not None for size in sizes)

    def tokenise(part: Sequence[_AnyPair], name: str) -> Data:
        texts = [
            _text_pair(pair, line, name=name, extras=extras)
            for line, pair in enumerate(part, start=1)
        ]
        pairs = tokenise_pairs(texts, source=source, target=target, extra_sizes=sizes, name=name)
        return Data(pairs, name)

    trainer = start(
        tokenise(pairs, "pairs"),
        None if validation is None else tokenise(validation, "validation"),
        tokens=sides,
        reverse_source=reverse_source,
        min_count=min_count,
        model=ModelOptions(
            embedding_size=embedding_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            cell=cell,
            bidirectional=bidirectional,
            score=score,
            input_feeding=input_feeding,
            dropout=dropout,
            source_embedding_size=source_embedding_size,
            target_embedding_size=target_embedding_size,
            encoder_hidden_size=encoder_hidden_size,
            encoder_num_layers=encoder_num_layers,
            bridge=bridge,
            tie_embeddings=tie_embeddings,
            context_every_step=context_every_step,
            copy=copy,
            source_extra_size=source_extra_size,
            target_extra_size=target_extra_size,
            extra_mode=extra_mode,
            extra_hidden_size=extra_hidden_size,
            extra_place=extra_place,
            attention_size=attention_size,
            max_positions=max_positions,
            order=order,
            feed=feed,
            heads=heads,
            window=window,
            window_size=window_size,
            history=history,
            history_size=history_size,
            coverage_loss=coverage_loss,
        ),
        options=TrainingOptions(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            freeze_source=freeze_source,
            freeze_target=freeze_target,
        ),
        out=out,
        log=log,
        source_embeddings=_embeddings_file(source_embeddings),
        target_embeddings=_embeddings_file(target_embeddings),
    )
    _run(trainer, out, validation is not None)
    if out is not None and validation is not None:
        return Translator.load(out)
    assert isinstance(trainer.translator, Translator)
    return trainer.translator


def train_labeler(
    examples: Sequence[tuple[str, str]],
    *,
    task: TaskName,
    validation: Sequence[tuple[str, str]] | None = None,
    tokens: str | None = None,
    embedding_size: int = LabelerOptions.embedding_size,
    hidden_size: int = LabelerOptions.hidden_size,
    num_layers: int = LabelerOptions.num_layers,
    cell: CellName = LabelerOptions.cell,
    bidirectional: bool = LabelerOptions.bidirectional,
    dropout: float = LabelerOptions.dropout,
    pooling: PoolingName | None = LabelerOptions.pooling,
    epochs: int = TrainingOptions.epochs,
    batch_size: int = TrainingOptions.batch_size,
    learning_rate: float = TrainingOptions.learning_rate,
    seed: int = TrainingOptions.seed,
    freeze_source: int | None = TrainingOptions.freeze_source,
    source_embeddings: EmbeddingsFile | str | Path | None = None,
    out: str | Path | None = None,
    log: Callable[[str], None] | None = None,
) -> Labeler:
    """Train a labeler from labelled lines.

    Args:
        examples: text and labels of each line: for ``"tag"`` as many labels as tokens,
            separated by spaces; for ``"classify"`` one, which may hold spaces.
        task: ``"tag"``, a label for each token, or ``"classify"``, one for the line.
        validation: lines that choose the best epoch. Default: the last epoch is taken.
        tokens: how text is split, ``"char"``, ``"space"`` or ``"word"``. Default: that of
            :data:`LABELER_TOKENS`.
        embedding_size, hidden_size, num_layers, cell, bidirectional, dropout, pooling: as for
            :class:`pyseq.Tagger` and :class:`pyseq.Classifier`, which alone has a pooling.
        epochs, batch_size, learning_rate, seed, freeze_source, source_embeddings, out, log: as
            for :func:`train`.

    Returns:
        The labeler, with the weights of the best epoch if ``out`` and ``validation`` are given
        and of the last epoch otherwise.

    Raises:
        DataError: an example is not two strings, a side is empty, the number of labels is not
            right, there are no examples, or a file of vectors cannot be used. It is a
            ValueError.
        ValueError: an option is out of its range or does not go with the task.
        TrainingError: the loss is no longer finite.
        Interrupted: Ctrl-C; a KeyboardInterrupt.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    split = LABELER_TOKENS[task] if tokens is None else tokens

    def tokenise(part: Sequence[tuple[str, str]], name: str) -> Data:
        texts = [_text_pair(pair, line, name=name) for line, pair in enumerate(part, start=1)]
        return Data(tokenise_labels(texts, task=task, tokens=split), name)

    trainer = start_labeler(
        tokenise(examples, "examples"),
        None if validation is None else tokenise(validation, "validation"),
        task=task,
        tokens=split,
        model=LabelerOptions(
            embedding_size=embedding_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            cell=cell,
            bidirectional=bidirectional,
            dropout=dropout,
            pooling=pooling,
        ),
        options=TrainingOptions(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            freeze_source=freeze_source,
        ),
        out=out,
        log=log,
        source_embeddings=_embeddings_file(source_embeddings),
    )
    _run(trainer, out, validation is not None)
    if out is not None and validation is not None:
        return Labeler.load(out)
    assert isinstance(trainer.translator, Labeler)
    return trainer.translator


def _run(trainer: Trainer, out: str | Path | None, validated: bool) -> None:
    """Train to the end, and leave the model as its user wants it.

    Raises:
        Interrupted: the text says by what command the run goes on.
    """
    try:
        trainer.run()
    except Interrupted as error:
        if out is None:
            raise
        held = "--valid FILE" if validated else "--valid-share 0"
        raise Interrupted(
            error.signum,
            f"{error}; with the same pairs in a file, "
            f"pyseq train PAIRS.tsv {held} --out {out} --resume goes on from there",
        ) from None
    trainer.take_average()
    trainer.model.eval()
