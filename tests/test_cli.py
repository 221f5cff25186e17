# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.cli: train, predict, evaluate, and every error as one sentence."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from pyseq import checkpoint, cli, g2p
from pyseq.cli import train_arguments
from pyseq.training import LabelerOptions, ModelOptions, TrainingOptions
from pyseq.translator import Translator
from pyseq.types import STOP

pytest.importorskip("safetensors", reason="training needs the extra 'train'")
pytest.importorskip("sacrebleu", reason="evaluating needs the extra 'train'")

SMALL = [
    "--hidden-size",
    "16",
    "--embedding-size",
    "8",
    "--learning-rate",
    "0.03",
    "--threads",
    "1",
]
PAIRS = "ab\tx y\nba\ty x\naa\tx x\nbb\ty y\n"


@pytest.fixture(autouse=True)
def restore_threads(set_threads: Callable[[int], None]) -> None:
    """Commands set the number of threads for the whole process."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    path.write_text(PAIRS)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, pairs: Path) -> Path:
    """A model that knows ``pairs`` by heart, trained by the command itself."""
    out = tmp_path_factory.mktemp("model") / "out"
    options = ["--target-tokens", "word", "--valid-share", "0", "--epochs", "50", *SMALL]
    assert cli.main(["train", str(pairs), "--out", str(out), *options]) == 0
    return out


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Let standard input hold ``data``."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_predict(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, b"ab\n\nbb\r\nba")
    assert cli.main(["predict", str(model), "--beam-size", "2", "--batch-size", "2"]) == 0
    output = capsys.readouterr()
    assert output.out == "x y\n\ny y\ny x\n"
    assert output.err == ""


def test_predict_as_it_is_found(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, b"ab\n\nbb\n")
    assert cli.main(["predict", str(model), "--stream"]) == 0
    assert capsys.readouterr().out == "x y\n\ny y\n"
    feed(monkeypatch, b"ab\n")
    assert cli.main(["predict", str(model), "--stream", "--beam-size", "2"]) == 1
    assert "a stream follows one hypothesis" in capsys.readouterr().err
    assert cli.main(["predict", str(model), "--stream", "--n-best", "1"]) == 1
    assert "--stream goes without --n-best" in capsys.readouterr().err


def test_predict_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, b"")
    assert cli.main(["predict", str(model)]) == 0
    assert capsys.readouterr().out == ""


def test_unknown_symbols_are_named_once(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, "ab\naß\nß\n".encode())
    assert cli.main(["predict", str(model)]) == 0
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 3
    assert output.err.startswith("pyseq: line 2: 'ß' was not in the training data")
    assert output.err.count("\n") == 1


def test_predict_draws_attention(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'train'")
    feed(monkeypatch, b"ab\n\nba\n")
    assert cli.main(["predict", str(model), "--attention", str(tmp_path / "pictures")]) == 0
    names = sorted(os.listdir(tmp_path / "pictures"))
    # One for the blank line, too.
    assert names == ["line-000001.png", "line-000002.png", "line-000003.png"]
    for name in names:
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")


def test_an_empty_output_is_drawn_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'train'")
    translator = Translator.load(model)
    with torch.no_grad():
        translator.model.decoder.output.bias[STOP] = 1e4
    translator.save(tmp_path / "silent")
    feed(monkeypatch, b"ab\n")
    pictures = tmp_path / "pictures"
    assert cli.main(["predict", str(tmp_path / "silent"), "--attention", str(pictures)]) == 0
    assert (pictures / "line-000001.png").read_bytes().startswith(b"\x89PNG")


def run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    data: bytes,
    *arguments: str | Path,
) -> list[str]:
    """The lines that ``pyseq predict`` writes for these."""
    feed(monkeypatch, data)
    assert cli.main(["predict", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def test_predict_writes_the_n_best(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def predict(*options: str) -> list[tuple[int, float, str]]:
        lines = run(monkeypatch, capsys, b"ab\nbb\n", model, *options)
        rows = [line.split("\t") for line in lines]
        return [(int(number), float(score), text) for number, score, text in rows]

    found = predict("--n-best", "3", "--beam-size", "5")
    assert [number for number, _, _ in found] == [1, 1, 1, 2, 2, 2]
    assert [text for _, _, text in found][::3] == ["x y", "y y"]
    scores = [score for _, score, _ in found]
    assert scores == sorted(scores[:3], reverse=True) + sorted(scores[3:], reverse=True)
    assert all(score < 0 for score in scores)
    draws = ["--n-best", "20", "--sample", "--temperature", "3"]
    first = predict(*draws)
    assert len(first) == 40
    assert first == predict(*draws)
    assert first != predict(*draws, "--seed", "2")
    sure = predict("--n-best", "2", "--sample", "--top-k", "1")
    assert [text for _, _, text in sure] == ["x y", "x y", "y y", "y y"]


def test_predict_with_rules(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--min-length", "3", "--max-length", "6", "--prefix", "y x", "--beam-size", "3"]
    more = ["--length-penalty", "1", "--coverage-penalty", "0.2", "--replace-unknown"]
    for extra in ([], more):
        (text,) = run(monkeypatch, capsys, b"ab\n", model, *options, *extra)
        assert text.startswith("y x ")
        assert len(text.split()) >= 3
    (text,) = run(monkeypatch, capsys, b"bb\n", model, "--block-ngrams", "1")
    assert text.split().count("y") == 1
    two = run(monkeypatch, capsys, b"ab\nbb\n", model, "--with", model, "--with", model)
    assert two == ["x y", "y y"]


def test_predict_says_that_rules_leave_no_output(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, b"ab\nbb\n")
    rules = ["--min-length", "9", "--max-length", "10", "--block-ngrams", "1"]
    assert cli.main(["predict", str(model), "--n-best", "1", *rules]) == 0
    said = capsys.readouterr()
    assert said.out == "1\t-inf\t\n2\t-inf\t\n"
    assert said.err.startswith("pyseq: line 1: the options of the search allow no output")
    assert said.err.count("\n") == 1


def test_evaluate_by_position(model: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(model), str(pairs), "--by-position"]
    assert cli.main(arguments) == 0
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert [line.split() for line in table[1:]] == [
        [place, "0.00%", "0.00%"] for place in ("1", "2", "3")
    ]
    assert cli.main([*arguments, "--with", str(model)]) == 1
    assert "--by-position goes with one model" in capsys.readouterr().err


def test_evaluate_with_an_ensemble(
    model: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--with", str(model), "--beam-size", "2", "--length-penalty", "0.6"]
    assert cli.main(["evaluate", str(model), str(pairs), *arguments]) == 0
    assert "WER    0.00%" in capsys.readouterr().out


def test_evaluate(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "test.tsv"
    path.write_text("ab\tq q\nab\tx y\nba\ty x\nbb\tx y\n")
    assert cli.main(["evaluate", str(model), str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        ["lines", "3"],
        ["PER", "16.67%"],  # one edit in six words
        ["WER", "33.33%"],
    ]
    assert lines[3].startswith("BLEU")
    assert "tok:13a" in lines[3]
    assert lines[4].startswith("chrF")


def test_resume_goes_on(model: Path, pairs: Path, tmp_path: Path) -> None:
    train = ["train", str(pairs), "--out", str(tmp_path), "--valid-share", "0"]
    options = ["--target-tokens", "word", "--schedule", "constant", *SMALL]
    assert cli.main([*train, *options, "--epochs", "2"]) == 0
    assert cli.main([*train, "--resume", "--epochs", "5", "--threads", "1"]) == 0
    saved = checkpoint.load(tmp_path / "last")
    assert saved.training is not None
    assert saved.training.record["step"] == 5


def test_train_like_the_papers(
    tmp_path: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", str(pairs), "--out", str(tmp_path / "out")]
    recipe = ["--optimizer", "sgd", "--schedule", "halving", "--halve-after", "1.5"]
    options = [*SMALL, "--patience", "2", "--valid", str(pairs), "--epochs", "2"]
    assert cli.main([*train, *recipe, *options]) == 0
    saved = checkpoint.load(tmp_path / "out" / "last")
    assert saved.training is not None
    record = saved.training.record["options"]
    names = ("optimizer", "schedule", "halve_after", "halve_every", "patience")
    assert [record[name] for name in names] == ["sgd", "halving", 1.5, 1, 2]
    # More patience than the run was begun with, like more epochs, and nothing else.
    resume = [*train, "--valid", str(pairs), "--resume", "--threads", "1"]
    assert cli.main([*resume, "--epochs", "3", "--patience", "9"]) == 0
    assert cli.main([*resume, "--halve-after", "2"]) == 1
    assert "goes on with halve_after = 1.5, got 2.0" in capsys.readouterr().err


def test_a_reversed_source(tmp_path: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, options in (("a", ["--reverse-source"]), ("b", [])):
        train = ["train", str(pairs), "--out", str(tmp_path / name), "--valid-share", "0"]
        assert cli.main([*train, *options, *SMALL, "--epochs", "1"]) == 0
        assert Translator.load(tmp_path / name).reverse_source is (name == "a")
        resume = [*train, "--resume", "--reverse-source", "--epochs", "2", "--threads", "1"]
        assert cli.main(resume) == (0 if name == "a" else 1)
    assert "goes on with sources as they stand" in capsys.readouterr().err


def test_a_missing_tensorboard_is_one_sentence(
    tmp_path: Path,
    pairs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    train = ["train", str(pairs), "--out", str(tmp_path / "out"), *SMALL]
    assert cli.main([*train, "--tensorboard", str(tmp_path / "curves")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("pyseq: this needs the package tensorboard (")
    assert "pip install 'pyseq-torch[tensorboard]'" in last


def test_the_recipes_of_the_documentation(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parent.parent / "docs" / "training.md").read_text("utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    recipes = [line.removeprefix("pyseq ") for line in commands if line.startswith("pyseq ")]
    assert len(recipes) >= 3
    for recipe in recipes:
        arguments = recipe.replace("PAIRS.tsv", str(pairs)).split()
        quick = ["--overwrite", "--epochs", "1", *SMALL, "--valid", str(pairs)]
        assert cli.main([*arguments, *quick]) == 0, recipe


def test_resuming_a_finished_run_says_so(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", str(pairs), "--out", str(tmp_path), "--valid-share", "0"]
    assert cli.main([*train, *SMALL, "--epochs", "2"]) == 0
    assert cli.main([*train, "--resume", "--epochs", "1", "--threads", "1"]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("pyseq: nothing to do: 2 epochs are done and 1 were asked for")


@pytest.mark.parametrize(
    ("begun", "resumed", "message"),
    [
        (["--valid", "{a}"], ["--valid", "{b}"], "got {b}: give --valid as it was given then"),
        (["--valid", "{a}"], ["--valid-share", "0"], "got none: give --valid as it was"),
        (["--valid-share", "0"], ["--valid", "{a}"], "which had none, got {a}: give --valid"),
        (["--valid", "{a}"], ["--valid-share", "0.3"], "the same --valid or --valid-share"),
    ],
)
def test_resuming_refuses_other_validation_pairs(
    begun: list[str],
    resumed: list[str],
    message: str,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"a": tmp_path / "a.tsv", "b": tmp_path / "b.tsv"}
    places["a"].write_text("ab\tx y\n")
    places["b"].write_text("ba\ty x\n")
    train = ["train", str(pairs), "--out", str(tmp_path / "out"), "--threads", "1"]

    def filled(options: list[str]) -> list[str]:
        return [option.format(**places) for option in options]

    assert cli.main([*train, *filled(begun), *SMALL, "--epochs", "1"]) == 0
    capsys.readouterr()
    assert cli.main([*train, *filled(resumed), "--resume", "--epochs", "2"]) == 1
    assert message.format(**places) in capsys.readouterr().err.splitlines()[-1]
    assert cli.main([*train, *filled(begun), "--resume", "--epochs", "2"]) == 0


def test_an_encoder_of_one_direction(pairs: Path, tmp_path: Path) -> None:
    train = ["train", str(pairs), "--out", str(tmp_path), "--epochs", "1", "--threads", "1"]
    assert cli.main([*train, "--hidden-size", "7", "--no-bidirectional"]) == 0
    assert checkpoint.load(tmp_path).model.config["bidirectional"] is False


def test_a_package_for_the_score_is_missed_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    assert cli.main(["train", "--task", "g2p", "--out", str(tmp_path / "out")]) == 1
    assert "this needs the package rapidfuzz" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_validation_is_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{'a' * n}\t{'b' * n}\n" for n in range(1, 11)))
    train = ["train", str(path), "--epochs", "1", *SMALL]
    assert cli.main([*train, "--out", str(tmp_path / "a"), "--valid-share", "0.2"]) == 0
    assert "8 training pairs, 2 for validation" in capsys.readouterr().err
    assert cli.main([*train, "--out", str(tmp_path / "b"), "--valid", str(path)]) == 0
    assert "10 training pairs, 10 for validation" in capsys.readouterr().err


def test_skip_bad_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("a\tb\nno tab\nc\td\n")
    train = ["train", str(path), "--out", str(tmp_path / "out"), "--epochs", "1", *SMALL]
    assert cli.main(train) == 1
    assert f"{path}:2: no tab" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*train, "--skip-bad-lines"]) == 0
    assert f"1 bad lines left out, the first: {path}:2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "{tmp}/missing.tsv", "--out", "{tmp}/x"], 1, "missing.tsv: No such file"),
        (["train", "{tmp}", "--out", "{tmp}/x"], 1, ": Is a directory"),
        (["train", "{empty}", "--out", "{tmp}/x"], 1, "empty.tsv: no pairs in this file"),
        (["train", "{pairs}", "--out", "{pairs}/x"], 1, "cannot write the checkpoint"),
        (["train", "{pairs}", "--out", "{model}"], 1, "holds a model already; give --resume"),
        (["train", "{pairs}", "--out", "{tmp}/x", "--resume"], 1, "last: no such folder"),
        (["train", "--out", "{tmp}/x"], 1, "give either a file of pairs or --task g2p"),
        (["train", "{pairs}", "--out", "{tmp}/x", "--hidden-size", "7"], 1, "must be even"),
        (["train", "{pairs}", "--out", "{tmp}/x", "--dropout", "2"], 1, "dropout must be"),
        (["train", "{pairs}", "--out", "{tmp}/x", "--clip-norm", "0"], 1, "clip_norm must be"),
        (["train", "{pairs}", "--out", "{tmp}/x", "--epochs", "0"], 2, "must be at least 1"),
        (["train", "{pairs}", "--out", "{tmp}/x", "--epochs", "x"], 2, "positive integer"),
        (["train", "{pairs}", "--out", "{tmp}/x", "--cell", "x"], 2, "invalid choice"),
        (["train", "{pairs}"], 2, "--out"),
        (["train", "{empty}", "--out", "{model}", "--resume"], 1, "no pairs in this file"),
        (["train", "{other}", "--out", "{model}", "--resume", "--valid-share", "0"], 1,
         "other.tsv: these are not the training pairs"),
        (["train", "{pairs}", "--out", "{model}", "--resume", "--hidden-size", "8"], 1,
         "--resume goes on with hidden_size = 16, got 8"),
        (["train", "{pairs}", "--out", "{model}", "--resume", "--tokens", "space"], 1,
         "--resume goes on with source_tokens = char, got space"),
        (["train", "{pairs}", "--out", "{tmp}/x", "--patience", "1", "--valid-share", "0"], 1,
         "pairs.tsv: patience needs validation pairs"),
        (["predict", "{tmp}/missing"], 1, "missing: no such folder"),
        (["predict", "{tmp}"], 1, "no saved model here"),
        (["predict", "{pairs}"], 1, "not a folder"),
        (["predict", "{model}", "--attention", "{pairs}"], 1, "pairs.tsv: File exists"),
        (["predict", "{model}", "--with", "{tmp}"], 1, "no saved model here"),
        (["predict", "{model}", "--top-k", "3"], 1, "top_k must be None without sample=True"),
        (["predict", "{model}", "--n-best", "2"], 1, "n_best must be at most beam_size = 1, got 2"),
        (["predict", "{model}", "--prefix", "x q"], 1, "prefix: 'q' was not in the training"),
        (["predict", "{model}", "--min-length", "99"], 1, "min_length must be between 0 and"),
        (["evaluate", "{model}", "{tmp}/missing.tsv"], 1, "missing.tsv: No such file"),
        (["evaluate", "{model}", "{empty}"], 1, "no pairs in this file"),
        (["evaluate", "{model}"], 1, "give either a file of pairs or --task g2p"),
        (["train", "{pairs}", "--out", "{model}", "--resume", "--min-count", "2"], 1,
         "leave --min-count out"),
        (["train", "{pairs}", "--out", "{model}", "--resume", "--overwrite"], 2, "not allowed"),
        (["train", "{pairs}", "--out", "{tmp}/x", "--freeze-source", "x"], 2, "or all"),
        (["predict", "{model}", "--seed", "2"], 1, "--seed goes with --sample"),
        ([], 2, "COMMAND"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    pairs: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.tsv").write_text("")
    (tmp_path / "other.tsv").write_text("a\tb\n")
    places = {
        "tmp": tmp_path,
        "pairs": pairs,
        "model": model,
        "empty": tmp_path / "empty.tsv",
        "other": tmp_path / "other.tsv",
    }
    capsys.readouterr()
    assert cli.main([argument.format(**places) for argument in arguments]) == code
    output = capsys.readouterr()
    assert output.out == ""
    last = output.err.splitlines()[-1]
    assert last.startswith("pyseq")
    assert message in last
    assert "Traceback" not in output.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--warmup-steps", "5"], "--warmup-steps goes with --schedule warmup"),
        (["--halve-after", "5"], "--halve-after goes with --schedule halving"),
        (["--halve-every", "5", "--schedule", "warmup"], "--halve-every goes with --schedule halv"),
        (["--average-decay", "0.9"], "--average-decay goes with --average exponential"),
        (["--average-epochs", "2", "--average", "exponential"], "--average-epochs goes with --ave"),
        (["--sampling-coin", "token"], "--sampling-coin goes with --scheduled-sampling"),
        (["--sampling-choice", "sample"], "--sampling-choice goes with --scheduled-sampling"),
        (["--window-size", "3"], "window_size goes with a window"),
        (["--history-size", "3"], "history_size goes with a history"),
        (["--attention-size", "3"], "attention_size goes with score 'concat'"),
        (["--max-positions", "3"], "max_positions must be given for score 'location' and no other"),
        (["--feed", "context", "--no-input-feeding"], "feed goes with input_feeding"),
        (["--extra-mode", "add"], "--extra-mode goes with --source-extra-size or --target-extra"),
        (["--extra-hidden-size", "4", "--source-extra-size", "2"], "goes with --extra-mode mlp"),
        (["--fold-case"], "--fold-case goes with --source-embeddings or --target-embeddings"),
        (["--embeddings-format", "glove"], "--embeddings-format goes with --source-embeddings or"),
        (["--select", "loss", "--valid-share", "0"], "--select goes with validation pairs"),
        (["--embedding-size", "4", "--source-embedding-size", "4", "--target-embedding-size", "4"],
         "--embedding-size has no side left to be about"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_an_option_that_would_do_nothing_is_refused(
    options: list[str],
    message: str,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["train", str(pairs), "--out", str(tmp_path / "x"), *options]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "options",
    [["--valid", "x.tsv"], ["--valid-share", "0.5"], ["--tokens", "char"], ["--skip-bad-lines"]],
    ids=" ".join,
)
def test_the_dictionary_needs_no_files(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "--task", "g2p", "--out", str(tmp_path / "x"), *options]
    assert cli.main(train) == 1
    assert f"leave {options[0]} out" in capsys.readouterr().err


def test_a_missing_tensorboard_is_named(
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    train = ["train", str(pairs), "--out", str(tmp_path / "x"), *SMALL]
    assert cli.main([*train, "--tensorboard", str(tmp_path / "curves")]) == 1
    assert "pip install 'pyseq-torch[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_file_after_an_option_stays_a_file(pairs: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    train = ["train", "--out", out, "--epochs", "1", *SMALL, "--freeze-source", "all", str(pairs)]
    assert cli.main(train) == 0


KINDS = [
    "--score concat --order bahdanau --heads 2 --attention-size 6",
    "--score concat --history cumulative --history-size 1 --coverage-loss 1",
    "--score dot --window local-p --window-size 2 --feed context",
    "--score location --max-positions 9 --window local-m",
    "--copy pointer --scheduled-sampling constant:0.5",
    "--score none --context-every-step --bridge tanh --encoder-num-layers 2",
    "--cell slstm_exp --no-input-feeding --decoder-options num_heads=2",
    "--encoder-cell gru --encoder-options layer_norm,zoneout_h=0.1 --bridge linear",
    "--tie-embeddings --target-embedding-size 16 --memory-bias",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_trained_and_used(
    kind: str,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(tmp_path)
    train = ["train", str(pairs), "--out", out, *SMALL, *kind.split()]
    assert cli.main([*train, "--epochs", "1"]) == 0
    assert cli.main([*train, "--epochs", "2", "--resume"]) == 0
    feed(monkeypatch, b"ab\nba\n")
    capsys.readouterr()
    assert cli.main(["predict", out, "--beam-size", "2", "--n-best", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_every_option_has_an_argument() -> None:
    of_model = {*train_arguments.MODEL, *train_arguments.ATTENTION, *train_arguments.EXTRA}
    assert of_model == {field.name for field in fields(ModelOptions)} - {
        "source_features"  # of the file of features
    }
    assert set(train_arguments.LABELS) == {f.name for f in fields(LabelerOptions)} - of_model - {
        "source_features"
    }
    # These two are beside the files of vectors.
    assert {*train_arguments.TRAINING, "freeze_source", "freeze_target"} == {
        field.name for field in fields(TrainingOptions)
    }


def test_bad_utf8_on_standard_input(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, b"ab\n\xff\n")
    assert cli.main(["predict", str(model), "--batch-size", "1"]) == 1
    output = capsys.readouterr()
    assert output.out == "x y\n"
    assert "standard input:2: not valid UTF-8" in output.err


def test_no_attention_to_draw(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    options = ["--score", "none", "--epochs", "1", *SMALL]
    assert cli.main(["train", str(pairs), "--out", out, *options]) == 0
    assert Translator.load(out).model.config["score"] is None
    assert cli.main(["predict", out, "--attention", str(tmp_path / "pictures")]) == 1
    assert "this model has no attention to draw" in capsys.readouterr().err


def test_the_dictionary_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [g2p.Entry("ab", [["AH", "B"], ["AE", "B"]]), g2p.Entry("ba", [["B", "AH"]])]
    monkeypatch.setattr(g2p, "load", lambda: g2p.G2PData(entries, entries, entries))
    train = ["train", "--task", "g2p", "--out", str(tmp_path), "--epochs", "1", *SMALL]
    assert cli.main(train) == 0
    output = capsys.readouterr()
    assert "3 training pairs, 3 for validation" in output.err
    assert output.out.startswith("PER ")
    assert output.out.endswith("on 2 test words (beam 4)\n")
    assert cli.main(["evaluate", str(tmp_path), "--task", "g2p"]) == 0
    assert capsys.readouterr().out.startswith("lines  2\n")


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert "torch" in capsys.readouterr().out


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "pyseq", *map(str, arguments)]


def test_predict_as_a_process(model: Path) -> None:
    done = subprocess.run(
        command("predict", model, "--threads", "1"),
        input=b"ab\nba\n",
        capture_output=True,
        check=True,
        timeout=120,
    )
    assert done.stdout == b"x y\ny x\n"


def test_output_is_utf8_in_any_locale(tmp_path: Path) -> None:
    path, out = tmp_path / "pairs.tsv", tmp_path / "out"
    path.write_text("a\tß\n", encoding="utf-8")
    train = ["train", str(path), "--out", str(out), "--valid-share", "0", "--epochs", "30", *SMALL]
    assert cli.main(train) == 0
    done = subprocess.run(
        command("predict", out, "--threads", "1"),
        input=b"a\n",
        capture_output=True,
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    assert done.stdout == "ß\n".encode()


def test_a_reader_that_leaves_early_is_no_error(model: Path) -> None:
    with subprocess.Popen(
        command("predict", model, "--batch-size", "1", "--threads", "1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write(b"ab\n" * 10)
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(120) == 1


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    path, out = tmp_path / "pairs.tsv", tmp_path / "out"
    path.write_text("".join(f"{'ab' * n}\t{'ba' * n}\n" for n in range(1, 40)))
    train = ["train", path, "--out", out, "--batch-size", "2", "--schedule", "constant", *SMALL]
    with subprocess.Popen(
        command(*train, "--epochs", "1000"), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(2)]  # the second is of epoch 1
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        rest = process.stderr.read()
        assert process.wait(120) == 130
        assert time.monotonic() - started < 60
    assert "epoch 1/1000" in lines[1]
    last = rest.splitlines()[-1]
    assert last.startswith("pyseq: stopped by SIGINT after epoch")
    assert "--resume goes on from there" in last
    saved = checkpoint.load(out / "last")
    assert saved.training is not None
    epochs = len(saved.training.record["reports"]) + 1
    assert cli.main([*map(str, train), "--resume", "--epochs", str(epochs)]) == 0
    assert isinstance(Translator.load(out)("abab"), str)
