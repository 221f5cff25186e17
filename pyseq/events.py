# SPDX-License-Identifier: Apache-2.0
"""Curves of a training run for TensorBoard (extra ``tensorboard``). Used by the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import require


def require_tensorboard() -> None:
    """Miss the package before a run and not in it.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """
    # torch's writer imports it, and its error would name torch as what is missing.
    require("tensorboard", extra="tensorboard")
    require("torch.utils.tensorboard", extra="tensorboard")


class Events:
    """Writes numbers to a folder that ``tensorboard --logdir`` shows.

    Args:
        folder: where to; made if it is missing.
        step: updates done; what an earlier part of the run wrote for later ones is hidden,
            since the run went back.

    Raises:
        MissingExtraError: tensorboard is not installed.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, *, step: int) -> None:
        require_tensorboard()
        writer = require("torch.utils.tensorboard", extra="tensorboard").SummaryWriter
        self._writer: Any = writer(log_dir=str(folder), purge_step=step + 1)

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write the numbers of one moment; None is left out.

        Args:
            step: updates done.
            values: by name, with the group that they are shown in before a slash.
        """
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still held back."""
        self._writer.close()
