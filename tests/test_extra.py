# SPDX-License-Identifier: Apache-2.0
"""Extra information: each mode against its equation, in the model, its training and searches."""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from pyseq import Ensemble, Translator, Vocab, checkpoint, cli, search, train
from pyseq.errors import DataError
from pyseq.extra import EXTRA_MODES, EXTRA_PLACES, ExtraInformation
from pyseq.scheduled import Sampling
from pyseq.search import SearchOptions
from pyseq.seq2seq import Decoder, Seq2Seq
from pyseq.text import Examples, Extra, Pair
from pyseq.text.extra import reversed_steps
from pyseq.training import Data, ModelOptions, TrainingOptions, start
from pyseq.types import PAD, START, STOP

H, Z, T, B = 5, 3, 4, 2
LENGTHS = torch.tensor([3, 5, 1])
STEPS = 6  # of a target


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """The tensors are tiny: more threads would only wait for one another."""
    set_threads(1)


def information(mode: str, hidden_size: int | None = None) -> ExtraInformation:
    return ExtraInformation(mode, H, Z, hidden_size=hidden_size).double()


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def equation(module: ExtraInformation, h: Tensor, z: Tensor) -> Tensor:
    """h (B, H) and z (B, Z), one step."""
    if module.mode == "add":
        return h + z @ module.weight.T
    if module.mode == "concat":
        assert module.bias is not None
        return torch.tanh(torch.cat([z, h], 1) @ module.weight.T + module.bias)
    assert module.output is not None
    f = z
    if module.hidden is not None:
        f = torch.tanh(f @ module.hidden.weight.T + module.hidden.bias)
    return torch.tanh(h @ module.weight.T + f @ module.output.weight.T + module.output.bias)


KINDS = [("add", None), ("concat", None), ("mlp", None), ("mlp", 7)]


@pytest.mark.parametrize("rows", [B, 1, 0], ids=["B2", "B1", "B0"])
@pytest.mark.parametrize("static", [True, False], ids=["static", "per-step"])
@pytest.mark.parametrize(("mode", "hidden_size"), KINDS)
def test_is_its_equation(mode: str, hidden_size: int | None, static: bool, rows: int) -> None:
    module = information(mode, hidden_size)
    h, z = double(T, rows, H), double(*(() if static else (T,)), rows, Z)
    expected = [equation(module, h[t], z if static else z[t]) for t in range(T)]
    assert_close({"h": module(h, z)}, {"h": torch.stack(expected)})
    if static:
        assert_close({"h": module(h, z)}, {"h": module(h, z.expand(T, -1, -1))})


@pytest.mark.parametrize("static", [True, False], ids=["static", "per-step"])
@pytest.mark.parametrize(("mode", "hidden_size"), KINDS)
def test_gradients(mode: str, hidden_size: int | None, static: bool) -> None:
    module = information(mode, hidden_size)
    h, z = double(2, B, H), double(*(() if static else (2,)), B, Z)
    names = [name for name, _ in module.named_parameters()]

    def call(h: Tensor, z: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, given, (h, z))

    inputs = [h, z, *(p.detach() for p in module.parameters())]
    assert torch.autograd.gradcheck(call, [each.requires_grad_() for each in inputs])


def test_a_perceptron_without_a_hidden_layer_is_concat() -> None:
    concat, mlp = information("concat"), information("mlp")
    assert mlp.output is not None
    with torch.no_grad():
        mlp.output.weight.copy_(concat.weight[:, :Z])
        mlp.weight.copy_(concat.weight[:, Z:])
        mlp.output.bias.copy_(concat.bias)
    h, z = double(T, B, H), double(B, Z)
    assert_close({"h": mlp(h, z)}, {"h": concat(h, z)})


# In the model.


def model(**options: Any) -> Seq2Seq:
    defaults = {"embedding_size": 6, "hidden_size": 8, "dropout": 0.0}
    return Seq2Seq(11, 9, **{**defaults, **options}).double()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    source = torch.randint(4, 11, (3, 5))
    source[torch.arange(5) >= LENGTHS.unsqueeze(1)] = PAD
    target = torch.randint(4, 9, (3, STEPS))
    target[:, 0] = START
    return source, LENGTHS, target


def extras(static: bool, steps: int = STEPS) -> dict[str, Tensor]:
    source_extra = double(*(() if static else (5,)), 3, 2)
    return {
        "source_extra": source_extra,
        "target_extra": double(*(() if static else (steps,)), 3, 4),
    }


BOTH = {"source_extra_size": 2, "target_extra_size": 4}


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("static", [True, False], ids=["static", "per-step"])
def test_at_the_output_it_enters_memory_state_and_what_the_output_layer_reads(
    static: bool, cell: str
) -> None:
    module, given = model(**BOTH, cell=cell, num_layers=2), extras(static)
    plain = model(cell=cell, num_layers=2)
    state = module.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    source, lengths, target = batch()
    memory, hidden = plain.encoder(source, lengths)
    assert module.encoder.extra is not None
    z = given["source_extra"]
    expected = module.encoder.extra(memory, z)
    expected[torch.arange(5).unsqueeze(1) >= lengths] = 0
    found, last = module.encoder(source, lengths, z)
    h, expected_h = (found[0] if cell == "lstm" else found for found in (last, hidden))
    end = z if static else torch.stack([z[n - 1, row] for row, n in enumerate(lengths)])
    top = module.encoder.extra(expected_h[1:], end)
    assert_close(
        {"memory": found, "bottom": h[:1], "top": h[1:]},
        {"memory": expected, "bottom": expected_h[:1], "top": top},
    )
    if cell == "lstm":
        assert_close({"c": last[1]}, {"c": hidden[1]})
    _, decoded = plain.decoder(target, found, lengths=lengths, state=(last, None))
    assert module.decoder.extra is not None
    read = module.decoder.extra(decoded.output, given["target_extra"])
    logits = plain.decoder.output(read).transpose(0, 1)
    assert_close({"logits": module(source, lengths, target, **given)}, {"logits": logits})


def test_at_the_input_it_enters_the_embeddings() -> None:
    module, given = model(**BOTH, extra_place="input", extra_mode="add"), extras(static=True)
    source, lengths, target = batch()
    expected = module(source, lengths, target, **given)
    # The same numbers, put into the tables of a model that is told nothing.
    for row in range(3):
        plain = model()
        state = module.state_dict()
        plain.load_state_dict({name: state[name] for name in plain.state_dict()})
        with torch.no_grad():
            for side, part in (("source", module.encoder), ("target", module.decoder)):
                assert part.extra is not None
                shift = given[f"{side}_extra"][row] @ part.extra.weight.T
                plain.embeddings()[side].weight.add_(shift)
        here = slice(row, row + 1)
        logits = plain(source[here], lengths[here], target[here])
        assert_close({"logits": logits}, {"logits": expected[here]})


@pytest.mark.parametrize("static", [True, False], ids=["static", "per-step"])
@pytest.mark.parametrize("place", EXTRA_PLACES)
@pytest.mark.parametrize("mode", EXTRA_MODES)
def test_every_parameter_gets_a_gradient_and_padding_none(
    mode: str, place: str, static: bool
) -> None:
    module = model(**BOTH, extra_mode=mode, extra_place=place, dropout=0.2)
    source, lengths, target = batch()
    given = extras(static)
    if not static:
        given["source_extra"][torch.arange(5).unsqueeze(1) >= lengths] = torch.nan
    for z in given.values():
        z.requires_grad_()
    module.loss(source, lengths, target, target, **given).backward()
    inputs = [*module.named_parameters(), *given.items()]
    for name, value in inputs:
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name
        assert value.grad.abs().sum() > 0, name


def log_prob(
    module: Seq2Seq, row: int, found: search.Hypothesis, *, source: Tensor, **given: Tensor
) -> float:
    """What ``forward`` says of a hypothesis for one row of the batch."""
    steps = len(found.tokens) + 1
    own = {
        name: z[row : row + 1] if z.dim() == 2 else z[:, row : row + 1] for name, z in given.items()
    }
    if "target_extra" in own and own["target_extra"].dim() == 3:
        own["target_extra"] = own["target_extra"][:steps]
    target = torch.tensor([[START, *found.tokens]])
    here = slice(row, row + 1)
    logits = module(source[here], LENGTHS[here], target, **own).log_softmax(-1)[0]
    total = logits[torch.arange(steps - 1), found.tokens].sum()
    return (total + logits[-1, STOP] if steps <= STEPS else total).item()


SEARCHES: dict[str, SearchOptions] = {
    "greedy": SearchOptions(max_length=STEPS),
    "beam": SearchOptions(max_length=STEPS, beam_size=3, n_best=2),
    "sample": SearchOptions(max_length=STEPS, sample=True, n_best=3),
}
MODELS: dict[str, dict[str, Any]] = {
    "output": BOTH,
    "input": {**BOTH, "extra_place": "input"},
    "source-only": {"source_extra_size": 2},
    "target-only": {"target_extra_size": 4},
    "no-attention": {**BOTH, "score": None, "input_feeding": False},
    "context": {"context_every_step": True},
    "context-and-both": {**BOTH, "context_every_step": True, "cell": "gru", "score": None},
}


@pytest.mark.parametrize("static", [True, False], ids=["static", "per-step"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", SEARCHES)
def test_scores_are_those_of_forward(how: str, kind: str, static: bool) -> None:
    module = model(**MODELS[kind])
    source, lengths, _ = batch()
    # One step more than a search makes, for the <stop> that log_prob looks at.
    given = {
        name: z
        for name, z in extras(static, STEPS + 1).items()
        if MODELS[kind].get(f"{name}_size") is not None
    }
    for row, found in enumerate(module.search(source, lengths, SEARCHES[how], **given)):
        for hypothesis in found:
            expected = log_prob(module, row, hypothesis, source=source, **given)
            assert hypothesis.score == pytest.approx(expected)
    if how != "greedy":
        return
    short = module.generate(source, lengths, max_length=STEPS, **given)
    stream = list(module.stream(source, lengths, SEARCHES["greedy"], **given))
    for row, hypothesis in enumerate(short):
        assert [each.token for each in stream if each.row == row] == hypothesis.tokens
    beams = module.generate(source, lengths, max_length=STEPS, beam_size=2, **given)
    assert len(beams) == 3
    ensemble = Ensemble([module.given(**given)] * 2)
    same = search.greedy(ensemble, source, lengths, max_length=STEPS)
    assert [each.tokens for each in same] == [each.tokens for each in short]


def test_only_a_decoder_that_is_told_nothing_more_is_fused() -> None:
    assert model(source_extra_size=2).given(source_extra=double(3, 2)).fused_search() is not None
    assert model(target_extra_size=2).fused_search() is None
    assert model(context_every_step=True).fused_search() is None


@pytest.mark.parametrize("bidirectional", [True, False], ids=["two-way", "one-way"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_context_is_read_at_every_step(cell: str, bidirectional: bool) -> None:
    module = model(cell=cell, bidirectional=bidirectional, context_every_step=True, num_layers=2)
    assert module.decoder.rnn.weight_ih_l0.shape[1] == 6 + 8 + 8  # with input feeding
    source, lengths, target = batch()
    memory, hidden = module.encoder(source, lengths)
    context = (hidden[0] if cell == "lstm" else hidden)[-1]
    x = module.decoder.embedding(target.t())
    joined = torch.stack([torch.cat([step, context], 1) for step in x])
    decoded = module.decoder.rnn(joined, memory, lengths=lengths, state=(hidden, None))
    expected = module.decoder.output(decoded.output).transpose(0, 1)
    assert_close({"logits": module(source, lengths, target)}, {"logits": expected})


@pytest.mark.parametrize("static", [True, False], ids=["static", "per-step"])
def test_scheduled_sampling_reads_what_greedy_search_finds(static: bool) -> None:
    module, given = model(**BOTH, context_every_step=True), extras(static)
    source, lengths, target = batch()
    found = module.generate(source, lengths, max_length=STEPS, **given)
    own = module.scheduled_inputs(source, lengths, target, Sampling(0.0), **given)
    for row, hypothesis in enumerate(found):
        tokens = hypothesis.tokens[: STEPS - 1]
        assert own[row, 1 : len(tokens) + 1].tolist() == tokens
    loss = module.loss(source, lengths, target, target, sampling=Sampling(0.5), **given)
    assert loss.isfinite()


Call = Callable[[], Any]


def call(options: dict[str, Any], **given: Any) -> Any:
    return model(**options)(*batch(), **given)


ERRORS: dict[str, tuple[Call, type[Exception], str]] = {
    "mode": (lambda: ExtraInformation("gate", 2, 2), ValueError, "extra_mode must be .* 'gate'"),
    "size": (lambda: ExtraInformation("add", 2, 0), ValueError, "extra_size must be .* got 0"),
    "hidden": (
        lambda: ExtraInformation("add", 2, 2, hidden_size=3),
        ValueError,
        "extra_hidden_size goes with extra_mode 'mlp', got 'add'",
    ),
    "place": (
        lambda: model(source_extra_size=2, extra_place="state"),
        ValueError,
        "extra_place must be one of output, input, got 'state'",
    ),
    "nothing": (
        lambda: model(extra_mode="add"),
        ValueError,
        "go with source_extra_size or target_extra_size, got 'add', None and 'output' without",
    ),
    "missing": (
        lambda: call(BOTH, source_extra=double(3, 2)),
        RuntimeError,
        r"target_extra must be given, \(B, Z\) or \(T, B, Z\) with Z = 4, got None",
    ),
    "missing-source": (lambda: call(BOTH), RuntimeError, "source_extra must be given"),
    "given-steps": (
        lambda: search.search(
            model(target_extra_size=4).given(target_extra=double(2, 3, 4)),
            *batch()[:2],
            search.SearchOptions(max_length=3, min_length=3),
        ),
        RuntimeError,
        "target_extra must have at least as many steps as the search, 3, got 2",
    ),
    "unwanted": (
        lambda: call({}, target_extra=double(3, 4)),
        RuntimeError,
        "target_extra must be left out: this model takes none",
    ),
    "rows": (
        lambda: call({"source_extra_size": 2}, source_extra=double(2, 2)),
        RuntimeError,
        r"source_extra must be .*\(B, Z\) = \(3, 2\), got \(2, 2\)",
    ),
    "steps": (
        lambda: call({"target_extra_size": 4}, target_extra=double(STEPS - 1, 3, 4)),
        RuntimeError,
        r"target_extra must be \(T, B, Z\) = \(6, 3, 4\), got \(5, 3, 4\)",
    ),
    "dtype": (
        lambda: call({"source_extra_size": 2}, source_extra=torch.zeros(3, 2)),
        RuntimeError,
        "source_extra must have the dtype of the weights, torch.float64, got torch.float32",
    ),
    "type": (
        lambda: call({"source_extra_size": 2}, source_extra=[1.0, 2.0]),
        TypeError,
        "source_extra must be a tensor, got list of 2",
    ),
    "few-steps": (
        lambda: model(target_extra_size=4).generate(
            *batch()[:2], max_length=9, target_extra=double(8, 3, 4)
        ),
        RuntimeError,
        "target_extra must have at least max_length = 9 steps, got 8",
    ),
    "search-rows": (
        lambda: model(target_extra_size=4).generate(
            *batch()[:2], max_length=2, target_extra=double(2, 4)
        ),
        RuntimeError,
        r"target_extra must be .* = \(3, 4\), got \(2, 4\)",
    ),
    "search-missing": (
        lambda: model(target_extra_size=4).generate(*batch()[:2], max_length=2),
        RuntimeError,
        "target_extra must be given",
    ),
    "context": (
        lambda: Decoder(9, embedding_size=6, hidden_size=8, score=None, context_size=2)(
            torch.tensor([[START]]), None
        ),
        RuntimeError,
        r"the context must be \(B, C\) with C = 2, got None",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_expected(case: str) -> None:
    call, error, match = ERRORS[case]
    with pytest.raises(error, match=match):
        call()


# From text and on the command line: the target is the source in the case that z asks for.

Lines = list[tuple[str, str, tuple[float, ...]]]


def cased(count: int, seed: int) -> Lines:
    chance = random.Random(seed)
    found: Lines = []
    for _ in range(count):
        text = "".join(chance.choices("abc", k=chance.randint(1, 3)))
        upper = chance.random() < 0.5
        found.append((text, text.upper() if upper else text, (1.0, 0.5) if upper else (-1.0, 0.5)))
    return found


def columns(numbers: tuple[float, ...]) -> str:
    return " ".join(map(str, numbers))


@pytest.fixture(scope="module")
def translator() -> Translator:
    torch.set_num_threads(1)
    return train(
        cased(120, 1),
        source_extra_size=2,
        extra_mode="mlp",
        extra_hidden_size=4,
        embedding_size=12,
        hidden_size=48,
        epochs=20,
        batch_size=8,
        learning_rate=0.01,
        dropout=0.0,
    )


def test_a_translator_learns_what_it_is_told(translator: Translator) -> None:
    test = cased(40, 2)
    found = translator.translate([f"{text}\t{columns(z)}" for text, _, z in test], beam_size=2)
    right = [each.text == target for each, (_, target, _) in zip(found, test, strict=True)]
    assert sum(right) > 32  # half of them without being told
    assert found[0].source_tokens == list(test[0][0])
    assert translator.translate(["  "])[0].text == ""
    assert "".join(translator.stream(f"ab\t{columns((1.0, 0.5))}")) == "AB"
    assert translator.unknown_symbols("axb\t1 2") == ["x"]
    both = Translator(
        translator.model,
        translator.source_vocab,
        translator.target_vocab,
        others=[translator.model],
    )
    assert both("ab\t1 0.5") == "AB"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ab", "the line 'ab': expected a column with 2 finite numbers .* source, got ''"),
        ("ab\t1", "expected a column with 2 finite numbers .* for the source, got '1'"),
        ("ab\t1 nan", "2 finite numbers .* got '1 nan'"),
        ("ab\t1 x", "extra information for the source: could not convert string to float: 'x'"),
    ],
)
def test_lines_without_it_are_refused(line: str, message: str, translator: Translator) -> None:
    with pytest.raises(DataError, match=message):
        translator.translate([line])


def test_training_refuses_pairs_without_it() -> None:
    with pytest.raises(
        DataError, match=r"pairs:2: a pair must be two strings and extra .* 1 times"
    ):
        train([("a", "b", [1.0]), ("a", "b")], source_extra_size=1)
    for none in (None, 3):
        with pytest.raises(DataError, match=f"pairs:1: extra .* sequence of numbers.*{none}"):
            train([("a", "b", none)], source_extra_size=1)  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"pairs:1: expected a column with 1 .* for the target"):
        train([("a", "b", "1", [1.0, 2.0])], source_extra_size=1, target_extra_size=1)
    data = Data([Pair(["a"], ["b"], 3)], "x")
    with pytest.raises(DataError, match=r"x:3: expected 2 numbers of extra information .* got 0"):
        start(
            data,
            tokens=("char", "char"),
            model=ModelOptions(target_extra_size=2),
            options=TrainingOptions(),
        )


def test_batches_and_fingerprints_hold_it() -> None:
    vocab = Vocab("ab")

    def examples(*extras: Extra) -> Examples:
        pairs = [Pair(["a"] * n, ["b"], n, extra) for n, extra in enumerate(extras, 1)]
        return Examples.encode(pairs, vocab, vocab, name="x")

    first = examples(Extra((1.0,), (2.0, 3.0)), Extra((4.0,), (5.0, 6.0)))
    batch = first.collate([1, 0])
    assert batch.options["source_extra"].tolist() == [[4], [1]]
    assert batch.options["target_extra"].tolist() == [[5, 6], [2, 3]]
    share = batch.share(1, 2)
    assert share.options["target_extra"].tolist() == [[2, 3]]
    assert batch.to(torch.device("meta")).options["source_extra"].device.type == "meta"
    plain = examples(Extra(), Extra())
    assert plain.collate([0]).options == {}
    other = examples(Extra((1.0,), (2.0, 3.0)), Extra((4.0,), (5.0, 7.0)))
    assert len({each.fingerprint() for each in (first, plain, other)}) == 3


STEPWISE = [(["a", "b"], (1.0, 2.0, 3.0, 4.0)), (["a"], (5.0, 6.0))]


def test_the_last_step_holds_for_all_that_follow() -> None:
    vocab = Vocab("ab")
    pairs = [Pair(text, text, n, Extra(z, z[:1])) for n, (text, z) in enumerate(STEPWISE, 1)]
    found = Examples.encode(pairs, vocab, vocab, name="x", extra_sizes=(2, 1))
    batch = found.collate([0, 1])
    assert batch.source_extra is not None
    assert batch.source_extra.transpose(0, 1).tolist() == [
        [[1, 2], [3, 4], [3, 4]],
        [[5, 6], [5, 6], [5, 6]],
    ]
    assert batch.target_extra is not None
    assert batch.target_extra.tolist() == [[1], [5]]  # the same at every step
    share = batch.share(1, 2).source_extra
    assert share is not None
    assert share.transpose(0, 1).tolist() == [[[5, 6], [5, 6]]]


def test_steps_are_read_backwards_with_the_source() -> None:
    assert reversed_steps((1.0, 2.0), 2, 3) == (1.0, 2.0)
    assert reversed_steps((1.0, 2.0), 1, 3) == (2.0, 2.0, 1.0, 2.0)
    assert reversed_steps((1.0, 2.0, 3.0, 4.0), 1, 3) == (3.0, 2.0, 1.0, 4.0)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("1 2;3", "expected a column with 2 finite numbers .* source, got '3'"),
        ("1 2;", "expected a column with 2 finite numbers .* source, got ''"),
        ("1 2;" * 3 + "1 2", "information for at most 3 steps of the source, got 4"),
    ],
)
def test_steps_that_do_not_fit_are_refused(
    column: str, message: str, translator: Translator
) -> None:
    with pytest.raises(DataError, match=message):
        translator.translate([f"ab\t{column}"])


def test_one_vector_is_that_of_every_step(translator: Translator) -> None:
    one, many = translator.translate(["ab\t1 2", "ab\t1 2;1 2;1 2"])
    assert one.text == many.text
    assert one.score == pytest.approx(many.score, rel=1e-5)


def test_a_model_learns_what_each_step_says() -> None:
    """Every letter is written as large as its step says."""
    chance, examples = random.Random(1), []
    for _ in range(200):
        text = "".join(chance.choices("abc", k=chance.randint(1, 4)))
        large = [chance.randint(0, 1) for _ in text]
        target = "".join(c.upper() if z else c for c, z in zip(text, large, strict=True))
        examples.append((text, target, [[z] for z in large]))
    torch.manual_seed(1)
    found = train(
        examples,
        source_extra_size=1,
        extra_place="input",
        embedding_size=8,
        hidden_size=24,
        epochs=25,
        learning_rate=2e-2,
        batch_size=16,
        reverse_source=True,
    )
    assert found("abc\t1;0;1") == "AbC"
    assert found("abc\t0;1;0") == "aBc"


@pytest.mark.parametrize("task", ["tag", "classify"])
def test_labels_by_extra_information(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("safetensors", "tqdm"):
        pytest.importorskip(package, reason="the command line needs the extra 'train'")
    rows = [
        f"a b\t{(f'A{p} B{q}' if task == 'tag' else f'{p}{q}')}\t{p};{q}\n"
        for p in (0, 1)
        for q in (0, 1)
    ]
    path, out = tmp_path / "data.tsv", str(tmp_path / "out")
    path.write_text("".join(rows * 4))
    train = ["train", str(path), "--out", out, "--task", task, "--source-extra-size", "1"]
    train += ["--extra-place", "input"]
    small = ["--hidden-size", "16", "--embedding-size", "8", "--dropout", "0", "--threads", "1"]
    run = ["--epochs", "40", "--learning-rate", "0.03", "--valid-share", "0", "--batch-size", "8"]
    assert cli.main([*train, *small, *run]) == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a b\t1;0\n\na b\t0;1\n")))
    assert cli.main(["predict", out]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [said[0], said[2]] == (["A1 B0", "A0 B1"] if task == "tag" else ["10", "01"])
    assert cli.main(["evaluate", out, str(path)]) == 0
    assert "accuracy  100.00%" in capsys.readouterr().out
    path.write_text("a b\tA0 B0\n" if task == "tag" else "a b\t00\n")
    assert cli.main(["evaluate", out, str(path)]) == 1
    assert "data.tsv:1: expected a column with 1 finite numbers" in capsys.readouterr().err


def test_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("safetensors", "tqdm", "sacrebleu"):
        pytest.importorskip(package, reason="the command line needs the extra 'train'")
    path, out = tmp_path / "pairs.tsv", str(tmp_path / "out")
    rows = [f"{text}\t{target}\t{columns(z)}\t3\n" for text, target, z in cased(60, 1)]
    path.write_text("".join(rows))
    command = ["train", str(path), "--out", out, "--threads", "1", "--valid-share", "0.1"]
    sizes = ["--source-extra-size", "2", "--target-extra-size", "1", "--extra-place", "input"]
    model = ["--extra-mode", "add", "--context-every-step", "--hidden-size", "8"]
    assert cli.main([*command, *sizes, *model, "--epochs", "1", "--select", "accuracy"]) == 0
    assert cli.main([*command, "--resume", "--epochs", "2"]) == 0
    config = checkpoint.load(out).model.config
    assert (config["extra_place"], config["context_every_step"]) == ("input", True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\t1 2\t3\n\ncb\t4 5\t6\n")))
    assert cli.main(["predict", out, "--beam-size", "2"]) == 0
    assert capsys.readouterr().out.count("\n") == 3
    assert cli.main(["evaluate", out, str(path), "--by-position"]) == 0
    # The same text with other numbers is another question.
    questions = {tuple(row.split("\t")[::2]) for row in rows}
    assert capsys.readouterr().out.startswith(f"lines  {len(questions)}\n")
    path.write_text("ab\tAB\t1 2\n")
    assert cli.main(["evaluate", out, str(path)]) == 1
    assert "expected a column with 1 finite numbers" in capsys.readouterr().err
    assert cli.main([*command, *sizes, "--overwrite"]) == 1
    assert f"{path}:1: expected a column with 1 finite numbers" in capsys.readouterr().err
