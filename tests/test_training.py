# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.training: losses, schedules, learning, exact resuming, failures."""

from __future__ import annotations

import errno
import inspect
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from pyseq import checkpoint, cli, training
from pyseq.errors import CheckpointError, DataError, MissingExtraError, TrainingError
from pyseq.seq2seq import Seq2Seq
from pyseq.text import Pair, ordered_batches
from pyseq.training import (
    Data,
    Interrupted,
    ModelOptions,
    Trainer,
    TrainingOptions,
    learning_rate_factor,
    mean_loss,
)
from pyseq.translator import Translator
from pyseq.types import PAD, STOP

pytest.importorskip("safetensors", reason="checkpoints need the extra 'train'")

MODEL = ModelOptions(embedding_size=8, hidden_size=12, dropout=0.2)
OPTIONS = TrainingOptions(epochs=4, batch_size=8, learning_rate=0.01)
EVERY_STEP = replace(OPTIONS, checkpoint_every=1)
STEPS = 5  # of an epoch


def reversals(count: int, seed: int) -> Data:
    """Pairs whose target is the source backwards."""
    chance = random.Random(seed)
    sources = [chance.choices("abcde", k=chance.randint(1, 5)) for _ in range(count)]
    pairs = [Pair(source, source[::-1], line) for line, source in enumerate(sources, start=1)]
    return Data(pairs, "reversals")


TRAIN, VALID = reversals(40, 1), reversals(16, 2)


def begin(
    out: Path | None,
    options: TrainingOptions = OPTIONS,
    data: Data = TRAIN,
    *,
    overwrite: bool = False,
) -> Trainer:
    return training.start(
        data,
        VALID,
        tokens=("char", "char"),
        model=MODEL,
        options=options,
        out=out,
        overwrite=overwrite,
    )


def go_on(out: Path, **changes: int) -> Trainer:
    torch.manual_seed(12345)  # what the process did before must not matter
    return training.resume(TRAIN, VALID, out=out, **changes)


def at_step(trainer: Trainer, number: int, action: Callable[[], None]) -> None:
    """Call ``action`` in the middle of the ``number``-th update of this trainer's run."""
    done = 0

    def hook(*_: object) -> None:
        nonlocal done
        if trainer.model.training:
            done += 1
            if done == number:
                action()

    trainer.model.encoder.register_forward_pre_hook(hook)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by its relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """Models this small are slower with more, by far if something else runs too."""
    set_threads(1)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a whole run writes, with one thread."""
    out, threads = tmp_path_factory.mktemp("run"), torch.get_num_threads()
    torch.set_num_threads(1)
    begin(out).run()
    torch.set_num_threads(threads)
    return contents(out)


def test_learning_rate_factor() -> None:
    def factors(schedule: training.ScheduleName, warmup_steps: int = 0) -> list[float]:
        return [
            learning_rate_factor(step, 4, schedule=schedule, warmup_steps=warmup_steps)
            for step in range(4)
        ]

    assert factors("linear") == [1, 0.75, 0.5, 0.25]
    assert factors("constant") == [1, 1, 1, 1]
    assert factors("warmup", 2) == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1, 0.5]
    assert factors("warmup") == factors("linear")


@pytest.mark.parametrize(
    ("after", "every", "expected"),
    [
        (2, 1, [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25]),
        (1, 0.5, [1, 1, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625]),
        (0, 3, [0.5] * 6 + [0.25] * 2),
        (1.5, 2, [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25]),
        (0, 1e-4, [0.5, *[0.0] * 7]),
    ],
)
def test_halving(after: float, every: float, expected: list[float]) -> None:
    epoch = 2  # steps
    factors = [
        learning_rate_factor(
            step, 8, schedule="halving", halve_after=after * epoch, halve_every=every * epoch
        )
        for step in range(8)
    ]
    assert factors == expected


def test_sgd_takes_the_rate_of_the_schedule() -> None:
    options = TrainingOptions(
        epochs=3,
        batch_size=8,
        optimizer="sgd",
        learning_rate=0.8,
        clip_norm=0.5,
        schedule="halving",
        halve_after=1,
    )
    trainer, moved = begin(None, options), []

    def loss(model: torch.nn.Module, *_: object, **__: object) -> float:
        moved.append(trainer._optimizer.param_groups[0]["lr"])
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.trainer, "mean_loss", loss)
        trainer.run()
    assert moved == [0.8, 0.4, 0.2]
    # One more step: the weights move by rate times clipped gradient, and nothing else.
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    batch = trainer.examples.collate(range(8))
    training.training_step(trainer.model, batch, trainer._optimizer, clip_norm=1e-3)
    for old, new in zip(before, trainer.model.parameters(), strict=True):
        assert new.grad is not None
        torch.testing.assert_close(new.detach(), old - 0.2 * new.grad)
    norm = torch.nn.utils.get_total_norm([w.grad for w in trainer.model.parameters()])
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_resuming_sgd_is_exact(tmp_path: Path) -> None:
    options = replace(
        OPTIONS, optimizer="sgd", learning_rate=0.5, schedule="halving", halve_after=1.5
    )
    begin(tmp_path / "whole", options).run()
    trainer = begin(tmp_path / "parts", options)
    at_step(trainer, 2 * STEPS + 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        trainer.run()
    go_on(tmp_path / "parts").run()
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_reversed_source_is_reversed_at_prediction_too(tmp_path: Path) -> None:
    def run(data: Data, **options: bool) -> Translator:
        trainer = training.start(
            data, tokens=("char", "char"), model=MODEL, options=OPTIONS, **options
        )
        trainer.run()
        return trainer.translator

    backwards = [pair._replace(source=pair.source[::-1]) for pair in TRAIN.pairs]
    by_hand = run(Data(backwards, "by hand"))
    run(TRAIN, reverse_source=True).save(tmp_path)
    found = Translator.load(tmp_path)
    assert found.reverse_source
    for name, weight in by_hand.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], weight), name
    lines = ["abc", "", "d", "abcde"]
    results = zip(
        lines,
        found.translate(lines, beam_size=2),
        by_hand.translate([line[::-1] for line in lines], beam_size=2),
        strict=True,
    )
    for line, result, expected in results:
        assert (result.text, result.score) == (expected.text, expected.score)
        assert result.source_tokens == list(line)
        if line:
            assert result.weights is not None
            assert expected.weights is not None
            columns = [*reversed(range(len(line))), len(line)]  # <stop> is last in both
            assert torch.equal(result.weights, expected.weights[:, columns])


def test_resuming_with_a_reversed_source_is_exact(tmp_path: Path) -> None:
    def reversing(out: Path) -> Trainer:
        return training.start(
            TRAIN,
            VALID,
            tokens=("char", "char"),
            reverse_source=True,
            model=MODEL,
            options=OPTIONS,
            out=out,
        )

    reversing(tmp_path / "whole").run()
    trainer = reversing(tmp_path / "parts")
    at_step(trainer, STEPS + 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        trainer.run()
    go_on(tmp_path / "parts").run()
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["exponential", "epochs"])
def test_the_average_is_judged_and_saved_and_resuming_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    options = replace(OPTIONS, average=kind, average_decay=0.9, average_epochs=3)
    begin(tmp_path / "plain").run()
    judged: list[torch.Tensor] = []

    def loss(model: Seq2Seq, *_: object, **__: object) -> float:
        judged.append(model.decoder.output.weight.detach().clone())
        return -float(len(judged))

    whole = begin(tmp_path / "whole", options)
    with monkeypatch.context() as patch:
        patch.setattr(training.trainer, "mean_loss", loss)
        whole.run()
    best, last = Translator.load(tmp_path / "whole"), Translator.load(tmp_path / "whole" / "last")
    assert torch.equal(best.model.decoder.output.weight, judged[-1])
    # The average is beside the weights: training does not see it.
    plain = Translator.load(tmp_path / "plain" / "last").model.state_dict()
    for name, weight in last.model.state_dict().items():
        assert torch.equal(weight, plain[name]), name
        assert torch.equal(weight, whole.model.state_dict()[name]), name
    assert not torch.equal(best.model.decoder.output.weight, plain["decoder.output.weight"])
    whole.take_average()
    assert torch.equal(whole.model.decoder.output.weight, judged[-1])

    begin(tmp_path / "again", options).run()
    trainer = begin(tmp_path / "parts", options)
    for step in (STEPS + 1, STEPS + 2):
        at_step(trainer, step, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            trainer.run()
        trainer = go_on(tmp_path / "parts")
    trainer.run()
    assert contents(tmp_path / "parts") == contents(tmp_path / "again")


def test_train_gives_the_average(tmp_path: Path) -> None:
    translator = training.train(
        [("ab", "x"), ("ba", "y")],
        hidden_size=8,
        epochs=2,
        out=tmp_path,
        average="epochs",
        average_epochs=2,
    )
    saved = Translator.load(tmp_path).model.state_dict()
    for name, weight in translator.model.state_dict().items():
        assert torch.equal(weight, saved[name]), name


class StubWriter:
    """Stands for torch's SummaryWriter: remembers what it was told."""

    made: ClassVar[list[StubWriter]] = []

    def __init__(self, log_dir: str, purge_step: int) -> None:
        self.log_dir, self.purge_step = log_dir, purge_step
        self.values: dict[str, list[tuple[int, float]]] = {}
        self.closed = False
        self.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert not self.closed
        self.values.setdefault(tag, []).append((step, value))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def stub_tensorboard(monkeypatch: pytest.MonkeyPatch) -> list[StubWriter]:
    """The package as far as it is used; the list gets every writer that is made."""
    writer = types.ModuleType("torch.utils.tensorboard")
    writer.SummaryWriter = StubWriter  # type: ignore[attr-defined]
    monkeypatch.setattr(StubWriter, "made", [])
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)
    return StubWriter.made


def test_curves_for_tensorboard(tmp_path: Path, stub_tensorboard: list[StubWriter]) -> None:
    options = replace(OPTIONS, epochs=2, select="accuracy")
    trainer = training.start(
        TRAIN,
        VALID,
        tokens=("char", "char"),
        model=MODEL,
        options=options,
        out=tmp_path,
        tensorboard=tmp_path / "curves",
    )
    at_step(trainer, STEPS + 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        trainer.run()
    reports = training.resume(TRAIN, VALID, out=tmp_path, tensorboard=tmp_path / "curves").run()
    first, second = stub_tensorboard
    assert first.log_dir == second.log_dir == str(tmp_path / "curves")
    assert (first.purge_step, second.purge_step) == (1, STEPS + 3)
    assert first.closed
    assert second.closed
    assert [step for step, _ in first.values["loss/step"]] == [*range(1, STEPS + 3)]
    assert [step for step, _ in second.values["loss/step"]] == [*range(STEPS + 3, 2 * STEPS + 1)]
    rates = [rate for _, rate in first.values["learning_rate"]]
    assert rates[:2] == pytest.approx([0.01, 0.009])
    for writer, report in zip((first, second), reports, strict=True):
        step = report.epoch * STEPS
        assert writer.values["loss/train"] == [(step, report.train_loss)]
        assert writer.values["loss/validation"] == [(step, report.valid_loss)]
        assert writer.values["accuracy/validation"] == [(step, report.valid_accuracy)]
        assert writer.values["tokens_per_second"][0][1] > 0


def test_tensorboard_reads_the_curves_of_a_run_that_was_resumed(tmp_path: Path) -> None:
    reading = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="the extra tensorboard is not installed",
    )
    curves = tmp_path / "curves"
    trainer = training.start(
        TRAIN,
        VALID,
        tokens=("char", "char"),
        model=MODEL,
        options=replace(OPTIONS, epochs=2),
        out=tmp_path,
        tensorboard=curves,
    )
    at_step(trainer, STEPS + 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        trainer.run()
    reports = training.resume(TRAIN, VALID, out=tmp_path, tensorboard=curves).run()
    read = reading.EventAccumulator(str(curves)).Reload()
    shown = {tag: read.Scalars(tag) for tag in read.Tags()["scalars"]}
    assert [each.step for each in shown["loss/step"]] == [*range(1, 2 * STEPS + 1)]
    losses = [report.train_loss for report in reports]
    assert [each.value for each in shown["loss/train"]] == pytest.approx(losses, rel=1e-6)


def test_a_missing_tensorboard_is_missed_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match="this needs the package tensorboard"):
        training.start(
            TRAIN,
            tokens=("char", "char"),
            model=MODEL,
            options=OPTIONS,
            out=tmp_path / "out",
            tensorboard=tmp_path,
        )
    assert not (tmp_path / "out").exists()


def test_patience_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(losses: list[float], patience: int, trainer: Trainer | None = None) -> list[float]:
        values = iter(losses)
        monkeypatch.setattr(training.trainer, "mean_loss", lambda *_, **__: next(values))
        if trainer is None:
            trainer = begin(tmp_path, replace(OPTIONS, epochs=7, patience=patience))
        return [report.valid_loss or 0.0 for report in trainer.run()]

    assert run([3.0, 2.0, 4.0, 5.0, 1.0], 2) == [3.0, 2.0, 4.0, 5.0]
    assert run([], 2, go_on(tmp_path)) == [3.0, 2.0, 4.0, 5.0]
    # With more of it the run goes on, and a better epoch begins the count anew.
    more = run([1.0, 2.0, 3.0], 3, go_on(tmp_path, patience=3))
    assert more == [3.0, 2.0, 4.0, 5.0, 1.0, 2.0, 3.0]


def test_patience_says_that_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, said = iter([1.0, 2.0]), list[str]()
    monkeypatch.setattr(training.trainer, "mean_loss", lambda *_, **__: next(losses))
    trainer = training.start(
        TRAIN,
        VALID,
        tokens=("char", "char"),
        model=MODEL,
        options=replace(OPTIONS, patience=1),
        log=said.append,
    )
    assert len(trainer.run()) == 2
    assert said[-1].startswith("stopped early after epoch 2: none was better than epoch 1")


def test_patience_needs_validation() -> None:
    with pytest.raises(DataError, match="reversals: patience needs validation pairs"):
        training.start(
            TRAIN, tokens=("char", "char"), model=MODEL, options=replace(OPTIONS, patience=1)
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("clip_norm", -1.0),
        ("schedule", "cosine"),
        ("optimizer", "lion"),
        ("halve_after", -1),
        ("halve_after", math.inf),
        ("halve_every", 0),
        ("patience", 0),
        ("average", "swa"),
        ("average_decay", 1.0),
        ("average_epochs", 0),
        ("label_smoothing", 1.0),
        ("warmup_steps", -1),
        ("seed", -1),
        ("checkpoint_every", 0),
        ("learning_rate", "x"),
        ("clip_norm", None),
        ("average_decay", True),
        ("epochs", 2.5),
        ("epochs", True),
        ("batch_size", "64"),
        ("patience", 1.0),
        ("freeze_source", "all"),
        ("warmup_steps", 1.5),
        ("scheduled_sampling", "linear:1e-4"),
        ("scheduled_sampling", 0.5),
        ("schedule", ["linear"]),
    ],
)
def test_options_are_checked(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        TrainingOptions(**{name: value})  # type: ignore[arg-type]


def test_options_may_be_numbers_of_other_types() -> None:
    given: dict[str, Any] = {"epochs": np.int64(3), "seed": torch.tensor(4)}
    options = TrainingOptions(learning_rate=np.float32(0.5), **given)  # type: ignore[arg-type]
    assert (options.epochs, options.learning_rate, options.seed) == (3, 0.5, 4)
    assert json.loads(json.dumps(asdict(options)))["learning_rate"] == 0.5


def test_learns_to_reverse() -> None:
    options = TrainingOptions(epochs=20, batch_size=16, learning_rate=0.02)
    trainer = training.start(
        reversals(300, 1),
        VALID,
        tokens=("char", "char"),
        model=ModelOptions(embedding_size=16, hidden_size=32, dropout=0.0),
        options=options,
    )
    reports = trainer.run()
    assert reports[0].valid_loss is not None
    assert reports[-1].valid_loss is not None
    assert reports[-1].valid_loss < 0.1 * reports[0].valid_loss
    assert trainer.translator("abcd") == "dcba"


def test_mean_loss_is_that_of_all_tokens() -> None:
    trainer = begin(None)
    assert trainer.validation is not None
    whole = mean_loss(trainer.model, trainer.validation, batch_size=16)
    assert whole == pytest.approx(mean_loss(trainer.model, trainer.validation, batch_size=3))
    assert trainer.model.training


def test_same_seed_same_bits(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    torch.manual_seed(777)
    begin(tmp_path).run()
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("step", [1, STEPS, STEPS + 2, 4 * STEPS - 1])
def test_resuming_after_a_signal_is_exact(
    tmp_path: Path, uninterrupted: dict[str, bytes], step: int
) -> None:
    trainer = begin(tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    at_step(trainer, step, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="stopped by SIGINT after epoch") as raised:
        trainer.run()
    assert raised.value.signum == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is handler
    saved = checkpoint.load(tmp_path / "last")
    assert saved.training is not None
    assert saved.training.record["step"] == step
    go_on(tmp_path).run()
    assert contents(tmp_path) == uninterrupted


def test_resuming_twice_is_exact(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    trainer = begin(tmp_path)
    for _ in range(2):
        at_step(trainer, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match="SIGTERM"):
            trainer.run()
        trainer = go_on(tmp_path)
    trainer.run()
    assert contents(tmp_path) == uninterrupted


def test_resuming_after_a_crash_goes_back_to_the_last_checkpoint(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    def crash() -> None:
        raise RuntimeError("power cut")

    trainer = begin(tmp_path)
    at_step(trainer, 8, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.run()
    trainer = go_on(tmp_path, checkpoint_every=2)
    at_step(trainer, 4, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.run()
    saved = checkpoint.load(tmp_path / "last")
    assert saved.training is not None
    assert saved.training.record["step"] == 8
    go_on(tmp_path).run()
    found = contents(tmp_path)
    # The interval between checkpoints is recorded; all else is as if nothing had happened.
    for name, data in uninterrupted.items():
        assert name in ("last/training.json", "last/config.json") or found[name] == data, name


def test_more_epochs_with_a_constant_rate_are_exact(tmp_path: Path) -> None:
    def options(epochs: int) -> TrainingOptions:
        return TrainingOptions(epochs=epochs, batch_size=8, learning_rate=0.01, schedule="constant")

    begin(tmp_path / "whole", options(4)).run()
    begin(tmp_path / "parts", options(2)).run()
    reports = go_on(tmp_path / "parts", epochs=4).run()
    assert [report.epoch for report in reports] == [1, 2, 3, 4]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_resuming_a_finished_run_does_nothing(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    begin(tmp_path).run()
    assert len(go_on(tmp_path).run()) == 4
    assert contents(tmp_path) == uninterrupted


def test_resuming_refuses_other_data_and_options(tmp_path: Path) -> None:
    begin(tmp_path, TrainingOptions(epochs=1, batch_size=8)).run()
    with pytest.raises(CheckpointError, match="not the training pairs"):
        training.resume(reversals(40, 9), VALID, out=tmp_path)
    saved = checkpoint.load(tmp_path / "last")
    assert saved.training is not None
    trainer = begin(None, TrainingOptions(epochs=1, batch_size=8, seed=5))
    with pytest.raises(CheckpointError, match="seed must be 1 as in the run to be resumed, got 5"):
        trainer.restore(saved.training)


def test_a_run_of_an_older_version_has_the_defaults_of_newer_options(tmp_path: Path) -> None:
    begin(tmp_path, replace(OPTIONS, epochs=1)).run()
    saved = checkpoint.load(tmp_path / "last")
    assert saved.training is not None
    for name in ("optimizer", "halve_after", "halve_every", "patience"):
        del saved.training.record["options"][name]
    trainer = begin(None, OPTIONS)
    trainer.restore(saved.training)
    assert len(trainer.reports) == 1
    saved.training.record["options"]["future"] = 1
    with pytest.raises(CheckpointError, match=r"no valid options: .*future"):
        trainer.restore(saved.training)


def test_resuming_needs_a_training_state(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        go_on(tmp_path)
    begin(None).translator.save(tmp_path / "last")
    with pytest.raises(CheckpointError, match="without its training state"):
        go_on(tmp_path)


def test_resuming_on_another_tier_says_so(tmp_path: Path) -> None:
    begin(tmp_path, TrainingOptions(epochs=1, batch_size=8)).run()
    path = tmp_path / "last"
    saved = checkpoint.load(path)
    assert saved.training is not None
    now = saved.training.record["tier"]
    said: list[str] = []
    trainer = training.resume(TRAIN, VALID, out=tmp_path, log=said.append)
    assert said == []
    saved.training.record["tier"] = "other"
    trainer.restore(saved.training)
    assert said == [
        f"the run was begun with the CPU tier other and goes on with {now}: the last bits of its "
        "numbers may differ"
    ]
    del saved.training.record["tier"]  # older versions did not say
    trainer.restore(saved.training)
    assert len(said) == 1


def test_resuming_with_other_threads_says_so(
    tmp_path: Path, set_threads: Callable[[int], None]
) -> None:
    set_threads(1)
    begin(tmp_path, TrainingOptions(epochs=1, batch_size=8)).run()
    set_threads(2)
    said: list[str] = []
    training.resume(TRAIN, VALID, out=tmp_path, log=said.append)
    assert said == [
        "the run was begun with 1 threads and goes on with 2: the last bits of its numbers may "
        "differ"
    ]


def test_a_signal_while_the_last_epoch_is_finished_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, bytes]
) -> None:
    trainer, loss = begin(tmp_path), training.mean_loss

    def interrupted(*arguments: Any, **options: Any) -> float:
        if len(trainer.reports) == OPTIONS.epochs - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments, **options)

    monkeypatch.setattr(training.trainer, "mean_loss", interrupted)
    with pytest.raises(Interrupted, match="stopped by SIGINT after epoch 4; the checkpoint is in"):
        trainer.run()
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("step", [1, 3])
def test_a_new_run_leaves_nothing_of_the_one_before(tmp_path: Path, step: int) -> None:
    begin(tmp_path, TrainingOptions(epochs=1, batch_size=8, seed=9)).run()
    assert checkpoint.exists(tmp_path)

    def crash() -> None:
        raise RuntimeError("power cut")

    trainer = begin(tmp_path, overwrite=True)
    at_step(trainer, step, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.run()
    assert not checkpoint.exists(tmp_path)
    saved = checkpoint.load(tmp_path / "last")
    assert saved.training is not None
    assert saved.training.record["options"]["seed"] == OPTIONS.seed


def test_a_new_run_that_cannot_write_leaves_the_one_before_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, bytes]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    begin(tmp_path).run()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match="No space left on device"):
        begin(tmp_path, TrainingOptions(seed=9), overwrite=True).run()
    assert contents(tmp_path) == uninterrupted


def test_a_finished_model_is_not_overwritten_unasked(tmp_path: Path) -> None:
    train, short = [("ab", "x"), ("ba", "y")], replace(OPTIONS, epochs=1)
    begin(tmp_path, short).run()
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="holds a model already; overwrite=True replaces it"):
        begin(tmp_path)
    with pytest.raises(CheckpointError, match="holds a model already"):
        training.train(train, hidden_size=8, epochs=1, out=tmp_path)
    with pytest.raises(CheckpointError, match="holds a model already"):
        training.train_labeler(train, task="classify", hidden_size=8, epochs=1, out=tmp_path)
    checkpoint.remove(tmp_path)  # what can be resumed is kept, too
    with pytest.raises(CheckpointError, match="last: holds a model already"):
        begin(tmp_path)
    assert contents(tmp_path) == {
        name: data for name, data in before.items() if name.startswith("last/")
    }
    training.train(train, hidden_size=8, epochs=1, out=tmp_path, overwrite=True)
    saved = checkpoint.load(tmp_path / "last")
    assert saved.model.config["hidden_size"] == 8


def test_a_validation_loss_that_is_not_finite_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([2.0, math.nan])
    monkeypatch.setattr(training.trainer, "mean_loss", lambda *_, **__: next(losses))
    with pytest.raises(
        TrainingError, match=r"reversals: the validation loss is nan after epoch 2.*last checkpoint"
    ):
        begin(tmp_path).run()
    assert len(go_on(tmp_path).reports) == 1
    assert checkpoint.exists(tmp_path)


@pytest.mark.parametrize("name", ["epochs", "checkpoint_every", "patience"])
def test_nothing_is_no_number_to_resume_with(tmp_path: Path, name: str) -> None:
    begin(tmp_path, replace(OPTIONS, epochs=1)).run()
    with pytest.raises(ValueError, match=f"{name} must be at least 1.*got 0"):
        go_on(tmp_path, **{name: 0})


def test_a_kill_at_any_moment_is_resumed_exactly(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    chance = random.Random(3)
    for _ in range(6):
        child = os.fork()
        if child == 0:  # only this process is killed
            with suppress(BaseException):
                begun = checkpoint.exists(tmp_path / "last")
                run = go_on(tmp_path) if begun else begin(tmp_path, EVERY_STEP, overwrite=True)
                run.run()
            os._exit(0)
        time.sleep(chance.uniform(0.02, 0.4))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not checkpoint.exists(tmp_path / "last"):
        begin(tmp_path, EVERY_STEP, overwrite=True).run()
    go_on(tmp_path).run()
    found = contents(tmp_path)
    assert found.keys() == uninterrupted.keys()  # nothing half-written is left
    for name in ("model.safetensors", "last/model.safetensors", "last/training.safetensors"):
        assert found[name] == uninterrupted[name], name


def test_the_best_epoch_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0, 1.0])
    weights = []

    def loss(model: torch.nn.Module, *_: object, **__: object) -> float:
        weights.append({k: v.clone() for k, v in model.state_dict().items()})
        return next(losses)

    monkeypatch.setattr(training.trainer, "mean_loss", loss)
    reports = begin(tmp_path).run()
    assert [report.best for report in reports] == [True, True, False, False]
    best, last = Translator.load(tmp_path), Translator.load(tmp_path / "last")
    assert torch.equal(best.model.decoder.output.weight, weights[1]["decoder.output.weight"])
    assert torch.equal(last.model.decoder.output.weight, weights[3]["decoder.output.weight"])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, where: str) -> None:
    trainer = begin(tmp_path)
    at_step(trainer, STEPS + 2, lambda: _poison(trainer, where))
    with pytest.raises(TrainingError, match=r"nan in epoch 2, step 2, in the batch of lines") as e:
        trainer.run()
    assert str(tmp_path / "last") in str(e.value)
    lines = str(e.value).partition("lines ")[2].partition(";")[0].split(", ")
    assert len(lines) == 8
    assert {int(line) for line in lines} <= set(range(1, 41))
    saved = checkpoint.load(tmp_path / "last")
    assert saved.training is not None
    assert saved.training.record["step"] == STEPS
    assert all(value.isfinite().all() for value in saved.model.state_dict().values())
    # The weights in memory were not touched by the bad step either.
    if where == "gradient":
        assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


def _poison(trainer: Trainer, where: str) -> None:
    weight = trainer.model.decoder.output.bias
    if where == "loss":
        weight.data.fill_(math.nan)
    else:
        weight.register_hook(lambda gradient: gradient * math.nan)


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, bytes]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer = begin(tmp_path)
    at_step(trainer, STEPS + 2, lambda: monkeypatch.setattr(os, "fsync", full))
    with pytest.raises(TrainingError, match=r"cannot write .* epoch \d.*: No space left on device"):
        trainer.run()
    monkeypatch.undo()
    go_on(tmp_path).run()
    assert contents(tmp_path) == uninterrupted


def test_an_unwritable_folder_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot write the checkpoint of epoch 1, step 0"):
        begin(tmp_path / "file" / "out").run()


def test_runs_outside_the_main_thread() -> None:
    trainer = begin(None, TrainingOptions(epochs=1, batch_size=8))
    thread = threading.Thread(target=trainer.run)
    thread.start()
    thread.join()
    assert len(trainer.reports) == 1


def test_the_log_has_a_line_for_each_epoch() -> None:
    said: list[str] = []
    options = TrainingOptions(epochs=2, batch_size=8)
    training.start(
        TRAIN, VALID, tokens=("char", "char"), model=MODEL, options=options, log=said.append
    ).run()
    assert [line.partition(":")[0] for line in said] == ["epoch 1/2", "epoch 2/2"]
    assert "nats/token" in said[0]
    assert "tokens/s" in said[0]


def test_train_from_strings() -> None:
    pairs = [("ab", "x y"), ("ba", "y x"), ("aa", "x x"), ("bb", "y y")]
    translator = training.train(
        pairs,
        tokens=("char", "word"),
        embedding_size=8,
        hidden_size=16,
        epochs=60,
        learning_rate=0.03,
    )
    assert [translator(source) for source, _ in pairs] == [target for _, target in pairs]
    assert not translator.model.training


def test_train_gives_the_best_epoch_if_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(training.trainer, "mean_loss", lambda *_, **__: next(losses))
    pairs = [("ab", "x"), ("ba", "y")]
    translator = training.train(pairs, validation=pairs, hidden_size=8, epochs=2, out=tmp_path)
    best, last = Translator.load(tmp_path), Translator.load(tmp_path / "last")
    weights = [t.model.decoder.output.weight for t in (translator, best, last)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_best_epoch_may_be_that_with_the_most_right_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, shares = iter([1.0, 2.0, 3.0]), iter([0.2, 0.5, 0.5])
    monkeypatch.setattr(training.trainer, "mean_loss", lambda *_, **__: next(losses))
    monkeypatch.setattr(training.trainer, "accuracy", lambda *_, **__: next(shares))
    trainer = begin(tmp_path, replace(OPTIONS, epochs=3, select="accuracy"))
    assert [report.best for report in trainer.run()] == [True, True, False]
    assert [report.valid_accuracy for report in trainer.reports] == [0.2, 0.5, 0.5]


def test_accuracy_is_the_share_that_greedy_search_gets_right(tmp_path: Path) -> None:
    trainer = begin(tmp_path, replace(OPTIONS, epochs=12))
    trainer.run()
    examples = trainer.examples
    right = 0
    for batch in ordered_batches(examples, 16):
        found = trainer.model.generate(batch.source, batch.source_lengths, max_length=50)
        for hypothesis, target in zip(found, batch.target_out.tolist(), strict=True):
            right += hypothesis.tokens == [token for token in target if token not in (PAD, STOP)]
    measured = training.accuracy(trainer.model, examples, batch_size=5)
    assert 0 < right < len(examples)
    assert measured == pytest.approx(right / len(examples))


def test_select_is_checked() -> None:
    with pytest.raises(ValueError, match="select must be one of loss, accuracy, got 'wer'"):
        TrainingOptions(select="wer")  # type: ignore[arg-type]


def test_defaults_are_those_of_the_classes() -> None:
    train = inspect.signature(training.train).parameters
    model = inspect.signature(Seq2Seq).parameters
    for field in fields(ModelOptions):
        assert train[field.name].default == model[field.name].default == field.default
    for name in ("epochs", "batch_size", "learning_rate", "seed"):
        assert train[name].default == getattr(TrainingOptions, name)


def test_train_takes_one_direction() -> None:
    translator = training.train([("a", "b")], hidden_size=7, bidirectional=False, epochs=1)
    assert translator.model.config["bidirectional"] is False


def test_an_interrupted_train_names_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trainer.run

    def interrupted(trainer: Trainer) -> object:
        at_step(trainer, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        return run(trainer)

    monkeypatch.setattr(Trainer, "run", interrupted)
    out, path = tmp_path / "out", tmp_path / "pairs.tsv"
    with pytest.raises(Interrupted) as raised:
        training.train([("ab", "ba"), ("b", "b")], hidden_size=8, epochs=2, out=out)
    monkeypatch.undo()
    path.write_text("ab\tba\nb\tb\n")
    command = re.search(r"pyseq (train PAIRS.tsv .*--resume) goes on", str(raised.value))
    assert command is not None
    arguments = command.group(1).replace("PAIRS.tsv", str(path)).split()
    assert cli.main(arguments) == 0
    assert checkpoint.exists(out)


@pytest.mark.parametrize("pairs", [[("a",)], "abc", [("a", "b", "c")], [("a", 1)], [1]])
def test_train_refuses_what_is_no_pair(pairs: Any) -> None:
    with pytest.raises(ValueError, match="pairs:1: a pair must be two strings, got"):
        training.train(pairs)


def test_train_refuses_tokens_that_are_no_pair() -> None:
    with pytest.raises(ValueError, match=r"tokens must be one name or a pair .* got \('char',\)"):
        training.train([("a", "b")], tokens=("char",))  # type: ignore[arg-type]


def test_train_refuses_bad_pairs() -> None:
    with pytest.raises(DataError, match="pairs:2: the source is empty"):
        training.train([("a", "b"), (" ", "c")])
    with pytest.raises(DataError, match="pairs: no pairs to train on"):
        training.train([])
