# SPDX-License-Identifier: Apache-2.0
"""Quantized weights as the operators take them: uint8 tensors that stand for a matrix.

A row for each of its rows; what lies in them is the kernels' affair and depends on the
instruction set in use. ``pyseq.quantized`` makes modules that hold such weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._library import _C

QuantizedName = Literal["int8", "bfloat16"]
QUANTIZED: tuple[str, ...] = ("int8", "bfloat16")


class Run(NamedTuple):
    """A run of columns of a quantized matrix."""

    values: Tensor  # (rows, columns), int8 or bfloat16
    scales: Tensor | None  # (rows,) for int8: the weights are values * scales


def is_quantized(weight: Tensor) -> bool:
    """Whether ``weight`` stands for a matrix instead of being one."""
    return weight.dtype == torch.uint8


def computing_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of what ``weight`` is multiplied with."""
    return torch.float32 if is_quantized(weight) else weight.dtype


def pack(
    weight: Tensor, kind: QuantizedName, *, gates: int = 1, columns: Sequence[int] | None = None
) -> Tensor:
    """Quantize a matrix.

    Args:
        weight: (rows, columns), float32, on the CPU, finite.
        kind: ``"int8"``: rows are scaled by their largest magnitude in the run, over 127;
            ``"bfloat16"``: rounded to 8 bits of precision.
        gates: G of rows (G*H,).
        columns: the columns of each run; runs are multiplied with different things. Default:
            one run.

    Raises:
        ValueError: a weight is not finite.
        RuntimeError: the matrix has the wrong dtype or device.
    """
    # Elsewhere the kernels say so; on the meta device there is nothing to look at.
    if weight.is_cpu and not weight.isfinite().all():
        raise ValueError("weights must be finite to be quantized")
    columns = weight.shape[1:] if columns is None else columns
    return _C.quantize_weight(weight, gates=gates, columns=list(columns), kind=kind)


def unpack(weight: Tensor) -> list[Run]:
    """The runs of columns of a quantized matrix."""
    return [
        Run(values, scales if scales.numel() else None)
        for values, scales in _C.quantized_values(weight)
    ]
