# SPDX-License-Identifier: Apache-2.0
"""Calls every kernel for a CUDA device once, forward and backward, on small shapes with several
blocks: what the checkers of memory and barriers watch. ``python tests/cuda_checked.py``."""

from __future__ import annotations

import os
from dataclasses import replace

import cuda_device  # before torch
import torch
from operator_cases import Case, changed, run, small_cases

from pyseq import functional


def cases() -> list[Case]:
    """Everything in float32, some in each other type; layers that normalise have one path."""
    found = small_cases()
    if os.environ.get("PYSEQ_CUDA_PATH") == "persistent":
        found = [case for case in found if not getattr(case, "layer_norm", False)]
    others = (torch.float64, torch.float16, torch.bfloat16)
    return found + [replace(case, dtype=dtype) for dtype in others for case in found[::6]]


def main() -> None:
    for case in cases():
        run(functional, changed(case.call(), lambda _, tensor: tensor.to("cuda")))
        print(case.id, flush=True)  # so that a checker's report can be placed
    if not cuda_device.IS_SHIM:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
