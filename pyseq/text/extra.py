# SPDX-License-Identifier: Apache-2.0
"""Extra information of pairs: the numbers of a sequence or of its steps, read and batched.

In text a semicolon stands between the numbers of one step and those of the next. The last step's
hold for all that follow, so that one vector alone is that of the whole sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DataError

#: Numbers of a vector of extra information, for the source and for the target; None for none.
Sizes = tuple[int | None, int | None]


class Extra(NamedTuple):
    """Extra information of one pair, for the encoder and for the decoder; () for none.

    The numbers of the steps stand one after the other.
    """

    source: tuple[float, ...] = ()
    target: tuple[float, ...] = ()


def parse_extra(columns: Sequence[str], sizes: Sizes, *, place: str) -> Extra:
    """Extra information as numbers, a column for each side that has any.

    Args:
        columns: those of the source and of the target, without the ones that are not asked for:
            numbers with spaces between, and a semicolon between those of different steps.
        sizes: numbers of one vector for the source and for the target; None for none.
        place: file and line, for messages.

    Raises:
        DataError: a column is missing, or has not that many finite numbers for each step.
    """
    found: list[tuple[float, ...]] = []
    left = iter(columns)
    for side, size in zip(("source", "target"), sizes, strict=True):
        numbers: list[float] = []
        for step in () if size is None else next(left, "").split(";"):
            fields = step.split()
            try:
                vector = [float(field) for field in fields]
            except ValueError as error:
                raise DataError(f"{place}: extra information for the {side}: {error}") from error
            if len(vector) != size or not all(map(math.isfinite, vector)):
                raise DataError(
                    f"{place}: expected a column with {size} finite numbers of extra information "
                    f"for the {side}, got {' '.join(fields[:5])!r}"
                )
            numbers += vector
        found.append(tuple(numbers))
    return Extra(*found)


def read_line(line: str, sizes: Sizes) -> tuple[str, Extra]:
    """The text of a line and the extra information that stands behind it, after tabs.

    Raises:
        DataError: as :func:`parse_extra`.
    """
    if sizes == (None, None) or not line.strip():
        return line, Extra()
    text, *columns = line.split("\t")
    return text, parse_extra(columns, sizes, place=f"the line {text!r}")


def check_extra(
    extra: Extra, sizes: Sizes, steps: tuple[int | None, int | None], *, place: str
) -> None:
    """Raise unless there is as much extra information as a model takes.

    Args:
        extra, sizes: the numbers, and how many a vector has.
        steps: how many vectors there may be at most; None for any number.
        place: file and line, for messages.

    Raises:
        DataError: there is not.
    """
    for side, size, numbers, most in zip(("source", "target"), sizes, extra, steps, strict=True):
        if (len(numbers) % size or not numbers) if size else numbers:
            raise DataError(
                f"{place}: expected {size or 0} numbers of extra information for the {side}, got "
                f"{len(numbers)}"
            )
        if size and most is not None and len(numbers) > most * size:
            raise DataError(
                f"{place}: expected extra information for at most {most} steps of the {side}, got "
                f"{len(numbers) // size}"
            )


def reversed_steps(numbers: tuple[float, ...], size: int | None, count: int) -> tuple[float, ...]:
    """The numbers of the steps of a source of ``count`` tokens that is read backwards.

    What stands for the end behind the tokens stays there.
    """
    if size is None or len(numbers) <= size:
        return numbers
    steps = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    steps += [steps[-1]] * (count + 1 - len(steps))
    return tuple(chain.from_iterable((*reversed(steps[:count]), *steps[count:])))


def extra_tensor(
    rows: Sequence[tuple[float, ...]], size: int | None, *, steps: int
) -> Tensor | None:
    """Extra information for a batch: (B, Z), or (T, B, Z) if a row has more than one step.

    Args:
        rows: the numbers of each row.
        size: Z, numbers of a vector; None if there are none.
        steps: T; a row with fewer goes on with its last vector.
    """
    if size is None:
        return None
    vectors = [torch.tensor(row).reshape(-1, size) for row in rows]
    if all(len(each) == 1 for each in vectors):
        return torch.cat(vectors) if vectors else torch.zeros(0, size)
    places = torch.arange(steps)
    return torch.stack([each[places.clamp(max=len(each) - 1)] for each in vectors], 1)


def rows_of(extra: Tensor | None, rows: slice, steps: int) -> Tensor | None:
    """Some rows of what :func:`extra_tensor` gave, and no more than ``steps`` of them."""
    if extra is None:
        return None
    return extra[rows] if extra.dim() == 2 else extra[:steps, rows]
