# SPDX-License-Identifier: Apache-2.0
"""Products with large matrices: linear, and the loss of an output layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._checks import autocasts, check_smoothing, check_tensor
from ._common import is_short


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, with the products that the recurrent loops are made of.

    On some processors these are twice as fast as those of torch's library. In float32 and
    float64 on the CPU it is one operator, which can be differentiated any number of times;
    for other dtypes and devices it is :func:`torch.nn.functional.linear`.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,). Default: zero.

    Returns:
        (..., O).

    Raises:
        RuntimeError: a tensor has the wrong shape, dtype or device.
        TypeError: what must be a tensor is none.
    """
    check_tensor("x", x)
    check_tensor("weight", weight)
    # Of short numbers torch's library multiplies twice as many at a time, and sums in float32 too.
    # On other devices it has what there is.
    if (is_short(x) and not autocasts(x.device)) or x.device.type not in ("cpu", "meta"):
        return reference.linear(x, weight, bias)
    product: Tensor = torch.ops.pyseq.linear(x, weight, bias)
    return product


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of an output layer, without ever holding the logits of all rows.

    The mean over the rows n whose target is not ``ignore_index`` of
    ``-sum_v q_nv log softmax_v(W h_n + b)``, where ``q_n`` is ``1 - s`` at the target plus
    ``s / V`` everywhere, for the label smoothing s.

    Ignored rows take no part in any product: padding costs nothing, whatever it holds.
    Where gradients are wanted they are computed in the forward pass. On other devices than the CPU
    products are torch's and ignored rows are zero in them; nothing waits for the device, so that
    there a target that is no symbol makes the loss NaN.

    Args:
        hidden: (N, H).
        weight: (V, H), V at least 1.
        target: (N,) int64, the right symbols, each from 0 to V - 1, or ``ignore_index``.
        bias: (V,). Default: zero.
        ignore_index: the target of rows that do not count.
        label_smoothing: s, the share of the target probability that is spread over all
            symbols, 0 to 1.

    Returns:
        0-dimensional, in nats. If no row counts it is NaN, as in torch, and every gradient
        is zero.

    Raises:
        ValueError: ``label_smoothing`` is out of its range.
        RuntimeError: a tensor has the wrong shape, dtype or device, or a target is no symbol.
        TypeError: what must be a tensor is none.

    Reference:
        Szegedy et al. 2016, arXiv 1512.00567, section 7 (label smoothing).
    """
    check_smoothing(label_smoothing)
    check_tensor("hidden", hidden)
    check_tensor("weight", weight)
    check_tensor("target", target)
    loss: Tensor = torch.ops.pyseq.linear_cross_entropy(
        hidden, weight, target, bias, ignore_index, label_smoothing
    )
    return loss
