# SPDX-License-Identifier: Apache-2.0
"""Compiles CUDA kernels for the CPU, through the shim in tests/cuda, and calls them.

``tests/cuda/<name>.cpp`` includes the kernels' sources and exports C functions; the first test
that asks for it compiles it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "tests" / "cuda"
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")


def build(name: str, directory: Path) -> ctypes.CDLL:
    """The library of ``tests/cuda/<name>.cpp``, compiled into ``directory``."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("the shim needs g++ on Linux")
    library = directory / f"{name}.so"
    command = [compiler, *FLAGS, "-DPYSEQ_CUDA_SHIM", f"-I{ROOT / 'csrc'}", f"-I{SHIM}"]
    subprocess.run([*command, str(SHIM / f"{name}.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.shim_error.restype = ctypes.c_char_p
    loaded.shim_seed.argtypes = [ctypes.c_uint64]
    return loaded


def check(library: ctypes.CDLL, status: int) -> None:
    """Raise what went wrong in a launch, if anything did."""
    if status != 0:
        raise RuntimeError(library.shim_error().decode())


def pointer(tensor: Tensor | None) -> int | None:
    """Where a contiguous tensor's numbers lie."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()
