# SPDX-License-Identifier: Apache-2.0
"""Modules that were pickled whole by an earlier version of their class."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def fill_in(module: torch.nn.Module, defaults: Mapping[str, object]) -> None:
    """Give the module those attributes that its class did not have when it was pickled."""
    known = {*vars(module), *module._modules, *module._parameters}
    for name, value in defaults.items():
        if name not in known:
            setattr(module, name, value)
