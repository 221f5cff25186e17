# SPDX-License-Identifier: Apache-2.0
"""The operators on a CUDA device: the cases of the CPU's tests, and what only a device has,
such as streams and graphs. Skipped where there is no device or no kernels for one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from operator_cases import (
    CELLS,
    AttendCase,
    Call,
    Case,
    DecodeCase,
    ScanCase,
    attend_cases,
    attentive_cases,
    changed,
    cotangents,
    decode_cases,
    expected_of,
    leaves,
    map_leaves,
    op_of,
    outputs_of,
    run,
    scan_cases,
    tracked,
)
from test_scan_both import both_call, tensors_of
from tolerances import assert_close, assert_same_bits
from torch import Tensor

from pyseq import _C, functional, reference
from pyseq.types import CellName

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda"

# Without it cuBLAS may add up in another order where two streams share a workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

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


def as_double(_: str, tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("case", by_id(list(FULL)))
def test_short_dtypes(case: Case, dtype: torch.dtype) -> None:
    call = changed(case.call(), lambda _, t: t.to(dtype) if t.is_floating_point() else t)
    expected = expected_of(call)
    actual = run(functional, on_device(call))
    assert_close(on_cpu(actual.outputs), expected.outputs)
    assert_close(on_cpu(actual.gradients), expected.gradients)


def training_step(call: Call) -> Callable[[], dict[str, Tensor]]:
    """The call with its gradients, which needs nothing of the host once it has begun."""
    call = tracked(on_device(call))
    weights = cotangents(outputs_of(functional, call))
    asked = {name: tensor for name, tensor in leaves(call.inputs) if tensor.requires_grad}

    def step() -> dict[str, Tensor]:
        outputs = outputs_of(functional, call)
        gradients = torch.autograd.grad(
            list(outputs.values()),
            list(asked.values()),
            [weights[name] for name in outputs],
            materialize_grads=True,
        )
        named = {f"d_{name}": d for name, d in zip(asked, gradients, strict=True)}
        return {name: out.detach() for name, out in outputs.items()} | named

    return step


@pytest.mark.parametrize("case", by_id(list(FULL)))
def test_same_bits_two_hundred_times(case: Case) -> None:
    step = training_step(case.call())
    first = step()
    for _ in range(200):
        assert_same_bits(step(), first)


@pytest.mark.parametrize("case", by_id(list(FULL)))
def test_two_streams_do_not_meet(case: Case) -> None:
    step = training_step(case.call())
    expected = step()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(step())
    torch.cuda.synchronize()
    for result in results:
        assert_same_bits(result, expected)


def replayed(step: Callable[[], dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """What three replays of a graph of ``step`` give, over results that were spoilt."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # loads the kernels, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for _ in range(3):
        for result in results.values():
            result.fill_(torch.nan)
        graph.replay()
        yield results


@pytest.mark.parametrize("path", ["persistent", "alternating"])
@pytest.mark.parametrize("case", by_id(list(FULL)))
def test_a_captured_graph_gives_the_same(
    case: Case, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSEQ_CUDA_PATH", path)
    step = training_step(case.call())
    expected = step()
    for results in replayed(step):
        assert_same_bits(results, expected)


@pytest.mark.parametrize("path", ["persistent", "alternating"])
@pytest.mark.parametrize("case", by_id(list(FULL)))
def test_nothing_waits_for_the_device(
    case: Case, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSEQ_CUDA_PATH", path)
    step = training_step(case.call())
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("multiprocessors", [1, 3, 20])
@pytest.mark.parametrize("case", by_id(list(FULL)))
def test_fewer_multiprocessors(
    case: Case, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSEQ_CUDA_MULTIPROCESSORS", str(multiprocessors))
    call = case.call()
    expected = expected_of(call)
    actual = run(functional, on_device(call))
    assert_close(on_cpu(actual.outputs), expected.outputs)
    assert_close(on_cpu(actual.gradients), expected.gradients)


@pytest.mark.parametrize("cell", CELLS)
def test_both_directions_run_side_by_side(cell: CellName) -> None:
    arguments = both_call(cell, (9, 6, 5, 33), lengths="ragged", resets="random")
    expected = tensors_of(reference.scan_both(**map_leaves(as_double, arguments)))
    given = map_leaves(lambda _, t: t.to(DEVICE), arguments)

    def step() -> dict[str, Tensor]:
        with torch.no_grad():
            return tensors_of(functional.scan_both(**given))

    first = step()
    assert_close(on_cpu(first), expected)
    for _ in range(200):
        assert_same_bits(step(), first)
    for results in replayed(step):
        assert_same_bits(results, first)


@pytest.fixture(scope="module")
def barrier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that tries the group barrier, with delays, on the device."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc")
    program = tmp_path_factory.mktemp("barrier") / "barrier"
    source = ROOT / "tests" / "cuda" / "barrier_on_device.cu"
    command = [nvcc, "-std=c++20", "-O3", "-arch=native", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    return program


def test_blocks_that_are_late_meet(barrier: Path) -> None:
    subprocess.run([str(barrier)], check=True, timeout=120)


def test_a_wedged_barrier_traps(barrier: Path) -> None:
    subprocess.run([str(barrier), "wedged"], check=True, timeout=120)


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
