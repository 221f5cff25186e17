# SPDX-License-Identifier: Apache-2.0
"""Loads the extension ``_C``, after checking that it fits the installed torch.

torch must come first: it brings the libraries and the OpenMP runtime that ``_C`` uses. A
module built for another torch would die with an unreadable symbol error, hence the check.
"""

from __future__ import annotations

import os
import shlex
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent


def rebuild_command(package: Path = _PACKAGE) -> str:
    """What to run to build the extension anew for the installed torch.

    Args:
        package: the folder of the imported package, in a source tree or in site-packages.
    """
    source = package.parent
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    if (source / "setup.py").exists():
        return f"{pip} -e {shlex.quote(str(source))}"
    return f"{pip} --force-reinstall --no-deps --no-cache-dir . (in the folder of pyseq's source)"


def check_torch(built: str, installed: str) -> None:
    """Refuse a torch of another minor version; patch and build (``+cpu``) may differ.

    Args:
        built: the version of torch that ``_C`` was compiled for.
        installed: the version that was imported.

    Raises:
        ImportError: major or minor version differ.
    """
    if built.split(".")[:2] != installed.split(".")[:2]:
        raise ImportError(
            f"pyseq was built for torch {built}, but torch {installed} is installed; "
            f"rebuild it with: {rebuild_command()}"
        )


def _check_built() -> None:
    # By file: an editable install of another source tree would answer for missing modules.
    extensions = [_PACKAGE / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]
    if not any(map(Path.exists, extensions)) or not (_PACKAGE / "_build.py").exists():
        python = ".".join(map(str, sys.version_info[:2]))
        raise ImportError(
            f"pyseq's extension is not built for this Python ({python}); "
            f"build it with: {rebuild_command()}"
        )
    from ._build import TORCH_VERSION

    check_torch(TORCH_VERSION, str(torch.__version__))


_check_built()

from . import _C as _C  # noqa: E402  after the check, which says more than a failed import
from . import fake as fake  # noqa: E402  needs the operators of _C


def _after_fork() -> None:
    """Leave torch one thread where those that the parent's had are gone: its operators would wait
    for them for ever. A worker of a data loader does the same."""
    if _C.has_lost_threads():
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork)


def has_kernels(device: str) -> bool:
    """Whether the layers can be computed on devices of that type, such as ``"cuda"``."""
    key = torch._C._dispatch_key_for_device(device)
    return torch._C._dispatch_has_kernel_for_dispatch_key("pyseq::scan", key)
