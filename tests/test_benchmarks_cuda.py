# SPDX-License-Identifier: Apache-2.0
"""The benchmark of CUDA devices, as far as it goes without one."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cuda
from benchmarks.cuda import Row, Timing


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device that torch sees; there is none"):
        cuda.main([])


def test_the_page_gives_times_and_ratios() -> None:
    layer = Row(("lstm", "float16", "256", "16"), Timing(2.0, 5.0), (Timing(3.0, 10.0),), 0.5)
    decoder = Row(("decode", "float32", "512", "32"), Timing(10.0, 30.0), (None, None), 4.0)
    page = cuda.document([layer], [decoder], "Some device", whole=True)
    assert page.startswith("# Benchmarks on a CUDA device\n\nSome device, torch ")
    expected = "| lstm | float16 | 256 | 16 | 2.00 | 5.00 | 25 | 3.00 | 1.50 | 10.00 | 2.00 |"
    assert expected in page.splitlines()
    assert "the time ran out" in cuda.document([layer], [decoder], "Some device", whole=False)
