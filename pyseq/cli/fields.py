# SPDX-License-Identifier: Apache-2.0
"""Arguments made of the fields of an options class: type, choices and default are the field's."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from ..errors import PyseqError
from ..recurrent import LayerOptions
from ..scheduled import Schedule
from .common import layer_options, positive, schedule

#: What stands for an argument of some kinds in the help; for all others it is N.


_METAVARS: dict[Callable[[str], Any], str] = {layer_options: "OPTIONS", schedule: "SCHEDULE"}


class Need(NamedTuple):
    """The option without which another one means nothing."""

    name: str
    values: tuple[str, ...] | None = None  # that it must have; None for any that switches it on


def flag(name: str) -> str:
    """How an option is written on the command line."""
    return f"--{name.replace('_', '-')}"


def add_fields(
    group: Any,
    options: type,
    texts: Mapping[str, str],
    names: Mapping[str, tuple[str, ...]] | None = None,
    *,
    from_zero: Collection[str] = (),
) -> None:
    """Arguments for fields of an options class, absent from the result if they are not given.

    A bool becomes ``--name``, or ``--no-name`` if it is true by default; a Literal its choices,
    with ``none`` for a None that is not the default.

    Args:
        group: where they go.
        options: the class, whose fields have defaults.
        texts: a word on each field; what the default is stands behind it, unless it is None.
        names: by option, the choices of one that is a string.
        from_zero: integers that may be below 1.
    """
    hints = get_type_hints(options)
    for name, text in texts.items():
        default = getattr(options, name)
        bare = default is None or isinstance(default, LayerOptions)
        told = text if bare else f"{text} (default: {_shown(default)})"
        if hints[name] is bool:
            _add_switch(group, name, text, default=default)
            continue
        parts = _parts(hints[name])
        choices: tuple[str, ...] | None = None
        kind: Callable[[str], Any] = str
        if names is not None and name in names:
            choices = names[name]
        elif any(get_origin(part) is Literal for part in parts):
            choices = tuple(choice for part in parts for choice in get_args(part))
            if type(None) in parts and default is not None:
                choices += ("none",)
        elif set(parts) >= set(get_args(Schedule)):
            kind = schedule
        elif LayerOptions in parts:
            kind = layer_options
        elif float in parts:
            kind = float
        elif int in parts:
            kind = int if name in from_zero else positive
        group.add_argument(
            flag(name),
            type=kind,
            choices=choices,
            default=argparse.SUPPRESS,
            metavar=None if choices else _METAVARS.get(kind, "N"),
            help=told,
        )


def _parts(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _shown(default: object) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default)


def _add_switch(group: Any, name: str, text: str, *, default: bool) -> None:
    group.add_argument(
        flag(f"no_{name}" if default else name),
        dest=name,
        action="store_false" if default else "store_true",
        default=argparse.SUPPRESS,
        help=text,
    )


def given_fields(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """The fields of an options class that were given as arguments."""
    names = [field.name for field in fields(options)]
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    return {name: None if value == "none" else value for name, value in given.items()}


def require_switches(
    given: Collection[str], settings: Mapping[str, Any], needs: Mapping[str, tuple[Need, ...]]
) -> None:
    """Refuse an option that does nothing, because the one that it is about is not set.

    Args:
        given: the options that were given.
        settings: all options and their values; None, False and what is not there are off.
        needs: by option what it needs, one of several.

    Raises:
        PyseqError: an option lacks what it needs; the text names it.
    """
    for name in given:
        asked = needs.get(name, ())
        if asked and not any(_is_on(settings.get(need.name), need.values) for need in asked):
            missing = " or ".join(_need_text(need) for need in asked)
            raise PyseqError(f"{flag(name)} goes with {missing}, which is not given")


def _is_on(value: object, values: tuple[str, ...] | None) -> bool:
    return value in values if values is not None else value is not None and value is not False


def _need_text(need: Need) -> str:
    return flag(need.name) if need.values is None else f"{flag(need.name)} {'|'.join(need.values)}"
