# SPDX-License-Identifier: Apache-2.0
"""Tagger and Classifier: their equations, what padding may not change, that they learn."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from pyseq import quantize
from pyseq.seq2seq import Seq2Seq
from pyseq.tagger import POOLINGS, Classifier, Tagger
from pyseq.types import IGNORE, PAD

SIZES: dict[str, Any] = {"embedding_size": 6, "hidden_size": 8}
LENGTHS = torch.tensor([3, 5, 1, 0])
LABELS = 4


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """The tensors are tiny: more threads would only wait for one another."""
    set_threads(1)


def tagger(**options: Any) -> Tagger:
    return Tagger(11, LABELS, **{**SIZES, "dropout": 0.0, **options}).double()


def classifier(pooling: str = "last", **options: Any) -> Classifier:
    options = {**SIZES, "dropout": 0.0, **options}
    return Classifier(11, LABELS, pooling=pooling, **options).double()


def sources() -> Tensor:
    source = torch.randint(4, 11, (4, 5))
    source[torch.arange(5) >= LENGTHS.unsqueeze(1)] = PAD
    return source


MODELS: dict[str, Callable[..., Tagger | Classifier]] = {
    "tagger": tagger,
    **{
        pooling: lambda pooling=pooling, **options: classifier(pooling, **options)
        for pooling in POOLINGS
    },
}


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_the_encoder_is_that_of_seq2seq(cell: str) -> None:
    model, other = tagger(cell=cell, num_layers=2), Seq2Seq(11, 9, **SIZES, cell=cell, num_layers=2)
    shapes = {name: value.shape for name, value in other.encoder.state_dict().items()}
    assert {n: v.shape for n, v in model.encoder.state_dict().items()} == shapes


def test_tagger_is_an_output_layer_on_every_state() -> None:
    model, source = tagger(), sources()
    memory, _ = model.encoder(source, LENGTHS)
    expected = memory.transpose(0, 1) @ model.output.weight.T + model.output.bias
    expected[torch.arange(5) >= LENGTHS.unsqueeze(1)] = 0
    assert_close({"logits": model(source, LENGTHS)}, {"logits": expected})


@pytest.mark.parametrize("bidirectional", [True, False], ids=["two-way", "one-way"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_classifier_pools_each_row_by_itself(pooling: str, bidirectional: bool) -> None:
    model, source = classifier(pooling, bidirectional=bidirectional), sources()
    logits = model(source, LENGTHS)
    assert logits.shape == (4, LABELS)
    for row, length in enumerate(LENGTHS.tolist()[:3]):
        memory, _ = model.encoder(source[row : row + 1, :length], LENGTHS[row : row + 1])
        states = memory[:, 0]
        if pooling == "mean":
            pooled = states.mean(0)
        elif pooling == "max":
            pooled = states.max(0).values
        elif bidirectional:
            pooled = torch.cat([states[-1, :4], states[0, 4:]])
        else:
            pooled = states[-1]
        expected = model.output(pooled)
        assert_close({"logits": logits[row]}, {"logits": expected})
    assert_close({"logits": logits[3]}, {"logits": model.output.bias})


@pytest.mark.parametrize("kind", MODELS)
def test_padding_changes_nothing(kind: str) -> None:
    model, source = MODELS[kind](), sources()
    labels = torch.randint(LABELS, (4, 5) if kind == "tagger" else (4,))

    def results(source: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss = model.loss(source, LENGTHS, labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        logits = model(source, LENGTHS)
        found = {str(i): gradient for i, gradient in enumerate(gradients)}
        return {"loss": loss, "logits": logits[:, :5] if kind == "tagger" else logits, **found}

    noisy = torch.cat([source, torch.full((4, 2), PAD)], 1)
    noisy[torch.arange(7) >= LENGTHS.unsqueeze(1)] = 10
    other = labels
    if kind == "tagger":
        other = torch.cat([labels, torch.zeros(4, 2, dtype=torch.int64)], 1)
        other[torch.arange(7) >= LENGTHS.unsqueeze(1)] = 99
    assert_close(results(noisy, other), results(source, labels))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_is_the_cross_entropy_of_the_logits(kind: str, smoothing: float) -> None:
    model, source = MODELS[kind](dropout=0.3), sources()
    labels = torch.randint(LABELS, (4, 5) if kind == "tagger" else (4,))
    labels[1] = IGNORE
    if kind == "tagger":
        labels[torch.arange(5) >= LENGTHS.unsqueeze(1)] = IGNORE
    torch.manual_seed(3)
    actual = model.loss(source, LENGTHS, labels, label_smoothing=smoothing)
    torch.manual_seed(3)  # the same dropout
    logits = model(source, LENGTHS).reshape(-1, LABELS)
    expected = torch.nn.functional.cross_entropy(
        logits, labels.flatten(), ignore_index=IGNORE, label_smoothing=smoothing
    )
    assert_close({"loss": actual}, {"loss": expected})


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    model = MODELS[kind](num_layers=2)
    model(sources(), LENGTHS).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", MODELS)
def test_no_rows_and_features(kind: str) -> None:
    model = MODELS[kind]()
    empty = model(torch.zeros(0, 3, dtype=torch.int64), LENGTHS[:0])
    assert empty.shape == ((0, 3, LABELS) if kind == "tagger" else (0, LABELS))
    options = {**SIZES, "source_features": 3}
    options |= {} if kind == "tagger" else {"pooling": kind}
    features = torch.randn(4, 5, 3)
    features[torch.arange(5) >= LENGTHS.unsqueeze(1)] = torch.nan
    assert type(model)(None, 2, **options)(features, LENGTHS).isfinite().all()


@pytest.mark.parametrize("kind", MODELS)
def test_config_rebuilds_the_model(kind: str) -> None:
    first = MODELS[kind](cell="gru", bidirectional=False, num_layers=2)
    second = type(first)(**json.loads(json.dumps(first.config))).double()
    second.load_state_dict(first.state_dict())
    parameters = inspect.signature(type(first)).parameters.keys()
    assert first.config.keys() | {"device", "dtype"} == parameters
    source = sources()
    assert torch.equal(first(source, LENGTHS), second(source, LENGTHS))


@pytest.mark.parametrize("kind", MODELS)
def test_learns(kind: str) -> None:
    """Of each token whether it is the same as the first, or of the line how many are 4."""
    generator = torch.Generator().manual_seed(5)
    options = {**SIZES, "hidden_size": 24, "embedding_size": 12, "dropout": 0.0}
    model: Tagger | Classifier
    if kind == "tagger":
        model = Tagger(8, 2, **options)
    else:
        model = Classifier(8, 7, **options, pooling=kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        source = torch.randint(4, 7, (64, 6), generator=generator)
        lengths = torch.randint(1, 7, (64,), generator=generator)
        if kind == "tagger":
            return source, lengths, (source == source[:, :1]).long()
        return source, lengths, ((source == 4) & (torch.arange(6) < lengths.unsqueeze(1))).sum(1)

    for _ in range(150):
        loss = model.loss(*batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    source, lengths, labels = batch()
    right = model(source, lengths).argmax(-1) == labels
    if kind == "tagger":
        right = right[torch.arange(6) < lengths.unsqueeze(1)]
    assert right.double().mean() > 0.9


@pytest.mark.parametrize("place", ["output", "input"])
@pytest.mark.parametrize("steps", [False, True], ids=["whole", "each-step"])
@pytest.mark.parametrize("mode", ["add", "concat", "mlp"])
@pytest.mark.parametrize("kind", MODELS)
def test_extra_information_enters_the_encoder(
    kind: str, mode: str, steps: bool, place: str
) -> None:
    model = MODELS[kind](source_extra_size=3, extra_mode=mode, extra_place=place)
    source = sources()
    extra = torch.randn(*((5, 4, 3) if steps else (4, 3)), dtype=torch.float64)
    model.encoder.dropout = 0.0
    memory, state = model.encoder(source, LENGTHS, extra)
    if kind == "tagger":
        valid = (torch.arange(5) < LENGTHS.unsqueeze(1)).unsqueeze(2)
        expected = torch.where(valid, model.output(memory.transpose(0, 1)), 0.0)
        labels = torch.randint(LABELS, (4, 5))
    else:
        pools = {
            "last": state[0][-1],
            "mean": memory.sum(0) / LENGTHS.clamp(min=1).unsqueeze(1),
            "max": torch.stack(
                [memory[:n, b].amax(0) if n else memory[0, b] for b, n in enumerate(LENGTHS)]
            ),
        }
        expected = model.output(pools[kind])
        labels = torch.randint(LABELS, (4,))
    logits = model(source, LENGTHS, source_extra=extra)
    assert_close({"logits": logits}, {"logits": expected})
    assert not torch.equal(logits, model(source, LENGTHS, source_extra=-extra))
    model.loss(source, LENGTHS, labels, source_extra=extra).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    again = type(model)(**json.loads(json.dumps(model.config))).double()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(source, LENGTHS, source_extra=extra), logits)
    with pytest.raises(RuntimeError, match="source_extra must be given"):
        model(source, LENGTHS)


@pytest.mark.parametrize("kind", MODELS)
def test_models_are_made_where_and_as_what_they_are_told(kind: str) -> None:
    build: Any = type(MODELS[kind]())
    doubled = build(11, LABELS, **SIZES, dtype=torch.float64)
    assert {each.dtype for each in doubled.parameters()} == {torch.float64}
    nowhere = build(11, LABELS, **SIZES, device="meta")
    assert {each.device.type for each in nowhere.parameters()} == {"meta"}
    assert nowhere.config == doubled.config == build(**nowhere.config).config


@pytest.mark.parametrize("kind", MODELS)
def test_quantized_models_say_about_the_same(kind: str) -> None:
    model, source = MODELS[kind]().float().eval(), sources()
    expected = model(source, LENGTHS)
    error = quantize(model)(source, LENGTHS) - expected
    assert 0 < error.abs().max() < 0.05 * expected.abs().max()


Call = Callable[[], Any]
ERRORS: dict[str, tuple[Call, type[Exception], str]] = {
    "labels": (lambda: Tagger(11, 0), ValueError, "num_labels must be a positive integer, got 0"),
    "vocabulary": (lambda: Tagger(3, 2), ValueError, "source_vocab_size must be .* got 3"),
    "no-source": (lambda: Tagger(None, 2), ValueError, "exactly one of .* got None and None"),
    "pooling": (lambda: classifier("sum"), ValueError, "pooling must be one of last.* got 'sum'"),
    "extra": (
        lambda: tagger(extra_mode="add"),
        ValueError,
        "extra_place go with source_extra_size, got 'add', None and 'output' without",
    ),
    "no-extra": (
        lambda: tagger()(sources(), LENGTHS, source_extra=torch.zeros(4, 3)),
        RuntimeError,
        "source_extra must be left out: this model takes none",
    ),
    "odd": (lambda: tagger(hidden_size=7), ValueError, "hidden_size must be even .* got 7"),
    "tags": (
        lambda: tagger().loss(sources(), LENGTHS, torch.zeros(4, dtype=torch.int64)),
        RuntimeError,
        r"labels must be \(B, S\) = \(4, 5\), got \(4,\)",
    ),
    "classes": (
        lambda: classifier().loss(sources(), LENGTHS, torch.zeros(4, 5, dtype=torch.int64)),
        RuntimeError,
        r"labels must be \(B,\) = \(4\), got \(4, 5\)",
    ),
    "label": (
        lambda: classifier().loss(sources(), LENGTHS, torch.full((4,), 4)),
        RuntimeError,
        "4",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_expected(case: str) -> None:
    call, error, match = ERRORS[case]
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_is_that_of_the_output_layer_as_it_is_called(kind: str) -> None:
    model, source = MODELS[kind](dropout=0.0), sources()
    labels = torch.randint(LABELS, (4, 5) if kind == "tagger" else (4,))
    plain = model.loss(source, LENGTHS, labels)
    handle = model.output.register_forward_hook(lambda module, args, output: 0 * output)
    uniform = torch.tensor(LABELS, dtype=plain.dtype).log()
    assert_close({"loss": model.loss(source, LENGTHS, labels)}, {"loss": uniform})
    handle.remove()
    model.output = torch.nn.Sequential(model.output)  # type: ignore[assignment]
    assert_close({"loss": model.loss(source, LENGTHS, labels)}, {"loss": plain})
