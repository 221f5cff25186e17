# SPDX-License-Identifier: Apache-2.0
"""A model as it computes in eval mode, while others may train or search it."""

from __future__ import annotations

import copy
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
    while another looks at what it says. Modules that attributes refer to, also in tuples, lists
    and dicts, are those that stand in. What cannot be stood in for is left as it is, and to
    :func:`search_mode`.
    """
    if isinstance(model, torch.nn.Module):
        return _StandIns(model).of(model) if _trains(model) else model
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


#: What torch keeps in every module: its children are seen to, and the rest stays.
_OF_TORCH = frozenset(vars(torch.nn.Module()))


class _StandIns:
    """What stands in for a module and for all in it: one for each, wherever it is referred to."""

    def __init__(self, root: torch.nn.Module) -> None:
        self._inside = {id(module) for module in root.modules()}
        self._known: dict[int, torch.nn.Module] = {}
        self._open: set[int] = set()  # containers that are being looked through

    def of(self, module: torch.nn.Module) -> torch.nn.Module:
        if id(module) in self._known:
            return self._known[id(module)]
        if not _can_be_stood_in_for(module):
            self._known[id(module)] = module
            return module
        result = object.__new__(type(module))
        self._known[id(module)] = result
        result.__dict__.update(vars(module))
        for name, value in vars(module).items():
            if name not in _OF_TORCH:
                result.__dict__[name] = self._referring(value)
        result.__dict__.update(
            training=False,
            # What is compiled is compiled of the module itself, in its own mode.
            _compiled_call_impl=None,
            _modules={
                name: None if child is None else self.of(child)
                for name, child in module._modules.items()
            },
        )
        return result

    def _referring(self, value: Any) -> Any:
        """``value``, with what stands in for a module in the place of each; itself if there is
        none: a module may add to its own lists."""
        if isinstance(value, torch.nn.Module):
            return self.of(value) if id(value) in self._inside else value
        if isinstance(value, MethodType):
            owner = self._referring(value.__self__)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if not isinstance(value, (dict, list, tuple)) or id(value) in self._open:
            return value
        self._open.add(id(value))
        keys = value.keys() if isinstance(value, dict) else range(len(value))
        changed = {key: self._referring(value[key]) for key in keys}
        self._open.remove(id(value))
        if all(changed[key] is value[key] for key in keys):
            return value
        if isinstance(value, tuple):
            items = changed.values()
            return value._make(items) if hasattr(value, "_make") else tuple(items)
        result = copy.copy(value)
        for key, each in changed.items():
            result[key] = each
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
