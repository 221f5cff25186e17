# SPDX-License-Identifier: Apache-2.0
"""Tests of weights that are made anew at each call: pruned, normalised, parametrised ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, weight_norm

import pyseq
from pyseq.scheduled import Sampling

SOURCE = torch.tensor([[4, 9, 5, 7], [6, 8, 0, 0], [7, 4, 4, 0]])
LENGTHS = torch.tensor([4, 2, 3])
TARGET = torch.tensor([[1, 4, 5, 6], [1, 6, 6, 4], [1, 5, 7, 7]])


def pruned(module: torch.nn.Module, name: str) -> Callable[[], object]:
    prune.random_unstructured(module, name, amount=0.5)
    return lambda: prune.remove(module, name)


def normalised(module: torch.nn.Module, name: str) -> Callable[[], object]:
    parametrizations.weight_norm(module, name)
    return lambda: parametrize.remove_parametrizations(module, name)


def normalised_by_hook(module: torch.nn.Module, name: str) -> Callable[[], object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weight_norm(module, name)
    return lambda: remove_weight_norm(module, name)


def results(model: pyseq.Seq2Seq) -> tuple[list[list[int]], list[torch.Tensor]]:
    found = model.generate(SOURCE, LENGTHS, max_length=6, beam_size=3)
    read = model.scheduled_inputs(SOURCE, LENGTHS, TARGET, Sampling(0.0))
    loss = model.loss(SOURCE, LENGTHS, TARGET[:, :-1], TARGET[:, 1:])
    return [each.tokens for each in found], [
        torch.tensor([each.score for each in found]),
        read,
        loss,
    ]


@pytest.mark.parametrize("make", [pruned, normalised, normalised_by_hook])
@pytest.mark.parametrize(
    ("part", "name", "options"),
    [
        ("encoder.embedding", "weight", {}),
        ("encoder.rnn", "weight_hh_l0", {}),
        ("bridge", "weight_h", {"bridge": "tanh"}),
        ("decoder.rnn", "weight_ih_l0", {}),
        ("decoder.rnn.combine", "weight", {}),
        ("decoder.rnn.score", "weight", {}),
        ("decoder.rnn.score", "weight_query", {"score": "concat", "history": "cumulative"}),
        ("decoder.rnn.score", "weight_history", {"score": "concat", "history": "previous"}),
        ("decoder.rnn.positions", "weight", {"window": "local-p", "window_size": 2}),
        ("decoder.output", "weight", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_a_weight_is_heard_everywhere(
    make: Callable[[torch.nn.Module, str], Callable[[], object]],
    part: str,
    name: str,
    options: dict[str, Any],
) -> None:
    torch.manual_seed(1)
    model = pyseq.Seq2Seq(10, 9, embedding_size=4, hidden_size=6, **options).eval()
    module = model.get_submodule(part)
    taken = hasattr(module, f"{name}_v")
    finish = make(module, name)
    if make is normalised_by_hook and taken:
        with pytest.raises((ValueError, RuntimeError), match="weight_v must be"):
            results(model)
        return
    results(model)
    with torch.no_grad():  # of which nothing that was made before may be left
        for parameter in model.parameters():
            parameter.mul_(1.5)
    tokens, numbers = results(model)
    finish()
    assert isinstance(getattr(module, name), torch.nn.Parameter)
    expected_tokens, expected = results(model)
    assert tokens == expected_tokens
    for one, other in zip(numbers, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
