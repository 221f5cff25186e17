# SPDX-License-Identifier: Apache-2.0
"""Where models are: the CPU, or a CUDA device where there is one with kernels for it."""

from __future__ import annotations

import os

import torch

from ._library import has_kernels, rebuild_command
from .errors import DeviceError

#: What a function takes that puts a model somewhere.
AnyDevice = torch.device | str | None

_NAMES = "cpu, cuda or cuda:0, cuda:1 and so on"


def find_device(device: AnyDevice) -> torch.device:
    """The device of that name, after a look whether models can be there.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``. ``"cuda"`` is the current device, or in each
            process that ``torchrun`` starts the one of that process. Default: the CPU.

    Raises:
        DeviceError: there is no such device, or pyseq has no kernels for it. It is a ValueError.
    """
    try:
        found = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"the device must be {_NAMES}, got {device!r}") from error
    if found.type == "cpu":
        return found
    if found.type != "cuda":
        raise DeviceError(f"the device must be {_NAMES}, got {found}, which has no kernels here")
    if not torch.cuda.is_available():
        raise DeviceError(f"torch finds no CUDA device here, got {found} as the device")
    if not has_kernels("cuda"):
        raise DeviceError(
            f"this build of pyseq has no kernels for {found}: build it where torch has CUDA and "
            f"nvcc is of the same major version, with: {rebuild_command()}"
        )
    index: int | None = found.index
    if index is None:
        index = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    count = torch.cuda.device_count()
    if index >= count:
        raise DeviceError(f"the device must be one of the {count} that torch finds, got {found}")
    return torch.device("cuda", index)


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given, as to read a clock needs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
