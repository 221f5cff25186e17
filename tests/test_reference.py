# SPDX-License-Identifier: Apache-2.0
"""The reference itself: against torch.nn on the same weights, and against its equations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from operator_cases import (
    CELLS,
    AttendCase,
    Case,
    DecodeCase,
    ScanCase,
    leaves,
    outputs_of,
    poisoned,
    run,
    small_cases,
)
from tolerances import assert_close
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pyseq import reference

MODULES: dict[str, type[torch.nn.RNNBase]] = {
    "rnn_tanh": torch.nn.RNN,
    "rnn_relu": torch.nn.RNN,
    "gru": torch.nn.GRU,
    "lstm": torch.nn.LSTM,
}


def torch_layer(cell: str, inputs: dict[str, Any], hidden: int) -> torch.nn.RNNBase:
    """The layer of torch.nn that shares the weights among ``inputs``."""
    options: dict[str, Any] = {}
    if cell.startswith("rnn"):
        options["nonlinearity"] = cell.removeprefix("rnn_")
    if "w_hr" in inputs:
        options["proj_size"] = inputs["w_hr"].shape[0]
    layer = MODULES[cell](inputs["x"].shape[-1], hidden, dtype=torch.float64, **options)
    names = [n for n in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr") if n in inputs]
    with torch.no_grad():
        for name, parameter in zip(names, layer.parameters(), strict=True):
            parameter.copy_(inputs[name])
    return layer


@pytest.mark.parametrize("lengths", [None, "ragged"])
@pytest.mark.parametrize("cell", [*CELLS, "projected"])
def test_scan_is_torch_nn(cell: Any, lengths: str | None) -> None:
    projection = 3 if cell == "projected" else 0
    cell = "lstm" if projection else cell
    case = ScanCase(cell=cell, projection=projection, lengths=lengths, dtype=torch.float64)
    call = case.call()
    expected_layer = torch_layer(cell, call.inputs, case.sizes[3])

    x: Any = call.inputs["x"].requires_grad_()
    inputs = x
    if lengths:
        inputs = pack_padded_sequence(x, call.inputs["lengths"], enforce_sorted=False)
    state = call.inputs["state"]
    first = tuple(s[None] for s in state) if cell == "lstm" else state[None]
    output, last = expected_layer(inputs, first)
    if lengths:
        output, _ = pad_packed_sequence(output, total_length=case.sizes[0])
    last = tuple(s[0] for s in last) if cell == "lstm" else last[0]

    actual = reference.scan(**call.inputs, **call.options)
    expected = dict(leaves({"output": output, "state": last}))
    assert_close(dict(leaves(actual)), expected)
    (d_actual,) = torch.autograd.grad(actual.output.square().sum(), x)
    (d_expected,) = torch.autograd.grad(output.square().sum(), x)
    assert_close({"x": d_actual}, {"x": d_expected})


@pytest.mark.parametrize("cell", CELLS)
def test_reverse_runs_each_row_backwards(cell: Any) -> None:
    case = ScanCase(cell=cell, lengths="holes", reverse=True, dtype=torch.float64)
    call = case.call()
    lengths = call.inputs["lengths"].tolist()

    def turned(sequence: Tensor) -> Tensor:
        turned = sequence.clone()
        for row, length in enumerate(lengths):
            turned[:length, row] = sequence[:length, row].flip(0)
        return turned

    actual = reference.scan(**call.inputs, **call.options)
    inputs = call.inputs | {"x": turned(call.inputs["x"])}
    forward = reference.scan(**inputs, cell=cell)
    expected = forward._replace(output=turned(forward.output))
    assert_close(dict(leaves(actual)), dict(leaves(expected)))


@pytest.mark.parametrize("cell", CELLS)
def test_a_reset_starts_a_new_sequence(cell: Any) -> None:
    call = ScanCase(cell=cell, dtype=torch.float64).call()
    x = call.inputs["x"]
    resets = torch.zeros(x.shape[:2], dtype=torch.bool)
    resets[2] = True
    actual = reference.scan(**call.inputs, resets=resets, cell=cell)
    head = reference.scan(**call.inputs | {"x": x[:2]}, cell=cell)
    tail = reference.scan(**call.inputs | {"x": x[2:], "state": None}, cell=cell)
    expected = tail._replace(output=torch.cat([head.output, tail.output]))
    assert_close(dict(leaves(actual)), dict(leaves(expected)))


@pytest.mark.parametrize("cell", CELLS)
def test_a_reset_stops_the_gradient(cell: Any) -> None:
    case = ScanCase(cell=cell, resets="first", dtype=torch.float64)
    gradients = run(reference, case.call()).gradients
    for name, gradient in gradients.items():
        assert gradient.eq(0).all() == name.startswith("state"), name


@pytest.mark.parametrize("cell", CELLS)
def test_padded_steps_keep_the_state(cell: Any) -> None:
    call = ScanCase(cell=cell, lengths="zero", dtype=torch.float64).call()
    output, state = reference.scan(**call.inputs, **call.options)
    assert output.eq(0).all()
    assert_close(dict(leaves(state, "state")), dict(leaves(call.inputs["state"], "state")))


@pytest.mark.parametrize("case", small_cases(torch.float64), ids=lambda case: case.id)
def test_what_padding_holds_does_not_matter(case: Case) -> None:
    call = case.call()
    expected, actual = run(reference, call), run(reference, poisoned(call))
    assert_close(actual.outputs, expected.outputs)
    assert_close(actual.gradients, expected.gradients)


def test_attend_dot_is_scaled_dot_product_attention() -> None:
    case = AttendCase(sizes=(4, 5, 3, 6, 7, 6), lengths="ragged", dtype=torch.float64)
    inputs = case.call().inputs
    query, keys, memory = (inputs[name].transpose(0, 1) for name in ("query", "keys", "memory"))
    valid = torch.arange(5) < inputs["lengths"].unsqueeze(1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, memory, attn_mask=valid.unsqueeze(1), scale=1.0
    )
    actual = reference.attend(**inputs, score="dot").context
    assert_close({"context": actual}, {"context": expected.transpose(0, 1)})


@pytest.mark.parametrize("score", ["dot", "scaled_dot", "general", "concat", "location"])
def test_attend_scores_follow_their_equations(score: Any) -> None:
    """One query at a time, as in Luong et al. 2015, equation 8."""
    case = AttendCase(score=score, sizes=(2, 3, 2, 4, 5, 4), need_weights=True, dtype=torch.float64)
    call = case.call()
    inputs = call.inputs
    actual = reference.attend(**inputs, **call.options)
    assert actual.weights is not None
    for t, b in itertools.product(range(2), range(2)):
        query, scores = inputs["query"][t, b], []
        if score == "location":
            assert len(inputs["weight"]) == 2  # the third position has no row, and no weight
            scores = [*(inputs["weight"] @ query), torch.tensor(-torch.inf)]
        for key in () if score == "location" else inputs["keys"][:, b]:
            if score == "dot":
                scores.append(query @ key)
            elif score == "scaled_dot":
                scores.append(query @ key / 4**0.5)
            elif score == "general":
                scores.append(query @ inputs["weight"] @ key)
            else:
                hidden = torch.tanh(inputs["weight_query"] @ query + key)
                scores.append(inputs["weight_v"] @ hidden)
        weights = torch.softmax(torch.stack(scores), 0)
        assert_close(
            {"weights": actual.weights[t, b], "context": actual.context[t, b]},
            {"weights": weights, "context": weights @ inputs["memory"][:, b]},
        )


def test_windows_around_the_step_are_the_attention_of_a_piece() -> None:
    """Local-m of Luong et al. 2015, section 3.2: softmax over |s - t| <= D alone."""
    case = AttendCase(sizes=(7, 4, 2, 3, 5, 3), window=1, need_weights=True, dtype=torch.float64)
    inputs = case.call().inputs
    context, weights = reference.attend(**inputs, window=1, need_weights=True)
    assert weights is not None
    for t, b in itertools.product(range(7), range(2)):
        seen = [s for s in range(4) if abs(s - t) <= 1]
        expected = torch.zeros(4, dtype=torch.float64)
        expected[seen] = torch.softmax(inputs["keys"][seen, b] @ inputs["query"][t, b], 0)
        assert_close(
            {"weights": weights[t, b], "context": context[t, b]},
            {"weights": expected, "context": expected @ inputs["memory"][:, b]},
        )
    assert weights[6].eq(0).all()  # beyond the source and its window there is nothing to see


def test_windows_around_positions_are_weighed_by_a_gaussian() -> None:
    """Local-p, equation 10, with a length of its own for each row."""
    case = AttendCase(lengths="holes", window=2, positions=True, dtype=torch.float64)
    inputs = case.call().inputs | {"query": case.call().inputs["query"][..., :6]}
    context, weights = reference.attend(**inputs, window=2, need_weights=True)
    assert weights is not None
    for t, b in itertools.product(range(4), range(3)):
        center = inputs["positions"][t, b]
        seen = [s for s in range(int(inputs["lengths"][b])) if abs(s - center) <= 2]
        expected = torch.zeros(5, dtype=torch.float64)
        if seen:
            align = torch.softmax(inputs["keys"][seen, b] @ inputs["query"][t, b], 0)
            expected[seen] = align * torch.exp(-((torch.tensor(seen) - center) ** 2) / 2)
        assert_close(
            {"weights": weights[t, b], "context": context[t, b]},
            {"weights": expected, "context": expected @ inputs["memory"][:, b]},
        )


def test_positions_are_predicted_within_the_source() -> None:
    """Equation 9, one query at a time."""
    torch.manual_seed(0)
    query, weight, v = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    lengths = torch.tensor([0, 3, 7])
    actual = reference.predict_positions(query, weight, v, 7, lengths)
    for t, b in itertools.product(range(2), range(3)):
        share = torch.sigmoid(v @ torch.tanh(weight @ query[t, b]))
        assert_close({"p": actual[t, b]}, {"p": lengths[b] * share})
    whole = reference.predict_positions(query, weight, v, 7)
    assert_close({"p": actual[:, 2]}, {"p": whole[:, 2]})


@pytest.mark.parametrize("score", ["dot", "scaled_dot", "concat"])
def test_heads_are_attentions_of_their_own_side_by_side(score: Any) -> None:
    case = AttendCase(score=score, heads=2, lengths="ragged", dtype=torch.float64)
    call = case.call()
    inputs = call.inputs
    if "weight_query" in inputs:
        inputs["query"] = reference.linear(inputs["query"], inputs.pop("weight_query"))
    actual = reference.attend(**inputs, score=score, heads=2, need_weights=True)
    assert actual.weights is not None
    alone = []
    for head in range(2):
        own = {
            name: inputs[name].chunk(2, -1)[head]
            for name in ("query", "keys", "memory", "weight_v")
            if name in inputs
        }
        output = reference.attend(**own, lengths=inputs["lengths"], score=score, need_weights=True)
        assert output.weights is not None
        assert_close({"weights": actual.weights[:, :, head]}, {"weights": output.weights})
        alone.append(output.context)
    assert_close({"context": actual.context}, {"context": torch.cat(alone, -1)})


@pytest.mark.parametrize("score", ["dot", "scaled_dot", "general", "concat"])
def test_attend_weights_are_a_distribution_over_valid_positions(score: Any) -> None:
    call = AttendCase(score=score, lengths="holes", need_weights=True, dtype=torch.float64).call()
    lengths = call.inputs["lengths"]
    context, weights = reference.attend(**call.inputs, **call.options)
    assert weights is not None
    totals = (lengths > 0).double().expand(weights.shape[:2])
    assert_close({"sum": weights.sum(-1)}, {"sum": totals})
    assert weights[:, torch.arange(5) >= lengths.unsqueeze(1)].eq(0).all()
    assert context[:, lengths == 0].eq(0).all()
    gradients = run(reference, call).gradients
    assert gradients["memory"][:, lengths == 0].eq(0).all()
    assert gradients["keys"][:, lengths == 0].eq(0).all()


def test_decode_is_cells_and_attention_in_a_loop() -> None:
    """One layer of LSTMCell, dot score and input feeding, written out with torch.nn."""
    case = DecodeCase(sizes=(4, 5, 3, 6, 7, 7, 9), dtype=torch.float64)
    call = case.call()
    inputs = call.inputs
    cell = torch.nn.LSTMCell(6 + 7, 7, dtype=torch.float64)
    with torch.no_grad():
        for parameter, value in zip(cell.parameters(), inputs["layers"][0], strict=True):
            parameter.copy_(value)
    (h, c), feed = inputs["state"]
    h, c = h[0], c[0]
    outputs = []
    for x in inputs["x"]:
        h, c = cell(torch.cat([x, feed], -1), (h, c))
        scores = (inputs["keys"] * h).sum(-1)
        context = (torch.softmax(scores, 0).unsqueeze(2) * inputs["memory"]).sum(0)
        feed = torch.tanh(torch.cat([context, h], -1) @ inputs["combine"].T)
        outputs.append(feed)
    expected = {
        "output": torch.stack(outputs),
        "state.hidden[0]": h[None],
        "state.hidden[1]": c[None],
        "state.feed": feed,
    }
    assert_close(outputs_of(reference, call), expected)


@pytest.mark.parametrize("input_feeding", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_decode_goes_on_from_its_state(cell: Any, input_feeding: bool) -> None:
    case = DecodeCase(
        cell=cell,
        layers=2,
        lengths="ragged",
        input_feeding=input_feeding,
        need_weights=True,
        dtype=torch.float64,
    )
    call = case.call()
    x = call.inputs["x"]
    whole = reference.decode(**call.inputs, **call.options)
    head = reference.decode(**call.inputs | {"x": x[:3]}, **call.options)
    tail = reference.decode(**call.inputs | {"x": x[3:], "state": head.state}, **call.options)
    assert head.weights is not None
    assert tail.weights is not None
    joined = tail._replace(
        output=torch.cat([head.output, tail.output]),
        weights=torch.cat([head.weights, tail.weights]),
    )
    assert_close(dict(leaves(joined)), dict(leaves(whole)))


def test_dropout_masks_of_ones_change_nothing_and_zeros_cut_the_layers() -> None:
    call = DecodeCase(layers=2, dropout=True, dtype=torch.float64).call()
    masks = call.inputs.pop("dropout_masks")
    without = outputs_of(reference, call)
    call.inputs["dropout_masks"] = torch.ones_like(masks)
    assert_close(outputs_of(reference, call), without)
    call.inputs["dropout_masks"] = torch.zeros_like(masks)
    gradients = run(reference, call, used=["output"]).gradients
    assert gradients["x"].eq(0).all()


# Attention in the loop, step by step with torch.nn's cells


def scores_of(call: Any, past: Tensor, query: Tensor, row: int) -> Tensor:
    """The scores (S,) of one row with coverage or location, written out position by position."""
    inputs, scores = call.inputs, []
    convolution = inputs["weight_history"]
    for s in range(len(inputs["keys"])):
        hidden = inputs["weight_query"] @ query + inputs["keys"][s, row]
        for j in range(3):
            if 0 <= s + j - 1 < len(past):
                hidden = hidden + convolution[:, j] * past[s + j - 1]
        scores.append(inputs["weight_v"] @ torch.tanh(hidden))
    return torch.stack(scores)


@pytest.mark.parametrize("order", ["luong", "bahdanau"])
@pytest.mark.parametrize("history", ["previous", "cumulative"])
def test_decode_sees_past_weights(history: Any, order: Any) -> None:
    case = DecodeCase(
        score="concat",
        history=history,
        order=order,
        feed="context",
        need_weights=True,
        dtype=torch.float64,
    )
    call = case.call()
    inputs = call.inputs
    steps, batch = inputs["x"].shape[:2]
    cell = torch.nn.LSTMCell(6 + 9, 7, dtype=torch.float64).requires_grad_(False)
    for parameter, value in zip(cell.parameters(), inputs["layers"][0], strict=True):
        parameter.copy_(value)
    (h, c), context, (_, pasts) = inputs["state"]
    h, c, pasts = h[0], c[0], pasts.squeeze(1)
    outputs, all_weights = [], []

    def look(h: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.stack(
            [torch.softmax(scores_of(call, pasts[b], h[b], b), 0) for b in range(batch)]
        )
        return weights, torch.einsum("bs,sbm->bm", weights, inputs["memory"])

    for t in range(steps):
        if order == "bahdanau":
            weights, context = look(h)
        h, c = cell(torch.cat([inputs["x"][t], context], -1), (h, c))
        if order == "luong":
            weights, context = look(h)
        pasts = weights if history == "previous" else pasts + weights
        outputs.append(torch.tanh(torch.cat([context, h], -1) @ inputs["combine"].T))
        all_weights.append(weights)
    actual = outputs_of(reference, call)
    expected = {
        "output": torch.stack(outputs),
        "weights": torch.stack(all_weights),
        "state.hidden[0]": h[None],
        "state.hidden[1]": c[None],
        "state.feed": context,
        "state.attention.weights": pasts.unsqueeze(1),
    }
    assert_close(actual, expected)


@pytest.mark.parametrize("predict", [False, True])
def test_windows_of_a_decoder_are_those_of_its_states(predict: bool) -> None:
    """Each step's weights are those of ``attend`` around the step, or where W_p says."""
    case = DecodeCase(
        sizes=(6, 9, 3, 4, 5, 5, 7),
        lengths="holes",
        window=2,
        predict=predict,
        need_weights=True,
        dtype=torch.float64,
    )
    call = case.call()
    inputs = call.inputs
    weights, state = None, inputs["state"]
    start = state[2][0]
    for t in range(6):
        out = reference.decode(
            **inputs | {"x": inputs["x"][t : t + 1], "state": state}, **call.options
        )
        state, weights = out.state, out.weights
        assert weights is not None
        query = state.hidden[0][-1:]
        if predict:
            expected = reference.attend(
                query,
                inputs["keys"],
                inputs["memory"],
                inputs["lengths"],
                window=2,
                positions=reference.predict_positions(
                    query,
                    inputs["weight_position"],
                    inputs["weight_position_v"],
                    9,
                    inputs["lengths"],
                ),
                need_weights=True,
            ).weights
        else:
            positions = torch.arange(9)
            scores = torch.einsum("ba,sba->bs", query[0], inputs["keys"])
            seen = (positions - (start + t).unsqueeze(1)).abs() <= 2
            seen &= positions < inputs["lengths"].unsqueeze(1)
            expected = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).nan_to_num()[None]
        assert expected is not None
        assert_close({"weights": weights}, {"weights": expected})
        assert state.attention is not None
        assert state.attention.step.tolist() == (start + t + 1).tolist()


def test_coverage_loss_is_what_was_attended_to_before() -> None:
    weights = torch.tensor([[[0.5, 0.5, 0.0]], [[0.2, 0.0, 0.8]], [[0.9, 0.1, 0.0]]])
    # min(0.2, 0.5), then min(0.9, 0.7) + min(0.1, 0.5).
    expected = torch.tensor([[0.0], [0.2], [0.8]])
    assert_close({"loss": reference.coverage_loss(weights)}, {"loss": expected})
    past = torch.tensor([[0.0, 1.0, 0.0]])
    expected = torch.tensor([[0.5], [0.2], [0.8]])
    assert_close({"loss": reference.coverage_loss(weights, past)}, {"loss": expected})
