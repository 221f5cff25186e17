# SPDX-License-Identifier: Apache-2.0
"""What dropout multiplies with in one pass of a decoder."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..nn._masks import DrawnMasks


class Masks(NamedTuple):
    """What dropout multiplies with in one pass of a decoder; None where nothing is dropped."""

    embedding: Tensor | None  # (T, B, E)
    #: (L-1, T, B, H), the outputs of all layers but the last; or all that layers drop.
    layers: Tensor | DrawnMasks | None
    output: Tensor | None  # (T, B, H)

    def step(self, t: int) -> Masks:
        """Those of one step."""
        layers = self.layers
        if isinstance(layers, Tensor):
            layers = layers[:, t : t + 1]
        elif layers is not None:
            layers = layers.of_steps(t, t + 1)
        return Masks(
            None if self.embedding is None else self.embedding[t : t + 1],
            layers,
            None if self.output is None else self.output[t : t + 1],
        )


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
