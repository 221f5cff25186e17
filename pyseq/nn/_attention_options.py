# SPDX-License-Identifier: Apache-2.0
"""How a decoder attends: the options, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass

from ..types import DEFAULT_HISTORY_SIZE, FEEDS, HISTORIES, ORDERS


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """How a decoder attends, beside its score; see :class:`AttentionDecoder`."""

    attention_size: int | None = None
    max_positions: int | None = None
    order: str = "luong"
    feed: str | None = None
    heads: int = 1
    window: str | None = None
    window_size: int | None = None
    history: str | None = None
    history_size: int | None = None


def check_attention(
    score: str | None,
    *,
    attention_size: int | None,
    max_positions: int | None,
    input_feeding: bool,
    order: str,
    feed: str | None,
    heads: int,
    window: str | None,
    history: str | None,
) -> None:
    """Raise a ValueError unless these options of :class:`AttentionDecoder` are known and go
    together; those of a history are for :func:`check_history`."""
    if score is None:
        for name, scores, value in (
            ("attention_size", "score 'concat'", attention_size),
            ("max_positions", "score 'location'", max_positions),
            ("feed", "a score", feed),
            ("window", "a score", window),
            ("history", "score 'concat'", history),
            ("heads", "a score", None if heads == 1 else heads),
            ("order", "a score", None if order == "luong" else order),
        ):
            if value is not None:
                raise ValueError(f"{name} goes with {scores}, got None")
    for name, value, allowed in (
        ("order", order, ORDERS),
        ("feed", feed, (None, *FEEDS)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    if order == "bahdanau" and (feed == "output" or not input_feeding):
        raise ValueError(
            "order 'bahdanau' feeds the context of the same step, got "
            + (f"feed {feed!r}" if input_feeding else "input_feeding False")
        )
    if feed is not None and not input_feeding:
        raise ValueError(f"feed goes with input_feeding, got {feed!r} without")


def check_history(score: str | None, history: str | None, history_size: int | None) -> int | None:
    """K of the history, or None without one; see :class:`AttentionDecoder`.

    Raises:
        ValueError: the history is unknown, or they do not go together.
    """
    if history not in (None, *HISTORIES):
        raise ValueError(f"history must be one of {(None, *HISTORIES)}, got {history!r}")
    if history is not None and score != "concat":
        raise ValueError(f"history goes with score 'concat', got {history!r} with {score!r}")
    if history_size is not None and history is None:
        raise ValueError(f"history_size goes with a history, got {history_size!r} without one")
    return DEFAULT_HISTORY_SIZE if history is not None and history_size is None else history_size
