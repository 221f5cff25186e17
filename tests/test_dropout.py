# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq._dropout."""

from __future__ import annotations

import pytest
import torch

from pyseq._dropout import apply_dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dropout_zeroes_a_share_and_keeps_the_mean(dtype: torch.dtype) -> None:
    x = torch.full((100_000,), 3.0, dtype=dtype, requires_grad=True)
    y = apply_dropout(x, 0.2)
    zeros = y.eq(0)
    # Five standard deviations of 0.00126.
    assert abs(zeros.double().mean().item() - 0.2) < 0.0063
    torch.testing.assert_close(y[~zeros], torch.full_like(y[~zeros], 3 / 0.8), rtol=2e-5, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, y.detach() / 3)


def test_dropout_follows_the_seed() -> None:
    x = torch.ones(50)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(apply_dropout(x, 0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_dropout_off_and_of_everything() -> None:
    x = torch.randn(5)
    assert apply_dropout(x, 0.0) is x
    assert apply_dropout(x, 0.9, training=False) is x
    assert apply_dropout(x, 1.0).eq(0).all()


def test_dropout_refuses_what_is_no_probability() -> None:
    with pytest.raises(ValueError, match=r"dropout must be a probability in \[0, 1\], got 1.5"):
        apply_dropout(torch.ones(2), 1.5)


def test_dropout_of_odd_and_of_no_numbers() -> None:
    for size in ((0,), (1,), (3, 7), (2, 0, 4)):
        assert apply_dropout(torch.ones(size), 0.5).shape == size


def test_numbers_of_one_draw_are_independent() -> None:
    zeros = apply_dropout(torch.ones(100_000, 4), 0.5).eq(0).double()
    correlations = torch.corrcoef(zeros.t()) - torch.eye(4)
    assert correlations.abs().max() < 0.016  # five standard deviations
