# SPDX-License-Identifier: Apache-2.0
"""The build, the checks before the extension is loaded, and ``pyseq info``.

Nothing is compiled here: setup.py is run only up to the sentence it must stop with.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pyseq
from pyseq import _library, info

ROOT = Path(__file__).resolve().parents[1]
# How ATEN_CPU_CAPABILITY names the tiers, which it caps.
CAPABILITIES = {"default": "plain", "avx2": "avx2", "avx512": "avx512"}


def run_python(*args: str, cwd: Path = ROOT, **env: str | Path) -> subprocess.CompletedProcess[str]:
    """Run this Python with some environment variables set; never raises."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, **{name: str(value) for name, value in env.items()}},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.fixture
def no_torch(tmp_path: Path) -> Path:
    """A folder that, on PYTHONPATH, makes ``import torch`` fail as if it were absent."""
    (tmp_path / "torch.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
    )
    return tmp_path


def test_build_without_torch_says_what_to_install(no_torch: Path) -> None:
    result = run_python("setup.py", "build_ext", PYTHONPATH=no_torch)
    assert result.returncode == 1
    assert "first run `pip install torch`" in last_line(result.stderr)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("value", ["auto", "0"])
def test_cuda_option_for_the_cpu_is_accepted(no_torch: Path, value: str) -> None:
    # The absent torch is what stops the build, after the option was read.
    result = run_python("setup.py", "build_ext", PYTHONPATH=no_torch, PYSEQ_CUDA=value)
    assert "pip install torch" in last_line(result.stderr)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("PYSEQ_CUDA", "yes", "PYSEQ_CUDA must be auto, 0 or 1, got 'yes'."),
        ("PYSEQ_CUDA", "", "PYSEQ_CUDA must be auto, 0 or 1, got ''."),
        ("MAX_JOBS", "0", "MAX_JOBS must be a positive integer, got '0'."),
        ("MAX_JOBS", "two", "MAX_JOBS must be a positive integer, got 'two'."),
    ],
)
def test_bad_build_option_is_one_sentence(
    no_torch: Path, name: str, value: str, sentence: str
) -> None:
    result = run_python("setup.py", "build_ext", PYTHONPATH=no_torch, **{name: value})
    assert result.returncode == 1
    assert last_line(result.stderr).startswith(sentence)
    assert "Traceback" not in result.stderr


def test_cuda_kernels_that_cannot_be_built_are_one_sentence() -> None:
    if torch.version.cuda is not None:
        pytest.skip("torch has CUDA")
    for command in ("build_ext", "dist_info"):
        result = run_python("setup.py", command, PYSEQ_CUDA="1")
        assert result.returncode == 1
        assert last_line(result.stderr) == (
            "PYSEQ_CUDA=1 asks for CUDA kernels, but "
            f"torch {torch.__version__} is built without CUDA."
        )


def setup_functions() -> dict[str, Any]:
    """What setup.py defines, without running it."""
    source = (ROOT / "setup.py").read_text().split("\nsetup(")[0]
    names: dict[str, Any] = {"__file__": str(ROOT / "setup.py"), "__name__": "setup"}
    exec(compile(source, "setup.py", "exec"), names)
    return names


@pytest.mark.parametrize(
    ("cuda", "release", "reason"),
    [
        (None, "13.0", "torch 2.13 is built without CUDA"),
        ("13.0", None, "torch 2.13 is built for CUDA 13.0, but there is no nvcc"),
        ("12.6", "13.0", "torch 2.13 is built for CUDA 12.6, but {nvcc} is 13.0"),
        ("13.0", "13.2", None),
    ],
)
def test_cuda_kernels_need_a_compiler_of_torchs_version(
    tmp_path: Path, cuda: str | None, release: str | None, reason: str | None
) -> None:
    functions = setup_functions()
    torch_found = functions["Torch"]("2.13", [], [], 1, cuda)
    nvcc = None
    if release is not None:
        nvcc = tmp_path / "nvcc"
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V'\n")
        nvcc.chmod(0o755)
    found = functions["why_no_cuda"](torch_found, None if nvcc is None else str(nvcc))
    assert found == (reason and reason.format(nvcc=nvcc))


def test_import_with_another_torch_names_versions_and_command() -> None:
    program = "import torch; torch.__version__ = '2.99.0'; import pyseq"
    result = run_python("-c", program)
    sentence = last_line(result.stderr)
    assert sentence.startswith(f"ImportError: pyseq was built for torch {torch.__version__}")
    assert "torch 2.99.0 is installed" in sentence
    assert sentence.endswith(_library.rebuild_command())


@pytest.mark.parametrize("installed", ["2.13.0", "2.13.1", "2.13.0+cu130", "2.13.0a0+git1234"])
def test_torch_may_differ_in_patch_and_build(installed: str) -> None:
    _library.check_torch("2.13.0+cpu", installed)


@pytest.mark.parametrize("installed", ["2.12.0+cpu", "3.13.0", "2.1.3"])
def test_torch_may_not_differ_in_minor(installed: str) -> None:
    with pytest.raises(ImportError, match=r"rebuild it with: .* -m pip install"):
        _library.check_torch("2.13.0+cpu", installed)


def test_import_from_a_tree_never_built_says_how_to_build(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "pyseq", tmp_path / "pyseq", ignore=shutil.ignore_patterns("_build.py", "*.so")
    )
    (tmp_path / "setup.py").touch()
    result = run_python("-c", "import pyseq", cwd=tmp_path)
    sentence = last_line(result.stderr)
    assert sentence.startswith("ImportError: pyseq's extension is not built")
    assert sentence.endswith(f"-m pip install -e {tmp_path}")


def test_rebuild_command_of_an_installed_package(tmp_path: Path) -> None:
    command = _library.rebuild_command(tmp_path / "pyseq")
    assert "-m pip install --force-reinstall --no-deps" in command


def test_source_distribution_has_what_the_repository_has(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or "MANIFEST.in" not in listed.stdout.split("\n"):
        pytest.skip("not a clone of the repository")
    result = run_python("setup.py", "-q", "egg_info", "--egg-base", str(tmp_path))
    assert result.returncode == 0, result.stderr
    packed = (tmp_path / "pyseq_torch.egg-info" / "SOURCES.txt").read_text().splitlines()
    kept = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert kept - set(packed) == {".gitignore"}
    assert "pyseq/_build.py" not in packed


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_one_openmp_runtime_is_loaded() -> None:
    program = "import pyseq; print(open('/proc/self/maps').read())"
    files = set(run_python("-c", program).stdout.split())
    names = ("libgomp", "libomp", "libiomp")
    runtimes = {file for file in files if Path(file).name.startswith(names)}
    assert len(runtimes) == 1, runtimes


def test_info_names_versions_tier_and_threads() -> None:
    facts = info.facts()
    assert facts["pyseq"] == pyseq.__version__
    assert facts["torch"].startswith(str(torch.__version__))
    assert facts["threads"] == str(torch.get_num_threads())
    if torch.version.cuda is None:
        assert facts["cuda"] == "pyseq none, torch none"
    assert facts["cpu tier"] in facts["compiled in"].split(", ")


def test_info_lines_hold_every_fact() -> None:
    lines = info.lines()
    for line, (name, value) in zip(lines, info.facts().items(), strict=True):
        assert line.startswith(name)
        assert line.endswith(value)
    assert info.describe() == "\n".join(lines)


def test_info_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    # As many threads as the suite itself runs on.
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    result = run_python("-m", "pyseq", "info")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == info.describe()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_cpu_tier_honours_torchs_variable(capability: str) -> None:
    compiled = _library._C.compiled_tiers().split(",")
    usable = compiled[compiled.index(_library._C.cpu_tier()) :]
    wanted = CAPABILITIES[capability]
    if wanted not in usable:
        pytest.skip(f"this build and machine have {', '.join(usable)}")
    program = "import pyseq; print(pyseq._library._C.cpu_tier())"
    result = run_python("-c", program, ATEN_CPU_CAPABILITY=capability)
    assert result.stdout.strip() == wanted, result.stderr


def test_tiers_share_no_function() -> None:
    # The linker keeps one copy of an inline function that several objects define. Were it
    # the AVX-512 one, every older machine would die of an illegal instruction.
    builds = sorted(ROOT.glob("build/*/_C.so"), key=lambda path: path.stat().st_mtime)
    if not builds or shutil.which("nm") is None:
        pytest.skip("needs nm and the build folder of a source tree")
    objects = list(builds[-1].parent.glob("CMakeFiles/*.dir/csrc/cpu/kernels.cpp.o"))
    assert len(objects) == len(_library._C.compiled_tiers().split(","))
    for path in objects:
        tier = path.parents[2].name.removesuffix(".dir")
        symbols = subprocess.run(
            ["nm", "--demangle", "--defined-only", "--extern-only", path],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        # Lines read "address kind name"; T and W are code, the rest is data.
        code = [name for _, kind, name in (line.split(" ", 2) for line in symbols) if kind in "TW"]
        shared = [name for name in code if f"::{tier}::" not in name]
        assert not shared, f"{tier} defines what other objects may define too: {shared}"
