# SPDX-License-Identifier: Apache-2.0
"""Scheduled sampling: how often the decoder reads the truth in training, update by update.

Schedules are functions of the number of updates done and hold nothing else, so that a run that
is resumed goes on with them exactly. Who reads what is decided by ``Seq2Seq.scheduled_inputs``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .types import kind

#: What the decoder reads instead of the truth: its likeliest token, or one that it draws.
ChoiceName = Literal["argmax", "sample"]
CHOICES: tuple[str, ...] = ("argmax", "sample")

#: What a coin is thrown for.
CoinName = Literal["token", "sequence"]
COINS: tuple[str, ...] = ("token", "sequence")


@dataclass(frozen=True)
class Sampling:
    """What one pass over a batch reads.

    Args:
        epsilon: probability of the truth.
        choice: what is read in its place, of which ``<pad>`` and ``<start>`` are never chosen.
        coin: whether the choice is made anew for every token, or once for a sequence.

    Raises:
        ValueError: one of them is not among what it may be.
        TypeError: ``epsilon`` is no number.
    """

    epsilon: float
    choice: ChoiceName = "argmax"
    coin: CoinName = "token"

    def __post_init__(self) -> None:
        _check("epsilon", self.epsilon, lambda x: 0 <= x <= 1, "a probability")
        for name, value, names in (("choice", self.choice, CHOICES), ("coin", self.coin, COINS)):
            if value not in names:
                raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")


def _check(name: str, value: float, is_valid: Callable[[float], bool], allowed: str) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {kind(value)}")
    if not (math.isfinite(value) and is_valid(value)):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


@dataclass(frozen=True)
class Constant:
    """``epsilon_i = epsilon``; 1 is teacher forcing, 0 never shows the truth.

    Raises:
        ValueError: ``epsilon`` is no probability.
    """

    epsilon: float
    name: str = field(default="constant", init=False)

    def __post_init__(self) -> None:
        _check("epsilon", self.epsilon, lambda x: 0 <= x <= 1, "in [0, 1]")

    def __call__(self, updates: int) -> float:
        """The probability of the truth after so many updates."""
        return self.epsilon


@dataclass(frozen=True)
class Linear:
    """``epsilon_i = max(least, min(1, begin - slope * i))`` after i updates.

    Args:
        slope: what the probability loses at each update, at least 0.
        begin: that of the first update, at least 0; above 1 the truth is all that is read for
            a while.
        least: that at the end, in [0, 1].

    Raises:
        ValueError: a number is out of its range.

    Reference:
        Bengio et al. 2015, arXiv 1506.03099, section 2.4.
    """

    slope: float
    begin: float = 1.0
    least: float = 0.0
    name: str = field(default="linear", init=False)

    def __post_init__(self) -> None:
        _check("slope", self.slope, lambda x: x >= 0, "at least 0 and finite")
        _check("begin", self.begin, lambda x: x >= 0, "at least 0 and finite")
        _check("least", self.least, lambda x: 0 <= x <= 1, "in [0, 1]")

    def __call__(self, updates: int) -> float:
        """The probability of the truth after so many updates."""
        return max(self.least, min(1.0, self.begin - self.slope * updates))


@dataclass(frozen=True)
class Exponential:
    """``epsilon_i = k ** i`` after i updates.

    Args:
        k: in (0, 1).

    Raises:
        ValueError: ``k`` is out of its range.

    Reference:
        Bengio et al. 2015, arXiv 1506.03099, section 2.4.
    """

    k: float
    name: str = field(default="exponential", init=False)

    def __post_init__(self) -> None:
        _check("k", self.k, lambda x: 0 < x < 1, "in (0, 1)")

    def __call__(self, updates: int) -> float:
        """The probability of the truth after so many updates."""
        return self.k**updates


@dataclass(frozen=True)
class InverseSigmoid:
    """``epsilon_i = k / (k + exp(i / k))`` after i updates: one half at ``i = k log k``.

    Args:
        k: at least 1; how many updates it takes.

    Raises:
        ValueError: ``k`` is out of its range.

    Reference:
        Bengio et al. 2015, arXiv 1506.03099, section 2.4.
    """

    k: float
    name: str = field(default="inverse-sigmoid", init=False)

    def __post_init__(self) -> None:
        _check("k", self.k, lambda x: x >= 1, "at least 1 and finite")

    def __call__(self, updates: int) -> float:
        """The probability of the truth after so many updates."""
        # The logistic function of log k - i / k, by whichever exponential cannot overflow.
        x = math.log(self.k) - updates / self.k
        if x >= 0:
            return 1 / (1 + math.exp(-x))
        odds = math.exp(x)
        return odds / (1 + odds)


Schedule = Constant | Linear | Exponential | InverseSigmoid

_BY_NAME: dict[str, type[Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "exponential": Exponential,
    "inverse-sigmoid": InverseSigmoid,
}


def from_record(record: Mapping[str, Any]) -> Schedule:
    """The schedule that ``dataclasses.asdict`` made this of.

    Raises:
        ValueError: it is not that of a schedule.
    """
    numbers = dict(record)
    kind = _kind(numbers.pop("name", None))
    try:
        return kind(**numbers)
    except TypeError as error:
        raise ValueError(f"a schedule must have the numbers of {kind.__name__}: {error}") from error


def parse(text: str) -> Schedule:
    """The schedule written as its name, a colon and its numbers: ``linear:1e-4,1,0.25``.

    The numbers are those of the class in their order; those at the end that have a default may
    be left out.

    Raises:
        ValueError: there is no such schedule, or a number is missing or out of its range.
    """
    name, _, rest = text.partition(":")
    kind = _kind(name)
    names = [each.name for each in fields(kind) if each.init]
    try:
        numbers = [float(number) for number in rest.split(",")]
    except ValueError:
        numbers = []
    if not 0 < len(numbers) <= len(names):
        raise ValueError(f"{name} must be written {name}:{','.join(names)}, got {text!r}")
    return kind(*numbers)


def _kind(name: object) -> type[Schedule]:
    if not isinstance(name, str) or name not in _BY_NAME:
        raise ValueError(f"a schedule must be one of {', '.join(_BY_NAME)}, got {name!r}")
    return _BY_NAME[name]
