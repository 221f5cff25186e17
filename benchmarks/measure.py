# SPDX-License-Identifier: Apache-2.0
"""Checks and times the implementations of a workload, in turns, in one process.

So a machine that slows down slows all of them.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .floors import Mode
from .machine import Machine
from .workloads import Implementation, ImplementationName, Results, Workload

#: Largest difference from the reference, relative to the largest magnitude in the tensor
#: but at least to 1. Weight gradients are float32 sums of some thousand terms on both sides.
TOLERANCE = 1e-4
#: A timed turn repeats short calls until it takes this long, in seconds: the clock and the call
#: around it then weigh less than a thousandth.
SHORTEST = 1e-3
#: Before its turn an implementation sleeps so long, in seconds, and then makes a call that is not
#: timed: the threads of the one before must have stopped spinning (GNU's OpenMP goes on for some
#: milliseconds after a loop), and its own be awake and its weights in cache, as in a loop of
#: calls. A call longer than LONG needs no such care.
PAUSE = 5e-3
LONG = 0.1
#: Every implementation runs at least so often, however long it takes.
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Measurement:
    """What came out of one workload with a number of threads."""

    op: str
    kind: str
    shape: str
    mode: Mode
    threads: int
    tokens: int  # per call
    operations: int  # per call; see floors.py
    floor: float  # seconds per call below which this machine cannot get
    peak_share: float  # of that floor, in [0, 1], what the arithmetic needs
    rounds: int
    medians: dict[ImplementationName, float]  # seconds per call
    spreads: dict[ImplementationName, float]  # half the distance between the quartiles, seconds
    saved: dict[ImplementationName, int]  # bytes kept for backward; training only

    @property
    def name(self) -> str:
        """As that of the workload."""
        return f"{self.op}-{self.mode}-{self.kind}-{self.shape}"

    @property
    def rivals(self) -> list[ImplementationName]:
        """The other implementations."""
        return [name for name in self.medians if name != "pyseq"]

    def ratio(self, rival: ImplementationName) -> float:
        """How many times faster pyseq is than ``rival``."""
        return self.medians[rival] / self.medians["pyseq"]

    @property
    def rate(self) -> float:
        """Floating-point operations per second of pyseq."""
        return self.operations / self.medians["pyseq"]

    @property
    def efficiency(self) -> float:
        """The floor over the time of pyseq: 1 is all that the machine can do."""
        return self.floor / self.medians["pyseq"]


def measure(
    workload: Workload,
    machine: Machine,
    *,
    seconds: float,
    rounds: int = FEWEST_ROUNDS,
    leave_out: Collection[ImplementationName] = (),
) -> Measurement:
    """Compare the implementations with the reference, then time them in turns.

    Args:
        workload: what to measure.
        machine: its limits with the number of threads that torch is set to.
        seconds: how long to go on, all implementations together, after warming up.
        rounds: how often each runs at least.
        leave_out: implementations that are not timed.

    Raises:
        AssertionError: a result is not the reference's.
    """
    prepared = workload.prepare()
    expected = prepared["reference"]()
    running = {n: prepared[n] for n in workload.implementations if n not in leave_out}
    saved = {}
    for name, run in running.items():
        result, saved[name] = with_saved_bytes(run)
        check(result, expected, name)
    times = _take_turns(running, seconds, rounds)
    arithmetic = workload.cost.operations / machine.peak
    floor = workload.cost.floor(machine)
    return Measurement(
        op=workload.op,
        kind=workload.kind,
        shape=workload.shape,
        mode=workload.mode,
        threads=machine.threads,
        tokens=workload.tokens,
        operations=workload.cost.operations,
        floor=floor,
        peak_share=arithmetic / floor,
        rounds=min(map(len, times.values())),
        medians={name: statistics.median(values) for name, values in times.items()},
        spreads={name: _spread(values) for name, values in times.items()},
        saved=saved if workload.mode == "training" else {},
    )


def check(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], who: ImplementationName
) -> None:
    """Assert that a result is the reference's, within ``TOLERANCE``."""
    assert set(actual) == set(expected), f"{who}: {list(actual)} are not {list(expected)}"
    for name, value in actual.items():
        target = expected[name]
        assert value.shape == target.shape, f"{who} {name}: {value.shape} is not {target.shape}"
        allowed = TOLERANCE * max(1.0, target.abs().max().item())
        error = (value - target).abs().max().item()
        assert error <= allowed, f"{who} {name}: error {error:.3g} is over {allowed:.3g}"


def with_saved_bytes(run: Implementation) -> tuple[Results, int]:
    """Call ``run``; its result, and the bytes that its forward kept for its backward.

    Counted is memory that would be free otherwise. Each piece counts once and whole, since a view
    keeps all of it. What a leaf of the graph lies in is there anyway and does not count.
    """
    kept: dict[int, Tensor] = {}
    leaves: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        base = tensor if tensor._base is None else tensor._base
        if base.is_leaf and base.requires_grad:
            leaves.add(address)
        # Held, so that no other tensor can come to the same address; detached, because an
        # output that its own node holds would never be freed.
        kept.setdefault(address, tensor.detach())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    sizes = {address: tensor.untyped_storage().nbytes() for address, tensor in kept.items()}
    return result, sum(size for address, size in sizes.items() if address not in leaves)


def _take_turns(
    running: Mapping[ImplementationName, Implementation], seconds: float, rounds: int
) -> dict[ImplementationName, list[float]]:
    """Seconds per call of each implementation in each round."""
    times: dict[ImplementationName, list[float]] = {name: [] for name in running}
    gc.collect()
    gc.disable()
    try:
        repeats = {}
        for name, run in running.items():
            once = _seconds(run, 1)
            repeats[name] = math.ceil(SHORTEST / max(once, 1e-7))
            if once > LONG:
                times[name].append(once)  # as good as any: a round the less
        end = time.perf_counter() + seconds
        while min(map(len, times.values())) < rounds or time.perf_counter() < end:
            for name, run in running.items():
                if not times[name] or times[name][-1] < LONG:
                    time.sleep(PAUSE)
                    run()
                times[name].append(_seconds(run, repeats[name]))
    finally:
        gc.enable()
    return times


def _seconds(run: Implementation, repeats: int) -> float:
    """Seconds per call. On the CPU a call returns when its result is there."""
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def _spread(values: Sequence[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2
