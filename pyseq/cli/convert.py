# SPDX-License-Identifier: Apache-2.0
"""``pyseq import``: another library's model as one of pyseq."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import checkpoint, importers
from ..errors import PyseqError
from .common import place, say
from .fields import flag

_LAYERS = "layers"
_OF_LAYERS = ("nonlinearity", "zoneout")
_OF_MODELS = ("source_vocab", "target_vocab", "initial_state", "scaled_embeddings")


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "import",
        help="turn a model of another library into one of pyseq",
        description="Read a checkpoint of another library, without running what is in it, and "
        "save the model for pyseq predict and pyseq evaluate.",
    )
    command.set_defaults(run=_import)
    command.add_argument("checkpoint", metavar="FILE", help="the other library's file")
    command.add_argument(
        "--from",
        dest="layout",
        required=True,
        choices=(*importers.LAYOUTS, _LAYERS),
        help="the library; layers: all recurrent ones of torch.nn or haste in a state",
    )
    command.add_argument(
        "--out",
        type=place,
        required=True,
        metavar="DIR",
        help="where the model goes; of layers the file, for pyseq.importers.load_layers",
    )
    command.add_argument("--overwrite", action="store_true", help="replace what is there")
    for side in ("source", "target"):
        command.add_argument(
            f"--{side}-vocab",
            metavar="FILE",
            help=f"the library's vocabulary of the {side}, where the checkpoint does not hold it",
        )
    command.add_argument(
        "--initial-state",
        choices=("zero", "last"),
        help="of a joeynmt decoder without bridge: init_hidden in its configuration",
    )
    command.add_argument(
        "--scaled-embeddings",
        action="store_true",
        help="of a joeynmt model: scale is set for the embeddings in its configuration",
    )
    command.add_argument(
        "--nonlinearity",
        choices=("tanh", "relu"),
        help="of layers of torch.nn without gates (default: tanh)",
    )
    command.add_argument(
        "--zoneout", type=float, metavar="P", help="of layers of haste, whose weights do not tell"
    )


def _import(arguments: argparse.Namespace) -> None:
    own = _OF_LAYERS if arguments.layout == _LAYERS else _OF_MODELS
    for name in (*_OF_LAYERS, *_OF_MODELS):
        if name not in own and getattr(arguments, name) not in (None, False):
            raise PyseqError(f"{flag(name)} does not go with --from {arguments.layout}")
    if arguments.layout == _LAYERS:
        _import_layers(arguments)
        return
    if checkpoint.exists(arguments.out) and not arguments.overwrite:
        raise PyseqError(
            f"{arguments.out}: holds a model already; give --overwrite to replace it, or another "
            "--out"
        )
    try:
        translator = importers.read_model(
            arguments.layout,
            arguments.checkpoint,
            source_vocab=arguments.source_vocab,
            target_vocab=arguments.target_vocab,
            initial_state=arguments.initial_state,
            scaled_embeddings=arguments.scaled_embeddings,
        )
    except PyseqError:
        raise
    except ValueError as error:  # options that do not go together
        raise PyseqError(str(error)) from error
    translator.save(arguments.out)
    assert translator.source_vocab is not None  # no other library's models read features
    say(
        f"{len(translator.source_vocab):,} source and {len(translator.target_vocab):,} target "
        f"symbols, {sum(p.numel() for p in translator.model.parameters()):,} weights"
    )


def _import_layers(arguments: argparse.Namespace) -> None:
    if Path(arguments.out).exists() and not arguments.overwrite:
        raise PyseqError(
            f"{arguments.out}: is there already; give --overwrite to replace it, or another --out"
        )
    try:
        lines = importers.convert_layers(
            arguments.checkpoint,
            arguments.out,
            nonlinearity=arguments.nonlinearity or "tanh",
            zoneout=arguments.zoneout or 0.0,
        )
    except PyseqError:
        raise
    except ValueError as error:
        raise PyseqError(str(error)) from error
    for line in lines:
        say(line)
