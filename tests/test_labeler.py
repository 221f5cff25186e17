# SPDX-License-Identifier: Apache-2.0
"""Labels for text: training, predicting, saving, resuming, and the commands."""

from __future__ import annotations

import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pyseq
from pyseq import checkpoint, cli, training
from pyseq.errors import CheckpointError, DataError
from pyseq.labeler import Labeler
from pyseq.labels import Labels
from pyseq.scheduled import Constant
from pyseq.tagger import Classifier, Tagger
from pyseq.text import Features, Pair, Vocab, make_pair
from pyseq.training import LabelerOptions, TrainingOptions
from pyseq.translator import Translator

pytest.importorskip("safetensors", reason="checkpoints need the extra 'train'")

TAGS = {"the": "DET", "a": "DET", "cat": "NOUN", "dog": "NOUN", "sees": "VERB", "is": "VERB"}
SMALL = ["--hidden-size", "16", "--embedding-size", "8", "--learning-rate", "0.03"]


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """Models this small are slower with more."""
    set_threads(1)


def tagged(count: int, seed: int) -> list[tuple[str, str]]:
    chance = random.Random(seed)
    lines = [chance.choices(list(TAGS), k=chance.randint(1, 5)) for _ in range(count)]
    return [(" ".join(line), " ".join(TAGS[word] for word in line)) for line in lines]


def classified(count: int, seed: int) -> list[tuple[str, str]]:
    return [
        (text, "about a cat" if "cat" in text.split() else "of others")
        for text, _ in tagged(count, seed)
    ]


EXAMPLES = {"tag": tagged, "classify": classified}


def train(task: str, **options: object) -> Labeler:
    defaults = {"hidden_size": 16, "embedding_size": 8, "learning_rate": 0.03, "batch_size": 8}
    return pyseq.train_labeler(EXAMPLES[task](60, 1), task=task, **{**defaults, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def labelers() -> dict[str, Labeler]:
    torch.set_num_threads(1)
    return {task: train(task, epochs=8) for task in EXAMPLES}


@pytest.mark.parametrize("task", EXAMPLES)
def test_learns(task: str, labelers: dict[str, Labeler]) -> None:
    test = EXAMPLES[task](40, 2)
    results = labelers[task].predict([text for text, _ in test])
    right = [result.text == labels for result, (_, labels) in zip(results, test, strict=True)]
    assert sum(right) > 36
    for result, (text, _) in zip(results, test, strict=True):
        assert result.source_tokens == text.split()
        assert len(result.labels) == len(result.probabilities)
        assert all(0 < p <= 1 for p in result.probabilities)


@pytest.mark.parametrize("task", EXAMPLES)
def test_lines_keep_their_order_and_do_not_depend_on_the_batch(
    task: str, labelers: dict[str, Labeler]
) -> None:
    lines = ["the cat", "", "a dog sees the cat", " ", "is", "the bird"]
    labeler = labelers[task]
    whole = labeler.predict(lines)
    for one, other, line in zip(whole, labeler.predict(lines, batch_size=2), lines, strict=True):
        assert one.labels == other.labels == labeler.predict([line])[0].labels
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-4)
        assert len(one.labels) == (len(line.split()) if task == "tag" else 1)
    assert labeler("the cat") == whole[0].text
    assert labeler.predict([]) == []
    assert labeler.predict(["", " "])[1] == whole[1]
    assert labeler.unknown_symbols("the bird") == ["bird"]


@pytest.mark.parametrize("task", EXAMPLES)
def test_round_trip(task: str, labelers: dict[str, Labeler], tmp_path: Path) -> None:
    labeler = labelers[task]
    labeler.save(tmp_path)
    assert checkpoint.kind(tmp_path) == {"tag": "Tagger", "classify": "Classifier"}[task]
    loaded = Labeler.load(tmp_path)
    assert loaded.predict(["the cat sees"]) == labeler.predict(["the cat sees"])
    assert (loaded.labels, loaded.source_vocab) == (labeler.labels, labeler.source_vocab)
    name = type(labeler.model).__name__
    with pytest.raises(CheckpointError, match=f"must be a Seq2Seq, got {name}"):
        Translator.load(tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps({"labels": labeler.labels.names[::-1]}))
    with pytest.raises(CheckpointError, match=r"labels\.json: does not have the fingerprint"):
        Labeler.load(tmp_path)
    checkpoint.save(tmp_path, labeler.model)
    with pytest.raises(CheckpointError, match="without its vocabulary or labels"):
        Labeler.load(tmp_path)
    checkpoint.save(tmp_path, pyseq.Seq2Seq(5, 5, hidden_size=4))
    with pytest.raises(CheckpointError, match="must be a Tagger or a Classifier, got Seq2Seq"):
        Labeler.load(tmp_path)


def test_other_sizes_are_refused(tmp_path: Path) -> None:
    model = Tagger(6, 2, embedding_size=2, hidden_size=4)
    with pytest.raises(ValueError, match="num_labels of the model is 2, got 1"):
        Labeler(model, Vocab("ab"), Labels("x"))
    with pytest.raises(ValueError, match="source_vocab_size of the model is 6, got 5"):
        Labeler(model, Vocab("a"), Labels("xy"))
    with pytest.raises(ValueError, match="labels must be 2 like the model's, got 1"):
        checkpoint.save(tmp_path, model, labels=Labels("x"))
    with pytest.raises(ValueError, match="target_vocab must have None symbols"):
        checkpoint.save(tmp_path, model, target_vocab=Vocab("x"))


@pytest.mark.parametrize("select", ["loss", "accuracy"])
@pytest.mark.parametrize("task", EXAMPLES)
def test_a_resumed_run_ends_like_one_that_was_not(task: str, select: str, tmp_path: Path) -> None:
    pairs = [make_pair(*pair, line, name="x") for line, pair in enumerate(EXAMPLES[task](20, 1))]
    data = training.Data(training.tokenise_labels(pairs, task=task, tokens="space"), "x")  # type: ignore[arg-type]

    def begin(out: Path) -> training.Trainer:
        return training.start_labeler(
            data,
            data,
            task=task,  # type: ignore[arg-type]
            tokens="space",
            model=LabelerOptions(embedding_size=4, hidden_size=6, dropout=0.2),
            options=TrainingOptions(epochs=3, batch_size=4, checkpoint_every=2, select=select),  # type: ignore[arg-type]
            out=out,
        )

    whole = begin(tmp_path / "whole")
    reports = whole.run()
    cut = begin(tmp_path / "cut")
    done = 0

    class Killed(Exception):
        pass

    def hook(*_: object) -> None:
        nonlocal done
        done += 1
        if done == 8:
            raise Killed

    cut.model.encoder.register_forward_pre_hook(hook)
    with pytest.raises(Killed):
        cut.run()
    torch.manual_seed(99)
    resumed = training.resume(data, data, out=tmp_path / "cut")
    assert resumed.run() == reports
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_validation_chooses_the_best_epoch(tmp_path: Path) -> None:
    labeler = train("tag", epochs=3, validation=tagged(10, 3), out=tmp_path, log=print)
    assert torch.equal(labeler.model.output.weight, Labeler.load(tmp_path).model.output.weight)
    # A label that only the validation has is one of the model's all the same.
    labeler = train("tag", epochs=1, validation=[("the", "ODD")])
    assert "ODD" in labeler.labels


def test_pretrained_embeddings(tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text("the 1 2 3\ncat 4 5 6\n")
    labeler = train("classify", epochs=1, source_embeddings=path, freeze_source=None)
    table = labeler.model.encoder.embedding.weight
    assert table[labeler.source_vocab.encode(["cat"])].tolist() == [[4, 5, 6]]


def test_predicting_leaves_the_mode_of_each_part_as_it_is() -> None:
    labeler = Labeler(Tagger(6, 2, dropout=0.9), Vocab("ab"), Labels("xy"), source_tokens="char")
    labeler.model.encoder.embedding.eval()
    modes = [each.training for each in labeler.model.modules()]
    assert labeler.predict(["abab"]) == labeler.predict(["abab"])
    assert [each.training for each in labeler.model.modules()] == modes
    assert not all(modes)


class Adapter(torch.nn.Module):
    """A layer with something added, which has no weight by the layer's own name."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x)


@pytest.mark.parametrize("source", ["tokens", "features"])
def test_parts_may_be_wrapped_by_adapters(source: str) -> None:
    features = Features({"a": torch.randn(3, 5), "b": torch.randn(2, 5)})
    options: dict[str, Any] = {"hidden_size": 6, "embedding_size": 4, "source_extra_size": 2}
    sides: dict[str, Any] = {"source_tokens": "char"}
    if source == "features":
        options["source_features"], sides["features"] = 5, features
        sides["source_tokens"] = "line"
    vocab = None if source == "features" else Vocab("ab")
    size = None if vocab is None else len(vocab)
    model = Tagger(size, 2, **options).double()
    labeler = Labeler(model, vocab, Labels("xy"), **sides)
    lines = ["a\t1 2", "b\t0 1"]
    before = labeler.predict(lines)
    model.output = Adapter(model.output)  # type: ignore[assignment]
    model.encoder.embedding = Adapter(model.encoder.embedding)  # type: ignore[assignment]
    after = labeler.predict(lines)
    assert [row.probabilities for row in after] != [row.probabilities for row in before]
    del options["source_extra_size"]
    translator_model = pyseq.Seq2Seq(size, 6, **options, target_extra_size=2).double()
    translator = Translator(translator_model, vocab, Vocab("ab"), max_length=4, **sides)
    translator_model.decoder.output = Adapter(translator_model.decoder.output)  # type: ignore[assignment]
    assert [each.score < 0 for each in translator.translate(lines)] == [True, True]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"task": "parse"}, ValueError, "task must be one of tag, classify, got 'parse'"),
        ({"pooling": "max"}, ValueError, "pooling goes with the task 'classify', got 'max'"),
        ({"validation": [("the cat", "DET")]}, DataError, "validation:1: expected one label for"),
        ({"validation": [("the", " ")]}, DataError, "validation:1: the target is empty"),
        ({"hidden_size": 7}, ValueError, "hidden_size must be even"),
        ({"size": 7}, TypeError, r"^train_labeler\(\) got an unexpected keyword argument 'size'"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pyseq.train_labeler(tagged(5, 1), **{"task": "tag", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TrainingOptions(freeze_target=1), "freeze_target must be 0 for a model without"),
        (TrainingOptions(scheduled_sampling=Constant(0.5)), "goes with a decoder"),
    ],
)
def test_what_needs_a_decoder_is_refused(options: TrainingOptions, message: str) -> None:
    labeler = Labeler(Tagger(6, 2), Vocab("ab"), Labels("xy"))
    pairs = [Pair(["a"], ["x"], 1)]
    with pytest.raises(ValueError, match=message):
        training.Trainer(labeler, labeler.encode(pairs, name="x"), options=options)


# The commands.


def feed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def write(path: Path, examples: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f"{text}\t{labels}\n" for text, labels in examples))
    return path


@pytest.mark.parametrize("task", EXAMPLES)
def test_commands(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm", reason="training shows its progress with the extra 'train'")
    data = write(tmp_path / "train.tsv", EXAMPLES[task](60, 1))
    test = write(tmp_path / "test.tsv", [*EXAMPLES[task](30, 2), ("dog", "UNSEEN")])
    out = str(tmp_path / "out")
    command = ["train", str(data), "--out", out, "--task", task, "--threads", "1"]
    extra = ["--pooling", "mean"] if task == "classify" else []
    assert cli.main([*command, *SMALL, *extra, "--epochs", "5", "--batch-size", "8"]) == 0
    assert "labels/s" in capsys.readouterr().err
    # The task is known from the checkpoint.
    assert cli.main([*command[:4], "--resume", "--epochs", "6", "--tokens", "space"]) == (
        0 if task == "tag" else 1
    )
    assert ("source_tokens = word" in capsys.readouterr().err) == (task == "classify")
    feed(monkeypatch, "the cat\n\n")
    assert cli.main(["predict", out]) == 0
    lines = capsys.readouterr().out.splitlines()
    feed(monkeypatch, "the cat\na bird\na bird\n")
    assert cli.main(["predict", out]) == 0
    said = capsys.readouterr().err
    assert said.startswith("pyseq: line 2: 'bird' was not in the training data")
    assert said.count("\n") == 1
    assert lines[0] == ("DET NOUN" if task == "tag" else "about a cat")
    assert len(lines) == 2
    assert cli.main(["evaluate", out, str(test)]) == 0
    report = capsys.readouterr().out.splitlines()
    assert report[0] == "lines     31"
    assert float(report[1].split()[1].rstrip("%")) > 90
    last = [line.split() for line in report if line.startswith("UNSEEN")]
    assert last == [["UNSEEN", "0.00%", "0.00%", "0.00%", "1"]]


def test_spans_are_scored(
    labelers: dict[str, Labeler], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = labelers["tag"].model
    names = Labels(["B-x", "I-x", "O"])
    Labeler(model, labelers["tag"].source_vocab, names).save(tmp_path)
    data = write(tmp_path / "data.tsv", [("the cat sees", "B-x I-x O"), ("a dog", "B-x O")])
    assert cli.main(["evaluate", str(tmp_path), str(data)]) == 0
    line = capsys.readouterr().out.splitlines()[4]
    assert (
        line == "span F1   50.00%  (precision 50.00%, recall 50.00%, 2 spans of B- and I- labels)"
    )


ERRORS: list[tuple[list[str], str]] = [
    (["train", "{data}", "--out", "{tmp}/x", "--task", "classify", "--score", "dot"],
     "a model of labels has no decoder and takes no score: leave it out"),
    (["train", "{data}", "--out", "{tmp}/x", "--task", "tag", "--reverse-source"],
     "takes no reverse_source"),
    (["train", "{data}", "--out", "{tmp}/x", "--task", "tag", "--freeze-target", "all"],
     "freeze_target must be 0 for a model without embeddings of the target, got None"),
    (["train", "{data}", "--out", "{tmp}/x", "--pooling", "max"],
     "--pooling goes with --task classify"),
    (["train", "{data}", "--out", "{tmp}/x", "--task", "tag", "--pooling", "max"],
     "--pooling goes with --task classify"),
    (["train", "{data}", "--out", "{tmp}/x", "--task", "tag", "--tokens", "char"],
     "data.tsv:1: expected one label for each of its"),
    (["train", "--out", "{tmp}/x", "--task", "tag"], "give either a file of pairs or --task g2p"),
    (["train", "{data}", "--out", "{model}", "--resume", "--task", "classify"],
     "--resume goes on with --task tag, got classify"),
    (["train", "{data}", "--out", "{model}", "--resume", "--score", "dot"], "takes no score"),
    (["predict", "{model}", "--beam-size", "4"], "gives labels and does not search: leave out"),
    (["predict", "{model}", "--attention", "{tmp}/p"], "leave out what sets attention"),
    (["evaluate", "{model}", "{data}", "--with", "{model}"], "leave out what sets others"),
    (["evaluate", "{model}", "--task", "g2p"], "this model gives labels: give a file of pairs"),
    (["evaluate", "{model}", "{bad}"], "bad.tsv:2: expected one label for each of its 2 tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[m for _, m in ERRORS])
def test_errors_are_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    labelers: dict[str, Labeler],
    capsys: pytest.CaptureFixture[str],
) -> None:
    labelers["tag"].save(tmp_path / "model")
    state = checkpoint.TrainingState({}, {"options": {}})
    labelers["tag"].save(tmp_path / "model" / "last", training=state)
    places = {
        "tmp": tmp_path,
        "model": tmp_path / "model",
        "data": write(tmp_path / "data.tsv", tagged(5, 1)),
        "bad": write(tmp_path / "bad.tsv", [("the", "DET"), ("the cat", "DET")]),
    }
    assert cli.main([argument.format(**places) for argument in arguments]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err.splitlines()[-1]
    assert "Traceback" not in output.err


def test_a_classifier_is_what_the_options_say() -> None:
    labeler = train("classify", epochs=1, pooling="max", cell="gru", bidirectional=False)
    assert isinstance(labeler.model, Classifier)
    assert labeler.model.config["pooling"] == "max"
    assert labeler.model.config["cell"] == "gru"
