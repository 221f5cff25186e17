# SPDX-License-Identifier: Apache-2.0
"""How good predictions are: error rates by edit distance, BLEU and chrF, scores of labels.

Edit distance is rapidfuzz's, BLEU and chrF are sacrebleu's; both come with the extra
``train``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import NamedTuple

from .errors import require

Tokens = Sequence[str]


class ErrorRates(NamedTuple):
    """Error rates of a set of lines; shares between 0 and 1, ``token`` may exceed 1."""

    token: float  # edits over reference tokens; the phoneme error rate (PER) of G2P
    line: float  # lines equal to no reference; the word error rate (WER) of G2P
    lines: int


class TextScores(NamedTuple):
    """BLEU and chrF of a set of lines, 0 to 100, and how they were computed."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str


class LabelScore(NamedTuple):
    """How well one label is found; shares between 0 and 1."""

    precision: float  # of the places that got the label, those that have it; 0 if none got it
    recall: float  # of the places that have the label, those that got it; 0 if none has it
    f1: float  # harmonic mean of both; 0 if both are
    support: int  # places that have the label


class LabelScores(NamedTuple):
    """How well labels are found; shares between 0 and 1."""

    accuracy: float  # labels that are right
    line_accuracy: float  # lines whose labels are all right
    macro_f1: float  # mean of the F1 of all labels that some place has
    labels: dict[str, LabelScore]  # of each label expected or predicted, by spelling
    lines: int


def label_scores(predicted: Sequence[Tokens], expected: Sequence[Tokens]) -> LabelScores:
    """Accuracy of labels, and precision, recall and F1 of each.

    With tp right places of a label, fp wrong ones and fn missed ones: precision
    ``tp / (tp + fp)``, recall ``tp / (tp + fn)``, F1 ``2 tp / (2 tp + fp + fn)``.

    Args:
        predicted: the labels of each line.
        expected: the right ones, as many in each line.

    Raises:
        ValueError: the numbers of lines or of the labels of a line differ, or there are none.
    """
    if len(predicted) != len(expected) or not any(map(len, expected)):
        raise ValueError(
            f"expected as many lines of labels as were predicted and at least one label, got "
            f"{len(expected)} and {len(predicted)}"
        )
    hits: Counter[str] = Counter()
    got: Counter[str] = Counter()
    has: Counter[str] = Counter()
    whole = 0
    for number, (found, right) in enumerate(zip(predicted, expected, strict=True), 1):
        _check_labels(number, found, right)
        got.update(found)
        has.update(right)
        hits.update(one for one, other in zip(found, right, strict=True) if one == other)
        whole += list(found) == list(right)
    scores = {
        label: LabelScore(
            hits[label] / max(1, got[label]),
            hits[label] / max(1, has[label]),
            2 * hits[label] / (got[label] + has[label]),
            has[label],
        )
        for label in sorted(got | has)
    }
    return LabelScores(
        hits.total() / has.total(),
        whole / len(expected),
        sum(scores[label].f1 for label in has) / len(has),
        scores,
        len(expected),
    )


def is_spans(labels: Iterable[str]) -> bool:
    """Whether labels mark spans: ``"O"``, ``"B-x"`` and ``"I-x"``, and not only ``"O"``."""
    kinds = {label if label == "O" else label[:2] for label in labels}
    return kinds <= {"O", "B-", "I-"} and "B-" in kinds


def spans(labels: Tokens) -> set[tuple[int, int, str]]:
    """The spans that ``"B-x"``, ``"I-x"`` and ``"O"`` mark: first token, the one after the last,
    and x.

    A span begins at ``"B-x"``, and also at an ``"I-x"`` that does not go on with an x.
    """
    found: set[tuple[int, int, str]] = set()
    begin, name = 0, ""
    for place, label in enumerate([*labels, "O"]):
        kind, _, new = label.partition("-")
        if name and (kind != "I" or new != name):
            found.add((begin, place, name))
            name = ""
        if new and not name:
            begin, name = place, new
    return found


def span_scores(predicted: Sequence[Tokens], expected: Sequence[Tokens]) -> LabelScore:
    """Precision, recall and F1 of whole spans: right only with both ends and the kind.

    Args:
        predicted, expected: as for :func:`label_scores`, labels as for :func:`spans`.

    Raises:
        ValueError: the numbers of lines or of the labels of a line differ.

    Reference:
        Tjong Kim Sang & De Meulder 2003, arXiv cs/0306050, section 2 (the CoNLL-2003 task).
    """
    hits = got = has = 0
    for number, (found, right) in enumerate(zip(predicted, expected, strict=True), 1):
        _check_labels(number, found, right)
        found_spans, right_spans = spans(found), spans(right)
        hits += len(found_spans & right_spans)
        got += len(found_spans)
        has += len(right_spans)
    f1 = 2 * hits / max(1, got + has)
    return LabelScore(hits / max(1, got), hits / max(1, has), f1, has)


def _check_labels(number: int, predicted: Tokens, expected: Tokens) -> None:
    if len(predicted) != len(expected):
        raise ValueError(f"line {number}: expected {len(expected)} labels, got {len(predicted)}")


def require_packages(*, text_scores: bool) -> None:
    """Find out now, and not after an hour of work, whether what scoring needs is there.

    Args:
        text_scores: whether :func:`text_scores` will be called, besides :func:`error_rates`.

    Raises:
        MissingExtraError: a package is missing.
    """
    require("rapidfuzz.distance", extra="train")
    if text_scores:
        require("sacrebleu.metrics", extra="train")


def edit_distance(hypothesis: Tokens, reference: Tokens) -> int:
    """Insertions, deletions and substitutions that turn one token sequence into the other."""
    return require("rapidfuzz.distance", extra="train").Levenshtein.distance(hypothesis, reference)


def error_rates(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> ErrorRates:
    """Error rates, each hypothesis against the closest of its references.

    Of two equally close references the longer one counts.

    Args:
        hypotheses: tokens of each predicted line.
        references: for each line, the tokens of one or more right answers.

    Raises:
        ValueError: the numbers of lines differ, a line has no reference, or there are no
            lines at all.
    """
    _check_lines(hypotheses, references)
    edits = length = wrong = 0
    for hypothesis, answers in zip(hypotheses, references, strict=True):
        distance, answer_length = min(
            ((edit_distance(hypothesis, answer), len(answer)) for answer in answers),
            key=lambda found: (found[0], -found[1]),
        )
        edits += distance
        length += answer_length
        wrong += distance > 0
    return ErrorRates(edits / max(1, length), wrong / len(hypotheses), len(hypotheses))


def text_scores(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: str = "13a"
) -> TextScores:
    """Corpus BLEU and chrF of lines of text.

    Args:
        hypotheses: the predicted lines.
        references: for each line, one or more right answers.
        tokenize: sacrebleu's name of how BLEU splits text: ``"13a"`` for languages with
            spaces, ``"char"`` for single characters, ``"none"`` for text already split.

    Raises:
        ValueError: as for :func:`error_rates`.

    Reference:
        Papineni et al. 2002 (BLEU); Popović 2015 (chrF); Post 2018, arXiv 1804.08771.
    """
    _check_lines(hypotheses, references)
    sacrebleu = require("sacrebleu.metrics", extra="train")
    # sacrebleu takes one stream for the first answers, one for the second ..., with None
    # where a line has no more.
    streams = [list(stream) for stream in zip_longest(*references)]
    bleu, chrf = sacrebleu.BLEU(tokenize=tokenize), sacrebleu.CHRF()
    scores = [metric.corpus_score(list(hypotheses), streams).score for metric in (bleu, chrf)]
    return TextScores(scores[0], scores[1], str(bleu.get_signature()), str(chrf.get_signature()))


def _check_lines(hypotheses: Sequence[object], references: Sequence[Sequence[object]]) -> None:
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(
            f"expected as many lines of references as of hypotheses and at least one, got "
            f"{len(references)} and {len(hypotheses)}"
        )
    if not all(references):
        raise ValueError("every line must have at least one reference")
