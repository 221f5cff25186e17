# SPDX-License-Identifier: Apache-2.0
"""What is trained and how: the options of models, of labelers and of runs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from .._checks import integer, number
from ..averaging import AVERAGES, AverageName
from ..labels import Labels
from ..scheduled import CHOICES, COINS, ChoiceName, CoinName, Sampling, Schedule
from ..seq2seq import Seq2Seq
from ..seq2seq.options import Seq2SeqOptions, TaggerOptions
from ..tagger import Classifier, PoolingName, Tagger
from ..text import Vocab

OptimizerName = Literal["adam", "sgd"]
OPTIMIZERS: tuple[str, ...] = ("adam", "sgd")

ScheduleName = Literal["linear", "constant", "warmup", "halving"]
SCHEDULES: tuple[str, ...] = ("linear", "constant", "warmup", "halving")

SelectName = Literal["loss", "accuracy"]
SELECTIONS: tuple[str, ...] = ("loss", "accuracy")

#: Options that may differ when a run is resumed.
FREE_ON_RESUME: tuple[str, ...] = ("epochs", "checkpoint_every", "patience")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Seq2SeqOptions):
    """What a model is made of: the options of :class:`pyseq.Seq2Seq`."""

    def build(self, source_vocab: Vocab | None, target_vocab: Vocab) -> Seq2Seq:
        """A new model for these vocabularies, weights drawn from torch's global generator.

        With ``source_features`` there is no vocabulary of the source.
        """
        size = None if source_vocab is None else len(source_vocab)
        return Seq2Seq(size, len(target_vocab), **asdict(self))


TaskName = Literal["tag", "classify"]
TASKS: tuple[str, ...] = ("tag", "classify")

#: How the text of a task is split unless something else is asked for.
LABELER_TOKENS: dict[str, str] = {"tag": "space", "classify": "word"}


@dataclass(frozen=True, kw_only=True)
class LabelerOptions(TaggerOptions):
    """What a model of labels is made of: the options of :class:`pyseq.Tagger`, and a pooling."""

    pooling: PoolingName | None = None  # of a Classifier; None for "last"

    def build(
        self, task: TaskName, source_vocab: Vocab | None, labels: Labels
    ) -> Tagger | Classifier:
        """A new model of a task, weights drawn from torch's global generator.

        With ``source_features`` there is no vocabulary of the source.

        Raises:
            ValueError: an option is out of its range, or ``pooling`` is given for a Tagger.
        """
        given = asdict(self)
        pooling = given.pop("pooling")
        size = None if source_vocab is None else len(source_vocab)
        if task == "classify":
            return Classifier(size, len(labels), **given, pooling=pooling or "last")
        if pooling is not None:
            raise ValueError(f"pooling goes with the task 'classify', got {pooling!r} for 'tag'")
        return Tagger(size, len(labels), **given)


@dataclass(frozen=True, kw_only=True)
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
    freeze_source: int | None = 0
    freeze_target: int | None = 0

    def __post_init__(self) -> None:
        for name, names in _CHOICES.items():
            value = getattr(self, name)
            check_option(name, value, value in names, f"one of {', '.join(names)}")
        for name in _INTEGERS:
            object.__setattr__(self, name, integer(name, getattr(self, name)))
        for name in _INTEGERS_OR_NONE:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, integer(name, getattr(self, name)))
        for name in _NUMBERS:
            object.__setattr__(self, name, number(name, getattr(self, name)))
        schedules = get_args(Schedule)
        check_option(
            "scheduled_sampling",
            self.scheduled_sampling,
            self.scheduled_sampling is None or isinstance(self.scheduled_sampling, schedules),
            f"a {', '.join(each.__name__ for each in schedules)} of pyseq.scheduled, or None",
        )
        self._check_ranges()

    def _check_ranges(self) -> None:
        for name in ("epochs", "batch_size", "average_epochs"):
            check_option(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "clip_norm", "halve_every"):
            value = getattr(self, name)
            check_option(name, value, value > 0 and math.isfinite(value), "above 0 and finite")
        check_option("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "at least 0")
        for name in ("label_smoothing", "average_decay"):
            value = getattr(self, name)
            check_option(name, value, 0 <= value < 1, "at least 0 and below 1")
        check_option("seed", self.seed, 0 <= self.seed < 2**63, "at least 0 and below 2**63")
        after = self.halve_after
        check_option(
            "halve_after", after, after >= 0 and math.isfinite(after), "at least 0 and finite"
        )
        for name in ("freeze_source", "freeze_target"):
            value = getattr(self, name)
            check_option(name, value, value is None or value >= 0, "at least 0 or None")
        for name in ("checkpoint_every", "patience"):
            value = getattr(self, name)
            check_option(name, value, value is None or value >= 1, "at least 1 or None")

    def sampling(self, updates: int) -> Sampling | None:
        """What the decoder reads after so many updates; None for the truth alone."""
        if self.scheduled_sampling is None:
            return None
        return Sampling(self.scheduled_sampling(updates), self.sampling_choice, self.sampling_coin)


#: The values of options that are names.
_CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": SCHEDULES,
    "select": SELECTIONS,
    "optimizer": OPTIMIZERS,
    "average": AVERAGES,
    "sampling_choice": CHOICES,
    "sampling_coin": COINS,
}
_INTEGERS = ("epochs", "batch_size", "warmup_steps", "seed", "average_epochs")
_INTEGERS_OR_NONE = ("checkpoint_every", "patience", "freeze_source", "freeze_target")
_NUMBERS = (
    "learning_rate",
    "clip_norm",
    "label_smoothing",
    "halve_after",
    "halve_every",
    "average_decay",
)


def check_option(name: str, value: object, valid: bool, allowed: str) -> None:
    """Raise a ValueError unless a value is valid."""
    if not valid:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
