# SPDX-License-Identifier: Apache-2.0
"""The benchmark of CUDA devices, as far as it goes without one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cuda_device import IS_SHIM
from torch import Tensor

import pyseq
from benchmarks import cuda, cuda_targets
from benchmarks.cuda import Case, Failed, Layer, Results, Row, Timing

ROOT = Path(__file__).resolve().parent.parent
LAYER = Row(
    ("lstm", "float16", "256", "16"), Timing(2.0, 5.0), (Timing(3.0, 10.0),), 0.5, "persistent"
)
DECODER = Row(
    ("decode", "float32", "512", "32"), Timing(10.0, 30.0), (None, None), 4.0, "alternating"
)


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device that torch sees; there is none"):
        cuda.main([])


def test_the_page_gives_times_and_ratios() -> None:
    results = Results([LAYER], [DECODER], [], ["FlashRNN: not installed"])
    page = cuda.document(results, "Some device", tests="7 passed", left=0)
    assert page.startswith("# Benchmarks on a CUDA device\n\nSome device, torch ")
    assert "Tests on the device: 7 passed." in page
    expected = (
        "| lstm | float16 | 256 | 16 | persistent | 2.00 | 5.00 | 25 | 3.00 | 1.50 | 10.00 | 2.00 |"
    )
    assert expected in page.splitlines()
    assert page.endswith("\n- FlashRNN: not installed\n")
    assert "The time ran out before 9 more cases" in cuda.document(
        results, "Some device", tests="7 passed", left=9
    )


def test_the_page_tells_what_the_targets_came_to() -> None:
    def layer(own: Timing, rival: Timing, *case: str) -> Row:
        return Row(case, own, (rival,), 0.5, "persistent")

    layers = [
        LAYER,
        layer(Timing(2.0, 5.0), Timing(1.5, 5.0), "lstm", "float16", "1024", "32"),
        # These are not on the persistent path.
        layer(Timing(2.0, 8.0), Timing(8.0, 16.0), "lstm, ragged", "float16", "512", "32"),
        layer(Timing(2.0, 4.0), Timing(6.0, 16.0), "lstm", "bfloat16", "768", "16"),
        # No target is about these sizes.
        layer(Timing(9.0, 90.0), Timing(1.0, 1.0), "lstm", "float16", "2048", "16"),
    ]
    decoder = DECODER._replace(rivals=(Timing(100.0, 660.0), None))
    made = list(cuda_targets.table(Results(layers, [decoder], [], [])))[2:]
    assert [[cell.strip() for cell in line.split("|")[2:6]] for line in made] == [
        ["at least 0.8", "1 of 2", "0.75", "lstm, float16, H = 1024, B = 32"],
        ["at least 0.8", "2 of 2", "1.00", "lstm, float16, H = 1024, B = 32"],
        ["at least 3", "2 of 2", "3.00", "lstm, bfloat16, H = 768, B = 16"],
        ["at least 3", "1 of 2", "2.00", "lstm, ragged, float16, H = 512, B = 32"],
        ["at most 2.4", "1 of 1", "2.00", "lstm, bfloat16, H = 768, B = 16"],
        ["at least 20", "1 of 1", "22.00", "decode, float32, H = 512, B = 32"],
        ["at least 4", "not measured", "", ""],
        ["at most 2.2", "3 of 4", "3.00", "lstm, ragged, float16, H = 512, B = 32"],
    ]
    assert set(made) < set(
        cuda.document(Results(layers, [decoder], [], []), "", tests="", left=0).splitlines()
    )


def test_every_size_and_precision_is_a_case_once() -> None:
    cases = cuda.layer_cases()
    assert len(set(cases)) == len(cases)
    for cell in ("lstm", "gru"):
        for hidden in (128, 256, 512, 768, 1024, 2048):
            for batch in (1, 16, 32, 64, 128):
                assert {
                    case.precision
                    for case in cases
                    if case[:3] == (cell, hidden, batch) and not case.bidirectional
                } >= {"float16", "bfloat16", "float32", "tf32"}
    # What the targets name is not what a short run leaves out.
    first = cases[:40]
    assert Layer("lstm", 512, 32, "float16") in first
    assert Layer("lstm", 512, 32, "bfloat16", bidirectional=True) in first
    assert Layer("lstm", 512, 31, "float32") in first


def test_a_case_that_fails_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    results, saved = Results([], [], [], []), []

    def fails() -> Row:
        raise Failed("the results differ by 0.3")

    cases = [
        Case("one", fails, results.layers),
        Case("two", lambda: LAYER, results.layers),
        Case("three", fails, results.layers),
        Case("four", lambda: LAYER, results.layers),
    ]
    monkeypatch.setattr(cuda, "device_is_lost", lambda: len(saved) == 2)
    cuda.measure(cases, results, time.monotonic() + 60, saved.append)
    assert results.layers == [LAYER]
    assert results.failures[:2] == [
        "one: the results differ by 0.3",
        "three: " + str(Failed("the results differ by 0.3")),
    ]
    assert "the device was lost" in results.failures[2]
    assert saved == [3, 2, 1]  # after each case, with what is left
    results = Results([], [], [], [])
    cuda.measure(cases, results, time.monotonic() - 1, saved.append)
    assert results == Results([], [], [], [])


@pytest.mark.skipif(not IS_SHIM, reason="on a device the benchmark itself runs")
def test_what_is_measured_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Everything but the times, on the device of threads; in torch's place stands pyseq."""
    for name, value in (
        ("is_available", lambda: True),
        ("device", lambda device: contextlib.nullcontext()),
        ("synchronize", lambda: None),
        ("get_device_name", lambda: "threads"),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor.to("cuda"))
    monkeypatch.setattr(torch.nn, "LSTM", pyseq.nn.LSTM)
    monkeypatch.setattr(torch.nn, "GRU", pyseq.nn.GRU)

    def once(call: Callable[[], Tensor], steps: int) -> Timing:
        with torch.no_grad():
            call()
        call().sum().backward()
        return Timing(1.0, 2.0)

    def no_graphs(call: Callable[[], Tensor], steps: int) -> Timing:
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(cuda, "timing", once)
    monkeypatch.setattr(cuda, "graphed", no_graphs)
    for name in ("STEPS", "DECODER_STEPS", "DECODER_SOURCE"):
        monkeypatch.setattr(cuda, name, 5)
    monkeypatch.setattr(cuda, "DECODER_HIDDEN", (8,))
    cases = [
        Layer("lstm", 8, 3, "float32"),
        Layer("gru", 8, 2, "tf32"),
        Layer("lstm", 8, 4, "float32", ragged=True),
        Layer("lstm", 8, 3, "bfloat16", bidirectional=True),
        Layer("gru", 8, 5, "float16", ragged=True),
    ]
    monkeypatch.setattr(cuda, "layer_cases", lambda: cases)
    page = tmp_path / "page.md"
    cuda.main(["--output", str(page)])
    written = page.read_text()
    assert written.endswith("Not measured:\n\n- FlashRNN: not installed\n")
    assert len([line for line in written.splitlines() if line[:5] in ("| lst", "| gru")]) == 5
    assert "| decode | float32 | 8 | 32 | persistent | 1.00 | 2.00 |" in written


def test_the_script_needs_a_torch_that_sees_a_device(tmp_path: Path) -> None:
    blind = tmp_path / "python"
    blind.write_text("#!/bin/sh\nexit 1\n")
    blind.chmod(0o755)
    found = subprocess.run(
        [str(ROOT / ".ci" / "bench-cuda")],
        env=os.environ | {"PYTHON": str(blind), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 1
    assert "no Python here has a torch that sees a CUDA device" in found.stderr
