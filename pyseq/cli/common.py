# SPDX-License-Identifier: Apache-2.0
"""What the commands share: what they say, numbers as arguments, and files of pairs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import checkpoint, scheduled, training
from ..devices import find_device
from ..errors import DeviceError, PyseqError
from ..recurrent import LayerOptions
from ..seq2seq import Seq2Seq
from ..text import Features, PairsFile, TextPair, read_pairs

#: The task that a saved model was trained for, by what it is.
TASK_OF: dict[str, training.TaskName] = {"Tagger": "tag", "Classifier": "classify"}

# OpenMP ends the process, without a word in places, where the system cannot give that many threads.
_MOST_THREADS = 1024

EXIT_SIGNAL = 128  # plus the signal's number, as shells have it


class Parser(argparse.ArgumentParser):
    """One whose PAIRS.tsv may stand behind options, wherever the command's other words stand.

    argparse of Python below 3.12.7 takes an argument that may be missing for missing when the first
    of the others is found.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        found, rest = super().parse_known_args(args, namespace)
        if rest and not rest[0].startswith("-") and getattr(found, "pairs", rest) is None:
            found.pairs = rest.pop(0)
        return found, rest


def say(text: str) -> None:
    print(f"pyseq: {text}", file=sys.stderr)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def place(text: str) -> str:
    if not text:  # which would be the folder that the command is run in
        raise argparse.ArgumentTypeError("must name a place, got ''")
    return text


def thread_count(text: str) -> int:
    value = positive(text)
    if value > _MOST_THREADS:
        raise argparse.ArgumentTypeError(f"must be at most {_MOST_THREADS}, got {value}")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 2**63, got {value}")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {value}")
    return value


def schedule(text: str) -> scheduled.Schedule:
    try:
        return scheduled.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def layer_options(text: str) -> LayerOptions:
    try:
        return LayerOptions.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# argparse prints the name of the function when a text is not a number.
positive.__name__ = "positive integer"
thread_count.__name__ = "number of threads"
seed.__name__ = "integer"
share.__name__ = "share"


def add_threads(command: Any) -> None:
    command.add_argument(
        "--threads", type=thread_count, metavar="N", help="CPU threads (default: torch's choice)"
    )


def device(text: str) -> torch.device:
    try:
        return find_device(text)
    except DeviceError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_device(command: Any) -> None:
    command.add_argument(
        "--device",
        type=device,
        default="cpu",
        metavar="DEVICE",
        help="where the model is: cpu, cuda or cuda:1 (default: %(default)s)",
    )


def add_features(command: Any) -> None:
    command.add_argument(
        "--source-features",
        dest="features",
        metavar="FILE",
        help="vectors (S, D) in place of source tokens: a file of safetensors, or X.npz of numpy; "
        "sources are the names of its arrays",
    )


def given_features(arguments: argparse.Namespace) -> Features | None:
    """The file of features, if there is one."""
    return None if arguments.features is None else Features.read(arguments.features)


def begin(arguments: argparse.Namespace) -> None:
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)


def gives_labels(folder: str) -> bool:
    return checkpoint.kind(folder) != Seq2Seq.__name__


def require_one_source(arguments: argparse.Namespace) -> None:
    if (arguments.pairs is None) != (arguments.task == "g2p"):
        raise PyseqError("give either a file of pairs or --task g2p")


def read_texts(
    path: str, *, skip_bad_lines: bool, log: Callable[[str], None] | None = say
) -> list[TextPair]:
    """The pairs of a file; ``log`` is told of lines that are left out."""
    found: PairsFile = read_pairs(path, skip_bad_lines=skip_bad_lines)
    if found.skipped and log is not None:
        log(f"{len(found.skipped)} bad lines left out, the first: {found.skipped[0]}")
    return found.pairs
