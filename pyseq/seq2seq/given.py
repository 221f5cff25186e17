# SPDX-License-Identifier: Apache-2.0
"""A model together with what it is told of some sources, as the searches take it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..extra import Conditions, check_extra
from ..search import EncodedSource, FusedSearch, Step
from ..search.evaluation import in_eval_mode
from ..types import DecoderState

if TYPE_CHECKING:
    from .model import Seq2Seq

__all__ = ["Given"]


class _GivenSource(NamedTuple):
    """What a search carries along of the sources and of the target's extra information."""

    source: EncodedSource
    extra: Tensor  # (N, Z), or (T, N, Z)

    def select(self, rows: Tensor) -> _GivenSource:
        """The given rows (N'), which may repeat."""
        return _GivenSource(self.source.select(rows), self.extra.index_select(-2, rows))


class _GivenState(NamedTuple):
    """The state of the decoder, and how many steps it has made."""

    decoder: DecoderState
    steps: int

    def select(self, rows: Tensor) -> _GivenState:
        """The given rows (N'), which may repeat."""
        return _GivenState(self.decoder.select(rows), self.steps)


class Given:
    """A model with the extra information of some sources, and what may be copied of them; what
    :meth:`Seq2Seq.given` returns."""

    def __init__(
        self,
        model: Seq2Seq,
        source_extra: Tensor | None,
        target_extra: Tensor | None,
        copies: Tensor | None = None,
    ) -> None:
        self.model = model
        self.copies = copies
        self.source_extra = source_extra
        self.target_extra = target_extra

    def modules(self) -> Iterator[torch.nn.Module]:
        """All modules of the model."""
        return self.model.modules()

    def in_eval_mode(self) -> Given:
        """The same of the model in eval mode; see :class:`pyseq.search.SearchModel`."""
        result = copy.copy(self)
        result.model = in_eval_mode(self.model)
        return result

    def encode_source(
        self, source: Tensor, lengths: Tensor
    ) -> tuple[EncodedSource | _GivenSource, DecoderState | _GivenState]:
        """What a search begins with; see :class:`pyseq.search.SearchModel`.

        Raises:
            RuntimeError: the extra information has not one row for each source, or is not what
                the model takes.
        """
        encoded, state = self.model.encode_source(source, lengths, self.source_extra, self.copies)
        extra = self.target_extra
        steps = -1 if extra is None or extra.dim() == 2 else len(extra)
        check_extra(
            "target_extra", self.model.decoder.extra, extra, rows=source.shape[0], steps=steps
        )
        if extra is None:
            return encoded, state
        return _GivenSource(encoded, extra), _GivenState(state, 0)

    def step(self, tokens: Tensor, encoded: Any, state: Any, *, need_weights: bool) -> Step:
        """One step of N hypotheses; see :class:`pyseq.search.SearchModel`.

        Raises:
            RuntimeError: the extra information has fewer steps than the search.
        """
        if not isinstance(encoded, _GivenSource):
            return self.model.step(tokens, encoded, state, need_weights=need_weights)
        if encoded.extra.dim() == 3 and state.steps >= len(encoded.extra):
            raise RuntimeError(
                f"target_extra must have at least as many steps as the search, {state.steps + 1}, "
                f"got {len(encoded.extra)}"
            )
        extra = Conditions(extra=encoded.extra).step(state.steps).extra
        step = self.model.step(
            tokens, encoded.source, state.decoder, need_weights=need_weights, target_extra=extra
        )
        return step._replace(state=_GivenState(step.state, state.steps + 1))

    def fused_search(self) -> FusedSearch | None:
        """As that of the model, which has none if the target takes extra information."""
        return self.model.fused_search()
