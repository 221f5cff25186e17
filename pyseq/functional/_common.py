# SPDX-License-Identifier: Apache-2.0
"""What the operators share: options, states and indices as the kernels take them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .._checks import check_shape, check_tensor
from .._packed import computing_dtype
from ..types import STATES, CellName, LayerWeights, State, kind


def check_option(name: str, value: object, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def h_and_c(parts: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
    """The parts of a state as ``(h, c)``, None for what is not there; those beyond c beside c."""
    if len(parts) == 2:
        return parts[0], parts[1]
    if len(parts) < 2:
        return parts[0] if parts else None, None
    h, c, *others = parts
    for part in others:
        check_shape("a part of the state", part, "(..., B, H) like c", tuple(c.shape))
    return h, torch.cat((c, *others), -1)


def join_state(cell: CellName, h: Tensor, c: Tensor) -> State:
    """The inverse, for what an operator returned."""
    if cell not in STATES:
        return h
    count = len(STATES[cell])
    return (h, c) if count == 1 else (h, *c.chunk(count, -1))


def is_short(x: Tensor) -> bool:
    """Whether ``x`` is held in a type that is computed in float32."""
    return x.dtype in (torch.float16, torch.bfloat16)


def beside(name: str, indices: Tensor | None, x: Tensor) -> Tensor | None:
    """Lengths and resets may come on any device; the kernels read them where x is."""
    if indices is None:
        return None
    check_tensor(name, indices)
    return indices.to(x.device)


def flatten(layers: Sequence[LayerWeights | tuple[Tensor | None, ...]]) -> list[Tensor]:
    """(w_ih, w_hh, b_ih, b_hh) of every layer in one list, missing biases as zeros."""
    flat: list[Tensor] = []
    for number, layer in enumerate(layers):
        if not isinstance(layer, (tuple, list)) or not 2 <= len(layer) <= 4:
            raise ValueError(
                f"layers[{number}] must be (w_ih, w_hh, b_ih, b_hh), got {kind(layer)}"
            )
        w_ih, w_hh, b_ih, b_hh = LayerWeights(*layer)  # type: ignore[arg-type]  # None: see below
        check_tensor(f"w_ih of layers[{number}]", w_ih)
        check_tensor(f"w_hh of layers[{number}]", w_hh)
        if b_ih is None or b_hh is None:
            zero = w_ih.new_zeros(w_ih.shape[:1], dtype=computing_dtype(w_ih))
            b_ih, b_hh = zero if b_ih is None else b_ih, zero if b_hh is None else b_hh
        flat += [w_ih, w_hh, b_ih, b_hh]
    if not flat:
        raise ValueError("layers must hold at least one layer, got none")
    return flat
