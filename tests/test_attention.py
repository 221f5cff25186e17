# SPDX-License-Identifier: Apache-2.0
"""Every kind of attention, from the modules up: decoders, models, searches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from operator_cases import leaves
from tolerances import assert_close

import pyseq
from pyseq import checkpoint, cli, nn, reference
from pyseq.scheduled import Sampling
from pyseq.training import ModelOptions
from pyseq.types import DecoderOutput

#: Options of a decoder of 6 units over a memory of 6.
KINDS: dict[str, dict[str, Any]] = {
    "scaled-dot": {"score": "scaled_dot"},
    "location": {"score": "location", "max_positions": 4},
    "heads": {"score": "general", "heads": 3},
    "local-m": {"score": "general", "window": "local-m", "window_size": 1},
    "local-p": {"score": "dot", "window": "local-p", "window_size": 2},
    "context-feeding": {"score": "general", "feed": "context"},
    "bahdanau": {"score": "concat", "order": "bahdanau", "attention_size": 4},
    "location-sensitive": {"score": "concat", "history": "previous", "history_size": 3},
    "coverage": {"score": "concat", "history": "cumulative", "history_size": 1},
    "all": {
        "score": "concat",
        "order": "bahdanau",
        "heads": 2,
        "window": "local-p",
        "window_size": 2,
        "history": "cumulative",
        "history_size": 5,
    },
}
EACH = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
LENGTHS = torch.tensor([7, 3, 0])


def decoder(options: dict[str, Any]) -> nn.AttentionDecoder:
    torch.manual_seed(0)
    return nn.AttentionDecoder(5, 6, 6, 2, cell="gru", dtype=torch.float64, **options)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    kind: dict[str, Any] = {"dtype": torch.float64}
    return torch.randn(4, 3, 5, **kind), torch.randn(7, 3, 6, **kind)


def assert_same(actual: DecoderOutput, expected: DecoderOutput) -> None:
    """Close numbers, and the same counts of steps."""
    tables = [dict(leaves(each)) for each in (actual, expected)]
    steps = [table.pop("state.attention.step", torch.zeros(0)) for table in tables]
    assert torch.equal(*steps)
    assert_close(*tables)


def specified(module: nn.AttentionDecoder, x: torch.Tensor, memory: torch.Tensor) -> DecoderOutput:
    """What the reference makes of the module's weights."""
    score, positions = module.score, module.positions
    assert score is not None
    assert module.combine is not None
    keys: torch.Tensor | None = memory
    if score.name == "location":
        keys = None
    elif score.weight_memory is not None:
        keys = reference.linear(memory, score.weight_memory)
    return reference.decode(
        x,
        module.layer_weights(),
        keys,
        memory,
        module.combine.weight,
        cell=module.cell,
        score=score.name,  # type: ignore[arg-type]  # a module holds any str
        weight=score.weight,
        weight_query=score.weight_query,
        weight_v=score.weight_v,
        weight_history=score.weight_history,
        weight_position=None if positions is None else positions.weight,
        weight_position_v=None if positions is None else positions.weight_v,
        lengths=LENGTHS,
        order=module.order,
        input_feeding=module.input_feeding,
        feed=module.feed,
        heads=score.heads,
        window=module.window_size,
        history=module.history,
        need_weights=True,
    )


@EACH
def test_decoder_is_that_of_the_reference(options: dict[str, Any]) -> None:
    module, (x, memory) = decoder(options), inputs()
    actual = module(x, memory, lengths=LENGTHS, need_weights=True)
    expected = specified(module, x, memory)
    assert_same(actual, expected)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = [
        torch.autograd.grad(each.output.square().sum(), parameters, materialize_grads=True)
        for each in (actual, expected)
    ]
    assert_close(*(dict(zip(names, each, strict=True)) for each in gradients))
    assert gradients[0][0].abs().sum() > 0


@EACH
def test_single_steps_are_one_call(options: dict[str, Any]) -> None:
    module, (x, memory) = decoder(options), inputs()
    with torch.no_grad():
        whole = module(x, memory, lengths=LENGTHS, need_weights=True)
        state, outputs, weights = None, [], []
        for step in x:
            part = module(
                step.unsqueeze(0), memory, lengths=LENGTHS, state=state, need_weights=True
            )
            state = part.state
            outputs.append(part.output)
            weights.append(part.weights)
    joined = DecoderOutput(torch.cat(outputs), torch.cat(weights), state)
    assert_same(joined, whole)


@EACH
def test_a_row_of_padding_has_neither_weights_nor_nan(options: dict[str, Any]) -> None:
    module, (x, memory) = decoder(options), inputs()
    memory = memory.requires_grad_()
    output, weights, _ = module(x, memory, lengths=LENGTHS, need_weights=True)
    assert weights[:, 2].eq(0).all()
    assert output.isfinite().all()
    output.square().sum().backward()
    assert memory.grad is not None
    assert memory.grad[:, 2].eq(0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def model(options: dict[str, Any]) -> pyseq.Seq2Seq:
    torch.manual_seed(2)
    return pyseq.Seq2Seq(9, 8, embedding_size=5, hidden_size=6, dropout=0, **options).eval()


@EACH
@pytest.mark.parametrize("beam_size", [1, 3])
def test_scores_of_a_search_are_those_of_forward(beam_size: int, options: dict[str, Any]) -> None:
    found = model(options)
    source, lengths = torch.randint(4, 9, (3, 6)), torch.tensor([6, 2, 4])
    hypotheses = found.generate(source, lengths, max_length=5, beam_size=beam_size)
    for row, hypothesis in enumerate(hypotheses):
        tokens = hypothesis.tokens + ([2] if len(hypothesis.tokens) < 5 else [])
        target_in = torch.tensor([[1, *tokens[:-1]]])
        with torch.no_grad():
            logits = found(source[row : row + 1], lengths[row : row + 1], target_in)
        log_probs = torch.log_softmax(logits[0], -1)
        expected = sum(log_probs[t, token] for t, token in enumerate(tokens))
        assert_close(
            {"score": torch.tensor(hypothesis.score)}, {"score": torch.as_tensor(expected)}
        )
        assert hypothesis.weights is not None
        assert hypothesis.weights.shape == (len(hypothesis.tokens), lengths[row])


@EACH
def test_a_model_is_made_again_from_its_config(options: dict[str, Any]) -> None:
    first = model(options)
    second = pyseq.Seq2Seq(**first.config)
    second.load_state_dict(first.state_dict())
    source, lengths = torch.randint(4, 9, (2, 6)), torch.tensor([6, 2])
    target = torch.randint(4, 8, (2, 3))
    with torch.no_grad():
        assert torch.equal(first(source, lengths, target), second.eval()(source, lengths, target))
    vocab: Any = (range(9), range(8))  # all that is asked of one is its length
    built = ModelOptions(hidden_size=6, **options).build(*vocab)
    assert built.decoder.rnn.order == options.get("order", "luong")


def test_coverage_loss_is_added_in_training() -> None:
    found = model({"score": "concat", "heads": 2, "coverage_loss": 0.5})
    source, lengths = torch.randint(4, 9, (2, 6)), torch.tensor([6, 2])
    target_in = torch.tensor([[1, 4, 5], [1, 6, 0]])
    target_out = torch.tensor([[4, 5, 2], [6, 2, 0]])
    plain = found.loss(source, lengths, target_in, target_out)
    memory, hidden = found.encoder(source, lengths)
    _, decoded = found.decoder(
        target_in, memory, lengths=lengths, state=(found.bridge(hidden), None), need_weights=True
    )
    repeated = pyseq.functional.coverage_loss(decoded.weights).mean(2)
    repeated[2, 1] = 0  # of a padded token
    trained = found.train().loss(source, lengths, target_in, target_out)
    assert_close({"loss": trained}, {"loss": plain + 0.5 * repeated.sum() / 5})
    with pytest.raises(ValueError, match=r"coverage_loss must be at least 0, .*got -1"):
        model({"coverage_loss": -1.0})
    with pytest.raises(ValueError, match=r"0 without a score, got 0\.5"):
        model({"score": None, "input_feeding": False, "coverage_loss": 0.5})


@EACH
def test_models_learn_with_scheduled_sampling(options: dict[str, Any]) -> None:
    found = model(options).train()
    source, lengths = torch.randint(4, 9, (2, 6)), torch.tensor([6, 2])
    target_in, target_out = (
        torch.tensor([[1, 4, 5], [1, 6, 0]]),
        torch.tensor([[4, 5, 2], [6, 2, 0]]),
    )
    loss = found.loss(source, lengths, target_in, target_out, sampling=Sampling(0.5))
    loss.backward()
    for name, parameter in found.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_the_command_line_trains_such_a_model(
    tmp_path: Path, set_threads: Callable[[int], None]
) -> None:
    set_threads(1)  # which the command would leave behind
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("abc\tcba\nab\tba\nbca\tacb\n" * 4, encoding="utf-8")
    options = ["--epochs", "1", "--embedding-size", "4", "--hidden-size", "6", "--valid-share", "0"]
    kind = ["--score", "concat", "--order", "bahdanau", "--heads", "2", "--window", "local-p"]
    past = ["--window-size", "2", "--history", "cumulative", "--history-size", "3"]
    out = tmp_path / "model"
    arguments = ["train", str(pairs), "--out", str(out), *options, *kind, *past]
    assert cli.main([*arguments, "--coverage-loss", "0.5"]) == 0
    config = checkpoint.load(out).model.config
    expected = KINDS["all"] | {"history_size": 3, "feed": None, "coverage_loss": 0.5}
    assert {name: config[name] for name in expected} == expected


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "order": ({"order": "vaswani"}, "order must be one of .*got 'vaswani'"),
    "feed": ({"feed": "state"}, "feed must be one of .*got 'state'"),
    "bahdanau-output": ({"order": "bahdanau", "feed": "output"}, "context .*got feed 'output'"),
    "bahdanau-none": (
        {"order": "bahdanau", "input_feeding": False},
        "context of the same step, got input_feeding False",
    ),
    "feed-none": ({"feed": "context", "input_feeding": False}, "got 'context' without"),
    "window": ({"window": "global"}, "window must be one of local-m, local-p.*got 'global'"),
    "history": ({"score": "concat", "history": "all"}, "history must be one of .*got 'all'"),
    "history-score": (
        {"history": "previous"},
        "history goes with score 'concat', got 'previous' with 'general'",
    ),
    "history-even": (
        {"score": "concat", "history": "previous", "history_size": 4},
        "history_size must be odd .*got 4",
    ),
    "history-size": ({"score": "concat", "history_size": 3}, "got 3 without one"),
    "heads": ({"heads": 4}, "heads must divide .*got 4"),
    "none": ({"score": None, "window": "local-m"}, "window goes with a score, got None"),
    "none-heads": ({"score": None, "heads": 2}, "heads goes with a score, got None"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder(options)


def test_the_state_of_attention_is_checked() -> None:
    module, (x, memory) = decoder(KINDS["coverage"]), inputs()
    state = module(x, memory).state
    step, weights = state.attention
    for attention, message in (
        ((step.int(), weights), r"step must be int64 \(B,\) = \(3,\), got Int"),
        ((step[:2], weights), r"step must be .* \(2,\)"),
        ((step, weights[:, 0]), r"past must be \(B, N, S\) = \(3, 1, 7\), got \(3, 7\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            module(x, memory, state=(*state[:2], attention))
    for attention, message in (
        ((step,), r"state.attention must be a pair \(step, weights\), got tuple of 1"),
        ((step, 3), "state.attention.weights must be a tensor, got int"),
    ):
        with pytest.raises(ValueError, match=message):
            module(x, memory, state=(*state[:2], attention))


def test_coverage_loss_teaches_attention_to_move_on() -> None:
    weights = torch.rand(5, 3, 7, dtype=torch.float64).softmax(-1).requires_grad_()
    past = torch.rand(3, 7, dtype=torch.float64)
    for given in (None, past):
        actual = pyseq.functional.coverage_loss(weights, given)
        expected = reference.coverage_loss(weights, given)
        assert_close({"loss": actual}, {"loss": expected})
        assert_close(
            {"d": torch.autograd.grad(actual.sum(), weights)[0]},
            {"d": torch.autograd.grad(expected.sum(), weights)[0]},
        )
    with pytest.raises(RuntimeError, match=r"past must be .*\(3, 7\), got \(7,\)"):
        pyseq.functional.coverage_loss(weights, past[0])
    with pytest.raises(RuntimeError, match=r"weights must be \(T, ..., S\), got \(7,\)"):
        pyseq.functional.coverage_loss(past[0])
