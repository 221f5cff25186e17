# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.checkpoint: round trips, refusals, and kills and full disks in mid-write."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pyseq import checkpoint
from pyseq.errors import CheckpointError
from pyseq.seq2seq import Seq2Seq
from pyseq.text import Vocab

pytest.importorskip("safetensors", reason="saving needs the extra 'train'")

# Fork is how a test gets a process to kill without importing torch again; the child only
# writes files.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


def small_model(symbols: int = 3, **options: object) -> Seq2Seq:
    sizes = {"embedding_size": 4, "hidden_size": 6}
    return Seq2Seq(4 + symbols, 5 + symbols, **(sizes | options))  # type: ignore[arg-type]


def vocabs(symbols: int = 3) -> dict[str, Vocab]:
    return {
        "source_vocab": Vocab("abcdefgh"[:symbols]),
        "target_vocab": Vocab("stuvwxyz"[: symbols + 1]),
    }


def same_weights(a: Seq2Seq, b: Seq2Seq) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score": None, "input_feeding": False},
        {"score": "concat", "cell": "gru", "num_layers": 2, "dropout": 0.3},
        {"score": "dot", "cell": "rnn_relu", "bidirectional": False},
        {"encoder_hidden_size": 2, "encoder_num_layers": 2, "bridge": "tanh"},
        {"target_embedding_size": 6, "tie_embeddings": True},
        {"source_extra_size": 2, "extra_mode": "mlp", "context_every_step": True},
    ],
    ids=["default", "no-attention", "concat-gru", "dot-rnn", "bridge", "tied", "extra"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_round_trip(tmp_path: Path, options: dict[str, object], dtype: torch.dtype) -> None:
    model = small_model(**options).to(dtype)
    tensors = {"rng": torch.arange(5, dtype=torch.uint8), "step": torch.tensor(3.0)}
    state = checkpoint.TrainingState(tensors, {"step": 3, "loss": 0.1})
    checkpoint.save(
        tmp_path / "a" / "b",
        model,
        **vocabs(),
        source_tokens="char",
        target_tokens="word",
        max_length=17,
        training=state,
    )
    saved = checkpoint.load(tmp_path / "a" / "b")
    assert same_weights(saved.model, model)
    assert saved.model.config == model.config
    assert not saved.model.training
    assert (saved.source_vocab, saved.target_vocab) == tuple(vocabs().values())
    assert (saved.source_tokens, saved.target_tokens, saved.max_length) == ("char", "word", 17)
    assert saved.training is not None
    assert saved.training.record == state.record
    assert torch.equal(saved.training.tensors["rng"], tensors["rng"])
    assert next(saved.model.parameters()).dtype == dtype


def test_model_alone(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, small_model())
    saved = checkpoint.load(tmp_path)
    assert saved[1:7] == (None,) * 6
    assert saved.reverse_source is False
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_files_of_the_model_before_go_away_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.save(tmp_path, small_model(), **vocabs())
    checkpoint.save(tmp_path, small_model())
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "notes.txt"]


def test_save_refuses_vocabularies_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source_vocab must have 7 symbols like the model, got 6"):
        checkpoint.save(tmp_path, small_model(), source_vocab=Vocab("ab"))
    assert os.listdir(tmp_path) == []


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, small_model(), **vocabs())
    path = tmp_path / "source_vocab.json"
    symbols = json.loads(path.read_text())
    path.write_text(json.dumps(symbols, indent=4))  # only laid out anew
    checkpoint.load(tmp_path)
    symbols["symbols"].reverse()
    path.write_text(json.dumps(symbols))
    with pytest.raises(CheckpointError, match="not the vocabulary that this model was trained"):
        checkpoint.load(tmp_path)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _edit(**changes: object) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", _truncate, r"model\.safetensors: does not have the fingerprint"),
        ("model.safetensors", os.unlink, r"model\.safetensors: missing"),
        ("source_vocab.json", _truncate, r"source_vocab\.json: does not have the fingerprint"),
        ("source_vocab.json", os.unlink, r"source_vocab\.json: missing"),
        ("config.json", os.unlink, r"no saved model here \(config\.json is missing\)"),
        ("config.json", lambda path: path.write_text("{"), r"config\.json: damaged"),
        (
            "config.json",
            lambda path: path.write_text("[" * 10**5),
            r"config\.json: damaged: nested",
        ),
        (
            "source_vocab.json",
            lambda path: path.write_text("[" * 10**5),
            r"source_vocab\.json: does not have the fingerprint",
        ),
        ("config.json", lambda path: path.write_text("[]"), "not the settings of a pyseq model"),
        ("config.json", _edit(format=99), "format must be 1, got 99"),
        ("config.json", _edit(model="Other"), "the model must be Seq2Seq or .*, got 'Other'"),
        ("config.json", _edit(options={"depth": 3}), "options in config.json do not go with"),
        ("config.json", _edit(reverse_source="false"), "reverse_source must be true or false, got"),
        (
            "config.json",
            _edit(source_tokens="words"),
            "source_tokens must be one of char, .*'words'",
        ),
        ("config.json", _edit(target_tokens=[1]), "target_tokens must be one of char, .*got \\[1"),
        ("config.json", _edit(max_length=0), "max_length must be at least 1, got 0"),
        ("config.json", _edit(max_length=True), "max_length must be at least 1, got True"),
        ("config.json", _edit(source_marks="all"), "source_marks must be one of stop, .*got 'all'"),
        ("config.json", _edit(embeddings=[]), "embeddings must be an object, got"),
        ("config.json", _edit(options={"dropout": "0"}), "option dropout must be float, got '0'"),
        ("config.json", _edit(options={"hidden_size": 6.0}), "hidden_size must be int, got 6.0"),
        ("config.json", _edit(options={"bidirectional": "false"}), "bidirectional must be bool"),
        (
            "config.json",
            _edit(options={"encoder_options": {"layer_norm": 1}}),
            "layer_norm must be",
        ),
        ("config.json", _edit(fingerprints={}), r"does not list model\.safetensors"),
        ("config.json", _edit(fingerprints={"../x": "?"}), "missing, though config.json lists"),
    ],
)
def test_damage_is_refused(
    tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    checkpoint.save(tmp_path, small_model(), **vocabs())
    damage(tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, small_model())
    config = json.loads((tmp_path / "config.json").read_text())
    config["options"]["hidden_size"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"do not go with .*: .*size mismatch"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "options", [{"hidden_size": 60000}, {"num_layers": 10**9}, {"embedding_size": 1 << 40}], ids=str
)
def test_sizes_that_are_wrong_take_no_memory(tmp_path: Path, options: dict[str, int]) -> None:
    checkpoint.save(tmp_path, small_model())
    config = json.loads((tmp_path / "config.json").read_text())
    config["options"] |= options
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"do not go with model.safetensors: "):
        checkpoint.load(tmp_path)


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint.load(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not a folder"):
        checkpoint.load(tmp_path / "file")
    with pytest.raises(FileExistsError):
        checkpoint.save(tmp_path / "file", small_model())


# Kills. Every call that changes the disk counts as one operation.

_OPERATIONS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")


def _die_at(number: int) -> None:
    """Make this process vanish just before its ``number``-th operation on the disk."""
    count = 0

    def wrap(operation: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **keywords: object) -> object:
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)
            return operation(*arguments, **keywords)

        return wrapped

    for name in _OPERATIONS:
        setattr(os, name, wrap(getattr(os, name)))


def _in_child(action: Callable[[], None]) -> int:
    """Run ``action`` in a fork that ends without cleaning up; returns its exit code."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_kill_at_any_operation_leaves_the_old_or_the_new_model(tmp_path: Path) -> None:
    old, new = small_model(2), small_model(3)
    base, found = tmp_path / "base", set()
    checkpoint.save(base, old, **vocabs(2))
    for number in range(1, 200):
        folder = tmp_path / str(number)
        shutil.copytree(base, folder)

        def save(folder: Path = folder, number: int = number) -> None:
            _die_at(number)
            checkpoint.save(folder, new)

        code = _in_child(save)
        saved = checkpoint.load(folder)
        if saved.source_vocab is None:
            assert same_weights(saved.model, new)
        else:
            assert same_weights(saved.model, old)
            assert saved.source_vocab == vocabs(2)["source_vocab"]
        found.add((code, saved.source_vocab is None))
        # Whoever saves next finishes or clears what the kill left behind.
        checkpoint.save(folder, old, **vocabs(2))
        assert sorted(os.listdir(folder)) == sorted(os.listdir(base))
        assert same_weights(checkpoint.load(folder).model, old)
        if code == 0:
            break
    assert code == 0
    assert number > 15
    assert found == {(9, False), (9, True), (0, True)}


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    models = {symbols: small_model(symbols) for symbols in (2, 3)}
    checkpoint.save(tmp_path, models[2], **vocabs(2))

    def save_for_ever() -> None:
        while True:
            for symbols, model in models.items():
                checkpoint.save(tmp_path, model, **vocabs(symbols))

    chance = random.Random(5)
    for _ in range(12):
        child = os.fork()
        if child == 0:
            try:
                save_for_ever()
            finally:
                os._exit(1)
        end = time.monotonic() + chance.uniform(0.02, 0.15)
        loads = 0
        while time.monotonic() < end or not loads:  # reading meanwhile finds no mixture either
            loads += _load_consistent(tmp_path, models)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        _load_consistent(tmp_path, models)


def _load_consistent(path: Path, models: dict[int, Seq2Seq]) -> bool:
    saved = checkpoint.load(path)
    assert saved.source_vocab is not None
    symbols = len(saved.source_vocab) - 4
    assert saved.target_vocab == vocabs(symbols)["target_vocab"]
    assert same_weights(saved.model, models[symbols])
    return True


@pytest.mark.parametrize("number", range(1, 6))
def test_a_full_disk_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    old, count = small_model(2), 0
    checkpoint.save(tmp_path, old, **vocabs(2))
    before = sorted(os.listdir(tmp_path))

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        checkpoint.save(tmp_path, small_model(3), **vocabs(3))
    assert number > 4 or raised.value.filename.startswith(str(tmp_path))
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == before
    assert same_weights(checkpoint.load(tmp_path).model, old)


def test_exists(tmp_path: Path) -> None:
    assert not checkpoint.exists(tmp_path)
    checkpoint.save(tmp_path, small_model())
    assert checkpoint.exists(tmp_path)


def test_remove(tmp_path: Path) -> None:
    checkpoint.remove(tmp_path / "missing")
    checkpoint.save(tmp_path, small_model(), **vocabs())
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.remove(tmp_path)
    assert not checkpoint.exists(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    checkpoint.remove(tmp_path)


def test_tied_weights_are_saved_under_both_names(tmp_path: Path) -> None:
    model = Seq2Seq(7, 8, embedding_size=6, hidden_size=6)
    model.decoder.output.weight = model.decoder.embedding.weight
    checkpoint.save(tmp_path, model)
    loaded = checkpoint.load(tmp_path).model
    assert same_weights(loaded, model)
    assert loaded.decoder.output.weight is not loaded.decoder.embedding.weight
