# SPDX-License-Identifier: Apache-2.0
"""Many callers at once: Python threads, data-loader workers, processes that share gradients."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pyseq import _C, functional, nn

ROOT = Path(__file__).resolve().parent.parent
#: How long to wait for what must not hang, in seconds.
PATIENCE = 120


def layer(seed: int = 0) -> nn.LSTM:
    torch.manual_seed(seed)
    return nn.LSTM(6, 16, num_layers=2, bidirectional=True)


class Encoded(Dataset[Tensor]):
    """Rows that a recurrent layer makes in the worker, one at a time."""

    def __init__(self, size: int) -> None:
        self.layer = layer()
        self.rows = torch.randn(size, 9, 1, 6)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.layer(self.rows[index])[0]
        return output


class Trained(IterableDataset[Tensor]):
    """The gradients that a worker computes, backward included."""

    def __iter__(self) -> Iterator[Tensor]:
        module = layer()
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            x = torch.randn(9, 4, 6, generator=generator)
            module.zero_grad()
            module(x)[0].square().sum().backward()
            assert module.weight_hh_l0.grad is not None
            yield module.weight_hh_l0.grad.clone()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
def test_data_loader_workers_run_the_layers(
    threads: int, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    data = Encoded(6)
    expected = [data[index] for index in range(6)]  # which starts the threads of the parent
    loader = DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=PATIENCE
    )
    for actual, row in zip(loader, expected, strict=True):
        assert torch.equal(actual, row)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_data_loader_workers_run_backward(set_threads: Callable[[int], None]) -> None:
    set_threads(2)
    expected = list(Trained())
    # Backward on the CPU runs in the thread that calls it, so that a fork may follow one.
    loader = DataLoader(
        Trained(),
        batch_size=None,
        num_workers=1,
        multiprocessing_context="fork",
        timeout=PATIENCE,
    )
    for actual, gradient in zip(loader, expected, strict=True):
        torch.testing.assert_close(actual, gradient)


def train(module: nn.LSTM, seed: int) -> Tensor:
    """Three steps of gradient descent; the weights that come out."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        module.zero_grad()
        module(torch.randn(9, 4, 6, generator=generator))[0].square().sum().backward()
        with torch.no_grad():
            for weight in module.parameters():
                assert weight.grad is not None
                weight -= 0.01 * weight.grad
    return torch.cat([weight.detach().flatten() for weight in module.parameters()])


def test_threads_train_models_of_their_own(set_threads: Callable[[int], None]) -> None:
    set_threads(2)
    expected = [train(layer(seed), seed) for seed in range(4)]
    modules = [layer(seed) for seed in range(4)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        for actual, weights in zip(pool.map(train, modules, range(4)), expected, strict=True):
            torch.testing.assert_close(actual, weights)


def test_threads_share_a_model_for_inference(set_threads: Callable[[int], None]) -> None:
    set_threads(2)
    module = layer()
    rows = [torch.randn(9, batch, 6) for batch in (1, 2, 5, 17)] * 3

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():  # of this thread alone
            output: Tensor = module(x)[0]
        return output

    expected = [run(x) for x in rows]
    with ThreadPoolExecutor(max_workers=4) as pool:
        for actual, output in zip(pool.map(run, rows), expected, strict=True):
            assert torch.equal(actual, output)


def test_threads_differentiate_twice() -> None:
    def penalty(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(5, 2, 6, generator=generator).requires_grad_()
        w_ih, w_hh = (torch.randn(12, n, generator=generator) for n in (6, 4))
        output = functional.scan(x, w_ih, w_hh, cell="gru").output
        (d_x,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(d_x.square().sum(), x)
        return second

    expected = [penalty(seed) for seed in range(8)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        for actual, second in zip(pool.map(penalty, range(8)), expected, strict=True):
            torch.testing.assert_close(actual, second)


@pytest.fixture
def patient_threads() -> Iterator[None]:
    """Python takes the interpreter from no thread that does not give it away."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(PATIENCE)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("through", ["torch.ops", "_C", "backward"])
def test_other_threads_go_on_during_a_call(through: str, patient_threads: None) -> None:
    ticks, done = [0], threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks[0] += 1

    x = torch.randn(600, 16, 64)
    w_ih, w_hh = torch.randn(1024, 64), torch.randn(1024, 256, requires_grad=through == "backward")
    arguments = (x, w_ih, w_hh, *[None] * 7, "lstm", False, 1)
    total = torch.ops.pyseq.scan(*arguments)[0].sum()
    hidden, weight, target = torch.randn(1000, 256), torch.randn(8000, 256), torch.arange(1000)
    call: dict[str, Callable[[], object]] = {
        "torch.ops": lambda: torch.ops.pyseq.scan(*arguments),
        "_C": lambda: _C.linear_cross_entropy(hidden, weight, target, None, -100, 0.0),
        "backward": lambda: total.backward(),
    }
    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        before = ticks[0]
        call[through]()
        after = ticks[0]
    finally:
        done.set()
        ticker.join()
    assert after > before


SHARE = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from pyseq import nn

dist.init_process_group("gloo")
rank, count = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 6), nn.LSTM(6, 16, num_layers=2, bidirectional=True))
x, y = torch.randn(9, 8, 6), torch.randn(9, 8, 32)


def loss_of(module, rows):
    return (module(x[:, rows])[0] - y[:, rows]).square().mean()


loss_of(model, slice(None)).backward()
expected = [weight.grad.clone() for weight in model.parameters()]
model.zero_grad()
shared = DistributedDataParallel(model)
for _ in range(3):
    shared.zero_grad()
    loss_of(shared, slice(rank, None, count)).backward()
for weight, gradient in zip(model.parameters(), expected):
    torch.testing.assert_close(weight.grad, gradient)
print(f"process {rank} of {count} agrees")
dist.destroy_process_group()
"""


def _why_no_processes() -> str | None:
    """Why processes cannot talk to one another here, if so."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        return "torch is built without gloo"
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
    except OSError as error:
        return f"no sockets on this machine: {error}"
    return None


@pytest.mark.skipif(_why_no_processes() is not None, reason=str(_why_no_processes()))
def test_two_processes_share_their_gradients(tmp_path: Path) -> None:
    script = tmp_path / "share.py"
    script.write_text(SHARE, encoding="utf-8")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [*command, str(script)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert finished.returncode == 0, finished.stderr
    for rank in range(2):
        assert f"process {rank} of 2 agrees" in finished.stdout
