# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks count and conclude. The cases themselves check their results when they run;
here the cheapest of each kind does, once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import document, files, floors, layers, models, onnx_rival, report
from benchmarks.machine import Level, Machine, environment, measure_machine
from benchmarks.measure import Measurement, check, measure, with_saved_bytes
from benchmarks.targets import TARGETS, Target, by_batch, outcomes
from benchmarks.workloads import ImplementationName, Workload, cases

WORKLOADS = {workload.name: workload for workload in (*layers.workloads(), *models.workloads())}

#: A machine of round numbers: 10 operations a nanosecond; 8, 4, 2 bytes.
MACHINE = Machine(
    2, 1e10, (Level("L1", 100, 50, 8e9), Level("L2", 1000, 500, 4e9), Level("L3", 9000, 4500, 2e9))
)


def measured(workload: Workload, **rivals: float) -> Measurement:
    """One microsecond for pyseq, so many for each rival, by default two."""
    times = {name: [rivals.get(name, 2.0) * 1e-6] * 2 for name in workload.implementations}
    times["pyseq"] = [1e-6] * 2
    return Measurement(
        op=workload.op,
        kind=workload.kind,
        shape=workload.shape,
        mode=workload.mode,
        threads=2,
        tokens=workload.tokens,
        operations=1000,
        reading=2e-7,
        peaks=[2e9, 2e9],
        times=times,
        saved=dict.fromkeys(times, 8) if workload.mode == "training" else {},
    )


@pytest.mark.parametrize(
    "name",
    [
        "scan-inference-gru-B16-H64-T50",
        "scan-training-lstm-B1-H64-T50",
        "bidirectional-inference-rnn-L2-B1-H256-T50",
        "ragged-inference-lstm-B16-H256-T50",
        "stream-inference-lstm-B1-H64-50x1",
        "attend-training-dot-B16-A256-T50-S50",
        "decode-training-lstm-general-B1-H64-T20-S20",
        "generate-inference-greedy-B1-H64-T20-S20-V50",
        "generate-inference-beam5-B1-H64-T20-S20-V50",
    ],
)
def test_implementations_agree_and_are_timed(name: str) -> None:
    leave_out = ["compiled", *([] if onnx_rival.installed() else ["onnx"])]
    result = measure(WORKLOADS[name], MACHINE, seconds=0, rounds=2, leave_out=leave_out)
    assert result.name == name
    assert {len(values) for values in result.times.values()} == {2}
    assert result.rivals == [n for n in WORKLOADS[name].implementations[1:] if n not in leave_out]
    assert all(0 < seconds < 60 for seconds in result.medians.values())
    if result.mode == "training":
        assert all(size > 0 for size in result.saved.values())


def test_names_are_unique() -> None:
    listed = [workload.name for workload in (*layers.workloads(), *models.workloads())]
    assert len(set(listed)) == len(listed)
    compiled = WORKLOADS["scan-training-gru-B16-H256-T50"]
    assert "compiled" in compiled.implementations
    assert cases([compiled]) == [(compiled, name) for name in ("pyseq", "torch", "reference")]


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "name",
    [
        *(f"scan-inference-{cell}-B16-H64-T50" for cell in layers.CELLS),
        "bidirectional-inference-rnn-L2-B1-H256-T50",
        "decode-inference-lstm-general-B16-H64-T20-S20",
    ],
)
def test_operations_are_those_of_the_reference(name: str) -> None:
    workload = WORKLOADS[name]
    assert workload.cost.operations == flops(workload.prepare()["reference"])


def test_operations_of_a_training_step_are_those_of_the_reference() -> None:
    workload = WORKLOADS["seq2seq-training-lstm-general-B32-H256-T20-S20-V10000"]
    # Nobody asks for the gradient of the encoder's first state: one product the less.
    expected = flops(workload.prepare()["reference"])
    assert workload.cost.operations == pytest.approx(expected, rel=1e-3)


def test_operations_of_ragged_rows_leave_padding_out() -> None:
    ragged = WORKLOADS["ragged-inference-gru-B16-H256-T50"]
    full = WORKLOADS["scan-inference-gru-B16-H256-T50"]
    assert ragged.cost.operations * full.tokens == full.cost.operations * ragged.tokens
    assert ragged.tokens < full.tokens


def test_reading_is_as_fast_as_the_cache_that_holds_it() -> None:
    assert floors.product(10, 20, 50).reading(MACHINE) == 0
    # Two threads have 2 times 100 bytes of L1 and 2 times 1000 of L2.
    for size, bandwidth in ((200, 8e9), (201, 4e9), (2000, 4e9), (2001, 2e9), (10**6, 2e9)):
        cost = floors.Cost(10, (floors.Loop(3, size),))
        assert cost.reading(MACHINE) == pytest.approx(3 * size / bandwidth)


def test_efficiency_is_of_the_larger_of_arithmetic_and_reading() -> None:
    computing = measured(WORKLOADS["scan-inference-rnn-B1-H64-T50"])
    assert computing.efficiency == pytest.approx(0.5)  # 1000 operations at 2 a nanosecond
    assert not computing.bound_by_reading
    reading = dataclasses.replace(computing, reading=8e-7)
    assert reading.efficiency == pytest.approx(0.8)
    assert reading.bound_by_reading


def test_training_computes_thrice_and_reads_twice() -> None:
    cost = floors.scan("gru", tokens=10, steps=5, inputs=3, hidden=4)
    assert cost.loops == (floors.Loop(5, 4 * 3 * 4 * 4),)
    assert cost.of("inference") == cost
    assert cost.of("training").operations == 3 * cost.operations
    assert cost.of("training").loops == (floors.Loop(10, 4 * 3 * 4 * 4),)
    assert (cost + cost).loops == cost.loops * 2


def test_machine_has_three_levels_and_positive_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.machine.ATTEMPTS", 1)
    monkeypatch.setattr("benchmarks.machine.ROUNDS", 1000)
    monkeypatch.setattr("benchmarks.machine.READ", 1)
    machine = measure_machine(2)
    assert machine.threads == 2
    assert [level.name for level in machine.levels] == ["L1", "L2", "L3"]
    assert min(machine.peak, *(level.bandwidth for level in machine.levels)) > 0
    assert environment()["dtype"] == "float32"


@pytest.mark.parametrize("wrong", [1.001, float("nan"), float("inf")])
def test_check_refuses_another_result(wrong: float) -> None:
    expected = {"y": torch.ones(3)}
    check({"y": torch.tensor([1.0, 1.0, 1.00005])}, expected, "torch")
    with pytest.raises(AssertionError, match="torch y: error"):
        check({"y": torch.tensor([1.0, wrong, 1.0])}, expected, "torch")
    with pytest.raises(AssertionError, match="onnx y: "):
        check({"y": torch.ones(2)}, expected, "onnx")
    with pytest.raises(AssertionError, match="pyseq: "):
        check({"z": torch.ones(3)}, expected, "pyseq")


def test_saved_bytes_count_each_memory_once_and_no_leaf() -> None:
    leaf = torch.randn(10, requires_grad=True)

    def run() -> Mapping[str, Tensor]:
        y = leaf.exp()  # saves y
        z = y[:5].sin() * y[5:].cos()  # saves views of y, and both factors
        (gradient,) = torch.autograd.grad(z.sum(), leaf)
        return {"gradient": gradient}

    result, size = with_saved_bytes(run)
    assert result.keys() == {"gradient"}
    assert size == 4 * (10 + 5 + 5)
    assert with_saved_bytes(lambda: {"y": (leaf * leaf).detach()})[1] == 0


def test_rounds_of_several_passes_are_joined() -> None:
    first = measured(WORKLOADS["scan-inference-rnn-B1-H64-T50"], onnx=4.0)
    times: dict[ImplementationName, list[float]] = {"pyseq": [3e-6] * 3, "torch": [2e-6]}
    joined = first.with_more(dataclasses.replace(first, times=times, peaks=[5e9] * 3))
    assert joined.peak == 5e9
    assert joined.medians["pyseq"] == 3e-6
    assert joined.times["onnx"] == first.times["onnx"]
    assert joined.ratio("torch") == pytest.approx(2 / 3)
    assert first.medians["pyseq"] == 1e-6


def test_every_target_has_cells() -> None:
    found = outcomes([measured(workload) for workload in WORKLOADS.values()], TARGETS)
    assert [outcome.target for outcome in found] == list(TARGETS)
    cells = {(o.target.title, o.target.rival): o.cells for o in found}
    assert cells["scan training gru", "torch.nn"] == 15
    assert cells["scan inference lstm", "ONNX Runtime"] == 15
    assert cells["decode training", "reference"] == 8
    assert cells["decode training", "torch.compile"] == len(layers.COMPILED_DECODES)
    assert outcomes([], TARGETS) == []


@pytest.mark.parametrize(
    ("mean", "lowest", "reached"),
    [
        (4.0, 2.0, True),
        (4.01, 2.0, False),
        (4.0, 2.01, False),
        (None, 2.0, True),
        (4.0, None, True),
    ],
)
def test_outcome_is_the_geometric_mean_and_the_lowest_cell(
    mean: float | None, lowest: float | None, reached: bool
) -> None:
    target = Target("t", "torch", lambda m: m.medians.get("torch"), mean, lowest)
    workload = WORKLOADS["scan-inference-rnn-B1-H64-T50"]
    base = measured(workload)
    cells = [
        dataclasses.replace(base, shape=shape, times={"pyseq": [1.0], "torch": [value]})
        for shape, value in (("a", 8.0), ("b", 2.0))
    ]
    missing = dataclasses.replace(base, times={"pyseq": [1.0]})
    (outcome,) = outcomes([*cells, missing], [target])
    assert (outcome.cells, outcome.lowest, outcome.worst) == (2, 2.0, "rnn b")
    assert outcome.mean == pytest.approx(4.0)
    assert outcome.reached is reached
    assert outcome.possible is None
    (outcome,) = outcomes(cells, [dataclasses.replace(target, of_times=True)])
    # 1000 operations at 2 a nanosecond, and pyseq took a second.
    assert outcome.possible == pytest.approx(4.0 / 5e-7)


def test_a_missed_mean_is_told_by_batch_size() -> None:
    target = Target("t", "torch", lambda m: m.medians.get("torch"), 3.0, of_times=True)
    names = [f"scan-inference-lstm-B{batch}-H{size}-T50" for batch in (1, 16) for size in (64, 256)]
    base = [measured(WORKLOADS[name]) for name in names]
    cells = [
        dataclasses.replace(cell, times={"pyseq": [1.0], "torch": [value]})
        for cell, value in zip(base, (8.0, 2.0, 1.0, 1.0), strict=True)
    ]
    parts = by_batch(cells, target)
    assert {batch: (part.cells, part.mean) for batch, part in parts.items()} == {
        "B1": (2, pytest.approx(4.0)),
        "B16": (2, 1.0),
    }
    missed = document.missed_table(cells, outcomes(cells, [target]))
    assert missed is not None
    assert [line.split("|")[2].strip() for line in missed.splitlines()[2:]] == ["B1", "B16"]
    assert document.missed_table(cells[:2], outcomes(cells[:2], [target])) is None


def test_document_marks_and_lists_what_is_slower(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = ["scan-inference-lstm-B1-H64-T50", "scan-inference-lstm-B16-H64-T50"]
    slow = measured(WORKLOADS[names[0]], torch=0.5)
    fast = measured(WORKLOADS[names[1]])
    training = measured(WORKLOADS["decode-training-lstm-general-B1-H64-T20-S20"])
    runs = [(MACHINE, [slow, fast, training])]
    document.write(runs, {"tier": "plain", "dtype": "float32"}, "make bench", tmp_path)
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert "- 2 threads, scan inference lstm B1-H64-T50: torch is 2.00 times as fast" in text
    assert re.findall(r"\*\*(\d.\d\d)\*\*", text) == ["0.50"]
    assert "| decode bytes saved, reference " in text
    assert "**miss**" in text
    assert '"threads": 2' in (tmp_path / "benchmarks.json").read_text(encoding="utf-8")
    assert (tmp_path / "speed.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_what_was_written_before_stays_until_the_new_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "page.md"
    files.write_text(path, "old")

    def interrupted() -> None:
        with files.replaced(path) as fresh:
            fresh.write_text("ne", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text(encoding="utf-8") == "old"
    files.write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "("], r"--only must be a regular expression, got '\('"),
        (["--only", "no such"], "no workload's name holds 'no such'"),
        (["--threads", "2,x"], "--threads must be numbers separated by commas, got '2,x'"),
        (["--threads", "0"], "--threads must be at least 1, got '0'"),
        (["--passes", "0"], "--passes must be at least 1, got 0"),
        (["--seconds", "0"], "--seconds must be a positive number, got 0.0"),
        (["--seconds", "nan"], "--seconds must be a positive number, got nan"),
        (["--output", __file__], "--output must be a folder to write in, got .*test_benchmarks"),
    ],
    ids=["pattern", "nothing", "threads", "no-thread", "passes", "seconds", "nan", "output"],
)
def test_wrong_options_end_before_anything_is_measured(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        report.main(arguments)
    assert re.search(message, capsys.readouterr().err)
