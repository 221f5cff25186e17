# SPDX-License-Identifier: Apache-2.0
"""Drawing tokens: by numbers that depend on the seed, on which draw it is and on its step alone.

So that draws are the same whatever else is in the batch, and whoever makes the steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..types import STOP
from .options import SearchOptions


def draw_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """What all draws of a search follow from, () int64."""
    return torch.randint(2**63 - 1, (), generator=generator, device=device)


def uniform(seed: Tensor, rows: Tensor, step: int) -> Tensor:
    """Numbers (N,) in [0, 1), in float64, of the draws ``rows`` (N,) int64 in a step.

    Reference:
        Steele et al. 2014, "Fast splittable pseudorandom number generators" (SplitMix64).
    """
    own = _bits(seed, rows)
    return _shifted(_bits(own, torch.full_like(rows, step)), 11).double() * 2.0**-53


def draw(log_probs: Tensor, options: SearchOptions, numbers: Tensor) -> Tensor:
    """One token (N,) from each of the distributions (N, V), sharpened and cut.

    Of the tokens in their order, or where some are cut off from the likeliest one on, it is the
    first up to which the probabilities add up to more than ``numbers`` (N,) of their sum.
    """
    tokens: Tensor | None = None
    values = log_probs
    if options.top_k is not None or options.top_p < 1:
        vocab = log_probs.shape[1]
        count = vocab if options.top_k is None else min(options.top_k, vocab)
        values, tokens = log_probs.topk(count)  # in descending order
    largest = values.amax(1, keepdim=True)
    # Where everything is forbidden <stop> is taken, as greedy search does.
    nothing = largest == -math.inf
    # Of the differences to the largest, which no temperature makes infinite for all.
    below = (values - largest).masked_fill(nothing, 0).double()
    probs = torch.softmax(below / max(options.temperature, torch.finfo(below.dtype).tiny), 1)
    # A token stays if those before it do not yet reach top_p; the first always does.
    probs = probs.where(probs.cumsum(1) - probs < options.top_p, 0) if tokens is not None else probs
    sums = probs.cumsum(1)
    choice = (sums <= numbers.unsqueeze(1) * sums[:, -1:]).sum(1, keepdim=True)
    # Should rounding have made it all of them, the last one with a share of the sum.
    choice = torch.minimum(choice, (sums < sums[:, -1:]).sum(1, keepdim=True))
    if tokens is not None:
        choice = tokens.gather(1, choice)
    return choice.masked_fill(nothing, STOP).squeeze(1)


def _bits(seed: Tensor, counter: Tensor) -> Tensor:
    """Number ``counter`` of a sequence of 64 random bits."""
    z = seed + (counter + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


def _shifted(z: Tensor, places: int) -> Tensor:
    """To the right, with zeros from the left: torch would repeat the sign."""
    return (z >> places) & (2 ** (64 - places) - 1)
