# SPDX-License-Identifier: Apache-2.0
"""``pyseq evaluate``: how good a model is on a file of pairs."""

from __future__ import annotations

import argparse
from typing import Any

from .. import g2p, metrics, training
from ..errors import PyseqError
from ..labeler import Labeler
from ..labels import check_labels
from ..text import Pair
from ..text import tokenise_pairs as tokenise
from ..translator import Translator
from .common import (
    TASK_OF,
    add_device,
    add_features,
    add_threads,
    begin,
    given_features,
    gives_labels,
    read_texts,
    require_one_source,
)
from .searching import Searcher, add_search, load, refuse_search

# How BLEU splits predictions and references, by how the model splits its target.
_BLEU_TOKENIZE = {"char": "char", "space": "none", "word": "13a", "line": "none"}


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "evaluate",
        help="print error rates, BLEU and chrF on a file of pairs, or how well labels are found",
        description="Print error rates, BLEU and chrF on a file of pairs. Lines with the same "
        "source are right answers to one question: the closest counts. Of a model trained with "
        "--task tag or classify: accuracy, and precision, recall and F1 of each label.",
    )
    command.set_defaults(run=_evaluate)
    command.add_argument("model", metavar="DIR", help="a folder that pyseq train wrote")
    command.add_argument("pairs", nargs="?", metavar="PAIRS.tsv", help="the pairs")
    command.add_argument(
        "--task", choices=["g2p"], help="the test words of the dictionary instead of PAIRS.tsv"
    )
    command.add_argument(
        "--skip-bad-lines",
        action="store_true",
        help="leave out lines that are not pairs instead of stopping",
    )
    command.add_argument(
        "--by-position",
        action="store_true",
        help="also print the share of wrong tokens at each place of the answers, where the model "
        "reads the answer and where it reads its own tokens",
    )
    add_features(command)
    add_search(command)
    add_device(command)
    add_threads(command)


def _evaluate(arguments: argparse.Namespace) -> None:
    begin(arguments)
    require_one_source(arguments)
    if gives_labels(arguments.model):
        refuse_search(arguments)
        if arguments.by_position:
            raise PyseqError(f"{arguments.model}: this model gives labels: leave out --by-position")
        _evaluate_labels(arguments)
        return
    metrics.require_packages(text_scores=True)
    translator = load(arguments)
    search = Searcher(arguments, translator, need_weights=False)
    if arguments.by_position and arguments.others:
        raise PyseqError("--by-position goes with one model: leave out --with")
    if arguments.task == "g2p":
        entries = g2p.load().test
        pairs = g2p.pairs(entries)
        answers = {
            entry.word: [" ".join(phonemes) for phonemes in entry.pronunciations]
            for entry in entries
        }
    else:
        found = read_texts(arguments.pairs, skip_bad_lines=arguments.skip_bad_lines)
        pairs = tokenise(
            found,
            source=translator.source_tokenizer,
            target=translator.target_tokenizer,
            extra_sizes=translator.extra_sizes,
            name=arguments.pairs,
        )
        answers = {}
        columns = sum(size is not None for size in translator.extra_sizes)
        for pair in found:
            line = "\t".join((pair.source, *pair.columns[:columns]))
            answers.setdefault(line, []).append(pair.target)
    results = [best[0] for best in search(list(answers))]
    references = list(answers.values())
    tokenizer = translator.target_tokenizer
    rates = metrics.error_rates(
        [result.tokens for result in results],
        [[tokenizer.split(text) for text in texts] for texts in references],
    )
    scores = metrics.text_scores(
        [result.text for result in results],
        references,
        tokenize=_BLEU_TOKENIZE[tokenizer.name],
    )
    print(f"lines  {rates.lines:,}")
    print(f"PER    {rates.token:.2%}  (edits over {tokenizer.name} tokens of the closest answer)")
    print(f"WER    {rates.line:.2%}  (lines that equal no answer)")
    print(f"BLEU   {scores.bleu:.2f}  ({scores.bleu_signature})")
    print(f"chrF   {scores.chrf:.2f}  ({scores.chrf_signature})")
    if arguments.by_position:
        _print_positions(arguments, translator, pairs)


def _print_positions(
    arguments: argparse.Namespace, translator: Translator, pairs: list[Pair]
) -> None:
    """Where the errors are, next step by next step and running free."""
    examples = translator.encode(pairs, name=arguments.pairs or "cmudict (test words)")
    shares = [
        training.errors_by_position(
            translator.model,
            examples,
            batch_size=arguments.batch_size,
            free_running=free_running,
        )
        for free_running in (False, True)
    ]
    print("\nposition  wrong after the answer  wrong after its own tokens")
    for place, (forced, free) in enumerate(zip(*shares, strict=True), start=1):
        print(f"{place:>8}  {forced:>22.2%}  {free:>26.2%}")


def _evaluate_labels(arguments: argparse.Namespace) -> None:
    if arguments.task is not None:
        raise PyseqError(f"{arguments.model}: this model gives labels: give a file of pairs")
    labeler = Labeler.load(
        arguments.model, features=given_features(arguments), device=arguments.device
    )
    task = TASK_OF[type(labeler.model).__name__]
    pairs = read_texts(arguments.pairs, skip_bad_lines=arguments.skip_bad_lines)
    tokens = labeler.source_tokenizer.name
    size = labeler.extra_size
    expected = training.tokenise_labels(
        pairs, task=task, tokens=tokens, extra_size=size, name=arguments.pairs
    )
    features = labeler.named_features() if labeler.source_vocab is None else None
    check_labels(expected, name=arguments.pairs, per_token=labeler.per_token, features=features)
    lines = ["\t".join((pair.source, *pair.columns[: int(size is not None)])) for pair in pairs]
    results = labeler.predict(lines, batch_size=arguments.batch_size)
    predicted, right = [result.labels for result in results], [pair.target for pair in expected]
    scores = metrics.label_scores(predicted, right)
    print(f"lines     {scores.lines:,}")
    print(f"accuracy  {scores.accuracy:.2%}  (labels that are right)")
    print(f"whole     {scores.line_accuracy:.2%}  (lines whose labels are all right)")
    print(f"macro F1  {scores.macro_f1:.2%}  (mean over the labels in the file)")
    if labeler.per_token and metrics.is_spans(scores.labels):
        whole = metrics.span_scores(predicted, right)
        print(
            f"span F1   {whole.f1:.2%}  (precision {whole.precision:.2%}, recall "
            f"{whole.recall:.2%}, {whole.support:,} spans of B- and I- labels)"
        )
    width = max(map(len, scores.labels))
    print(f"\n{'label':{width}}  precision   recall       F1  in the file")
    for label, score in scores.labels.items():
        print(
            f"{label:{width}}  {score.precision:>9.2%}  {score.recall:>7.2%}  {score.f1:>7.2%}"
            f"  {score.support:>11,}"
        )
