# SPDX-License-Identifier: Apache-2.0
"""The short way: from pairs of strings to a translator, or from labelled lines to a labeler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .._arguments import takes
from ..devices import AnyDevice
from ..embeddings import EmbeddingsFile
from ..errors import DataError
from ..labeler import Labeler
from ..text import Features, TextPair, Tokenizer, make_pair, tokenise_pairs
from ..text.features import given_features
from ..translator import Translator
from ..types import kind
from .judging import device_of
from .options import (
    LABELER_TOKENS,
    TASKS,
    LabelerOptions,
    ModelOptions,
    TaskName,
    TrainingOptions,
)
from .runs import Data, start, start_labeler, tokenise_labels
from .signals import Interrupted
from .trainer import Trainer


def _text_pair(pair: Any, line: int, *, name: str, extras: int = 0) -> TextPair:
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) != 2 + extras
        or not all(isinstance(side, str) for side in pair[:2])
    ):
        numbers = f" and extra information {extras} times" if extras else ""
        raise DataError(f"{name}:{line}: a pair must be two strings{numbers}, got {pair!r}")
    try:
        columns = tuple(map(_column, pair[2:]))
    except TypeError as error:
        raise DataError(
            f"{name}:{line}: extra information must be a sequence of numbers, or text, got "
            f"{pair[2:]!r}"
        ) from error
    return make_pair(pair[0], pair[1], line, name=name)._replace(columns=columns)


def _column(numbers: Any) -> str:
    """Extra information as it stands in a file: of the whole sequence, or a row for each step."""
    if isinstance(numbers, str):
        return numbers
    if hasattr(numbers, "tolist"):  # an array or a tensor
        numbers = numbers.tolist()
    if any(isinstance(each, Sequence) for each in numbers):
        return ";".join(map(_column, numbers))
    return " ".join(map(str, numbers))


def _embeddings_file(given: EmbeddingsFile | str | Path | None) -> EmbeddingsFile | None:
    if given is None or isinstance(given, EmbeddingsFile):
        return given
    if not isinstance(given, (str, Path)):
        raise TypeError(f"embeddings must be a file or an EmbeddingsFile, got {kind(given)}")
    return EmbeddingsFile(given)


#: Numbers of the whole sequence, a row of them for each step, or either as text.
_Numbers = Sequence[float] | Sequence[Sequence[float]] | str

#: Source and target, and extra information for either or both.
_AnyPair = tuple[str, str] | tuple[str, str, _Numbers] | tuple[str, str, _Numbers, _Numbers]

#: Text and labels, and extra information.
_AnyExample = tuple[str, str] | tuple[str, str, _Numbers]


@dataclass(frozen=True, kw_only=True)
class _RunArguments(TrainingOptions):
    """What both ways take besides examples and a model."""

    out: str | Path | None = None
    overwrite: bool = False
    log: Callable[[str], None] | None = None
    tensorboard: str | Path | None = None
    source_embeddings: EmbeddingsFile | str | Path | None = None
    features: Features | Mapping[str, Any] | str | Path | None = None
    device: AnyDevice = None


@dataclass(frozen=True)
class TrainArguments(ModelOptions, _RunArguments):
    """What :func:`train` takes."""

    pairs: Sequence[_AnyPair]
    validation: Sequence[_AnyPair] | None = field(default=None, kw_only=True)
    tokens: str | tuple[str, str] = field(default="char", kw_only=True)
    reverse_source: bool = field(default=False, kw_only=True)
    min_count: int = field(default=1, kw_only=True)
    target_embeddings: EmbeddingsFile | str | Path | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class TrainLabelerArguments(LabelerOptions, _RunArguments):
    """What :func:`train_labeler` takes."""

    examples: Sequence[_AnyExample]
    task: TaskName = field(kw_only=True)
    validation: Sequence[_AnyExample] | None = field(default=None, kw_only=True)
    tokens: str | None = field(default=None, kw_only=True)


_Options = TypeVar("_Options", ModelOptions, LabelerOptions, TrainingOptions)


def _part(arguments: TrainArguments | TrainLabelerArguments, options: type[_Options]) -> _Options:
    """The options of one kind among the arguments."""
    return options(**{each.name: getattr(arguments, each.name) for each in fields(options)})


def _both(tokens: str | tuple[str, str]) -> tuple[str, str]:
    """How source and target are split."""
    given: Sequence[str] = (tokens, tokens) if isinstance(tokens, str) else tokens
    if len(given) != 2:
        raise ValueError(f"tokens must be one name or a pair (source, target), got {tokens!r}")
    return given[0], given[1]


@takes(TrainArguments)
def train(arguments: TrainArguments) -> Translator:
    """Train a translator from pairs of strings.

    Args:
        pairs: source and target of each pair; for a model with extra information followed by
            its numbers for the source, for the target, or for both in this order, as a sequence
            each, as a sequence of those of each step, or as text with spaces between, and
            semicolons between steps.
        validation: pairs that choose the best epoch. Default: the last epoch is taken.
        tokens: how text is split, for both sides or for (source, target): ``"char"``,
            ``"space"`` or ``"word"``; see :class:`pyseq.text.Tokenizer`.
        reverse_source, min_count: see :func:`start`.
        source_embeddings, target_embeddings: a file of pretrained vectors for that side, or how
            it is read, :class:`pyseq.embeddings.EmbeddingsFile`.
        features: for a model that reads vectors in place of source tokens: arrays (S, D) by name,
            or a file of them, see :class:`pyseq.text.Features`; sources are their names.
        out: save the best model there and checkpoints in its subfolder ``last``.
        overwrite: whether a model that ``out`` holds may be replaced.
        log: is called with a line of text after each epoch, ``print`` for example.
        tensorboard: as for :class:`Trainer`.
        device: where the model is trained, and stays: ``"cpu"`` or ``"cuda"``, say; see
            :func:`pyseq.load`. Default: the CPU.
        all others: the model's are those of :class:`pyseq.Seq2Seq`, such as ``hidden_size``, and
            the run's those of :class:`TrainingOptions`, such as ``epochs``.

    Returns:
        The translator, with the weights of the best epoch if ``out`` and ``validation`` are
        given and of the last epoch otherwise.

    Raises:
        CheckpointError: ``out`` holds a model, and it may not be replaced.
        DataError: a pair is not two strings, a side is empty, there are no pairs, or a file of
            vectors cannot be used. It is a ValueError.
        ValueError: an option is out of its range.
        TrainingError: the loss is no longer finite.
        Interrupted: Ctrl-C; a KeyboardInterrupt.
    """
    source_size, target_size = arguments.source_extra_size, arguments.target_extra_size
    features = given_features(arguments.features)
    tokens = _both(arguments.tokens)
    if features is not None:
        tokens = ("line", tokens[1])
    source, target = Tokenizer(tokens[0]), Tokenizer(tokens[1])
    extras = sum(size is not None for size in (source_size, target_size))

    def tokenise(part: Sequence[_AnyPair], name: str) -> Data:
        texts = [
            _text_pair(pair, line, name=name, extras=extras)
            for line, pair in enumerate(part, start=1)
        ]
        pairs = tokenise_pairs(
            texts,
            source=source,
            target=target,
            extra_sizes=(source_size, target_size),
            name=name,
        )
        return Data(pairs, name)

    validation = arguments.validation
    trainer = start(
        tokenise(arguments.pairs, "pairs"),
        None if validation is None else tokenise(validation, "validation"),
        tokens=tokens,
        reverse_source=arguments.reverse_source,
        min_count=arguments.min_count,
        model=_part(arguments, ModelOptions),
        options=_part(arguments, TrainingOptions),
        out=arguments.out,
        overwrite=arguments.overwrite,
        log=arguments.log,
        tensorboard=arguments.tensorboard,
        source_embeddings=_embeddings_file(arguments.source_embeddings),
        target_embeddings=_embeddings_file(arguments.target_embeddings),
        features=features,
        device=arguments.device,
    )
    found = _run(trainer, arguments.out, validated=validation is not None)
    assert isinstance(found, Translator)
    return found


@takes(TrainLabelerArguments)
def train_labeler(arguments: TrainLabelerArguments) -> Labeler:
    """Train a labeler from labelled lines.

    Args:
        examples: text and labels of each line: for ``"tag"`` as many labels as tokens,
            separated by spaces; for ``"classify"`` one, which may hold spaces. For a model with
            extra information followed by its numbers, as for :func:`train`.
        task: ``"tag"``, a label for each token, or ``"classify"``, one for the line.
        validation: lines that choose the best epoch. Default: the last epoch is taken.
        tokens: how text is split, ``"char"``, ``"space"`` or ``"word"``. Default: that of
            :data:`LABELER_TOKENS`.
        source_embeddings, features, out, overwrite, log, tensorboard, device: as for
            :func:`train`.
        all others: the model's are those of :class:`pyseq.Tagger` and
            :class:`pyseq.Classifier`, which alone has a pooling; the run's those of
            :class:`TrainingOptions`.

    Returns:
        The labeler, with the weights of the best epoch if ``out`` and ``validation`` are given
        and of the last epoch otherwise.

    Raises:
        CheckpointError: ``out`` holds a model, and it may not be replaced.
        DataError: an example is not two strings, a side is empty, the number of labels is not
            right, there are no examples, or a file of vectors cannot be used. It is a
            ValueError.
        ValueError: an option is out of its range or does not go with the task.
        TrainingError: the loss is no longer finite.
        Interrupted: Ctrl-C; a KeyboardInterrupt.
    """
    task = arguments.task
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    features = given_features(arguments.features)
    tokens = LABELER_TOKENS[task] if arguments.tokens is None else arguments.tokens
    if features is not None:
        tokens = "line"

    size = arguments.source_extra_size

    def tokenise(part: Sequence[_AnyExample], name: str) -> Data:
        texts = [
            _text_pair(pair, line, name=name, extras=int(size is not None))
            for line, pair in enumerate(part, start=1)
        ]
        pairs = tokenise_labels(texts, task=task, tokens=tokens, extra_size=size, name=name)
        return Data(pairs, name)

    validation = arguments.validation
    trainer = start_labeler(
        tokenise(arguments.examples, "examples"),
        None if validation is None else tokenise(validation, "validation"),
        task=task,
        tokens=tokens,
        model=_part(arguments, LabelerOptions),
        options=_part(arguments, TrainingOptions),
        out=arguments.out,
        overwrite=arguments.overwrite,
        log=arguments.log,
        tensorboard=arguments.tensorboard,
        source_embeddings=_embeddings_file(arguments.source_embeddings),
        features=features,
        device=arguments.device,
    )
    found = _run(trainer, arguments.out, validated=validation is not None)
    assert isinstance(found, Labeler)
    return found


def _run(trainer: Trainer, out: str | Path | None, *, validated: bool) -> Translator | Labeler:
    """Train to the end; the model of the best epoch, if there is one.

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
    model = trainer.translator
    if out is None or not validated:
        return model
    return type(model).load(out, features=model.features, device=device_of(trainer.model))
