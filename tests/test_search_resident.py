# SPDX-License-Identifier: Apache-2.0
"""The searches whose state stays on the device: what the others find, and nothing waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from chains import LENGTHS, SOURCE, Chain, chain
from no_waiting import NoWaiting
from torch import Tensor

from pyseq import Ensemble, Seq2Seq, search
from pyseq.errors import SearchError
from pyseq.search import Hypothesis, SearchOptions, resident
from pyseq.search.beams import beam_search
from pyseq.search.followed import follow
from pyseq.search.resident import STEPS_A_LOOK, search_resident
from pyseq.types import START, STOP, UNK

MAX_LENGTH = 3 * STEPS_A_LOOK + 2

#: Of SearchOptions.
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy-rules": {"min_length": 3, "block_ngrams": 2, "prefix": [[3], [4, 5], []]},
    "greedy-nothing-left": {"block_ngrams": 1, "min_length": MAX_LENGTH},
    "beam": {"beam_size": 4},
    "beam-of-one": {"beam_size": 1, "length_penalty": 1.0},
    "beam-wider-than-vocabulary": {"beam_size": 13, "n_best": 13},
    "beam-length": {"beam_size": 3, "n_best": 3, "length_penalty": 1.2},
    "beam-coverage": {"beam_size": 3, "n_best": 2, "coverage_penalty": 0.4, "length_penalty": 0.7},
    "beam-rules": {"beam_size": 3, "min_length": 4, "block_ngrams": 2, "prefix": [[3], [4, 5], []]},
    "beam-nothing-left": {"beam_size": 3, "n_best": 2, "block_ngrams": 1, "min_length": MAX_LENGTH},
    "beam-short": {"beam_size": 3, "max_length": 2, "need_weights": False},
}


def options_of(name: str) -> SearchOptions:
    return SearchOptions(**{"max_length": MAX_LENGTH, **OPTIONS[name]})


def sure_model(dtype: torch.dtype = torch.float64, **options: Any) -> Seq2Seq:
    """A model that is sure of what it says, so that no two hypotheses are about as good."""
    given = {"embedding_size": 6, "hidden_size": 8, "dropout": 0.2, **options}
    model = Seq2Seq(12, 11, dtype=dtype, **given)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "general": sure_model,
    "concat-two-layers-gru": lambda: sure_model(score="concat", num_layers=2, cell="gru"),
    "no-attention": lambda: sure_model(score=None, input_feeding=False),
    "scanned": lambda: sure_model(cell="slstm", input_feeding=False),
    "window-heads": lambda: sure_model(window="local-p", window_size=2, heads=2),
    "history": lambda: sure_model(score="concat", history="cumulative", history_size=3),
    "context-at-every-step": lambda: sure_model(context_every_step=True),
    "ensemble": lambda: Ensemble([sure_model(), sure_model(cell="gru")], weights=[1, 2]),
}


def sources() -> tuple[Tensor, Tensor]:
    return torch.randint(4, 12, (3, 7)), torch.tensor([7, 3, 5])


def step_by_step(
    model: Any, source: Tensor, lengths: Tensor, options: SearchOptions
) -> list[list[Hypothesis]]:
    """What the searches of the CPU find without the operator that is all of a search."""
    if options.follows_one():
        return follow(model, source, lengths, options, None)
    return beam_search(model, source, lengths, options)


def assert_same(actual: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    assert len(actual) == len(expected)
    for found, right in zip(actual, expected, strict=True):
        assert [h.tokens for h in found] == [h.tokens for h in right]
        assert [h.score for h in found] == pytest.approx([h.score for h in right], rel=1e-9)
        for mine, other in zip(found, right, strict=True):
            assert (mine.weights is None) == (other.weights is None)
            if mine.weights is not None:
                torch.testing.assert_close(mine.weights, other.weights)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_chain_is_searched_alike(name: str) -> None:
    model = chain(vocab=7)
    model.attention = torch.softmax(torch.randn(3, 7, 2, dtype=torch.float64) * 2, -1)
    options = options_of(name)
    assert_same(
        search_resident(model, SOURCE, LENGTHS, options, None),
        step_by_step(model, SOURCE, LENGTHS, options),
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for kind in MODELS
        for name in ("greedy-rules", "beam-length", "beam-coverage")
        if (name, kind) != ("beam-coverage", "no-attention")  # which has nothing to cover
    ],
)
def test_models_are_searched_alike(name: str, kind: str) -> None:
    model, (source, lengths), options = MODELS[kind](), sources(), options_of(name)
    found = search_resident(model, source, lengths, options, None)
    assert_same(found, step_by_step(model, source, lengths, options))
    assert any(h.tokens for best in found for h in best)


@pytest.mark.parametrize("name", ["greedy", "beam-length"])
def test_models_that_copy_are_searched_alike(name: str) -> None:
    model, (source, lengths), options = sure_model(copy="pointer"), sources(), options_of(name)
    given = model.given(copies=torch.randint(4, 14, source.shape))
    found = search_resident(given, source, lengths, options, None)
    assert_same(found, step_by_step(given, source, lengths, options))


def test_extra_information_of_each_step_goes_along() -> None:
    model, (source, lengths) = sure_model(target_extra_size=2), sources()
    given = model.given(target_extra=torch.randn(MAX_LENGTH, 3, 2, dtype=torch.float64))
    options = options_of("beam-length")
    found = search_resident(given, source, lengths, options, None)
    assert_same(found, step_by_step(given, source, lengths, options))


def test_draws_are_those_of_the_cpu() -> None:
    """Though rows that are done stay: they depend on no other."""
    model, options = chain(), SearchOptions(max_length=9, sample=True, n_best=2, top_p=0.9)
    for seed in map(torch.tensor, range(20)):
        found = search_resident(model, SOURCE, LENGTHS, options, seed)
        assert_same(found, follow(model, SOURCE, LENGTHS, options, seed))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["general", "concat-two-layers-gru"])
def test_every_device_finds_what_the_cpu_finds(name: str, kind: str, device: torch.device) -> None:
    model, (source, lengths), options = MODELS[kind](), sources(), options_of(name)
    found = model.search(source, lengths, options)
    assert all(p.device.type == device.type for p in model.parameters())
    moved = [[h._replace(weights=on_cpu(h.weights)) for h in best] for best in found]
    with torch.device("cpu"):
        expected = step_by_step(model.cpu(), source.cpu(), lengths.cpu(), options)
    assert_same(moved, expected)


def on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def test_draws_of_a_row_are_many() -> None:
    model = chain()
    options = SearchOptions(max_length=5, sample=True, n_best=200)
    found = search_resident(model, SOURCE, LENGTHS, options, torch.tensor(1))
    for row, draws in enumerate(found):
        assert len(draws) == 200
        probs = torch.softmax(model.log_probs[row, START, STOP:], 0)  # of what may be emitted
        ended = sum(not h.tokens for h in draws) / 200
        assert ended == pytest.approx(probs[0].item(), abs=0.1)


@pytest.mark.parametrize("name", ["greedy", "beam"])
def test_a_search_ends_soon_after_its_last_row(name: str) -> None:
    logits = torch.zeros(3, 6, 6, dtype=torch.float64)
    logits[:, :, STOP] = 50
    model = Chain(logits)
    options = SearchOptions(**{**OPTIONS[name], "max_length": 10 * STEPS_A_LOOK})
    found = search_resident(model, SOURCE, LENGTHS, options, None)
    assert [best[0].tokens for best in found] == [[]] * 3
    assert len(model.calls) == 2 * STEPS_A_LOOK  # one look, and until the next one


@pytest.mark.parametrize("name", ["greedy", "beam"])
@pytest.mark.parametrize("step", [1, MAX_LENGTH])
def test_logits_that_are_not_finite_are_an_error(
    name: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (source, lengths) = sure_model(), sources()
    with torch.no_grad():
        model.decoder.output.bias[STOP] = -1e3  # no row ends
    plain, made = type(model).step, []

    def damaged(*args: Any, **options: Any) -> search.Step:
        made.append(1)
        result = plain(*args, **options)
        bad = torch.nan if len(made) == step else 0.0
        return result._replace(log_probs=result.log_probs + bad)

    monkeypatch.setattr(Seq2Seq, "step", damaged)
    with pytest.raises(SearchError, match="finite, got NaN"):
        search_resident(model, source, lengths, options_of(name), None)


def test_rows_that_are_done_may_say_anything() -> None:
    logits = torch.zeros(3, 6, 6, dtype=torch.float64)
    logits[0, :, STOP] = 50  # ends at once
    logits[0, STOP] = torch.nan  # what it says beyond its end
    logits[1:, :, UNK] = 50  # never end
    for name in ("greedy", "beam"):
        options = SearchOptions(**{**OPTIONS[name], "max_length": 5})
        found = search_resident(Chain(logits), SOURCE, LENGTHS, options, None)
        assert [best[0].tokens for best in found] == [[], [UNK] * 5, [UNK] * 5]


# ---- Nothing waits ---------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of a device that holds no numbers: how often flags were read; nobody is ever done."""
    read: list[int] = []

    def values(self: object) -> list[bool]:
        read.append(1)
        return [False, False]

    monkeypatch.setattr(resident._Sent, "values", values)
    monkeypatch.setattr(resident, "trace_back", lambda *_: [])
    return read


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "general") for name in [*OPTIONS, "sampling"]),
        *((name, kind) for name in ("greedy", "beam") for kind in [*MODELS, "copying"][1:]),
    ],
)
def test_no_step_waits_for_the_device(name: str, kind: str, looks: list[int]) -> None:
    """The meta device has no numbers to wait for: whatever asks for one is an error."""
    if name == "sampling":
        options = SearchOptions(max_length=MAX_LENGTH, sample=True, n_best=2, top_k=5, top_p=0.8)
    else:
        options = options_of(name)
    source, lengths = (tensor.to("meta") for tensor in sources())
    if kind == "copying":
        whole = sure_model(copy="joint")
        encoded = whole.given(copies=torch.randint(4, 14, source.shape)).encode_source(*sources())
        model = whole.to("meta")
        copies = encoded[0].copies
        assert copies is not None
        copies = copies._replace(ids=copies.ids.to("meta"))
        model._copies = lambda *_: copies  # which looks at the numbers, once for each search
    else:
        model = MODELS[kind]()
        for module in model.models if isinstance(model, Ensemble) else [model]:
            module.to("meta")
    steps: list[int] = []
    plain = type(model).step

    def watched(*args: Any, **options: Any) -> search.Step:
        steps.append(1)
        if len(steps) == 1:
            mode.__enter__()
        return plain(*args, **options)

    mode = NoWaiting("meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "step", watched)
        try:
            assert not any(search.search(model, source, lengths, options))
        finally:
            mode.__exit__(None, None, None)
    assert len(steps) == options.max_length
    # What was sent at one look is read at the next one, and once more at the end.
    assert len(looks) == max(0, options.max_length // STEPS_A_LOOK - 1) + 1
