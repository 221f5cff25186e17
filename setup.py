# SPDX-License-Identifier: Apache-2.0
"""Builds the extension ``pyseq._C``: finds torch, then runs CMake and Ninja.

Metadata is in pyproject.toml, sources and flags are in CMakeLists.txt. This file passes on
what only the running Python knows. Read: MAX_JOBS, PYSEQ_CUDA, CUDA_HOME,
PYSEQ_ALLOW_WARNINGS, CXX, CXXFLAGS, LDFLAGS.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 10)


class Torch(NamedTuple):
    """What the build needs to know of the installed torch."""

    version: str
    includes: list[str]
    libraries: list[str]
    cxx11_abi: int
    cuda: str | None


def find_torch() -> Torch:
    """The torch of the running interpreter, or exit with a sentence that says what to do."""
    # Build isolation hides the environment's packages; sysconfig still knows the place.
    # Appended, so that the isolated build tools keep precedence.
    for key in ("purelib", "platlib"):
        path = sysconfig.get_path(key)
        if path not in sys.path:
            sys.path.append(path)
    try:
        import torch
        from torch.utils import cpp_extension
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise SystemExit(f"pyseq cannot be built: importing torch failed: {error}") from None
        raise SystemExit(
            "pyseq is compiled against the torch you will use it with, and none was found: "
            "first run `pip install torch`, then install pyseq again "
            "(with --no-build-isolation if your torch is not in "
            f"{sysconfig.get_path('purelib')})."
        ) from None
    version = str(torch.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH:
        minimum = ".".join(map(str, MIN_TORCH))
        raise SystemExit(f"pyseq needs torch {minimum} or newer, found torch {version}.")
    return Torch(
        version=version,
        includes=cpp_extension.include_paths(),
        libraries=cpp_extension.library_paths(),
        cxx11_abi=int(torch._C._GLIBCXX_USE_CXX11_ABI),
        cuda=torch.version.cuda,
    )


def pybind11_includes(torch: Torch) -> list[str]:
    """torch's own copy of pybind11, whose casters match torch's; else the package's."""
    if any(Path(path, "pybind11", "pybind11.h").exists() for path in torch.includes):
        return []
    # Some distributions of torch, conda-forge's for one, leave the copy out.
    import pybind11

    return [pybind11.get_include()]


def cuda_option() -> str:
    """PYSEQ_CUDA: ``auto`` builds CUDA kernels where that can be, ``0`` never, ``1`` or fails.

    ``shim`` builds them for the CPU, and a device that runs them there: for the tests alone.
    """
    value = os.environ.get("PYSEQ_CUDA", "auto")
    if value not in ("auto", "0", "1", "shim"):
        raise SystemExit(f"PYSEQ_CUDA must be auto, 0 or 1, got {value!r}.")
    return value


def find_nvcc() -> str | None:
    """CUDA's compiler: of CUDA_HOME, from PATH, or where CUDA installs it."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_version(nvcc: str) -> str:
    """Its version, such as ``13.0``."""
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"release ([\d.]+)", answer.stdout)
    if found is None:
        raise SystemExit(f"pyseq cannot read the version of {nvcc}: {answer.stdout.strip()!r}.")
    return found.group(1)


def why_no_cuda(torch: Torch, nvcc: str | None) -> str | None:
    """Why CUDA kernels cannot be built for this torch with this compiler; None if they can."""
    if torch.cuda is None:
        return f"torch {torch.version} is built without CUDA"
    if nvcc is None:
        return f"torch {torch.version} is built for CUDA {torch.cuda}, but there is no nvcc"
    version = nvcc_version(nvcc)
    if version.split(".")[0] != torch.cuda.split(".")[0]:
        return f"torch {torch.version} is built for CUDA {torch.cuda}, but {nvcc} is {version}"
    return None


def find_cuda(torch: Torch) -> str | None:
    """The compiler for CUDA kernels, or None and a sentence that says why there are none."""
    option = cuda_option()
    if option in ("0", "shim"):
        return None
    nvcc = find_nvcc()
    reason = why_no_cuda(torch, nvcc)
    if reason is None:
        return nvcc
    if option == "1":
        raise SystemExit(f"PYSEQ_CUDA=1 asks for CUDA kernels, but {reason}.")
    print(f"pyseq is built for the CPU alone: {reason}.", flush=True)
    return None


def ninja_jobs() -> list[str]:
    """Ninja's option for MAX_JOBS; without it Ninja goes by the number of cores."""
    value = os.environ.get("MAX_JOBS", "")
    if not value:
        return []
    if not value.isdecimal() or int(value) < 1:
        raise SystemExit(f"MAX_JOBS must be a positive integer, got {value!r}.")
    return ["-j", value]


def find_tool(name: str) -> str:
    """Path of a build tool, from PATH or from beside the running Python."""
    path = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if path is None:
        raise SystemExit(f"pyseq needs {name} to build: run `pip install {name}`.")
    return path


def run(command: list[str]) -> None:
    """Run one build step; its own output has said what went wrong if it fails."""
    status = subprocess.run(command, cwd=ROOT).returncode
    if status:
        raise SystemExit(f"pyseq was not built: {Path(command[0]).name} failed, see above.")


def build_folder(cmake: str, ninja: str) -> Path:
    """The folder that CMake and Ninja keep their state in, the same for every form of install.

    One for each Python and each version of the tools: Ninja compiles everything anew when
    it meets another version's log, and isolated builds bring other tools than the system's.
    The folder is emptied if it was made for another compiler or another place, which CMake
    reads at its first run only: it would silently keep the old ones.
    """
    parts = [sys.implementation.cache_tag, sysconfig.get_platform()]
    for tool in (cmake, ninja):
        answer = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True)
        parts.append(Path(tool).name + answer.stdout.split("\n")[0].split()[-1])
    folder = ROOT / "build" / "-".join(parts)
    names = ("CXX", "CXXFLAGS", "LDFLAGS")
    wanted = "".join(f"{name}={os.environ.get(name, '')}\n" for name in names) + f"{ROOT}\n"
    record = folder / "environment.txt"
    if folder.exists() and not (record.exists() and record.read_text() == wanted):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(wanted)
    return folder


def compile_extension(torch: Torch, jobs: list[str]) -> Path:
    """Bring the build folder up to date; returns the path of the compiled module."""
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    folder = build_folder(cmake, ninja)
    definitions = {
        "CMAKE_BUILD_TYPE": "Release",
        # Build isolation puts Ninja in a new temporary folder every time.
        "CMAKE_MAKE_PROGRAM": ninja,
        "PYSEQ_PYTHON_INCLUDE": sysconfig.get_path("include"),
        "PYSEQ_TORCH_VERSION": torch.version,
        "PYSEQ_TORCH_INCLUDES": ";".join(torch.includes + pybind11_includes(torch)),
        "PYSEQ_TORCH_LIBRARIES": ";".join(torch.libraries),
        "PYSEQ_CXX11_ABI": str(torch.cxx11_abi),
        "PYSEQ_CUDA_COMPILER": find_cuda(torch) or "",
        "PYSEQ_CUDA_SHIM": "ON" if cuda_option() == "shim" else "",
        "PYSEQ_ALLOW_WARNINGS": "ON" if os.environ.get("PYSEQ_ALLOW_WARNINGS") == "1" else "",
    }
    run(
        [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
        + [f"-D{name}={value}" for name, value in definitions.items()]
    )
    run([ninja, "-C", str(folder), *jobs])
    return folder / "_C.so"


class BuildExtension(build_ext):
    """Compiles by CMake and puts ``_C`` and ``_build.py`` where setuptools wants them."""

    def run(self) -> None:
        cuda_option()
        jobs = ninja_jobs()
        torch = find_torch()
        compiled = compile_extension(torch, jobs)
        target = Path(self.get_ext_fullpath("pyseq._C"))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a running process may have the old file mapped.
        target.unlink(missing_ok=True)
        shutil.copy2(compiled, target)
        target.with_name("_build.py").write_text(
            "# SPDX-License-Identifier: Apache-2.0\n"
            '"""Written by setup.py: what must be known before the extension is loaded."""\n\n'
            f"TORCH_VERSION = {torch.version!r}\n"
        )


class DistInfo(dist_info):
    """Fails before pip downloads and resolves anything, if the build cannot succeed."""

    def run(self) -> None:
        cuda_option()
        find_cuda(find_torch())
        super().run()


setup(
    ext_modules=[Extension("pyseq._C", sources=[])],
    cmdclass={"build_ext": BuildExtension, "dist_info": DistInfo},
)
