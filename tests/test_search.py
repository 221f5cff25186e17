# SPDX-License-Identifier: Apache-2.0
"""The searches: against brute force on a Markov chain, and against Seq2Seq's own forward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from chains import LENGTHS, SOURCE, Chain, chain
from generate_cases import MODEL_KINDS
from torch import Tensor

from pyseq import search
from pyseq.search import Hypothesis
from pyseq.search.evaluation import in_eval_mode
from pyseq.seq2seq import Seq2Seq
from pyseq.types import PAD, START, STOP, UNK


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """The tensors are tiny: more threads would only wait for one another."""
    set_threads(1)


def brute_force(model: Chain, row: int, max_length: int, alpha: float) -> tuple[list[int], float]:
    """The best of all sequences that end with <stop> or are max_length long."""
    table = model.log_probs[row].tolist()
    words = [token for token in range(len(table)) if token not in (PAD, START, STOP)]
    best: tuple[float, float, list[int]] = (-math.inf, 0.0, [])
    for length in range(max_length + 1):
        for tokens in itertools.product(words, repeat=length):
            emitted = [*tokens, STOP] if length < max_length else list(tokens)
            path = itertools.pairwise([START, *emitted])
            score = sum(table[last][token] for last, token in path)
            rank = score / ((5 + len(emitted)) / 6) ** alpha
            best = max(best, (rank, score, list(tokens)))
    return best[2], best[1]


@pytest.mark.parametrize("max_length", [1, 2, 4])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_a_wide_beam_finds_the_best_sequence(alpha: float, max_length: int) -> None:
    model = chain()
    found = search.beam(
        model, SOURCE, LENGTHS, max_length=max_length, beam_size=200, length_penalty=alpha
    )
    for row, hypothesis in enumerate(found):
        tokens, score = brute_force(model, row, max_length, alpha)
        assert hypothesis.tokens == tokens
        assert hypothesis.score == pytest.approx(score, abs=1e-12)


def test_the_length_penalty_prefers_longer_sequences() -> None:
    model = chain()
    options = {"max_length": 6, "beam_size": 20}
    plain = search.beam(model, SOURCE, LENGTHS, **options)
    longer = search.beam(model, SOURCE, LENGTHS, length_penalty=3.0, **options)
    assert sum(len(h.tokens) for h in longer) > sum(len(h.tokens) for h in plain)


def test_beam_of_one_is_greedy() -> None:
    model = chain(vocab=9, batch=20)
    source, lengths = torch.zeros(20, 2, dtype=torch.int64), torch.full((20,), 2)
    greedy = search.greedy(model, source, lengths, max_length=8)
    beam = search.beam(model, source, lengths, max_length=8, beam_size=1)
    assert [h.tokens for h in beam] == [h.tokens for h in greedy]
    assert [h.score for h in beam] == pytest.approx([h.score for h in greedy])
    assert len({len(h.tokens) for h in greedy}) > 2  # the rows did end at different steps


def test_a_wider_beam_scores_no_worse() -> None:
    model = chain(vocab=9, batch=20)
    source, lengths = torch.zeros(20, 2, dtype=torch.int64), torch.full((20,), 2)
    narrow = search.greedy(model, source, lengths, max_length=8)
    wide = search.beam(model, source, lengths, max_length=8, beam_size=8)
    gains = [w.score - n.score for w, n in zip(wide, narrow, strict=True)]
    assert min(gains) > -1e-12
    assert max(gains) > 0.1


def test_weights_are_those_of_the_hypothesis() -> None:
    """The chain's weights are the last token, which tells whose step they come from."""
    model = chain(vocab=9, batch=3, sharpness=1.0)
    found = search.beam(model, SOURCE, LENGTHS, max_length=8, beam_size=5)
    found += search.sample(model, SOURCE, LENGTHS, max_length=8)
    for length, hypothesis in zip(LENGTHS.tolist() * 2, found, strict=True):
        assert hypothesis.weights is not None
        assert hypothesis.weights.shape == (len(hypothesis.tokens), length)
        before = [START, *hypothesis.tokens][: len(hypothesis.tokens)]
        assert hypothesis.weights[:, 0].tolist() == before


def test_finished_rows_leave_the_work() -> None:
    logits = torch.zeros(3, 6, 6, dtype=torch.float64)
    logits[0, :, STOP] = 50  # ends at once
    logits[1:, :, UNK] = 50  # never end
    for beam_size, expected in ((None, [3, 2, 2, 2]), (2, [3, 4, 4, 4])):
        model = Chain(logits)
        if beam_size is None:
            search.greedy(model, SOURCE, LENGTHS, max_length=4)
        else:
            search.beam(model, SOURCE, LENGTHS, max_length=4, beam_size=beam_size)
        assert model.calls == expected


def test_pad_and_start_are_never_emitted() -> None:
    logits = torch.zeros(3, 6, 6, dtype=torch.float64)
    logits[:, :, [PAD, START]] = 5
    model = Chain(logits)
    found = search.greedy(model, SOURCE, LENGTHS, max_length=9)
    found += search.sample(model, SOURCE, LENGTHS, max_length=9)
    found += search.beam(model, SOURCE, LENGTHS, max_length=9, beam_size=4)
    assert all({PAD, START}.isdisjoint(h.tokens) for h in found)
    # They keep their share of the probability, so the scores are the model's own.
    assert found[0].score < -5


def draws(model: Chain, count: int, **options: Any) -> list[Hypothesis]:
    """Samples of one token from row 0 of the model."""
    source, lengths = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([2])
    model.log_probs = model.log_probs[:1].expand(count, -1, -1)
    return search.sample(
        model, source.expand(count, -1), lengths.expand(count), max_length=1, **options
    )


def emitted(hypothesis: Hypothesis) -> int:
    return hypothesis.tokens[0] if hypothesis.tokens else STOP


def test_sampling_follows_the_distribution() -> None:
    model = chain(sharpness=1.0)
    probs = model.log_probs[0, START].exp()
    found = draws(model, 20000)
    counts = torch.bincount(torch.tensor([emitted(h) for h in found]), minlength=6)
    probs[[PAD, START]] = 0
    error = (counts / 20000 - probs / probs.sum()).abs().max().item()
    assert error < 0.02  # five standard deviations of a share of one half
    log_probs = model.log_probs[0, START].tolist()
    assert all(h.score == log_probs[emitted(h)] for h in found[:20])


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 1}, {STOP}),
        ({"top_k": 2}, {STOP, 4}),
        ({"top_k": 99}, {STOP, UNK, 4, 5}),
        ({"top_p": 0.45}, {STOP}),
        ({"top_p": 0.55}, {STOP, 4}),
        ({"top_p": 1e-9}, {STOP}),
        ({"top_p": 1.0}, {STOP, UNK, 4, 5}),
        ({"temperature": 1e-3}, {STOP}),
        ({"temperature": 1e-320}, {STOP}),
        ({"top_k": 2, "top_p": 0.6}, {STOP}),
    ],
    ids=str,
)
def test_sampling_options_cut_the_distribution(options: dict[str, Any], allowed: set[int]) -> None:
    probs = torch.tensor([0.0, 0.0, 0.5, 0.1, 0.25, 0.15], dtype=torch.float64)
    model = Chain((probs + 1e-30).log().expand(3, 6, 6))
    assert {emitted(h) for h in draws(model, 400, **options)} == allowed


def test_sampling_repeats_with_the_generator() -> None:
    model = chain(vocab=20, sharpness=0.5)
    found = [
        search.sample(
            model, SOURCE, LENGTHS, max_length=9, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (1, 1, 2)
    ]
    tokens = [[h.tokens for h in one] for one in found]
    assert tokens[0] == tokens[1] != tokens[2]


ERRORS: dict[str, tuple[Callable[..., object], dict[str, Any], str]] = {
    "max_length": (search.greedy, {"max_length": 0}, "max_length must be at least 1 token, got 0"),
    "beam_size": (search.beam, {"beam_size": 0}, "beam_size must be at least 1, got 0"),
    "penalty": (search.beam, {"beam_size": 2, "length_penalty": -1.0}, "length_penalty .* -1.0"),
    "temperature": (search.sample, {"temperature": 0.0}, "temperature .* got 0.0"),
    "top_k": (search.sample, {"top_k": 0}, "top_k must be at least 1, got 0"),
    "top_p": (search.sample, {"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_value(case: str) -> None:
    function, options, match = ERRORS[case]
    with pytest.raises(ValueError, match=match):
        function(chain(), SOURCE, LENGTHS, **{"max_length": 3, **options})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("function", [search.greedy, search.sample, search.beam])
def test_logits_that_are_not_finite_are_refused(
    function: Callable[..., object], value: float
) -> None:
    model = chain()
    logits = model.log_probs.clone()
    logits[1, UNK, UNK] = value  # one row, and not before its second step
    logits[:, START, UNK] = 50
    options = {"beam_size": 2} if function is search.beam else {}
    with pytest.raises(RuntimeError, match="logits must be finite, got NaN"):
        function(Chain(logits), SOURCE, LENGTHS, max_length=4, **options)


def test_minus_infinity_forbids_a_token() -> None:
    logits = torch.zeros(3, 6, 6)
    logits[:, :, UNK] = -math.inf
    found = search.beam(Chain(logits), SOURCE, LENGTHS, max_length=4, beam_size=3)
    assert all(math.isfinite(h.score) and UNK not in h.tokens for h in found)


# With the real model


MODELS: dict[str, dict[str, Any]] = {
    "lstm-general": {},
    "lstm-none": {"score": None},
    "gru-concat-L2": {"cell": "gru", "score": "concat", "num_layers": 2},
    "rnn-dot-unfed": {"cell": "rnn_tanh", "score": "dot", "input_feeding": False},
    **MODEL_KINDS,
}
MAX_LENGTH = 7


def model_and_sources(name: str) -> tuple[Seq2Seq, Tensor, Tensor]:
    model = Seq2Seq(11, 9, embedding_size=6, hidden_size=8, dropout=0.5, **MODELS[name]).double()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # sharp enough for the rows to differ
    return model, torch.randint(4, 11, (5, 6)), torch.tensor([6, 3, 1, 5, 4])


SEARCHES: dict[str, Callable[..., list[Hypothesis]]] = {
    "greedy": lambda *args: search.greedy(*args, max_length=MAX_LENGTH),
    "sample": lambda *args: search.sample(*args, max_length=MAX_LENGTH, temperature=0.8),
    "beam4": lambda *args: search.beam(*args, max_length=MAX_LENGTH, beam_size=4),
    "beam4-penalty": lambda *args: search.beam(
        *args, max_length=MAX_LENGTH, beam_size=4, length_penalty=1.0
    ),
}


@pytest.mark.parametrize("how", SEARCHES)
@pytest.mark.parametrize("name", MODELS)
def test_scores_and_weights_are_those_of_forward(name: str, how: str) -> None:
    model, source, lengths = model_and_sources(name)
    found = SEARCHES[how](model, source, lengths)
    model.eval()
    for row, hypothesis in enumerate(found):
        target = hypothesis.tokens + [STOP] * (len(hypothesis.tokens) < MAX_LENGTH)
        alone, length = source[row : row + 1, : lengths[row]], lengths[row : row + 1]
        target_in = torch.tensor([[START, *target[:-1]]])
        memory, hidden = model.encoder(alone, length)
        logits, decoded = model.decoder(
            target_in, memory, lengths=length, state=(hidden, None), need_weights=True
        )
        assert torch.equal(logits, model(alone, length, target_in))
        log_probs = torch.log_softmax(logits[0], -1)
        score = log_probs[range(len(target)), target].sum().item()
        assert hypothesis.score == pytest.approx(score, abs=1e-10)
        if MODELS[name].get("score", "") is None:
            assert hypothesis.weights is None
        else:
            expected = decoded.weights[: len(hypothesis.tokens), 0]
            expected = expected.mean(1) if expected.dim() == 3 else expected  # over the heads
            torch.testing.assert_close(hypothesis.weights, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_generate_does_not_depend_on_the_batch(name: str) -> None:
    model, source, lengths = model_and_sources(name)
    for beam_size in (1, 3):
        options = {"max_length": MAX_LENGTH, "beam_size": beam_size}
        together = model.generate(source, lengths, **options)
        for row, hypothesis in enumerate(together):
            alone = model.generate(
                source[row : row + 1, : lengths[row]], lengths[row : row + 1], **options
            )[0]
            assert alone.tokens == hypothesis.tokens
            assert alone.score == pytest.approx(hypothesis.score, abs=1e-10)


@pytest.mark.parametrize("how", ["alone", "ensemble", "given", "stream"])
def test_a_search_changes_no_module_even_for_a_while(how: str) -> None:
    """Another thread may train the model, or search it too."""
    model, source, lengths = model_and_sources("gru-concat-L2")
    modes: list[bool] = []

    def look(*_: object) -> None:
        modes.extend(module.training for module in model.modules())

    model.decoder.output.register_forward_hook(look)
    options = search.SearchOptions(max_length=4)
    searched: Any = model
    if how == "ensemble":
        searched = search.Ensemble([model, model])
    elif how == "given":
        searched = model.given()
    tokens: list[list[int]] = [[] for _ in source]
    for _ in range(2):
        if how == "stream":
            found = [[] for _ in source]
            for token in model.stream(source, lengths, options):
                found[token.row].append(token.token)
        else:
            found = [best.tokens for best, *_ in search.search(searched, source, lengths, options)]
        assert not any(tokens) or tokens == found  # no dropout
        tokens = found
    assert modes
    assert all(modes)


class Pair(NamedTuple):
    module: torch.nn.Module
    number: int


@pytest.mark.parametrize("kind", ["tuple", "named", "list", "dict", "nested", "method", "cycle"])
def test_references_lead_to_what_stands_in(kind: str) -> None:
    model, source, lengths = model_and_sources("gru-concat-L2")
    decoder, outside = model.decoder, torch.nn.Dropout()
    holder: Any = {
        "tuple": (decoder,),
        "named": Pair(decoder, 1),
        "list": [1, decoder],
        "dict": {"its": decoder},
        "nested": {"its": [(decoder,)]},
        "method": decoder.forward,
        "cycle": (model, decoder),
    }[kind]
    model.holder = holder
    numbers: list[Any] = [1, 2]
    numbers.append(numbers)
    model.others = numbers  # type: ignore[assignment]
    model.teacher = (outside,)  # type: ignore[assignment]
    found = in_eval_mode(model)
    refers = {
        "tuple": lambda held: held[0],
        "named": lambda held: held.module,
        "list": lambda held: held[1],
        "dict": lambda held: held["its"],
        "nested": lambda held: held["its"][0][0],
        "method": lambda held: held.__self__,
        "cycle": lambda held: held[0].holder[1],
    }[kind]
    assert refers(found.holder) is found.decoder
    assert type(found.holder) is type(holder)
    assert not found.decoder.training
    assert refers(model.holder) is decoder
    assert decoder.training
    assert found.others is numbers
    assert found.teacher[0] is outside  # no part of the model: its mode is its own affair
    assert model.search(source, lengths, search.SearchOptions(max_length=2))


def test_what_cannot_be_stood_in_for_is_put_into_eval_mode() -> None:
    model, source, lengths = model_and_sources("gru-concat-L2")
    inner, modes = model.encoder.forward, []

    def forward(*args: Any) -> Any:
        modes.append(model.encoder.training)
        return inner(*args)

    model.encoder.forward = forward  # type: ignore[method-assign]
    found = [model.generate(source, lengths, max_length=4) for _ in range(2)]
    assert [h.score for h in found[0]] == [h.score for h in found[1]]
    assert modes == [False, False]
    assert model.encoder.training


def test_search_leaves_the_mode_and_the_graph_alone() -> None:
    model, source, lengths = model_and_sources("gru-concat-L2")
    model.decoder.eval()  # one part is frozen, say
    modes = [module.training for module in model.modules()]
    first = model.generate(source, lengths, max_length=4, beam_size=2)
    assert [module.training for module in model.modules()] == modes
    again = model.generate(source, lengths, max_length=4, beam_size=2)
    assert [h.tokens for h in first] == [h.tokens for h in again]  # no dropout
    assert all(h.weights is not None and not h.weights.requires_grad for h in first)


def test_weights_only_on_demand() -> None:
    model, source, lengths = model_and_sources("lstm-general")
    for found in (
        search.greedy(model, source, lengths, max_length=3, need_weights=False),
        search.beam(model, source, lengths, max_length=3, beam_size=2, need_weights=False),
    ):
        assert [h.weights for h in found] == [None] * 5


@pytest.mark.parametrize("beam_size", [1, 3])
def test_no_sources_no_hypotheses(beam_size: int) -> None:
    model, source, lengths = model_and_sources("lstm-general")
    assert model.generate(source[:0], lengths[:0], max_length=3, beam_size=beam_size) == []


def test_float32() -> None:
    model, source, lengths = model_and_sources("lstm-general")
    expected = model.generate(source, lengths, max_length=MAX_LENGTH, beam_size=3)
    found = model.float().generate(source, lengths, max_length=MAX_LENGTH, beam_size=3)
    assert [h.tokens for h in found] == [h.tokens for h in expected]
    assert [h.score for h in found] == pytest.approx([h.score for h in expected], abs=1e-4)


@pytest.mark.parametrize("how", ["greedy", "beam", "coverage", "sample", "ensemble", "copy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_of_short_dtypes_grow_to_the_end(dtype: torch.dtype, how: str) -> None:
    torch.manual_seed(0)
    copied: dict[str, Any] = {"copy": "pointer"} if how == "copy" else {}
    model = Seq2Seq(9, 40, embedding_size=6, hidden_size=8, **copied).to(dtype)
    source, lengths = torch.randint(4, 9, (2, 4)), torch.tensor([4, 2])
    length = 400  # of 3.7 nats, or 0.8 where copying is likely: bfloat16 stops before
    options = {
        "beam": {"beam_size": 2, "length_penalty": 1.0},
        "coverage": {"beam_size": 2, "coverage_penalty": 0.1},
        "sample": {"sample": True},
    }
    rules = search.SearchOptions(max_length=length, min_length=length, **options.get(how, {}))
    copies = source if copied else None
    searched: Any = model.given(copies=copies)
    if how == "ensemble":
        searched = search.Ensemble([model, model])
    found = search.search(searched, source, lengths, rules)
    tokens = torch.tensor([best.tokens for best, *_ in found])
    read = torch.cat([torch.full((2, 1), START), tokens[:, :-1]], 1)
    with torch.no_grad():
        logits = model.eval()(source, lengths, read, copies=copies)
    log_probs = torch.log_softmax(logits.float(), 2).gather(2, tokens.unsqueeze(2))
    for (best, *_), expected in zip(found, log_probs.sum((1, 2)).tolist(), strict=True):
        assert expected < -300
        assert best.score == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_coverage_penalty_under_autocast(beam_size: int) -> None:
    torch.manual_seed(0)
    model = Seq2Seq(9, 9, embedding_size=6, hidden_size=8)
    source, lengths = torch.randint(4, 9, (3, 4)), torch.tensor([4, 2, 1])
    options = search.SearchOptions(max_length=6, beam_size=beam_size, coverage_penalty=0.5)
    expected = model.search(source, lengths, options)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.search(source, lengths, options)
        encoded, state = model.encode_source(source, lengths)
        step = model.step(torch.full((3,), START), encoded, state)
    assert step.log_probs.dtype == torch.float32
    for (best, *_), (exact, *_) in zip(found, expected, strict=True):
        assert best.score == pytest.approx(exact.score, rel=0.02)
