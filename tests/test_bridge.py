# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.bridge: each kind against its equation, shapes, errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from pyseq.bridge import BRIDGES, Bridge
from pyseq.seq2seq import Seq2Seq
from pyseq.types import START


def bridge(kind: str, cell: str = "gru", *, c_from_h: bool = False, **sizes: int) -> Bridge:
    shape = {"encoder_layers": 2, "encoder_size": 3, "decoder_layers": 2, "decoder_size": 3}
    return Bridge(kind, cell=cell, c_from_h=c_from_h, **{**shape, **sizes}).double()


def state(batch: int = 5) -> Tensor:
    return torch.randn(2, batch, 3, dtype=torch.float64)


def test_copy_hands_the_state_on() -> None:
    h, c = state(), state()
    assert bridge("copy")(h) is h
    assert bridge("copy", "lstm")((h, c)) == (h, c)
    assert list(bridge("copy", "lstm").parameters()) == []


@pytest.mark.parametrize("batch", [5, 0], ids=["B5", "B0"])
@pytest.mark.parametrize("kind", ["linear", "tanh", "relu"])
def test_maps_all_layers_to_all_layers(kind: str, batch: int) -> None:
    module = bridge(kind, "lstm", decoder_layers=3, decoder_size=1)
    h, c = state(batch), state(batch)
    found = module((h, c))
    activation = {"linear": torch.clone, "tanh": torch.tanh, "relu": torch.relu}[kind]
    parameters = ((module.weight_h, module.bias_h), (module.weight_c, module.bias_c))
    for part, given, (weight, bias) in zip(found, (h, c), parameters, strict=True):
        rows = activation(torch.cat(list(given), 1) @ weight.T + bias)
        assert_close({"state": part}, {"state": torch.stack(list(rows.unbind(1))).unsqueeze(2)})
    assert torch.autograd.gradcheck(lambda h, c: module((h, c)), [
        h.requires_grad_(), c.requires_grad_()
    ])  # fmt: skip


def test_c_may_be_made_of_h() -> None:
    module = bridge("tanh", "lstm", decoder_size=4, c_from_h=True)
    h, c = state(5), state(5)
    found = module((h, c))
    again = module((h, torch.full_like(c, 9.0)))
    assert torch.equal(found[1], again[1])
    own = bridge("tanh", "lstm", decoder_size=4)
    own.load_state_dict(module.state_dict())
    assert torch.equal(own((h, h))[1], found[1])
    for kind, cell in (("tanh", "gru"), ("copy", "lstm"), ("zero", "lstm")):
        with pytest.raises(ValueError, match="c_from_h needs an lstm and one of the bridges"):
            bridge(kind, cell, c_from_h=True)


def test_zero_and_learned_do_not_depend_on_the_source() -> None:
    assert not bridge("zero", decoder_size=4)(state()).any()
    module = bridge("learned", decoder_size=4, decoder_layers=1)
    with torch.no_grad():
        assert module.bias_h is not None
        module.bias_h.copy_(torch.arange(4))
    first = module(state())
    assert first.shape == (1, 5, 4)
    assert (first == torch.arange(4)).all()
    first.sum().backward()
    assert module.bias_h.grad is not None
    assert (module.bias_h.grad == 5).all()


@pytest.mark.parametrize("bidirectional", [True, False], ids=["two-way", "one-way"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("kind", [kind for kind in BRIDGES if kind != "copy"])
def test_joins_what_differs(kind: str, cell: str, bidirectional: bool) -> None:
    model = Seq2Seq(
        11,
        9,
        embedding_size=5,
        source_embedding_size=3,
        hidden_size=7,
        num_layers=1,
        encoder_hidden_size=4,
        encoder_num_layers=2,
        bridge=kind,
        cell=cell,
        bidirectional=bidirectional,
        dropout=0.0,
    ).double()
    assert model.encoder.embedding.weight.shape == (11, 3)
    assert model.decoder.embedding.weight.shape == (9, 5)
    source, lengths = torch.randint(4, 11, (3, 5)), torch.tensor([3, 5, 1])
    model(source, lengths, torch.randint(4, 9, (3, 4))).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert model.fused_search() is not None
    for found, row, length in zip(
        model.generate(source, lengths, max_length=6), source, lengths, strict=True
    ):
        target = torch.tensor([[START, *found.tokens]])
        logits = model(row[:length].unsqueeze(0), length.reshape(1), target)
        log_probs = logits.log_softmax(-1)[0]
        expected = log_probs[torch.arange(len(found.tokens)), found.tokens].sum()
        if len(found.tokens) < 6:
            expected = expected + log_probs[-1, 2]
        assert found.score == pytest.approx(expected.item())


@pytest.mark.parametrize("kind", ["zero", "learned"])
def test_a_decoder_that_knows_nothing_of_the_source_warns(kind: str) -> None:
    with pytest.warns(UserWarning, match=f"knows nothing of the source.* '{kind}'") as caught:
        Seq2Seq(11, 9, hidden_size=4, score=None, input_feeding=False, bridge=kind)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Seq2Seq(11, 9, hidden_size=4, bridge=kind)
        Seq2Seq(
            11,
            9,
            hidden_size=4,
            score=None,
            input_feeding=False,
            context_every_step=True,
            bridge=kind,
        )


Call = Callable[[], Any]
ERRORS: dict[str, tuple[Call, type[Exception], str]] = {
    "kind": (lambda: bridge("arch"), ValueError, "bridge must be one of copy.*, got 'arch'"),
    "cell": (lambda: bridge("copy", "mlp"), ValueError, "cell must be one of .* got 'mlp'"),
    "size": (lambda: bridge("zero", decoder_size=0), ValueError, "decoder_size must be .* got 0"),
    "copy": (
        lambda: bridge("copy", decoder_layers=1),
        ValueError,
        "'copy' needs .* the same layers and sizes, got 2 x 3 and 1 x 3; 'linear' or",
    ),
    "shape": (
        lambda: bridge("zero")(torch.zeros(1, 5, 3)),
        RuntimeError,
        r"h of the encoder's state must be \(L, B, H\) = \(2, any, 3\), got \(1, 5, 3\)",
    ),
    "form": (lambda: bridge("zero", "lstm")(state()), ValueError, "must be a pair"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_expected(case: str) -> None:
    call, error, match = ERRORS[case]
    with pytest.raises(error, match=match):
        call()
