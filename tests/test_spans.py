# SPDX-License-Identifier: Apache-2.0
"""Where local-p looks with the score location: ``p_t = S sigmoid(...)``, where S counts the
positions of the row that may have a weight, in decoders and in attention modules alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

import pyseq
from pyseq import functional, nn, reference
from pyseq.types import START

T, B, S, H, D = 3, 4, 9, 5, 2
LENGTHS = torch.tensor([9, 6, 2, 0])
#: Rows of the location's matrix: fewer than the positions of the memory, as many, and more.
ROWS = pytest.mark.parametrize("rows", [1, 4, S, S + 2], ids="R{}".format)
RAGGED = pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "ragged"])


def spans(rows: int, lengths: Tensor | None) -> Tensor:
    """The S of each row."""
    return (torch.full((B,), S) if lengths is None else lengths).clamp(max=rows)


def decoder_inputs(rows: int) -> dict[str, Tensor]:
    sizes = {
        "x": (T, B, 2),
        "w_ih": (H, 2),
        "w_hh": (H, H),
        "memory": (S, B, H),
        "combine": (H, 2 * H),
        "weight": (rows, H),
        "weight_position": (2, H),
        "weight_position_v": (2,),
    }
    return {
        name: torch.randn(size, dtype=torch.float64).requires_grad_()
        for name, size in sizes.items()
    }


def decoded(decode: Any, given: dict[str, Tensor], lengths: Tensor | None) -> dict[str, Tensor]:
    """Output, weights, and the gradients of all that is given."""
    result = decode(
        given["x"],
        [(given["w_ih"], given["w_hh"])],
        None,
        given["memory"],
        given["combine"],
        cell="rnn_tanh",
        score="location",
        weight=given["weight"],
        weight_position=given["weight_position"],
        weight_position_v=given["weight_position_v"],
        lengths=lengths,
        input_feeding=False,
        window=D,
        need_weights=True,
    )
    scale = torch.arange(1, 1 + T, dtype=torch.float64).view(-1, 1, 1)
    gradients = torch.autograd.grad((result.output * scale).sum(), list(given.values()))
    return {
        "output": result.output,
        "weights": result.weights,
        **dict(zip(given, gradients, strict=True)),
    }


@RAGGED
@ROWS
def test_the_operator_is_the_reference(rows: int, lengths: Tensor | None) -> None:
    given = decoder_inputs(rows)
    actual, expected = (decoded(each.decode, given, lengths) for each in (functional, reference))
    assert_close(actual, expected)
    assert actual["weight_position"].abs().sum() > 0


@ROWS
def test_positions_are_a_share_of_what_may_have_a_weight(rows: int) -> None:
    """With v = 0 the share is one half: p = S / 2, and seen is what is within D of it."""
    zero = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    given = decoder_inputs(rows) | {"weight_position_v": zero}
    weights = decoded(reference.decode, given, LENGTHS)["weights"]
    own = spans(rows, LENGTHS).unsqueeze(1)
    positions = torch.arange(S)
    seen = ((positions - own / 2).abs() <= D) & (positions < own)
    assert weights.ne(0).equal(seen.expand(T, -1, -1))


@RAGGED
@ROWS
def test_attention_is_the_reference_around_these_positions(
    rows: int, lengths: Tensor | None
) -> None:
    kind: dict[str, Any] = {"dtype": torch.float64}
    module = nn.Attention(
        H, H, score="location", max_positions=rows, window="local-p", window_size=D, **kind
    )
    query = torch.randn(T, B, H, requires_grad=True, **kind)
    memory = torch.randn(S, B, H, requires_grad=True, **kind)
    leaves = {"query": query, "memory": memory, **dict(module.named_parameters())}
    own = module.positions
    assert own is not None
    expected = reference.attend(
        query,
        None,
        memory,
        lengths,
        score="location",
        weight=module.score.weight,
        window=D,
        positions=reference.predict_positions(
            query, own.weight, own.weight_v, S, spans(rows, lengths)
        ),
        need_weights=True,
    )
    found = []
    for context, weights in (module(query, memory, lengths, need_weights=True), expected):
        gradients = torch.autograd.grad((context * context).sum(), list(leaves.values()))
        found.append(
            {"context": context, "weights": weights, **dict(zip(leaves, gradients, strict=True))}
        )
    assert_close(found[0], found[1])
    assert found[0]["positions.weight_v"].abs().sum() > 0


@RAGGED
@ROWS
def test_attention_and_decoders_look_at_the_same(rows: int, lengths: Tensor | None) -> None:
    """The attention of a decoder, given the states that ask."""
    options: dict[str, Any] = {"score": "location", "max_positions": rows, "window": "local-p"}
    options |= {"window_size": D, "dtype": torch.float64}
    decoder = nn.AttentionDecoder(2, H, H, 1, cell="gru", input_feeding=False, **options)
    attention = nn.Attention(H, H, **options)
    shared = attention.state_dict().keys()
    weights = {name: value for name, value in decoder.state_dict().items() if name in shared}
    attention.load_state_dict(weights)
    x = torch.randn(T, B, 2, dtype=torch.float64)
    memory = torch.randn(S, B, H, dtype=torch.float64)
    (layer,) = decoder.layer_weights()
    states = reference.scan(x, *layer, cell="gru").output
    _, expected = attention(states, memory, lengths, need_weights=True)
    found = decoder(x, memory, lengths=lengths, need_weights=True)
    assert_close({"weights": found.weights}, {"weights": expected})


@pytest.mark.parametrize("options", [{}, {"keep_every": 2}], ids=["fused", "scanned"])
def test_searches_look_where_training_does(options: Any) -> None:
    """The weights of a search are those of its tokens with teacher forcing."""
    model = pyseq.Seq2Seq(
        *(11, 9),
        embedding_size=4,
        hidden_size=6,
        score="location",
        max_positions=3,
        window="local-p",
        window_size=1,
        input_feeding=False,
        decoder_options=options,
    ).eval()
    source, lengths = torch.randint(4, 11, (3, 7)), torch.tensor([7, 5, 2])
    found = model.generate(source, lengths, max_length=4, beam_size=2)
    rows = [torch.tensor([START, *each.tokens]) for each in found]
    memory, hidden = model.encoder(source, lengths)
    _, expected = model.decoder(
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        memory,
        lengths=lengths,
        state=(model.bridge(hidden), None),
        need_weights=True,
    )
    for row, each in enumerate(found):
        assert each.weights is not None
        assert each.weights.any()
        own = expected.weights[: len(each.weights), row, : lengths[row]]
        assert_close({"weights": each.weights}, {"weights": own})
