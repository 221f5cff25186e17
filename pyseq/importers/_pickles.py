# SPDX-License-Identifier: Apache-2.0
"""Reading other people's files without running what is in them.

torch's restricted unpickler makes tensors and plain containers; every other class or function
that a file names becomes an :class:`Inert` record of what the file says about it.
"""

from __future__ import annotations

import errno
import pickle
import re
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError

# More classes than a checkpoint of any of these libraries names.
_MOST_NAMES = 200

_UNKNOWN = re.compile(r"GLOBAL (\S+) was not an allowed global")


class Inert:
    """Stands for an object whose class is not looked up: keeps its state, does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __new__(cls, *arguments: Any) -> Inert:
        made = super().__new__(cls)
        made.arguments = arguments
        made.state = None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute that the object had."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


def _mapping(*_: Any) -> OrderedDict[Any, Any]:
    """In place of ``defaultdict``, whose items follow; its factory is left out."""
    return OrderedDict()


def load_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote, with an :class:`Inert` for what is no tensor or container.

    Raises:
        CheckpointError: the file is no such thing, or cannot be read without running code.
        OSError: the file cannot be read.
    """
    stand_ins: list[Any] = [(_mapping, "collections.defaultdict")]
    stand_ins += [(Inert, name) for name in _unknown_names(path)]
    if len(stand_ins) > _MOST_NAMES:
        raise CheckpointError(f"{path}: names more than {_MOST_NAMES} classes")
    # Once, but for files of torch before 1.6, which tell one name at a time.
    for _ in range(_MOST_NAMES):
        try:
            with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
                # Of pickle's protocols torch writes one: what it says of others is for its authors.
                warnings.filterwarnings("ignore", message="Detected pickle protocol")
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            unknown = _UNKNOWN.search(str(error))
            if unknown is None:
                raise _unreadable(path, error) from error
            name = unknown.group(1)
            stand_ins.append((Inert, name if "." in name else f"builtins.{name}"))
        except Exception as error:  # a damaged file makes the unpickler fail anywhere
            if _is_of_the_system(error):
                raise
            raise _unreadable(path, error) from error
    raise CheckpointError(f"{path}: names more than {_MOST_NAMES} classes")


def _unknown_names(path: Path) -> list[str]:
    """The classes and functions that a file names and torch does not make by itself."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # not a zip file, or a damaged one, of which loading says more
        if _is_of_the_system(error):
            raise
        return []
    return sorted(
        name if "." in name else f"builtins.{name}"
        for name in names
        if name != "collections.defaultdict"
    )


def _is_of_the_system(error: Exception) -> bool:
    """Whether the system cannot read the file; of an archive without its end torch asks for a place
    before its beginning, which is an invalid argument."""
    return isinstance(error, OSError) and error.errno != errno.EINVAL


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    # torch puts advice around the reason: to run the file after all, and whom to write to.
    told = map(str.strip, str(error).rpartition("WeightsUnpickler error:")[2].splitlines())
    reason = next((line for line in told if line and "weights_only" not in line), "")
    reason = reason.partition(". This is an internal")[0][:200] or type(error).__name__
    return CheckpointError(
        f"{path}: is no file of torch.save, is damaged, or cannot be read without running what is "
        f"in it: {reason}"
    )


def load_dictionary(path: Path, part: str, *, layout: str) -> dict[str, Any]:
    """A checkpoint that is a dictionary, with the weights in a dictionary called ``part``.

    Raises:
        CheckpointError: it is not; the text says what it is.
        OSError: the file cannot be read.
    """
    content = load_pickle(path)
    if isinstance(content, dict) and isinstance(content.get(part), dict):
        return content
    keys = type(content).__name__
    if isinstance(content, dict):
        keys = ", ".join(map(str, content)) or "nothing"
    raise CheckpointError(
        f"{path}: a checkpoint of {layout} must be a dictionary with the weights in {part!r}, got "
        f"{keys}"
    )


def attributes(value: Any) -> dict[str, Any]:
    """What a dictionary or the record of an object holds, by name."""
    if isinstance(value, Inert):
        value = value.state
    return dict(value) if isinstance(value, dict) else {}


def find(value: Any, name: str) -> Iterator[Any]:
    """Every value called ``name`` inside dictionaries, sequences and records, outermost first."""
    waiting, seen = deque([value]), set[int]()
    while waiting:
        each = waiting.popleft()
        if not isinstance(each, (Inert, dict, list, tuple)) or id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Inert):
            waiting += [each.state, *each.arguments]
        elif isinstance(each, dict):
            if name in each:
                yield each[name]
            waiting += each.values()
        else:
            waiting += each
