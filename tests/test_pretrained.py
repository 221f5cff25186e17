# SPDX-License-Identifier: Apache-2.0
"""Training that begins with pretrained embeddings: freezing, resuming, checkpoints, commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import pyseq
from pyseq import checkpoint, cli, training
from pyseq.embeddings import EmbeddingsFile, fingerprint, from_matrix
from pyseq.errors import CheckpointError, DataError
from pyseq.text import Pair, Vocab
from pyseq.training import Data, ModelOptions, Trainer, TrainingOptions
from pyseq.translator import Translator

pytest.importorskip("safetensors", reason="checkpoints need the extra 'train'")

WORDS = list("abcde")
TEXTS = ("ab", "bc", "cd", "de", "ea", "ac")
DATA = Data([Pair([*text], [*text[::-1]], line) for line, text in enumerate(TEXTS, 1)], "pairs")


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """Models this small are slower with more."""
    set_threads(1)


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    """A GloVe file with vectors of 8 numbers for all letters but e."""
    path = tmp_path / "vectors.txt"
    rows = np.random.default_rng(5).normal(size=(4, 8)).round(3).tolist()
    lines = (" ".join([word, *map(str, row)]) for word, row in zip(WORDS, rows, strict=False))
    path.write_text("\n".join(lines))
    return path


def begin(vectors: Path, out: Path | None = None, **options: int | None) -> Trainer:
    return training.start(
        DATA,
        tokens=("char", "char"),
        model=ModelOptions(embedding_size=6, hidden_size=8, dropout=0.1),
        options=TrainingOptions(epochs=3, batch_size=3, learning_rate=0.01, **options),  # type: ignore[arg-type]
        out=out,
        source_embeddings=EmbeddingsFile(vectors),
    )


def table(model: pyseq.Seq2Seq) -> Tensor:
    return model.encoder.embedding.weight.detach().clone()


def test_a_run_begins_with_the_vectors(vectors: Path) -> None:
    trainer = begin(vectors)
    vocab = trainer.translator.source_vocab
    found = EmbeddingsFile(vectors).read(vocab)
    assert torch.equal(table(trainer.model), found.matrix)
    assert found.report.missing == ("e",)
    assert trainer.model.config["source_embedding_size"] == 8
    assert trainer.model.decoder.embedding.weight.shape == (9, 6)


@pytest.mark.parametrize("epochs", [0, 1, 2, None])
def test_frozen_for_so_many_epochs(epochs: int | None, vectors: Path) -> None:
    trainer = begin(vectors, freeze_source=epochs)
    seen = [table(trainer.model)]
    other = trainer.model.decoder.embedding.weight.detach().clone()
    finish = trainer._finish_epoch

    def finish_epoch() -> None:
        seen.append(table(trainer.model))
        finish()

    trainer._finish_epoch = finish_epoch  # type: ignore[method-assign]
    trainer.run()
    frozen = [torch.equal(before, after) for before, after in pairwise(seen)]
    assert frozen == [epochs is None or epoch < epochs for epoch in range(3)]
    assert not torch.equal(other, trainer.model.decoder.embedding.weight)


def test_what_the_caller_froze_stays_frozen(vectors: Path) -> None:
    trainer = begin(vectors)
    before = table(trainer.model)
    trainer.model.encoder.embedding.weight.requires_grad_(False)
    trainer.run()
    assert torch.equal(table(trainer.model), before)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_resumed_run_freezes_and_ends_like_one_that_was_not(
    stop: int, vectors: Path, tmp_path: Path
) -> None:
    whole = begin(vectors, tmp_path / "whole", freeze_source=2)
    whole.run()
    cut = begin(vectors, tmp_path / "cut", freeze_source=2, checkpoint_every=1)
    done = 0

    class Killed(Exception):
        pass

    def hook(*_: object) -> None:
        nonlocal done
        done += 1
        if done == stop + 1:
            raise Killed

    cut.model.encoder.register_forward_pre_hook(hook)
    with pytest.raises(Killed):
        cut.run()
    torch.manual_seed(99)
    resumed = training.resume(DATA, out=tmp_path / "cut", source_embeddings=EmbeddingsFile(vectors))
    resumed.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_resuming_refuses_other_vectors(vectors: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin(vectors, out).run()
    other = tmp_path / "other.txt"
    other.write_text(vectors.read_text().replace("a ", "a 1 ", 1).replace(" -0.785", "", 1))
    training.resume(DATA, out=out, source_embeddings=EmbeddingsFile(vectors))
    for arguments, message in (
        ({"source_embeddings": EmbeddingsFile(other)}, "source must be .* that had other ones"),
        ({"target_embeddings": EmbeddingsFile(vectors)}, "target must be .* that had none"),
    ):
        with pytest.raises(CheckpointError, match=message):
            training.resume(DATA, out=out, **arguments)


def test_another_embedding_size_is_refused(vectors: Path) -> None:
    with pytest.raises(ValueError, match=r"source_embedding_size must be .*, 8, got 6"):
        training.start(
            DATA,
            tokens=("char", "char"),
            model=ModelOptions(source_embedding_size=6),
            options=TrainingOptions(),
            source_embeddings=EmbeddingsFile(vectors),
        )


def test_train_takes_a_file(vectors: Path) -> None:
    pairs = [("ab", "ba"), ("cd", "dc")]
    lines: list[str] = []
    translator = pyseq.train(
        pairs,
        hidden_size=8,
        embedding_size=4,
        epochs=1,
        source_embeddings=vectors,
        target_embeddings=str(vectors),
        tie_embeddings=True,
        freeze_target=None,
        log=lines.append,
    )
    found = EmbeddingsFile(vectors).read(translator.target_vocab)
    weight = translator.model.decoder.output.weight
    assert translator.model.decoder.embedding.weight is weight
    assert torch.equal(weight.detach(), found.matrix)
    assert lines[0].startswith(f"source embeddings: {vectors}: vectors for 4 of 4 words (100.0%)")
    with pytest.raises(DataError, match="not one word of the vocabulary"):
        pyseq.train([("x", "y")], source_embeddings=vectors)


def test_a_vocabulary_and_a_matrix_that_do_not_belong_together_are_refused(
    vectors: Path, tmp_path: Path
) -> None:
    first = begin(vectors)
    first.translator.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    vocab, matrix = first.translator.source_vocab, table(first.model)
    assert config["embeddings"]["source"] == fingerprint(vocab, matrix)
    # Somebody puts in another vocabulary of the same size, and its fingerprint with it.
    path = tmp_path / "source_vocab.json"
    path.write_text(Vocab(reversed(vocab.symbols[4:])).to_json())
    config["fingerprints"][path.name] = checkpoint._fingerprint(path.name, path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="the source vocabulary and the matrix of its embed"):
        Translator.load(tmp_path)
    # Older files do not say what belongs together.
    del config["embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    Translator.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "embeddings": 3}))
    with pytest.raises(CheckpointError, match="not the settings of a pyseq model"):
        Translator.load(tmp_path)


def test_a_matrix_in_memory() -> None:
    vocab = Vocab(WORDS)
    found = from_matrix(WORDS, torch.eye(5), vocab)
    model = pyseq.Seq2Seq(len(vocab), len(vocab), source_embedding_size=5)
    found.copy_to(model.embeddings()["source"], freeze=True)
    assert torch.equal(model.encoder.embedding.weight[4:], torch.eye(5))


def test_commands(vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm", reason="training shows its progress with the extra 'train'")
    pairs, out = tmp_path / "pairs.tsv", tmp_path / "out"
    pairs.write_text("aB\tba\ncd\tdc\n")
    train = ["train", str(pairs), "--out", str(out), "--valid-share", "0", "--threads", "1"]
    given = ["--source-embeddings", str(vectors), "--fold-case", "--embeddings-format", "glove"]
    sizes = ["--hidden-size", "8", "--embedding-size", "4", "--freeze-source", "all"]
    both = [*given, "--target-embeddings", str(vectors)]
    assert cli.main([*train, *both, *sizes, "--epochs", "1"]) == 1
    assert "--embedding-size has no side left to be about" in capsys.readouterr().err
    assert cli.main([*train, *given, *sizes, "--epochs", "1"]) == 0
    assert "vectors for 4 of 4 words (100.0%), 1 of them under another" in capsys.readouterr().err
    translator = Translator.load(out)
    matrix = EmbeddingsFile(vectors, fold_case=True).read(translator.source_vocab).matrix
    assert torch.equal(table(translator.model), matrix)
    assert cli.main([*train, *given, "--resume", "--epochs", "2"]) == 0
    assert torch.equal(table(Translator.load(out).model), matrix)
    capsys.readouterr()
    assert cli.main([*train, "--resume", "--epochs", "3", "--target-embeddings", str(vectors)]) == 1
    assert "embeddings of the target must be those that the run" in capsys.readouterr().err
    assert cli.main([*train, "--resume", "--freeze-source", "2"]) == 1
    assert "--resume goes on with freeze_source = None, got 2" in capsys.readouterr().err
    vectors.write_text("a 1 2\nb 1\n")
    assert cli.main([*train, *given, "--overwrite"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"pyseq: {vectors}:2: expected a word and 2 numbers, got 1 fields after 'b'"


def test_embeddings_are_a_file() -> None:
    with pytest.raises(TypeError, match="embeddings must be a file or an EmbeddingsFile, got int"):
        pyseq.train([("a", "b")], source_embeddings=3)  # type: ignore[arg-type]
