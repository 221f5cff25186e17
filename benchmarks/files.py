# SPDX-License-Identifier: Apache-2.0
"""Writing what a run found, so that an interrupted one leaves the files before as they were."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write; it takes its place when that went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield fresh
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file, so that whoever reads it meanwhile gets the old text or the new one."""
    with replaced(path) as fresh:
        fresh.write_text(text, encoding="utf-8")
