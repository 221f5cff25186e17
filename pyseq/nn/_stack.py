# SPDX-License-Identifier: Apache-2.0
"""Stacked layers as a chain of scans, with what a call does to them besides running them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import functional
from .._dropout import apply_dropout, bernoulli_mask
from ..reference import without_padding
from ..types import (
    SCAN_GATES,
    CellName,
    LayerNormWeights,
    ScanExtras,
    ScanStates,
    join_parts,
    state_parts,
)

#: w_ih, w_hh, b_ih, b_hh, w_hr and w_ch of one layer and direction, as functional.scan takes them.
ScanWeights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Regularization(NamedTuple):
    """What a call does to stacked layers besides running them; see :class:`RNN`. Probabilities
    of dropout are those of this call: 0 in evaluation."""

    training: bool = False
    residual: bool = False
    variational_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    reset_parts: tuple[Tensor, ...] = ()  # (L*D, .) each, or () to reset to zero
    layer_norms: tuple[LayerNormWeights, ...] = ()  # of each layer and direction, or none

    def weights(self, own: ScanWeights) -> ScanWeights:
        """Those of one layer and direction, as this call sees them."""
        if self.weight_dropout == 0:
            return own
        w_ih, w_hh, *_ = own
        return w_ih, apply_dropout(w_hh, self.weight_dropout), own[2], own[3], own[4], own[5]

    @property
    def leaves_scans_alone(self) -> bool:
        acts = (self.recurrent_dropout, self.zoneout_h, self.zoneout_c)
        return not (any(acts) or self.reset_parts or self.layer_norms)

    def extras(self, x: Tensor, own: ScanWeights, cell: CellName, index: int) -> ScanExtras:
        """For the layer and direction of that index, whose input is ``x`` (T, B, I)."""
        if self.leaves_scans_alone:
            return ScanExtras()
        w_hh, w_hr = own[1], own[4]
        steps, batch, _ = x.shape
        hidden = w_hh.shape[0] // SCAN_GATES[cell]
        width = hidden if w_hr is None else w_hr.shape[0]
        # Under autocast x may be of a type in which 1 / (1 - p) is inexact.
        like = w_hh if w_hh.is_floating_point() else x

        def share(probability: float, size: int) -> Tensor | None:
            if probability == 0:
                return None
            if self.training:
                return bernoulli_mask((steps, batch, size), probability, like)
            return like.new_full((1, 1, size), probability)

        mask = None
        if self.recurrent_dropout > 0:
            mask = apply_dropout(like.new_ones(batch, width), self.recurrent_dropout)
        parts = tuple(part[index] for part in self.reset_parts)
        return ScanExtras(
            mask,
            share(self.zoneout_h, width),
            share(self.zoneout_c, hidden),
            join_parts(parts) if parts else None,
            self.layer_norms[index] if self.layer_norms else None,
        )


_PLAIN = Regularization()


def scan_layers(
    x: Tensor,
    weights: Sequence[ScanWeights],
    parts: tuple[Tensor, ...],
    *,
    cell: CellName,
    directions: int = 1,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    dropout: float = 0.0,
    dropout_masks: Tensor | None = None,
    keep_every: int = 1,
    regularization: Regularization = _PLAIN,
    return_states: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Stacked layers, one scan for each layer and direction.

    Args:
        x: (T, B, I).
        weights: those of each layer, and in it of each direction.
        parts: the initial state, ``()`` for zero, else h (L*D, B, P) and for LSTM c.
        cell, lengths, resets, keep_every, return_states: as in ``functional.scan``.
        directions: D, 1 or 2.
        dropout: probability of zeroing an output of a layer that is not the last one.
        dropout_masks: (L-1, T, B, D*P), what to multiply such outputs with, in its place.
        regularization: what else to do to them.

    Returns:
        The output (T, B, D*P) of the last layer, the last state in parts, and the states after
        every step in parts (L*D, T, B, .), ``()`` unless they are wanted.
    """
    states: list[tuple[Tensor, ...]] = []
    all_steps: list[tuple[Tensor, ...]] = []
    for first in range(0, len(weights), directions):
        below = x
        if first > 0 and dropout_masks is not None:
            x = x * dropout_masks[first // directions - 1]
        elif first > 0 and dropout > 0:
            x = apply_dropout(x, dropout)
        if regularization.variational_dropout > 0:
            shape = x.shape[1:]
            x = x * apply_dropout(x.new_ones(shape), regularization.variational_dropout)
        own = slice(first, first + directions)
        x, last, steps = _scan_layer(
            x,
            [regularization.weights(each) for each in weights[own]],
            tuple(part[own] for part in parts),
            cell=cell,
            lengths=lengths,
            resets=resets,
            keep_every=keep_every,
            return_states=return_states,
            regularization=regularization,
            first=first,
        )
        if regularization.residual and below.shape[-1] == x.shape[-1]:
            # Padding above the first layer is zero already.
            x = x + (below if states else without_padding(below, lengths))
        states.append(last)
        all_steps.append(steps)
    if len(states) == 1:
        return x, states[0], all_steps[0]
    return x, join_layers(torch.cat, states), join_layers(torch.cat, all_steps)


def join_layers(
    join: Callable[[list[Tensor]], Tensor], states: list[tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """States in parts, each part of all layers or directions as one tensor."""
    return tuple(join(list(part)) for part in zip(*states, strict=True))


def _scan_layer(
    x: Tensor,
    weights: Sequence[ScanWeights],
    parts: tuple[Tensor, ...],
    *,
    cell: CellName,
    lengths: Tensor | None,
    resets: Tensor | None,
    keep_every: int,
    return_states: bool,
    regularization: Regularization,
    first: int,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """One layer of :func:`scan_layers`, whose states are (D, B, P); ``first`` counts the layers
    and directions before it."""
    # A trace knows no list with None in it.
    together = len(weights) == 2 and not return_states and not torch.jit.is_tracing()
    if together and not torch.is_grad_enabled():
        extras = None
        if not regularization.leaves_scans_alone:
            extras = (
                regularization.extras(x, weights[0], cell, first),
                regularization.extras(x, weights[1], cell, first + 1),
            )
        output, last = functional.scan_both(
            x,
            weights[0],
            weights[1],
            join_parts(parts) if parts else None,
            cell=cell,
            lengths=lengths,
            resets=resets,
            extras=extras,
        )
        return output, state_parts(cell, last), ()
    outputs: list[Tensor] = []
    states: list[tuple[Tensor, ...]] = []
    all_steps: list[tuple[Tensor, ...]] = []
    for direction, own in enumerate(weights):
        more = regularization.extras(x, own, cell, first + direction)
        result = functional.scan(
            x,
            *own[:5],
            join_parts(tuple(part[direction] for part in parts)) if parts else None,
            cell=cell,
            lengths=lengths,
            resets=resets,
            reverse=direction == 1,
            keep_every=keep_every,
            return_states=return_states,
            w_ch=own[5],
            h_mask=more.h_mask,
            zoneout_h=more.zoneout_h,
            zoneout_c=more.zoneout_c,
            reset_state=more.reset_state,
            layer_norm=more.layer_norm,
        )
        outputs.append(result.output)
        states.append(state_parts(cell, result.state))
        all_steps.append(state_parts(cell, result.states) if isinstance(result, ScanStates) else ())
    if len(outputs) == 1:
        # The same as stacking, without a copy.
        ends, steps = (tuple(p.unsqueeze(0) for p in each[0]) for each in (states, all_steps))
        return outputs[0], ends, steps
    output = torch.cat(outputs, -1)
    return output, join_layers(torch.stack, states), join_layers(torch.stack, all_steps)
