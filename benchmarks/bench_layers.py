# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers, attention and the attention decoder, with pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import layers
from .workloads import ImplementationName, Workload, cases


@pytest.mark.parametrize(("workload", "impl"), cases(layers.workloads()), ids=str)
def test_layers(
    measure: Callable[[Workload, ImplementationName], None],
    workload: Workload,
    impl: ImplementationName,
) -> None:
    measure(workload, impl)
