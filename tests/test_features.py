# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.text.features: files, training and prediction with vectors in place of tokens."""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from pyseq import Translator, Vocab, cli, train, train_labeler
from pyseq.errors import DataError
from pyseq.seq2seq import Seq2Seq
from pyseq.tagger import Tagger
from pyseq.text import Features

safetensors = pytest.importorskip("safetensors.torch", reason="features need the extra 'train'")

SMALL: dict[str, Any] = {"embedding_size": 8, "hidden_size": 16, "dropout": 0.0, "batch_size": 8}
ONE_HOT = torch.eye(3)


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """The tensors are tiny: more threads would only wait for one another."""
    set_threads(1)


def spoken(count: int) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """Texts of a, b and c, each with an array that has a row for every letter."""
    chance = random.Random(1)
    texts = ["".join(chance.choices("abc", k=chance.randint(1, 4))) for _ in range(count)]
    arrays = {f"u{n}": ONE_HOT[["abc".index(c) for c in text]] for n, text in enumerate(texts)}
    return arrays, [(f"u{n}", text) for n, text in enumerate(texts)]


ARRAYS, PAIRS = spoken(120)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    if kind == "npz":
        numpy.savez(path, **{name: array.double().numpy() for name, array in ARRAYS.items()})
    else:
        safetensors.save_file({name: array.half() for name, array in ARRAYS.items()}, path)
    found = Features.read(path)
    assert (found.size, len(found), set(found)) == (3, 120, set(ARRAYS))
    assert found["u0"].dtype == torch.float32
    assert torch.equal(found["u0"], ARRAYS["u0"])
    for size in (20, len(path.read_bytes()) - 60):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(DataError, match=r"x\.\w+: not a file of"):
            Features.read(path)
    with pytest.raises(FileNotFoundError):
        Features.read(tmp_path / f"missing.{kind}")


def test_no_file_is_unpickled(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "x.npz", a=numpy.array([{}], dtype=object))
    with pytest.raises(DataError, match="not a file of numpy arrays"):
        Features.read(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "expected arrays with one number of columns, got no arrays"),
        ({"a": torch.ones(2, 3), "b": torch.ones(2, 4)}, "one number of columns, got 3, 4"),
        ({"a": torch.ones(3)}, r"'a' must be floating-point numbers \(S, D\).* got float32 \(3,\)"),
        ({"a": torch.ones(0, 3)}, r"at least 1 x 1, got float32 \(0, 3\)"),
        ({"a": torch.ones(2, 3).long()}, r"must be floating-point .*got int64 \(2, 3\)"),
        ({"a": torch.full((2, 3), float("nan"))}, "'a' has a number that is not finite"),
        ({"a": numpy.full((2, 3), 1e300)}, "'a' has a number that is not finite"),
        ({"a": numpy.array([["x"]])}, r"must be floating-point .*got <U1 \(1, 1\)"),
        ({"a": 3}, r"must be floating-point .*got int64 \(\)"),
    ],
)
def test_arrays_that_cannot_be_used(arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^features: {message}|^features: .*{message}"):
        Features(arrays)


def test_features_are_arrays_by_name() -> None:
    with pytest.raises(TypeError, match="features must be arrays by name, got list of 2"):
        Features([1, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["other-endian", "reversed", "columns", "long-double"])
def test_arrays_of_any_layout(kind: str) -> None:
    array = numpy.arange(6.0).reshape(2, 3)
    given = {
        "other-endian": array.astype(array.dtype.newbyteorder()),
        "reversed": array[::-1].copy()[::-1],
        "columns": numpy.asfortranarray(array),
        "long-double": array.astype(numpy.longdouble),
    }[kind]
    assert Features({"a": given})["a"].tolist() == array.tolist()


def test_a_translator_of_features(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 12, "learning_rate": 2e-2, **SMALL}
    torch.manual_seed(1)
    found = train(PAIRS, features=ARRAYS, validation=PAIRS[:20], out=tmp_path, **options)
    right = sum(found(name) == text for name, text in PAIRS)
    assert right > 100
    (result,) = found.translate([PAIRS[0][0]])
    steps = len(ARRAYS["u0"])
    assert result.weights is not None
    assert result.weights.shape == (len(result.tokens), steps + 1)
    assert result.source_tokens == [str(n + 1) for n in range(steps)]
    assert "".join(found.stream("u3")) == found("u3")
    assert found.unknown_symbols("u1") == []
    loaded = Translator.load(tmp_path)
    with pytest.raises(DataError, match="this model reads features, not text"):
        loaded("u0")
    loaded.features = Features(ARRAYS)
    assert loaded("u0") == found("u0")
    with pytest.raises(DataError, match="has no array 'x'"):
        loaded("x")
    with pytest.raises(ValueError, match="must have 3 columns like the model's, got 4"):
        loaded.features = Features({"a": torch.ones(2, 4)})
    with pytest.raises(ValueError, match="replace_unknown needs a source of tokens"):
        loaded.search(["u0"], replace_unknown=True)


@pytest.mark.parametrize("task", ["tag", "classify"])
def test_a_labeler_of_features(task: Any) -> None:
    examples = [(name, " ".join(text) if task == "tag" else text[0]) for name, text in PAIRS]
    found = train_labeler(
        examples, task=task, features=ARRAYS, epochs=10, learning_rate=2e-2, **SMALL
    )
    results = found.predict([name for name, _ in examples] + [""])
    assert [result.text for result in results[:-1]] == [labels for _, labels in examples]
    if task == "tag":
        with pytest.raises(DataError, match="examples:1: expected one label for each of its"):
            train_labeler([("u0", "a b c a b c")], task="tag", features=ARRAYS, epochs=1, **SMALL)


def test_what_goes_with_tokens_alone_is_refused() -> None:
    model = Seq2Seq(None, 7, source_features=3, embedding_size=4, hidden_size=6)
    with pytest.raises(ValueError, match="reverse_source and copying go with tokens"):
        Translator(model, None, Vocab("abc"), reverse_source=True)
    with pytest.raises(ValueError, match="source_vocab must have None symbols like the model, got"):
        Translator(model, Vocab("ab"), Vocab("abc"))
    tagger = Tagger(None, 2, source_features=3, embedding_size=4, hidden_size=6)
    assert tagger.config["source_vocab_size"] is None
    with pytest.raises(ValueError, match=r"source_features must be .* the features, 3, got 4"):
        train(PAIRS, features=ARRAYS, source_features=4, **SMALL)
    with pytest.raises(ValueError, match="of the features, None, got 4"):
        train(PAIRS, source_features=4, **SMALL)
    with pytest.raises(ValueError, match="freeze_source must be 0 for a model without embeddings"):
        train(PAIRS, features=ARRAYS, freeze_source=1, **SMALL)


def test_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("tqdm", "sacrebleu"):
        pytest.importorskip(package, reason="the command line needs the extra 'train'")
    pairs, file, out = tmp_path / "pairs.tsv", tmp_path / "x.safetensors", str(tmp_path / "out")
    pairs.write_text("".join(f"{name}\t{text}\n" for name, text in PAIRS))
    safetensors.save_file(ARRAYS, file)
    features = ["--source-features", str(file)]
    command = ["train", str(pairs), "--out", out, "--threads", "1"]
    small = ["--hidden-size", "8", "--embedding-size", "4", "--batch-size", "16"]
    assert cli.main([*command, *small, *features, "--epochs", "1"]) == 0
    assert cli.main([*command, *features, "--resume", "--epochs", "2"]) == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"u1\n\nu2\n")))
    capsys.readouterr()
    assert cli.main(["predict", out, *features, "--beam-size", "2"]) == 0
    assert capsys.readouterr().out.count("\n") == 3
    assert cli.main(["evaluate", out, str(pairs), *features, "--by-position"]) == 0
    assert capsys.readouterr().out.startswith("lines  120\n")
    for arguments, message in (
        (["evaluate", out, str(pairs)], "this model reads features, not text"),
        ([*command, "--resume", "--epochs", "3"], "this model reads features, not text"),
        ([*command[:3], f"{out}2", *features, "--source-tokens", "char"], "--source-tokens goes w"),
        ([*command[:3], f"{out}2", *features, "--reverse-source"], "reverse_source and copying go"),
        ([*command[:3], f"{out}2", "--source-features", str(pairs)], "not a file of safetensors"),
    ):
        assert cli.main(arguments) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"zz\n")))
    assert cli.main(["predict", out, *features]) == 1
    assert "has no array 'zz'" in capsys.readouterr().err
    # Features of another size, other numbers of the same size, and features for models of text.
    wide, other = tmp_path / "wide.safetensors", tmp_path / "other.safetensors"
    safetensors.save_file({name: torch.ones(len(x), 4) for name, x in ARRAYS.items()}, wide)
    safetensors.save_file({name: x + 1 for name, x in ARRAYS.items()}, other)
    again = [*command, "--resume", "--epochs", "3", "--source-features"]
    tags, text = tmp_path / "tags.tsv", [str(tmp_path / "text"), str(tmp_path / "tagger")]
    tags.write_text("".join(f"{name}\t{' '.join(letters)}\n" for name, letters in PAIRS))
    small += ["--epochs", "1", "--threads", "1"]
    assert cli.main(["train", str(pairs), "--out", text[0], *small]) == 0
    tagger = ["train", str(tags), "--task", "tag", "--out", text[1]]
    assert cli.main([*tagger, *small, *features]) == 0
    for arguments, message in (
        (["predict", out, "--source-features", str(wide)], "must have 3 columns like the model's"),
        ([*again, str(wide)], "must have 3 columns like the model's"),
        ([*again, str(other)], "give the same file and the same features"),
        (["predict", text[0], *features], "this model reads text, not features"),
        (["evaluate", text[0], str(pairs), *features], "this model reads text, not features"),
        (["evaluate", text[1], str(tags)], "this model reads features, not text"),
    ):
        assert cli.main(arguments) == 1
        assert message in capsys.readouterr().err
