# SPDX-License-Identifier: Apache-2.0
"""Attention over a memory: a score and a window in it as one module."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .._checks import check_positive, check_shape
from .._pickled import fill_in
from ..types import DEFAULT_WINDOW_SIZE, WINDOWS, AttendHistoryOutput, HistoryName
from ._attention_options import check_history
from ._common import Device, changed_options, refuse_script
from .score import Positions, Score


def check_window(window: str | None, window_size: int | None) -> int | None:
    """D of the windows, or None where a query sees everything."""
    if window is not None and window not in WINDOWS:
        raise ValueError(f"window must be one of {', '.join(WINDOWS)} or None, got {window!r}")
    if window_size is None:
        return None if window is None else DEFAULT_WINDOW_SIZE
    if window is None:
        raise ValueError(f"window_size goes with a window, got {window_size!r} without one")
    check_positive(window_size=window_size)
    return window_size


class Attention(torch.nn.Module):
    """Attention: ``a_ts = softmax_s score(q_t, m_s)``, ``context_t = sum_s a_ts m_s``.

    Over all of the memory, or a window in it: the positions within D of ``p_t``, which is t
    for local-m, and for local-p is predicted by :class:`Positions` among those that may have a
    weight, and weighed by a Gaussian of standard deviation D/2 around it. See
    :func:`pyseq.functional.attend`.

    Args:
        query_size: Q.
        memory_size: M; for the scores ``"dot"`` and ``"scaled_dot"`` it must be Q.
        score: ``"dot"``, ``"scaled_dot"``, ``"general"``, ``"concat"`` or ``"location"``; see
            :class:`Score` for its weights.
        attention_size: A, units of the score ``"concat"``. Default: Q.
        heads: N, which divides M and the size of the keys.
        window: ``"local-m"``, ``"local-p"``, or None for all of the memory.
        window_size: D, at least 1 position. Default: 10, with a window.
        max_positions: positions that can have a weight, score ``"location"`` only.
        history: ``"previous"`` or ``"cumulative"``, for queries that are steps in order: past
            weights that enter the score concat, those of the step before or the sum of all. The
            latter with ``history_size=1`` is coverage; both with more are location-sensitive.
        history_size: K, odd: how many neighbours' past weights the score of a position sees.
            Default: 31, with a history.
        batch_first: query, memory, context and weights are (B, T, .) and (B, S, .).
        device, dtype: of the parameters.

    Raises:
        ValueError: an option is unknown, or does not go with another.

    Reference:
        Luong et al. 2015, arXiv 1508.04025, eq. 7 to 10; of the histories see
        :func:`pyseq.functional.attend_history`.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        *,
        score: str = "general",
        attention_size: int | None = None,
        heads: int = 1,
        window: str | None = None,
        window_size: int | None = None,
        max_positions: int | None = None,
        history: str | None = None,
        history_size: int | None = None,
        batch_first: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(query_size=query_size, memory_size=memory_size)
        self.query_size = query_size
        self.memory_size = memory_size
        self.batch_first = batch_first
        self.window = window
        self.window_size = check_window(window, window_size)
        history_size = check_history(score, history, history_size)
        self.history = cast(HistoryName | None, history)
        self.score = Score(
            score,
            query_size,
            memory_size,
            attention_size,
            heads=heads,
            max_positions=max_positions,
            history_size=history_size,
            device=device,
            dtype=dtype,
        )
        self.positions: Positions | None = None
        if window == "local-p":
            self.positions = Positions(query_size, device=device, dtype=dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        fill_in(
            self,
            {
                "window": None,
                "window_size": None,
                "positions": None,
                "history": None,
                "batch_first": False,
            },
        )

    def forward(
        self,
        query: Tensor,
        memory: Tensor,
        lengths: Tensor | None = None,
        need_weights: bool = False,
        *,
        step: Tensor | None = None,
        past: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with every query over the memory of its row.

        Args:
            query: (T, B, Q).
            memory: (S, B, M).
            lengths: (B,) int64, valid positions of each row, on any device. Default: S.
            need_weights: also return the weights.
            step: (B,) int64, how many queries each row had before these, with the window
                local-m only; where steps are asked one by one. Default: none.
            past: (B, N, S), what :meth:`attend_history` returned for the queries before, with a
                history only. Default: zero.

        Returns:
            The context (T, B, M), and the weights (T, B, S), of several heads (T, B, N, S),
            or None.

        Raises:
            ValueError: ``step`` is given without a window, or with predicted positions; or
                ``past`` without a history.
            RuntimeError: a tensor has the wrong shape, dtype or device.
            TypeError: what must be a tensor is none.
        """
        context, weights, _ = self._attend(query, memory, lengths, need_weights, step, past)
        return context, weights

    def attend_history(
        self,
        query: Tensor,
        memory: Tensor,
        lengths: Tensor | None = None,
        need_weights: bool = False,
        *,
        step: Tensor | None = None,
        past: Tensor | None = None,
    ) -> AttendHistoryOutput:
        """What calling the module returns, with a history, and the past weights (B, N, S) from
        which the next call goes on: for queries that come one by one.

        Args, Raises: see :meth:`forward`.
        """
        context, weights, last = self._attend(query, memory, lengths, need_weights, step, past)
        if last is None:
            raise ValueError("attend_history is for attention with a history, got none")
        return AttendHistoryOutput(context, weights, last)

    def _attend(
        self,
        query: Tensor,
        memory: Tensor,
        lengths: Tensor | None,
        need_weights: bool,
        step: Tensor | None,
        past: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Context, weights, and with a history the past after the last query."""
        if self.batch_first:
            check_shape("query", query, "(B, T, Q)", (-1, -1, self.query_size))
            check_shape("memory", memory, "(B, S, M)", (query.shape[0], -1, self.memory_size))
            query, memory = query.transpose(0, 1), memory.transpose(0, 1)
        else:
            check_shape("query", query, "(T, B, Q)", (-1, -1, self.query_size))
            check_shape("memory", memory, "(S, B, M)", (-1, query.shape[1], self.memory_size))
        keys = self.score.project(memory, lengths)
        last: Tensor | None = None
        if self.history is not None:
            context, weights, last = self.score.attend_history(
                query,
                keys,
                memory,
                lengths,
                history=self.history,
                past=past,
                positions=self.positions,
                window_size=self.window_size,
                step=step,
                need_weights=need_weights,
            )
        else:
            if past is not None:
                raise ValueError("past goes with a history, got one without")
            context, weights = self.score.attend(
                query,
                keys,
                memory,
                lengths,
                positions=self.positions,
                window_size=self.window_size,
                step=step,
                need_weights=need_weights,
            )
        if self.batch_first:
            context = context.transpose(0, 1)
            weights = None if weights is None else weights.transpose(0, 1)
        return context, weights, last

    def extra_repr(self) -> str:
        return f"{self.query_size}, {self.memory_size}" + changed_options(
            self, window=None, window_size=None, history=None, batch_first=False
        )
