# SPDX-License-Identifier: Apache-2.0
"""The searches of ``search`` as methods of a model, with what it is told of the sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from .. import search
from .._checks import check_tensor
from ..search import Hypothesis, SearchModel, SearchOptions, StreamedToken
from ..search.options import check_kind
from .given import Given

if TYPE_CHECKING:
    from .model import Seq2Seq


class Searched(torch.nn.Module):
    """What :class:`Seq2Seq` is searched by; it has the ``encode_source`` and ``step`` of this."""

    def generate(
        self,
        source: Tensor,
        source_lengths: Tensor,
        *,
        max_length: int,
        beam_size: int = 1,
        length_penalty: float = 0.0,
        source_extra: Tensor | None = None,
        target_extra: Tensor | None = None,
        copies: Tensor | None = None,
    ) -> list[Hypothesis]:
        """The best target sequence that search finds for each source.

        The short form of :meth:`search`, which has more options and gives more hypotheses.

        Args:
            source, source_lengths: as in :meth:`Seq2Seq.forward`.
            max_length: the most tokens to emit, ``<stop>`` included.
            beam_size: hypotheses to follow; 1 is greedy search.
            length_penalty: as in :func:`pyseq.search.beam`.
            source_extra, target_extra, copies: as in :meth:`Seq2Seq.forward`; of each step, there
                must be at least max_length of them for the target.

        Returns:
            One :class:`pyseq.search.Hypothesis` per row, with tokens (no ``<start>``, no
            ``<stop>``), score (nats) and attention weights (len(tokens), S of the row),
            None without attention. Dropout is off, whatever the mode.

        Raises:
            ValueError: an option is out of its range.
            RuntimeError: the logits are not finite.
        """
        options = SearchOptions(
            max_length=max_length, beam_size=beam_size, length_penalty=length_penalty
        )
        model = self._given(source_extra, target_extra, copies, options.max_length)
        return [best[0] for best in search.search(model, source, source_lengths, options)]

    def search(
        self,
        source: Tensor,
        source_lengths: Tensor,
        options: SearchOptions,
        *,
        generator: torch.Generator | None = None,
        source_extra: Tensor | None = None,
        target_extra: Tensor | None = None,
        copies: Tensor | None = None,
    ) -> list[list[Hypothesis]]:
        """The target sequences that a search with these options finds for each source.

        Args, Returns, Raises: see :func:`pyseq.search.search`, and for the extra information
            and copies :meth:`generate`.
        """
        check_kind(options)
        model = self._given(source_extra, target_extra, copies, options.max_length)
        return search.search(model, source, source_lengths, options, generator=generator)

    def stream(
        self,
        source: Tensor,
        source_lengths: Tensor,
        options: SearchOptions,
        *,
        generator: torch.Generator | None = None,
        source_extra: Tensor | None = None,
        target_extra: Tensor | None = None,
        copies: Tensor | None = None,
    ) -> Iterator[StreamedToken]:
        """The tokens of greedy search or sampling one by one, as they are found.

        Args, Returns, Raises: see :func:`pyseq.search.stream`, and for the extra information
            and copies :meth:`generate`.
        """
        check_kind(options)
        model = self._given(source_extra, target_extra, copies, options.max_length)
        return search.stream(model, source, source_lengths, options, generator=generator)

    def given(
        self,
        *,
        source_extra: Tensor | None = None,
        target_extra: Tensor | None = None,
        copies: Tensor | None = None,
    ) -> Given:
        """This model with the extra information of some sources, and what may be copied of
        them, as :mod:`pyseq.search` and :class:`pyseq.Ensemble` take it.

        Args:
            source_extra, target_extra, copies: as in :meth:`Seq2Seq.forward`, for the sources to be
                searched.
        """
        return Given(cast("Seq2Seq", self), source_extra, target_extra, copies)

    def _given(
        self,
        source_extra: Tensor | None,
        target_extra: Tensor | None,
        copies: Tensor | None,
        max_length: int,
    ) -> SearchModel:
        if target_extra is not None:
            check_tensor("target_extra", target_extra)
            if target_extra.dim() == 3 and len(target_extra) < max_length:
                raise RuntimeError(
                    f"target_extra must have at least max_length = {max_length} steps, got "
                    f"{len(target_extra)}"
                )
        if source_extra is target_extra is copies is None:
            return cast("Seq2Seq", self)
        return self.given(source_extra=source_extra, target_extra=target_extra, copies=copies)
