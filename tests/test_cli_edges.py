# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.cli: what a stranger tries, and limits of the machine, as one sentence."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import pyseq
from pyseq import cli
from pyseq.cli.train_arguments import add_arguments

pytest.importorskip("safetensors", reason="training needs the extra 'train'")

SMALL = ["--hidden-size", "8", "--embedding-size", "4", "--epochs", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def restore_threads(set_threads: Callable[[int], None]) -> None:
    """Commands set the number of threads for the whole process."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of which no two symbols, and hardly two lines, are equally frequent."""
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    words = [letter * count for count, letter in enumerate("abcdefghij", 1)]
    path.write_text("".join(f"{word}\t{word.upper()}\n" for word in words))
    return path


def train(pairs: Path, out: Path, *options: str) -> int:
    return cli.main(["train", str(pairs), "--out", str(out), *SMALL, *options])


def test_runs_with_several_seeds_make_an_ensemble(
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for seed in ("1", "2"):
        assert train(pairs, tmp_path / seed, "--seed", seed, "--valid-share", "0.3") == 0
    other = ["--valid-seed", "2", "--valid-share", "0.3"]
    assert train(pairs, tmp_path / "other", *other) == 0
    capsys.readouterr()
    first, second, third = (str(tmp_path / name) for name in ("1", "2", "other"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\n")))
    assert cli.main(["predict", first, "--with", second]) == 0
    assert cli.main(["predict", first, "--with", third]) == 1
    assert "training on the same pairs gives it" in capsys.readouterr().err
    # The pairs of a run that is resumed are those that it was begun with.
    assert train(pairs, tmp_path / "other", *other, "--resume", "--epochs", "2") == 0
    assert train(pairs, tmp_path / "other", *other[2:], "--resume", "--epochs", "3") == 1
    assert "--valid-seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected", "code"),
    [
        (["--threads", "100000"], "must be at most 1024, got 100000", 2),
        (["--min-count", "1000"], "no symbol of the source is there 1000 times", 1),
        (["--valid", "PAIRS", "--valid-seed", "2"], "--valid-seed goes with pairs held out", 1),
        (["--valid-seed", "-1"], "must be at least 0 and below 2**63, got -1", 2),
        (["--hidden-size", "99999999998"], "not enough memory", 1),
    ],
    ids=["threads", "min-count", "valid-seed", "negative-seed", "memory"],
)
def test_refused(
    options: list[str],
    expected: str,
    code: int,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [str(pairs) if option == "PAIRS" else option for option in options]
    assert train(pairs, tmp_path / "out", *options) == code
    lines = capsys.readouterr().err.splitlines()
    assert expected in lines[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["train", "file"], "--out"),
        (["import", "file", "--from", "layers"], "--out"),
        (["train", "file", "--out", "model"], "--tensorboard"),
        (["predict", "model"], "--attention"),
    ],
)
def test_no_name_is_not_this_folder(
    command: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, option, ""]) == 2
    assert f"argument {option}: must name a place, got ''" in capsys.readouterr().err


def test_a_model_that_copies_needs_no_vocabulary(pairs: Path, tmp_path: Path) -> None:
    assert train(pairs, tmp_path / "out", "--min-count", "1000", "--copy", "pointer") == 0


def test_other_errors_of_the_machine_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> list[str]:
        raise RuntimeError("a defect")

    monkeypatch.setattr(cli.info, "lines", fails)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["info"])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"pyseq {pyseq.__version__}\n"


def test_a_schedule_is_no_number() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert "--scheduled-sampling SCHEDULE" in parser.format_help()


def test_warnings_are_said_in_one_line(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(pairs, tmp_path / "model", "--score", "none", "--bridge", "zero") == 0
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "warning" in each]
    assert line.startswith("pyseq: warning: the decoder knows nothing of the source")


def test_cells_have_their_short_names(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = ["--cell", "rnn", "--encoder-cell", "indrnn"]
    assert train(pairs, tmp_path / "model", *cells) == 0
    config = pyseq.load(tmp_path / "model").model.config
    assert (config["cell"], config["encoder_cell"]) == ("rnn_tanh", "indrnn_relu")
    assert train(pairs, tmp_path / "model", *cells, "--resume", "--epochs", "2") == 0
    assert train(pairs, tmp_path / "model", "--cell", "gru", "--resume", "--epochs", "3") == 1
    assert "goes on with cell = rnn_tanh, got gru" in capsys.readouterr().err


def test_pairs_may_stand_behind_options(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("sacrebleu", "rapidfuzz"):
        pytest.importorskip(package, reason="scores need the extra 'train'")
    out = str(tmp_path / "model")
    assert cli.main(["train", "--out", out, *SMALL, str(pairs), "--hidden-size", "6"]) == 0
    results = set()
    for arguments in (
        [out, str(pairs), "--beam-size", "2"],
        [out, "--beam-size", "2", str(pairs)],
        ["--beam-size", "2", out, str(pairs)],
    ):
        capsys.readouterr()
        assert cli.main(["evaluate", *arguments]) == 0
        results.add(capsys.readouterr().out)
    assert len(results) == 1
    for wrong in ([out, str(pairs), "--beam-size", "2", "more"], [out, "--bogus", str(pairs)]):
        assert cli.main(["evaluate", *wrong]) == 2
        assert "unrecognized arguments: " in capsys.readouterr().err
