# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.recurrent: every cell and option of the layers, in every model."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

import pyseq
from pyseq import nn
from pyseq.bridge import BRIDGES, Bridge
from pyseq.nn import AttentionDecoder
from pyseq.recurrent import LayerOptions
from pyseq.scheduled import Sampling
from pyseq.search import SearchOptions
from pyseq.seq2seq.scanned import ScannedDecoder
from pyseq.types import PAD, START, STATES, STOP

SIZES = {"embedding_size": 6, "hidden_size": 8, "dropout": 0.0}
LENGTHS = torch.tensor([3, 5, 1])
#: By cell, the layer of ``nn`` that it is.
CELLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rnn_tanh": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
    "gru": (nn.GRU, {}),
    "gru_reset_before": (nn.GRU, {"reset_after": False}),
    "lstm": (nn.LSTM, {}),
    "indrnn_tanh": (nn.IndRNN, {"nonlinearity": "tanh"}),
    "indrnn_relu": (nn.IndRNN, {}),
    "slstm_sigmoid": (nn.SLSTM, {}),
    "slstm_exp": (nn.SLSTM, {"forget_gate": "exp"}),
}
#: By name, a cell and the options that its layers are to have.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "peepholes": ("lstm", {"peepholes": True, "forget_bias": 1.0}),
    "normed": ("lstm", {"layer_norm": True, "zoneout_h": 0.1, "zoneout_c": 0.2}),
    "residual": ("gru", {"residual": True, "variational_dropout": 0.2, "weight_dropout": 0.1}),
    "learned": ("rnn_tanh", {"learned_state": True, "recurrent_dropout": 0.3}),
    "heads": ("slstm_exp", {"num_heads": 2, "zoneout_h": 0.1}),
    "recomputed": ("lstm", {"keep_every": 2}),
}
#: Those that a decoder may have.
DECODERS = {
    **{cell: (cell, {}) for cell in CELLS},
    **{name: given for name, given in OPTIONS.items() if name != "learned"},
}


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """The tensors are tiny: more threads would only wait for one another."""
    set_threads(1)


def sources() -> Tensor:
    source = torch.randint(4, 11, (3, 5))
    source[torch.arange(5) >= LENGTHS.unsqueeze(1)] = PAD
    return source


def translating(name: str, **options: Any) -> pyseq.Seq2Seq:
    cell, given = DECODERS[name]
    own: dict[str, Any] = {
        **SIZES,
        "num_layers": 2,
        "input_feeding": False,
        "bidirectional": False,
        "encoder_options": given,
        "decoder_options": LayerOptions(**given),
        **options,
    }
    return pyseq.Seq2Seq(11, 9, cell=cell, **own).double()


@pytest.mark.parametrize("name", [*CELLS, *OPTIONS])
def test_an_encoder_is_the_layers_of_its_cell(name: str) -> None:
    cell, given = OPTIONS.get(name, (name, {}))
    module = pyseq.Tagger(11, 3, cell=cell, num_layers=2, encoder_options=given, **SIZES)
    layer, own = CELLS[cell]
    layers = layer(6, 4, 2, bidirectional=True, **own, **given)
    layers.load_state_dict(module.encoder.rnn.state_dict())
    assert layers.keep_every == module.encoder.rnn.keep_every
    assert type(module.encoder.rnn) is layer
    source = sources()
    torch.manual_seed(3)
    memory, state = module.encoder(source, LENGTHS)
    torch.manual_seed(3)
    expected, _ = layers(module.encoder.embedding(source.t()), lengths=LENGTHS)
    assert torch.equal(memory, expected)
    parts = state if isinstance(state, tuple) else (state,)
    assert [tuple(part.shape) for part in parts] == [(2, 3, 8)] * (1 + len(STATES.get(cell, "")))


@pytest.mark.parametrize("build", [pyseq.Tagger, pyseq.Classifier], ids=["tagger", "classifier"])
@pytest.mark.parametrize("name", [*CELLS, *OPTIONS])
def test_labels_are_learned_with_every_cell(name: str, build: Any, tmp_path: Path) -> None:
    cell, given = OPTIONS.get(name, (name, {}))
    model = build(11, 3, cell=cell, num_layers=2, encoder_options=given, **SIZES)
    labels = torch.randint(3, (3, 5) if build is pyseq.Tagger else (3,))
    model.loss(sources(), LENGTHS, labels).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert model.config["encoder_options"] == given
    pyseq.save(tmp_path, model)
    again = pyseq.load(tmp_path).model
    source = sources()
    assert torch.equal(again(source, LENGTHS), model.eval()(source, LENGTHS))
    assert again.config == model.config


@pytest.mark.parametrize("score", ["general", "concat", None])
@pytest.mark.parametrize("name", DECODERS)
def test_searches_score_what_forward_gives(name: str, score: str | None, tmp_path: Path) -> None:
    model = translating(name, score=score).eval()
    source = sources()
    for options in (SearchOptions(max_length=6), SearchOptions(max_length=6, beam_size=3)):
        for row, (best, *_) in enumerate(model.search(source, LENGTHS, options)):
            target = [*best.tokens, STOP][:6]
            target_in = torch.tensor([[START, *target[:-1]]])
            own = source[row : row + 1, : LENGTHS[row]]
            logits = model(own, LENGTHS[row : row + 1], target_in)
            log_probs = torch.log_softmax(logits[0], -1)
            score_of = log_probs[range(len(target)), target].sum()
            assert_close(
                {"score": score_of}, {"score": torch.tensor(best.score, dtype=torch.float64)}
            )
    pyseq.save(tmp_path, model)
    again = pyseq.load(tmp_path).model
    assert isinstance(again, pyseq.Seq2Seq)
    target_in = torch.randint(4, 9, (3, 4))
    assert torch.equal(again(source, LENGTHS, target_in), model(source, LENGTHS, target_in))


@pytest.mark.parametrize("name", DECODERS)
def test_every_parameter_of_a_model_gets_a_gradient(name: str) -> None:
    model = translating(name, dropout=0.2)
    target = torch.randint(4, 9, (3, 4))
    model.loss(sources(), LENGTHS, target, target).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_scheduled_sampling_drops_the_same_at_every_step() -> None:
    """What is chosen step by step is what the whole pass over the choices finds likeliest."""
    options = {"variational_dropout": 0.4, "recurrent_dropout": 0.3, "weight_dropout": 0.2}
    model = translating("lstm", dropout=0.3, decoder_options=options | {"zoneout_h": 0.3})
    decoder, source = model.decoder, sources()
    memory, hidden = model.encoder(source, LENGTHS)
    given: dict[str, Any] = {"lengths": LENGTHS, "state": (model.bridge(hidden), None)}
    target_in = torch.randint(4, 9, (3, 6))
    masks = decoder._draw_masks(target_in)
    fed = decoder.scheduled_inputs(target_in, memory, Sampling(0.0), masks=masks, **given)
    likeliest, _, _ = decoder._hidden(fed, memory, masks=masks, **given)
    assert torch.equal(decoder.output(likeliest).argmax(2).t()[:, :-1], fed[:, 1:])
    others = [decoder.scheduled_inputs(target_in, memory, Sampling(0.0), **given) for _ in range(5)]
    assert not all(torch.equal(each, fed) for each in others)


@pytest.mark.parametrize("window", [None, "local-p"])
def test_scanned_decoders_pickled_before_there_were_histories_still_work(
    window: str | None,
) -> None:
    module = translating("gru_reset_before", window=window).decoder.rnn
    assert isinstance(module, ScannedDecoder)
    x, memory = torch.randn(4, 3, module.input_size), torch.randn(5, 3, module.memory_size)
    x, memory = x.double(), memory.double()
    expected = module(x, memory).output
    for name in ("window", "history"):
        del vars(module)[name]
    assert torch.equal(pickle.loads(pickle.dumps(module))(x, memory).output, expected)


def test_what_a_scanned_decoder_does_not_read_is_checked() -> None:
    decoder = translating("gru_reset_before", num_layers=1, score=None).decoder.rnn
    x = torch.randn(4, 3, decoder.input_size, dtype=torch.float64)
    hidden = x.new_zeros(1, 3, decoder.hidden_size)
    expected = decoder(x, state=(hidden, None)).output
    assert torch.equal(decoder(x, state=(hidden, hidden[0])).output, expected)
    with pytest.raises(RuntimeError, match=r"state.feed must be \(B, H\) = \(3, .*got \(2, 7\)"):
        decoder(x, state=(hidden, x.new_zeros(2, 7)))
    with pytest.raises(TypeError, match="masks must be what draw_masks gave, got Tensor"):
        decoder(x, state=(hidden, None), dropout_masks=x.new_ones(0, 4, 3, 8))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": 2},
        {"window": "local-m", "window_size": 1},
        {"window": "local-p", "window_size": 2},
        {"score": "location", "max_positions": 7},
        {"score": "location", "max_positions": 3, "window": "local-p", "window_size": 2},
        {"score": "concat", "history": "previous", "history_size": 3},
        {
            "score": "concat",
            "history": "cumulative",
            "history_size": 1,
            "heads": 2,
            "window": "local-m",
        },
    ],
    ids=[
        "global",
        "heads",
        "local-m",
        "local-p",
        "location",
        "local-p-location",
        "location-sensitive",
        "coverage",
    ],
)
@pytest.mark.parametrize("cell", ["rnn_relu", "gru", "lstm"])
def test_what_attends_afterwards_is_what_attends_in_between(
    cell: str, options: dict[str, Any]
) -> None:
    """Without feeding, the fused decoder and the layers with attention on top are one model."""
    common = {"cell": cell, "input_feeding": False, "num_layers": 2, **options}
    one = pyseq.Seq2Seq(11, 9, **SIZES, **common).double()
    other = pyseq.Seq2Seq(11, 9, **SIZES, **common, decoder_options={"keep_every": 2}).double()
    assert isinstance(one.decoder.rnn, AttentionDecoder)
    assert isinstance(other.decoder.rnn, ScannedDecoder)
    weights = {
        name.replace("decoder.rnn.weight_", "decoder.rnn.layers.weight_").replace(
            "decoder.rnn.bias_", "decoder.rnn.layers.bias_"
        ): value
        for name, value in one.state_dict().items()
    }
    other.load_state_dict(weights)
    source, target = sources(), torch.randint(4, 9, (3, 4))
    found = []
    for model in (one, other):
        loss = model.loss(source, LENGTHS, target, target)
        (gradient,) = torch.autograd.grad(loss, [model.encoder.embedding.weight])
        found.append({"loss": loss.detach(), "gradient": gradient})
    assert_close(found[1], found[0])
    results = [
        model.eval().generate(source, LENGTHS, max_length=5, beam_size=2) for model in (one, other)
    ]
    assert [h.tokens for h in results[0]] == [h.tokens for h in results[1]]
    assert [h.score for h in results[0]] == pytest.approx([h.score for h in results[1]])


def test_forget_bias_goes_with_input_feeding() -> None:
    model = pyseq.Seq2Seq(11, 9, **SIZES, decoder_options={"forget_bias": 2.0})
    rnn = model.decoder.rnn
    assert isinstance(rnn, AttentionDecoder)
    assert repr(rnn).startswith(
        "AttentionDecoder(\n  6, 8, 8, 1, cell='lstm', input_feeding=True, forget_bias=2.0\n"
    )
    for _ in range(2):
        (layer,) = rnn.layer_weights()
        assert layer.b_ih is not None
        assert layer.b_hh is not None
        assert (layer.b_ih[8:16] == 2).all()
        assert (layer.b_hh[8:16] == 0).all()
        assert (layer.b_ih[:8] != 2).all()
        rnn.reset_parameters()


def test_an_option_that_a_cell_lacks_is_refused_as_such() -> None:
    """Not with the advice to leave out input feeding, which would not help."""
    with pytest.raises(ValueError, match=r"^forget_bias is no option of layers of gru, got 2\.0$"):
        pyseq.Seq2Seq(11, 9, cell="gru", decoder_options={"forget_bias": 2.0})
    with pytest.raises(ValueError, match="forget_bias goes with the cell 'lstm', got 'gru'"):
        AttentionDecoder(3, 4, 4, cell="gru", forget_bias=2.0)


def test_repr_shows_how_a_model_differs() -> None:
    model = pyseq.Seq2Seq(
        11,
        9,
        **SIZES,
        input_feeding=False,
        decoder_options={"keep_every": 2},
        window="local-m",
        bridge="tanh",
        bridge_c_from_h=True,
        memory_bias=True,
    )
    assert "ScannedDecoder(\n      window='local-m', window_size=10\n" in repr(model)
    assert "c_from_h=True)" in repr(model)
    assert "constant=True" in repr(model)
    classifier = pyseq.Classifier(11, 3, pooling="max")
    assert "Classifier(\n  pooling='max'\n" in repr(classifier)
    assert "dropout=0.1" in repr(classifier)


@pytest.mark.parametrize("kind", BRIDGES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("encoder_cell", ["gru", "lstm", "slstm_exp"])
def test_bridges_lead_from_any_cell_to_any(encoder_cell: str, cell: str, kind: str) -> None:
    sizes = {"encoder_layers": 2, "encoder_size": 3, "decoder_layers": 2, "decoder_size": 3}
    module = Bridge(kind, cell=cell, encoder_cell=encoder_cell, **sizes).double()
    parts = tuple(
        torch.randn(2, 4, 3, dtype=torch.float64)
        for _ in range(1 + len(STATES.get(encoder_cell, "")))
    )
    result = module(parts[0] if len(parts) == 1 else parts)
    found = result if isinstance(result, tuple) else (result,)
    assert [part.shape for part in found] == [(2, 4, 3)] * (1 + len(STATES.get(cell, "")))
    if kind == "copy":
        assert torch.equal(found[0], parts[0])
        same = STATES.get(cell) == STATES.get(encoder_cell)
        for index, part in enumerate(found[1:], 1):
            assert torch.equal(part, parts[index] if same else torch.zeros_like(part))
    elif cell.startswith("slstm"):  # which starts with an empty memory
        assert not any(part.any() for part in found[1:])


def test_an_encoder_may_have_a_cell_of_its_own() -> None:
    model = pyseq.Seq2Seq(11, 9, **SIZES, cell="gru", encoder_cell="slstm")
    assert model.config["encoder_cell"] == "slstm_sigmoid"
    assert isinstance(model.encoder.rnn, nn.SLSTM)
    assert isinstance(model.decoder.rnn, AttentionDecoder)
    again = pyseq.Seq2Seq(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    data = sources(), LENGTHS, torch.randint(4, 9, (3, 4))
    assert torch.equal(again.eval()(*data), model.eval()(*data))


def test_options_are_written_as_text() -> None:
    assert LayerOptions.parse("") == LayerOptions()
    parsed = LayerOptions.parse("layer_norm, zoneout-h=0.1,keep_every=4")
    assert parsed == LayerOptions(layer_norm=True, zoneout_h=0.1, keep_every=4)
    assert LayerOptions.of(parsed.changed()) == parsed


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "cell": (lambda: pyseq.Tagger(9, 2, cell="lstn"), "cell must be one of rnn_tanh, .* 'lstn'"),
    "option": (
        lambda: pyseq.Tagger(9, 2, encoder_options={"zoneout": 0.1}),  # type: ignore[arg-type]
        "the options of layers must be among residual, .* got 'zoneout'",
    ),
    "not-of-this-cell": (
        lambda: pyseq.Tagger(9, 2, cell="gru", encoder_options=LayerOptions(zoneout_c=0.1)),
        "zoneout_c is no option of layers of gru, got 0.1",
    ),
    "range": (
        lambda: pyseq.Tagger(9, 2, encoder_options=LayerOptions(zoneout_h=2)),
        r"zoneout_h must be a probability in \[0, 1\], got 2",
    ),
    "keep-every": (lambda: LayerOptions(keep_every=0), "keep_every must be a positive integer"),
    "heads": (lambda: LayerOptions(num_heads=0), "num_heads must be a positive integer, got 0"),
    "switch": (
        lambda: LayerOptions(residual=1),  # type: ignore[arg-type]
        "residual must be True or False, got 1",
    ),
    "forget-text": (
        lambda: LayerOptions(forget_bias="x"),  # type: ignore[arg-type]
        "forget_bias must be a finite number, got 'x'",
    ),
    "forget-nan": (
        lambda: LayerOptions(forget_bias=float("nan")),
        "forget_bias must be a finite number, got nan",
    ),
    "dropout": (
        lambda: pyseq.Tagger(9, 2, dropout=1.5),
        r"dropout must be a probability in \[0, 1\], got 1.5",
    ),
    "feeding-cell": (
        lambda: pyseq.Seq2Seq(9, 9, cell="indrnn"),
        "input_feeding goes with a decoder of the cells .* got cell 'indrnn_relu'",
    ),
    "feeding-options": (
        lambda: pyseq.Seq2Seq(9, 9, decoder_options=LayerOptions(layer_norm=True)),
        "input_feeding goes with .* {'layer_norm': True}: pass input_feeding=False",
    ),
    "order": (
        lambda: translating("slstm_exp", score="concat", order="bahdanau"),
        "a decoder with the cell slstm_exp attends after its layers",
    ),
    "learned": (
        lambda: pyseq.Seq2Seq(
            9, 9, input_feeding=False, decoder_options=LayerOptions(learned_state=True)
        ),
        "learned_state is no option of a decoder.* the bridge 'learned'",
    ),
    "text-name": (lambda: LayerOptions.parse("zoneout=0.1"), "must be among .* got 'zoneout'"),
    "text-number": (
        lambda: LayerOptions.parse("zoneout_h=much"),
        "zoneout_h must be written zoneout_h=NUMBER, got 'zoneout_h=much'",
    ),
    "text-switch": (
        lambda: LayerOptions.parse("layer_norm=no"),
        "layer_norm is on where it is named, without a value: got 'layer_norm=no'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()
