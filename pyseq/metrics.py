# SPDX-License-Identifier: Apache-2.0
"""How good predictions are: error rates by edit distance, BLEU and chrF.

Edit distance is rapidfuzz's, BLEU and chrF are sacrebleu's; both come with the extra
``train``.
"""

from __future__ import annotations

from collections.abc import Sequence
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
