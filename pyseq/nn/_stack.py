# SPDX-License-Identifier: Apache-2.0
"""Stacked layers as a chain of scans, with what a call does to them besides running them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import functional
from .._packed import computing_dtype
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
from ._masks import DirectionMasks, DrawnMasks

#: w_ih, w_hh, b_ih, b_hh, w_hr and w_ch of one layer and direction, as functional.scan takes them.
ScanWeights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Regularization(NamedTuple):
    """What a call does to stacked layers besides running and dropping; see :class:`RNN`."""

    residual: bool = False
    zoneout_h: float = 0.0  # what the old value has of the new one, where no masks are drawn
    zoneout_c: float = 0.0
    reset_parts: tuple[Tensor, ...] = ()  # (L*D, .) each, or () to reset to zero
    layer_norms: tuple[LayerNormWeights, ...] = ()  # of each layer and direction, or none

    def extras(
        self, own: ScanWeights, cell: CellName, index: int, masks: DirectionMasks
    ) -> ScanExtras | None:
        """For the layer and direction of that index; None if a scan is all that there is."""
        shares = self.zoneout_h or self.zoneout_c
        drops = not masks.h is masks.zoneout_h is masks.zoneout_c is None
        if not (shares or drops or self.reset_parts or self.layer_norms):
            return None
        w_hh, w_hr = own[1], own[4]
        hidden = w_hh.shape[0] // SCAN_GATES[cell]
        width = hidden if w_hr is None else w_hr.shape[0]
        dtype = computing_dtype(w_hh)

        def share(probability: float, size: int) -> Tensor | None:
            if probability == 0:
                return None
            return torch.full((1, 1, size), probability, dtype=dtype, device=w_hh.device)

        parts = tuple(part[index] for part in self.reset_parts)
        return ScanExtras(
            masks.h,
            share(self.zoneout_h, width) if masks.zoneout_h is None else masks.zoneout_h,
            share(self.zoneout_c, hidden) if masks.zoneout_c is None else masks.zoneout_c,
            join_parts(parts) if parts else None,
            self.layer_norms[index] if self.layer_norms else None,
        )


_PLAIN = Regularization()
_NO_EXTRAS = ScanExtras()
_NO_MASKS = (DirectionMasks(),)


def scan_layers(
    x: Tensor,
    weights: Sequence[ScanWeights],
    parts: tuple[Tensor, ...],
    *,
    cell: CellName,
    directions: int = 1,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    masks: DrawnMasks | None = None,
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
        masks: what to drop. Default: nothing.
        regularization: what else to do to them.

    Returns:
        The output (T, B, D*P) of the last layer, the last state in parts, and the states after
        every step in parts (L*D, T, B, .), ``()`` unless they are wanted.
    """
    states: list[tuple[Tensor, ...]] = []
    all_steps: list[tuple[Tensor, ...]] = []
    for first in range(0, len(weights), directions):
        below = x
        dropped = None if masks is None else masks.layers[first // directions]
        if dropped is not None:
            x = x if dropped.steps is None else x * dropped.steps
            x = x if dropped.rows is None else x * dropped.rows
        own = slice(first, first + directions)
        x, last, steps = _scan_layer(
            x,
            weights[own],
            tuple(part[own] for part in parts),
            cell=cell,
            lengths=lengths,
            resets=resets,
            keep_every=keep_every,
            return_states=return_states,
            masks=_NO_MASKS * directions if dropped is None else dropped.directions,
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


def runs_both(x: Tensor, keep_every: int) -> bool:
    """Whether the two directions of a layer are better one operator, which keeps every step: on
    the CPU it is no faster than all threads for each where gradients are wanted."""
    # A trace knows no list with None in it.
    wanted = (x.is_cuda and keep_every == 1) or not torch.is_grad_enabled()
    return wanted and not torch.jit.is_tracing()


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
    masks: tuple[DirectionMasks, ...],
    regularization: Regularization,
    first: int,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """One layer of :func:`scan_layers`, whose states are (D, B, P); ``first`` counts the layers
    and directions before it."""
    weights = [
        own if mask.weight is None else (own[0], own[1] * mask.weight, *own[2:])
        for own, mask in zip(weights, masks, strict=True)
    ]
    extras = [
        regularization.extras(own, cell, first + direction, masks[direction])
        for direction, own in enumerate(weights)
    ]
    if len(weights) == 2 and not return_states and runs_both(x, keep_every):
        output, last = functional.scan_both(
            x,
            weights[0],
            weights[1],
            join_parts(parts) if parts else None,
            cell=cell,
            lengths=lengths,
            resets=resets,
            extras=None if extras[0] is None or extras[1] is None else (extras[0], extras[1]),
        )
        return output, state_parts(cell, last), ()
    outputs: list[Tensor] = []
    states: list[tuple[Tensor, ...]] = []
    all_steps: list[tuple[Tensor, ...]] = []
    for direction, own in enumerate(weights):
        more = extras[direction] or _NO_EXTRAS
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
