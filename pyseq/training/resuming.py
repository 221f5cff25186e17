# SPDX-License-Identifier: Apache-2.0
"""What a run needs to go on exactly, beside its weights: as tensors, and back again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from .._library import _C
from ..distributed import Processes
from ..errors import CheckpointError
from ..scheduled import from_record
from ..tagger import AnyModel
from .options import FREE_ON_RESUME, TrainingOptions

# Adam's; SGD without momentum keeps nothing.
_OPTIMIZER_KEYS = ("step", "exp_avg", "exp_avg_sq")


def begun_options(state: checkpoint.TrainingState) -> TrainingOptions:
    """How the run of this state is trained; what its version did not know is at its default.

    Raises:
        CheckpointError: the state has options that this version does not know.
    """
    try:
        options = dict(state.record["options"])
        if options.get("scheduled_sampling") is not None:
            options["scheduled_sampling"] = from_record(options["scheduled_sampling"])
        return TrainingOptions(**options)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the training state has no valid options: {error}") from error


def check_options(options: TrainingOptions, saved: TrainingOptions) -> None:
    """Raise a CheckpointError if a run is to go on with other options than it was begun with."""
    before = asdict(saved)
    for name, value in asdict(options).items():
        if name not in FREE_ON_RESUME and before[name] != value:
            raise CheckpointError(
                f"{name} must be {before[name]!r} as in the run to be resumed, got {value!r}"
            )


def random_tensors(processes: Processes, device: torch.device) -> dict[str, Tensor]:
    """The states of torch's global generators, those of all processes, for a model on a device."""
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {
        _random_name(kind, rank): state
        for kind, own in states.items()
        for rank, state in enumerate(processes.gather(own))
    }


def restore_random(
    tensors: Mapping[str, Tensor], processes: Processes, device: torch.device
) -> bool:
    """Set the generators of this process; False if there was no such process."""
    own = tensors.get(_random_name("torch", processes.rank))
    if own is None:
        return False
    torch.set_rng_state(own)
    on_device = tensors.get(_random_name("cuda", processes.rank))
    if on_device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(on_device, device)
    return True


def _random_name(kind: str, rank: int) -> str:
    return f"rng.{kind}" if rank == 0 else f"rng.{kind}.{rank}"


def optimizer_tensors(model: AnyModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser keeps for each parameter."""
    return {
        f"optimizer.{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    tensors: Mapping[str, Tensor], model: AnyModel, optimizer: torch.optim.Optimizer
) -> None:
    """Give an optimiser back what :func:`optimizer_tensors` took."""
    saved: dict[int, dict[str, Tensor]] = {}
    for index, (name, _) in enumerate(model.named_parameters()):
        values = {
            key: tensors[f"optimizer.{key}.{name}"]
            for key in _OPTIMIZER_KEYS
            if f"optimizer.{key}.{name}" in tensors
        }
        if values:
            saved[index] = values
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved, "param_groups": groups})


def circumstances(processes: Processes, device: torch.device) -> dict[str, Any]:
    """On what the last bits of a run depend."""
    return {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "tier": _C.cpu_tier(),
        "processes": processes.count,
    }


def differences(record: Mapping[str, Any], processes: Processes, device: torch.device) -> list[str]:
    """A line of text for each circumstance that is not that of the run to be resumed."""
    now = circumstances(processes, device)
    # Older versions did not say.
    begun = {"device": "cpu", "tier": now["tier"], "processes": 1, **record}
    lines = []
    if begun["device"] != now["device"]:
        lines.append(
            f"the run was begun with the device {begun['device']} and goes on with "
            f"{now['device']}: its dropout and the last bits of its numbers differ"
        )
    if begun["threads"] != now["threads"]:
        lines.append(
            f"the run was begun with {begun['threads']} threads and goes on with "
            f"{now['threads']}: the last bits of its numbers may differ"
        )
    if begun["tier"] != now["tier"]:
        lines.append(
            f"the run was begun with the CPU tier {begun['tier']} and goes on with "
            f"{now['tier']}: the last bits of its numbers may differ"
        )
    if begun["processes"] != now["processes"]:
        lines.append(
            f"the run was begun with {begun['processes']} processes and goes on with "
            f"{now['processes']}: its dropout and the last bits of its numbers differ"
        )
    return lines
