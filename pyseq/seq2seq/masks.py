# SPDX-License-Identifier: Apache-2.0
"""What dropout multiplies with in one pass of a decoder."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Masks(NamedTuple):
    """What dropout multiplies with in one pass of a decoder; None where nothing is dropped."""

    embedding: Tensor | None  # (T, B, E)
    layers: Tensor | None  # (L-1, T, B, H), the outputs of all layers but the last
    output: Tensor | None  # (T, B, H)

    def step(self, t: int) -> Masks:
        """Those of one step."""
        return Masks(
            None if self.embedding is None else self.embedding[t : t + 1],
            None if self.layers is None else self.layers[:, t : t + 1],
            None if self.output is None else self.output[t : t + 1],
        )


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
