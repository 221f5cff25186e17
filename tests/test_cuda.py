# SPDX-License-Identifier: Apache-2.0
"""The operators on a CUDA device: the cases of the CPU's tests, and what only a device has,
such as streams and graphs. Skipped where there is no device or no kernels for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_cases import (
    AttendCase,
    Call,
    Case,
    DecodeCase,
    ScanCase,
    attend_cases,
    attentive_cases,
    changed,
    decode_cases,
    expected_of,
    op_of,
    outputs_of,
    run,
    scan_cases,
)
from tolerances import assert_close, assert_same_bits
from torch import Tensor

from pyseq import _C, functional

DEVICE = "cuda"

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if _C.build_info()["cuda"] == "none":
    pytest.skip("pyseq is built without CUDA kernels", allow_module_level=True)


def by_id(cases: list[Any]) -> list[Any]:
    return [pytest.param(case, id=f"{op_of(case)}-cuda-{case.id}") for case in cases]


#: One call of each operator with everything in it, large enough for several blocks and groups.
FULL: tuple[Case, ...] = (
    ScanCase(projection=4, lengths="holes", resets="random"),
    ScanCase(cell="gru", lengths="ragged", reverse=True),
    AttendCase(score="concat", sizes=(9, 33, 7, 40, 48, 24), lengths="ragged"),
    AttendCase(score="general", sizes=(9, 33, 7, 40, 48, 24), window=3, lengths="ragged"),
    DecodeCase(score="concat", lengths="ragged"),
    DecodeCase(score="dot", cell="gru"),
)


def on_device(call: Call) -> Call:
    return changed(call, lambda _, tensor: tensor.to(DEVICE))


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "case", by_id([*scan_cases(), *attend_cases(), *decode_cases(), *attentive_cases()])
)
def test_values_and_gradients(case: Case) -> None:
    call = case.call()
    expected = expected_of(call)
    actual = run(functional, on_device(call))
    assert_close(on_cpu(actual.outputs), expected.outputs)
    assert_close(on_cpu(actual.gradients), expected.gradients)


@pytest.mark.parametrize("case", by_id(list(FULL)))
def test_same_bits_two_hundred_times(case: Case) -> None:
    call = on_device(case.call())
    first = run(functional, call)
    for _ in range(200):
        again = run(functional, call)
        assert_same_bits(again.outputs, first.outputs)
        assert_same_bits(again.gradients, first.gradients)


@pytest.mark.parametrize("case", by_id(list(FULL)))
def test_two_streams_do_not_meet(case: Case) -> None:
    call = on_device(case.call())
    expected = run(functional, call)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(run(functional, call))
    torch.cuda.synchronize()
    for result in results:
        assert_same_bits(result.outputs, expected.outputs)
        assert_same_bits(result.gradients, expected.gradients)


@pytest.mark.parametrize("case", by_id(list(FULL)))
def test_a_captured_graph_gives_the_same(case: Case) -> None:
    call = on_device(case.call())
    with torch.no_grad():
        expected = {name: out.clone() for name, out in outputs_of(functional, call).items()}
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            outputs_of(functional, call)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = outputs_of(functional, call)
        for _ in range(3):
            for out in outputs.values():
                out.fill_(torch.nan)
            graph.replay()
            assert_same_bits(outputs, expected)


def test_nothing_waits_for_the_device() -> None:
    call = on_device(DecodeCase(score="concat").call())
    run(functional, call)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(functional, call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tensors_of_another_device_are_refused() -> None:
    call = on_device(AttendCase().call())
    mixed = changed(call, lambda name, tensor: tensor.cpu() if name == "memory" else tensor)
    with pytest.raises(RuntimeError, match="must be on the device of the other tensors, cuda:0"):
        outputs_of(functional, mixed)


@pytest.mark.parametrize("path", ["persistent", "alternating"])
@pytest.mark.parametrize("case", by_id([case for case in FULL if op_of(case) != "attend"]))
def test_both_paths(case: Case, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSEQ_CUDA_PATH", path)
    call = case.call()
    expected = expected_of(call)
    actual = run(functional, on_device(call))
    assert_close(on_cpu(actual.outputs), expected.outputs)
    assert_close(on_cpu(actual.gradients), expected.gradients)
