# SPDX-License-Identifier: Apache-2.0
"""What the operators keep for backward: how much, and that the rest comes back the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_close, assert_same_bits
from torch import Tensor

import pyseq
from pyseq import functional, reference
from pyseq.types import HISTORIES, CellName, HistoryName, ScoreName

T, B, FEATURES, H, S = 7, 3, 4, 5, 6
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
CELLS = tuple(GATES)


def kept_numbers(run: Callable[[], object], given: set[Tensor]) -> int:
    """How many floating-point numbers ``run`` keeps for backward besides the tensors given to it.

    A view keeps all of what it is a view of.
    """
    pieces: dict[int, int] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in given}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in known:
            pieces[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result is not None
    return sum(pieces.values())


def scan_inputs(cell: CellName, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    rows = GATES[cell] * H
    made = {
        "x": torch.randn(T, B, FEATURES, dtype=dtype),
        "w_ih": torch.randn(rows, FEATURES, dtype=dtype),
        "w_hh": torch.randn(rows, H, dtype=dtype),
        "b_hh": torch.randn(rows, dtype=dtype),
        "h_0": torch.randn(B, H, dtype=dtype),
        "c_0": torch.randn(B, H, dtype=dtype),
    }
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def run_scan(cell: CellName, given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    h_0, c_0 = given["h_0"], given["c_0"]
    output, state = functional.scan(
        given["x"],
        given["w_ih"],
        given["w_hh"],
        b_hh=given["b_hh"],
        state=(h_0, c_0) if cell == "lstm" else h_0,
        cell=cell,
        **options,
    )
    parts = state if isinstance(state, tuple) else (state,)
    return {"output": output, **{f"state {i}": part for i, part in enumerate(parts)}}


@pytest.mark.parametrize("cell", CELLS)
def test_scan_keeps_gates_or_states_and_no_more(cell: CellName) -> None:
    given = scan_inputs(cell)
    kept = kept_numbers(lambda: run_scan(cell, given), set(given.values()))
    states, gates = (T + 1) * B * H, GATES[cell] * T * B * H
    apart = T * B * H if cell == "gru" else 0
    assert kept == (states if GATES[cell] == 1 else gates + apart)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("lengths", [None, [7, 0, 4]], ids=["full", "ragged"])
@pytest.mark.parametrize("cell", CELLS)
def test_states_that_were_not_kept_come_back(
    cell: CellName, lengths: list[int] | None, reverse: bool
) -> None:
    """Resets, though there are none, have the states kept."""
    results = []
    for resets in (None, torch.zeros(T, B, dtype=torch.bool)):
        torch.manual_seed(1)
        given = scan_inputs(cell, torch.float32)
        outputs = run_scan(
            cell,
            given,
            reverse=reverse,
            lengths=None if lengths is None else torch.tensor(lengths),
            resets=resets,
        )
        loss = sum((value * torch.randn(value.shape)).sum() for value in outputs.values())
        assert isinstance(loss, Tensor)
        used = {name: tensor for name, tensor in given.items() if name != "c_0" or cell == "lstm"}
        gradients = torch.autograd.grad(loss, list(used.values()))
        results.append({**outputs, **dict(zip(used, gradients, strict=True))})
    assert_close(results[0], results[1])


def decoder(
    score: ScoreName, num_layers: int = 1
) -> tuple[pyseq.nn.AttentionDecoder, list[Tensor]]:
    module = pyseq.nn.AttentionDecoder(FEATURES, H, H, num_layers=num_layers, score=score)
    return module, [torch.randn(T, B, FEATURES), torch.randn(S, B, H)]


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
def test_decoder_keeps_neither_states_nor_contexts(score: ScoreName) -> None:
    module, (x, memory) = decoder(score)
    given = {x, memory, *module.parameters()}
    kept = kept_numbers(lambda: module(x, memory), given)
    keys = 0 if score == "dot" else S * B * H
    query = T * B * H if score == "concat" else 0
    assert kept == 4 * T * B * H + T * B * H + T * B * S + keys + query


@pytest.mark.parametrize("score", ["dot", "concat"])
@pytest.mark.parametrize("heads", [1, 2], ids=["N1", "N2"])
@pytest.mark.parametrize("gaussian", [False, True], ids=["steps", "positions"])
def test_weights_of_windows_that_nobody_wants_are_not_kept(
    score: ScoreName, heads: int, gaussian: bool
) -> None:
    size = 2 * H
    made = {
        "query": torch.randn(T, B, size),
        "keys": torch.randn(S, B, size),
        "memory": torch.randn(S, B, size),
        "positions": torch.rand(T, B) * S,
    }
    v = torch.randn(size) if score == "concat" else None
    given = {name: tensor.requires_grad_() for name, tensor in made.items()}
    used = given if gaussian else {name: given[name] for name in ("query", "keys", "memory")}

    def attend(need_weights: bool) -> Tensor:
        return functional.attend(
            given["query"],
            given["keys"],
            given["memory"],
            torch.tensor([6, 0, 4]),
            score=score,
            weight_v=v,
            heads=heads,
            window=1,
            positions=given["positions"] if gaussian else None,
            need_weights=need_weights,
        ).context

    known = set(given.values()) | (set() if v is None else {v})
    assert kept_numbers(lambda: attend(False), known) == 0
    contexts = {need: attend(need) for need in (False, True)}
    assert_same_bits({"context": contexts[False]}, {"context": contexts[True]})
    gradients = {
        need: dict(
            zip(used, torch.autograd.grad(context.square().sum(), list(used.values())), strict=True)
        )
        for need, context in contexts.items()
    }
    assert_same_bits(gradients[False], gradients[True])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("history", HISTORIES)
def test_past_weights_keep_the_weights_and_no_keys(
    history: HistoryName, need_weights: bool
) -> None:
    sizes = {"query": (T, B, H), "keys": (S, B, H), "memory": (S, B, H), "weight_v": (H,)}
    given = {
        name: torch.randn(size, requires_grad=True)
        for name, size in {**sizes, "weight_history": (H, 3)}.items()
    }
    kept = kept_numbers(
        lambda: functional.attend_history(**given, history=history, need_weights=need_weights),
        set(given.values()),
    )
    assert kept == T * B * S


@pytest.mark.parametrize("window", [None, 2])
def test_attend_without_weights_is_the_same(window: int | None) -> None:
    query, rows = torch.randn(T, B, H), torch.randn(S, B, H)
    lengths = torch.tensor([6, 0, 4])
    context, weights = functional.attend(query, rows, rows, lengths, window=window)
    expected = functional.attend(query, rows, rows, lengths, window=window, need_weights=True)
    assert weights is None
    assert_same_bits({"context": context}, {"context": expected.context})
    for need in (False, True):
        raw = torch.ops.pyseq.attend(
            query, rows, rows, None, lengths, "dot", None, window or 0, 1, None, need
        )[1]
        assert raw.shape == ((T, B, S) if need else (0,))


@pytest.mark.parametrize("score", ["dot", "concat"])
def test_windows_of_one_row_do_not_depend_on_the_threads(score: ScoreName) -> None:
    steps, size = 400, 64
    made = [torch.randn(steps, 1, size, requires_grad=True) for _ in range(3)]
    v = torch.randn(size, requires_grad=True) if score == "concat" else None
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            context = functional.attend(*made, score=score, weight_v=v, window=20).context
            wanted = [*made, *(() if v is None else (v,))]
            gradients = torch.autograd.grad(context.square().sum(), wanted)
        finally:
            torch.set_num_threads(before)
        results.append({str(i): gradient for i, gradient in enumerate(gradients)})
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_a_window_wider_than_any_number_of_positions_sees_all() -> None:
    query, rows = torch.randn(T, B, H), torch.randn(S, B, H)
    wide = functional.attend(query, rows, rows, window=2**62).context
    assert_close({"context": wide}, {"context": reference.attend(query, rows, rows).context})
