# SPDX-License-Identifier: Apache-2.0
"""Scheduled sampling: its schedules, what it reads, and its gradient, step by step in torch."""

from __future__ import annotations

import math
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generate_cases import (
    MODEL_KINDS,
    GenerateCase,
    check_scheduled,
    kinds,
    scheduled_arguments,
)
from operator_cases import CELLS, DTYPES, pairwise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyseq import Seq2Seq, cli, functional, reference, scheduled, training
from pyseq.errors import CheckpointError
from pyseq.scheduled import Constant, Exponential, InverseSigmoid, Linear, Sampling, Schedule
from pyseq.search import choose
from pyseq.text import Pair
from pyseq.training import Data
from pyseq.types import PAD, START, STOP, UNK, ScoreName


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """The tensors are tiny: more threads would only wait for one another."""
    set_threads(1)


# Schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(0.3), {0: 0.3, 10**9: 0.3}),
        (Linear(1e-3), {0: 1.0, 100: 0.9, 1000: 0.0, 10**12: 0.0}),
        (Linear(0.5, 2.0, 0.1), {0: 1.0, 2: 1.0, 3: 0.5, 4: 0.1, 5: 0.1}),
        (Exponential(0.5), {0: 1.0, 3: 0.125, 10**9: 0.0}),
        (InverseSigmoid(100.0), {0: 100 / 101, 100: 100 / (100 + math.e), 10**12: 0.0}),
        (InverseSigmoid(1.0), {0: 0.5, 5: 1 / (1 + math.exp(5)), 800: 1 / (1 + math.exp(700))}),
    ],
    ids=str,
)
def test_schedules(schedule: Schedule, expected: dict[int, float]) -> None:
    for updates, value in expected.items():
        if updates == 800:
            assert 0 <= schedule(updates) < value  # where exp(i / k) overflows
        else:
            assert schedule(updates) == pytest.approx(value, abs=1e-12)
    values = [schedule(updates) for updates in range(300)]
    assert values == sorted(values, reverse=True)
    assert all(0 <= value <= 1 for value in values)


def test_the_inverse_sigmoid_is_one_half_at_k_log_k() -> None:
    assert InverseSigmoid(700.0)(round(700 * math.log(700))) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("constant:0.25", Constant(0.25)),
        ("linear:1e-4", Linear(1e-4)),
        ("linear:0.001,1.5,0.2", Linear(0.001, 1.5, 0.2)),
        ("exponential:0.999", Exponential(0.999)),
        ("inverse-sigmoid:2000", InverseSigmoid(2000.0)),
    ],
)
def test_schedules_are_written_and_read(text: str, schedule: Schedule) -> None:
    assert scheduled.parse(text) == schedule
    assert scheduled.from_record(asdict(schedule)) == schedule


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Constant(1.5), r"epsilon must be in \[0, 1\], got 1.5"),
        (lambda: Constant(math.nan), "epsilon must be .* got nan"),
        (lambda: Linear(-1.0), "slope must be at least 0 and finite, got -1.0"),
        (lambda: Linear(math.inf), "slope must be .* got inf"),
        (lambda: Linear(0.1, least=2.0), r"least must be in \[0, 1\], got 2.0"),
        (lambda: Exponential(1.0), r"k must be in \(0, 1\), got 1.0"),
        (lambda: InverseSigmoid(0.5), "k must be at least 1 and finite, got 0.5"),
        (lambda: scheduled.parse("cosine:1"), "must be one of constant, linear, .* got 'cosine'"),
        (lambda: scheduled.parse("linear"), "linear must be written linear:slope,begin,least, got"),
        (lambda: scheduled.parse("linear:a"), "linear must be written linear:slope,begin,least"),
        (lambda: scheduled.parse("constant:1,2"), "constant must be written constant:epsilon"),
        (lambda: scheduled.from_record({"name": "linear", "k": 1}), "the numbers of Linear"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


# Choices


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([9.0, 9.0, 0.5, -1.0, 1.0, -math.inf, 0.0], dtype=torch.float64)
    probs = torch.softmax(logits[STOP:], 0)
    places = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    chosen = choose(logits.expand(10000, -1), places)
    counts = torch.bincount(chosen, minlength=7) / 10000
    assert (counts[STOP:] - probs).abs().max() < 2e-4
    assert counts[[PAD, START]].sum() == 0


@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-24, 1 - 2**-53])
def test_a_draw_is_a_token_whatever_the_logits(draw: float) -> None:
    for dtype in (torch.float32, torch.float64):
        draws = torch.tensor([draw], dtype=dtype)
        for logits in ([0.0, 0.0, -math.inf, 1.0, -math.inf], [0.0, 0.0, math.nan, 1.0, 2.0]):
            token = choose(torch.tensor([logits], dtype=dtype), draws).item()
            assert token == UNK or (math.isnan(logits[2]) and STOP <= token < 5)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "steps"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_draws_of_short_dtypes_reach_every_token(
    dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 has 128 numbers between one half and one."""
    monkeypatch.setattr("pyseq.seq2seq.Decoder.is_fused", lambda self: fused)
    vocab = 2000
    model = Seq2Seq(9, vocab, embedding_size=4, hidden_size=4, num_layers=1).to(dtype).eval()
    torch.nn.init.zeros_(model.decoder.output.weight)
    torch.nn.init.zeros_(model.decoder.output.bias)
    target_in = torch.full((400, 101), START)
    source = torch.full((400, 1), UNK)
    torch.manual_seed(0)
    fed = model.scheduled_inputs(source, source[:, 0] * 0 + 1, target_in, Sampling(0.0, "sample"))
    counts = torch.bincount(fed[:, 1:].flatten(), minlength=vocab)
    assert counts[:STOP].sum() == 0
    # 20 each on average: none is missing, none is read for others.
    assert counts[STOP:].min() > 0
    assert counts.max() < 60


# The operator

OPERATOR_CASES = [
    GenerateCase(**row)
    for row in pairwise(
        {
            "cell": CELLS,
            "score": ("dot", "general", "concat", None),
            "sizes": (
                (4, 3, 5, 7, 6, 8, 9),
                (1, 1, 1, 1, 1, 1, 5),
                (6, 17, 8, 16, 16, 16, 40),
                (9, 1, 17, 33, 31, 15, 131),
                (3, 5, 4, 8, 9, 17, 257),
            ),
            "dtype": DTYPES,
            "layers": (1, 2, 3),
            "input_feeding": (True, False),
            "lengths": (None, "ragged", "holes", "full"),
            "bias": (True, False),
            "feed": (True, False),
            "project_query": (True, False),
            "max_length": (1, 2, 8),
        }
    )
]


KINDS = kinds(
    {
        "sizes": ((4, 3, 5, 7, 6, 8, 9), (1, 1, 1, 1, 1, 1, 5), (9, 5, 17, 33, 31, 15, 40)),
        "dtype": DTYPES,
        "layers": (1, 2),
        "lengths": (None, "ragged", "holes", "full"),
        "feed": (True, False),
        "max_length": (1, 2, 8),
    }
)


@pytest.mark.parametrize("drawn", [False, True], ids=["argmax", "draws"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id) for case in [*OPERATOR_CASES, *KINDS]]
)
def test_the_operator_goes_step_by_step(case: GenerateCase, masked: bool, drawn: bool) -> None:
    check_scheduled(case, masked=masked, drawn=drawn)


def test_the_operator_chooses() -> None:
    """Or the comparison would not mean much."""
    for drawn in (False, True):
        case = GenerateCase(sizes=(6, 17, 8, 16, 16, 16, 40), max_length=8)
        arguments = scheduled_arguments(case, drawn=drawn, share=0.0)
        found = functional.scheduled_inputs(**arguments)
        assert torch.equal(found[0], arguments["tokens"][0])
        assert len(found[1:].unique()) > 10
        assert found[1:].min() >= STOP


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.id)
        for case in (
            GenerateCase(sizes=(7, 17, 16, 67, 33, 35, 131), max_length=9, layers=2),
            GenerateCase(sizes=(7, 2, 16, 130, 130, 64, 700), max_length=9),
            GenerateCase(sizes=(1, 1, 64, 256, 1, 1, 500), score=None, max_length=9, layers=2),
            GenerateCase(
                sizes=(33, 5, 16, 130, 67, 64, 300),
                score="concat",
                history="cumulative",
                fed="context",
                max_length=9,
            ),
            GenerateCase(
                sizes=(20, 3, 8, 22, 11, 10, 60),
                window=4,
                predict=True,
                heads=3,
                fed="context",
                order="bahdanau",
                max_length=9,
            ),
        )
    ],
)
def test_bits_do_not_depend_on_the_threads(
    case: GenerateCase, dtype: torch.dtype, set_threads: Callable[[int], None]
) -> None:
    case = replace(case, dtype=dtype)
    for drawn in (False, True):
        arguments = scheduled_arguments(case, masked=True, drawn=drawn)
        set_threads(1)
        alone = functional.scheduled_inputs(**arguments)
        for threads in (2, 3):
            set_threads(threads)
            assert torch.equal(functional.scheduled_inputs(**arguments), alone)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_whatever_the_logits_tokens_are_read(value: float) -> None:
    for drawn in (False, True):
        arguments = scheduled_arguments(GenerateCase(), drawn=drawn, share=0.0)
        arguments["output_bias"].fill_(value)
        found = functional.scheduled_inputs(**arguments)
        assert ((found >= 0) & (found < 9)).all()


def test_the_truth_alone_needs_no_steps() -> None:
    arguments = scheduled_arguments(GenerateCase(), share=1.0)
    arguments["layers"][0][0].fill_(math.nan)
    assert torch.equal(functional.scheduled_inputs(**arguments), arguments["tokens"])


@pytest.mark.parametrize("score", ["location", "scaled_dot"])
def test_scores_that_are_others_on_other_keys(score: ScoreName) -> None:
    arguments = scheduled_arguments(GenerateCase(score=score, layers=2), masked=True, drawn=True)
    actual = functional.scheduled_inputs(**arguments)
    assert torch.equal(actual, reference.scheduled_inputs(**arguments))
    assert not torch.equal(actual, arguments["tokens"])


def test_no_rows_no_choices() -> None:
    arguments = scheduled_arguments(GenerateCase(sizes=(4, 0, 5, 7, 6, 8, 9)))
    assert functional.scheduled_inputs(**arguments).shape == (8, 0)


def test_opcheck() -> None:
    for score in ("general", None):
        arguments = scheduled_arguments(
            GenerateCase(score=score, layers=2), masked=True, drawn=True
        )
        recorded: list[tuple[Any, ...]] = []
        with recording(torch.ops.pyseq.scheduled_inputs.default, recorded):
            functional.scheduled_inputs(**arguments)
        assert len(recorded) == 1
        torch.library.opcheck(torch.ops.pyseq.scheduled_inputs, recorded[0])


@contextmanager
def recording(operator: Any, recorded: list[tuple[Any, ...]]) -> Iterator[None]:
    """Collect the arguments of all calls of an operator."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is operator:
                recorded.append(args)
            return func(*args, **(kwargs or {}))

    with Recorder():
        yield


OPERATOR_ERRORS: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "tokens": (RuntimeError, {"tokens": torch.full((8, 3), 9)}, "tokens must be between 0 and 8"),
    "dtype": (RuntimeError, {"tokens": torch.zeros(8, 3)}, "tokens must be Long on the CPU, got F"),
    "shape": (RuntimeError, {"tokens": torch.zeros(8).long()}, r"tokens must be \(T, B\), got"),
    "rows": (
        RuntimeError,
        {"tokens": torch.zeros(8, 2).long()},
        r"tokens must be \(T, B\) = \(8, 3\), got \(8, 2\)",
    ),
    "coins": (RuntimeError, {"coins": torch.ones(8, 3)}, "coins must be Bool on the CPU"),
    "draws": (RuntimeError, {"draws": torch.rand(8, 3)}, "draws must have the dtype of embedding"),
    "masks": (
        RuntimeError,
        {"output_masks": torch.ones(8, 3, 6).double()},
        r"output_masks must be \(T, B, H\) = \(8, 3, 7\), got \(8, 3, 6\)",
    ),
    "state": (ValueError, {"state": None}, "state must hold the hidden state"),
}


@pytest.mark.parametrize("name", OPERATOR_ERRORS)
def test_arguments_that_do_not_fit_are_refused(name: str) -> None:
    error, changes, match = OPERATOR_ERRORS[name]
    with pytest.raises(error, match=match):
        functional.scheduled_inputs(**(scheduled_arguments(GenerateCase()) | changes))


# What is read

CASES: dict[str, dict[str, Any]] = {
    "lstm-general": {},
    "lstm-none": {"score": None, "num_layers": 2},
    "gru-concat-L3": {"cell": "gru", "score": "concat", "num_layers": 3},
    "rnn-dot-unfed": {"cell": "rnn_tanh", "score": "dot", "input_feeding": False},
    **MODEL_KINDS,
}
CHOICES = [("argmax", "token"), ("sample", "token"), ("argmax", "sequence")]


def model_and_batch(name: str, dropout: float = 0.4) -> tuple[Seq2Seq, tuple[Tensor, ...]]:
    model = Seq2Seq(11, 9, embedding_size=6, hidden_size=8, dropout=dropout, **CASES[name]).double()
    for parameter in model.parameters():
        parameter.data.mul_(2)
    source, lengths = torch.randint(4, 11, (5, 6)), torch.tensor([6, 3, 1, 5, 4])
    target = torch.randint(3, 9, (5, 8))
    target[:, 0] = START
    for row, length in enumerate((8, 5, 2, 7, 4)):
        target[row, length - 1] = STOP
        target[row, length:] = PAD
    return model, (source, lengths, target[:, :-1], target[:, 1:])


def step_by_step(
    model: Seq2Seq, batch: tuple[Tensor, ...], sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """The loss with a graph through every step, and what was read; every product is torch's."""
    source, lengths, target_in, target_out = batch
    decoder = model.decoder
    memory, hidden = model.encoder(source, lengths)
    hidden = model.bridge(hidden)
    masks = decoder._draw_masks(target_in)
    batch_size, steps = target_in.shape
    thrown = (1 if sampling.coin == "sequence" else steps, batch_size)
    coins = torch.rand(thrown).expand(steps, -1) < sampling.epsilon
    draws = None
    if sampling.choice == "sample":
        draws = torch.rand((steps, batch_size), dtype=torch.float64)
    fed, all_logits, state = [target_in[:, 0]], [], (hidden, None)
    for t in range(steps):
        x = decoder.embedding(fed[t])
        if masks.embedding is not None:
            x = x * masks.embedding[t]
        decoded = decoder.rnn(
            x.unsqueeze(0),
            memory,
            lengths=lengths,
            state=state,
            dropout_masks=None if masks.layers is None else masks.layers[:, t : t + 1],
        )
        output = decoded.output[0]
        if masks.output is not None:
            output = output * masks.output[t]
        all_logits.append(torch.nn.functional.linear(output, *decoder.output.parameters()))
        state = decoded.state
        if t + 1 < steps:
            chosen = choose(all_logits[t].detach(), None if draws is None else draws[t + 1])
            truth = coins[t + 1] | (target_out[:, t + 1] == PAD)
            fed.append(torch.where(truth, target_in[:, t + 1], chosen))
    loss = torch.nn.functional.cross_entropy(
        torch.stack(all_logits, 1).flatten(0, 1), target_out.flatten(), ignore_index=PAD
    )
    return loss, torch.stack(fed, 1)


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize(("choice", "coin"), CHOICES)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_one_pass(
    name: str, choice: Any, coin: Any, epsilon: float
) -> None:
    model, batch = model_and_batch(name)
    sampling = Sampling(epsilon, choice, coin)
    torch.manual_seed(7)
    expected, fed = step_by_step(model, batch, sampling)
    expected.backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    loss = model.loss(*batch, sampling=sampling)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradient = gradients[key]
        assert gradient is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
    assert not torch.equal(fed, batch[2])  # the choices did matter


def test_with_the_truth_alone_it_is_teacher_forcing_to_the_bit() -> None:
    model, batch = model_and_batch("gru-concat-L3")
    losses = []
    for sampling in (None, Sampling(1.0), Sampling(1.0, "sample", "sequence")):
        torch.manual_seed(7)
        losses.append(model.loss(*batch, sampling=sampling).item())
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("name", CASES)
def test_without_the_truth_it_reads_what_greedy_search_emits(name: str) -> None:
    model, (source, lengths, target_in, _) = model_and_batch(name)
    model.eval()
    fed = model.scheduled_inputs(source, lengths, target_in, Sampling(0.0))
    assert torch.equal(fed[:, 0], target_in[:, 0])
    found = model.generate(source, lengths, max_length=target_in.shape[1])
    for row, hypothesis in zip(fed.tolist(), found, strict=True):
        emitted = [*hypothesis.tokens, STOP][: len(row) - 1]
        assert row[1 : 1 + len(emitted)] == emitted
    assert {len(h.tokens) for h in found} != {0}


@pytest.mark.parametrize("choice", ["argmax", "sample"])
@pytest.mark.parametrize("name", CASES)
def test_one_operator_or_many_steps(
    name: str, choice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = model_and_batch(name)
    losses = []
    for fused in (True, False):
        monkeypatch.setattr(type(model.decoder), "is_fused", lambda self, fused=fused: fused)
        torch.manual_seed(3)
        losses.append(model.loss(*batch, sampling=Sampling(0.3, choice)).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_coins_are_for_tokens_or_for_sequences() -> None:
    model, _ = model_and_batch("lstm-general")
    model.eval()
    with torch.no_grad():
        model.decoder.output.bias[8] = 99  # all it ever says
    source, lengths = torch.randint(4, 11, (400, 3)), torch.full((400,), 3)
    target_in = torch.full((400, 11), UNK)
    generator = torch.Generator().manual_seed(1)
    shares = {}
    for coin in ("token", "sequence"):
        sampling = Sampling(0.3, "argmax", coin)  # type: ignore[arg-type]
        fed = model.scheduled_inputs(source, lengths, target_in, sampling, generator=generator)
        truth = (fed[:, 1:] == UNK).double()
        assert ((fed[:, 1:] == UNK) | (fed[:, 1:] == 8)).all()
        assert truth.mean().item() == pytest.approx(0.3, abs=0.08)
        shares[coin] = truth.mean(1)
    assert shares["sequence"].unique().tolist() == [0.0, 1.0]
    assert len(shares["token"].unique()) > 5


def test_a_seed_repeats_it_whatever_the_threads(set_threads: Callable[[int], None]) -> None:
    model, (source, lengths, target_in, _) = model_and_batch("lstm-general")
    found = []
    for seed, threads in ((1, 1), (1, 2), (2, 1)):
        set_threads(threads)
        torch.manual_seed(seed)
        found.append(model.scheduled_inputs(source, lengths, target_in, Sampling(0.5, "sample")))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_no_rows_and_one_step() -> None:
    model, (source, lengths, target_in, _) = model_and_batch("lstm-general")
    sampling = Sampling(0.0, "sample")
    none = model.scheduled_inputs(source[:0], lengths[:0], target_in[:0], sampling)
    assert none.shape == (0, 7)
    one = model.scheduled_inputs(source, lengths, target_in[:, :1], sampling)
    assert torch.equal(one, target_in[:, :1])


# Training with it


def reversals(count: int) -> Data:
    """Pairs whose target is the source backwards."""
    chance = random.Random(count)
    sources = [chance.choices("abcde", k=chance.randint(1, 5)) for _ in range(count)]
    return Data([Pair(s, s[::-1], line) for line, s in enumerate(sources, start=1)], "reversals")


TRAIN, VALID = reversals(40), reversals(16)
MODEL = training.ModelOptions(embedding_size=8, hidden_size=12, dropout=0.2, num_layers=2)
OPTIONS = training.TrainingOptions(
    epochs=3,
    batch_size=8,
    learning_rate=0.01,
    scheduled_sampling=InverseSigmoid(3.0),
    sampling_choice="sample",
)


def begin(out: Path | None, options: training.TrainingOptions = OPTIONS) -> training.Trainer:
    return training.start(
        TRAIN, VALID, tokens=("char", "char"), model=MODEL, options=options, out=out
    )


def test_resuming_is_exact(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="checkpoints need the extra 'train'")
    begin(tmp_path / "whole").run()
    trainer = begin(tmp_path / "parts")
    done = 0

    def stop(*_: object) -> None:
        nonlocal done
        done += trainer.model.training
        if done == 8:
            os.kill(os.getpid(), signal.SIGINT)

    trainer.model.encoder.register_forward_pre_hook(stop)
    with pytest.raises(training.Interrupted):
        trainer.run()
    torch.manual_seed(9)
    training.resume(TRAIN, VALID, out=tmp_path / "parts").run()
    for name in ("model.safetensors", "last/training.json", "last/training.safetensors"):
        whole, parts = (tmp_path / part / name for part in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()
    _, state = training.last_checkpoint(tmp_path / "whole")
    assert training.begun_options(state) == OPTIONS
    changed = replace(OPTIONS, scheduled_sampling=InverseSigmoid(4.0))
    with pytest.raises(CheckpointError, match=r"scheduled_sampling must be .*'k': 3.0"):
        begin(None, changed).restore(state)


def test_the_schedule_goes_by_the_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sampling | None] = []
    loss = Seq2Seq.loss

    def spy(self: Seq2Seq, *args: Any, **options: Any) -> Tensor:
        if self.training:
            seen.append(options.get("sampling"))
        return loss(self, *args, **options)

    monkeypatch.setattr(Seq2Seq, "loss", spy)
    begin(None).run()
    expected = [Sampling(InverseSigmoid(3.0)(step), "sample", "token") for step in range(15)]
    assert seen == expected
    seen.clear()
    begin(None, replace(OPTIONS, scheduled_sampling=None)).run()
    assert seen == [None] * 15


@pytest.mark.parametrize("name", ["sampling_choice", "sampling_coin"])
def test_options_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of .* got 'beam'"):
        training.TrainingOptions(**{name: "beam"})  # type: ignore[arg-type]


def test_errors_by_position() -> None:
    trainer = begin(None)
    trainer.run()
    model, examples = trainer.model, trainer.examples
    errors = {
        free: training.errors_by_position(model, examples, batch_size=7, free_running=free)
        for free in (False, True)
    }
    assert errors[False][0] == errors[True][0]  # the first step reads <start> either way
    assert len(errors[False]) == max(map(len, examples.targets)) + 1
    assert all(0 <= error <= 1 for both in errors.values() for error in both)
    for free, shares in errors.items():
        wrong = [0] * len(shares)
        for i in range(len(examples)):
            batch = examples.collate([i])
            target_in = batch.target_in
            if free:
                model.eval()
                (found,) = model.generate(batch.source, batch.source_lengths, max_length=9)
                emitted = [*found.tokens, *[STOP] * 9][: target_in.shape[1] - 1]
                if STOP in emitted:  # the model goes on after it here, which search does not
                    target_in = model.scheduled_inputs(
                        batch.source, batch.source_lengths, target_in, Sampling(0.0)
                    )
                else:
                    target_in = torch.tensor([[START, *emitted]])
            likeliest = model(batch.source, batch.source_lengths, target_in).argmax(-1)
            for place, missed in enumerate((likeliest != batch.target_out)[0].tolist()):
                wrong[place] += missed
        counts = [
            sum(len(target) >= place for target in examples.targets) for place in range(len(shares))
        ]
        assert shares == [w / count for w, count in zip(wrong, counts, strict=True)]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors", reason="training needs the extra 'train'")
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("ab\tx y\nba\ty x\naa\tx x\n")
    out = str(tmp_path / "out")
    train = ["train", str(pairs), "--out", out, "--valid-share", "0", "--threads", "1"]
    given = ["--scheduled-sampling", "linear:0.1,1,0.2", "--sampling-coin", "sequence"]
    small = ["--hidden-size", "8", "--embedding-size", "4"]
    assert cli.main([*train, *small, *given, "--epochs", "1"]) == 0
    assert cli.main([*train, *given, "--resume", "--epochs", "2"]) == 0
    capsys.readouterr()
    other = ["--scheduled-sampling", "linear:0.2"]
    assert cli.main([*train, *other, "--resume", "--epochs", "3"]) == 1
    assert "--resume goes on with scheduled_sampling = Linear(slope=0.1," in capsys.readouterr().err
    assert cli.main([*train, "--scheduled-sampling", "cosine:3", "--overwrite"]) == 2
    assert "a schedule must be one of constant, linear" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": math.nan}, "epsilon must be a probability, got nan"),
        ({"epsilon": 1.5}, "epsilon must be a probability, got 1.5"),
        ({"choice": "samples"}, "choice must be one of argmax, sample, got 'samples'"),
        ({"coin": "sequences"}, "coin must be one of token, sequence, got 'sequences'"),
    ],
    ids=str,
)
def test_what_a_pass_reads_is_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**({"epsilon": 0.5} | wrong))
