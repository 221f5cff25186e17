# SPDX-License-Identifier: Apache-2.0
"""Searches in one call with the encoder: the same bits, and only where nothing looks on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pyseq
from pyseq import Seq2Seq
from pyseq.bridge import Bridge
from pyseq.comparison import reference_operators
from pyseq.errors import SearchError
from pyseq.functional import generation
from pyseq.search import Hypothesis, SearchOptions

LENGTH = 7

FORMS: dict[str, dict[str, Any]] = {
    "general": {},
    "dot": {"score": "dot"},
    "concat": {"score": "concat", "attention_size": 5},
    "none": {"score": None, "input_feeding": False},
    "gru": {"cell": "gru", "bridge": "tanh"},
    "rnn": {"cell": "rnn_relu", "bidirectional": False},
    "two_layers": {"num_layers": 2, "encoder_hidden_size": 8},
    "linear": {"bridge": "linear", "encoder_num_layers": 2, "encoder_hidden_size": 6},
    "relu": {"bridge": "relu"},
    "c_from_h": {"bridge": "tanh", "bridge_c_from_h": True},
    "gru_to_lstm": {"encoder_cell": "gru"},
    "lstm_to_gru": {"cell": "gru", "encoder_cell": "lstm"},
    "bridged_gru_to_lstm": {"encoder_cell": "gru", "bridge": "tanh"},
    "without_feeding": {"input_feeding": False},
    "context_fed": {"feed": "context"},
    "bahdanau": {"order": "bahdanau", "score": "concat"},
    "heads": {"heads": 2},
    "tied": {"embedding_size": 8, "tie_embeddings": True},
}
HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without_weights": {"need_weights": False},
    "beam": {"beam_size": 3, "n_best": 2, "length_penalty": 0.6},
    "draws": {"sample": True, "n_best": 3, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
    "rules": {"min_length": 3, "block_ngrams": 2, "prefix": [[4, 5]]},
    "prefixes": {"prefix": [[4], [], [5, 6]], "beam_size": 2},
}


def model_and_sources(
    form: str = "general", batch: int = 3, **options: Any
) -> tuple[Seq2Seq, Tensor, Tensor]:
    settings = {"embedding_size": 6, "hidden_size": 8, "dropout": 0.3, **FORMS[form], **options}
    torch.manual_seed(2)
    model = Seq2Seq(11, 9, **settings)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    return model, torch.randint(4, 11, (batch, 6)), torch.tensor([6, 3, 1, 5][:batch])


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each search since then went straight, as far as C++ was asked."""
    said: list[bool] = []
    straight = generation.search_whole

    def recorded(*args: Any) -> Any:
        result = straight(*args)
        said.append(result is not None)
        return result

    monkeypatch.setattr(generation, "search_whole", recorded)
    return said


def by_the_operators(
    model: Seq2Seq, source: Tensor, lengths: Tensor, options: SearchOptions
) -> list[list[Hypothesis]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "search_whole", lambda *_: None)
        return model.search(source, lengths, options)


def assert_same(ours: list[list[Hypothesis]], theirs: list[list[Hypothesis]]) -> None:
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert [(h.tokens, h.score) for h in own] == [(h.tokens, h.score) for h in other]
        for one, two in zip(own, other, strict=True):
            assert (one.weights is None) == (two.weights is None)
            if one.weights is not None and two.weights is not None:
                assert one.weights.dtype == two.weights.dtype
                assert torch.equal(one.weights, two.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("form", FORMS)
def test_it_finds_what_the_operators_find(
    form: str, how: str, dtype: torch.dtype, answers: list[bool]
) -> None:
    model, source, lengths = model_and_sources(form)
    model.to(dtype)
    options = SearchOptions(max_length=LENGTH, **HOW[how])
    torch.manual_seed(1)
    ours = model.search(source, lengths, options)
    assert answers == [True]
    torch.manual_seed(1)
    assert_same(ours, by_the_operators(model, source, lengths, options))
    assert model.training


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 4])
def test_sizes_and_threads(batch: int, threads: int, answers: list[bool]) -> None:
    model, source, lengths = model_and_sources(batch=batch, hidden_size=34, num_layers=2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for options in (SearchOptions(max_length=9), SearchOptions(max_length=1, beam_size=4)):
            ours = model.eval().search(source.int(), lengths.int(), options)
            assert_same(ours, by_the_operators(model, source, lengths, options))
    finally:
        torch.set_num_threads(before)
    assert answers == [True, True]


def test_the_coverage_penalty(answers: list[bool]) -> None:
    model, source, lengths = model_and_sources()
    options = SearchOptions(max_length=LENGTH, beam_size=3, coverage_penalty=0.3)
    assert_same(
        model.search(source, lengths, options), by_the_operators(model, source, lengths, options)
    )
    assert answers == [True]


def test_what_is_written_through_data_is_seen() -> None:
    model, source, lengths = model_and_sources()
    options = SearchOptions(max_length=LENGTH)
    before = model.search(source, lengths, options)
    for parameter in model.parameters():
        parameter.data.mul_(-1.5)
    after = model.search(source, lengths, options)
    assert after[0][0].score != before[0][0].score
    assert_same(after, by_the_operators(model, source, lengths, options))


def test_it_keeps_no_graph_and_leaves_the_mode() -> None:
    model, source, lengths = model_and_sources()
    (best, *_) = model.generate(source, lengths, max_length=LENGTH)
    assert torch.is_grad_enabled()
    assert best.weights is not None
    assert not best.weights.requires_grad
    with torch.inference_mode():
        (again, *_) = model.generate(source, lengths, max_length=LENGTH)
    assert (again.tokens, again.score) == (best.tokens, best.score)


@pytest.mark.parametrize(
    "name",
    ["encoder", "encoder.embedding", "encoder.rnn", "bridge", "decoder.rnn.score"],
)
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_called(name: str, kind: str, answers: list[bool]) -> None:
    model, source, lengths = model_and_sources()
    seen: list[bool] = []
    getattr(model.get_submodule(name), kind)(lambda *_: seen.append(True))
    model.generate(source, lengths, max_length=LENGTH)
    assert answers == [False]
    assert seen


def test_hooks_of_all_modules_are_called(answers: list[bool]) -> None:
    model, source, lengths = model_and_sources()
    seen: list[str] = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        model.generate(source, lengths, max_length=LENGTH)
    finally:
        handle.remove()
    assert answers == []
    assert {"Encoder", "Bridge", "LSTM"} <= set(seen)


class _Function(TorchFunctionMode):
    calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        type(self).calls += 1
        return func(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        type(self).calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [_Function, _Dispatch])
def test_modes_see_the_operators(mode: Any, answers: list[bool]) -> None:
    model, source, lengths = model_and_sources()
    mode.calls = 0
    with mode():
        model.generate(source, lengths, max_length=LENGTH)
    assert answers == [False]
    assert mode.calls > 0


def test_profilers_see_the_operators(answers: list[bool]) -> None:
    model, source, lengths = model_and_sources()
    with torch.profiler.profile() as profile:
        model.generate(source, lengths, max_length=LENGTH)
    assert answers == [False]
    assert "pyseq::generate" in {event.key for event in profile.key_averages()}


def test_autocast_is_for_the_operators(answers: list[bool]) -> None:
    model, source, lengths = model_and_sources()
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(source, lengths, max_length=LENGTH)
    assert answers == [False]


def _own_forward(model: Seq2Seq) -> None:
    forward = model.bridge.forward
    model.bridge.forward = lambda state: forward(state)  # type: ignore[method-assign]


def _own_step(model: Seq2Seq) -> None:
    step = model.step
    model.step = lambda *args, **options: step(*args, **options)  # type: ignore[method-assign]


def _own_start(model: Seq2Seq) -> None:
    start = model.decoder.rnn.start
    model.decoder.rnn.start = lambda hidden: start(  # type: ignore[method-assign]
        tuple(2 * part for part in hidden)
    )


def _own_keys(model: Seq2Seq) -> None:
    score = model.decoder.rnn.score
    assert score is not None
    score.project = lambda memory, _=None: 3 * memory  # type: ignore[method-assign]


def _not_fused(model: Seq2Seq) -> None:
    model.decoder.is_fused = lambda: False  # type: ignore[method-assign]


def _largest_norm(model: Seq2Seq) -> None:
    assert isinstance(model.encoder.embedding, torch.nn.Embedding)
    model.encoder.embedding.max_norm = 1.0


class _Scaled(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


CHANGES: dict[str, Callable[[Seq2Seq], object]] = {
    "forward": _own_forward,
    "step": _own_step,
    "start": _own_start,
    "keys": _own_keys,
    "not_fused": _not_fused,
    "max_norm": _largest_norm,
    "pruned": lambda model: prune.l1_unstructured(model.decoder.output, "weight", 0.5),
    "parametrized": lambda model: parametrize.register_parametrization(
        model.encoder.rnn, "weight_hh_l0", _Scaled()
    ),
    "short": lambda model: model.to(torch.bfloat16),
    "wrapped": lambda model: setattr(
        model.encoder, "embedding", torch.nn.Sequential(model.encoder.embedding)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_plain_is_for_the_operators(change: str, answers: list[bool]) -> None:
    model, source, lengths = model_and_sources()
    CHANGES[change](model.eval())
    options = SearchOptions(max_length=LENGTH)
    ours = model.search(source, lengths, options)
    assert True not in answers
    assert_same(ours, by_the_operators(model, source, lengths, options))


def test_other_layers_in_the_place_of_the_encoders(answers: list[bool]) -> None:
    model, source, lengths = model_and_sources("rnn", cell="rnn_tanh")
    options = SearchOptions(max_length=LENGTH)
    before = model.search(source, lengths, options)
    layers = pyseq.nn.RNN(6, 8, nonlinearity="relu")
    layers.load_state_dict(model.encoder.rnn.state_dict())
    model.encoder.rnn = layers
    after = model.search(source, lengths, options)
    assert answers == [True]
    assert after[0][0].score != before[0][0].score
    assert_same(after, by_the_operators(model, source, lengths, options))


@pytest.mark.parametrize(
    "other",
    [
        {"cell": "gru"},
        {"encoder_cell": "gru"},
        {"decoder_layers": 2, "decoder_size": 4},
        {"encoder_layers": 2, "encoder_size": 4},
    ],
    ids=lambda other: next(iter(other)),
)
def test_bridges_that_do_not_fit_are_refused(other: dict[str, Any], answers: list[bool]) -> None:
    model, source, lengths = model_and_sources()
    sizes = {"encoder_layers": 1, "encoder_size": 8, "decoder_layers": 1, "decoder_size": 8}
    model.bridge = Bridge("tanh", **{"cell": "lstm", **sizes, **other})
    with pytest.raises((RuntimeError, ValueError), match="must be"):
        model.generate(source, lengths, max_length=LENGTH)
    assert answers == []


@pytest.mark.parametrize(
    "options",
    [
        {"score": "scaled_dot"},
        {"score": "location", "max_positions": 6},
        {"window": "local-m", "window_size": 1},
        {"bridge": "zero"},
        {"bridge": "learned"},
        {"memory_bias": True},
        {"context_every_step": True},
        {"decoder_options": {"layer_norm": True}, "input_feeding": False},
        {"encoder_options": {"layer_norm": True}},
    ],
    ids=lambda options: next(iter(options.values())) if "score" in options else next(iter(options)),
)
def test_other_models_are_for_the_operators(options: dict[str, Any], answers: list[bool]) -> None:
    model, source, lengths = model_and_sources(**options)
    assert model.generate(source, lengths, max_length=LENGTH)
    assert True not in answers


class _Louder(Seq2Seq):
    def encode_source(self, *args: Any, **options: Any) -> Any:
        self.heard = True
        return super().encode_source(*args, **options)


def test_subclasses_with_methods_of_their_own_are_asked(answers: list[bool]) -> None:
    _, source, lengths = model_and_sources()
    _Louder(11, 9, embedding_size=6, hidden_size=8).generate(source, lengths, max_length=LENGTH)
    assert answers == []
    kind = type("Renamed", (Seq2Seq,), {})
    kind(11, 9, embedding_size=6, hidden_size=8).generate(source, lengths, max_length=LENGTH)
    assert answers == [True]


@pytest.mark.parametrize(
    "wrong",
    [
        {"source": torch.full((3, 6), 11)},
        {"source": torch.full((3, 6), -1)},
        {"source": torch.ones(3, 6)},
        {"source": torch.ones(3, 6, 2)},
        {"lengths": torch.tensor([6, 3])},
        {"lengths": torch.tensor([6, 3, 7])},
        {"lengths": torch.tensor([6.0, 3.0, 1.0])},
        {"prefix": [[9]]},
        {"max_length": 2**70},
        {"beam_size": 2**40},
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_in_the_same_words(wrong: dict[str, Any]) -> None:
    model, source, lengths = model_and_sources()
    source, lengths = wrong.pop("source", source), wrong.pop("lengths", lengths)
    options = SearchOptions(**{"max_length": LENGTH, **wrong})
    with pytest.raises(Exception) as theirs:  # noqa: PT011  (whatever it is)
        by_the_operators(model, source, lengths, options)
    with pytest.raises(theirs.type) as ours:
        model.search(source, lengths, options)
    assert str(ours.value) == str(theirs.value)


def test_logits_that_are_not_finite_are_refused() -> None:
    model, source, lengths = model_and_sources()
    model.decoder.output.bias.data[4] = float("nan")
    with pytest.raises(SearchError, match="must be finite"):
        model.generate(source, lengths, max_length=LENGTH)


def test_quantized_models(answers: list[bool]) -> None:
    model, source, lengths = model_and_sources(hidden_size=32, embedding_size=32)
    small = pyseq.quantize(copy.deepcopy(model).eval())
    options = SearchOptions(max_length=LENGTH)
    ours = small.search(source, lengths, options)
    assert_same(ours, by_the_operators(small, source, lengths, options))


def test_the_reference_is_left_to_itself(answers: list[bool]) -> None:
    model, source, lengths = model_and_sources()
    ours = model.double().generate(source, lengths, max_length=LENGTH)
    assert answers == [True]
    with reference_operators():
        theirs = model.generate(source, lengths, max_length=LENGTH)
    assert answers == [True]
    assert [h.tokens for h in ours] == [h.tokens for h in theirs]
    assert [h.score for h in ours] == pytest.approx([h.score for h in theirs], abs=1e-9)
