# SPDX-License-Identifier: Apache-2.0
"""All options of the searches: against every sequence that there is, and against forward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from chains import LENGTHS, SOURCE, Chain, chain
from generate_cases import MODEL_KINDS
from torch import Tensor

from pyseq import Ensemble, Seq2Seq, Tagger, functional, search
from pyseq.search import Hypothesis, SearchOptions
from pyseq.types import PAD, START, STOP, UNK, GenerateOutput


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """The tensors are tiny: more threads would only wait for one another."""
    set_threads(1)


def attentive_chain() -> Chain:
    model = chain()
    model.attention = torch.softmax(torch.randn(3, 6, 2, dtype=torch.float64) * 2, -1)
    model.attention[2] = torch.tensor([1.0, 0.0])  # the row whose source has one position
    return model


class Found(NamedTuple):
    rank: float
    score: float
    tokens: list[int]


def has_repeated(tokens: Sequence[int], size: int | None, *, free: int) -> bool:
    """Whether an n-gram that ends beyond the first ``free`` tokens was there before."""
    if size is None:
        return False
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return any(gram in grams[:i] for i, gram in enumerate(grams) if i + size > free)


def every_sequence(model: Chain, row: int, options: SearchOptions) -> list[Found]:
    """All that may be emitted, the best one first."""
    table = model.log_probs[row].tolist()
    words = [token for token in range(len(table)) if token not in (PAD, START, STOP)]
    prefixes = options.prefix or [()]
    prefix = list(prefixes[row % len(prefixes)])
    found = []
    for length in range(max(options.min_length, len(prefix)), options.max_length + 1):
        for product in itertools.product(words, repeat=length):
            tokens = list(product)
            if tokens[: len(prefix)] != prefix:
                continue
            if has_repeated(tokens, options.block_ngrams, free=len(prefix)):
                continue
            emitted = [*tokens, STOP] if length < options.max_length else tokens
            read = [START, *emitted[:-1]]
            score = sum(table[last][token] for last, token in zip(read, emitted, strict=True))
            rank = score / ((5 + len(emitted)) / 6) ** options.length_penalty
            if options.coverage_penalty:
                assert model.attention is not None
                sums = model.attention[row, read].sum(0)[: LENGTHS[row]]
                rank += options.coverage_penalty * sums.clamp(max=1).log().sum().item()
            found.append(Found(rank, score, tokens))
    return sorted(found, reverse=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "min-length": {"min_length": 2},
    "min-is-max": {"min_length": 4},
    "no-token-twice": {"block_ngrams": 1},
    "no-bigram-twice": {"block_ngrams": 2},
    "one-prefix": {"prefix": [[UNK, 4]]},
    "prefixes": {"prefix": [[5], [], [UNK, UNK, 4]]},
    "prefix-against-the-rules": {"prefix": [[4, 4, 4]], "block_ngrams": 1},
    "prefix-is-all": {"prefix": [[4, 5, 4, UNK]]},
    "length-penalty": {"length_penalty": 1.5},
    "coverage-penalty": {"coverage_penalty": 0.7},
    "both-penalties": {"length_penalty": 0.8, "coverage_penalty": 2.0},
    "everything": {
        "length_penalty": 1.0,
        "coverage_penalty": 0.5,
        "min_length": 1,
        "block_ngrams": 2,
        "prefix": [[4]],
    },
}


@pytest.mark.parametrize("n_best", [1, 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_wide_beam_finds_the_best_sequences(name: str, n_best: int) -> None:
    model = attentive_chain()
    options = SearchOptions(max_length=4, beam_size=200, n_best=n_best, **OPTIONS[name])
    found = search.search(model, SOURCE, LENGTHS, options)
    for row, hypotheses in enumerate(found):
        best = every_sequence(model, row, options)[:n_best]
        assert [h.tokens for h in hypotheses] == [each.tokens for each in best]
        scores = [each.score for each in best]
        assert [h.score for h in hypotheses] == pytest.approx(scores, abs=1e-12)


def test_a_beam_that_is_narrow_keeps_the_rules() -> None:
    model = chain(vocab=9, batch=20)
    source, lengths = torch.zeros(20, 2, dtype=torch.int64), torch.full((20,), 2)
    rules = {"max_length": 9, "min_length": 3, "block_ngrams": 2, "prefix": [[4, 5]]}
    for how in ({}, {"sample": True, "n_best": 2}, {"beam_size": 3, "n_best": 3}):
        found = search.search(model, source, lengths, SearchOptions(**rules, **how))
        for hypotheses in found:
            assert 1 <= len(hypotheses) <= how.get("n_best", 1)
            for hypothesis in hypotheses:
                assert len(hypothesis.tokens) >= 3
                assert hypothesis.tokens[:2] == [4, 5]
                assert not has_repeated(hypothesis.tokens, 2, free=2)
        if not how.get("sample"):
            assert all([h.score for h in hs] == sorted(h.score for h in hs)[::-1] for hs in found)


def test_the_best_one_is_the_first_of_many() -> None:
    model = chain(vocab=9, batch=20)
    source, lengths = torch.zeros(20, 2, dtype=torch.int64), torch.full((20,), 2)
    one = SearchOptions(max_length=8, beam_size=4, length_penalty=0.5)

    def rank(hypothesis: Hypothesis) -> float:
        count = len(hypothesis.tokens) + (len(hypothesis.tokens) < 8)
        return hypothesis.score / ((5 + count) / 6) ** 0.5

    first = search.search(model, source, lengths, one)
    many = search.search(model, source, lengths, replace(one, n_best=4))
    for alone, hypotheses in zip(first, many, strict=True):
        # A row of which more is wanted goes on for longer, and may find a better one.
        assert rank(hypotheses[0]) >= rank(alone[0]) - 1e-12
        assert [rank(h) for h in hypotheses] == sorted(map(rank, hypotheses), reverse=True)
        assert len({tuple(h.tokens) for h in hypotheses}) == len(hypotheses) > 1


def test_fewer_sequences_than_asked_for() -> None:
    logits = torch.full((3, 6, 6), -math.inf, dtype=torch.float64)
    logits[:, :, STOP] = 0
    logits[1:, START, 4] = 0
    options = SearchOptions(max_length=5, beam_size=4, n_best=4)
    found = search.search(Chain(logits), SOURCE, LENGTHS, options)
    assert [[h.tokens for h in hs] for hs in found] == [[[]], [[], [4]], [[], [4]]]
    # Not even one: then the empty sequence says by its score that it is none.
    for how in ({}, {"beam_size": 2}, {"sample": True}):
        options = SearchOptions(max_length=5, min_length=2, block_ngrams=1, **how)
        nothing = search.search(Chain(logits), SOURCE, LENGTHS, options)
        assert [[h.score for h in hs] for hs in nothing] == [[-math.inf]] * 3


def test_coverage_prefers_what_has_seen_the_whole_source() -> None:
    """Two ways of the same probability; one of them looks at the second position too."""
    logits = torch.full((1, 6, 6), -math.inf, dtype=torch.float64)
    logits[0, START, [4, 5]] = torch.tensor([0.01, 0.0], dtype=torch.float64)
    logits[0, 4, STOP] = logits[0, 5, STOP] = 0
    attention = torch.zeros(1, 6, 2, dtype=torch.float64)
    attention[0, START, 0] = attention[0, 4, 0] = attention[0, 5, 1] = 1
    model = Chain(logits, attention)
    options = SearchOptions(max_length=3, beam_size=2, n_best=2)
    for beta, expected in ((0.0, [[4], [5]]), (0.1, [[5], [4]])):
        found = search.search(
            model, SOURCE[:1], LENGTHS[:1], replace(options, coverage_penalty=beta)
        )
        assert [h.tokens for h in found[0]] == expected
        assert all(math.isfinite(h.score) for h in found[0])


def test_weights_are_only_given_if_they_are_wanted() -> None:
    model = attentive_chain()
    options = SearchOptions(max_length=4, beam_size=3, coverage_penalty=1.0, need_weights=False)
    assert all(hs[0].weights is None for hs in search.search(model, SOURCE, LENGTHS, options))


def test_draws_of_a_row_are_independent() -> None:
    model = chain(vocab=6, sharpness=0.1)
    options = SearchOptions(max_length=1, sample=True, n_best=3000)
    found = search.search(
        model, SOURCE, LENGTHS, options, generator=torch.Generator().manual_seed(3)
    )
    for row, hypotheses in enumerate(found):
        counts = torch.zeros(6, dtype=torch.float64)
        for hypothesis in hypotheses:
            counts[hypothesis.tokens[0] if hypothesis.tokens else STOP] += 1
        probs = model.log_probs[row, START].exp()
        probs[[PAD, START]] = 0
        assert (counts / 3000 - probs / probs.sum()).abs().max() < 0.05


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "min_length": ({"min_length": 9}, "min_length must be between 0 and max_length = 5 .* got 9"),
    "n_best": ({"n_best": 3, "beam_size": 2}, "n_best must be at most beam_size = 2, got 3"),
    "no_best": ({"n_best": 0}, "n_best must be at least 1, got 0"),
    "ngrams": ({"block_ngrams": 0}, "block_ngrams must be at least 1, got 0"),
    "coverage": ({"coverage_penalty": math.nan}, "coverage_penalty must be .* got nan"),
    "huge_penalty": ({"length_penalty": 1e9}, "length_penalty must be so small .* got 1000000000"),
    "prefix_special": ({"prefix": [[4, STOP]]}, "prefix must hold token ids of at least 3, got 2"),
    "prefix_flat": ({"prefix": [4, 5]}, "prefix must be sequences of token ids, got int"),
    "prefix_long": ({"prefix": [[4] * 6]}, "prefix must have at most max_length = 5 tokens, got 6"),
    "beam_of_draws": ({"sample": True, "beam_size": 2}, "beam_size must be 1 for sampling, got 2"),
    "prefix_half": ({"prefix": [[4.5]]}, "each token id of prefix must be an integer, got 4.5"),
    "prefix_text": ({"prefix": ["ab"]}, "each token id of prefix must be an integer, got 'a'"),
    "prefix_number": ({"prefix": 4}, "prefix must be sequences of token ids, got int"),
    "prefix_tensor": ({"prefix": torch.tensor([4])}, "prefix must be sequences of token ids, got"),
    "prefix_floats": ({"prefix": torch.tensor([[4.0]])}, "each token id .* must be an integer"),
    "half_length": ({"max_length": 2.5}, "max_length must be an integer, got 2.5"),
    "no_length": ({"max_length": None}, "max_length must be an integer, got None"),
    "half_beam": ({"beam_size": 1.5}, "beam_size must be an integer, got 1.5"),
    "text_beam": ({"beam_size": "3"}, "beam_size must be an integer, got '3'"),
    "true_beam": ({"beam_size": True}, "beam_size must be an integer, got True"),
    "half_draws": ({"sample": True, "top_k": 2.5}, "top_k must be an integer, got 2.5"),
    "text_penalty": ({"length_penalty": "1"}, "length_penalty must be a number, got '1'"),
    "true_share": ({"sample": True, "top_p": True}, "top_p must be a number, got True"),
    "draws": ({"top_k": 3}, "top_k must be None without sample=True, got 3"),
    "temperature": ({"temperature": 0.5}, "temperature must be 1.0 without sample=True, got 0.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_options_that_make_no_sense_are_refused(case: str) -> None:
    options, match = BAD[case]
    with pytest.raises(ValueError, match=match):
        SearchOptions(**{"max_length": 5, **options})


def test_integers_of_any_type_will_do() -> None:
    exact = SearchOptions(max_length=5, beam_size=2, prefix=[[4, 5]], length_penalty=0.5)
    tensors: dict[str, Any] = {
        "max_length": torch.tensor(5),
        "beam_size": torch.tensor([2])[0],
        "prefix": torch.tensor([[4, 5]]),
        "length_penalty": torch.tensor(0.5),
    }
    assert SearchOptions(**tensors) == exact
    found = search.search(chain(), SOURCE, LENGTHS, SearchOptions(**tensors))
    assert all(best.tokens[:2] == [4, 5] for best, *_ in found)


def test_options_that_do_not_fit_the_sources_are_refused() -> None:
    rows = SearchOptions(max_length=3, prefix=[[4], [4]])
    for function in (search.search, search.stream):
        with pytest.raises(ValueError, match=r"one sequence for each of the 3 rows, .* got 2"):
            function(chain(), SOURCE, LENGTHS, rows)
    with pytest.raises(ValueError, match="prefix must hold token ids below 6, got 6"):
        search.search(chain(), SOURCE, LENGTHS, SearchOptions(max_length=3, prefix=[[6]]))


# With the real model

MAX_LENGTH = 7


def model_and_sources(seed: int = 0, **options: Any) -> tuple[Seq2Seq, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = Seq2Seq(11, 9, embedding_size=6, hidden_size=8, dropout=0.5, **options).double()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # sharp enough for the rows to differ
    return model, torch.randint(4, 11, (5, 6)), torch.tensor([6, 3, 1, 5, 4])


def emitted(hypothesis: Hypothesis) -> list[int]:
    return hypothesis.tokens + [STOP] * (len(hypothesis.tokens) < MAX_LENGTH)


def forward_score(model: Seq2Seq, source: Tensor, length: Tensor, tokens: list[int]) -> float:
    target_in = torch.tensor([[START, *tokens[:-1]]])
    logits = model.eval()(source[None, :length], length[None], target_in)
    log_probs = torch.log_softmax(logits[0], -1)
    return log_probs[range(len(tokens)), tokens].sum().item()


MODELS: dict[str, dict[str, Any]] = {"general": {}, "none": {"score": None}, **MODEL_KINDS}
HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "draws": {"sample": True, "n_best": 3, "top_k": 5, "temperature": 0.7},
    "beam": {"beam_size": 4, "n_best": 4, "length_penalty": 0.5},
    "coverage": {"beam_size": 4, "n_best": 2, "coverage_penalty": 0.5},
}
RULES: dict[str, dict[str, Any]] = {
    "free": {},
    "ruled": {"min_length": 2, "block_ngrams": 2, "prefix": [[4], [5, 6], [], [7, 7, 7], [UNK]]},
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("how", HOW)
def test_scores_are_those_of_forward(how: str, rules: str) -> None:
    model, source, lengths = model_and_sources()
    options = SearchOptions(max_length=MAX_LENGTH, **HOW[how], **RULES[rules])
    found = model.search(source, lengths, options)
    for row, hypotheses in enumerate(found):
        assert hypotheses
        for hypothesis in hypotheses:
            score = forward_score(model, source[row], lengths[row], emitted(hypothesis))
            assert hypothesis.score == pytest.approx(score, abs=1e-10)
            assert hypothesis.weights is not None
            assert hypothesis.weights.shape == (len(hypothesis.tokens), lengths[row])


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", MODELS)
def test_one_operator_or_many_steps(
    name: str, how: str, rules: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "coverage" and name == "none":
        pytest.skip("coverage is that of attention")
    model, source, lengths = model_and_sources(**MODELS[name])
    calls: list[dict[str, Any]] = []
    operator = functional.generate

    def generate(*args: Any, **options: Any) -> GenerateOutput:
        calls.append(options)
        return operator(*args, **options)

    monkeypatch.setattr(functional, "generate", generate)
    monkeypatch.setattr(functional.generation, "search_whole", lambda *_: None)
    options = SearchOptions(max_length=MAX_LENGTH, **HOW[how], **RULES[rules])
    torch.manual_seed(1)
    fused = model.search(source, lengths, options)
    assert len(calls) == 1
    monkeypatch.setattr(Seq2Seq, "fused_search", lambda self: None)
    torch.manual_seed(1)
    stepped = model.search(source, lengths, options)
    assert len(calls) == 1
    for ours, theirs in zip(fused, stepped, strict=True):
        assert [h.tokens for h in ours] == [h.tokens for h in theirs]
        assert [h.score for h in ours] == pytest.approx([h.score for h in theirs], abs=1e-9)
        for one, other in zip(ours, theirs, strict=True):
            assert (one.weights is None) == (other.weights is None) == (name == "none")
            if one.weights is not None and other.weights is not None:
                torch.testing.assert_close(one.weights, other.weights)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["greedy", "draws"])
def test_a_stream_gives_what_search_gives(how: str, name: str) -> None:
    model, source, lengths = model_and_sources(**MODELS[name])
    options = SearchOptions(
        max_length=MAX_LENGTH, min_length=1, block_ngrams=3, **{**HOW[how], "n_best": 1}
    )
    found = model.search(source, lengths, options, generator=torch.Generator().manual_seed(5))
    tokens: list[list[int]] = [[] for _ in found]
    scores = [0.0] * 5
    weights: list[list[Tensor]] = [[] for _ in found]
    generator = torch.Generator().manual_seed(5)
    for item in model.stream(source, lengths, options, generator=generator):
        assert model.training  # the mode is only left while a step is made
        assert torch.is_grad_enabled()
        tokens[item.row].append(item.token)
        scores[item.row] += item.score
        if item.weights is not None:
            weights[item.row].append(item.weights)
    assert tokens == [hs[0].tokens for hs in found]
    for row, (hypothesis,) in enumerate(found):
        if len(hypothesis.tokens) == MAX_LENGTH:  # else that of <stop> is missing
            assert scores[row] == pytest.approx(hypothesis.score, abs=1e-10)
        if hypothesis.weights is not None and weights[row]:
            torch.testing.assert_close(torch.stack(weights[row]), hypothesis.weights)


def test_a_stream_makes_one_step_for_each_token() -> None:
    model = chain()
    model.log_probs[:, :, STOP] = -math.inf
    tokens = search.stream(model, SOURCE[:1], LENGTHS[:1], SearchOptions(max_length=6))
    for steps in range(1, 4):
        next(tokens)
        assert model.calls == [1] * steps


def test_a_stream_follows_one_hypothesis() -> None:
    for options in ({"beam_size": 2}, {"sample": True, "n_best": 2}, {"length_penalty": 1.0}):
        with pytest.raises(ValueError, match="a stream follows one hypothesis"):
            search.stream(chain(), SOURCE, LENGTHS, SearchOptions(max_length=3, **options))
    assert list(search.stream(chain(), SOURCE[:0], LENGTHS[:0], SearchOptions(max_length=3))) == []


# Ensembles


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("how", HOW)
def test_scores_of_an_ensemble_are_those_of_the_mean_probability(how: str, rules: str) -> None:
    parts = [model_and_sources(seed, cell=cell)[0] for seed, cell in enumerate(("lstm", "gru"))]
    _, source, lengths = model_and_sources()
    model = Ensemble(parts, weights=[3, 1])
    options = SearchOptions(max_length=MAX_LENGTH, **HOW[how], **RULES[rules])
    for row, hypotheses in enumerate(search.search(model, source, lengths, options)):
        for hypothesis in hypotheses:
            tokens = emitted(hypothesis)
            target_in = torch.tensor([[START, *tokens[:-1]]])
            one = source[row : row + 1, : lengths[row]], lengths[row : row + 1], target_in
            probs = [torch.softmax(part.eval()(*one)[0], -1) for part in parts]
            mean = 0.75 * probs[0] + 0.25 * probs[1]
            score = mean[range(len(tokens)), tokens].log().sum().item()
            assert hypothesis.score == pytest.approx(score, abs=1e-10)
            assert hypothesis.weights is not None


def test_an_ensemble_of_one_model_thrice_is_that_model() -> None:
    model, source, lengths = model_and_sources()
    options = SearchOptions(max_length=MAX_LENGTH, beam_size=3, n_best=2)
    ours = search.search(Ensemble([model] * 3), source, lengths, options)
    for one, other in zip(ours, model.search(source, lengths, options), strict=True):
        assert [h.tokens for h in one] == [h.tokens for h in other]
        assert [h.score for h in one] == pytest.approx([h.score for h in other], abs=1e-10)
        for h, g in zip(one, other, strict=True):
            assert h.weights is not None
            assert g.weights is not None
            torch.testing.assert_close(h.weights, g.weights)


def test_an_ensemble_gives_no_weights_unless_all_models_do() -> None:
    model, source, lengths = model_and_sources()
    plain, _, _ = model_and_sources(score=None)
    found = search.greedy(Ensemble([model, plain]), source, lengths, max_length=3)
    assert [h.weights for h in found] == [None] * 5
    with pytest.raises(ValueError, match="coverage_penalty needs a model with attention"):
        search.beam(plain, source, lengths, max_length=3, beam_size=2, coverage_penalty=1.0)


def test_dropout_is_off_in_all_models_of_an_ensemble() -> None:
    parts = [model_and_sources(seed)[0] for seed in range(2)]
    _, source, lengths = model_and_sources()
    found = [search.greedy(Ensemble(parts), source, lengths, max_length=4) for _ in range(2)]
    assert [h.score for h in found[0]] == [h.score for h in found[1]]
    assert all(part.training for part in parts)


def bad_ensembles() -> Iterator[tuple[Callable[[], object], str]]:
    model, source, lengths = model_and_sources()
    other = Seq2Seq(11, 10, embedding_size=6, hidden_size=8).double()
    yield lambda: Ensemble([]), "models must hold at least one model, got none"
    yield lambda: Ensemble([model], weights=[1, 2]), "weights must be 1 positive numbers"
    yield lambda: Ensemble([model], weights=[0]), "weights must be 1 positive numbers"
    yield lambda: Ensemble([model, model], weights=[1e300, 1e-300]), "weights must be so near"
    yield (
        lambda: search.greedy(Ensemble([model, other]), source, lengths, max_length=2),
        r"must have the same target tokens, got \[9, 10\]",
    )


def test_weights_of_an_ensemble_may_be_of_any_size() -> None:
    model, _, _ = model_and_sources()
    for scale in (1e308, 5e-324, 1.0):
        assert Ensemble([model, model], weights=[scale, scale]).weights == (0.5, 0.5)


def test_an_ensemble_is_made_of_models() -> None:
    model, _, _ = model_and_sources()
    for models, match in (
        (model, "models must be a sequence of models, got Seq2Seq"),
        ([model, 3], "models must have modules, encode_source and step, got int without modules"),
        ([model, Tagger(5, 5)], "got Tagger without encode_source"),
    ):
        with pytest.raises(TypeError, match=match):
            Ensemble(models)  # type: ignore[arg-type]


def test_ensembles_that_make_no_sense_are_refused() -> None:
    for make, match in bad_ensembles():
        with pytest.raises(ValueError, match=match):
            make()
