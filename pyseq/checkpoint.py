# SPDX-License-Identifier: Apache-2.0
"""Saved models: a folder with weights, settings and vocabularies, replaced atomically.

Tensors go to safetensors and everything else to JSON, so loading runs no code of the
file. Used by the translator and, with a training state added, by the trainer.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from . import embeddings
from ._checks import read_json
from ._packed import is_quantized
from .devices import AnyDevice, find_device
from .errors import CheckpointError, require
from .labels import Labels
from .recurrent import LayerOptions
from .seq2seq import Seq2Seq
from .seq2seq.options import ClassifierArguments, Seq2SeqArguments, TaggerArguments
from .tagger import AnyModel, Classifier, Tagger
from .text import SOURCE_MARKS, TOKENS, SourceMarks, Vocab

FORMAT = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
SOURCE_VOCAB = "source_vocab.json"
TARGET_VOCAB = "target_vocab.json"
LABELS = "labels.json"
TRAINING_TENSORS = "training.safetensors"
TRAINING_RECORD = "training.json"
_NAMES = (WEIGHTS, SOURCE_VOCAB, TARGET_VOCAB, LABELS, TRAINING_TENSORS, TRAINING_RECORD, CONFIG)

#: What ``config.json`` calls the models.
_MODELS: dict[str, type[AnyModel]] = {
    "Seq2Seq": Seq2Seq,
    "Tagger": Tagger,
    "Classifier": Classifier,
}

#: What their constructors take.
_ARGUMENTS: dict[str, type] = {
    "Seq2Seq": Seq2SeqArguments,
    "Tagger": TaggerArguments,
    "Classifier": ClassifierArguments,
}

#: Options that a model is as deep as.
_DEPTHS = ("num_layers", "encoder_num_layers")


class _Setting(NamedTuple):
    """What ``config.json`` says besides the options of the model."""

    default: Any
    is_valid: Callable[[Any], bool]
    expected: str


_SETTINGS: dict[str, _Setting] = {
    **{
        f"{side}_tokens": _Setting(
            None, lambda value: value is None or value in TOKENS, f"one of {', '.join(TOKENS)}"
        )
        for side in ("source", "target")
    },
    "max_length": _Setting(
        None, lambda value: value is None or (type(value) is int and value >= 1), "at least 1"
    ),
    "reverse_source": _Setting(False, lambda value: isinstance(value, bool), "true or false"),
    "source_marks": _Setting(
        "stop", lambda value: value in SOURCE_MARKS, f"one of {', '.join(SOURCE_MARKS)}"
    ),
    "embeddings": _Setting({}, lambda value: isinstance(value, dict), "an object"),
}

# New files are written to _WRITING, which one rename turns into _COMMITTED; from that
# moment on the new content counts, and moving its files up is housekeeping that whoever
# comes next finishes. So a kill at any moment leaves the old or the new content, whole.
_WRITING = ".writing"
_COMMITTED = ".committed"


class TrainingState(NamedTuple):
    """What a run needs, besides the model, to go on exactly."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]  # JSON values only


class Saved(NamedTuple):
    """What :func:`load` returns; what was not saved is None."""

    model: AnyModel  # in eval mode
    source_vocab: Vocab | None
    target_vocab: Vocab | None
    source_tokens: str | None
    target_tokens: str | None
    max_length: int | None  # tokens that a prediction may have
    training: TrainingState | None
    reverse_source: bool = False  # whether sources are read backwards
    source_marks: SourceMarks = "stop"  # what is put around a source
    labels: Labels | None = None  # of a Tagger or Classifier


def save(
    path: str | Path,
    model: AnyModel,
    *,
    source_vocab: Vocab | None = None,
    target_vocab: Vocab | None = None,
    source_tokens: str | None = None,
    target_tokens: str | None = None,
    max_length: int | None = None,
    training: TrainingState | None = None,
    reverse_source: bool = False,
    source_marks: SourceMarks = "stop",
    labels: Labels | None = None,
) -> None:
    """Save a model as a folder: ``model.safetensors``, ``config.json``, the vocabularies.

    If the folder holds a saved model, it is replaced as a whole: whatever happens on the
    way (a kill, a power cut, a full disk), :func:`load` finds the old model or the new
    one, complete. Other files in the folder are left alone. Parameters that are tied (one
    tensor under two names) are saved under each name, and are equal but untied when loaded.

    Args:
        path: the folder; made if it is missing, with its parents.
        model: the model.
        source_vocab, target_vocab: what its ids mean; of the sizes it was built for.
        source_tokens, target_tokens: how text is split: ``"char"``, ``"space"``, ``"word"``.
        max_length: tokens that a prediction may have.
        training: what a training run needs to go on.
        reverse_source: whether the model reads its sources backwards.
        source_marks: what is put around a source; see :func:`pyseq.text.encode_sources`.
        labels: what the outputs of a Tagger or Classifier mean.

    Raises:
        ValueError: a vocabulary or the labels have another size than the model, or this is
            quantized.
        OSError: the folder cannot be written; what it held is untouched.
        MissingExtraError: safetensors is not installed.
    """
    options = model.config
    weights = model.state_dict()
    if any(map(is_quantized, weights.values())):
        raise ValueError(
            "a quantized model cannot be saved, since its weights fit one instruction set: "
            "save the model that it was made from, and quantize what is loaded"
        )
    files: dict[str, bytes] = {WEIGHTS: _tensor_bytes(weights)}
    for side, name, vocab in (
        ("source", SOURCE_VOCAB, source_vocab),
        ("target", TARGET_VOCAB, target_vocab),
    ):
        if vocab is None:
            continue
        size = options.get(f"{side}_vocab_size")
        if len(vocab) != size:
            raise ValueError(
                f"{side}_vocab must have {size} symbols like the model, got {len(vocab)}"
            )
        files[name] = vocab.to_json().encode()
    if labels is not None:
        if len(labels) != options.get("num_labels"):
            raise ValueError(
                f"labels must be {options.get('num_labels')} like the model's, got {len(labels)}"
            )
        files[LABELS] = labels.to_json().encode()
    if training is not None:
        files[TRAINING_TENSORS] = _tensor_bytes(training.tensors)
        files[TRAINING_RECORD] = _json_bytes(training.record)
    config = {
        "format": FORMAT,
        "model": type(model).__name__,
        "options": options,
        "source_tokens": source_tokens,
        "target_tokens": target_tokens,
        "max_length": max_length,
        "reverse_source": reverse_source,
        "source_marks": source_marks,
        "embeddings": _embedding_fingerprints(
            model, {"source": source_vocab, "target": target_vocab}
        ),
        "fingerprints": {name: _fingerprint(name, data) for name, data in files.items()},
    }
    # config.json goes last: it names the others.
    _replace_files(Path(path), {**files, CONFIG: _json_bytes(config)})


def load(path: str | Path, *, device: AnyDevice = None) -> Saved:
    """Load what :func:`save` wrote, in its parts; :meth:`pyseq.Translator.load` and
    :meth:`pyseq.Labeler.load` make of them what reads text.

    Args:
        path: the folder.
        device: where the model goes, wherever it was saved: ``"cpu"`` or ``"cuda"``, say. What
            belongs to training stays on the CPU. Default: the CPU.

    Raises:
        DeviceError: the model cannot be there.
        CheckpointError: there is no saved model, or a file is missing, damaged, or does
            not have the fingerprint that ``config.json`` gives (a vocabulary of another
            model, say).
        OSError: a file cannot be read.
    """
    path, place = Path(path), find_device(device)
    config, files = _read_files(path)
    model = _build_model(path, config, _read_tensors(path, WEIGHTS, files[WEIGHTS]))
    vocabs: dict[str, Vocab | None] = {}
    for side, name in (("source", SOURCE_VOCAB), ("target", TARGET_VOCAB)):
        vocabs[side] = _read_vocab(path, name, files.get(name))
        size = config["options"].get(f"{side}_vocab_size")
        vocab = vocabs[side]
        if vocab is not None and len(vocab) != size:
            raise CheckpointError(
                f"{path / name}: has {len(vocab)} symbols, but the model was built for {size}"
            )
    _check_embeddings(path, config["embeddings"], model, vocabs)
    labels = _read_labels(path, files.get(LABELS), config["options"].get("num_labels"))
    training = None
    if TRAINING_RECORD in files and TRAINING_TENSORS in files:
        training = TrainingState(
            _read_tensors(path, TRAINING_TENSORS, files[TRAINING_TENSORS]),
            json.loads(files[TRAINING_RECORD]),
        )
    return Saved(
        model.to(place),
        vocabs["source"],
        vocabs["target"],
        config["source_tokens"],
        config["target_tokens"],
        config["max_length"],
        training,
        config["reverse_source"],
        config["source_marks"],
        labels,
    )


def kind(path: str | Path) -> str:
    """What model a folder holds: ``"Seq2Seq"``, ``"Tagger"`` or ``"Classifier"``.

    Raises:
        CheckpointError: there is no saved model, or its settings are damaged.
        OSError: a file cannot be read.
    """
    path = Path(path)
    with _open_folder(path):
        config = _read_config(path)
    return _model_class(path, config).__name__


def exists(path: str | Path) -> bool:
    """Whether the folder holds a saved model."""
    path = Path(path)
    return (path / CONFIG).exists() or (path / _COMMITTED / CONFIG).exists()


def remove(path: str | Path) -> None:
    """Remove the saved model from a folder, if it holds one; other files are left alone.

    Raises:
        OSError: a file cannot be removed.
    """
    path = Path(path)
    if not exists(path):
        return
    with _locked(path, exclusive=True):
        _finish(path)
        # config.json first: without it the others are no model, and whoever saves next
        # clears them away.
        for name in reversed(_NAMES):
            (path / name).unlink(missing_ok=True)
        _sync_folder(path)


def _build_model(path: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> AnyModel:
    build = _model_class(path, config)
    _check_options(path, _ARGUMENTS[build.__name__], config["options"])
    deepest = max((config["options"].get(name) or 0 for name in _DEPTHS), default=0)
    try:
        if deepest > len(weights):
            raise ValueError(f"{deepest} layers, but {len(weights)} tensors")
        # Without memory for it first: sizes that are wrong may be too large for the machine.
        with torch.device("meta"):
            _compare_shapes(build(**config["options"]).state_dict(), weights)
        model = build(**config["options"])
        dtype = next((w.dtype for w in weights.values() if w.is_floating_point()), torch.float32)
        model.to(dtype).load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: the options in {CONFIG} do not go with {WEIGHTS}: {reason}"
        ) from error
    return model.eval()


def _compare_shapes(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless the weights are those of a model with such a state."""
    for name in sorted(expected.keys() ^ weights.keys()):
        raise ValueError(f"{name} is {'missing' if name in expected else 'no weight of it'}")
    for name, tensor in expected.items():
        shape, found = tuple(tensor.shape), tuple(weights[name].shape)
        if shape != found:
            raise ValueError(f"size mismatch for {name}: expected {shape}, got {found}")


def _check_options(path: Path, options: type, given: Mapping[str, Any]) -> None:
    """Refuse a value of another type than an option has; "false" would pass for true.

    Names that are missing or too many are the constructor's affair.
    """
    hints = get_type_hints(options)
    for name, value in given.items():
        hint = hints.get(name)
        parts = get_args(hint) or (hint,)
        if LayerOptions in parts and isinstance(value, dict):
            _check_options(path, LayerOptions, value)
        elif hint is not None and not any(_is_of(value, part) for part in parts):
            shown = getattr(hint, "__name__", None) or str(hint)
            raise CheckpointError(
                f"{path / CONFIG}: the option {name} must be {shown}, got {value!r}"
            )


def _is_of(value: object, kind: object) -> bool:
    """Whether JSON's ``value`` is one of a type; an int is a float, a bool is no number."""
    if kind in (int, float):
        numbers = (int, float) if kind is float else int
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)


def _read_labels(path: Path, data: bytes | None, size: int | None) -> Labels | None:
    if data is None:
        return None
    try:
        labels = Labels.from_json(data.decode())
    except ValueError as error:
        raise CheckpointError(f"{path / LABELS}: not labels: {error}") from error
    if len(labels) != size:
        raise CheckpointError(
            f"{path / LABELS}: has {len(labels)} labels, but the model was built for {size}"
        )
    return labels


def _embedding_fingerprints(model: AnyModel, vocabs: Mapping[str, Vocab | None]) -> dict[str, str]:
    """By side, the fingerprint of a vocabulary together with its matrix."""
    found = {}
    for side, table in model.embeddings().items():
        vocab = vocabs[side]
        if vocab is not None:
            found[side] = embeddings.fingerprint(vocab, table.weight)
    return found


def _check_embeddings(
    path: Path, expected: dict[str, Any], model: AnyModel, vocabs: Mapping[str, Vocab | None]
) -> None:
    """Refuse a vocabulary and a matrix that do not belong together.

    The fingerprints of the files only say that each is one that ``config.json`` lists.
    """
    for side, fingerprint in _embedding_fingerprints(model, vocabs).items():
        if expected.get(side, fingerprint) != fingerprint:  # older files do not say
            raise CheckpointError(
                f"{path}: the {side} vocabulary and the matrix of its embeddings do not have the "
                f"fingerprint that {CONFIG} gives: they are not those that this model was trained "
                "with"
            )


def _model_class(path: Path, config: dict[str, Any]) -> type[AnyModel]:
    name = config.get("model")
    if not isinstance(name, str) or name not in _MODELS:
        raise CheckpointError(
            f"{path / CONFIG}: the model must be {' or '.join(_MODELS)}, got {name!r}"
        )
    return _MODELS[name]


def _read_vocab(path: Path, name: str, data: bytes | None) -> Vocab | None:
    try:
        return None if data is None else Vocab.from_json(data.decode())
    except ValueError as error:
        raise CheckpointError(f"{path / name}: not a vocabulary: {error}") from error


def _read_tensors(path: Path, name: str, data: bytes) -> dict[str, Tensor]:
    safetensors = require("safetensors.torch", extra="train")
    try:
        return safetensors.load(data)
    except require("safetensors", extra="train").SafetensorError as error:
        raise CheckpointError(f"{path / name}: damaged: {error}") from error


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    safetensors = require("safetensors.torch", extra="train")
    # Cloned because safetensors refuses tensors that share memory, as tied weights do.
    clones = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return safetensors.save(clones)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def _fingerprint(name: str, data: bytes) -> str:
    """SHA-256 of a file; of JSON the content only, so that laying it out anew is allowed."""
    if name.endswith(".json"):
        data = json.dumps(read_json(data), sort_keys=True).encode()
    return "sha256:" + hashlib.sha256(data).hexdigest()


# Reading and replacing a set of files.


@contextmanager
def _locked(path: Path, *, exclusive: bool) -> Iterator[None]:
    """Keep other processes from replacing the files of ``path`` meanwhile.

    Some network file systems know no locks; there the fingerprints still tell a reader
    that it met a writer.
    """
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(folder)  # gives up the lock


def _replace_files(path: Path, files: Mapping[str, bytes]) -> None:
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    writing, committed = path / _WRITING, path / _COMMITTED
    with _locked(path, exclusive=True):
        _settle(path)  # what a run that was killed has left
        try:
            writing.mkdir()
            for name, data in files.items():
                _write(writing / name, data)
            _sync_folder(writing)
            os.rename(writing, committed)
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        _sync_folder(path)
        _finish(path)
    for folder in made or [path]:
        _sync_folder(folder.parent)


def settle(path: str | Path) -> None:
    """End what a killed writer of ``path`` had begun: what was complete moves into place, the rest
    goes. Readers see the same content before and after it."""
    path = Path(path)
    with _locked(path, exclusive=True):
        _settle(path)


def _settle(path: Path) -> None:
    _finish(path)
    shutil.rmtree(path / _WRITING, ignore_errors=True)


def _finish(path: Path) -> None:
    """Move committed files into place; the same again after a kill half-way."""
    committed = path / _COMMITTED
    if not committed.is_dir():
        return
    # config.json lists the files of the new model and moves last, so while anything is
    # left to move a second attempt knows them too.
    if (committed / CONFIG).exists():
        listed = {*json.loads((committed / CONFIG).read_bytes())["fingerprints"], CONFIG}
        for name in _NAMES:
            if name not in listed:
                (path / name).unlink(missing_ok=True)
            elif (committed / name).exists():
                os.replace(committed / name, path / name)
        _sync_folder(path)
    committed.rmdir()
    _sync_folder(path)


def _open_folder(path: Path) -> AbstractContextManager[None]:
    """A context in which nobody replaces the files of a folder that must be there."""
    if not path.is_dir():
        reason = "not a folder" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {reason}; a saved model is a folder with {CONFIG}")
    return _locked(path, exclusive=False)


def _read_files(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The content of config.json and of the files that it lists, fingerprints checked."""
    with _open_folder(path):
        config = _read_config(path)
        files = {}
        for name, expected in config["fingerprints"].items():
            content = _read(path, name) if name in _NAMES else None
            if content is None:
                raise CheckpointError(f"{path / name}: missing, though {CONFIG} lists it")
            files[name] = content
            _check_fingerprint(path, name, content, expected)
    if WEIGHTS not in files:
        raise CheckpointError(f"{path / CONFIG}: does not list {WEIGHTS}")
    return config, files


def _read(path: Path, name: str) -> bytes | None:
    """A file of the newest complete content: committed files come before those in place."""
    for place in (path / _COMMITTED / name, path / name):
        try:
            return place.read_bytes()
        except FileNotFoundError:
            continue
    return None


def _read_config(path: Path) -> dict[str, Any]:
    data = _read(path, CONFIG)
    if data is None:
        raise CheckpointError(f"{path}: no saved model here ({CONFIG} is missing)")
    try:
        config = read_json(data)
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG}: damaged: {error}") from error
    if (
        not isinstance(config, dict)
        or not isinstance(config.get("fingerprints"), dict)
        or not isinstance(config.get("options"), dict)
    ):
        raise CheckpointError(f"{path / CONFIG}: not the settings of a pyseq model")
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / CONFIG}: format must be {FORMAT}, got {config.get('format')!r}; "
            "another version of pyseq wrote it"
        )
    for name, (default, is_valid, expected) in _SETTINGS.items():
        value = config.setdefault(name, default)  # older files do not say
        if not is_valid(value):
            raise CheckpointError(
                f"{path / CONFIG}: not the settings of a pyseq model: {name} must be {expected}, "
                f"got {value!r}"
            )
    return config


def _check_fingerprint(path: Path, name: str, data: bytes, expected: object) -> None:
    try:
        matches = _fingerprint(name, data) == expected
    except ValueError:
        matches = False
    if not matches:
        what = (
            "it is not the vocabulary that this model was trained with"
            if name in (SOURCE_VOCAB, TARGET_VOCAB)
            else "it is damaged or belongs to another model"
        )
        raise CheckpointError(
            f"{path / name}: does not have the fingerprint that {CONFIG} gives: {what}"
        )


def _write(path: Path, data: bytes) -> None:
    try:
        with open(path, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        error.filename = str(path)  # a full disk is reported without it
        raise


def _sync_folder(path: Path) -> None:
    """Make renames and new names in ``path`` durable."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
