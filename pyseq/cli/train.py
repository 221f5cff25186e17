# SPDX-License-Identifier: Apache-2.0
"""``pyseq train``: a model from a file of pairs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .. import distributed, g2p, metrics, training
from ..embeddings import EmbeddingsFile
from ..errors import PyseqError
from ..recurrent import LayerOptions
from ..text import Pair, Tokenizer, hold_out
from ..text import tokenise_pairs as tokenise
from ..training import Data, Interrupted, LabelerOptions, ModelOptions, Trainer, TrainingOptions
from ..translator import Translator
from .common import EXIT_SIGNAL, TASK_OF, begin, given_features, read_texts, require_one_source, say
from .fields import flag
from .train_arguments import VALID_SEED, VALID_SHARE, add_arguments, check_given, given_options


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "train",
        help="train a model from a file of pairs",
        description="Train a model. PAIRS.tsv holds one pair a line, source and target "
        "separated by a tab, in UTF-8; further columns are ignored, or hold extra information. "
        "For --task tag the target is one label for each token of the source, separated by "
        "spaces; for --task classify it is one label. DIR gets the best model, DIR/last the last "
        "checkpoint.",
    )
    command.set_defaults(run=_train)
    add_arguments(command)


def _train(arguments: argparse.Namespace) -> None:
    begin(arguments)
    require_one_source(arguments)
    if arguments.task == "g2p":
        _refuse_files(arguments)
        metrics.require_packages(text_scores=False)
    out = Path(arguments.out)
    held = None if arguments.resume or arguments.overwrite else training.held_model(out)
    if held is not None:
        raise PyseqError(
            f"{held}: holds a model already; give --resume to go on with it, --overwrite to begin "
            "anew, or another --out"
        )
    with distributed.joined(arguments.device) as processes:
        log = say if processes.is_first else None
        begin_run = _resume if arguments.resume else _start
        trainer = begin_run(arguments, out, log)
        if not processes.is_first:
            try:
                trainer.run()
            except Interrupted as error:  # the first one says so
                raise SystemExit(EXIT_SIGNAL + error.signum) from error
            return
        validation = trainer.validation
        say(
            f"{len(trainer.examples):,} training pairs, "
            f"{0 if validation is None else len(validation):,} for validation, "
            f"{sum(p.numel() for p in trainer.model.parameters()):,} weights, "
            f"{torch.get_num_threads()} threads"
            + (f" in each of {processes.count} processes" if processes.count > 1 else "")
        )
        trainer.run()
    if arguments.task == "g2p":
        print(g2p.summary(Translator.load(out, device=arguments.device)))


def _refuse_files(arguments: argparse.Namespace) -> None:
    """Refuse what is about a file of pairs, for the task that brings its own."""
    split = ("tokens", "source_tokens", "target_tokens", "features")
    for name in ("valid", "valid_share", "valid_seed", "skip_bad_lines", *split):
        if getattr(arguments, name) not in (None, False):
            raise PyseqError(
                "--task g2p brings its own words, and their split: leave "
                f"{'--source-features' if name == 'features' else flag(name)} out"
            )


def _label_options(arguments: argparse.Namespace) -> LabelerOptions:
    """What a Tagger or Classifier is made of; what belongs to a decoder is refused."""
    given = set(given_options(arguments, ModelOptions)) - {
        field.name for field in fields(LabelerOptions)
    }
    others = ("target_tokens", "target_embeddings", "reverse_source", "min_count")
    for name in (*sorted(given), *(name for name in others if getattr(arguments, name))):
        raise PyseqError(f"a model of labels has no decoder and takes no {name}: leave it out")
    return LabelerOptions(**given_options(arguments, LabelerOptions))


def _embeddings_file(arguments: argparse.Namespace, side: str) -> EmbeddingsFile | None:
    path = getattr(arguments, f"{side}_embeddings")
    if path is None:
        return None
    return EmbeddingsFile(path, format=arguments.embeddings_format, fold_case=arguments.fold_case)


def _presets(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a task has in place of the defaults, of the model and of training."""
    return (dict(g2p.MODEL), dict(g2p.TRAINING)) if arguments.task == "g2p" else ({}, {})


def _tokens(arguments: argparse.Namespace) -> tuple[str, str]:
    """How source and target of a new run are split."""
    source, target = _text_tokens(arguments)
    if arguments.features is None:
        return source, target
    if arguments.source_tokens is not None:
        raise PyseqError("--source-tokens goes with text, not with --source-features")
    return "line", target


def _text_tokens(arguments: argparse.Namespace) -> tuple[str, str]:
    if arguments.task == "g2p":
        return g2p.SOURCE_TOKENS, g2p.TARGET_TOKENS
    if arguments.task in training.TASKS:
        source_tokens = training.LABELER_TOKENS[arguments.task]
        return arguments.source_tokens or arguments.tokens or source_tokens, "space"
    return (
        arguments.source_tokens or arguments.tokens or "char",
        arguments.target_tokens or arguments.tokens or "char",
    )


def _start(arguments: argparse.Namespace, out: Path, log: Callable[[str], None] | None) -> Trainer:
    tokens = _tokens(arguments)
    model_preset, training_preset = _presets(arguments)
    check_given(arguments, {**model_preset, **training_preset})
    model_given = {**model_preset, **given_options(arguments, ModelOptions)}
    training_given = {**training_preset, **given_options(arguments, TrainingOptions)}
    _refuse_embedding_size(arguments, model_given)
    try:
        options = TrainingOptions(**training_given)
        data, validation = _data(arguments, tokens, model_given, log)
        if validation is None and "select" in training_given:
            raise PyseqError("--select goes with validation pairs, and there are none")
        if arguments.task in training.TASKS:
            return training.start_labeler(
                data,
                validation,
                task=arguments.task,
                tokens=tokens[0],
                model=_label_options(arguments),
                options=options,
                out=out,
                overwrite=arguments.overwrite,
                progress=True,
                log=log,
                tensorboard=arguments.tensorboard,
                source_embeddings=_embeddings_file(arguments, "source"),
                features=given_features(arguments),
                device=arguments.device,
            )
        return training.start(
            data,
            validation,
            tokens=tokens,
            reverse_source=arguments.reverse_source,
            min_count=arguments.min_count or 1,
            model=ModelOptions(**model_given),
            options=options,
            out=out,
            overwrite=arguments.overwrite,
            progress=True,
            log=log,
            tensorboard=arguments.tensorboard,
            source_embeddings=_embeddings_file(arguments, "source"),
            target_embeddings=_embeddings_file(arguments, "target"),
            features=given_features(arguments),
            device=arguments.device,
        )
    except PyseqError:
        raise
    except ValueError as error:  # an option that argparse cannot judge
        raise PyseqError(str(error)) from error


def _refuse_embedding_size(arguments: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Refuse a size that the files of vectors set for every side that has it."""
    sides = ("source",) if arguments.task in training.TASKS else ("source", "target")
    if hasattr(arguments, "embedding_size") and all(
        getattr(arguments, f"{side}_embeddings") or given.get(f"{side}_embedding_size")
        for side in sides
    ):
        raise PyseqError(
            "--embedding-size has no side left to be about: the vectors in "
            f"{arguments.source_embeddings or arguments.target_embeddings} and the sizes of the "
            "sides say it all; leave it out"
        )


def _resume(arguments: argparse.Namespace, out: Path, log: Callable[[str], None] | None) -> Trainer:
    saved, state = training.last_checkpoint(out)
    tokens = (saved.source_tokens or "char", saved.target_tokens or "char")
    task = TASK_OF.get(type(saved.model).__name__)
    if arguments.task not in (task, None if task is not None else "g2p"):
        raise PyseqError(f"--resume goes on with --task {task}, got {arguments.task}")
    if task is not None:
        _label_options(arguments)
        arguments.task = task
        tokens = (tokens[0], tokens[0])  # --tokens is about the source
    begun = vars(training.begun_options(state))
    _refuse_changes(arguments, {**saved.model.config, **begun}, tokens)
    if arguments.reverse_source and not saved.reverse_source:
        raise PyseqError(
            "--resume goes on with sources as they stand: leave --reverse-source out, or begin "
            "a new run"
        )
    if arguments.min_count is not None:
        raise PyseqError(
            "--resume goes on with the vocabularies of that run: leave --min-count out"
        )
    data, validation = _data(arguments, tokens, saved.model.config, log)
    return training.resume(
        data,
        validation,
        out=out,
        epochs=getattr(arguments, "epochs", None),
        checkpoint_every=getattr(arguments, "checkpoint_every", None),
        patience=getattr(arguments, "patience", None),
        progress=True,
        log=log,
        tensorboard=arguments.tensorboard,
        source_embeddings=_embeddings_file(arguments, "source"),
        target_embeddings=_embeddings_file(arguments, "target"),
        features=given_features(arguments),
        device=arguments.device,
    )


def _refuse_changes(
    arguments: argparse.Namespace, options: dict[str, Any], tokens: tuple[str, str]
) -> None:
    """Refuse arguments that contradict the run to be resumed."""
    now: dict[str, Any] = {}
    for kind in (ModelOptions, LabelerOptions, TrainingOptions):
        now |= given_options(arguments, kind)
    before = {**options, "source_tokens": tokens[0], "target_tokens": tokens[1]}
    for side in ("source_tokens", "target_tokens"):
        value = getattr(arguments, side) or arguments.tokens
        if value is not None:
            now[side] = value
    for name, value in now.items():
        if isinstance(value, LayerOptions):
            before[name] = LayerOptions.of(before.get(name) or {})
        if name not in training.FREE_ON_RESUME and before.get(name) != value:
            raise PyseqError(
                f"--resume goes on with {name} = {before.get(name)}, got {value}: leave the "
                "option out, or begin a new run"
            )


def _data(
    arguments: argparse.Namespace,
    tokens: tuple[str, str],
    options: Mapping[str, Any],
    log: Callable[[str], None] | None,
) -> tuple[Data, Data | None]:
    """Training and validation pairs, for a model with these options."""
    if arguments.task == "g2p":
        parts = g2p.load()
        return (
            Data(g2p.pairs(parts.train), "cmudict (training words)"),
            Data(g2p.pairs(parts.validation), "cmudict (validation words)"),
        )

    def read(path: str) -> list[Pair]:
        texts = read_texts(path, skip_bad_lines=arguments.skip_bad_lines, log=log)
        if arguments.task in training.TASKS:
            return training.tokenise_labels(
                texts,
                task=arguments.task,
                tokens=tokens[0],
                extra_size=options.get("source_extra_size"),
                name=path,
            )
        return tokenise(
            texts,
            source=Tokenizer(tokens[0]),
            target=Tokenizer(tokens[1]),
            extra_sizes=(options.get("source_extra_size"), options.get("target_extra_size")),
            name=path,
        )

    if arguments.valid is not None and arguments.valid_seed is not None:
        raise PyseqError("--valid-seed goes with pairs held out, not with --valid")
    pairs = read(arguments.pairs)
    if arguments.valid is not None:
        held = read(arguments.valid)
        return Data(pairs, arguments.pairs), Data(held, arguments.valid)
    share = VALID_SHARE if arguments.valid_share is None else arguments.valid_share
    seed = VALID_SEED if arguments.valid_seed is None else arguments.valid_seed
    pairs, held = hold_out(pairs, share, seed=seed)
    return Data(pairs, arguments.pairs), Data(held, arguments.pairs) if held else None
