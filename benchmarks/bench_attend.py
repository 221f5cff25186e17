# SPDX-License-Identifier: Apache-2.0
"""Attention over a memory against torch's fused one (dot) and the reference."""

from __future__ import annotations

import pytest
from workloads import Measure, Workload, attend_workloads, cases


@pytest.mark.parametrize(("workload", "impl"), cases(attend_workloads()), ids=str)
def test_attend(measure: Measure, workload: Workload, impl: str) -> None:
    measure(workload, impl)
