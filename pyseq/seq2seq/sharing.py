# SPDX-License-Identifier: Apache-2.0
"""Hypotheses that share a source: side by side, as if they were steps of its row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """N rows in R groups of at most k, for parts of a decoder that take T steps of each source.

    What a source lacks of k rows is zero, and nobody reads what comes of it.
    """

    places: Tensor  # (N,), of each row among the R * k
    rows: int  # R
    width: int  # k

    @classmethod
    def of(cls, memory_rows: Tensor, rows: int) -> Groups:
        """Of those that attend to the same of ``rows`` rows, by ``memory_rows`` (N,).

        How many share a row is asked of what ``memory_rows`` hold, which on another device than
        the CPU waits for it. Searches there give every hypothesis a row of its own.
        """
        sources, order = memory_rows.sort(stable=True)
        number = torch.arange(len(sources), device=sources.device)
        number = number - torch.searchsorted(sources, sources)  # in its group
        width = int(number.max()) + 1 if len(number) else 1
        places = torch.empty_like(sources).index_copy_(0, order, sources * width + number)
        return cls(places, rows, width)

    def gather(self, x: Tensor) -> Tensor:
        """What belongs to each row, (N, T, ...), as steps of its source, (R, k * T, ...)."""
        grouped = x.new_zeros(self.rows * self.width, *x.shape[1:])
        return grouped.index_copy_(0, self.places, x).view(self.rows, -1, *x.shape[2:])

    def scatter(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x.reshape(self.rows * self.width, -1, *x.shape[2:]).index_select(0, self.places)
