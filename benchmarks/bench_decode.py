# SPDX-License-Identifier: Apache-2.0
"""The whole attention decoder against the reference; torch.nn has none."""

from __future__ import annotations

import pytest
from workloads import Measure, Workload, cases, decode_workloads


@pytest.mark.parametrize(("workload", "impl"), cases(decode_workloads()), ids=str)
def test_decode(measure: Measure, workload: Workload, impl: str) -> None:
    measure(workload, impl)
