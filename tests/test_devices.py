# SPDX-License-Identifier: Apache-2.0
"""Where models are put: by name, on the command line, from checkpoints and by training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pyseq
from pyseq import cli, demo, devices, training
from pyseq.errors import DeviceError
from pyseq.text import Tokenizer, make_pair, tokenise_pairs
from pyseq.training import EpochReport, Trainer

PAIRS = [("ab", "x y"), ("ba", "y x"), ("aa", "x x"), ("bb", "y y")]
OPTIONS: dict[str, Any] = {"tokens": ("char", "space"), "hidden_size": 4, "embedding_size": 4}


def test_the_cpu_is_the_default() -> None:
    for name in (None, "cpu", torch.device("cpu")):
        assert devices.find_device(name) == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "must be cpu, cuda or cuda:0, .*got 'gpu'"),
        ("meta", "got meta, which has no kernels"),
        ("cuda:x", "got 'cuda:x'"),
        (3.5, r"got 3\.5"),
    ],
)
def test_names_of_no_device_are_refused(name: Any, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        devices.find_device(name)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="torch finds no CUDA device here, got cuda"):
        devices.find_device("cuda")


def test_a_build_without_kernels_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "has_kernels", lambda _: False)
    with pytest.raises(DeviceError, match=r"has no kernels for cuda: build it .* pip install"):
        devices.find_device("cuda")


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch found two CUDA devices, and pyseq had kernels for them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(devices, "has_kernels", lambda _: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.usefixtures("two_devices")
def test_each_process_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.find_device("cuda") == torch.device("cuda", 0)
    assert devices.find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match="one of the 2 that torch finds, got cuda:2"):
        devices.find_device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.find_device("cuda") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "pairs.tsv", "--out", "model"],
        ["predict", "model"],
        ["evaluate", "model", "pairs.tsv"],
    ],
    ids=["train", "predict", "evaluate"],
)
def test_commands_refuse_a_device_before_all_else(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*argv, "--device", "gpu"]) == 2
    assert "argument --device: the device must be cpu, cuda or" in capsys.readouterr().err


def test_the_demo_refuses_it_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert demo.main(["--device", "gpu", "--out", str(tmp_path)]) == 1
    assert "demo: the device must be cpu, cuda or" in capsys.readouterr().err


def test_training_and_loading_put_the_model_where_they_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a device that holds no numbers, as far as that goes."""
    saved = pyseq.train(PAIRS, **OPTIONS, epochs=1, out=tmp_path, validation=PAIRS[:2])
    assert {p.device.type for p in saved.model.parameters()} == {"cpu"}

    for module in (pyseq.checkpoint, training.runs):
        monkeypatch.setattr(module, "find_device", torch.device)
    places: list[str] = []

    def run(self: Trainer) -> list[EpochReport]:
        places.extend({p.device.type for p in self.model.parameters()})
        return []

    monkeypatch.setattr(Trainer, "run", run)
    trained = pyseq.train(PAIRS, **OPTIONS, epochs=1, device="meta")
    labeler = pyseq.train_labeler(
        [("a b", "X Y")], task="tag", hidden_size=4, embedding_size=4, device="meta"
    )
    assert places == ["meta", "meta"]
    loaded = pyseq.Translator.load(tmp_path, tmp_path, device="meta")
    models = [trained.model, labeler.model, pyseq.load(tmp_path, device="meta").model]
    for model in (*models, loaded.model, *loaded.others):
        assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_run_that_goes_on_elsewhere_says_so(tmp_path: Path) -> None:
    pyseq.train(PAIRS, **OPTIONS, epochs=1, out=tmp_path)
    _, state = training.last_checkpoint(tmp_path)
    assert state.record["device"] == "cpu"
    state.record["device"] = "cuda"
    lines: list[str] = []
    texts = [make_pair(*pair, line, name="pairs") for line, pair in enumerate(PAIRS, 1)]
    source, target = (Tokenizer(name) for name in OPTIONS["tokens"])
    pairs = tokenise_pairs(texts, source=source, target=target, name="pairs")
    trainer = training.resume(training.Data(pairs, "pairs"), out=tmp_path, log=lines.append)
    trainer.restore(state)
    assert lines == [
        "the run was begun with the device cuda and goes on with cpu: its dropout and the last "
        "bits of its numbers differ"
    ]
