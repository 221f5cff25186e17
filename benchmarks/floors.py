# SPDX-License-Identifier: Apache-2.0
"""The least that any implementation must do: all formulas are here.

Counted are the multiply-adds of matrix products, two operations each (no activation, no
softmax), and the bytes that a loop of dependent steps reads again at every step. The floor is
the larger of the times for both, which is right if one hides all of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyseq.types import GATES, CellName, ScoreName

from .machine import Machine

Mode = Literal["training", "inference"]

_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Loop:
    """Steps of which each needs the result of the one before."""

    steps: int
    step_bytes: int  # of weights, keys and memory that every step reads

    def seconds(self, machine: Machine) -> float:
        """How long the reading takes at least."""
        return self.steps * self.step_bytes / machine.bandwidth(self.step_bytes)


@dataclass(frozen=True)
class Cost:
    """Work of one call."""

    operations: int
    loops: tuple[Loop, ...] = ()

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.operations + other.operations, self.loops + other.loops)

    def __mul__(self, factor: int) -> Cost:
        return Cost(
            factor * self.operations,
            tuple(Loop(factor * loop.steps, loop.step_bytes) for loop in self.loops),
        )

    def reading(self, machine: Machine) -> float:
        """Seconds that the loops read at least."""
        return sum(loop.seconds(machine) for loop in self.loops)

    def of(self, mode: Mode) -> Cost:
        """Of the forward pass alone or with backward.

        Each product of forward has two in backward, one for each factor's gradient; the loop
        runs once more, backwards, and reads the same weights.
        """
        if mode == "inference":
            return self
        loops = tuple(Loop(2 * loop.steps, loop.step_bytes) for loop in self.loops)
        return Cost(3 * self.operations, loops)


def product(rows: int, inner: int, columns: int) -> Cost:
    """(rows, inner) times (inner, columns)."""
    return Cost(2 * rows * inner * columns)


def scan(cell: CellName, *, tokens: int, steps: int, inputs: int, hidden: int) -> Cost:
    """A layer in one direction; ``tokens`` are the valid ones of all rows together."""
    gates = GATES[cell] * hidden
    recurrent = Cost(2 * tokens * gates * hidden, (Loop(steps, _FLOAT * gates * hidden),))
    return product(tokens, inputs, gates) + recurrent


def stream(cell: CellName, *, calls: int, inputs: int, hidden: int) -> Cost:
    """A layer called for one step at a time, with one row: all weights are read by each call."""
    weights = GATES[cell] * hidden * (inputs + hidden)
    return Cost(2 * calls * weights, (Loop(calls, _FLOAT * weights),))


def attend(
    score: ScoreName, *, steps: int, positions: int, batch: int, keys: int, memory: int
) -> Cost:
    """``positions`` are the valid ones of all rows together; keys are projected already."""
    cost = Cost(2 * steps * positions * (keys + memory))
    return cost + product(steps * batch, keys, keys) if score == "concat" else cost


def decode(
    cell: CellName, *, steps: int, source: int, batch: int, inputs: int, hidden: int
) -> Cost:
    """One layer with input feeding; keys, projected already, and memory as wide as the state."""
    gates = GATES[cell] * hidden
    step_weights = 2 * gates * hidden + 2 * hidden * hidden  # fed and recurrent; combination
    attended = 2 * source * hidden  # keys and memory of a row
    loop = Loop(steps, _FLOAT * (step_weights + batch * attended))
    per_row = 2 * (gates * inputs + step_weights + attended)
    return Cost(steps * batch * per_row, (loop,))


def encode(cell: CellName, *, source: int, batch: int, inputs: int, hidden: int) -> Cost:
    """One layer in both directions, each of half the size, and the projection of the keys."""
    tokens = source * batch
    direction = scan(cell, tokens=tokens, steps=source, inputs=inputs, hidden=hidden // 2)
    return direction + direction + product(tokens, hidden, hidden)


def search(
    cell: CellName, *, steps: int, source: int, batch: int, beam: int, hidden: int, vocab: int
) -> Cost:
    """Steps of decoder and output layer, each of which needs the tokens of the one before.

    The hypotheses of a row share its memory. What a token adds to the gates does not count, since
    it can be looked up.
    """
    weights = 2 * GATES[cell] * hidden * hidden + 2 * hidden * hidden + hidden * vocab
    attended = 2 * source * hidden
    loop = Loop(steps, _FLOAT * (weights + batch * attended))
    return Cost(2 * steps * batch * beam * (weights + attended), (loop,))
