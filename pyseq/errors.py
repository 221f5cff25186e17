# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on.

Their text is one sentence that names the file, and the line where there is one; the
command line prints it without a traceback.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class PyseqError(Exception):
    """Base of the errors below."""


class DataError(PyseqError, ValueError):
    """A file or a pair that cannot be used."""


class CheckpointError(PyseqError):
    """A saved model that is incomplete, damaged or not what it claims to be."""


class TrainingError(PyseqError):
    """Training that cannot go on."""


class SearchError(PyseqError, RuntimeError):
    """A model whose outputs cannot be searched."""


class DeviceError(PyseqError, ValueError):
    """A device that models cannot be on."""


class MissingExtraError(PyseqError, ImportError):
    """An optional package that is not installed."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import ``module``, which the named extra of the distribution brings.

    Raises:
        MissingExtraError: it is not installed; the text says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"this needs the package {package} ({error}): pip install 'pyseq-torch[{extra}]', "
            f"or in a clone of pyseq: pip install '.[{extra}]'"
        ) from error
