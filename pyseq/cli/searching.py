# SPDX-License-Identifier: Apache-2.0
"""The options of a search, for the commands that run one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch

from ..errors import PyseqError
from ..search import SearchOptions
from ..translator import Translation, Translator
from .common import given_features, positive, seed


def add_search(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--with",
        dest="others",
        action="append",
        default=[],
        metavar="DIR",
        help="a further model that predicts together with the first; may be given again",
    )
    command.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="lines computed together (default: 64)",
    )
    group = command.add_argument_group("search")
    group.add_argument(
        "--beam-size",
        type=positive,
        default=1,
        metavar="N",
        help="hypotheses that the search keeps (default: 1, greedy)",
    )
    group.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help="tokens an output may have (default: half as many again as the "
        "longest target in training)",
    )
    add_search_option(group, "min_length", int, "tokens an output must have")
    add_search_option(group, "length_penalty", float, "prefer longer outputs; 0.6 to 1 are usual")
    add_search_option(
        group, "coverage_penalty", float, "prefer outputs that looked at the whole line"
    )
    add_search_option(
        group, "block_ngrams", positive, "let no N tokens in a row occur twice in an output"
    )
    group.add_argument("--prefix", default="", metavar="TEXT", help="what every output begins with")
    group.add_argument(
        "--replace-unknown",
        action="store_true",
        help="put for each <unk> the symbol of the line that it looked at most",
    )
    group = command.add_argument_group("sampling")
    group.add_argument(
        "--sample", action="store_true", help="draw outputs at random instead of searching"
    )
    add_search_option(group, "temperature", float, "below 1 the likely becomes likelier")
    add_search_option(group, "top_k", positive, "draw from the N likeliest tokens")
    add_search_option(
        group, "top_p", float, "draw from the likeliest tokens that make up this probability"
    )
    group.add_argument("--seed", type=seed, metavar="N", help="fixes what is drawn (default: 1)")
    command.set_defaults(of_search={name: command.get_default(name) for name in _OF_SEARCH})


#: Arguments that mean nothing to a model that gives labels.
_OF_SEARCH = (
    "others",
    "beam_size",
    "max_length",
    "min_length",
    "length_penalty",
    "coverage_penalty",
    "block_ngrams",
    "prefix",
    "replace_unknown",
    "sample",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "n_best",
    "attention",
    "stream",
)


def refuse_search(arguments: argparse.Namespace) -> None:
    """Refuse the options of a search, for a model that does not search."""
    for name, default in arguments.of_search.items():
        if getattr(arguments, name, default) != default:
            raise PyseqError(
                f"{arguments.model}: this model gives labels and does not search: leave out what "
                f"sets {name}"
            )


def add_search_option(group: Any, name: str, kind: Callable[[str], Any], text: str) -> None:
    """An argument for one field of the search's options."""
    default = getattr(SearchOptions, name)
    group.add_argument(
        f"--{name.replace('_', '-')}",
        type=kind,
        default=default,
        metavar="N",
        help=text if default is None else f"{text} (default: {default})",
    )


def load(arguments: argparse.Namespace) -> Translator:
    return Translator.load(
        arguments.model,
        *arguments.others,
        features=given_features(arguments),
        device=arguments.device,
    )


class Searcher:
    """What finds the outputs for some lines, as the arguments say.

    Raises:
        PyseqError: an option is out of its range, or does not go with the model; before there is
            anything to read.
    """

    def __init__(
        self, arguments: argparse.Namespace, translator: Translator, *, need_weights: bool
    ) -> None:
        names = {field.name for field in fields(SearchOptions)} - {"prefix"}  # which is text here
        given = {name: value for name, value in vars(arguments).items() if name in names}
        given["need_weights"] = need_weights
        for name, default in (("max_length", translator.max_length), ("n_best", 1)):
            if given.get(name) is None:
                given[name] = default
        if arguments.seed is not None and not arguments.sample:
            raise PyseqError("--seed goes with --sample, which is not given")
        self._arguments = arguments
        self._translator = translator
        self._generator = torch.Generator(next(translator.model.parameters()).device)
        self._generator.manual_seed(1 if arguments.seed is None else arguments.seed)
        try:
            self._options = SearchOptions(**given)
        except ValueError as error:  # what argparse cannot judge
            raise PyseqError(str(error)) from error
        self([])

    def __call__(self, lines: list[str]) -> list[list[Translation]]:
        """The outputs of each line."""
        with self._refusing():
            return self._translator.search(
                lines,
                self._options,
                prefix=self._arguments.prefix,
                replace_unknown=self._arguments.replace_unknown,
                batch_size=self._arguments.batch_size,
                generator=self._generator,
            )

    def stream(self, line: str) -> Iterator[str]:
        """The output of one line, piece by piece."""
        with self._refusing():
            yield from self._translator.stream(
                line,
                self._options,
                prefix=self._arguments.prefix,
                replace_unknown=self._arguments.replace_unknown,
                generator=self._generator,
            )

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Say of which model it is that an option does not go with it."""
        try:
            yield
        except PyseqError:
            raise
        except ValueError as error:
            raise PyseqError(f"{self._arguments.model}: {error}") from error
