# SPDX-License-Identifier: Apache-2.0
"""Checks and times the implementations of a workload, in turns, in one process.

So a machine that slows down slows all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import statistics
import time
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from .floors import Mode
from .machine import Machine, measure_peak
from .workloads import Implementation, ImplementationName, Results, Workload

#: Largest difference from the reference, relative to the largest magnitude in the tensor
#: but at least to 1. Weight gradients are float32 sums of some thousand terms on both sides.
TOLERANCE = 1e-4
#: A turn of an implementation, in seconds: it sleeps, since the threads of the one before must
#: have stopped spinning (GNU's OpenMP goes on for some milliseconds after a loop); it makes calls
#: that are not timed, since its own threads must be awake and spread over the cores (with less
#: than this ONNX Runtime's took up to 3 times as long) and its weights in cache; and then calls
#: that are. One call that takes LONG needs no such care.
PAUSE = 5e-3
WARMING = 10e-3
TIMED = 10e-3
LONG = 0.3
#: Every implementation runs at least so often, however long it takes.
FEWEST_ROUNDS = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Measurement:
    """What came out of one workload with a number of threads."""

    op: str
    kind: str
    shape: str
    mode: Mode
    threads: int
    tokens: int  # per call
    operations: int  # floating-point, per call; see floors.py
    reading: float  # seconds that a call reads at least; see floors.py
    peaks: list[float]  # operations per second of the machine, in each round
    times: dict[ImplementationName, list[float]]  # seconds per call, in each round
    saved: dict[ImplementationName, int]  # bytes kept for backward; training only

    @property
    def name(self) -> str:
        """As that of the workload."""
        return f"{self.op}-{self.mode}-{self.kind}-{self.shape}"

    @functools.cached_property
    def medians(self) -> dict[ImplementationName, float]:
        """Seconds per call."""
        return {name: statistics.median(values) for name, values in self.times.items()}

    @functools.cached_property
    def spreads(self) -> dict[ImplementationName, float]:
        """Half the distance between the quartiles, in seconds."""
        return {name: _spread(values) for name, values in self.times.items()}

    @property
    def rivals(self) -> list[ImplementationName]:
        """The other implementations."""
        return [name for name in self.times if name != "pyseq"]

    def with_more(self, other: Measurement) -> Measurement:
        """The same with the rounds of another time."""
        times = {name: values + other.times.get(name, []) for name, values in self.times.items()}
        return dataclasses.replace(self, times=times, peaks=self.peaks + other.peaks)

    def ratio(self, rival: ImplementationName) -> float:
        """How many times faster pyseq is than ``rival``."""
        return self.medians[rival] / self.medians["pyseq"]

    @property
    def rate(self) -> float:
        """Floating-point operations per second of pyseq."""
        return self.operations / self.medians["pyseq"]

    @functools.cached_property
    def peak(self) -> float:
        """Floating-point operations per second of the machine, by the median of the rounds."""
        return statistics.median(self.peaks)

    @property
    def bound_by_reading(self) -> bool:
        """Whether reading takes longer than the arithmetic, both as fast as the machine can."""
        return self.reading > self.operations / self.peak

    @property
    def efficiency(self) -> float:
        """The floor over the time of pyseq: 1 is all that the machine can do."""
        return max(self.reading, self.operations / self.peak) / self.medians["pyseq"]


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
        machine: how fast it reads, with the number of threads that torch is set to.
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
    times, peaks = _take_turns(running, machine.threads, seconds, rounds)
    return Measurement(
        op=workload.op,
        kind=workload.kind,
        shape=workload.shape,
        mode=workload.mode,
        threads=machine.threads,
        tokens=workload.tokens,
        operations=workload.cost.operations,
        reading=workload.cost.reading(machine),
        peaks=peaks,
        times=times,
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
    running: Mapping[ImplementationName, Implementation], threads: int, seconds: float, rounds: int
) -> tuple[dict[ImplementationName, list[float]], list[float]]:
    """Seconds per call of each implementation, and the peak of the machine, in each round."""
    times: dict[ImplementationName, list[float]] = {name: [] for name in running}
    peaks = []
    gc.collect()
    gc.disable()
    try:
        once = {name: _seconds(run, 1) for name, run in running.items()}
        for name, seconds_once in once.items():
            if seconds_once > LONG:
                times[name].append(seconds_once)  # as good as any: a round the less
        end = time.perf_counter() + seconds
        while min(map(len, times.values())) < rounds or time.perf_counter() < end:
            peaks.append(measure_peak(threads))
            for name, run in running.items():
                if once[name] < LONG:
                    time.sleep(PAUSE)
                    _seconds(run, math.ceil(WARMING / once[name]))
                times[name].append(_seconds(run, math.ceil(TIMED / once[name])))
    finally:
        gc.enable()
    return times, peaks


def _seconds(run: Implementation, repeats: int) -> float:
    """Seconds per call. On the CPU a call returns when its result is there."""
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def _spread(values: Sequence[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2
