# SPDX-License-Identifier: Apache-2.0
"""What an epoch of training came to, and how it is told."""

from __future__ import annotations

from typing import NamedTuple


class EpochReport(NamedTuple):
    """What one epoch came to."""

    epoch: int  # from 1
    train_loss: float  # nats per target token, with dropout and smoothing, over the epoch
    valid_loss: float | None  # nats per target token; None without validation pairs
    best: bool  # whether this is the best epoch so far
    valid_accuracy: float | None = None  # where it selects the best epoch

    def text(self, epochs: int, unit: str, rate: float) -> str:
        """This as a line of the log.

        Args:
            epochs: of how many epochs this is one.
            unit: what the losses are the mean over, ``"token"`` for one.
            rate: so many of them were trained on in a second.
        """
        text = f"epoch {self.epoch}/{epochs}: loss {self.train_loss:.4f}"
        if self.valid_loss is not None:
            text += f", validation {self.valid_loss:.4f}"
        text += f" nats/{unit}"
        if self.valid_accuracy is not None:
            text += f", {self.valid_accuracy:.2%} right"
        if self.valid_loss is not None and self.best:
            text += " (best)"
        # A resumed run may have had nothing left of its first epoch to train on.
        return f"{text}, {rate:,.0f} {unit}s/s" if rate else text
