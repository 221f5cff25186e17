# SPDX-License-Identifier: Apache-2.0
"""What trials learn: the pronouncing dictionary of the demo, parts of it, and generated tasks.

Results are kept under the names of tasks: whoever changes the pairs of one changes its name too.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import NamedTuple

from pyseq import g2p
from pyseq.text import Pair, Tokenizer


class Task(NamedTuple):
    """Pairs to learn from and lines to be tested on."""

    tokens: tuple[str, str]  # how source and target are split
    train: list[Pair]
    validation: list[Pair]  # choose the best epoch; if there are none it is the last
    test: list[tuple[str, list[list[str]]]]  # a line and what is right, any of several

    def test_pairs(self) -> list[Pair]:
        """The test lines with the first of what is right."""
        tokenizer = Tokenizer(self.tokens[0])
        return [
            Pair(tokenizer.split(line), references[0], number)
            for number, (line, references) in enumerate(self.test, start=1)
        ]


def _dictionary(every: int, test_every: int) -> Task:
    """Each so-manieth training word and test word, without validation if it is but a part."""
    parts = g2p.load()
    return Task(
        tokens=(g2p.SOURCE_TOKENS, g2p.TARGET_TOKENS),
        train=g2p.pairs(parts.train[::every]),
        validation=g2p.pairs(parts.validation) if every == 1 else [],
        test=[(entry.word, entry.pronunciations) for entry in parts.test[::test_every]],
    )


_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _generated(
    transform: Callable[[str], str], *, pairs: int, tests: int, shortest: int, longest: int
) -> Task:
    """Random letters, of each length equally many, and what ``transform`` makes of them."""
    rng = random.Random(1)
    seen: set[str] = set()

    def draw(number: int) -> tuple[str, str]:
        length = shortest + number % (longest - shortest + 1)
        source = "".join(rng.choice(_LETTERS) for _ in range(length))
        while source in seen:  # short ones, which may have been learned from
            source = "".join(rng.choice(_LETTERS) for _ in range(length))
        return source, transform(source)

    train = [draw(number) for number in range(pairs)]
    seen.update(source for source, _ in train)
    test = [draw(number) for number in range(tests)]
    return Task(
        tokens=("char", "char"),
        train=[Pair(list(s), list(t), line) for line, (s, t) in enumerate(train, start=1)],
        validation=[],
        test=[(source, [list(target)]) for source, target in test],
    )


def _reversed(source: str) -> str:
    return source[::-1]


_TASKS: dict[str, Callable[[], Task]] = {
    "g2p": lambda: _dictionary(1, 1),
    "g2p part": lambda: _dictionary(8, 6),
    "g2p few": lambda: _dictionary(2000, 2000),
    "reverse": lambda: _generated(_reversed, pairs=20_000, tests=2_000, shortest=3, longest=32),
    "reverse few": lambda: _generated(_reversed, pairs=64, tests=16, shortest=1, longest=4),
}

#: What the tasks are, as the page says it.
DESCRIPTIONS: dict[str, str] = {
    "g2p": "The words of the CMU dictionary to their phonemes without stress, split as in "
    "`pyseq.g2p`: of the words in sorted order every twentieth for validation, the two after it "
    "for the test. A word is right if it equals any of its pronunciations.",
    "g2p part": "Spelling to phonemes on a part of the CMU dictionary: every eighth training word "
    "(about 15,000 pairs) and every sixth test word (2,083).",
    "g2p few": "Spelling to phonemes on a few words.",
    "reverse": "Random letters to the same letters backwards: 20,000 pairs with sources of 3 to "
    "32 letters, each length equally often, and 2,000 others for the test.",
    "reverse few": "A few random letters to the same letters backwards.",
}


@functools.cache
def find(name: str) -> Task:
    """The task of a name: the same pairs every time."""
    return _TASKS[name]()
