# SPDX-License-Identifier: Apache-2.0
"""The operators under any number of threads: same bits, forked children, many callers."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from operator_cases import (
    DTYPES,
    AttendCase,
    Call,
    Case,
    DecodeCase,
    LinearCrossEntropyCase,
    Results,
    ScanCase,
    expected_of,
    outputs_of,
    run,
)
from tolerances import assert_close, assert_same_bits

from pyseq import functional

# Large enough to be shared out: many rows (split by batch), and few rows of a wide layer
# (split by hidden units). With one input number and no score weights outside of the loop,
# every product that torch makes before the loop has one term, hence the same bits always.
SHARED: tuple[Case, ...] = tuple(
    case
    for dtype in DTYPES
    for case in (
        ScanCase(cell="lstm", sizes=(12, 45, 1, 72), lengths="ragged", dtype=dtype),
        ScanCase(cell="gru", sizes=(12, 1, 1, 300), resets="random", dtype=dtype),
        ScanCase(cell="rnn_tanh", sizes=(12, 3, 1, 500), reverse=True, dtype=dtype),
        ScanCase(sizes=(12, 2, 1, 260), projection=100, dtype=dtype),
        ScanCase(sizes=(12, 45, 1, 72), mask=True, zoneout="steps", layer_norm=True, dtype=dtype),
        # A single input that is normalised has a gradient of nothing but rounding.
        ScanCase(sizes=(12, 2, 3, 260), lengths="ragged", layer_norm=True, dtype=dtype),
        ScanCase(
            cell="gru",
            sizes=(12, 1, 3, 300),
            resets="random",
            reset_state="one",
            layer_norm=True,
            dtype=dtype,
        ),
        AttendCase(sizes=(30, 40, 11, 60, 70, 60), need_weights=True, dtype=dtype),
        AttendCase(score="concat", project_query=False, sizes=(30, 40, 1, 60, 70, 60), dtype=dtype),
        DecodeCase(sizes=(8, 30, 21, 1, 96, 96, 80), layers=2, dtype=dtype),
        DecodeCase(
            cell="gru",
            score="concat",
            sizes=(8, 30, 2, 1, 200, 64, 80),
            lengths="ragged",
            dtype=dtype,
        ),
        LinearCrossEntropyCase(
            sizes=(700, 1200, 45), ignored="some", label_smoothing=0.1, dtype=dtype
        ),
    )
)
IDS = [case.id for case in SHARED]


@pytest.mark.parametrize("case", SHARED, ids=IDS)
def test_one_and_more_threads_give_the_same_bits(
    case: Case, set_threads: Callable[[int], None]
) -> None:
    call = case.call()
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(run(functional, call))
    first = results[0]
    for other in results[1:]:
        assert_same_bits(other.outputs, first.outputs)
        assert_same_bits(looped(call, other), looped(call, first))
        assert_close(other.gradients, first.gradients)


@pytest.mark.parametrize("case", SHARED, ids=IDS)
def test_without_gradients_they_do_too(case: Case, set_threads: Callable[[int], None]) -> None:
    """Then states take turns in memory of each team's own, and the last must come back from it."""
    call = case.call()
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        with torch.no_grad():
            results.append(outputs_of(functional, call))
    assert_close(results[0], expected_of(call).outputs)
    for other in results[1:]:
        assert_same_bits(other, results[0])


# Weights that are read where they lie, and inputs that are multiplied ahead, since no cache of a
# core holds them; and panels that ask for the next ones. Panels that are taken in pieces, by more
# tiles than fit together, and several runs of unequal length backward.
WIDE = (
    *(
        ScanCase(cell="gru", sizes=sizes)
        for sizes in ((82, 1, 40, 840), (3, 9, 40, 1184), (3, 33, 40, 1184))
    ),
    ScanCase(cell="lstm", sizes=(7, 135, 4200, 20), lengths="ragged"),
    ScanCase(cell="gru", sizes=(7, 135, 4200, 20), reverse=True),
)


@pytest.mark.parametrize("case", WIDE, ids=[case.id for case in WIDE])
def test_wide_layers(case: Case, set_threads: Callable[[int], None]) -> None:
    call = case.call()
    expected = expected_of(call)
    results = []
    for threads in (1, 2):
        set_threads(threads)
        results.append(run(functional, call))
        assert_close(results[-1].outputs, expected.outputs)
        assert_close(results[-1].gradients, expected.gradients)
    assert_same_bits(results[1].outputs, results[0].outputs)


def looped(call: Call, results: Results) -> dict[str, torch.Tensor]:
    """The gradients that come out of the operator's own loops: those of the loss all do, of
    the others that of the first state. Products of torch may split their sums by thread."""
    if call.op == "linear_cross_entropy":
        return results.gradients
    return {n: g for n, g in results.gradients.items() if n.startswith("state")}


def test_many_python_threads_at_once(set_threads: Callable[[int], None]) -> None:
    calls = [case.call() for case in SHARED]
    expected = [expected_of(call) for call in calls]
    set_threads(2)

    def work(index: int) -> Results:
        return run(functional, calls[index])

    order = [i for _ in range(4) for i in range(len(calls))]
    with ThreadPoolExecutor(max_workers=4) as pool:
        for index, actual in zip(order, pool.map(work, order), strict=True):
            assert_close(actual.outputs, expected[index].outputs)
            assert_close(actual.gradients, expected[index].gradients)


def _run_in_child(threads: int | None) -> None:
    if threads is None:
        assert torch.get_num_threads() == 1
    else:
        torch.set_num_threads(threads)
    for case in SHARED[: len(SHARED) // 2]:
        call = case.call()
        assert_close(run(functional, call).outputs, expected_of(call).outputs)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, None], ids=["set-to-one", "unset"])
def test_a_forked_child_works(threads: int | None, set_threads: Callable[[int], None]) -> None:
    """As in a worker of a data loader, which sets one thread, or in a pool of processes, which
    sets nothing: the parent's pool of threads is gone in the child."""
    set_threads(2)
    for case in SHARED:
        run(functional, case.call())
    child = multiprocessing.get_context("fork").Process(target=_run_in_child, args=(threads,))
    child.start()
    child.join(60)
    hung = child.is_alive()
    if hung:
        child.kill()
        child.join()
    assert not hung, "the child hangs"
    assert child.exitcode == 0


ROOT = Path(__file__).resolve().parent.parent

BOTH_DIRECTIONS = """
import os, signal, torch
from pyseq import nn

torch.set_num_threads(2)
layer, x = nn.LSTM(64, 64, bidirectional=True), torch.randn(50, 4, 64)
with torch.no_grad():
    expected = layer(x)[0]
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a child that waits for ever
        os._exit(0 if torch.equal(layer(x)[0], expected) else 1)
    _, status = os.waitpid(child, 0)
assert status == 0, status
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_after_nothing_but_both_directions_works() -> None:
    """A process of its own, since here loops have been shared before."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", BOTH_DIRECTIONS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
