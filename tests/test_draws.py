# SPDX-License-Identifier: Apache-2.0
"""The numbers that draws follow from, and what is drawn by them."""

from __future__ import annotations

import pytest
import torch

from pyseq.search import SearchOptions
from pyseq.search.draws import draw, draw_seed, uniform

MASK = 2**64 - 1


def bits(seed: int, counter: int) -> int:
    """SplitMix64 on Python's integers, which do not overflow."""
    z = (seed + (counter + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 5, 2**63 - 2])
def test_numbers_are_splitmix(seed: int) -> None:
    for step in (0, 7):
        found = uniform(torch.tensor(seed), torch.tensor([0, 1, 5]), step).tolist()
        assert found == [(bits(bits(seed, row), step) >> 11) * 2.0**-53 for row in (0, 1, 5)]


def test_the_first_numbers_of_the_sequence_are_known() -> None:
    """Those that the generator gives from zero."""
    assert [bits(0, counter) for counter in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_numbers_are_uniform() -> None:
    found = uniform(torch.tensor(3), torch.arange(20000), 4)
    assert found.min() >= 0
    assert found.max() < 1
    counts = torch.histc(found, 10, 0, 1) / 20000
    assert (counts - 0.1).abs().max() < 0.012  # more than five standard deviations


def test_seeds_follow_from_the_generator() -> None:
    one, other, last = (
        draw_seed(torch.Generator().manual_seed(seed), torch.device("cpu")) for seed in (1, 1, 2)
    )
    assert one == other != last


@pytest.mark.parametrize(
    ("number", "options", "expected"),
    [
        (0.0, {}, 2),
        (0.29, {}, 2),
        (0.31, {}, 3),
        (0.999999, {}, 4),
        (0.0, {"top_k": 3}, 3),
        (0.51, {"top_k": 3}, 2),
        (0.99, {"top_p": 0.5}, 3),
        (0.99, {"top_k": 2, "top_p": 0.6}, 3),
        (0.7, {"top_k": 2, "top_p": 0.7}, 2),
        (0.5, {"temperature": 1e-9}, 3),
    ],
    ids=str,
)
def test_draws_are_the_first_beyond_the_number(
    number: float, options: dict[str, float], expected: int
) -> None:
    log_probs = torch.tensor([[0.0, 0.0, 0.3, 0.5, 0.2]]).log()
    found = SearchOptions(max_length=1, sample=True, **options)
    assert draw(log_probs, found, torch.tensor([number])).tolist() == [expected]
