# SPDX-License-Identifier: Apache-2.0
"""``pyseq predict``: an output line for each line of standard input."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError, PyseqError
from ..labeler import Labeler
from ..plot import save_heatmap
from ..text import SPECIALS, read_lines
from ..translator import Translation, Translator
from ..types import STOP
from .common import (
    add_device,
    add_features,
    add_threads,
    begin,
    given_features,
    gives_labels,
    place,
    positive,
    say,
)
from .searching import Searcher, add_search, load, refuse_search


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "predict",
        help="read lines from standard input, write one output line for each",
        description="Read lines from standard input and write one output line for each.",
    )
    command.set_defaults(run=_predict)
    command.add_argument("model", metavar="DIR", help="a folder that pyseq train wrote")
    command.add_argument(
        "--attention",
        type=place,
        metavar="FOLDER",
        help="write a picture of the attention weights for each line: FOLDER/line-000001.png ...",
    )
    command.add_argument(
        "--n-best",
        type=positive,
        metavar="N",
        help="write the N best outputs of each line instead of one, or N draws with --sample: "
        "number of the line, log-probability in nats and output, separated by tabs",
    )
    command.add_argument(
        "--stream",
        action="store_true",
        help="write each output as it is found, piece by piece",
    )
    add_features(command)
    add_search(command)
    add_device(command)
    add_threads(command)


def _predict(arguments: argparse.Namespace) -> None:
    begin(arguments)
    if gives_labels(arguments.model):
        refuse_search(arguments)
        _predict_labels(arguments)
        return
    translator = load(arguments)
    search = Searcher(arguments, translator, need_weights=arguments.attention is not None)
    if arguments.stream:
        if arguments.n_best is not None or arguments.attention is not None:
            raise PyseqError("--stream goes without --n-best and --attention")
        _stream(translator, search)
        return
    pictures = None if arguments.attention is None else Path(arguments.attention)
    if pictures is not None:
        if any(model.config["score"] is None for model in (translator.model, *translator.others)):
            raise PyseqError(f"{arguments.model}: this model has no attention to draw")
        pictures.mkdir(parents=True, exist_ok=True)
    warned = False
    for batch in _input_batches(translator, arguments.batch_size):
        texts = [text for _, text in batch]
        for (number, text), results in zip(batch, search(texts), strict=True):
            if results[0].score == -math.inf and not warned:
                warned = True
                say(
                    f"line {number}: the options of the search allow no output, so that there is "
                    "none, here and wherever the log-probability is -inf"
                )
            if arguments.n_best is None:
                print(results[0].text)
            else:
                for result in results:
                    print(f"{number}\t{result.score:.4f}\t{result.text}")
            if pictures is not None:
                _draw(pictures / f"line-{number:06}.png", text, results[0])
        sys.stdout.flush()


def _stream(translator: Translator, search: Searcher) -> None:
    for batch in _input_batches(translator, 1):
        for _, text in batch:
            for piece in search.stream(text):
                print(piece, end="", flush=True)
            print(flush=True)


def _predict_labels(arguments: argparse.Namespace) -> None:
    labeler = Labeler.load(
        arguments.model, features=given_features(arguments), device=arguments.device
    )
    for batch in _input_batches(labeler, arguments.batch_size):
        for result in labeler.predict([text for _, text in batch]):
            print(result.text)
        sys.stdout.flush()


def _input_batches(model: Translator | Labeler, batch_size: int) -> Iterator[list[tuple[int, str]]]:
    """Numbers and texts of lines that are computed together; says once what is unknown."""
    # At a terminal each line is answered before the next one is typed.
    size = 1 if sys.stdin.isatty() else batch_size
    warned = False
    for batch in _batches(_input_lines(), size):
        for number, text in batch:
            unknown = model.unknown_symbols(text)
            if unknown and not warned:
                warned = True
                say(
                    f"line {number}: {unknown[0]!r} was not in the training data and is read as "
                    "<unk>, like all such symbols from here on"
                )
        yield batch


def _input_lines() -> Iterator[tuple[int, str]]:
    for number, text in read_lines(sys.stdin.buffer, name="standard input"):
        if isinstance(text, DataError):
            raise text
        yield number, text


def _batches(lines: Iterator[tuple[int, str]], size: int) -> Iterator[list[tuple[int, str]]]:
    while batch := list(islice(lines, size)):
        yield batch


def _draw(path: Path, text: str, result: Translation) -> None:
    columns = [*result.source_tokens, SPECIALS[STOP]]
    # A blank line is not read, and nothing is looked at for an empty output.
    weights = torch.empty(0, len(columns)) if not result.tokens else result.weights
    assert weights is not None  # _predict refuses models without attention
    save_heatmap(
        path,
        weights,
        rows=result.tokens,
        columns=columns,
        title=f"{text} → {result.text}",
    )
