# SPDX-License-Identifier: Apache-2.0
"""Runs: how one begins, with new vocabularies and a new model, and how one is resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from .. import checkpoint
from .._checks import integer
from ..devices import AnyDevice, find_device
from ..embeddings import Embeddings, EmbeddingsFile
from ..errors import CheckpointError, DataError
from ..labeler import Labeler
from ..labels import Labels, check_labels
from ..seq2seq import Seq2Seq
from ..text import SPECIALS, Features, Pair, TextPair, Tokenizer, Vocab, parse_extra
from ..translator import Translator
from .options import TASKS, LabelerOptions, ModelOptions, TaskName, TrainingOptions, check_option
from .resuming import begun_options
from .trainer import LAST, Trainer


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
    overwrite: bool = False,
    features: Features | None = None,
    device: AnyDevice = None,
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
        overwrite: whether a model that ``out`` holds may be replaced.
        features: arrays that the model reads in place of tokens, and the sources of pairs name.
        device: where the model is trained; see :func:`pyseq.load`. It begins with the same weights
            anywhere.

    Raises:
        CheckpointError: ``out`` holds a model, and it may not be replaced.
        DataError: there are no pairs, or a file of vectors cannot be used.
        ValueError: the model asks for another embedding size than a file has.
    """
    place = find_device(device)
    _check_begin(data, out, overwrite=overwrite)
    check_option("min_count", min_count, integer("min_count", min_count) >= 1, "at least 1")
    source_vocab: Vocab | None = None
    if features is None:
        source_vocab = Vocab.build((pair.source for pair in data.pairs), min_count=min_count)
    _check_features(model, features, source_embeddings)
    model = replace(model, source_features=None if features is None else features.size)
    target_vocab = Vocab.build((pair.target for pair in data.pairs), min_count=min_count)
    for side, vocab in (("source", source_vocab), ("target", target_vocab)):
        # A model that copies can do without a vocabulary.
        if min_count > 1 and vocab is not None and len(vocab) == len(SPECIALS) and not model.copy:
            raise DataError(f"{data.name}: no symbol of the {side} is there {min_count} times")
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
        features=features,
    )
    tables = translator.model.embeddings()
    for side, found in pretrained.items():
        found.copy_to(tables[side])
    translator.model.to(place)
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


def held_model(out: str | Path) -> Path | None:
    """The folder of a model that a run in ``out`` would replace: it, or its last checkpoint's."""
    folders = (Path(out), Path(out) / LAST)
    return next((folder for folder in folders if checkpoint.exists(folder)), None)


def _check_features(
    model: ModelOptions | LabelerOptions,
    features: Features | None,
    source_embeddings: EmbeddingsFile | None,
) -> None:
    size = None if features is None else features.size
    if model.source_features not in (None, size):
        raise ValueError(
            f"source_features must be the number of columns of the features, {size}, got "
            f"{model.source_features}"
        )
    if features is not None and source_embeddings is not None:
        raise ValueError("source_embeddings go with tokens, got them and features")


def _check_begin(data: Data, out: str | Path | None, *, overwrite: bool) -> None:
    if not data.pairs:
        raise DataError(f"{data.name}: no pairs to train on")
    held = None if out is None or overwrite else held_model(out)
    if held is not None:
        raise CheckpointError(
            f"{held}: holds a model already; overwrite=True replaces it, another out keeps it"
        )


def tokenise_labels(
    pairs: Iterable[TextPair],
    *,
    task: TaskName,
    tokens: str,
    extra_size: int | None = None,
    name: str = "pairs",
) -> list[Pair]:
    """Split the text of each line, and the labels of a tagger, which spaces separate.

    Args:
        pairs: text and labels.
        task: ``"tag"`` or ``"classify"``.
        tokens: how the text is split.
        extra_size: numbers of a vector of extra information, in a further column; None for none.
        name: the file, for messages.

    Raises:
        DataError: a line has not the extra information that is asked for.
    """
    tokenizer = Tokenizer(tokens)
    return [
        Pair(
            tokenizer.split(pair.source),
            pair.target.split() if task == "tag" else [pair.target],
            pair.line,
            parse_extra(pair.columns, (extra_size, None), place=f"{name}:{pair.line}"),
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
    overwrite: bool = False,
    features: Features | None = None,
    device: AnyDevice = None,
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
        source_embeddings, overwrite, features, device: as for :func:`start`.

    Raises:
        CheckpointError: ``out`` holds a model, and it may not be replaced.
        DataError: there are no examples, one has not the right number of labels, or a file of
            vectors cannot be used.
        ValueError: the task is unknown, or an option does not go with it.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    place = find_device(device)
    _check_begin(data, out, overwrite=overwrite)
    parts = [data] if validation is None else [data, validation]
    for part in parts:
        check_labels(part.pairs, name=part.name, per_token=task == "tag", features=features)
    source_vocab: Vocab | None = None
    if features is None:
        source_vocab = Vocab.build(pair.source for pair in data.pairs)
    _check_features(model, features, source_embeddings)
    model = replace(model, source_features=None if features is None else features.size)
    labels = Labels.build(pair.target for part in parts for pair in part.pairs)
    pretrained = _read_embeddings({"source": (source_embeddings, source_vocab)}, options.seed, log)
    if "source" in pretrained:
        model = replace(model, embedding_size=pretrained["source"].matrix.shape[1])
    torch.manual_seed(options.seed)
    labeler = Labeler(
        model.build(task, source_vocab, labels),
        source_vocab,
        labels,
        source_tokens=tokens,
        features=features,
    )
    for side, found in pretrained.items():
        found.copy_to(labeler.model.embeddings()[side])
    labeler.model.to(place)
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
    files: Mapping[str, tuple[EmbeddingsFile | None, Vocab | None]],
    seed: int,
    log: Callable[[str], None] | None,
) -> dict[str, Embeddings]:
    """By side, what the files that are given hold for the vocabularies."""
    found = {}
    for side, (file, vocab) in files.items():
        if file is not None and vocab is not None:
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


def last_checkpoint(
    out: str | Path, *, device: AnyDevice = None
) -> tuple[checkpoint.Saved, checkpoint.TrainingState]:
    """What the last checkpoint in ``out`` holds, and the part of it that is for training.

    Args:
        out: the folder of the run.
        device: where the model goes; see :func:`pyseq.load`.

    Raises:
        CheckpointError: there is no such checkpoint, or it has no training state.
    """
    folder = Path(out) / LAST
    saved = checkpoint.load(folder, device=device)
    if saved.training is None:
        raise CheckpointError(f"{folder}: this model was saved without its training state")
    return saved, saved.training


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
    features: Features | None = None,
    device: AnyDevice = None,
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
        features: of a model that reads them, those that the run was begun with.
        device: where the model is trained, which may be another one than before. Default: the CPU.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not one of this data or of
            these vectors.
        DataError: a file of vectors cannot be used.
        ValueError: the features are of another size than the model's; ``epochs``,
            ``checkpoint_every`` or ``patience`` is below 1.
    """
    saved, state = last_checkpoint(out, device=device)
    folder = Path(out) / LAST
    for each in (folder, Path(out)):
        checkpoint.settle(each)
    translator: Translator | Labeler
    if isinstance(saved.model, Seq2Seq):
        translator = Translator.from_saved(saved, folder)
    else:
        translator = Labeler.from_saved(saved, folder)
    translator.features = features
    try:
        options = begun_options(state)
        options = replace(
            options,
            epochs=options.epochs if epochs is None else epochs,
            checkpoint_every=(
                options.checkpoint_every if checkpoint_every is None else checkpoint_every
            ),
            patience=options.patience if patience is None else patience,
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
