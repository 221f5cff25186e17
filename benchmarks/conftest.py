# SPDX-License-Identifier: Apache-2.0
"""The one way in which the benchmark files measure a case with pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import onnx_rival
from .machine import environment
from .measure import check
from .workloads import ImplementationName, Workload


@pytest.fixture
def measure(benchmark: BenchmarkFixture) -> Callable[[Workload, ImplementationName], None]:
    """Time one implementation of a workload, and check what it gave."""

    def run(workload: Workload, impl: ImplementationName) -> None:
        if impl == "onnx" and not onnx_rival.installed():
            pytest.skip("onnx or onnxruntime is not installed")
        prepared = workload.prepare()
        expected = prepared["reference"]()
        prepared[impl]()  # oneDNN and the allocator prepare themselves at first
        benchmark.group = workload.name
        benchmark.extra_info.update(environment(), impl=impl, threads=torch.get_num_threads())
        check(benchmark(prepared[impl]), expected, impl)
        if benchmark.stats:  # there are none with --benchmark-disable
            per_second = workload.tokens / benchmark.stats.stats.median
            benchmark.extra_info["tokens_per_second"] = per_second

    return run
