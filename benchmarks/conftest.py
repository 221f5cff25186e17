# SPDX-License-Identifier: Apache-2.0
"""The one way in which the benchmark files measure a case with pytest-benchmark."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from workloads import Measure, Workload, check, environment


@pytest.fixture
def measure(benchmark: BenchmarkFixture) -> Measure:
    """Time one implementation of a workload, and check what it gave."""

    def run(workload: Workload, impl: str) -> None:
        implementations = workload.prepare()
        expected = implementations["reference"]()
        implementations[impl]()  # oneDNN and the allocator prepare themselves at first
        benchmark.group = workload.group
        benchmark.extra_info.update(environment(), impl=impl)
        check(benchmark(implementations[impl]), expected)
        if benchmark.stats:  # there are none with --benchmark-disable
            per_second = workload.tokens / benchmark.stats.stats.median
            benchmark.extra_info["tokens_per_second"] = per_second

    return run
