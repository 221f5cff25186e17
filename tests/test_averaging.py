# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.averaging: the averages are what their formulas say, and can be kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyseq.averaging import AverageName, WeightAverage


def walk(model: torch.nn.Linear) -> Tensor:
    """Move the weights somewhere; returns the new weight."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))
    return model.weight.detach().clone()


def average_of(average: WeightAverage, model: torch.nn.Linear) -> Tensor:
    with average.given():
        return model.weight.detach().clone()


def test_exponential() -> None:
    model = torch.nn.Linear(3, 2).double()
    average = WeightAverage(model, "exponential", decay=0.6)
    expected = torch.empty(0)
    for count in range(1, 30):
        weight = walk(model)
        decay = min(0.6, count / (count + 9))
        expected = weight if count == 1 else decay * expected + (1 - decay) * weight
        average.after_update(count)
        average.after_epoch()  # does not count
        torch.testing.assert_close(average_of(average, model), expected)
        assert torch.equal(model.weight, weight)


def test_epochs() -> None:
    model = torch.nn.Linear(3, 2).double()
    average = WeightAverage(model, "epochs", epochs=3)
    seen: list[Tensor] = []
    assert torch.equal(average_of(average, model), model.weight)  # nothing to average yet
    for _ in range(5):
        walk(model)
        average.after_update(1)  # does not count
        seen.append(walk(model))
        average.after_epoch()
        torch.testing.assert_close(average_of(average, model), torch.stack(seen[-3:]).mean(0))
    average.give()
    torch.testing.assert_close(model.weight.detach(), torch.stack(seen[-3:]).mean(0))


@pytest.mark.parametrize("kind", ["exponential", "epochs"])
def test_a_kept_average_goes_on_with_the_same_bits(kind: AverageName) -> None:
    model = torch.nn.Linear(3, 2)
    whole = WeightAverage(model, kind, epochs=2)
    parts = WeightAverage(model, kind, epochs=2)
    for count in range(1, 6):
        walk(model)
        for average in (whole, parts):
            average.after_update(count)
            average.after_epoch()
        state = parts.state()
        parts = WeightAverage(model, kind, epochs=2)
        parts.restore({"other": torch.zeros(1), **state})
        assert torch.equal(average_of(parts, model), average_of(whole, model))


def test_a_tied_weight_is_averaged_once() -> None:
    first, second = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    model = torch.nn.Sequential(first, second)
    average = WeightAverage(model, "epochs", epochs=2)
    average.after_epoch()
    assert list(average.state()) == ["average.0.0.weight"]


def test_the_weights_come_back_after_an_error() -> None:
    model = torch.nn.Linear(3, 2)
    average = WeightAverage(model, "epochs")
    average.after_epoch()
    weight = walk(model)
    with pytest.raises(KeyError), average.given():
        raise KeyError
    assert torch.equal(model.weight, weight)


def test_a_missing_weight_is_found() -> None:
    average = WeightAverage(torch.nn.Linear(3, 2), "epochs")
    with pytest.raises(KeyError, match=r"average\.0\.bias"):
        average.restore({"average.0.weight": torch.zeros(2, 3)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "none"}, "kind must be one of exponential, epochs, got 'none'"),
        ({"kind": "epochs", "epochs": 0}, "epochs must be at least 1, got 0"),
        ({"kind": "exponential", "decay": 1.0}, "decay must be at least 0 and below 1, got 1.0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightAverage(torch.nn.Linear(3, 2), **options)
