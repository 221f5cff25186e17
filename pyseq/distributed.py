# SPDX-License-Identifier: Apache-2.0
"""Training by several processes, each of which computes some rows of every batch.

The process group is torch's own, as ``torchrun`` describes it; used by the trainer and the
command line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .errors import TrainingError
from .labels import LabelBatch
from .text import Batch

AnyBatch = Batch | LabelBatch


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is; all of them make the same calls in the same order."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"  # where what is exchanged must be

    @classmethod
    def of_group(cls, device: torch.device) -> Processes:
        """The processes of torch's default group, or this one alone if there is no group."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), str(device))

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and speaks to the user."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sums over all processes, in float64."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def max(self, value: int) -> int:
        """The largest of all processes."""
        if self.count == 1:
            return value
        largest = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def wait(self) -> None:
        """Until all processes are here."""
        self.max(0)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of the same shape from each process, in their order, on the CPU."""
        if self.count == 1:
            return [tensor]
        own = tensor.to(self.device)
        found = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(found, own)
        return [each.cpu() for each in found]


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Join the process group that ``torchrun`` describes in the environment, for a while.

    Without such a description, or with one process in it, nothing happens.

    Args:
        device: of the model: the group speaks gloo for the CPU and NCCL for CUDA.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes.of_group(device)
    finally:
        dist.destroy_process_group()


@contextmanager
def peers_may_end(processes: Processes) -> Iterator[None]:
    """Say in one sentence that another process has ended, which is all this one can know.

    Raises:
        TrainingError: it has.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo has no class of its own for a lost connection.
        lost = isinstance(error, dist.DistError) or "Connection" in str(error)
        if processes.count == 1 or not lost:
            raise
        raise TrainingError(
            f"process {processes.rank} of {processes.count} stops, because another one has ended; "
            "what that one says tells why"
        ) from error


class _Loss(torch.nn.Module):
    """The loss as a ``forward``, which is what DistributedDataParallel goes through."""

    def __init__(self, model: torch.nn.Module, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.compute = compute

    def forward(self, batch: AnyBatch, options: dict[str, Any]) -> Tensor:
        return self.compute(self.model, batch, **options)


class DataParallel:
    """The loss of whole batches and its gradients, of which each process computes its share.

    Args:
        model: the model, with the same weights in every process once this is made: those of
            the first.
        compute: ``compute(model, batch, **options)`` is the loss of a batch, averaged over what
            counts in it.
        processes: more than one.
    """

    def __init__(
        self, model: torch.nn.Module, compute: Callable[..., Tensor], processes: Processes
    ) -> None:
        self._model = model
        self._compute = compute
        self._processes = processes
        self._wrap()

    def _wrap(self) -> None:
        self._trainable = self._trainable_now()
        # The models have no buffers, so that there is nothing to say about exchanging them.
        self._parallel = DistributedDataParallel(_Loss(self._model, self._compute))

    def _trainable_now(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self._model.parameters()]

    def loss(self, batch: AnyBatch, **options: Any) -> tuple[Tensor, float]:
        """The loss of a whole batch, which every process is given.

        Args:
            batch: the batch.
            options: for ``compute``.

        Returns:
            What to call ``backward`` on, after which every process has the gradients of the
            whole batch's loss; and that loss, in nats per token.
        """
        if self._trainable_now() != self._trainable:
            self._wrap()  # the old one would wait for gradients that never come
        rank, count = self._processes.rank, self._processes.count
        own = batch.share(rank, count)
        tokens, own_tokens = int(batch.counted.sum()), int(own.counted.sum())
        if not own_tokens:
            # It takes part all the same: the others wait for its gradients, which are zero.
            own = batch.share(0, len(batch.lines))
        loss = self._parallel(own, options)
        (total,) = self._processes.sum(loss.item() * own_tokens)
        # Gradients are averaged over the processes.
        return loss * (own_tokens * count / tokens), total / tokens
