# SPDX-License-Identifier: Apache-2.0
"""How the loops of the operators run on a CUDA device: which way, why, and what it should cost.

The plan itself is made in csrc/cuda/plan.cpp; nothing here needs a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch

from ._library import _C
from .types import DIAGONAL, GATES, SCAN_GATES, STATES, CellName

OperatorName = Literal["scan", "decode"]
PathName = Literal["auto", "persistent", "alternating"]

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


class CudaDevice(NamedTuple):
    """What a plan asks of a device."""

    capability: int  #: compute capability, 10 * major + minor
    multiprocessors: int
    shared_per_block: int  #: bytes of shared memory, the most that a block may ask for
    shared_per_multiprocessor: int  #: bytes
    registers_per_multiprocessor: int  #: of 32 bits
    l2_bytes: int
    clock: float  #: of the multiprocessors, cycles per second
    bandwidth: float  #: of the device's memory, bytes per second
    cooperative: bool = True  #: whether all blocks of a grid can be launched at once


#: Devices by name, from the vendor's data sheets, to plan for one that is not at hand.
CUDA_DEVICES: dict[str, CudaDevice] = {
    "t4": CudaDevice(75, 40, 65_536, 65_536, 65_536, 4 << 20, 1.59e9, 320e9),
    "a100": CudaDevice(80, 108, 166_912, 167_936, 65_536, 40 << 20, 1.41e9, 2039e9),
    "l4": CudaDevice(89, 58, 101_376, 102_400, 65_536, 48 << 20, 2.04e9, 300e9),
    "h100": CudaDevice(90, 132, 232_448, 233_472, 65_536, 50 << 20, 1.98e9, 3350e9),
    "h200": CudaDevice(90, 132, 232_448, 233_472, 65_536, 50 << 20, 1.98e9, 4800e9),
}


class CudaPlan(NamedTuple):
    """How a loop over time would run on a device. Times are estimates of the cost model, in µs."""

    path: str  #: ``"persistent"``, one kernel for all steps, or ``"alternating"``, some for each
    reason: str  #: why that one, in a sentence
    tiles: int  #: blocks of a group, each with some of the hidden units; 0 where nothing fits
    groups: int  #: parts of the batch, which never wait for one another
    tile_units: int  #: hidden units of a block, at most
    group_rows: int  #: rows of a group, at most
    grid: int  #: blocks in all
    threads: int  #: of a block
    shared_bytes: int  #: dynamic shared memory of a block
    barrier_bytes: int  #: device memory of the groups' barriers
    step_us: float  #: a step of the path taken
    persistent_us: float  #: a step of the persistent kernel; infinite where it does not fit
    alternating_us: float  #: a step of the alternating path, outside a captured graph
    floor_us: float  #: what no implementation of the step can be faster than

    def __str__(self) -> str:
        shape = (
            f"{self.grid} blocks ({self.groups} groups of {self.group_rows} rows, "
            f"{self.tiles} tiles of {self.tile_units} units), {self.shared_bytes} bytes each; "
            if self.path == "persistent"
            else ""
        )
        return (
            f"{self.path}: {self.reason}; {shape}{self.step_us:.2f} µs a step by the cost model, "
            f"floor {self.floor_us:.2f} µs"
        )


def cuda_device(device: str | int | torch.device | Mapping[str, float] | CudaDevice) -> CudaDevice:
    """What a plan asks of ``device``.

    Args:
        device: a name of ``CUDA_DEVICES``, the facts themselves by name, or a device that torch
            sees (``"cuda"``, ``"cuda:1"``, a number, a ``torch.device``).

    Raises:
        ValueError: a fact is missing or not positive, or there is no such name.
        RuntimeError: torch has no such device.
    """
    if isinstance(device, CudaDevice):
        facts = device
    elif isinstance(device, Mapping):
        unknown = set(device) - set(CudaDevice._fields)
        missing = set(CudaDevice._fields) - set(device) - set(CudaDevice._field_defaults)
        if unknown or missing:
            raise ValueError(
                f"device must hold {', '.join(CudaDevice._fields)}, got "
                + (f"no {', '.join(sorted(missing))}" if missing else f"{', '.join(unknown)} too")
            )
        facts = CudaDevice(**device)  # type: ignore[arg-type]  # names checked above
    elif isinstance(device, str) and not device.startswith("cuda"):
        if device not in CUDA_DEVICES:
            raise ValueError(
                f"device must be one of {', '.join(CUDA_DEVICES)} or a CUDA device of torch, "
                f"got {device!r}"
            )
        return CUDA_DEVICES[device]
    else:
        facts = _present_device(device)
    for name, value in zip(CudaDevice._fields[:-1], facts, strict=False):
        if not value > 0:
            raise ValueError(f"{name} of device must be positive, got {value}")
    return facts


def _present_device(device: str | int | torch.device) -> CudaDevice:
    """The facts of a device that torch sees."""
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"there is no CUDA device {device!r} here: name one of {', '.join(CUDA_DEVICES)} to "
            "plan for it"
        )
    with torch.cuda.device(device):
        facts = _C.cuda_device()
    if facts:  # the very numbers that the kernels are planned with
        return CudaDevice(**facts)
    # Any: torch's stubs know only some of its properties.
    found: Any = torch.cuda.get_device_properties(device)
    missing = [
        name
        for name in ("clock_rate", "memory_clock_rate", "memory_bus_width")
        if not hasattr(found, name)
    ]
    if missing:
        raise RuntimeError(
            f"torch {torch.__version__} does not tell {', '.join(missing)} of {found.name}: name "
            f"one of {', '.join(CUDA_DEVICES)}, or give the facts of {CudaDevice.__name__}"
        )
    return CudaDevice(
        capability=10 * found.major + found.minor,
        multiprocessors=found.multi_processor_count,
        shared_per_block=found.shared_memory_per_block_optin,
        shared_per_multiprocessor=found.shared_memory_per_multiprocessor,
        registers_per_multiprocessor=found.regs_per_multiprocessor,
        l2_bytes=found.L2_cache_size,
        clock=1e3 * found.clock_rate,  # kHz
        # Two transfers in a cycle, of so many bits.
        bandwidth=2e3 * found.memory_clock_rate * found.memory_bus_width / 8,
    )


def cuda_plan(
    operator: OperatorName = "scan",
    *,
    device: str | int | torch.device | Mapping[str, float] | CudaDevice = "cuda",
    hidden_size: int,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    cell: CellName = "lstm",
    steps: int = 1,
    directions: int = 1,
    proj_size: int = 0,
    heads: int = 1,
    layers: int = 1,
    source_length: int = 1,
    key_size: int | None = None,
    memory_size: int | None = None,
    additive: bool = False,
    input_feeding: bool = True,
    backward: bool = False,
    tf32: bool | None = None,
    path: PathName | None = None,
) -> CudaPlan:
    """Which way a loop over time would take on a CUDA device, and why.

    One persistent kernel runs all steps where the weights fit the device's shared memory and
    waiting between its blocks costs less than launching kernels at every step; else matrix
    products and pointwise kernels alternate. The environment variable ``PYSEQ_CUDA_PATH``
    (``auto``, ``persistent``, ``alternating``) overrides the choice, and
    ``PYSEQ_CUDA_MULTIPROCESSORS`` says how many multiprocessors a persistent kernel may take.

    The times come from a cost model of published latencies and rates, not from measurements.

    Args:
        operator: ``"scan"`` or ``"decode"``.
        device: of torch, or described; see :func:`cuda_device`.
        hidden_size: H.
        batch_size: B.
        dtype: of the operator's arguments, which its kernels hold numbers in; they add up in
            float32 at least. Under ``torch.autocast`` that is float32.
        cell: the kind of cell.
        steps: T, which the plan's times are per step of.
        directions: of a scan, 1 or 2, which run side by side.
        proj_size: P of a scan with projection, or 0.
        heads: of the cell's recurrent matrix (sLSTM).
        layers: of a decoder.
        source_length: S of a decoder's memory.
        key_size: A of a decoder, H by default.
        memory_size: M of a decoder, H by default.
        additive: whether the score is concat.
        input_feeding: whether a decoder feeds its output back.
        backward: of the gradients' loop instead.
        tf32: whether a library's float32 products may round their factors; None: as torch allows
            (``torch.backends.cuda.matmul.fp32_precision``). Those of a persistent kernel never do.
        path: a choice that comes before the environment's; None leaves it that.

    Raises:
        ValueError: an option that is not there, a size that is not positive, or the persistent
            kernel asked for where it does not fit.
        RuntimeError: torch has no such device.
    """
    if operator not in get_args(OperatorName):
        raise ValueError(f"operator must be scan or decode, got {operator!r}")
    gates = SCAN_GATES if operator == "scan" else GATES
    if cell not in gates:
        raise ValueError(f"cell of a {operator} must be one of {', '.join(gates)}, got {cell!r}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    if path is not None and path not in get_args(PathName):
        raise ValueError(f"path must be one of {', '.join(get_args(PathName))}, got {path!r}")
    if directions not in (1, 2):
        raise ValueError(f"directions must be 1 or 2, got {directions}")
    sizes = {"steps": steps, "batch": batch_size, "hidden": hidden_size, "gates": gates[cell]}
    if operator == "scan":
        sizes |= {
            "state_size": proj_size or hidden_size,
            "sums": gates[cell] + (cell == "gru"),
            "heads": heads,
            "directions": directions,
        }
    else:
        sizes |= {
            "layers": layers,
            "source": source_length,
            "key_size": key_size or hidden_size,
            "memory_size": memory_size or hidden_size,
        }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if hidden_size % heads:
        raise ValueError(f"heads must divide hidden_size = {hidden_size}, got {heads}")
    if operator == "scan":
        sizes |= {
            "states": len(STATES.get(cell, "")),
            "recurrent": cell not in DIAGONAL,
            "gates_state": cell == "gru_reset_before",
        }
    else:
        sizes |= {
            "additive": additive,
            "projects_query": additive,
            "feeding": input_feeding,
        }
    sizes["backward"] = backward
    facts = cuda_device(device)._asdict()
    if tf32 is None:
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    name = "tf32" if tf32 and dtype == torch.float32 else _DTYPES[dtype]
    plan = _C.cuda_plan(
        operator,
        {key: float(value) for key, value in facts.items()},
        {key: int(value) for key, value in sizes.items()},
        dtype=name,
        path=path or "",
    )
    return CudaPlan(**plan)  # type: ignore[arg-type]  # a mapping of values of several types
