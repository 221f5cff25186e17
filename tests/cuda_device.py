# SPDX-License-Identifier: Apache-2.0
"""Where the tests of a CUDA device run: on one that is there, or, with ``PYSEQ_CUDA=shim`` and a
module built with it, on one of the host's threads (tests/cuda/device). To be imported before torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

ASKED = os.environ.get("PYSEQ_CUDA") == "shim"


def _load_before_torch() -> None:
    """Have torch find tests/cuda/device/accelerator.cpp in place of its own function."""
    source = Path(__file__).resolve().parent / "cuda" / "device" / "accelerator.cpp"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "accelerator.so"
        compiler = os.environ.get("CXX", "g++")
        command = [compiler, "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


if ASKED:
    _load_before_torch()

import pytest  # noqa: E402
import torch  # noqa: E402

from pyseq import _C  # noqa: E402

_BUILT = _C.build_info()["cuda"]
IS_SHIM = ASKED and _BUILT == "shim"
if IS_SHIM:
    # torch, which was built without CUDA, asks here before it makes a tensor there.
    torch.cuda._lazy_init = lambda: None

#: For what only a device has, such as streams.
on_a_gpu = pytest.mark.skipif(IS_SHIM, reason="the shim has no graphs, and streams only in name")


def why_none() -> str | None:
    """Why there is no device to test on; None if there is one."""
    if IS_SHIM:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "pyseq is built without CUDA kernels" if _BUILT in ("none", "shim") else None


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """A library's products of float32 at ``precision``, ``ieee`` or ``tf32``, until the end."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
