# SPDX-License-Identifier: Apache-2.0
"""Which of the operators' cases a CUDA device is asked for: with ``PYSEQ_CUDA_CASES=few``, as on
threads of the host unless that says ``all``, some that meet everything once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from cuda_device import IS_SHIM
from operator_cases import Case, op_of


def group(case: Case) -> tuple[Any, ...]:
    """What kernels differ in: operator, cell, score, dtype, and whether there is a projection."""
    kinds = [getattr(case, name, None) for name in ("cell", "score", "dtype")]
    if op_of(case) == "decode":
        kinds[1] = kinds[1] == "concat"  # every other one is a dot with keys made outside
    return op_of(case), *kinds, bool(getattr(case, "projection", 0))


def settings(case: Case) -> set[tuple[Any, ...]]:
    """Every setting of the case, each with its group. Sizes, of which there are many, are shared
    among the dtypes, and large ones, which take threads of the host long, among all kernels."""
    own = group(case)
    found = {(*own, f.name, getattr(case, f.name)) for f in fields(case) if f.name != "sizes"}
    large = max(case.sizes) > 64
    sharing = [] if large else [kind for kind in own if not isinstance(kind, torch.dtype)]
    return found | {(op_of(case), *sharing, "sizes", case.sizes)}


def few(cases: Sequence[Case]) -> list[Case]:
    """Cases in which every setting occurs with every kernel once, in the order given: one after
    another that which adds most."""
    offered = {case: settings(case) for case in cases}
    kept = set()
    while offered:
        best = max(offered, key=lambda case: len(offered[case]))
        met = offered.pop(best)
        if not met:
            break
        kept.add(best)
        for new in offered.values():
            new -= met
    return [case for case in cases if case in kept]


def chosen(cases: Sequence[Case]) -> list[Case]:
    """Those that the environment asks for."""
    value = os.environ.get("PYSEQ_CUDA_CASES", "few" if IS_SHIM else "all")
    if value not in ("few", "all"):
        raise ValueError(f"PYSEQ_CUDA_CASES must be few or all, got {value!r}")
    return few(cases) if value == "few" else list(cases)
