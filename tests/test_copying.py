# SPDX-License-Identifier: Apache-2.0
"""Copying: the head against its plain formula, the model, the text, and a task that needs it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generate_cases import MODEL_KINDS
from torch import Tensor

from pyseq import Ensemble, SearchOptions, Seq2Seq, Translator, Vocab, cli, search, training
from pyseq.copying import Copying
from pyseq.scheduled import Sampling
from pyseq.text import Examples, Pair, encode_copies
from pyseq.types import PAD, START, STOP, UNK, Copies

KINDS = ("pointer", "joint")
V = 7


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """The tensors are tiny: more threads would only wait for one another."""
    set_threads(1)


def head_and_arguments(kind: str) -> tuple[Copying, list[Tensor], Copies]:
    head = Copying(kind, hidden_size=4, memory_size=3, embedding_size=2).double()
    shapes = ((3, 2, V), (3, 2, 4), (3, 5, 3), (3, 2, 2))
    arguments = [torch.randn(shape, dtype=torch.float64) * 2 for shape in shapes]
    # Tokens twice, beyond the vocabulary, not to be copied; a row that has nothing to copy.
    ids = torch.tensor([[4, 8, 4, 7, 0], [7, 7, 5, 2, 0], [0, 1, 2, 0, 0]])
    return head, arguments, Copies(ids, 2)


def plain(head: Copying, arguments: list[Tensor], copies: Copies) -> Tensor:
    """The probabilities, one by one."""
    logits, hidden, memory, embedded = arguments
    rows = []
    for b, ids in enumerate(copies.ids.tolist()):
        steps = []
        for t in range(logits.shape[1]):
            places = [s for s, token in enumerate(ids) if token >= UNK]
            probs = [torch.zeros((), dtype=torch.float64) for _ in range(V + copies.extra)]
            scores = [hidden[b, t] @ head.query.weight.T @ memory[b, s] for s in places]
            if not places:
                shares = list(torch.softmax(logits[b, t], 0))
                attn: list[Tensor] = []
            elif head.gate is None:
                both = torch.softmax(torch.cat([logits[b, t], torch.stack(scores)]), 0)
                shares, attn = list(both[:V]), list(both[V:])
            else:
                attn = list(torch.softmax(torch.stack(scores), 0))
                context = sum(a * memory[b, s] for a, s in zip(attn, places, strict=True))
                assert isinstance(context, Tensor)
                gate = torch.sigmoid(head.gate(torch.cat([context, hidden[b, t], embedded[b, t]])))
                shares = list(gate * torch.softmax(logits[b, t], 0))
                attn = [(1 - gate[0]) * a for a in attn]
            for y, share in enumerate(shares):
                probs[y] = probs[y] + share
            for s, a in zip(places, attn, strict=True):
                probs[ids[s]] = probs[ids[s]] + a
            steps.append(torch.stack(probs))
        rows.append(torch.stack(steps))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_plain_formula(kind: str) -> None:
    head, arguments, copies = head_and_arguments(kind)
    for argument in arguments:
        argument.requires_grad_()
    expected = plain(head, arguments, copies)
    found = head(*arguments, copies)
    torch.testing.assert_close(found.exp(), expected, rtol=1e-12, atol=1e-15)
    ones = torch.ones(3, 2, dtype=torch.float64)
    torch.testing.assert_close(found.exp().sum(2), ones)
    # Where a probability is zero its logarithm has no gradient.
    chance = torch.randn_like(expected).masked_fill(expected == 0, 0.0)
    leaves = [*arguments, *head.parameters()]
    ours = torch.autograd.grad(
        (found.masked_fill(expected == 0, 0.0) * chance).sum(), leaves, allow_unused=True
    )
    theirs = torch.autograd.grad(
        (expected.masked_fill(expected == 0, 1.0).log() * chance).sum(), leaves, allow_unused=True
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_may_be_smaller_than_numbers(kind: str, dtype: torch.dtype) -> None:
    head, arguments, copies = head_and_arguments(kind)
    head.to(dtype)
    values = [(argument * 300).to(dtype).requires_grad_() for argument in arguments]
    found = head(*values, copies)
    reachable = plain(head.double(), arguments, copies) > 0
    head.to(dtype)
    assert found[reachable].isfinite().all()
    assert found.min() < -800  # the exponential of which is zero
    found[reachable].sum().backward()
    assert all(value.grad is None or value.grad.isfinite().all() for value in values)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_of_nothing_to_copy_everything_is_generated(kind: str) -> None:
    head, arguments, _ = head_and_arguments(kind)
    found = head(*arguments, Copies(torch.zeros(3, 5, dtype=torch.int64), 0))
    torch.testing.assert_close(found, torch.log_softmax(arguments[0], 2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_all_probabilities(kind: str) -> None:
    head, arguments, copies = head_and_arguments(kind)
    for argument in arguments:
        argument.requires_grad_()
    # In the vocabulary or not, to be copied from one place, from two or from none.
    target = torch.tensor([[4, 7], [7, 3], [5, PAD]])
    log_probs = head(*arguments, copies)
    picked = log_probs.gather(2, target.unsqueeze(2)).squeeze(2)
    expected = -picked[target != PAD].mean()
    leaves = [*arguments, *head.parameters()]
    theirs = torch.autograd.grad(expected, leaves, allow_unused=True)
    loss = head.loss(*arguments, copies, target)
    ours = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda *inputs: head.loss(*inputs, copies, target), arguments, fast_mode=True
    )
    with pytest.raises(RuntimeError, match=r"target_out must be below 9, .* got 9"):
        head.loss(*arguments, copies, target + 2)
    # What no source of the row has cannot be said.
    with pytest.raises(RuntimeError, match="what the source of its own row has to copy, got 8"):
        head.loss(*arguments, copies, target.where(target != 5, 8))


# The model


def model_and_batch(kind: str, **options: Any) -> tuple[Seq2Seq, tuple[Tensor, ...], Tensor]:
    model = Seq2Seq(11, V, embedding_size=6, hidden_size=8, copy=kind, **options).double()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    source, lengths = torch.randint(4, 11, (4, 5)), torch.tensor([5, 3, 1, 4])
    copies = torch.randint(3, V + 3, (4, 5))
    copies[2] = PAD
    target = torch.tensor(
        [
            [START, 4, 5, 6, STOP],
            [START, V, UNK, STOP, PAD],
            [START, STOP, PAD, PAD, PAD],
            [START, 4, STOP, PAD, PAD],
        ]
    )
    copies[1, 0], copies[3, 2] = V, V + 2
    return model, (source, lengths, target[:, :-1], target[:, 1:]), copies


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_forward(kind: str) -> None:
    model, batch, copies = model_and_batch(kind, dropout=0.0)
    log_probs = model(*batch[:3], copies=copies)
    assert log_probs.shape == (4, 4, V + 5)
    assert (log_probs[:, :, V + 3 :] == float("-inf")).all()  # which no source has
    target = batch[3]
    valid = target != PAD
    picked = log_probs.gather(2, target.unsqueeze(2)).squeeze(2)[valid]
    loss = model.loss(*batch, copies=copies)
    assert loss.item() == pytest.approx(-picked.mean().item(), abs=1e-12)
    smoothed = model.loss(*batch, copies=copies, label_smoothing=0.1)
    spread = -log_probs[:, :, :V].mean(2)[valid].mean()
    expected = 0.9 * loss.item() + 0.1 * spread.item()
    assert smoothed.item() == pytest.approx(expected, abs=1e-12)
    smoothed.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "draws": {"sample": True, "n_best": 3},
    "beam": {"beam_size": 4, "n_best": 3, "block_ngrams": 2, "min_length": 1},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_forward(kind: str, how: str) -> None:
    model, (source, lengths, _, _), copies = model_and_batch(kind)
    options = SearchOptions(max_length=6, **HOW[how])
    models = [model, model_and_batch(kind)[0]]
    bound = Ensemble([each.given(copies=copies) for each in models])
    found = {
        1: model.search(source, lengths, options, copies=copies),
        2: search.search(bound, source, lengths, options),
    }
    beyond = 0
    for count, rows in found.items():
        for row, hypotheses in enumerate(rows):
            for hypothesis in hypotheses:
                tokens = hypothesis.tokens + [STOP] * (len(hypothesis.tokens) < 6)
                beyond += sum(token >= V for token in tokens)
                target_in = torch.tensor([[START, *tokens[:-1]]])
                one = slice(row, row + 1)
                length = int(lengths[row])
                probs = torch.stack(
                    [
                        each.eval()(
                            source[one, :length],
                            lengths[one],
                            target_in,
                            copies=copies[one, :length],
                        )[0]
                        for each in models[:count]
                    ]
                ).exp()
                score = probs.mean(0)[range(len(tokens)), tokens].log().sum().item()
                assert hypothesis.score == pytest.approx(score, abs=1e-10)
    assert beyond > 0


@pytest.mark.parametrize("name", ["global", *MODEL_KINDS])
def test_streams_and_scheduled_sampling_copy_too(name: str) -> None:
    options = MODEL_KINDS.get(name, {})
    model, (source, lengths, target_in, _), copies = model_and_batch("pointer", **options)
    with torch.no_grad():
        model.decoder.copying.gate.bias -= 4  # so that it copies most of the time
    found = SearchOptions(max_length=5)
    greedy = model.generate(source, lengths, max_length=5, copies=copies)
    tokens: list[list[int]] = [[] for _ in greedy]
    for item in model.stream(source, lengths, found, copies=copies):
        tokens[item.row].append(item.token)
    assert tokens == [h.tokens for h in greedy]
    model.eval()
    fed = model.scheduled_inputs(source, lengths, target_in, Sampling(0.0), copies=copies)
    for row, hypothesis in zip(fed.tolist(), greedy, strict=True):
        emitted = [*hypothesis.tokens, STOP][: len(row) - 1]
        assert row[1 : 1 + len(emitted)] == emitted
    assert fed.max() >= V


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_what_another_row_has_to_copy_is_refused(kind: str, label_smoothing: float) -> None:
    """It has no probability: the loss would be infinite."""
    model, (source, lengths, target_in, target_out), copies = model_and_batch(kind)
    copies = copies.clamp(max=V - 1)
    copies[0, 0], target_out = V, target_out.clamp(max=V - 1)
    options = {"copies": copies, "label_smoothing": label_smoothing}
    target_out[0, 0] = V
    assert model.loss(source, lengths, target_in, target_out, **options).isfinite()
    target_out[1, 0] = V
    with pytest.raises(RuntimeError, match=f"of its own row has to copy, got {V} in row 1"):
        model.loss(source, lengths, target_in, target_out, **options)


def test_what_does_not_go_together_is_refused() -> None:
    model, batch, copies = model_and_batch("pointer")
    for call, error, match in (
        (lambda: model(*batch[:3]), ValueError, "expected a tensor, got NoneType"),
        (lambda: model(*batch[:3], copies=copies[:, :3]), RuntimeError, r"copies must be \(B, S\)"),
        (lambda: model(*batch[:3], copies=copies.int()), RuntimeError, "copies must be int64"),
        (
            lambda: model(*batch[:3], copies=copies - 4),
            RuntimeError,
            "at least 0 and below V .* got -4 to 5",
        ),
        (
            lambda: model(*batch[:3], copies=copies + 3),
            RuntimeError,
            r"ids of at least 0 and below V \+ S = 7 \+ 5, got 0 to 12",
        ),
        (
            lambda: model.loss(*batch[:3], batch[3] + 20, copies=copies),
            RuntimeError,
            "target_out must be below 12, the vocabulary and what may be copied, got 27",
        ),
        (lambda: Seq2Seq(9, 9, copy="cat"), ValueError, "copy must be one of pointer, joint or"),
        (lambda: Seq2Seq(9, 9, copy="joint", score=None), ValueError, "copy needs a score"),
    ):
        with pytest.raises(error, match=match):
            call()
    plain = Seq2Seq(11, V, embedding_size=6, hidden_size=8).double()
    with pytest.raises(ValueError, match="expected None, got Tensor"):
        plain(*batch[:3], copies=copies)


# The text


def test_tokens_beyond_the_vocabulary_have_ids() -> None:
    vocab = Vocab("ab")
    ids, extra = vocab.extend(["a", "x", "<stop>", "x", "b", "y"])
    assert (ids, extra) == ([4, 6, 7, 6, 5, 8], ["x", "<stop>", "y"])
    assert vocab.encode(["y", "z", "a"], extra=extra) == [8, UNK, 4]
    assert vocab.decode([*ids, STOP, 4], extra=extra) == ["a", "x", "<stop>", "x", "b", "y"]
    copies, extras = encode_copies(vocab, [["x", "a"], []])
    assert copies.tolist() == [[6, 4, PAD], [PAD, PAD, PAD]]
    assert extras == [["x"], []]


def test_examples_hold_what_may_be_copied() -> None:
    pairs = [Pair(["a", "x"], ["x", "y", "a"], 1), Pair(["b"], ["b"], 2)]
    vocab = Vocab("ab")
    examples = Examples.encode(pairs, vocab, vocab, name="pairs", copy=True)
    batch = examples.collate([0, 1])
    assert batch.copies is not None
    assert batch.copies.tolist() == [[4, 6, PAD], [5, PAD, PAD]]
    assert batch.target_out.tolist() == [[6, UNK, 4, STOP], [5, STOP, PAD, PAD]]
    share = batch.share(1, 2).to(torch.device("cpu"))
    assert share.copies is not None
    assert share.copies.tolist() == [[5, PAD]]
    without = Examples.encode(pairs, vocab, vocab, name="pairs")
    assert without.collate([0]).copies is None
    assert without.fingerprint() != examples.fingerprint()


def greetings(count: int, seed: int) -> list[tuple[str, str]]:
    """Names that are seen once: the first word says which of the two is greeted."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        names = ["".join(chance.choices("abcdefgh", k=6)) for _ in range(2)]
        first = chance.random() < 0.5
        found.append((f"{'one' if first else 'two'} {' '.join(names)}", f"hi {names[not first]}"))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_that_needs_copying(kind: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "tokens": "space",
        "min_count": 2,
        "hidden_size": 24,
        "embedding_size": 12,
        "epochs": 12,
        "batch_size": 16,
        "learning_rate": 0.02,
    }
    translator = training.train(greetings(160, 1), copy=kind, **options)
    assert len(translator.target_vocab) == 4 + 1  # "hi"
    lines, answers = zip(*greetings(40, 2), strict=True)
    results = translator.translate(lines, beam_size=2)
    right = sum(result.text == answer for result, answer in zip(results, answers, strict=True))
    assert right >= 38
    assert "".join(translator.stream(lines[0])) == translator(lines[0])

    pytest.importorskip("safetensors", reason="saving needs the extra 'train'")
    translator.save(tmp_path)
    loaded = Translator.load(tmp_path, tmp_path)
    assert [r.text for r in loaded.translate(lines, beam_size=2)] == [r.text for r in results]


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors", reason="training needs the extra 'train'")
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{source}\t{target}\n" for source, target in greetings(30, 3)))
    train = ["train", str(path), "--out", str(tmp_path / "out"), "--threads", "1"]
    small = ["--hidden-size", "8", "--embedding-size", "4", "--epochs", "1", "--tokens", "space"]
    assert cli.main([*train, *small, "--copy", "joint", "--min-count", "2"]) == 0
    assert cli.main([*train, "--resume", "--epochs", "2"]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "out"), str(path), "--threads", "1"]) == 0
    assert "WER" in capsys.readouterr().out
