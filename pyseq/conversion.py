# SPDX-License-Identifier: Apache-2.0
"""Turns the recurrent layers of a model from torch.nn's into pyseq.nn's, and back.

A layer stays the object that it is: only its class changes. Whatever holds it, or hangs on it,
keeps doing so: parents, optimizers, hooks, shared and parametrized weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.nn.utils import parametrize

from . import nn
from ._library import has_kernels
from ._packed import is_quantized
from .seq2seq import Encoder
from .seq2seq.scanned import ScannedDecoder

__all__ = ["convert", "revert"]

M = TypeVar("M", bound=torch.nn.Module)
Class = type[torch.nn.Module]
Log = Callable[[str], object]

_TO_PYSEQ: dict[Class, Class] = {
    torch.nn.RNN: nn.RNN,
    torch.nn.GRU: nn.GRU,
    torch.nn.LSTM: nn.LSTM,
    torch.nn.RNNCell: nn.RNNCell,
    torch.nn.GRUCell: nn.GRUCell,
    torch.nn.LSTMCell: nn.LSTMCell,
}
_TO_TORCH: dict[Class, Class] = {ours: theirs for theirs, ours in _TO_PYSEQ.items()}

#: Recurrent modules that torch.nn has nothing like.
_ONLY_PYSEQ: tuple[Class, ...] = tuple(
    cls
    for cls in (getattr(nn, name) for name in nn.__all__)
    if isinstance(cls, type)
    and issubclass(cls, (torch.nn.RNNBase, torch.nn.RNNCellBase, nn.AttentionDecoder))
    and cls not in _TO_TORCH
)

#: Modules of pyseq that call their layers as only pyseq's can be called.
_OWNERS: tuple[Class, ...] = (Encoder, ScannedDecoder)

#: What a subclass may define and still be nothing but its base with arguments of its own: the
#: layer is made already, so that a constructor has done its work.
_HARMLESS = {
    "__annotate_func__",
    "__annotations__",
    "__annotations_cache__",
    "__dict__",
    "__doc__",
    "__firstlineno__",
    "__init__",
    "__module__",
    "__orig_bases__",
    "__parameters__",
    "__static_attributes__",
    "__weakref__",
}

#: The attribute that remembers of which such subclass a converted layer was.
_ORIGIN = "_converted_from"

#: Options of pyseq's layers that change no result of a layer that is there: how much is kept
#: for backward, and what biases started from.
_WITHOUT_EFFECT = {"keep_every", "forget_bias"}


def convert(model: M, *, log: Log | None = print) -> M:
    """Make every recurrent layer and cell of torch.nn in ``model`` one of pyseq.nn, in place.

    The layers remain the same objects with the same parameters, names, hooks, training mode,
    device and dtype; what was shared stays shared, parametrizations, weight norm and pruning
    stay on. A model that is one such layer is converted itself. What is converted already is
    left as it is.

    Left alone, with the reason in the log, is what may compute something else than its class
    in torch.nn does: a subclass that defines more than a constructor (a ``forward`` of its own,
    say), a layer whose ``forward`` was replaced, a layer compiled by TorchScript; and a layer on a
    device that pyseq has no kernels for.

    Afterwards ``isinstance(layer, torch.nn.LSTM)`` is false, ``torch.nn.RNNBase`` holds as
    before; see the table in docs/migration.md for what else differs.

    Args:
        model: changed in place.
        log: is called with a line for each layer that was converted or left alone; None for
            no report.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    return _change(model, _TO_PYSEQ, "torch.nn", log)


def revert(model: M, *, log: Log | None = print) -> M:
    """Undo :func:`convert`: make every recurrent layer and cell of pyseq.nn one of torch.nn.

    For what knows only torch's own layers, such as the exporter to ONNX. Layers that were made
    as pyseq's become torch's too, unless torch.nn cannot express them (a cell or an option that
    it does not have, quantized weights): these are left alone, with the reason in the log. So are
    the layers of pyseq's own models (:class:`pyseq.Seq2Seq`, :class:`pyseq.Tagger`,
    :class:`pyseq.Classifier`), which are called with what torch.nn's do not take; your code that
    calls a layer with ``lengths``, ``resets`` or ``return_states`` needs pyseq's too. What changes
    no result, ``keep_every`` and the ``forget_bias`` of the next ``reset_parameters()``, is lost,
    and the log names it.

    Args, Returns, Raises: as :func:`convert`.
    """
    return _change(model, _TO_TORCH, "pyseq.nn", log)


def _change(model: M, classes: dict[Class, Class], source: str, log: Log | None) -> M:
    """Give each module in ``model`` whose class is a key of ``classes`` that value as its class.

    Args:
        source: where the keys are at home, for the log.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    lines = []
    owners = _owners(model) if classes is _TO_TORCH else {}
    for name, module in list(model.named_modules()):
        where, old = name or "the model itself", _class_name(module)
        base = _base(module, classes)
        if base is None:
            if classes is _TO_TORCH and isinstance(module, _ONLY_PYSEQ):
                lines.append(f"{where}: {old} left alone, torch has none")
            continue
        if module in owners:
            reason: str | None = f"pyseq's {owners[module]} calls it as torch's cannot be called"
        else:
            reason = _reason_against(module, base, classes[base])
        if reason is None:
            lost = _lost_options(classes[base], module, base)
            _set_class(module, base, classes[base])
            without = f" without {', '.join(lost)}" if lost else ""
            lines.append(f"{where}: {old} -> {_class_name(module)}{without}")
        else:
            lines.append(f"{where}: {old} left alone, {reason}")
    if log is not None:
        for line in lines or [f"no recurrent layer of {source} found"]:
            log(line)
    return model


def _owners(model: torch.nn.Module) -> dict[torch.nn.Module, str]:
    """The modules that are a part of one of ``_OWNERS``, and the name of its class."""
    return {
        part: type(module).__name__
        for module in model.modules()
        if isinstance(module, _OWNERS)
        for part in module.modules()
        if part is not module
    }


def _base(module: torch.nn.Module, classes: dict[Class, Class]) -> Class | None:
    """The key of ``classes`` that ``module`` is an instance of."""
    if isinstance(module, torch.jit.ScriptModule):
        name = getattr(module, "original_name", "")
        return next((each for each in classes if each.__name__ == name), None)
    return next((each for each in classes if isinstance(module, each)), None)


def _plain_class(module: torch.nn.Module) -> Class:
    """The class without what parametrizations derived from it."""
    return parametrize.type_before_parametrizations(module)


def _class_name(module: torch.nn.Module) -> str:
    cls = _plain_class(module)
    if cls in _TO_PYSEQ:
        return f"torch.nn.{cls.__name__}"
    return f"pyseq.nn.{cls.__name__}" if cls in (*_TO_TORCH, *_ONLY_PYSEQ) else cls.__qualname__


def _reason_against(module: torch.nn.Module, base: Class, target: Class) -> str | None:
    """Why ``module``, an instance of ``base``, cannot become one of ``target``, if it cannot."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if "forward" in vars(module):
        return "its forward was replaced"
    for cls in _plain_class(module).__mro__:
        if cls is base:
            break
        own = sorted(vars(cls).keys() - _HARMLESS)
        if own:
            return f"{cls.__qualname__} defines {', '.join(own)}"
    if any(is_quantized(buffer) for buffer in module.buffers(recurse=False)):
        return "its weights are quantized"
    devices = {parameter.device.type for parameter in module.parameters()}
    for device in sorted(devices if target in _TO_TORCH else ()):
        if not has_kernels(device):
            return f"pyseq has no kernels for {device}"
    for name in _options_in_use(target, module, base):
        if name not in _WITHOUT_EFFECT:
            return f"{target.__module__.split('.')[0]} has no {name}"
    return None


def _options_unknown_to(target: Class, module: torch.nn.Module, base: Class) -> list[str]:
    """Attributes of ``module`` for which ``base`` has a default and ``target`` does not.

    Each option that pyseq adds to a layer of torch.nn has its default as an attribute of the
    class, which torch.nn's class lacks.
    """
    return [each for each in vars(module) if hasattr(base, each) and not hasattr(target, each)]


def _options_in_use(target: Class, module: torch.nn.Module, base: Class) -> list[str]:
    """Those of them that are not at their default."""
    return [
        name
        for name in _options_unknown_to(target, module, base)
        if name[0] != "_" and getattr(module, name) != getattr(base, name)
    ]


def _lost_options(target: Class, module: torch.nn.Module, base: Class) -> list[str]:
    """Those that ``module`` can do without, with their values, for the log."""
    in_use = _options_in_use(target, module, base)
    return [f"{name}={getattr(module, name)!r}" for name in in_use if name in _WITHOUT_EFFECT]


def _set_class(module: torch.nn.Module, base: Class, target: Class) -> None:
    """Make ``module``, an instance of ``base``, one of ``target``."""
    state = vars(module)
    plain = _plain_class(module)
    for name in _options_unknown_to(target, module, base):
        del state[name]
    # torch.nn's layers keep a list of their weights, which ours make when asked.
    state.pop("_flat_weights", None)
    target = state.pop(_ORIGIN, target)
    if plain is not base:
        state[_ORIGIN] = plain
    if parametrize.is_parametrized(module):
        members: dict[str, Any] = dict(vars(type(module)))
        for name in ("__dict__", "__weakref__"):
            members.pop(name, None)
        target = type(f"Parametrized{target.__name__}", (target,), members)
    module.__class__ = target
    if isinstance(module, torch.nn.RNNBase):
        module._flat_weights_names = [name for names in module._all_weights for name in names]
        module._init_flat_weights()
