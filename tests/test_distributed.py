# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.distributed: two processes by torchrun do what one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_cases as cases
import pytest
import torch

from pyseq import checkpoint, distributed, training
from pyseq.distributed import Processes
from pyseq.errors import TrainingError
from pyseq.labels import LabelBatch
from pyseq.types import PAD

pytest.importorskip("safetensors", reason="checkpoints need the extra 'train'")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by its relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    folder = tmp_path_factory.mktemp("two")
    done = subprocess.run(
        [*TORCHRUN, str(ROOT / "tests" / "distributed_cases.py"), str(folder)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    # The last case ends process 1 with 3, which torchrun passes on as a failure.
    assert done.returncode == 1, done.stderr
    assert "exitcode  : 3" in done.stderr, done.stderr
    return folder


RUNS: dict[str, dict[str, Any]] = {
    "two": {},
    "copying": {"model": cases.COPYING, "options": cases.FREEZING, "data": cases.TOLD},
}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_learns(name: str, run_of_two: Path) -> None:
    trainer = cases.begin(None, **RUNS[name])
    frozen = trainer.model.decoder.embedding.weight.clone()
    alone = trainer.run()
    assert torch.equal(trainer.model.decoder.embedding.weight, frozen) is (name == "copying")
    saved = checkpoint.load(run_of_two / name / "last")
    assert saved.training is not None
    record = saved.training.record
    assert record["processes"] == 2
    for report, found in zip(alone, record["reports"], strict=True):
        assert found["train_loss"] == pytest.approx(report.train_loss, rel=1e-5)
        assert found["valid_loss"] == pytest.approx(report.valid_loss, rel=1e-5)
        assert found["valid_accuracy"] == report.valid_accuracy
    for key, weight in trainer.model.state_dict().items():
        # Adam divides by the root of the second moment: rounding of small gradients grows.
        torch.testing.assert_close(saved.model.state_dict()[key], weight, rtol=1e-3, atol=1e-5)


def test_resuming_two_processes_is_exact(run_of_two: Path) -> None:
    whole, parts = contents(run_of_two / "whole"), contents(run_of_two / "parts")
    assert parts == whole
    saved = checkpoint.load(run_of_two / "whole" / "last")
    assert saved.training is not None
    states = [saved.training.tensors[name] for name in ("rng.torch", "rng.torch.1")]
    assert not torch.equal(*states)


def test_a_lost_process_ends_the_others(run_of_two: Path) -> None:
    text = (run_of_two / "lost.txt").read_text()
    assert text.startswith("process 0 of 2 stops, because another one has ended")


def test_going_on_with_one_process_says_so(run_of_two: Path) -> None:
    said: list[str] = []
    trainer = training.resume(cases.TOLD, cases.TOLD, out=run_of_two / "whole", log=said.append)
    assert len(trainer.reports) == 2
    assert said == [
        "the run was begun with 2 processes and goes on with 1: its dropout and the last bits of "
        "its numbers differ"
    ]


def test_ctrl_c_under_torchrun_leaves_a_checkpoint(tmp_path: Path) -> None:
    path, out = tmp_path / "pairs.tsv", tmp_path / "out"
    path.write_text("".join(f"{'ab' * n}\t{'ba' * n}\n" for n in range(1, 30)))
    train = ["train", str(path), "--out", str(out), "--epochs", "100000", "--batch-size", "4"]
    with subprocess.Popen(
        [*TORCHRUN, "-m", "pyseq", *train, "--hidden-size", "8", "--threads", "1"],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "epoch 1/" in line:
                process.send_signal(signal.SIGINT)
                break
        lines += process.stderr.readlines()
        assert process.wait(120) != 0
    said = [line for line in lines if line.startswith("pyseq: ")]
    assert "1 threads in each of 2 processes" in said[0]
    assert sum("epoch 1/" in line for line in said) == 1  # the first process alone speaks
    stopped = [line for line in said if "stopped by SIGINT after epoch" in line]
    assert len(stopped) == 1
    assert "--resume goes on from there" in stopped[0]
    saved = checkpoint.load(out / "last")
    assert saved.training is not None
    assert saved.training.record["processes"] == 2
    assert saved.training.record["step"] >= 7


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_the_batch(count: int) -> None:
    batch = cases.begin(None).examples.collate([0, 1, 3, 2])
    lines = []
    for rank in range(count):
        own = batch.share(rank, count)
        lines += own.lines
        for row, line in enumerate(own.lines):
            whole = batch.lines.index(line)
            length = int(own.source_lengths[row])
            assert length == batch.source_lengths[whole]
            for mine, all_rows in zip(own[:1] + own[2:4], batch[:1] + batch[2:4], strict=True):
                size = mine.shape[1]
                assert torch.equal(mine[row], all_rows[whole, :size])
                assert not all_rows[whole, size:].ne(PAD).any() or mine is own.target_in
        if own.lines:
            assert own.source.shape[1] == own.source_lengths.max()
            assert own.target_out.ne(PAD).any(0).all()
    assert sorted(lines) == sorted(batch.lines)


def test_shares_of_labels() -> None:
    source = torch.arange(12).reshape(4, 3)
    lengths = torch.tensor([1, 2, 2, 3])
    per_token = LabelBatch(source, lengths, source + 100, [1, 2, 3, 4])
    second = per_token.share(1, 3)
    assert second.lines == [2]
    assert second.source.tolist() == [[3, 4]]
    assert second.labels.tolist() == [[103, 104]]
    per_line = LabelBatch(source, lengths, torch.arange(4), [1, 2, 3, 4])
    first = per_line.share(0, 2)
    assert first.source_lengths.tolist() == [1, 2]
    assert first.labels.tolist() == [0, 2]
    assert per_line.share(4, 5).lines == []


def test_one_process_exchanges_nothing() -> None:
    alone = Processes.of_group(torch.device("cpu"))
    assert alone == Processes()
    assert alone.is_first
    assert alone.sum(1.5, 2) == [1.5, 2]
    assert alone.max(3) == 3
    tensor = torch.rand(2)
    assert alone.gather(tensor) == [tensor]


def test_other_errors_than_lost_connections_stay_what_they_are() -> None:
    several = Processes(0, 2)
    with pytest.raises(RuntimeError, match="shape") as raised, distributed.peers_may_end(several):
        raise RuntimeError("shape")
    assert not isinstance(raised.value, TrainingError)
    lost = pytest.raises(TrainingError, match="process 0 of 2 stops")
    with lost, distributed.peers_may_end(several):
        raise RuntimeError("Connection closed by peer")
