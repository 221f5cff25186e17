# SPDX-License-Identifier: Apache-2.0
"""Several models that are searched as one."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import kind
from .evaluation import in_eval_mode
from .protocols import SearchModel, Selectable, Step
from .rules import widened


class _Parts(NamedTuple):
    """What each model of an ensemble carries along."""

    parts: tuple[Selectable, ...]

    def select(self, rows: Tensor) -> _Parts:
        return _Parts(tuple(part.select(rows) for part in self.parts))


class Ensemble:
    """Several models that predict together: ``p(y) = sum_i w_i p_i(y)``.

    All searches take it like a model. Attention weights are averaged likewise, if every model
    has them.

    Args:
        models: at least one, all with the same token ids on both sides.
        weights: how much each model counts, above 0; they are divided by their sum. Default:
            all the same.

    Raises:
        ValueError: there is no model, or the weights do not go with the models.
        TypeError: one of the models has no such methods as :class:`SearchModel` describes.
    """

    def __init__(
        self, models: Sequence[SearchModel], *, weights: Sequence[float] | None = None
    ) -> None:
        if not isinstance(models, Iterable):
            raise TypeError(f"models must be a sequence of models, got {kind(models)}")
        self.models = tuple(models)
        if not self.models:
            raise ValueError("models must hold at least one model, got none")
        for model in self.models:
            for name in ("modules", "encode_source", "step"):
                if not callable(getattr(model, name, None)):
                    raise TypeError(
                        f"models must have modules, encode_source and step, got {kind(model)} "
                        f"without {name}"
                    )
        shares = [1.0] * len(self.models) if weights is None else [float(w) for w in weights]
        if len(shares) != len(self.models) or not all(0 < w < math.inf for w in shares):
            raise ValueError(
                f"weights must be {len(self.models)} positive numbers, one for each model, "
                f"got {weights!r}"
            )
        total = math.fsum(share / max(shares) for share in shares)  # no sum of them overflows
        self.weights = tuple(share / max(shares) / total for share in shares)
        if not all(self.weights):
            raise ValueError(
                f"weights must be so near one another that none is 0 of their sum, got {weights!r}"
            )

    def modules(self) -> Iterator[torch.nn.Module]:
        """All modules of all models."""
        return chain.from_iterable(model.modules() for model in self.models)

    def in_eval_mode(self) -> Ensemble:
        """The same of the models in eval mode; see :class:`SearchModel`."""
        result = copy.copy(self)
        result.models = tuple(map(in_eval_mode, self.models))
        return result

    def encode_source(self, source: Tensor, lengths: Tensor) -> tuple[_Parts, _Parts]:
        """What each model attends to, and their states; see :class:`SearchModel`."""
        encoded, states = zip(
            *(model.encode_source(source, lengths) for model in self.models), strict=True
        )
        return _Parts(encoded), _Parts(states)

    def step(self, tokens: Tensor, encoded: _Parts, state: _Parts, *, need_weights: bool) -> Step:
        """One step of every model; see :class:`SearchModel`.

        Raises:
            ValueError: the models have different numbers of target tokens.
        """
        steps = [
            model.step(tokens, *parts, need_weights=need_weights)
            for model, *parts in zip(self.models, encoded.parts, state.parts, strict=True)
        ]
        sizes = [step.log_probs.shape[1] for step in steps]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"the models of an ensemble must have the same target tokens, got {sizes} of them"
            )
        terms = [
            widened(step.log_probs) + math.log(share)
            for step, share in zip(steps, self.weights, strict=True)
        ]
        found = [step.weights for step in steps if step.weights is not None]
        attention = None
        if len(found) == len(steps):
            attention = sum(
                (share * each for share, each in zip(self.weights, found, strict=True)),
                torch.zeros_like(found[0]),
            )
        return Step(
            torch.logsumexp(torch.stack(terms), 0),
            attention,
            _Parts(tuple(step.state for step in steps)),
        )
