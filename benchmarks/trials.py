# SPDX-License-Identifier: Apache-2.0
"""Trials: one model, trained on one task from one seed, and what it got wrong afterwards.

Each is done once: its results are kept as a file under a fingerprint of all that it depends on,
and a training that was interrupted goes on. What is tried is said in quality.py.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyseq import checkpoint, training
from pyseq.metrics import error_rates
from pyseq.scheduled import parse
from pyseq.training import Data, ModelOptions, Trainer, TrainingOptions
from pyseq.translator import Translator

from .files import write_text
from .tasks import Task, find

#: What a result is: numbers, and lists and dictionaries of them, as JSON knows them.
Result = dict[str, Any]

#: Updates between checkpoints of a training, so that little is lost when it is interrupted.
_CHECKPOINT_EVERY = 500


@dataclass(frozen=True)
class Trial:
    """What is trained, on what, from which seed.

    Args:
        task: a name that :func:`benchmarks.tasks.find` knows.
        seed: of weights, dropout and the order of the data. The data do not depend on it.
        model: options of :class:`pyseq.training.ModelOptions`.
        training: those of :class:`pyseq.training.TrainingOptions`, ``scheduled_sampling`` as
            :func:`pyseq.scheduled.parse` reads it.
        beams: numbers of hypotheses with which the test is searched, once with each.
    """

    task: str
    seed: int
    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    beams: tuple[int, ...] = (1,)

    def record(self) -> dict[str, object]:
        """All that the result depends on but the versions of the code, as JSON knows it."""
        return {
            "task": self.task,
            "seed": self.seed,
            "model": dict(self.model),
            "training": dict(self.training),
            "beams": list(self.beams),
        }

    @property
    def fingerprint(self) -> str:
        """Under which the result is kept."""
        return fingerprint(self.record())

    def options(self) -> TrainingOptions:
        """How it is trained."""
        given: dict[str, Any] = {**self.training, "seed": self.seed}
        if "scheduled_sampling" in given:
            given["scheduled_sampling"] = parse(given["scheduled_sampling"])
        return TrainingOptions(**given, checkpoint_every=_CHECKPOINT_EVERY)


def fingerprint(record: Mapping[str, object]) -> str:
    """A name for what the record says."""
    text = json.dumps(record, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Archive:
    """The results of trials in a folder, those of earlier runs too.

    Args:
        folder: holds ``NAME.json`` for a result, and ``NAME/`` for the model of a trial.
        log: is called with lines of text on how the work goes.
    """

    def __init__(self, folder: Path, *, log: Callable[[str], None]) -> None:
        self.folder = folder
        self._log = log

    def find(self, trial: Trial) -> Result | None:
        """The result of a trial, None if it is not finished."""
        return self._read(trial.fingerprint)

    def run(self, trial: Trial) -> Result:
        """The result of a trial, which is trained and measured unless that was done before."""
        found = self.find(trial)
        if found is not None:
            return found
        out = self.folder / trial.fingerprint
        task = find(trial.task)
        clock = _Clock(out.with_suffix(".seconds"))
        trainer = self._trainer(trial, task, out, clock)
        try:
            trainer.run()
        finally:
            clock.keep()
        train_seconds = clock.stop()
        # With validation pairs the best epoch is the result, else the last one.
        translator = Translator.load(out)
        measuring = time.process_time()
        result: Result = {
            **trial.record(),
            "parameters": sum(weight.numel() for weight in translator.model.parameters()),
            "pairs": len(trainer.examples),
            "epochs": [report._asdict() for report in trainer.reports],
            "train_seconds": train_seconds,
            "errors": {str(beam): test_errors(translator, task, beam) for beam in trial.beams},
            **exposure(translator, task),
        }
        result["test_seconds"] = time.process_time() - measuring
        self._write(trial.fingerprint, result)
        clock.forget()
        return result

    def find_together(self, trials: Sequence[Trial], beam: int) -> Result | None:
        """The result of :meth:`run_together`, None if that was not done."""
        return self._read(fingerprint(_together(trials, beam)))

    def run_together(self, trials: Sequence[Trial], beam: int) -> Result:
        """What the models of finished trials get wrong as an ensemble."""
        found = self.find_together(trials, beam)
        if found is not None:
            return found
        folders = [self.folder / trial.fingerprint for trial in trials]
        translator = Translator.load(*folders)
        begin = time.process_time()
        record = _together(trials, beam)
        errors = test_errors(translator, find(trials[0].task), beam)
        result = {**record, "errors": errors, "test_seconds": time.process_time() - begin}
        self._write(fingerprint(record), result)
        return result

    def _trainer(self, trial: Trial, task: Task, out: Path, clock: _Clock) -> Trainer:
        def log(line: str) -> None:
            clock.keep()
            self._log(f"{trial.fingerprint} {line}")

        data = Data(task.train, f"{trial.task}, training")
        validation = None
        if task.validation:
            validation = Data(task.validation, f"{trial.task}, validation")
        if checkpoint.exists(out / training.LAST):
            return training.resume(data, validation, out=out, log=log)
        return training.start(
            data,
            validation,
            tokens=task.tokens,
            model=ModelOptions(**trial.model),
            options=trial.options(),
            out=out,
            log=log,
        )

    def _read(self, name: str) -> Result | None:
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _write(self, name: str, result: Result) -> None:
        path = self.folder / f"{name}.json"
        write_text(path, json.dumps(result, indent=1) + "\n")


def _together(trials: Sequence[Trial], beam: int) -> dict[str, object]:
    return {"ensemble": [trial.fingerprint for trial in trials], "beam": beam}


class _Clock:
    """Processor time of a training that may be interrupted, kept in a file.

    A process that is killed leaves out what it did since the end of an epoch.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = float(path.read_text()) if path.exists() else 0.0
        self._begin = time.process_time()

    def stop(self) -> float:
        """Seconds until now."""
        return self._before + time.process_time() - self._begin

    def keep(self) -> None:
        """Have a later process go on from here."""
        write_text(self._path, repr(self.stop()))

    def forget(self) -> None:
        """Remove the file: the result holds the time."""
        self._path.unlink(missing_ok=True)


def test_errors(translator: Translator, task: Task, beam: int) -> Result:
    """Error rates of a search on the test lines: of all, and of those of each source length."""
    predicted = [
        result.tokens
        for result in translator.translate([line for line, _ in task.test], beam_size=beam)
    ]
    expected = [references for _, references in task.test]
    by_length: dict[int, list[int]] = {}
    for row, pair in enumerate(task.test_pairs()):
        by_length.setdefault(len(pair.source), []).append(row)
    return {
        **error_rates(predicted, expected)._asdict(),
        "by_length": {
            str(length): error_rates(
                [predicted[row] for row in rows], [expected[row] for row in rows]
            )._asdict()
            for length, rows in sorted(by_length.items())
        },
    }


def exposure(translator: Translator, task: Task) -> Result:
    """Share of wrong tokens at each place of the test targets, reading the truth or itself.

    Of a line with several references, against the first. ``targets`` counts the tokens that are
    at each place, <stop> included.
    """
    pairs = task.test_pairs()
    examples = translator.encode(pairs, name="test")
    lengths = [len(pair.target) + 1 for pair in pairs]
    return {
        "targets": [sum(length > place for length in lengths) for place in range(max(lengths))],
        **{
            name: training.errors_by_position(
                translator.model, examples, batch_size=256, free_running=free
            )
            for name, free in (("next_step", False), ("free_running", True))
        },
    }
