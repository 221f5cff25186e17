# SPDX-License-Identifier: Apache-2.0
"""Every CPU tier that this machine has, each in a process of its own.

The tier is chosen once per process, so the test runs this file as a script, which prints
the tier in use after comparing the operators with the reference.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from generate_cases import GenerateCase, check_scheduled
from generate_cases import check as check_generate
from operator_cases import DTYPES, AttendCase, Case, DecodeCase, ScanCase, expected_of, run
from operator_cases import LinearCrossEntropyCase as LossCase
from operator_cases import small_cases as small
from tolerances import assert_close

from pyseq import functional
from pyseq._library import _C

#: The values of ATEN_CPU_CAPABILITY, from the least to the most, and pyseq's name for each.
TIERS = {"default": "plain", "avx2": "avx2", "avx512": "avx512"}


def tier_cases() -> list[Case]:
    """The small cases, and some that reach past one vector and one tile, in both dtypes."""
    return [
        case
        for dtype in DTYPES
        for case in (
            *small(dtype),
            ScanCase(cell="lstm", sizes=(4, 13, 5, 67), dtype=dtype),
            ScanCase(cell="gru", sizes=(4, 9, 5, 65), lengths="ragged", dtype=dtype),
            ScanCase(cell="rnn_tanh", sizes=(4, 1, 5, 130), dtype=dtype),
            AttendCase(sizes=(9, 33, 5, 67, 65, 67), lengths="ragged", dtype=dtype),
            AttendCase(score="concat", sizes=(9, 33, 5, 67, 65, 31), dtype=dtype),
            DecodeCase(sizes=(4, 17, 9, 5, 67, 67, 33), layers=2, dtype=dtype),
            DecodeCase(cell="gru", score="concat", sizes=(4, 17, 1, 5, 65, 33, 67), dtype=dtype),
            LossCase(sizes=(77, 130, 67), ignored="some", label_smoothing=0.1, dtype=dtype),
        )
    ]


def available() -> list[str]:
    """The values of ATEN_CPU_CAPABILITY that this machine can run."""
    names = list(TIERS)
    best = torch.backends.cpu.get_cpu_capability().lower()
    return names[: names.index(best) + 1] if best in names else ["default"]


@pytest.mark.parametrize("capability", available())
def test_operators_on_tier(capability: str) -> None:
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == TIERS[capability]


def check_this_process() -> None:
    """Compare every case with the reference and print the tier in use."""
    torch.use_deterministic_algorithms(True)
    for case in tier_cases():
        call = case.call()
        expected, actual = expected_of(call), run(functional, call)
        try:
            assert_close(actual.outputs, expected.outputs)
            assert_close(actual.gradients, expected.gradients)
        except AssertionError as error:
            raise AssertionError(f"{call.op} {case.id}: {error}") from None
    for dtype in DTYPES:
        check_generate(GenerateCase(sizes=(7, 2, 16, 65, 65, 33, 300), dtype=dtype))
        check_generate(GenerateCase(sizes=(5, 3, 4, 8, 9, 17, 131), beam_size=4, dtype=dtype))
        ruled = GenerateCase(
            sizes=(4, 3, 5, 7, 6, 8, 9),
            beam_size=3,
            n_best=3,
            min_length=2,
            block_ngrams=2,
            prefix="ragged",
            dtype=dtype,
        )
        check_generate(ruled)
        for drawn in (False, True):
            check_scheduled(ruled, masked=drawn, drawn=drawn)
    print(_C.cpu_tier())


if __name__ == "__main__":
    check_this_process()
