# SPDX-License-Identifier: Apache-2.0
"""A model as it computes in eval mode, while others may train or search it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch

from .protocols import SearchModel


def in_eval_mode(model: Any) -> Any:
    """``model`` itself if it is in eval mode; else one that is, on the same weights.

    Modules are not changed but stood in for, by objects of the same class with the same
    parameters, buffers and hooks. So two threads may search one model, or one train it
    while another looks at what it says. What cannot be stood in for is left as it is, and
    to :func:`search_mode`.
    """
    if isinstance(model, torch.nn.Module):
        return _stand_in(model, {}) if _trains(model) else model
    if not any(module.training for module in model.modules()):
        return model
    own = getattr(model, "in_eval_mode", None)
    return model if own is None else own()


def _trains(module: torch.nn.Module) -> bool:
    """Whether it or a module in it is in training mode; ``modules()`` takes as long as a small
    operator."""
    if module.training:
        return True
    # A loop: a generator would cost as much again.
    for child in module._modules.values():  # noqa: SIM110
        if child is not None and _trains(child):
            return True
    return False


def _stand_in(module: torch.nn.Module, known: dict[int, torch.nn.Module]) -> torch.nn.Module:
    if id(module) in known:
        return known[id(module)]
    result = module
    if _can_be_stood_in_for(module):
        result = object.__new__(type(module))
        state: dict[str, Any] = {
            name: MethodType(value.__func__, result) if _is_own(value, module) else value
            for name, value in vars(module).items()
        }
        # What is compiled is compiled of the module itself, in its own mode.
        result.__dict__.update(state, training=False, _compiled_call_impl=None)
    known[id(module)] = result
    if result is not module:
        result.__dict__["_modules"] = {
            name: child if child is None else _stand_in(child, known)
            for name, child in module._modules.items()
        }
    return result


def _is_own(value: object, module: torch.nn.Module) -> bool:
    """Whether it is a method of that module."""
    return isinstance(value, MethodType) and value.__self__ is module


def _can_be_stood_in_for(module: torch.nn.Module) -> bool:
    """Not if calling it calls what looks at that very object: a forward that was put in the place
    of its own, or what was compiled or scripted of it."""
    forward = vars(module).get("forward")
    if forward is not None and not _is_own(forward, module):
        return False
    return not isinstance(module, torch.jit.ScriptModule)


@contextmanager
def search_mode(model: SearchModel) -> Iterator[None]:
    """No gradients, and every module of the model in eval mode until the end."""
    training: list[torch.nn.Module] = []
    if not isinstance(model, torch.nn.Module) or _trains(model):
        training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
