# SPDX-License-Identifier: Apache-2.0
"""How a decoder attends beside its score, checked, as its operators take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..types import FEEDS, HISTORIES, ORDERS, FeedName, HistoryName, OrderName, attention_parts
from ._common import check_option
from .keys import check_window

_DEFAULT = (1, 0, "none", "luong", "output")


class Attending(NamedTuple):
    """What of the arguments ``decode``, ``generate`` and ``scheduled_inputs`` share."""

    step: Tensor | None  # (B,), steps before this call
    #: The operators' arguments; none where all are their defaults, which cost time to give.
    arguments: tuple[object, ...]


def attending(
    state: object,
    fed: Tensor | None,
    *,
    weight_history: Tensor | None,
    weight_position: Tensor | None,
    weight_position_v: Tensor | None,
    order: OrderName,
    feed: FeedName,
    heads: int,
    window: int | None,
    history: HistoryName | None,
) -> Attending:
    """Check the options, and find in ``state``, of which ``fed`` is the feed, what they need.

    Raises:
        ValueError: an option is unknown, or the state lacks what attention remembers.
    """
    check_option("order", order, ORDERS)
    check_option("feed", feed, FEEDS)
    if history is not None:
        check_option("history", history, HISTORIES)
    check_window(window)
    step, past = attention_parts(state)
    # A local-p window needs no number of the step.
    counts = window is not None and weight_position is None
    if (counts or history is not None) and fed is not None and step is None:
        raise ValueError(
            "state must have a third part (step, weights) with a window or a history, as what a "
            "call returned has; (hidden, None) starts anew; got (hidden, feed) without it"
        )
    others = (weight_history, weight_position, weight_position_v, step, past)
    how = (heads, window or 0, history or "none", order, feed)
    if how == _DEFAULT and all(other is None for other in others):
        return Attending(step, ())
    return Attending(step, (*others, *how))
