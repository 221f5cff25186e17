# SPDX-License-Identifier: Apache-2.0
"""The operators on a CUDA device: the cases of the CPU's tests, and what only a device has,
such as streams and graphs. Skipped where there is no device or no kernels for one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_checked
import pytest
import torch
from cuda_cases import chosen
from cuda_device import IS_SHIM, float32_products, on_a_gpu, why_none
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
from tolerances import STORED, assert_close, assert_same_bits
from torch import Tensor

from pyseq import _C, cuda_plan, functional, nn, reference
from pyseq.cuda import CudaDevice
from pyseq.types import CellName

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda"
#: Which a device takes in a moment, threads of the host not.
TIMES = 2 if IS_SHIM else 200

# Without it cuBLAS may add up in another order where two streams share a workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

if reason := why_none():
    pytest.skip(reason, allow_module_level=True)


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
    "case", by_id(chosen([*scan_cases(), *attend_cases(), *decode_cases(), *attentive_cases()]))
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
    assert_close(on_cpu(actual.outputs), expected.outputs, STORED)
    assert_close(on_cpu(actual.gradients), expected.gradients, STORED)


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
    for _ in range(TIMES):
        assert_same_bits(step(), first)


@on_a_gpu
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


@on_a_gpu
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


@on_a_gpu
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
    for _ in range(TIMES):
        assert_same_bits(step(), first)
    if IS_SHIM:
        return
    for results in replayed(step):
        assert_same_bits(results, first)


@pytest.mark.filterwarnings("error")  # of streams that do not match
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_both_directions_side_by_side(cell: CellName) -> None:
    arguments = both_call(cell, (9, 6, 5, 33), lengths="ragged", resets="random")

    def gradients(module: Any, given: dict[str, Any]) -> dict[str, Tensor]:
        given = map_leaves(lambda _, t: t.requires_grad_(t.is_floating_point()), given)
        outputs = tensors_of(module.scan_both(**given))
        weights = cotangents(outputs)
        found = [(name, t) for name, t in leaves(given) if t.requires_grad]
        total = [(outputs[name] * weights[name]).sum() for name in outputs]
        made = torch.autograd.grad(total, [t for _, t in found])
        return {name: d for (name, _), d in zip(found, made, strict=True)}

    expected = gradients(reference, map_leaves(as_double, arguments))
    given = map_leaves(lambda _, t: t.to(DEVICE), arguments)

    def step() -> dict[str, Tensor]:
        return gradients(functional, map_leaves(lambda _, t: t.detach(), given))

    first = step()
    assert_close(on_cpu(first), expected)
    for _ in range(TIMES):
        assert_same_bits(step(), first)


@pytest.mark.filterwarnings("error")  # of streams that do not match
def test_layers_train_in_both_directions_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.LSTM(5, 33, num_layers=2, bidirectional=True, dropout=0.0)
    x, lengths = torch.randn(7, 3, 5), torch.tensor([7, 2, 4])
    calls = []
    scan_both = functional.scan_both
    monkeypatch.setattr(
        functional, "scan_both", lambda *a, **k: calls.append(1) or scan_both(*a, **k)
    )

    def gradients(device: str) -> list[Tensor]:
        module = layers.to(device)
        output, _ = module(x.to(device), lengths=lengths.to(device))
        return [d.cpu() for d in torch.autograd.grad(output.sum(), list(module.parameters()))]

    expected = gradients("cpu")
    assert not calls
    torch.testing.assert_close(gradients(DEVICE), expected)
    assert len(calls) == 2


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


@on_a_gpu
def test_blocks_that_are_late_meet(barrier: Path) -> None:
    subprocess.run([str(barrier)], check=True, timeout=120)


@on_a_gpu
def test_a_wedged_barrier_traps(barrier: Path) -> None:
    subprocess.run([str(barrier), "wedged"], check=True, timeout=120)


@pytest.mark.parametrize("path", ["persistent", "alternating"])
def test_what_the_checkers_watch_runs(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSEQ_CUDA_PATH", path)
    cuda_checked.main()


@on_a_gpu
@pytest.mark.parametrize("path", ["persistent", "alternating"])
@pytest.mark.parametrize("tool", ["memcheck", "synccheck"])
def test_the_checkers_of_memory_and_barriers_find_nothing(tool: str, path: str) -> None:
    checker = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if checker is None:
        pytest.skip("no compute-sanitizer")
    # Each tensor has memory of its own then, of which the checker knows where it ends.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYSEQ_CUDA_PATH": path}
    paths = os.pathsep.join([str(ROOT), *sys.path])
    command = [
        checker,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        cuda_checked.__file__,
    ]
    subprocess.run(command, check=True, timeout=600, env=os.environ | alone | {"PYTHONPATH": paths})


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


@pytest.mark.parametrize("products", ["ieee", "tf32"])
def test_a_scan_goes_the_way_that_is_planned(
    products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, batch, steps = 256, 96, 3
    x = torch.randn(steps, batch, 1, device=DEVICE)
    weights = [torch.randn(hidden, size, device=DEVICE) / 16 for size in (1, hidden)]

    def products_of(path: str) -> int:
        monkeypatch.setenv("PYSEQ_CUDA_PATH", path)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            functional.scan(x, *weights, cell="rnn_tanh")
        return sum(event.name == "aten::mm" for event in seen.events())

    with float32_products(products):
        plan = cuda_plan(
            device=CudaDevice(**_C.cuda_device()),
            cell="rnn_tanh",
            hidden_size=hidden,
            batch_size=batch,
            steps=steps,
        )
        counts = {path: products_of(path) for path in ("persistent", "alternating")}
        assert counts["alternating"] >= counts["persistent"] + steps
        assert products_of("auto") == counts[plan.path]
    if IS_SHIM:  # of so few multiprocessors that what a library may do makes the difference
        assert plan.path == ("alternating" if products == "tf32" else "persistent")
