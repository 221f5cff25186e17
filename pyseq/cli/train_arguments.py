# SPDX-License-Identifier: Apache-2.0
"""The arguments of ``pyseq train``, most of them the fields of the options classes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .. import embeddings, training
from ..bridge import BRIDGES
from ..copying import COPIES
from ..extra import EXTRA_MODES, EXTRA_PLACES
from ..recurrent import CELLS, layer_cell
from ..text import TOKENS
from ..training import LabelerOptions, ModelOptions, TrainingOptions
from ..types import FEEDS, HISTORIES, ORDERS, SCORES, WINDOWS
from .common import add_device, add_features, add_threads, place, positive, seed, share
from .fields import Need, add_fields, given_fields, require_switches

MODEL: dict[str, str] = {
    "embedding_size": "numbers in an embedding",
    "hidden_size": "units of a layer",
    "num_layers": "layers of encoder and decoder",
    "cell": "recurrent cell",
    "encoder_cell": "that of the encoder; else --cell",
    "bidirectional": "read the source forwards only",
    "dropout": "dropout probability",
    "source_embedding_size": "numbers in an embedding of the source; else --embedding-size",
    "target_embedding_size": "numbers in an embedding of the target; else --embedding-size",
    "encoder_hidden_size": "units of a layer of the encoder; else --hidden-size",
    "encoder_num_layers": "layers of the encoder; else --num-layers",
    "bridge": "what the decoder starts from",
    "tie_embeddings": "one matrix as the decoder's embedding and in its output layer",
    "context_every_step": "let the decoder read the encoder's last state at every step",
    "copy": "copy symbols of the source",
    "encoder_options": "what its layers do besides, such as layer_norm,zoneout_h=0.1",
    "decoder_options": "what the decoder's layers do besides, likewise",
    "memory_bias": "give combination and keys of attention a bias",
    "bridge_c_from_h": "make the decoder's first c of the encoder's h",
}

ATTENTION: dict[str, str] = {
    "score": "attention score",
    "input_feeding": "do not feed the attentional vector into the next step",
    "order": "attention after the cells, or before them",
    "feed": "what is fed to the next step; else output, or with --order bahdanau context",
    "heads": "heads of attention",
    "window": "attention over a window only",
    "window_size": "positions on either side of its centre; else 10",
    "history": "past weights that enter --score concat",
    "history_size": "how many neighbours of a position's; else 31",
    "attention_size": "units of --score concat; else --hidden-size",
    "max_positions": "positions that --score location can see",
    "coverage_loss": "weight of the coverage loss",
}

EXTRA: dict[str, str] = {
    "source_extra_size": "numbers of extra information for the source, in a further column, "
    "or of each step with semicolons between steps",
    "target_extra_size": "numbers of extra information for the target, in a further column",
    "extra_mode": "how it enters",
    "extra_hidden_size": "hidden units of --extra-mode mlp",
    "extra_place": "where it enters",
}

LABELS: dict[str, str] = {
    "pooling": "what --task classify judges by: the last state, or mean or maximum over all; "
    "else last",
}

TRAINING: dict[str, str] = {
    "epochs": "passes over the data",
    "batch_size": "pairs of a batch",
    "optimizer": "what updates",
    "learning_rate": "learning rate; for sgd try 1",
    "schedule": "of the learning rate",
    "warmup_steps": "steps of --schedule warmup",
    "halve_after": "epochs of --schedule halving",
    "halve_every": "epochs between its halvings",
    "select": "what tells the best epoch, of the validation pairs",
    "patience": "epochs without a better one, then stop",
    "average": "of the weights, which is what DIR gets",
    "average_decay": "of --average exponential",
    "average_epochs": "epochs of --average epochs",
    "clip_norm": "largest norm of the gradients",
    "label_smoothing": "share spread over all symbols",
    "scheduled_sampling": "how often the decoder reads the truth: constant:EPSILON, "
    "linear:SLOPE[,BEGIN[,LEAST]], exponential:K or inverse-sigmoid:K, by the number of updates",
    "sampling_choice": "what it reads else",
    "sampling_coin": "thrown for each",
    "seed": "fixes everything random",
    "checkpoint_every": "steps between checkpoints",
}

#: Options that do nothing unless another one is set.
NEEDS: dict[str, tuple[Need, ...]] = {
    "warmup_steps": (Need("schedule", ("warmup",)),),
    "halve_after": (Need("schedule", ("halving",)),),
    "halve_every": (Need("schedule", ("halving",)),),
    "average_decay": (Need("average", ("exponential",)),),
    "average_epochs": (Need("average", ("epochs",)),),
    "sampling_choice": (Need("scheduled_sampling"),),
    "sampling_coin": (Need("scheduled_sampling"),),
    "extra_mode": (Need("source_extra_size"), Need("target_extra_size")),
    "extra_place": (Need("source_extra_size"), Need("target_extra_size")),
    "extra_hidden_size": (Need("extra_mode", ("mlp",)),),
    "embeddings_format": (Need("source_embeddings"), Need("target_embeddings")),
    "fold_case": (Need("source_embeddings"), Need("target_embeddings")),
    "pooling": (Need("task", ("classify",)),),
}


#: The names that options take which are strings.
_NAMES: dict[str, tuple[str, ...]] = {
    "cell": CELLS,
    "encoder_cell": CELLS,
    "bridge": BRIDGES,
    "copy": COPIES,
    "score": (*SCORES, "none"),
    "order": ORDERS,
    "feed": FEEDS,
    "window": WINDOWS,
    "history": HISTORIES,
    "extra_mode": EXTRA_MODES,
    "extra_place": EXTRA_PLACES,
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Give ``pyseq train`` its arguments."""
    command.add_argument("pairs", nargs="?", metavar="PAIRS.tsv", help="the training pairs")
    command.add_argument(
        "--task",
        choices=["g2p", *training.TASKS],
        help="g2p: train on the CMU pronouncing dictionary instead of PAIRS.tsv; tag: a label for "
        "each token; classify: a label for each line",
    )
    command.add_argument(
        "--out", type=place, required=True, metavar="DIR", help="where the model goes"
    )
    command.add_argument(
        "--tensorboard",
        type=place,
        metavar="FOLDER",
        help="write curves there that TensorBoard shows",
    )
    begun = command.add_mutually_exclusive_group()
    begun.add_argument(
        "--resume",
        action="store_true",
        help="go on from DIR/last with the options of that run; --epochs may be raised",
    )
    begun.add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew though DIR holds a model, which the new run's first checkpoint replaces",
    )
    command.add_argument(
        "--skip-bad-lines",
        action="store_true",
        help="leave out lines that are not pairs instead of stopping",
    )
    _add_data(command.add_argument_group("data"))
    add_fields(command.add_argument_group("model"), ModelOptions, MODEL, _NAMES)
    add_fields(command.add_argument_group("attention"), ModelOptions, ATTENTION, _NAMES)
    add_fields(command.add_argument_group("extra information"), ModelOptions, EXTRA, _NAMES)
    add_fields(command.add_argument_group("labels"), LabelerOptions, LABELS)
    _add_embeddings(command.add_argument_group("pretrained embeddings"))
    group = command.add_argument_group("training")
    add_fields(group, TrainingOptions, TRAINING, from_zero=("warmup_steps", "seed"))
    add_device(group)
    add_threads(group)


def _add_data(group: Any) -> None:
    group.add_argument("--tokens", choices=TOKENS, help="how both sides are split (default: char)")
    group.add_argument("--source-tokens", choices=TOKENS, help="how the source is split")
    add_features(group)
    group.add_argument("--target-tokens", choices=TOKENS, help="how the target is split")
    group.add_argument(
        "--min-count",
        type=positive,
        metavar="N",
        help="symbols that a new run sees less often are read as <unk> (default: 1)",
    )
    group.add_argument(
        "--reverse-source",
        action="store_true",
        help="read sources backwards; helps models without attention that read in one direction",
    )
    held_out = group.add_mutually_exclusive_group()
    held_out.add_argument("--valid", metavar="FILE", help="validation pairs")
    held_out.add_argument(
        "--valid-share",
        type=share,
        metavar="SHARE",
        help="share of the sources held out for validation if there is no --valid "
        f"(default: {VALID_SHARE})",
    )
    group.add_argument(
        "--valid-seed",
        type=seed,
        metavar="N",
        help="fixes which are held out, whatever --seed is, so that runs with several seeds have "
        f"the same vocabularies and are judged by the same pairs (default: {VALID_SEED})",
    )


#: Of the sources, held out for validation, and what fixes which of them.
VALID_SHARE = 0.05
VALID_SEED = 1


def _add_embeddings(group: Any) -> None:
    for side in ("source", "target"):
        group.add_argument(
            f"--{side}-embeddings",
            metavar="FILE",
            help=f"vectors with which the embeddings of the {side} begin: word2vec, GloVe, or "
            "X.npy with the words in X.txt; FILE may end in .gz",
        )
        group.add_argument(
            f"--freeze-{side}",
            type=_freeze,
            default=argparse.SUPPRESS,
            metavar="EPOCHS",
            help=f"do not train the embeddings of the {side} in the first EPOCHS, or in all",
        )
    group.add_argument(
        "--embeddings-format",
        choices=embeddings.FORMATS,
        help="of both files (default: by the name or the first line)",
    )
    group.add_argument(
        "--fold-case",
        action="store_true",
        help="a word may take the vector of another that differs in upper and lower case",
    )


def _freeze(text: str) -> int | None:
    return None if text == "all" else positive(text)


_freeze.__name__ = "number of epochs, or all"


def given_options(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """The fields of an options class that were given, and what follows from them."""
    given = given_fields(arguments, options)
    for name in {"cell", "encoder_cell"} & given.keys():
        given[name] = layer_cell(given[name])  # as the model and its checkpoint have it
    if options is ModelOptions and "score" in given and given["score"] is None:
        given.setdefault("input_feeding", False)  # what is fed back is made by attention
    return given


def check_given(arguments: argparse.Namespace, presets: Mapping[str, Any]) -> None:
    """Refuse options that do nothing without others.

    Args:
        arguments: of a new run.
        presets: values that stand in for the defaults.
    """
    settings: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for kind in (LabelerOptions, ModelOptions, TrainingOptions):
        settings |= {field.name: field.default for field in fields(kind)}
        given |= given_options(arguments, kind)
    for name in ("source_embeddings", "target_embeddings", "embeddings_format", "fold_case"):
        if getattr(arguments, name):
            given[name] = getattr(arguments, name)
    require_switches(given, {**settings, **presets, **given, "task": arguments.task}, NEEDS)
