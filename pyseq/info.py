# SPDX-License-Identifier: Apache-2.0
"""What this installation of pyseq is made of: for bug reports and ``pyseq info``."""

from __future__ import annotations

import platform

import torch

from . import __version__
from ._library import _C


def facts() -> dict[str, str]:
    """Versions, CPU tier, threads and CUDA by name, in the order to print them in."""
    build = _C.build_info()
    return {
        "pyseq": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (built for {build['torch']})",
        "compiler": f"{build['compiler']} ({build['flags']})",
        "cpu tier": _C.cpu_tier(),
        "compiled in": _C.compiled_tiers().replace(",", ", "),
        "threads": str(torch.get_num_threads()),
        "cuda": f"pyseq {build['cuda']}, torch {torch.version.cuda or 'none'}",
        "platform": platform.platform(),
    }


def lines() -> list[str]:
    """``facts`` as lines of text, name and value in two columns."""
    entries = facts()
    width = max(map(len, entries))
    return [f"{name:<{width}}  {value}" for name, value in entries.items()]


def describe() -> str:
    """``lines`` as one text."""
    return "\n".join(lines())
