# SPDX-License-Identifier: Apache-2.0
"""A mode in which no operator may ask a device what its tensors hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoWaiting(TorchDispatchMode):
    """Raises where an operator reads what a device holds, or brings tensors to another one."""

    READING = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "multinomial",
        "bincount",
        "unique",
        "_unique2",
        "is_nonzero",
    )

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name not in self.READING, f"{name} waits for the device"
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                assert leaf.device == self.device, f"{name} of a tensor on {leaf.device}"
        for index in args[1] if name in ("index", "index_put", "index_put_") else ():
            assert index is None or index.dtype == torch.int64, f"{name} by {index.dtype}"
        return func(*args, **(kwargs or {}))
