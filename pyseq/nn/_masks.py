# SPDX-License-Identifier: Apache-2.0
"""What one pass over a sequence drops in stacked layers: drawn all at once, used once or more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import autocasts
from .._dropout import apply_dropout, bernoulli_mask


class DirectionMasks(NamedTuple):
    """Those of one layer and direction; None where nothing is dropped."""

    weight: Tensor | None = None  # the shape of w_hh, which it multiplies
    h: Tensor | None = None  # (B, P), what w_hh multiplies is multiplied with it
    zoneout_h: Tensor | None = None  # (T, B, P), ones where h keeps its old value
    zoneout_c: Tensor | None = None  # (T, B, H)


class LayerMasks(NamedTuple):
    """Those of one layer."""

    steps: Tensor | None  # (T, B, I), what its input is multiplied with
    rows: Tensor | None  # (B, I), likewise, the same at all steps
    directions: tuple[DirectionMasks, ...]


class DrawnMasks(NamedTuple):
    """What :meth:`pyseq.nn.LSTM.draw_masks` gives: the masks of all layers, for calls that are to
    drop the same."""

    steps: int  # T
    batch: int  # B
    layers: tuple[LayerMasks, ...]

    def of_steps(self, start: int, stop: int) -> DrawnMasks:
        """Those of the steps from ``start`` to before ``stop``.

        Raises:
            ValueError: these are not steps of theirs.
        """
        if not 0 <= start <= stop <= self.steps:
            raise ValueError(
                f"steps must be from 0 to {self.steps}, which masks were drawn for, got {start} "
                f"to {stop}"
            )

        def part(mask: Tensor | None) -> Tensor | None:
            return None if mask is None else mask[start:stop]

        layers = (
            LayerMasks(
                part(layer.steps),
                layer.rows,
                tuple(
                    each._replace(zoneout_h=part(each.zoneout_h), zoneout_c=part(each.zoneout_c))
                    for each in layer.directions
                ),
            )
            for layer in self.layers
        )
        return DrawnMasks(stop - start, self.batch, tuple(layers))


class Probabilities(NamedTuple):
    """Of dropping something in a call; 0 in evaluation."""

    dropout: float = 0.0
    variational_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0


def draw_masks(
    probabilities: Probabilities,
    weights: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    directions: int,
    steps: int,
    batch: int,
    gates: int,
) -> DrawnMasks | None:
    """Drawn one number after the other from torch's generator; None if nothing is dropped.

    Args:
        probabilities: of the call.
        weights: w_ih, w_hh and w_hr of each layer, and in it of each direction.
        directions: D.
        steps, batch: T and B.
        gates: G.
    """
    if not any(probabilities):
        return None
    like = weights[0][1]
    # Under autocast outputs are float32, and 1 / (1 - p) is inexact in what the weights may be.
    dtype = torch.float32 if autocasts(like.device) else like.dtype

    def kept(probability: float, *shape: int) -> Tensor | None:
        if probability == 0:
            return None
        return apply_dropout(like.new_ones(shape, dtype=dtype), probability)

    def ones(probability: float, size: int) -> Tensor | None:
        if probability == 0:
            return None
        return bernoulli_mask((steps, batch, size), probability, like.new_empty(0, dtype=dtype))

    layers = []
    for first in range(0, len(weights), directions):
        own = weights[first : first + directions]
        inputs = own[0][0].shape[1]
        dropped = kept(probabilities.dropout if first > 0 else 0.0, steps, batch, inputs)
        rows = kept(probabilities.variational_dropout, batch, inputs)
        of_weights = [kept(probabilities.weight_dropout, *w_hh.shape) for _, w_hh, _ in own]
        masks = []
        for (_, w_hh, w_hr), of_weight in zip(own, of_weights, strict=True):
            hidden = w_hh.shape[0] // gates
            width = hidden if w_hr is None else w_hr.shape[0]
            masks.append(
                DirectionMasks(
                    of_weight,
                    kept(probabilities.recurrent_dropout, batch, width),
                    ones(probabilities.zoneout_h, width),
                    ones(probabilities.zoneout_c, hidden),
                )
            )
        layers.append(LayerMasks(dropped, rows, tuple(masks)))
    return DrawnMasks(steps, batch, tuple(layers))


def dropout_alone(masks: Tensor) -> DrawnMasks:
    """Masks (L-1, T, B, H) of the inputs of all layers but the first, in one direction."""
    none = (DirectionMasks(),)
    layers = (LayerMasks(None, None, none), *(LayerMasks(mask, None, none) for mask in masks))
    return DrawnMasks(masks.shape[1], masks.shape[2], layers)
