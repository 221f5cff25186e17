# SPDX-License-Identifier: Apache-2.0
"""The Python examples of the README and of docs, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_good_morning(capsys: pytest.CaptureFixture[str]) -> None:
    exec(EXAMPLES[0], {})
    assert capsys.readouterr().out == "good morning\n"


def test_modules() -> None:
    names: dict[str, object] = {}
    exec(EXAMPLES[1], names)
    result = names["result"]
    assert result.output.shape == (6, 4, 128)
    assert result.weights.shape == (6, 4, 9)
    assert (result.weights[:, 1, 3:] == 0).all()


def test_truncated_back_propagation() -> None:
    names: dict[str, object] = {}
    exec(EXAMPLES[2], names)
    state = names["state"]
    assert isinstance(state, tuple)
    assert [(each.shape, each.requires_grad) for each in state] == [((1, 4, 64), False)] * 2


# The examples of a document go on from one another.
DOCUMENTS = sorted(README.parent.glob("docs/*.md"))


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in DOCUMENTS])
def test_documents(path: Path) -> None:
    names: dict[str, object] = {}
    for example in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        exec(example, names)


def test_commands_are_the_makefile_s() -> None:
    text = README.read_text(encoding="utf-8")
    for command in ("make test", "make demo", "pip install ."):
        assert command in text


def test_every_extra_is_listed_with_what_it_brings() -> None:
    project = (README.parent / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", project, re.DOTALL)
    assert section is not None
    table = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", README.read_text(encoding="utf-8"), re.M))
    for name, packages in re.findall(r"^(\w+) = \[(.*)\]$", section.group(1), re.M):
        for package in re.findall(r'"([\w\[\]-]+)', packages):
            brought = re.sub(r"pyseq-torch\[(\w+)\]", r"`\1`", package)
            assert brought in table[name]
