# SPDX-License-Identifier: Apache-2.0
"""A training step and searches of Seq2Seq, on our operators and on the reference's."""

from __future__ import annotations

import pytest
from workloads import Measure, Workload, cases, generate_workloads, seq2seq_workloads


@pytest.mark.parametrize(("workload", "impl"), cases(seq2seq_workloads()), ids=str)
def test_seq2seq(measure: Measure, workload: Workload, impl: str) -> None:
    measure(workload, impl)


@pytest.mark.parametrize(("workload", "impl"), cases(generate_workloads()), ids=str)
def test_generate(measure: Measure, workload: Workload, impl: str) -> None:
    measure(workload, impl)
