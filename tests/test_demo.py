# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.demo: the whole demo on a dictionary of a few words."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pyseq import cli, demo, g2p, training
from pyseq.training import Data, ModelOptions, Trainer, TrainingOptions

for package in ("safetensors", "matplotlib", "rapidfuzz", "tqdm"):
    pytest.importorskip(package, reason="the demo needs the extra 'demo'")

ENTRIES = [g2p.Entry(word, [list(word.upper())]) for word in ("ab", "abc", "ba", "cab", "bca")]


def _few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary and a model for the demo that are done in a moment."""
    monkeypatch.setattr(g2p, "load", lambda: g2p.G2PData(ENTRIES, ENTRIES, ENTRIES))
    monkeypatch.setattr(g2p, "MODEL", {"embedding_size": 4, "hidden_size": 8})


def test_timing_leaves_model_and_chance_alone(set_threads: Callable[[int], None]) -> None:
    set_threads(1)
    trainer = training.start(
        Data(g2p.pairs(ENTRIES), "words"),
        tokens=("char", "space"),
        model=ModelOptions(embedding_size=4, hidden_size=8, dropout=0.2),
        options=TrainingOptions(batch_size=2),
    )
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    state = torch.get_rng_state()
    seconds = demo.time_training_step(trainer, repeats=1)
    assert min(seconds) > 0
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_demo(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    set_threads: Callable[[int], None],
) -> None:
    set_threads(1)
    _few_words(monkeypatch)
    assert demo.main(["--out", str(tmp_path / "out"), "--epochs", "1"]) == 0
    output = capsys.readouterr().out
    assert "is replaced" not in output
    assert "5 words to learn from" in output
    assert "PER " in output
    assert "times faster" in output
    assert "thunkable" in output
    assert (tmp_path / "out" / "attention-thunkable.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _few_words(monkeypatch)
    (tmp_path / "file").write_text("")
    assert demo.main(["--out", str(tmp_path / "file" / "out"), "--epochs", "1"]) == 1
    assert "cannot write the checkpoint" in capsys.readouterr().err


def test_a_second_run_says_that_it_replaces_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _few_words(monkeypatch)
    assert demo.main(["--out", str(tmp_path), "--epochs", "1"]) == 0
    capsys.readouterr()
    assert demo.main(["--out", str(tmp_path), "--epochs", "1"]) == 0
    assert f"{tmp_path}: the model of an earlier run is replaced" in capsys.readouterr().out


def test_an_interrupted_demo_names_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _few_words(monkeypatch)
    run = Trainer.run

    def interrupted(trainer: Trainer) -> object:
        encoder = trainer.model.encoder
        encoder.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
        return run(trainer)

    monkeypatch.setattr(Trainer, "run", interrupted)
    assert demo.main(["--out", str(tmp_path), "--epochs", "1"]) == 130
    monkeypatch.undo()
    command = capsys.readouterr().err.rstrip().partition("to go on from there: ")[2].split()
    assert command[:3] == [sys.executable, "-m", "pyseq"]
    _few_words(monkeypatch)
    assert cli.main(command[3:]) == 0
    assert capsys.readouterr().out.startswith("PER ")


def test_no_epochs_are_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        demo.main(["--epochs", "0"])
    assert raised.value.code == 2
    assert "--epochs must be at least 1, got 0" in capsys.readouterr().err


def test_a_missing_package_is_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _few_words(monkeypatch)
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    assert demo.main(["--out", str(tmp_path / "out")]) == 1
    assert "this needs the package rapidfuzz" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
