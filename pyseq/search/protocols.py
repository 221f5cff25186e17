# SPDX-License-Identifier: Apache-2.0
"""What a model offers to be searched, and what a search carries along of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..types import Copies, DecoderState, GenerateOutput


class Selectable(Protocol):
    """What a search carries along for its hypotheses, a row for each of them."""

    def select(self, rows: Tensor) -> Selectable:
        """That of the given rows (N',) int64, which may repeat."""


def _select_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows of a (., N, .) tensor, laid out row by row, as the operators read memories."""
    return tensor.transpose(0, 1).index_select(0, rows).transpose(0, 1)


class EncodedSource(NamedTuple):
    """What N hypotheses attend to; None without attention.

    With ``rows`` all but the context belongs to R sources, and hypotheses of one share it: what
    :meth:`select` gives is the same memory, or part of it. Without, each has its own row.
    """

    memory: Tensor | None  # (S, R, M), or (S, N, M)
    keys: Tensor | None  # the projected memory, (S, R, A) or (S, N, A)
    lengths: Tensor | None  # valid positions, (R,) or (N,)
    context: Tensor | None = None  # (N, C), of a decoder that reads one at every step
    copies: Copies | None = None  # what may be copied, for a model that copies
    rows: Tensor | None = None  # (N,) int64, the source of each hypothesis

    def select(self, rows: Tensor) -> EncodedSource:
        """The given hypotheses (N',), which may repeat."""
        context = None if self.context is None else self.context.index_select(0, rows)
        if self.rows is None:
            return self._sources(rows)._replace(context=context)
        own = self.rows.index_select(0, rows)
        kept = own.unique()
        if self.lengths is None or 2 * len(kept) > len(self.lengths):
            return self._replace(context=context, rows=own)
        # Half of the sources are done: so rarely that all copies together are one of the memory.
        return self._sources(kept)._replace(context=context, rows=torch.searchsorted(kept, own))

    def _sources(self, rows: Tensor) -> EncodedSource:
        return EncodedSource(
            None if self.memory is None else _select_rows(self.memory, rows),
            None if self.keys is None else _select_rows(self.keys, rows),
            None if self.lengths is None else self.lengths.index_select(0, rows),
            None,
            None if self.copies is None else self.copies.select(rows),
        )


class Step(NamedTuple):
    """One step of all hypotheses."""

    #: (N, V), of the next token, in nats; float32 or float64, since searches add them up.
    log_probs: Tensor
    weights: Tensor | None  # (N, S), attention
    state: Any  # Selectable: of the kind that the step was given


class FusedSearch(Protocol):
    """Greedy and beam search in one operator, as :func:`pyseq.functional.generate` does it."""

    def __call__(
        self,
        encoded: EncodedSource,
        state: DecoderState,
        *,
        max_length: int,
        beam_size: int,
        length_penalty: float,
        need_weights: bool,
        min_length: int,
        n_best: int,
        block_ngrams: int | None,
        prefix: Tensor | None,
        coverage_penalty: float = 0.0,
        sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> GenerateOutput:
        """The best sequences of each row of what ``encode_source`` gave, or draws.

        One that does not take the last six arguments is not asked for what they are for.
        """


class SearchModel(Protocol):
    """What the searches need of a model, such as :class:`pyseq.seq2seq.Seq2Seq`.

    What it carries from step to step, ``encoded`` and ``state``, is its own affair as long as
    it is :class:`Selectable`. One that also has a method ``fused_search``, without arguments,
    may return there a :class:`FusedSearch` that does the same as the searches here do with its
    ``step``, or None where it cannot. One that has a method ``search_whole`` is asked by that
    before: of source, lengths, options, a prefix (B, P) or None, and the seed of draws it makes
    tokens, score and weights of ``n_best`` results for each row, as in eval mode, or None where
    all else is to be asked. One that is no torch module may have a method ``in_eval_mode``,
    without arguments, which returns one like it whose modules are in eval mode; of others the
    modules are put into it during a search, which only one thread may do then.
    """

    def modules(self) -> Iterator[torch.nn.Module]:
        """All modules of the model, which are in eval mode during a search."""

    def encode_source(self, source: Tensor, lengths: Tensor) -> tuple[Any, Any]:
        """What to attend to, and the state before the first token, for source (B, S)."""

    def step(self, tokens: Tensor, encoded: Any, state: Any, *, need_weights: bool) -> Step:
        """Read the tokens (N,) and predict the next ones."""
