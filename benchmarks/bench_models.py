# SPDX-License-Identifier: Apache-2.0
"""The whole model, training and searching, with pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import models
from .workloads import ImplementationName, Workload, cases


@pytest.mark.parametrize(("workload", "impl"), cases(models.workloads()), ids=str)
def test_models(
    measure: Callable[[Workload, ImplementationName], None],
    workload: Workload,
    impl: ImplementationName,
) -> None:
    measure(workload, impl)
