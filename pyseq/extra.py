# SPDX-License-Identifier: Apache-2.0
"""Extra information in a recurrent network: of a whole sequence, or of every step.

A speaker, a language, a date, what an image shows. Used by ``seq2seq`` in encoder and
decoder. An attention's context is one case of it.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import init
from torch.nn.functional import linear

from ._checks import check_like, check_positive, check_shape, check_tensor
from .nn._common import Device
from .types import Copies

__all__ = [
    "EXTRA_MODES",
    "EXTRA_PLACES",
    "Conditions",
    "ExtraInformation",
    "ExtraMode",
    "ExtraOptions",
    "ExtraPlace",
]

ExtraMode = Literal["add", "concat", "mlp"]
EXTRA_MODES: tuple[str, ...] = ("add", "concat", "mlp")

ExtraPlace = Literal["output", "input"]
EXTRA_PLACES: tuple[str, ...] = ("output", "input")


class ExtraInformation(torch.nn.Module):
    """What extra information z makes of the vectors h of a recurrent network.

    - ``"add"``: ``h~_t = h_t + W_z z_t``.
    - ``"concat"``: ``h~_t = tanh(W_c [z_t; h_t] + b)``.
    - ``"mlp"``: ``h~_t = tanh(W_h h_t + F(z_t))``, with
      ``F(z) = W_2 tanh(W_1 z + b_1) + b_2``; or without a hidden layer ``F(z) = W_2 z + b_2``,
      which is ``"concat"`` by other names.

    z is of the whole sequence, the same at every t, or of each step. All steps are one product;
    what z adds is computed once for each row if it is the same at every step.

    Args:
        mode: one of the above.
        size: H, numbers of h.
        extra_size: Z, numbers of z.
        hidden_size: units of F's hidden layer, for ``"mlp"``. Default: no hidden layer.
        device, dtype: of the parameters.

    Attributes:
        weight: ``W_z`` (H, Z), ``W_c`` (H, Z + H) with the columns [z; h], or ``W_h`` (H, H).
        bias: ``b`` (H,), for ``"concat"``.
        hidden: the layer ``W_1, b_1``, or None.
        output: the layer ``W_2, b_2``, for ``"mlp"``.

    Raises:
        ValueError: the mode is unknown, a size is out of its range, or hidden_size is given
            for another mode.

    Reference:
        ``"concat"`` is how Luong et al. 2015, arXiv 1508.04025, eq. 5, use the context.
    """

    bias: Tensor | None

    def __init__(
        self,
        mode: str,
        size: int,
        extra_size: int,
        *,
        hidden_size: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mode not in EXTRA_MODES:
            raise ValueError(f"extra_mode must be one of {', '.join(EXTRA_MODES)}, got {mode!r}")
        check_positive(size=size, extra_size=extra_size)
        if hidden_size is not None:
            check_positive(extra_hidden_size=hidden_size)
            if mode != "mlp":
                raise ValueError(f"extra_hidden_size goes with extra_mode 'mlp', got {mode!r}")
        self.mode = cast(ExtraMode, mode)
        self.size = size
        self.extra_size = extra_size
        columns = {"add": extra_size, "concat": extra_size + size, "mlp": size}[mode]
        weight = torch.empty(size, columns, device=device, dtype=dtype)
        self.weight = torch.nn.Parameter(weight)
        bias = torch.nn.Parameter(weight.new_empty(size)) if mode == "concat" else None
        self.register_parameter("bias", bias)
        self.hidden: torch.nn.Linear | None = None
        self.output: torch.nn.Linear | None = None
        if mode == "mlp":
            if hidden_size is not None:
                self.hidden = torch.nn.Linear(extra_size, hidden_size, device=device, dtype=dtype)
            inputs = hidden_size or extra_size
            self.output = torch.nn.Linear(inputs, size, device=device, dtype=dtype)
        self._reset()

    def _reset(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])
        for weight in self.parameters(recurse=False):
            init.uniform_(weight, -bound, bound)

    def reset_parameters(self) -> None:
        """Draw every weight uniformly within 1/sqrt of the size that it sums over."""
        for layer in (self.hidden, self.output):
            if layer is not None:
                layer.reset_parameters()
        self._reset()

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        """Bring ``z`` into all steps of ``h``.

        Args:
            h: (T, B, H).
            z: (B, Z), the same at every step; or (T, B, Z).

        Returns:
            (T, B, H).

        Raises:
            RuntimeError: a tensor has the wrong shape, dtype or device.
            TypeError: what must be a tensor is none.
        """
        check_shape("h", h, "(T, B, H)", (-1, -1, self.size))
        check_extra("z", self, z, rows=h.shape[1], steps=h.shape[0])
        own = self._of_extra(z)
        own = own.unsqueeze(0) if z.dim() == 2 else own
        if self.mode == "add":
            return h + own
        weight = self.weight[:, -self.size :]
        return (linear(h, weight) + own).tanh()

    def _of_extra(self, z: Tensor) -> Tensor:
        """What z adds before the tanh, if there is one: (..., Z) to (..., H)."""
        if self.output is not None:
            own: Tensor = self.output(z if self.hidden is None else self.hidden(z).tanh())
            return own
        return linear(z, self.weight[:, : self.extra_size], self.bias)

    def extra_repr(self) -> str:
        return f"{self.mode!r}, {self.size}, {self.extra_size}"


def check_extra(
    name: str, module: ExtraInformation | None, z: Tensor | None, *, rows: int, steps: int
) -> None:
    """Raise unless ``z`` is (rows, Z) or (steps, rows, Z), and there only if a module takes it."""
    if module is None:
        if z is not None:
            raise RuntimeError(f"{name} must be left out: this model takes none")
        return
    if z is None:
        raise RuntimeError(
            f"{name} must be given, (B, Z) or (T, B, Z) with Z = {module.extra_size}, got None"
        )
    check_tensor(name, z)
    if z.dim() == 3:
        check_shape(name, z, "(T, B, Z)", (steps, rows, module.extra_size))
    else:
        check_shape(name, z, "(B, Z), or (T, B, Z), here (B, Z)", (rows, module.extra_size))
    check_like(name, z, "the weights", module.weight)


class ExtraOptions(NamedTuple):
    """How an encoder or a decoder takes extra information."""

    size: int  # Z
    mode: str = "concat"
    hidden_size: int | None = None
    place: str = "output"

    def build(
        self, size: int, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> ExtraInformation:
        """The module for vectors of ``size`` numbers.

        Raises:
            ValueError: an option is unknown or out of its range.
        """
        if self.place not in EXTRA_PLACES:
            raise ValueError(
                f"extra_place must be one of {', '.join(EXTRA_PLACES)}, got {self.place!r}"
            )
        return ExtraInformation(
            self.mode, size, self.size, hidden_size=self.hidden_size, device=device, dtype=dtype
        )


class Conditions(NamedTuple):
    """What a decoder is told besides its tokens and the memory."""

    context: Tensor | None = None  # (B, C), read at every step
    extra: Tensor | None = None  # (B, Z), or (T, B, Z)
    copies: Copies | None = None  # what it may copy

    def step(self, t: int) -> Conditions:
        """Those of one step, counted from 0."""
        if self.extra is None or self.extra.dim() == 2:
            return self
        return self._replace(extra=self.extra[t])
