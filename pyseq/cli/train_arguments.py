# SPDX-License-Identifier: Apache-2.0
"""The arguments of ``pyseq train``, most of them the fields of the options classes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from .. import embeddings, scheduled, training
from ..averaging import AVERAGES
from ..bridge import BRIDGES
from ..copying import COPIES
from ..extra import EXTRA_MODES, EXTRA_PLACES
from ..tagger import POOLINGS
from ..text import TOKENS
from ..training import ModelOptions, TrainingOptions
from ..types import FEEDS, GATES, HISTORIES, ORDERS, SCORES, WINDOWS
from .common import add_threads, positive, schedule, share


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Give ``pyseq train`` its arguments."""
    command.add_argument("pairs", nargs="?", metavar="PAIRS.tsv", help="the training pairs")
    command.add_argument(
        "--task",
        choices=["g2p", *training.TASKS],
        help="g2p: train on the CMU pronouncing dictionary instead of PAIRS.tsv; tag: a label for "
        "each token; classify: a label for each line",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="where the model goes")
    command.add_argument(
        "--tensorboard", metavar="FOLDER", help="write curves there that TensorBoard shows"
    )
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on from DIR/last with the options of that run; --epochs may be raised",
    )
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew though DIR holds a model, which the new run's first checkpoint replaces",
    )
    command.add_argument(
        "--skip-bad-lines",
        action="store_true",
        help="leave out lines that are not pairs instead of stopping",
    )

    group = command.add_argument_group("data")
    group.add_argument("--tokens", choices=TOKENS, help="how both sides are split (default: char)")
    group.add_argument("--source-tokens", choices=TOKENS, help="how the source is split")
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
        default=0.05,
        metavar="SHARE",
        help="share of the sources held out for validation if there is no --valid (default: 0.05)",
    )

    group = command.add_argument_group("model")
    add_option(group, ModelOptions, "embedding_size", positive, "numbers in an embedding")
    add_option(group, ModelOptions, "hidden_size", positive, "units of a layer")
    add_option(group, ModelOptions, "num_layers", positive, "layers of encoder and decoder")
    add_option(group, ModelOptions, "cell", str, "recurrent cell", choices=tuple(GATES))
    add_option(group, ModelOptions, "score", str, "attention score", choices=(*SCORES, "none"))
    for name, kind, text, choices in (
        ("order", str, "attention after the cells, or before them", ORDERS),
        ("feed", str, "what is fed to the next step (default: output)", FEEDS),
        ("heads", positive, "heads of attention", None),
        ("window", str, "attention over a window only", WINDOWS),
        ("window_size", positive, "positions on either side of its centre (default: 10)", None),
        ("history", str, "past weights that enter --score concat", HISTORIES),
        ("history_size", positive, "how many neighbours of a position's (default: 31)", None),
        ("attention_size", positive, "units of --score concat (default: --hidden-size)", None),
        ("max_positions", positive, "positions that --score location can see", None),
        ("coverage_loss", float, "weight of the coverage loss (default: 0)", None),
    ):
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            choices=choices,
            default=argparse.SUPPRESS,
            metavar=None if choices else "N",
            help=text,
        )
    add_option(group, ModelOptions, "copy", str, "copy symbols of the source", choices=COPIES)
    add_switch(group, "bidirectional", "read the source forwards only")
    add_switch(group, "input_feeding", "do not feed the attentional vector into the next step")
    add_option(group, ModelOptions, "dropout", float, "dropout probability")
    for name, text, default in (
        ("source_embedding_size", "numbers in an embedding of the source", "embedding_size"),
        ("target_embedding_size", "numbers in an embedding of the target", "embedding_size"),
        ("encoder_hidden_size", "units of a layer of the encoder", "hidden_size"),
        ("encoder_num_layers", "layers of the encoder", "num_layers"),
    ):
        add_option(group, ModelOptions, name, positive, text, default_text=default)
    add_option(group, ModelOptions, "bridge", str, "what the decoder starts from", choices=BRIDGES)
    group.add_argument(
        "--tie-embeddings",
        action="store_true",
        default=argparse.SUPPRESS,
        help="one matrix as the decoder's embedding and in its output layer",
    )
    group.add_argument(
        "--context-every-step",
        action="store_true",
        default=argparse.SUPPRESS,
        help="let the decoder read the encoder's last state at every step",
    )

    for side in ("source", "target"):
        text = f"numbers of extra information for the {side}, in a further column"
        add_option(group, ModelOptions, f"{side}_extra_size", positive, text)
    add_option(group, ModelOptions, "extra_mode", str, "how it enters", choices=EXTRA_MODES)
    add_option(
        group, ModelOptions, "extra_hidden_size", positive, "hidden units of --extra-mode mlp"
    )
    add_option(group, ModelOptions, "extra_place", str, "where it enters", choices=EXTRA_PLACES)
    group.add_argument(
        "--pooling",
        choices=POOLINGS,
        default=argparse.SUPPRESS,
        help="what --task classify judges by: the last state, or mean or maximum over all "
        "(default: last)",
    )

    group = command.add_argument_group("pretrained embeddings")
    for side in ("source", "target"):
        group.add_argument(
            f"--{side}-embeddings",
            metavar="FILE",
            help=f"vectors with which the embeddings of the {side} begin: word2vec, GloVe, or "
            "X.npy with the words in X.txt; FILE may end in .gz",
        )
        group.add_argument(
            f"--freeze-{side}",
            type=positive,
            nargs="?",
            const=None,
            default=argparse.SUPPRESS,
            metavar="EPOCHS",
            help=f"do not train the embeddings of the {side}: in the first epochs, or without a "
            "number in all",
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

    group = command.add_argument_group("training")
    add_option(group, TrainingOptions, "epochs", positive, "passes over the data")
    add_option(group, TrainingOptions, "batch_size", positive, "pairs of a batch")
    add_option(
        group, TrainingOptions, "optimizer", str, "what updates", choices=training.OPTIMIZERS
    )
    add_option(group, TrainingOptions, "learning_rate", float, "learning rate; for sgd try 1")
    add_option(
        group, TrainingOptions, "schedule", str, "of the learning rate", choices=training.SCHEDULES
    )
    add_option(
        group,
        TrainingOptions,
        "select",
        str,
        "what tells the best epoch, of the validation pairs",
        choices=training.SELECTIONS,
    )
    add_option(group, TrainingOptions, "warmup_steps", int, "steps of --schedule warmup")
    add_option(group, TrainingOptions, "halve_after", float, "epochs of --schedule halving")
    add_option(group, TrainingOptions, "halve_every", float, "epochs between its halvings")
    add_option(
        group, TrainingOptions, "patience", positive, "epochs without a better one, then stop"
    )
    add_option(
        group,
        TrainingOptions,
        "average",
        str,
        "of the weights, which is what DIR gets",
        choices=AVERAGES,
    )
    add_option(group, TrainingOptions, "average_decay", float, "of --average exponential")
    add_option(group, TrainingOptions, "average_epochs", positive, "epochs of --average epochs")
    add_option(group, TrainingOptions, "clip_norm", float, "largest norm of the gradients")
    add_option(group, TrainingOptions, "label_smoothing", float, "share spread over all symbols")
    add_option(
        group,
        TrainingOptions,
        "scheduled_sampling",
        schedule,
        "how often the decoder reads the truth: constant:EPSILON, linear:SLOPE[,BEGIN[,LEAST]], "
        "exponential:K or inverse-sigmoid:K, by the number of updates",
    )
    add_option(
        group,
        TrainingOptions,
        "sampling_choice",
        str,
        "what it reads else",
        choices=scheduled.CHOICES,
    )
    add_option(
        group, TrainingOptions, "sampling_coin", str, "thrown for each", choices=scheduled.COINS
    )
    add_option(group, TrainingOptions, "seed", int, "fixes everything random")
    add_option(group, TrainingOptions, "checkpoint_every", positive, "steps between checkpoints")
    add_threads(group)


def add_option(
    group: Any,
    options: type[ModelOptions] | type[TrainingOptions],
    name: str,
    kind: Callable[[str], Any],
    text: str,
    *,
    choices: Sequence[str] | None = None,
    default_text: str | None = None,
) -> None:
    """An argument for one field of an options class, absent from the result if not given."""
    default = getattr(options, name)
    group.add_argument(
        f"--{name.replace('_', '-')}",
        type=kind,
        choices=choices,
        default=argparse.SUPPRESS,
        metavar=None if choices else "N",
        help=f"{text} (default: {default if default_text is None else default_text})",
    )


def add_switch(group: Any, name: str, text: str) -> None:
    """``--no-NAME`` for a field that is true by default, absent from the result if not given."""
    group.add_argument(
        f"--no-{name.replace('_', '-')}",
        dest=name,
        action="store_false",
        default=argparse.SUPPRESS,
        help=text,
    )
