# SPDX-License-Identifier: Apache-2.0
"""Seq2Seq: its parts, what padding may not change, and that it learns."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pyseq.seq2seq import Encoder, Seq2Seq
from pyseq.types import PAD, START, STOP

SIZES = {"embedding_size": 6, "hidden_size": 8}
CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")
SCORES = ("dot", "general", "concat", None)
LENGTHS = torch.tensor([3, 5, 1])


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """The tensors are tiny: more threads would only wait for one another."""
    set_threads(1)


def model(**options: Any) -> Seq2Seq:
    return Seq2Seq(11, 9, **{**SIZES, **options})


def batch() -> tuple[Tensor, Tensor, Tensor]:
    source = torch.randint(4, 11, (3, 5))
    source[torch.arange(5) >= LENGTHS.to(source).unsqueeze(1)] = PAD
    return source, LENGTHS, torch.randint(4, 9, (3, 4))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("bidirectional", [True, False], ids=["two-way", "one-way"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("cell", CELLS)
def test_every_parameter_gets_a_gradient(cell: str, score: str | None, bidirectional: bool) -> None:
    module = model(cell=cell, score=score, bidirectional=bidirectional, num_layers=2)
    logits = module(*batch())
    assert logits.shape == (3, 4, 9)
    assert logits.is_contiguous()
    logits.logsumexp(-1).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if cell != "rnn_relu":  # whose units may all be off
            assert parameter.grad.abs().sum() > 0, name


def test_defaults_and_shapes() -> None:
    module = Seq2Seq(11, 9)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert shapes["encoder.embedding.weight"] == (11, 256)
    assert shapes["encoder.rnn.weight_hh_l0_reverse"] == (512, 128)
    assert shapes["decoder.embedding.weight"] == (9, 256)
    assert shapes["decoder.rnn.weight_ih_l0"] == (1024, 512)
    assert shapes["decoder.rnn.score.weight"] == (256, 256)
    assert shapes["decoder.rnn.combine.weight"] == (256, 512)
    assert shapes["decoder.output.weight"] == (9, 256)
    assert module.encoder.embedding.weight[PAD].eq(0).all()


def test_config_rebuilds_the_model() -> None:
    options = {
        "embedding_size": 5,
        "hidden_size": 7,
        "num_layers": 2,
        "cell": "gru",
        "bidirectional": False,
        "score": None,
        "input_feeding": False,
        "dropout": 0.3,
    }
    first = Seq2Seq(11, 9, **options)  # type: ignore[arg-type]
    given = {"source_vocab_size": 11, "target_vocab_size": 9, **options}
    assert given.items() <= first.config.items()
    assert first.config.keys() | {"device", "dtype"} == inspect.signature(Seq2Seq).parameters.keys()
    second = Seq2Seq(**json.loads(json.dumps(first.config)))
    second.load_state_dict(first.state_dict())
    data = batch()
    assert torch.equal(first.eval()(*data), second.eval()(*data))
    first.config["dropout"] = 9  # a copy
    assert first.config["dropout"] == 0.3


PLACED: dict[str, dict[str, Any]] = {
    "plain": {},
    "copying": {"copy": "pointer", "bridge": "tanh", "source_features": 3},
    "told": {"source_extra_size": 2, "target_extra_size": 2, "extra_mode": "mlp"},
    "told-deep": {"source_extra_size": 2, "extra_mode": "mlp", "extra_hidden_size": 3},
    "attentive": {"score": "concat", "window": "local-p", "bridge": "learned"},
}


@pytest.mark.parametrize("name", PLACED)
def test_every_parameter_is_made_where_and_as_what_it_is_told(name: str) -> None:
    options = PLACED[name]
    sizes = {**SIZES, **options}
    vocab = None if "source_features" in options else 11
    doubled = Seq2Seq(vocab, 9, **sizes, dtype=torch.float64)
    assert {each.dtype for each in doubled.parameters()} == {torch.float64}
    nowhere = Seq2Seq(vocab, 9, **sizes, device="meta")
    assert {each.device.type for each in nowhere.parameters()} == {"meta"}
    assert nowhere.config == doubled.config == Seq2Seq(vocab, 9, **sizes).config


#: What pyseq 0.1.0 knew, of which modules were pickled whole.
FIRST_CONFIG = (
    "source_vocab_size",
    "target_vocab_size",
    "embedding_size",
    "hidden_size",
    "num_layers",
    "cell",
    "bidirectional",
    "score",
    "input_feeding",
    "dropout",
)
LATER: dict[str, tuple[str, ...]] = {
    "Encoder": ("cell", "extra", "extra_at_input", "constant"),
    "Decoder": ("context_size", "extra", "extra_at_input", "copying", "coverage_loss"),
    "AttentionDecoder": (
        "order",
        "feed",
        "fed_size",
        "window",
        "window_size",
        "history",
        "positions",
    ),
    "Score": ("heads", "weight_history"),
}


@pytest.mark.parametrize("score", ["general", "concat", None])
def test_modules_pickled_by_the_first_version_still_work(score: str | None) -> None:
    module = model(score=score, num_layers=2).eval()
    data = batch()
    expected = module(*data)
    again = copy.deepcopy(module)
    vars(again)["_config"] = {name: again.config[name] for name in FIRST_CONFIG}
    del again._modules["bridge"]
    for part in again.modules():
        for name in LATER.get(type(part).__name__, ()):
            for names in (vars(part), part._parameters):
                names.pop(name, None)
    loaded = pickle.loads(pickle.dumps(again))
    assert torch.equal(loaded(*data), expected)
    assert loaded.config == module.config
    found = loaded.generate(*data[:2], max_length=4, beam_size=2)
    assert found[0].tokens == module.generate(*data[:2], max_length=4, beam_size=2)[0].tokens


def test_an_unknown_option_is_refused_by_its_name() -> None:
    message = r"^Seq2Seq\.__init__\(\) got an unexpected keyword argument 'hiden_size'"
    with pytest.raises(TypeError, match=message):
        Seq2Seq(11, 9, hiden_size=4)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        Seq2Seq(11)  # type: ignore[call-arg]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("bidirectional", [True, False], ids=["two-way", "one-way"])
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_encoder_is_torchs_on_packed_rows(kind: str, bidirectional: bool) -> None:
    encoder = Encoder(
        11, **SIZES, num_layers=2, cell=kind.lower(), bidirectional=bidirectional
    ).double()
    size = 4 if bidirectional else 8
    theirs = getattr(torch.nn, kind)(6, size, 2, bidirectional=bidirectional, dtype=torch.float64)
    theirs.load_state_dict(encoder.rnn.state_dict())
    source, lengths, _ = batch()
    memory, state = encoder(source, lengths)
    packed = pack_padded_sequence(encoder.embedding(source.t()), lengths, enforce_sorted=False)
    output, last = theirs(packed)
    actual, expected = {"memory": memory}, {"memory": pad_packed_sequence(output)[0]}
    parts = (state, last) if kind == "LSTM" else ((state,), (last,))
    for i, (ours, other) in enumerate(zip(*parts, strict=True)):
        rows = other.reshape(2, -1, 3, size)  # layer, direction, row
        actual[str(i)], expected[str(i)] = ours, rows.transpose(1, 2).reshape(2, 3, 8)
    assert_close(actual, expected)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("score", SCORES)
def test_padding_changes_nothing(score: str | None) -> None:
    module = model(score=score, cell="gru", num_layers=2).double().eval()
    source, lengths, target_in = batch()
    expected = module(source, lengths, target_in)
    # Other ids in the padding, more of it, and rows of their own.
    noisy = torch.cat([source, torch.full((3, 2), PAD)], 1)
    noisy[torch.arange(7) >= lengths.to(noisy).unsqueeze(1)] = 10
    assert_close({"y": module(noisy, lengths, target_in)}, {"y": expected})
    for row, length in enumerate(lengths.tolist()):
        here = slice(row, row + 1)
        alone = module(source[here, :length], lengths[here], target_in[here])
        assert_close({"y": alone}, {"y": expected[here]})


def test_no_prediction_sees_its_own_token_or_later_ones() -> None:
    module = model().double().eval()
    source, lengths, target_in = batch()
    before = module(source, lengths, target_in)
    target_in[:, 2:] = STOP
    after = module(source, lengths, target_in)
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2], after[:, 2])


def test_dropout_in_training_only() -> None:
    module, data = model(dropout=0.5), batch()
    assert not torch.equal(module(*data), module(*data))
    module.eval()
    assert torch.equal(module(*data), module(*data))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_cross_entropy_of_the_logits(smoothing: float) -> None:
    module = model(dropout=0.4).double()
    source, lengths, target_in = batch()
    target_out = torch.randint(PAD + 1, 9, target_in.shape)
    target_out[0, 1:] = PAD
    parameters = list(module.parameters())

    def gradients(loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    torch.manual_seed(3)
    actual = gradients(
        module.loss(source, lengths, target_in, target_out, label_smoothing=smoothing)
    )
    torch.manual_seed(3)  # the same dropout
    logits = module(source, lengths, target_in)
    expected = gradients(
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1),
            target_out.flatten(),
            ignore_index=PAD,
            label_smoothing=smoothing,
        )
    )
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("score", ["general", "concat"])
def test_memory_bias_is_a_bias_of_keys_and_combination(score: str) -> None:
    options = {"embedding_size": 4, "hidden_size": 6, "score": score, "dropout": 0.0}
    model = Seq2Seq(9, 8, memory_bias=True, **options)  # type: ignore[arg-type]
    source, lengths = torch.randint(4, 9, (2, 5)), torch.tensor([5, 3])
    memory, _ = model.encoder(source, lengths)
    assert memory.shape == (5, 2, 7)
    assert memory[:, :, 6].t().tolist() == [[1.0] * 5, [1.0, 1.0, 1.0, 0.0, 0.0]]
    # Keys that all move by the same bias leave the weights of general attention alone; the
    # combination's bias moves every output.
    plain = Seq2Seq(9, 8, **options)  # type: ignore[arg-type]
    state = model.state_dict()
    keys = f"decoder.rnn.score.{'weight' if score == 'general' else 'weight_memory'}"
    for name in (keys, "decoder.rnn.combine.weight"):
        column = state[name].new_ones(state[name].shape[1], dtype=torch.bool)
        column[6] = False
        state[name] = state[name][:, column]
    plain.load_state_dict(state)
    target = torch.randint(4, 8, (2, 4))
    assert not torch.allclose(model(source, lengths, target), plain(source, lengths, target))
    with torch.no_grad():
        model.decoder.rnn.combine.weight[:, 6] = 0.0
        if score == "concat":
            model.decoder.rnn.score.weight_memory[:, 6] = 0.0
    torch.testing.assert_close(model(source, lengths, target), plain(source, lengths, target))
    with pytest.raises(ValueError, match="score 'dot' needs the query as long as the memory"):
        Seq2Seq(9, 8, memory_bias=True, score="dot")


def test_tied_embeddings_are_one_matrix() -> None:
    module = model(embedding_size=8, tie_embeddings=True, dropout=0.0).double()
    table = module.decoder.embedding.weight
    assert module.decoder.output.weight is table
    assert sum(p is table for p in module.parameters()) == 1
    assert not table[PAD].any()
    source, lengths, target_in = batch()
    loss = module.loss(source, lengths, target_in, target_in)
    (both,) = torch.autograd.grad(loss, [table], retain_graph=True)
    # The same numbers, untied: their gradients add up.
    untied = model(embedding_size=8, dropout=0.0).double()
    untied.load_state_dict(module.state_dict())
    parts = [untied.decoder.embedding.weight, untied.decoder.output.weight]
    found = torch.autograd.grad(untied.loss(source, lengths, target_in, target_in), parts)
    assert_close({"gradient": both}, {"gradient": found[0] + found[1]})


def test_a_frozen_tied_matrix_lets_the_rest_learn() -> None:
    module = model(embedding_size=8, tie_embeddings=True)
    table = module.decoder.embedding.weight.requires_grad_(False)
    source, lengths, target_in = batch()
    module.loss(source, lengths, target_in, target_in).backward()
    assert table.grad is None
    assert module.decoder.output.bias.grad is not None
    assert module.encoder.embedding.weight.grad is not None


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_features_are_mapped_like_the_rows_of_a_table(cell: str) -> None:
    tokens = model(cell=cell, dropout=0.0).double()
    module = Seq2Seq(None, 9, **SIZES, cell=cell, dropout=0.0, source_features=11).double()
    state = dict(tokens.state_dict())
    # One-hot features times the table are the rows that the tokens look up.
    state["encoder.embedding.weight"] = state["encoder.embedding.weight"].T
    state["encoder.embedding.bias"] = torch.zeros(6, dtype=torch.float64)
    module.load_state_dict(state)
    source, lengths, target_in = batch()
    features = torch.nn.functional.one_hot(source, 11).double()
    # What lies in the padding must reach neither values nor gradients.
    features[torch.arange(5) >= lengths.unsqueeze(1)] = torch.nan
    features.requires_grad_()
    expected = tokens(source, lengths, target_in)
    logits = module(features, lengths, target_in)
    assert_close({"logits": logits}, {"logits": expected})
    logits.logsumexp(-1).sum().backward()
    for name, parameter in [("features", features), *module.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    found = module.generate(features.detach(), lengths, max_length=5, beam_size=2)
    same = tokens.generate(source, lengths, max_length=5, beam_size=2)
    assert [each.tokens for each in found] == [each.tokens for each in same]


Call = Callable[[], object]
ERRORS: dict[str, tuple[Call, type[Exception], str]] = {
    "odd": (lambda: model(hidden_size=7), ValueError, "hidden_size must be even .* got 7"),
    "cell": (lambda: model(cell="mlp"), ValueError, "cell must be one of .* got 'mlp'"),
    "score": (lambda: model(score="cos"), ValueError, "score must be one of .* got 'cos'"),
    "dropout": (lambda: model(dropout=-0.1), ValueError, "dropout must be .* got -0.1"),
    "vocabulary": (lambda: Seq2Seq(3, 9), ValueError, "source_vocab_size must be .* got 3"),
    "embedding": (lambda: model(embedding_size=0), ValueError, "embedding_size .* got 0"),
    "layers": (lambda: model(num_layers=0), ValueError, "num_layers must be .* got 0"),
    "half-layers": (lambda: model(num_layers=1.5), ValueError, "num_layers must be .* got 1.5"),
    "true-layers": (lambda: model(num_layers=True), ValueError, "num_layers must be .* got True"),
    "half-size": (lambda: model(hidden_size=8.0), ValueError, "hidden_size must be .* got 8.0"),
    "vocabulary-type": (lambda: Seq2Seq(11, "9"), ValueError, "target_vocab_size must .* got '9'"),  # type: ignore[arg-type]
    "coverage-loss": (
        lambda: model(coverage_loss="x"),
        ValueError,
        "coverage_loss must be a finite number, got 'x'",
    ),
    "sampling": (
        lambda: model().loss(batch()[0], LENGTHS, *batch()[2:] * 2, sampling=0.5),  # type: ignore[arg-type]
        TypeError,
        "sampling must be a Sampling, got float",
    ),
    "no-options": (
        lambda: model(encoder_options=None),
        TypeError,
        "must be a LayerOptions or a mapping of their names, got None",
    ),
    "tie": (
        lambda: model(tie_embeddings=True),
        ValueError,
        "tie_embeddings needs a target embedding of hidden_size numbers.*: 8, got 6",
    ),
    "no-source": (
        lambda: Seq2Seq(None, 9),
        ValueError,
        "exactly one of .* must be given, got None and None",
    ),
    "two-sources": (
        lambda: model(source_features=3),
        ValueError,
        "exactly one of .* must be given, got 11 and 3",
    ),
    "features": (
        lambda: Seq2Seq(None, 9, source_features=0),
        ValueError,
        "features must be a positive integer, got 0",
    ),
    "features-dims": (
        lambda: Seq2Seq(None, 9, source_features=3)(torch.ones(1, 2), LENGTHS[:1], LENGTHS[None]),
        RuntimeError,
        r"source must be \(B, S, D\) = \(any, any, 3\), got \(1, 2\)",
    ),
    "features-dtype": (
        lambda: Seq2Seq(None, 9, source_features=3)(
            torch.ones(1, 2, 3, dtype=torch.float64), LENGTHS[:1], LENGTHS[None]
        ),
        RuntimeError,
        "source must have the dtype of the encoder's weights, torch.float32, got torch.float64",
    ),
    "source-dims": (
        lambda: model()(torch.tensor([4, 5]), torch.tensor([2]), torch.tensor([[START]])),
        RuntimeError,
        r"source must be 2-D .* got \(2,\)",
    ),
    "target-dims": (
        lambda: model()(batch()[0], LENGTHS, torch.full((3,), START)),
        RuntimeError,
        "target_in must be 2-D",
    ),
    "batches": (
        lambda: model()(batch()[0], LENGTHS, torch.tensor([[START]])),
        RuntimeError,
        "target_in must have one row for each of the 3 sources, got 1",
    ),
    "loss-batches": (
        lambda: model().loss(batch()[0], LENGTHS, *[torch.tensor([[START]])] * 2),
        RuntimeError,
        "target_in must have one row for each of the 3 sources, got 1",
    ),
    "target-out": (
        lambda: model().loss(*batch(), torch.tensor([[START]])),
        RuntimeError,
        r"target_out must be \(B, T\) = .*, got \(1, 1\)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_expected(case: str) -> None:
    call, error, match = ERRORS[case]
    with pytest.raises(error, match=match):
        call()


def reversal_batch(
    size: int, longest: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random sources (B, S), their lengths, and targets (B, S + 1): reversed, then <stop>."""
    lengths = torch.randint(1, longest + 1, (size,), generator=generator)
    source = torch.randint(4, 10, (size, longest), generator=generator)
    steps = torch.arange(longest + 1)
    source[steps[:-1] >= lengths.unsqueeze(1)] = PAD
    target = torch.full((size, longest + 1), PAD)
    places = lengths.unsqueeze(1) - 1 - steps
    target = source.gather(1, places.clamp(min=0)[:, :longest])
    target = torch.cat([target, torch.full((size, 1), PAD)], 1).masked_fill(places < 0, PAD)
    target[torch.arange(size), lengths] = STOP
    return source, lengths, target


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("options", "longest"),
    [
        ({"cell": "lstm", "score": "general"}, 6),
        ({"cell": "gru", "score": "concat"}, 6),
        ({"cell": "gru", "score": None}, 3),  # all of the source in one vector: shorter ones
    ],
    ids=["lstm-general", "gru-concat", "gru-none"],
)
def test_learns_to_reverse(options: dict[str, Any], longest: int) -> None:
    generator = torch.Generator(torch.get_default_device()).manual_seed(7)
    module = Seq2Seq(10, 10, embedding_size=32, hidden_size=48, dropout=0.0, **options)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.005)
    for _ in range(200):
        source, lengths, target = reversal_batch(64, longest, generator)
        start = torch.full((64, 1), START)
        loss = module.loss(source, lengths, torch.cat([start, target[:, :-1]], 1), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    source, lengths, target = reversal_batch(200, longest, generator)
    for beam_size in (1, 3):
        found = module.generate(source, lengths, max_length=longest + 2, beam_size=beam_size)
        right = [
            hypothesis.tokens == row[:length]
            for hypothesis, row, length in zip(
                found, target.tolist(), lengths.tolist(), strict=True
            )
        ]
        assert sum(right) >= 0.9 * len(right)


class Adapter(torch.nn.Module):
    """A frozen layer and a small trained one beside it."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.low = torch.nn.Linear(layer.in_features, layer.out_features, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.low(x)


def with_adapter(module: Seq2Seq) -> None:
    module.decoder.output = Adapter(module.decoder.output)  # type: ignore[assignment]


def with_hook(module: Seq2Seq) -> None:
    module.decoder.output.register_forward_hook(lambda module, args, output: 2 * output)


def with_weight_norm(module: Seq2Seq) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(module.decoder.output)
        assert module.decoder.rnn.combine is not None
        torch.nn.utils.weight_norm(module.decoder.rnn.combine)


def pruned(module: Seq2Seq) -> None:
    prune.l1_unstructured(module.decoder.output, "weight", amount=0.5)


@pytest.mark.parametrize(
    ("change", "tied"),
    [
        (with_adapter, False),
        (with_adapter, True),
        (with_hook, False),
        (with_hook, True),
        (with_weight_norm, False),  # no row of zeros has a direction, as that of <pad> must
        (pruned, False),
        (pruned, True),
    ],
)
def test_the_loss_is_that_of_the_output_layer_as_it_is_called(
    change: Callable[[Seq2Seq], None], tied: bool
) -> None:
    module = model(embedding_size=8, tie_embeddings=tied, dropout=0.0).double()
    source, lengths, target_in = batch()
    target_out = target_in.roll(-1, 1)
    target_out[0, 2:] = PAD
    before = module.loss(source, lengths, target_in, target_out)
    change(module)
    learned = [each for each in module.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(learned, 0.1)
    losses = []
    for _ in range(2):  # weights are made anew in each call
        loss = module.loss(source, lengths, target_in, target_out, label_smoothing=0.1)
        expected = torch.nn.functional.cross_entropy(
            module(source, lengths, target_in).flatten(0, 1),
            target_out.flatten(),
            ignore_index=PAD,
            label_smoothing=0.1,
        )
        assert_close({"loss": loss}, {"loss": expected})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert losses[0] != before.item()
    with pytest.raises(ValueError, match="label_smoothing must be from 0 to 1, got 2"):
        module.loss(source, lengths, target_in, target_out, label_smoothing=2)
