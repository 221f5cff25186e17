# SPDX-License-Identifier: Apache-2.0
"""What the numbers depend on: the machine's own limits, measured, and the versions of it all."""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import pyseq
from pyseq import info
from pyseq._library import _C

#: A rate is the best of so many measurements: what is asked for is what the machine can do, and
#: whatever disturbs it only makes it slower.
ATTEMPTS = 50
#: Of one measurement, so that it takes some 10 ms: rounds of multiply-adds, bytes per thread.
ROUNDS = 2_000_000
READ = 1 << 30

#: Sizes in bytes of the caches of one core, where the system does not tell.
_USUAL_SIZES = {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20}


@dataclass(frozen=True)
class Level:
    """One level of cache."""

    name: str  # L1, L2 or L3
    size: int  # bytes: of each core, but L3 of all together
    read: int  # bytes that each thread read over and over
    bandwidth: float  # bytes per second, of all threads together


@dataclass(frozen=True)
class Machine:
    """What so many threads of this machine can do at most, in float32 and in this tier."""

    threads: int
    peak: float  # floating-point operations per second; a multiply-add is two
    levels: tuple[Level, ...]  # nearest first

    def bandwidth(self, size: int) -> float:
        """Bytes per second at which the threads, an equal share each, read ``size`` bytes.

        It is that of the nearest cache that holds the share; from beyond the last, that of the
        last one, which is too much rather than too little.
        """
        for level in self.levels[:-1]:
            if size <= level.size * self.threads:
                return level.bandwidth
        return self.levels[-1].bandwidth


def measure_machine(threads: int) -> Machine:
    """Measure the peak, and the bandwidth of each level, with half of it read."""
    sizes = {name: _cache_size(name) or usual for name, usual in _USUAL_SIZES.items()}
    reads = {name: size // 2 for name, size in sizes.items()}
    reads["L3"] //= threads
    peak, rates = 0.0, dict.fromkeys(sizes, 0.0)
    # In turns: two threads may share one core for longer than all attempts at one of them take.
    for _ in range(ATTEMPTS):
        peak = max(peak, measure_peak(threads))
        for name, read in reads.items():
            rate = _C.read_rate(threads=threads, bytes=read, passes=max(1, READ // read))
            rates[name] = max(rates[name], rate)
    levels = [Level(name, sizes[name], reads[name], rates[name]) for name in sizes]
    return Machine(threads, peak, tuple(levels))


def measure_peak(threads: int) -> float:
    """Floating-point operations per second at this moment."""
    return _C.multiply_add_rate(threads=threads, rounds=ROUNDS)


def _cache_size(level: str) -> int | None:
    """Bytes of the data cache of that level, as Linux tells them; None elsewhere."""
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        number, kind, size = (
            (cache / name).read_text().strip() for name in ("level", "type", "size")
        )
        if number == level[1] and kind != "Instruction":
            return int(size.removesuffix("K")) << 10
    return None


def environment() -> dict[str, str | int]:
    """Versions, processor and tier, by name, in the order to print them in."""
    return {
        "date": datetime.date.today().isoformat(),
        "pyseq": pyseq.__version__,
        "torch": torch.__version__,
        "onnxruntime": version("onnxruntime") or "not installed",
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "tier": info.facts()["cpu tier"],
        "dtype": "float32",
        "load": f"{os.getloadavg()[0]:.1f}",  # runnable processes in the last minute
    }


def version(package: str) -> str | None:
    """The version of an installed package, None if it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
