# SPDX-License-Identifier: Apache-2.0
"""pyseq: recurrent sequence-to-sequence models with fused kernels for PyTorch."""

from . import _library as _library  # first: checks the build and loads _C
from . import functional, reference

__version__ = "0.1.0"

__all__ = ["__version__", "functional", "reference"]
