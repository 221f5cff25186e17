# SPDX-License-Identifier: Apache-2.0
"""Functions and constructors that are given their arguments as one object of a class.

So each option has one place, and yet readers of signatures and checkers of types see it by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

_P = ParamSpec("_P")
_Self = TypeVar("_Self")
_Arguments = TypeVar("_Arguments")
_Result = TypeVar("_Result")


def takes(
    arguments: Callable[_P, _Arguments],
) -> Callable[[Callable[[_Arguments], _Result]], Callable[_P, _Result]]:
    """A function that is called with the arguments of the class ``arguments``, and is given one
    of that class."""

    def decorate(function: Callable[[_Arguments], _Result]) -> Callable[_P, _Result]:
        @wraps(function)
        def called(*args: _P.args, **kwargs: _P.kwargs) -> _Result:
            return function(_made(arguments, function, args, kwargs))

        _show(called, inspect.signature(arguments), inspect.signature(function).return_annotation)
        return called

    return decorate


def constructor_takes(
    arguments: Callable[_P, _Arguments],
) -> Callable[[Callable[[_Self, _Arguments], None]], Callable[Concatenate[_Self, _P], None]]:
    """The same of a constructor."""

    def decorate(
        init: Callable[[_Self, _Arguments], None],
    ) -> Callable[Concatenate[_Self, _P], None]:
        @wraps(init)
        def constructor(self: _Self, *args: _P.args, **kwargs: _P.kwargs) -> None:
            init(self, _made(arguments, init, args, kwargs))

        signature = inspect.signature(arguments)
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        _show(
            constructor,
            signature.replace(parameters=[own, *signature.parameters.values()]),
            signature.return_annotation,
        )
        return constructor

    return decorate


def _made(
    arguments: Callable[..., _Arguments],
    function: Callable[..., object],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> _Arguments:
    """The object; an error of an unknown or missing argument names what was called."""
    try:
        return arguments(*args, **kwargs)
    except TypeError as error:
        told = str(error)
        own = told.replace(f"{arguments.__qualname__}.__init__", function.__qualname__)
        if own == told:
            raise
        raise TypeError(own) from None


def _show(function: Callable[..., object], signature: inspect.Signature, result: object) -> None:
    """Have ``inspect.signature`` give this one."""
    shown: Any = function  # functions have this attribute, of which their type does not know
    shown.__signature__ = signature.replace(return_annotation=result)
