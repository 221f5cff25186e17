# SPDX-License-Identifier: Apache-2.0
"""Layers of pyseq.nn against torch.nn and the reference, on the same weights."""

from __future__ import annotations

import pytest
from workloads import Measure, Workload, cases, scan_workloads


@pytest.mark.parametrize(("workload", "impl"), cases(scan_workloads()), ids=str)
def test_scan(measure: Measure, workload: Workload, impl: str) -> None:
    measure(workload, impl)
