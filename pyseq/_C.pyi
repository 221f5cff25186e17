# SPDX-License-Identifier: Apache-2.0
"""The compiled part of pyseq; its operators are under ``torch.ops.pyseq``."""

def build_info() -> dict[str, str]:
    """What the extension was built with and for: torch, compiler, flags, cuda."""

def cpu_tier() -> str:
    """The CPU tier in use: avx512, avx2, neon or plain."""

def compiled_tiers() -> str:
    """The CPU tiers compiled in, best first, separated by commas."""
