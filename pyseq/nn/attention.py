# SPDX-License-Identifier: Apache-2.0
"""Attention over a memory: scores, windows, and both as one module."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import init

from .. import functional
from .._checks import check_like, check_positive, check_shape
from .._packed import QuantizedName
from .._pickled import fill_in
from ..types import (
    DEFAULT_WINDOW_SIZE,
    SCORES,
    WINDOWS,
    AttendHistoryOutput,
    AttendOutput,
    HistoryName,
    ScoreName,
)
from ._attention_options import check_history
from ._common import (
    Device,
    changed_options,
    check_not_quantized,
    quantized_repr,
    refuse_script,
)


class Score(torch.nn.Module):
    """The weights of an attention score, and the part of it that needs no query.

    dot ``q . m``; scaled_dot ``q . m / sqrt(M / N)``; general ``q . (W m)``; concat
    ``v . tanh(W_q q + W_m m)``; location ``(W q)_s`` for position s. Each of N heads has its own
    share of the components of query and key, and so of the rows of W (general), W_q, W_m, v.

    Args:
        score: ``"dot"``, ``"scaled_dot"``, ``"general"``, ``"concat"`` or ``"location"``.
        query_size: Q.
        memory_size: M; for dot and scaled_dot it must be Q.
        attention_size: A, concat only. Default: Q.
        heads: N, which divides M and the size of the keys: A for concat, otherwise Q.
        max_positions: R, location only, which needs it: positions that can have a weight.
        history_size: K, odd, concat only: how many neighbours' past weights enter the score of a
            position. Default: none.
        device, dtype: of the parameters.

    Attributes:
        weight: general (Q, M), location (R, Q), else None.
        weight_query, weight_memory, weight_v: (A, Q), (A, M) and (A,), concat only.
        weight_history: (A, K), with ``history_size`` only.
        fused: the score that is left for the operators on projected keys.

    Raises:
        ValueError: the score is unknown, or a size does not go with it.

    Reference:
        Luong et al. 2015, arXiv 1508.04025, eq. 7 and 8; concat with separate matrices for query
        and memory is Bahdanau et al. 2015, arXiv 1409.0473; Vaswani et al. 2017,
        arXiv 1706.03762, eq. 1 (scaled dot) and section 3.2.2 (heads).
    """

    weight: Tensor | None
    weight_query: Tensor | None
    weight_memory: Tensor | None
    weight_v: Tensor | None
    weight_history: Tensor | None

    #: What :func:`pyseq.quantize` has made of ``weight_query``, of a decoder's score.
    _quantized: QuantizedName | None = None

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        score: str,
        query_size: int,
        memory_size: int,
        attention_size: int | None = None,
        *,
        heads: int = 1,
        max_positions: int | None = None,
        history_size: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        if score in ("dot", "scaled_dot") and query_size != memory_size:
            raise ValueError(
                f"score {score!r} needs the query as long as the memory is wide, "
                f"got query size {query_size} and memory_size {memory_size}"
            )
        if attention_size is None:
            attention_size = query_size
        elif score != "concat":
            raise ValueError(f"attention_size goes with score 'concat', got {score!r}")
        check_positive(attention_size=attention_size, heads=heads)
        for name, size in (("the size of the keys", attention_size), ("memory_size", memory_size)):
            if size % heads:
                raise ValueError(f"heads must divide {name}, {size}, got {heads}")
        if (max_positions is not None) != (score == "location"):
            raise ValueError(
                "max_positions must be given for score 'location' and no other, "
                f"got {max_positions!r} for {score!r}"
            )
        if history_size is not None:
            check_positive(history_size=history_size)
            if score != "concat" or history_size % 2 == 0:
                raise ValueError(
                    "history_size must be odd and goes with score 'concat', "
                    f"got {history_size} and {score!r}"
                )
        self.name = score
        self.heads = heads
        self.fused: ScoreName = "concat" if score == "concat" else "dot"
        shapes: dict[str, tuple[int, ...]] = {}
        if score == "general":
            shapes = {"weight": (query_size, memory_size)}
        elif score == "location":
            check_positive(max_positions=max_positions)
            shapes = {"weight": (max_positions or 0, query_size)}
        elif score == "concat":
            shapes = {
                "weight_query": (attention_size, query_size),
                "weight_memory": (attention_size, memory_size),
                "weight_v": (attention_size,),
            }
            if history_size is not None:
                shapes["weight_history"] = (attention_size, history_size)
        for name in ("weight", "weight_query", "weight_memory", "weight_v", "weight_history"):
            parameter = None
            if name in shapes:
                parameter = torch.nn.Parameter(
                    torch.empty(shapes[name], device=device, dtype=dtype)
                )
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        fill_in(self, {"heads": 1, "weight_history": None})

    def reset_parameters(self) -> None:
        """Draw every weight uniformly within 1/sqrt of the size that it sums over."""
        check_not_quantized(self)
        for weight in self.parameters():
            bound = 1 / math.sqrt(weight.shape[-1])
            init.uniform_(weight, -bound, bound)

    def project(self, memory: Tensor, lengths: Tensor | None = None) -> Tensor:
        """:meth:`forward`, called with its hooks: those that make weights (pruning, the older
        weight norm) have made them before a decoder reads any."""
        keys: Tensor = self(memory, lengths)
        return keys

    def forward(self, memory: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The keys (S, B, A) of ``memory`` (S, B, M): ``W m``, ``W_m m``, ``m / sqrt(M / N)``,
        the memory itself, or for location the rows of W.

        Args:
            memory: (S, B, M).
            lengths: (B,) int64, valid positions of each row. Left out, the padding must be
                finite, or the gradient of the weight is not.

        Raises:
            RuntimeError: a tensor has the wrong shape, dtype or device.
        """
        if self.name == "location":
            assert self.weight is not None
            return functional.position_keys(self.weight, memory, lengths)[0]
        if self.name == "scaled_dot":
            return functional.scale_keys(memory, self.heads)
        weight = self.weight if self.weight_memory is None else self.weight_memory
        if weight is None:
            return memory
        check_shape("memory", memory, "(S, B, M)", (-1, -1, weight.shape[1]))
        check_like("memory", memory, "the score's weight", weight)
        return functional.project_memory(memory, weight, lengths)

    def limit(self, memory: Tensor, lengths: Tensor | None) -> Tensor | None:
        """How many positions of each row (B,) may have a weight: ``lengths``, but for location
        at most R. It is the S of local-p, too."""
        if self.name != "location":
            return lengths
        assert self.weight is not None
        return functional.position_limit(self.weight, memory, lengths)

    def attend(
        self,
        query: Tensor,
        keys: Tensor | None,
        memory: Tensor,
        lengths: Tensor | None,
        *,
        positions: Positions | None,
        window_size: int | None,
        step: Tensor | None,
        need_weights: bool,
    ) -> AttendOutput:
        """:func:`pyseq.functional.attend` with this score.

        Args:
            query: (T, B, Q).
            keys: what :meth:`project` made of ``memory`` (S, B, M).
            positions: what predicts the centre of local-p's windows, if those are asked for.
            lengths, step, need_weights: as there.
            window_size: the ``window`` there.
        """
        limit = self.limit(memory, lengths)
        centres = None if positions is None else positions(query, memory.shape[0], limit)
        return functional.attend(
            query,
            keys,
            memory,
            limit,
            score=self.fused,
            weight_query=self.weight_query,
            weight_v=self.weight_v,
            heads=self.heads,
            window=window_size,
            positions=centres,
            step=step,
            need_weights=need_weights,
        )

    def attend_history(
        self,
        query: Tensor,
        keys: Tensor,
        memory: Tensor,
        lengths: Tensor | None,
        *,
        history: HistoryName,
        past: Tensor | None,
        positions: Positions | None,
        window_size: int | None,
        step: Tensor | None,
        need_weights: bool,
    ) -> AttendHistoryOutput:
        """:func:`pyseq.functional.attend_history` with this score, which is concat and has a
        ``history_size``.

        Args:
            history, past: as there.
            query, keys, memory, lengths, positions, window_size, step, need_weights: as those of
                :meth:`attend`.
        """
        assert self.weight_v is not None
        assert self.weight_history is not None
        return functional.attend_history(
            query,
            keys,
            memory,
            lengths,
            weight_v=self.weight_v,
            weight_history=self.weight_history,
            weight_query=self.weight_query,
            history=history,
            past=past,
            heads=self.heads,
            window=window_size,
            positions=None if positions is None else positions(query, memory.shape[0], lengths),
            step=step,
            need_weights=need_weights,
        )

    def extra_repr(self) -> str:
        text = self.name + changed_options(self, heads=1)
        if self.weight_v is not None:
            text += f", attention_size={len(self.weight_v)}"
        if self.weight_history is not None:
            text += f", history_size={self.weight_history.shape[1]}"
        if self.name == "location" and self.weight is not None:
            text += f", max_positions={len(self.weight)}"
        return text + quantized_repr(self)


class Positions(torch.nn.Module):
    """Where in the source each query looks: ``p_t = S sigmoid(v . tanh(W q_t))``.

    Args:
        query_size: Q.
        device, dtype: of the parameters.

    Attributes:
        weight, weight_v: ``W`` (Q, Q) and ``v`` (Q,).

    Reference:
        Luong et al. 2015, arXiv 1508.04025, eq. 9.
    """

    def __init__(
        self, query_size: int, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        weight = torch.empty((query_size, query_size), device=device, dtype=dtype)
        self.weight = torch.nn.Parameter(weight)
        self.weight_v = torch.nn.Parameter(torch.empty(query_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both weights uniformly within 1/sqrt(Q)."""
        bound = 1 / math.sqrt(len(self.weight_v))
        for weight in self.parameters():
            init.uniform_(weight, -bound, bound)

    def forward(self, query: Tensor, source: int, lengths: Tensor | None = None) -> Tensor:
        """The positions (T, B) of ``query`` (T, B, Q) in rows of ``source`` positions, or of
        ``lengths`` (B,); see :func:`pyseq.functional.predict_positions`."""
        return functional.predict_positions(query, self.weight, self.weight_v, source, lengths)

    def extra_repr(self) -> str:
        return str(len(self.weight_v))


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
