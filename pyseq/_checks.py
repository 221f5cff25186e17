# SPDX-License-Identifier: Apache-2.0
"""Argument checks that modules and operators share.

What the operators themselves read is checked in C++; these look at what Python computes
with before, and at what modules know better.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from operator import index
from typing import Any, cast

import torch
from torch import Tensor

from .types import kind


def check_tensor(name: str, value: object) -> None:
    """Raise a TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {kind(value)}")


def check_shape(name: str, tensor: Tensor, letters: str, expected: tuple[int, ...]) -> None:
    """Raise unless ``tensor`` has the ``expected`` shape, where -1 stands for any size."""
    check_tensor(name, tensor)
    shape = tensor.shape
    fits = len(shape) == len(expected)
    # A loop: this is called several times a call, of which the smallest take 40 µs.
    for want, got in zip(expected, shape, strict=False):
        if want != -1 and want != got:  # torch.compile knows no `in` of sizes
            fits = False
    if not fits:
        sizes = ", ".join("any" if want == -1 else str(want) for want in expected)
        raise RuntimeError(f"{name} must be {letters} = ({sizes}), got {tuple(shape)}")


def check_like(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless both have one device (a product with the meta device would succeed) and,
    but for autocast, one dtype."""
    if tensor.device != like.device:
        raise RuntimeError(
            f"{name} must be on the device of {like_name}, {like.device}, got {tensor.device}"
        )
    if tensor.dtype != like.dtype and not autocasts(like.device):
        raise RuntimeError(
            f"{name} must have the dtype of {like_name}, {like.dtype}, got {tensor.dtype}"
        )


def check_positive(**sizes: object) -> None:
    """Raise a ValueError unless every one is an int (which a bool is not) above 0."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_smoothing(label_smoothing: float) -> None:
    """Raise a ValueError unless the share of the target probability is one."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing!r}")


def check_number(name: str, value: object) -> None:
    """Raise a ValueError unless ``value`` is an int (which a bool is not) or a finite float."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(cast(float, value)):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def integer(name: str, value: Any) -> int:
    """``value``, of any integer type but bool, as an int.

    Raises:
        ValueError: it is none.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def number(name: str, value: Any) -> float:
    """``value``, of any type of numbers but bool, as an int or a float.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None


def check_all(valid: Tensor, short: str, said: Callable[[], str]) -> None:
    """Raise a RuntimeError unless ``valid`` is true everywhere.

    On the CPU the text is what is ``said`` of the values. A device asserts it by itself when it
    gets there, since to look at them would be to wait for it; so does a graph of the compiler,
    which can neither branch on a value nor spell out a size. What they say is ``short``.
    """
    if valid.is_cpu and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        if not valid.all():
            raise RuntimeError(said())
    else:
        torch._assert_async(valid.all(), short)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for ``device``; there are devices that do not know it."""
    name = device.type
    return torch.amp.is_autocast_available(name) and torch.is_autocast_enabled(name)


def check_lines(lines: object) -> None:
    """Raise a TypeError for what is no sequence, and for a single string, which is one, but of its
    letters."""
    if not hasattr(lines, "__len__"):
        raise TypeError(f"lines must be a sequence of strings, got {kind(lines)}")
    if isinstance(lines, str):
        raise TypeError(f"lines must be a sequence of strings, got the string {lines[:40]!r}")


def read_json(text: str | bytes) -> Any:
    """What a file of JSON says.

    Raises:
        ValueError: it is no JSON, or a file nested as deeply as none that pyseq writes.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def numpy_reason(error: Exception) -> str:
    """What numpy says of a file, without its advice to run what is in it."""
    return str(error).partition(" If you trust the file")[0]
