# SPDX-License-Identifier: Apache-2.0
"""Averages of the weights that training goes through, kept beside the weights themselves.

Used by the trainer, which judges and saves the average as its best model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

AverageName = Literal["none", "exponential", "epochs"]
AVERAGES: tuple[str, ...] = ("none", "exponential", "epochs")

_PREFIX = "average."


class WeightAverage:
    """An average of a model's weights over the steps or the epochs of a run.

    exponential: ``a_n = d_n a_{n-1} + (1 - d_n) w_n`` after update n = 1, 2, ..., with
    ``d_n = min(decay, n / (n + 9))``, so that the first weights, which know nothing, are soon
    forgotten. epochs: the mean of the weights at the ends of the last ``epochs`` epochs, or of
    as many as there are.

    Args:
        model: whose weights are averaged.
        kind: ``"exponential"`` or ``"epochs"``.
        decay: at most; about 1 / (1 - decay) updates count.
        epochs: to average over.

    Raises:
        ValueError: an option is out of its range.

    Reference:
        Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging";
        epochs: Vaswani et al. 2017, arXiv 1706.03762, section 6.1.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        kind: AverageName,
        *,
        decay: float = 0.999,
        epochs: int = 5,
    ) -> None:
        if kind not in AVERAGES[1:]:
            raise ValueError(f"kind must be one of {', '.join(AVERAGES[1:])}, got {kind!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay!r}")
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs!r}")
        self.kind = kind
        self.decay = decay
        # By name, and each tensor once, though it may be tied to several places.
        self._weights: dict[str, Tensor] = dict(model.named_parameters())
        # The exponential average alone, or the weights of each epoch, the oldest first.
        self._kept: deque[list[Tensor]] = deque(maxlen=epochs if kind == "epochs" else 1)

    @torch.no_grad()
    def after_update(self, count: int) -> None:
        """Take in the weights after ``count`` updates; for ``"epochs"`` nothing."""
        if self.kind != "exponential":
            return
        if not self._kept:
            self._keep()
            return
        decay = min(self.decay, count / (count + 9))
        torch._foreach_lerp_(self._kept[0], list(self._weights.values()), 1 - decay)

    def after_epoch(self) -> None:
        """Take in the weights at the end of an epoch; for ``"exponential"`` nothing."""
        if self.kind == "epochs":
            self._keep()

    def _keep(self) -> None:
        self._kept.append([weight.detach().clone() for weight in self._weights.values()])

    @torch.no_grad()
    def give(self) -> None:
        """Overwrite the model's weights with the average, if there is one yet."""
        for index, weight in enumerate(self._weights.values()):
            if self._kept:
                weight.copy_(torch.stack([kept[index] for kept in self._kept]).mean(0))

    @contextmanager
    def given(self) -> Iterator[None]:
        """Lend the average to the model for a while."""
        own = [weight.detach().clone() for weight in self._weights.values()]
        self.give()
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, value in zip(self._weights.values(), own, strict=True):
                    weight.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """What :meth:`restore` needs, by ``average.<number>.<name of the weight>``."""
        return {
            f"{_PREFIX}{number}.{name}": value
            for number, kept in enumerate(self._kept)
            for name, value in zip(self._weights, kept, strict=True)
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave; other names are left alone.

        Raises:
            KeyError: a weight is missing.
        """
        numbers = {int(name.split(".")[1]) for name in tensors if name.startswith(_PREFIX)}
        self._kept.clear()
        for number in sorted(numbers):
            self._kept.append(
                [
                    tensors[f"{_PREFIX}{number}.{name}"].to(weight.device, copy=True)
                    for name, weight in self._weights.items()
                ]
            )
