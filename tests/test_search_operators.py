# SPDX-License-Identifier: Apache-2.0
"""The operators that run a decoder on its own tokens, as devices without kernels for them run them:
here on the CPU, against the reference."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from generate_cases import GenerateCase, check, check_scheduled
from torch._C import DispatchKey

from pyseq import functional
from pyseq.search import operators

CASES = (
    GenerateCase(),
    GenerateCase(beam_size=4, n_best=3, length_penalty=0.6, lengths="holes"),
    GenerateCase(cell="gru", score="concat", layers=2, project_query=True, beam_size=2),
    GenerateCase(score=None, layers=3, beam_size=3),
    GenerateCase(cell="rnn_tanh", score=None, bias=False),
    GenerateCase(score="general", input_feeding=False, feed=False, beam_size=20, n_best=20),
    GenerateCase(score="location", beam_size=2, min_length=3, block_ngrams=2, prefix="ragged"),
    GenerateCase(dtype=torch.float32, max_length=1, beam_size=2),
    GenerateCase(heads=2, window=2, beam_size=3, lengths="holes"),
    GenerateCase(score="dot", window=1, predict=True, beam_size=2, n_best=2),
    GenerateCase(score="concat", history="cumulative", layers=2, beam_size=3, feed=False),
    GenerateCase(score="concat", order="bahdanau", fed="context", history="previous"),
)


@pytest.mark.parametrize("name", ["generate", "scheduled_inputs"])
def test_they_take_what_the_operators_take(name: str) -> None:
    arguments = getattr(torch.ops.pyseq, name).default._schema.arguments
    taken = list(inspect.signature(getattr(operators, name)).parameters)
    assert [argument.name for argument in arguments[: len(taken)]] == taken
    # Where a call leaves them out; what they would ask for is an error, not another result.
    assert all(argument.has_default_value() for argument in arguments[len(taken) :])


def id_of(case: GenerateCase) -> str:
    return case.id


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have calls of the operators run what the dispatcher runs on devices without kernels."""
    for name in ("generate", "scheduled_inputs"):
        operator = getattr(torch.ops.pyseq, name).default

        def run(*args: Any, operator: Any = operator) -> Any:
            return operator._op_dk(DispatchKey.CompositeExplicitAutograd, *args)

        monkeypatch.setattr(torch.ops.pyseq, name, run)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("case", CASES, ids=id_of)
def test_generate_is_the_reference(case: GenerateCase) -> None:
    check(case)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("drawn", [False, True], ids=["likeliest", "drawn"])
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[3], CASES[-2], CASES[-1]], ids=id_of)
def test_scheduled_inputs_are_the_reference(case: GenerateCase, drawn: bool, masked: bool) -> None:
    check_scheduled(case, masked=masked, drawn=drawn)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("need_weights", [False, True])
def test_no_rows(need_weights: bool) -> None:
    arguments = GenerateCase(sizes=(4, 0, 5, 7, 6, 8, 9)).arguments()
    found = functional.generate(**(arguments | {"need_weights": need_weights}))
    assert found.tokens.shape == (0, 0)
    assert found.lengths.shape == found.scores.shape == (0,)
    assert (found.weights is not None) == need_weights


def test_a_prefix_with_holes_is_refused() -> None:
    with pytest.raises(ValueError, match="only beyond the end"):
        operators._sequences(torch.tensor([[5, 0, 6]]))


@pytest.mark.usefixtures("as_on_a_device")
def test_a_search_is_differentiated_nowhere() -> None:
    arguments = GenerateCase().arguments()
    arguments["embedding"].requires_grad_()
    assert not functional.generate(**arguments).scores.requires_grad
