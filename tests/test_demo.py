# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.demo: the whole demo on a dictionary of a few words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pyseq import demo, functional, g2p, reference, training
from pyseq.training import Data, ModelOptions, TrainingOptions

for package in ("safetensors", "matplotlib", "rapidfuzz", "tqdm"):
    pytest.importorskip(package, reason="the demo needs the extra 'demo'")

ENTRIES = [g2p.Entry(word, [list(word.upper())]) for word in ("ab", "abc", "ba", "cab", "bca")]


def test_reference_operators_are_swapped_and_restored() -> None:
    def current() -> list[object]:
        return [functional.scan, functional.attend, functional.decode]

    fused = current()
    with demo.reference_operators():
        assert current() == [reference.scan, reference.attend, reference.decode]
    assert current() == fused


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
    monkeypatch.setattr(g2p, "load", lambda: g2p.G2PData(ENTRIES, ENTRIES, ENTRIES))
    monkeypatch.setattr(g2p, "MODEL", {"embedding_size": 4, "hidden_size": 8})
    assert demo.main(["--out", str(tmp_path / "out"), "--epochs", "1"]) == 0
    output = capsys.readouterr().out
    assert "5 words to learn from" in output
    assert "PER " in output
    assert "times faster" in output
    assert "thunkable" in output
    assert (tmp_path / "out" / "attention-thunkable.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(g2p, "load", lambda: g2p.G2PData(ENTRIES, ENTRIES, ENTRIES))
    monkeypatch.setattr(g2p, "MODEL", {"embedding_size": 4, "hidden_size": 8})
    (tmp_path / "file").write_text("")
    assert demo.main(["--out", str(tmp_path / "file" / "out"), "--epochs", "1"]) == 1
    assert "cannot write the checkpoint" in capsys.readouterr().err
