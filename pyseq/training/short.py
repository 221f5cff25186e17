# SPDX-License-Identifier: Apache-2.0
"""The short way: from pairs of strings to a translator, or from labelled lines to a labeler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..bridge import BridgeName
from ..copying import CopyName
from ..embeddings import EmbeddingsFile
from ..errors import DataError
from ..extra import ExtraMode, ExtraPlace
from ..labeler import Labeler
from ..tagger import PoolingName
from ..text import TextPair, Tokenizer, make_pair, tokenise_pairs
from ..translator import Translator
from ..types import CellName, FeedName, HistoryName, OrderName, ScoreName, WindowName
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
    overwrite: bool = False,
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
        overwrite: whether a model that ``out`` holds may be replaced.
        log: is called with a line of text after each epoch, ``print`` for example.

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
        overwrite=overwrite,
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
    overwrite: bool = False,
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
        epochs, batch_size, learning_rate, seed, freeze_source, source_embeddings, out,
            overwrite, log: as for :func:`train`.

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
        overwrite=overwrite,
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
