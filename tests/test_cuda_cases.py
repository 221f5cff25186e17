# SPDX-License-Identifier: Apache-2.0
"""Tests of the choice of cases for a CUDA device. No device is needed."""

from __future__ import annotations

import pytest
from cuda_cases import chosen, few, settings
from operator_cases import attend_cases, attentive_cases, decode_cases, scan_cases


def test_few_cases_meet_every_setting() -> None:
    cases = [*scan_cases(), *attend_cases(), *decode_cases(), *attentive_cases()]
    kept = few(cases)
    assert len(kept) < len(cases) / 8
    assert set().union(*map(settings, kept)) == set().union(*map(settings, cases))
    assert kept == few(cases)


def test_the_environment_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = attend_cases()
    monkeypatch.setenv("PYSEQ_CUDA_CASES", "all")
    assert chosen(cases) == cases
    monkeypatch.setenv("PYSEQ_CUDA_CASES", "few")
    assert chosen(cases) == few(cases)
    monkeypatch.setenv("PYSEQ_CUDA_CASES", "some")
    with pytest.raises(ValueError, match="PYSEQ_CUDA_CASES must be few or all, got 'some'"):
        chosen(cases)
