# SPDX-License-Identifier: Apache-2.0
"""A model so small that every sequence it can emit may be listed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyseq.search import EncodedSource, Step
from pyseq.types import DecoderState

#: Sources that a chain does not look at, but for their number.
SOURCE = torch.zeros(3, 2, dtype=torch.int64)
LENGTHS = torch.tensor([2, 2, 1])


class Chain:
    """A model whose next token depends on the last one and on the row's table only.

    ``step`` finds the row's table by the state, and so checks how searches select states.
    """

    def __init__(self, logits: Tensor, attention: Tensor | None = None) -> None:
        self.log_probs = torch.log_softmax(logits, -1)  # (B, V, V): row, last, next
        self.attention = attention  # (B, V, 2): row, last, weights; None: the last token, twice
        self.calls: list[int] = []  # hypotheses of each step

    def modules(self) -> Iterator[torch.nn.Module]:
        return iter(())

    def encode_source(self, source: Tensor, lengths: Tensor) -> tuple[EncodedSource, DecoderState]:
        rows = torch.arange(len(source), dtype=self.log_probs.dtype)
        # The number of the row, in every place where a search has to carry it along.
        memory = rows.reshape(1, -1, 1)
        state = DecoderState(memory, rows.unsqueeze(1))
        return EncodedSource(memory, memory, rows.long()), state

    def step(
        self, tokens: Tensor, encoded: EncodedSource, state: DecoderState, *, need_weights: bool
    ) -> Step:
        self.calls.append(len(tokens))
        rows = state.feed.squeeze(1).long()
        for carried in (state.hidden, encoded.memory, encoded.keys):
            assert isinstance(carried, Tensor)
            assert torch.equal(carried.long().flatten(), rows)
        assert encoded.lengths is not None
        assert torch.equal(encoded.lengths, rows)
        weights = None
        if need_weights and self.attention is not None:
            weights = self.attention[rows, tokens]
        elif need_weights:
            weights = tokens.to(state.feed).unsqueeze(1).expand(-1, 2)
        return Step(self.log_probs[rows, tokens], weights, state)


def chain(vocab: int = 6, batch: int = 3, sharpness: float = 1.5) -> Chain:
    return Chain(torch.randn(batch, vocab, vocab, dtype=torch.float64) * sharpness)
