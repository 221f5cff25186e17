# SPDX-License-Identifier: Apache-2.0
"""Keys by which every score is one that the kernels have: dot, or concat."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_like, check_positive, check_shape, check_tensor
from ..types import SCORES, ScoreName
from . import products
from ._common import beside, check_option


def core(score: ScoreName) -> str:
    """The score that is left for the kernels once the keys are projected."""
    return "concat" if score == "concat" else "dot"


def core_keys(
    score: ScoreName,
    keys: Tensor | None,
    memory: Tensor,
    lengths: Tensor | None,
    weight: Tensor | None,
    query_size: int | None,
    heads: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """The keys with which the score is :func:`core`, and the lengths that go with them.

    ``query_size`` is Q, which only a score with a ``weight`` needs to know.
    """
    if score == "location":
        assert weight is not None
        check_shape("weight", weight, "(R, Q)", (-1, query_size or 0))
        return position_keys(weight, memory, lengths)
    assert keys is not None
    if score == "general":
        assert weight is not None
        check_shape("keys", keys, "(S, B, A)", (-1, -1, -1))
        check_shape("weight", weight, "(Q, A)", (query_size or 0, keys.shape[-1]))
        check_like("weight", weight, "keys", keys)
        return project_memory(keys, weight, lengths), lengths
    if score == "scaled_dot":
        return scale_keys(keys, heads), lengths
    return keys, lengths


def check_window(window: int | None) -> None:
    if window is not None:
        check_positive(window=window)


def check_keys(score: ScoreName, keys: Tensor | None) -> None:
    if (keys is None) != (score == "location"):
        raise ValueError(f"keys must be None for score 'location' and no other, got {score!r}")


def check_score(
    score: ScoreName,
    weight: Tensor | None,
    weight_query: Tensor | None,
    weight_v: Tensor | None,
) -> None:
    """Check which weights go with ``score``."""
    check_option("score", score, SCORES)
    if (weight is not None) != (score in ("general", "location")):
        raise ValueError(
            f"weight must be given for score 'general' or 'location' and no other, got {score!r}"
        )
    if (weight_v is not None) != (score == "concat"):
        raise ValueError(f"weight_v must be given for score 'concat' and no other, got {score!r}")
    if weight_query is not None and score != "concat":
        raise ValueError(f"weight_query goes with score 'concat', got {score!r}")


def project_memory(memory: Tensor, weight: Tensor, lengths: Tensor | None) -> Tensor:
    """``W m`` (S, B, A) of every position of ``memory`` (S, B, M), for ``weight`` (A, M).

    Padding is taken for zero. Its keys get no gradient, but in that of the weight this zero
    would meet what the padding holds, which may be NaN.

    Raises:
        RuntimeError: ``lengths`` is not (B,).
    """
    rows = memory.transpose(0, 1)
    lengths = beside("lengths", lengths, memory)
    if lengths is not None:
        check_shape("lengths", lengths, "(B,)", (rows.shape[0],))
        padded = torch.arange(rows.shape[1], device=rows.device) >= lengths.unsqueeze(1)
        rows = rows.masked_fill(padded.unsqueeze(2), 0)
    # (B, S, .) in memory is what the kernels read.
    return products.linear(rows, weight).transpose(0, 1)


def scale_keys(keys: Tensor, heads: int = 1) -> Tensor:
    """``k / sqrt(A / N)`` of every key (S, B, A), with which dot is scaled_dot."""
    check_shape("keys", keys, "(S, B, A)", (-1, -1, -1))
    return keys * (heads / max(keys.shape[-1], 1)) ** 0.5


def position_keys(
    weight: Tensor, memory: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The keys with which dot is location: the row of ``weight`` (R, Q) for each position.

    Returns:
        Keys (S, B, Q), and what :func:`position_limit` makes of the lengths.

    Raises:
        RuntimeError: a tensor has the wrong shape, dtype or device.
    """
    check_shape("memory", memory, "(S, B, M)", (-1, -1, -1))
    check_shape("weight", weight, "(R, Q)", (-1, -1))
    check_like("weight", weight, "memory", memory)
    source, batch, _ = memory.shape
    rows = weight[:source]
    if rows.shape[0] < source:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, source - rows.shape[0]))
    return rows.unsqueeze(1).expand(-1, batch, -1), position_limit(weight, memory, lengths)


def position_limit(weight: Tensor, memory: Tensor, lengths: Tensor | None) -> Tensor | None:
    """The valid positions (B,) of each row of ``memory`` (S, B, M) that have a row of ``weight``
    (R, Q); None for all S."""
    if weight.shape[0] >= memory.shape[0]:
        return lengths
    if lengths is None:
        return torch.full(memory.shape[1:2], weight.shape[0], device=memory.device)
    check_tensor("lengths", lengths)
    # Beyond S they stay what they are, for the operator to refuse.
    return lengths.where(lengths > memory.shape[0], lengths.clamp(max=weight.shape[0]))
