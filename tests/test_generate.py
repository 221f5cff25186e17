# SPDX-License-Identifier: Apache-2.0
"""The search in one operator: against the search step by step, which is its specification."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from generate_cases import GenerateCase, check, kinds
from operator_cases import CELLS, DTYPES, leaves, map_leaves, pairwise
from tolerances import assert_close, assert_same_bits
from torch import Tensor

from pyseq import functional, reference, search
from pyseq.errors import SearchError
from pyseq.seq2seq import Seq2Seq
from pyseq.types import PAD, START, STOP, UNK, GenerateOutput, ScoreName


def tensors_of(output: GenerateOutput) -> dict[str, Tensor]:
    return dict(leaves(output._asdict()))


# Widths next to those of vectors, tiles and chunks of the output layer.
SIZES = (
    (4, 3, 5, 7, 6, 8, 9),
    (1, 1, 1, 1, 1, 1, 5),
    (6, 17, 8, 16, 16, 16, 40),
    (9, 1, 17, 33, 31, 15, 131),
    (3, 5, 4, 8, 9, 17, 257),
    (7, 2, 16, 64, 64, 64, 300),
)
CASES = [
    GenerateCase(**row)
    for row in pairwise(
        {
            "cell": CELLS,
            "score": ("dot", "general", "concat", None),
            "sizes": SIZES,
            "dtype": DTYPES,
            "layers": (1, 2, 3),
            "input_feeding": (True, False),
            "lengths": (None, "ragged", "holes", "full"),
            "bias": (True, False),
            "feed": (True, False),
            "project_query": (True, False),
            "max_length": (1, 2, 8, 13),
            "beam_size": (1, 2, 3, 4, 5, 6, 20),
            "length_penalty": (0.0, 0.6, 2.0),
            "min_length": (0, 1, 5),
            "n_best": (1, 3, 20),
            "block_ngrams": (None, 1, 2, 3),
            "prefix": (None, "ragged", "long"),
        }
    )
]


DRAWS = [
    GenerateCase(**row)
    for row in pairwise(
        {
            "cell": CELLS,
            "score": ("general", "concat", None),
            "sizes": SIZES,
            "dtype": DTYPES,
            "lengths": (None, "ragged"),
            "max_length": (1, 2, 8, 13),
            "min_length": (0, 1, 5),
            "draws": (1, 3, 20),
            "block_ngrams": (None, 1, 2, 3),
            "prefix": (None, "ragged", "long"),
            "temperature": (1.0, 0.3, 2.0),
            "top_k": (None, 1, 3, 1000),
            "top_p": (1.0, 0.6, 1e-6),
        }
    )
]
COVERAGE = [
    GenerateCase(**row, coverage_penalty=penalty)
    for penalty, row in enumerate(
        pairwise(
            {
                "score": ("general", "concat"),
                "sizes": SIZES[:5],
                "dtype": DTYPES,
                "lengths": (None, "ragged", "holes"),
                "max_length": (1, 8, 13),
                "beam_size": (1, 2, 4, 20),
                "length_penalty": (0.0, 0.6),
                "n_best": (1, 3),
                "heads": (1, 2),
                "window": (None, 2),
            }
        ),
        1,
    )
]
KINDS = kinds(
    {
        "sizes": SIZES[:5],
        "dtype": DTYPES,
        "layers": (1, 2),
        "lengths": (None, "ragged", "holes", "full"),
        "feed": (True, False),
        "max_length": (1, 2, 8, 13),
        "beam_size": (1, 2, 4, 20),
        "length_penalty": (0.0, 0.6),
        "n_best": (1, 3),
        "block_ngrams": (None, 2),
        "prefix": (None, "ragged"),
    }
)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id) for case in (*CASES, *KINDS, *DRAWS, *COVERAGE)]
)
def test_as_step_by_step(case: GenerateCase) -> None:
    check(case)


@pytest.mark.parametrize("score", ["location", "scaled_dot"])
def test_scores_that_are_others_on_other_keys(score: ScoreName) -> None:
    check(GenerateCase(score=score, layers=2, beam_size=2))


def test_the_cases_end_in_every_way() -> None:
    """Or the comparison would not mean much."""
    ends = set()
    for case in CASES:
        found = functional.generate(**case.arguments())
        ends |= {
            "cut off" if length == case.max_length else "empty" if length == 0 else "stopped"
            for length in found.lengths.tolist()
        }
        if len(set(found.lengths.tolist())) > 1:
            ends.add("at different steps")
    assert ends == {"cut off", "empty", "stopped", "at different steps"}


LARGE = [
    GenerateCase(sizes=(7, 17, 16, 67, 33, 35, 131), beam_size=4, max_length=9),
    GenerateCase(sizes=(7, 2, 16, 130, 130, 64, 700), beam_size=5, max_length=9, layers=2),
    GenerateCase(sizes=(7, 1, 64, 256, 256, 256, 500), cell="gru", score="concat", max_length=9),
    GenerateCase(sizes=(1, 1, 64, 256, 1, 1, 500), score=None, beam_size=3, max_length=9),
    GenerateCase(sizes=(30, 64, 8, 64, 64, 64, 60), cell="rnn_tanh", max_length=9),
    GenerateCase(
        sizes=(7, 17, 16, 67, 33, 35, 131),
        beam_size=4,
        n_best=4,
        max_length=9,
        min_length=3,
        block_ngrams=2,
        prefix="ragged",
    ),
    GenerateCase(
        sizes=(33, 5, 16, 130, 67, 64, 300),
        score="concat",
        history="cumulative",
        fed="context",
        beam_size=4,
        max_length=9,
    ),
    GenerateCase(
        sizes=(7, 17, 16, 67, 33, 35, 131), beam_size=4, coverage_penalty=0.3, max_length=9
    ),
    GenerateCase(sizes=(7, 17, 16, 67, 33, 35, 131), draws=3, top_p=0.9, max_length=9),
    GenerateCase(sizes=(33, 17, 8, 32, 16, 16, 60), window=3, heads=3, beam_size=3, max_length=9),
    GenerateCase(
        sizes=(20, 2, 8, 67, 35, 33, 60),
        window=4,
        predict=True,
        fed="context",
        order="bahdanau",
        beam_size=3,
        max_length=9,
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in LARGE])
def test_bits_do_not_depend_on_the_threads(
    case: GenerateCase, dtype: torch.dtype, set_threads: Callable[[int], None]
) -> None:
    case = replace(case, dtype=dtype)
    alone = check(case)
    for threads in (2, 3):
        set_threads(threads)
        for _ in range(2):
            shared = functional.generate(**case.arguments())
            assert_same_bits(tensors_of(shared), tensors_of(alone))


def test_more_tokens_than_input_parts_are_kept() -> None:
    """256 rows of 32 KB are kept; a search with more tokens forgets them and goes on."""
    sizes = (1, 60, 16, 1024, 1, 1, 3000)
    case = GenerateCase(sizes=sizes, score=None, sharpness=4.0, max_length=12, beam_size=2)
    arguments = case.arguments()
    arguments["embedding"] /= 64  # so that what follows a token is not the same in all rows
    together = functional.generate(**arguments)
    assert together.tokens.unique().numel() > 256
    (h, c), feed = arguments["state"]
    for rows in torch.arange(60).split(6):
        arguments["state"] = (h[:, rows], c[:, rows]), feed[rows]
        alone = functional.generate(**arguments)
        assert torch.equal(alone.tokens, together.tokens[rows])
        assert torch.equal(alone.scores, together.scores[rows])


def test_padding_of_the_result_is_pad() -> None:
    case = GenerateCase(sizes=(6, 17, 8, 16, 16, 16, 40), max_length=30)
    found = functional.generate(**case.arguments())
    longest = found.tokens.shape[1]
    assert longest == found.lengths.max() > found.lengths.min()
    beyond = torch.arange(longest) >= found.lengths.unsqueeze(1)
    assert found.tokens[beyond].eq(PAD).all()
    assert found.tokens[~beyond].gt(STOP).all()
    assert found.weights is not None
    assert found.weights[beyond].eq(0).all()
    sums = found.weights.sum(2)[~beyond]
    assert torch.allclose(sums, torch.ones_like(sums))


def test_weights_only_on_demand() -> None:
    case = GenerateCase()
    assert functional.generate(**(case.arguments() | {"need_weights": False})).weights is None
    assert functional.generate(**replace(case, score=None).arguments()).weights is None


def test_no_rows() -> None:
    for need_weights in (False, True):
        arguments = GenerateCase(sizes=(4, 0, 5, 7, 6, 8, 9)).arguments()
        found = functional.generate(**(arguments | {"need_weights": need_weights}))
        assert found.tokens.shape == (0, 0)
        assert found.lengths.shape == found.scores.shape == (0,)
        assert (found.weights is not None) == need_weights


def test_a_limit_that_is_not_reached_costs_nothing() -> None:
    arguments = GenerateCase().arguments()
    arguments["output_bias"][STOP] = 50
    found = functional.generate(**(arguments | {"max_length": 10**12, "beam_size": 3}))
    assert found.lengths.tolist() == [0, 0, 0]


# Ties and forbidden tokens


def constant(logits: list[float], batch: int = 2, **options: Any) -> dict[str, Any]:
    """A call whose logits are the same at every step."""
    case = GenerateCase(sizes=(1, batch, 2, 3, 1, 1, len(logits)), score=None)
    arguments = case.arguments()
    arguments["output_weight"].zero_()
    return arguments | {"output_bias": torch.tensor(logits, dtype=torch.float64)} | options


@pytest.mark.parametrize("beam_size", [1, 2, 50])
def test_of_equal_tokens_the_first_is_chosen(beam_size: int) -> None:
    arguments = constant([0.0, 0.0, -99.0, 1.0, 1.0, 1.0], max_length=3, beam_size=beam_size)
    assert functional.generate(**arguments).tokens.tolist() == [[UNK] * 3] * 2


@pytest.mark.parametrize("beam_size", [1, 4])
def test_pad_and_start_are_never_emitted(beam_size: int) -> None:
    arguments = constant([9.0, 9.0, -99.0, 1.0], max_length=3, beam_size=beam_size)
    found = functional.generate(**arguments)
    assert found.tokens.tolist() == [[UNK] * 3] * 2
    # They keep their share of the probability.
    share = torch.log_softmax(arguments["output_bias"], 0)[UNK].item()
    assert found.scores.tolist() == pytest.approx([3 * share] * 2)


@pytest.mark.parametrize("beam_size", [1, 4])
def test_minus_infinity_forbids_a_token(beam_size: int) -> None:
    for forbidden in (STOP, UNK):
        logits = [0.0, 0.0, 1.0, 2.0, 0.5] + [-math.inf] * 300
        logits[forbidden] = -math.inf
        found = functional.generate(**constant(logits, max_length=3, beam_size=beam_size))
        assert not found.tokens.eq(forbidden).any()
        assert found.scores.isfinite().all()


@pytest.mark.parametrize("beam_size", [1, 4])
def test_if_all_tokens_are_forbidden_nothing_is_emitted(beam_size: int) -> None:
    arguments = constant([1.0, 1.0, *[-math.inf] * 9], max_length=3, beam_size=beam_size)
    for module in (functional, reference):
        found = module.generate(**arguments)
        assert found.lengths.tolist() == [0, 0]
        assert found.scores.tolist() == [-math.inf] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [START, UNK, 200])
@pytest.mark.parametrize("beam_size", [1, 3])
def test_logits_that_are_not_finite_are_refused(
    beam_size: int, place: int, value: float, dtype: torch.dtype
) -> None:
    case = GenerateCase(sizes=(3, 5, 4, 8, 9, 17, 257), dtype=dtype, beam_size=beam_size)
    arguments = case.arguments()
    arguments["output_bias"][place] = value
    with pytest.raises(SearchError, match="logits must be finite, got NaN"):
        functional.generate(**arguments)


def test_one_row_that_is_not_finite_is_enough(set_threads: Callable[[int], None]) -> None:
    arguments = GenerateCase(sizes=(6, 64, 8, 64, 64, 64, 40)).arguments()
    arguments["state"][0][0][0, 50, 3] = math.nan
    for threads in (1, 2):
        set_threads(threads)
        with pytest.raises(SearchError, match="logits must be finite"):
            functional.generate(**arguments)


# The operator


def test_opcheck() -> None:
    for score in ("general", None):
        case = GenerateCase(score=score, beam_size=2, n_best=2, prefix="ragged")
        arguments = case.arguments()
        recorded: list[tuple[Any, ...]] = []
        _record(lambda arguments=arguments: functional.generate(**arguments), recorded)
        for args in recorded:
            torch.library.opcheck(torch.ops.pyseq.generate, args)
    assert recorded


def _record(call: Callable[[], object], recorded: list[tuple[Any, ...]]) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.pyseq.generate.default:
                recorded.append(args)
            return func(*args, **(kwargs or {}))

    with Recorder():
        call()


def test_there_is_no_gradient() -> None:
    arguments = GenerateCase().arguments()
    arguments["output_weight"].requires_grad_()
    assert not functional.generate(**arguments).scores.requires_grad


def test_inputs_are_not_written() -> None:
    for case in CASES[:6]:
        arguments = case.arguments()
        before = {name: tensor.clone() for name, tensor in leaves(arguments)}
        functional.generate(**arguments)
        assert_same_bits(dict(leaves(arguments)), before)


def test_layouts() -> None:
    arguments = GenerateCase(score="dot", layers=2, beam_size=3).arguments()
    strided = map_leaves(
        lambda _, t: torch.stack((t, torch.full_like(t, -1)), -1)[..., 0], arguments
    )
    expected = tensors_of(functional.generate(**arguments))
    assert_same_bits(tensors_of(functional.generate(**strided)), expected)


def test_autocast_computes_in_float32() -> None:
    arguments = GenerateCase(dtype=torch.float32, score="dot", beam_size=2).arguments()
    with torch.autocast("cpu", torch.bfloat16):
        found = functional.generate(**arguments)
    assert_same_bits(tensors_of(found), tensors_of(functional.generate(**arguments)))


BAD: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "max_length": (ValueError, {"max_length": 0}, "max_length must be at least 1 token, got 0"),
    "beam_size": (ValueError, {"beam_size": 0}, "beam_size must be between 1 and .* got 0"),
    "beam_size_huge": (ValueError, {"beam_size": 2**40}, "beam_size must be between 1 and"),
    "penalty": (ValueError, {"length_penalty": -1.0}, "length_penalty must be at least 0 .*-1"),
    "penalty_huge": (ValueError, {"length_penalty": 1e9}, "length_penalty must be at least 0"),
    "penalty_nan": (ValueError, {"length_penalty": math.nan}, "length_penalty .* got nan"),
    "min_length": (
        ValueError,
        {"min_length": 9},
        "min_length must be between 0 and max_length = 8",
    ),
    "n_best": (ValueError, {"n_best": 2}, "n_best must be between 1 and beam_size = 1, got 2"),
    "draws": (
        ValueError,
        {"sample": True, "n_best": 2**40},
        "n_best must be between 1 and .* got 1099511627776",
    ),
    "block": (ValueError, {"block_ngrams": -1}, "block_ngrams must be at least 0, got -1"),
    "prefix": (
        ValueError,
        {"prefix": torch.tensor([[3], [9], [4]])},
        "prefix must hold token ids from 3 to 8, or 0 beyond .* got 9",
    ),
    "prefix_start": (ValueError, {"prefix": torch.ones(3, 1).long()}, "prefix must hold .* got 1"),
    "prefix_rows": (
        RuntimeError,
        {"prefix": torch.zeros(2, 1).long()},
        r"prefix must be \(B, P\) with B = 3, got \(2, 1\)",
    ),
    "prefix_dtype": (RuntimeError, {"prefix": torch.zeros(3, 1)}, "prefix must be int64 .* Float"),
    "cell": (ValueError, {"cell": "elman"}, "cell must be one of .*, got 'elman'"),
    "score": (ValueError, {"score": "cosine"}, "score must be one of .*, got 'cosine'"),
    "weight": (ValueError, {"weight": None}, "weight must be given for score 'general'"),
    "no_state": (ValueError, {"state": None}, "state must hold the hidden state"),
    "vocab": (
        RuntimeError,
        {"embedding": torch.zeros(2, 5, dtype=torch.float64)},
        r"embedding must be \(V, E\) with V at least 3, got \(2, 5\)",
    ),
    "embedding": (
        RuntimeError,
        {"embedding": torch.zeros(9, dtype=torch.float64)},
        r"embedding must be \(V, E\), got \(9,\)",
    ),
    "dtype": (
        RuntimeError,
        {"embedding": torch.zeros(9, 5, dtype=torch.int64)},
        "embedding must be float16, bfloat16, float32 or float64, got Long",
    ),
    "features": (
        RuntimeError,
        {"embedding": torch.zeros(9, 6, dtype=torch.float64)},
        r"w_ih of layer 0 must be \(G\*H, I \+ H\) = \(28, 13\), got \(28, 12\)",
    ),
    "output_weight": (
        RuntimeError,
        {"output_weight": torch.zeros(10, 7, dtype=torch.float64)},
        r"output_weight must be \(V, H\) = \(9, 7\), got \(10, 7\)",
    ),
    "output_bias": (
        RuntimeError,
        {"output_bias": torch.zeros(9)},
        "output_bias must have the dtype of embedding, Double, got Float",
    ),
    "keys": (RuntimeError, {"keys": None}, "keys, memory and combine must be given"),
    "combine": (RuntimeError, {"combine": None}, "keys, memory and combine must be given"),
    "lengths": (
        RuntimeError,
        {"lengths": torch.tensor([1, 5, 1])},
        "lengths must be between 0 and S = 4, got 5 at row 1",
    ),
    "drawn": (
        ValueError,
        {"temperature": 0.5},
        "temperature, top_k and top_p go with sample=True, got 0.5, None and 1.0 without",
    ),
    "top_k": (ValueError, {"sample": True, "top_k": 0}, "top_k must be at least 1, got 0"),
    "unattended": (
        ValueError,
        {"score": None, "weight": None},
        "keys, memory, combine, weights and input_feeding go with a score, got none",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case: str) -> None:
    error, changes, match = BAD[case]
    with pytest.raises(error, match=match):
        functional.generate(**(GenerateCase().arguments() | changes))


# Seq2Seq takes the operator by itself


def model_and_sources(**options: Any) -> tuple[Seq2Seq, Tensor, Tensor]:
    model = Seq2Seq(11, 9, embedding_size=6, hidden_size=8, dropout=0.5, **options)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model, torch.randint(4, 11, (5, 6)), torch.tensor([6, 3, 1, 5, 4])


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The beam sizes of all calls of the operator."""
    calls: list[int] = []
    operator = functional.generate

    def generate(*args: Any, **options: Any) -> GenerateOutput:
        calls.append(options["beam_size"])
        return operator(*args, **options)

    monkeypatch.setattr(functional, "generate", generate)
    # In one call with the encoder it would not be seen: that is for test_search_whole.py.
    monkeypatch.setattr(functional.generation, "search_whole", lambda *_: None)
    return calls


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("score", ["dot", "general", "concat", None])
def test_the_model_is_searched_in_one_operator(
    score: str | None, beam_size: int, fused_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source, lengths = model_and_sources(score=score, num_layers=2)
    model.double()
    options = {"max_length": 7, "beam_size": beam_size}
    fused = model.generate(source, lengths, **options)
    assert fused_calls == [beam_size]
    monkeypatch.setattr(Seq2Seq, "fused_search", lambda self: None)
    stepped = model.generate(source, lengths, **options)
    assert fused_calls == [beam_size]
    for ours, theirs in zip(fused, stepped, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.score == pytest.approx(theirs.score, abs=1e-9)
        assert (ours.weights is None) == (theirs.weights is None) == (score is None)
        if ours.weights is not None and theirs.weights is not None:
            assert_close({"weights": ours.weights}, {"weights": theirs.weights})


class Doubling(Seq2Seq):
    """A model with a step of its own."""

    def step(self, *args: Any, **options: Any) -> search.Step:
        step = super().step(*args, **options)
        return step._replace(log_probs=torch.log_softmax(2 * step.log_probs, -1))


def hooked(model: Seq2Seq) -> None:
    model.decoder.output.register_forward_hook(lambda module, args, output: 2 * output)


def parametrized(model: Seq2Seq) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.decoder.output)


def replaced(model: Seq2Seq) -> None:
    model.decoder.output = torch.nn.Sequential(model.decoder.output)  # type: ignore[assignment]


def renormalizing(model: Seq2Seq) -> None:
    model.decoder.embedding.max_norm = 1.0


def with_another_forward(model: Seq2Seq) -> None:
    output = model.decoder.output
    linear = torch.nn.functional.linear
    output.forward = lambda x: 2 * linear(x, output.weight)  # type: ignore[method-assign]


def with_a_step_of_its_own(model: Seq2Seq) -> None:
    step = model.step
    model.step = lambda *args, **options: step(*args, **options)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        parametrized,
        replaced,
        renormalizing,
        with_another_forward,
        with_a_step_of_its_own,
    ],
)
def test_a_model_that_does_more_is_searched_step_by_step(
    change: Callable[[Seq2Seq], None], fused_calls: list[int]
) -> None:
    model, source, lengths = model_and_sources()
    change(model)
    for beam_size in (1, 3):
        model.generate(source, lengths, max_length=4, beam_size=beam_size)
    assert fused_calls == []


def test_hooks_of_all_modules_are_called(fused_calls: list[int]) -> None:
    model, source, lengths = model_and_sources()

    def double(module: torch.nn.Module, args: object, output: Tensor) -> Tensor | None:
        return 2 * output if module is model.decoder.output else None

    plain = model.eval().generate(source, lengths, max_length=4)
    handle = torch.nn.modules.module.register_module_forward_hook(double)
    try:
        sharper = model.generate(source, lengths, max_length=4)
    finally:
        handle.remove()
    assert fused_calls == [1]
    assert [h.score for h in sharper] != [h.score for h in plain]


def test_a_step_of_ones_own_is_taken(fused_calls: list[int]) -> None:
    plain, source, lengths = model_and_sources()
    model = Doubling(**plain.config)
    model.load_state_dict(plain.state_dict())
    sharper = model.generate(source, lengths, max_length=4)
    assert fused_calls == []
    assert [h.score for h in sharper] != [
        h.score for h in plain.generate(source, lengths, max_length=4)
    ]


def test_what_was_no_part_of_the_first_fused_searches_is_not_asked_of_them() -> None:
    """Nor of one that a model of somebody else's has."""
    model, source, lengths = model_and_sources()
    asked: list[int] = []

    def narrow(encoded: Any, state: Any, *, beam_size: int, **others: Any) -> GenerateOutput:
        asked.append(beam_size)
        return model.decoder.generate(encoded, state, beam_size=beam_size, **others)

    class Narrow(Seq2Seq):
        def fused_search(self) -> Any:
            return narrow

    model.__class__ = Narrow
    search.sample(model, source, lengths, max_length=4)
    search.beam(model, source, lengths, max_length=4, beam_size=2, coverage_penalty=0.2)
    assert asked == []
    search.beam(model, source, lengths, max_length=4, beam_size=2)
    assert asked == [2]


def test_options_of_a_greedy_search_are_checked() -> None:
    model, source, lengths = model_and_sources()
    with pytest.raises(ValueError, match="length_penalty must be"):
        model.generate(source, lengths, max_length=4, length_penalty=-5.0)
