# SPDX-License-Identifier: Apache-2.0
"""The weights of attention: those of its scores, and what predicts where a query looks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import init

from .. import functional
from .._checks import check_like, check_positive, check_shape
from .._packed import QuantizedName
from .._pickled import fill_in
from ..types import SCORES, AttendHistoryOutput, AttendOutput, HistoryName, ScoreName
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
