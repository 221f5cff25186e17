# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.importers: files that are damaged or of no layout, and where outputs end."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy
import pytest
import torch

from pyseq.errors import CheckpointError
from pyseq.importers import read_layers, read_model
from pyseq.importers._pickles import load_pickle


class _Command:
    """Would be run by a loader that runs what is in a file."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


def _damaged() -> dict[str, bytes]:
    whole, archive, command = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"model": {"w": torch.ones(2)}}, whole, _use_new_zipfile_serialization=False)
    torch.save({"model": {"w": torch.ones(2)}}, archive)
    torch.save({"model": _Command()}, command)
    return {
        "empty": b"",
        "noise": b"\x80\x02R.",
        "cut": whole.getvalue()[:-5],
        "cut-archive": archive.getvalue()[:-200],
        "command": command.getvalue(),
        "pickle": pickle.dumps({"model": {}}),
        "text": b"a\tb\n",
    }


@pytest.mark.parametrize("kind", _damaged())
def test_files_that_are_no_checkpoints(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(_damaged()[kind])
    with pytest.raises(CheckpointError, match=r"no file of torch\.save") as refused:
        load_pickle(path)
    text = str(refused.value)
    assert not text.endswith(": ")
    assert "\n" not in text
    # torch's advice is to run what is in the file.
    assert "weights_only" not in text


def test_a_dictionary_without_anything_is_named(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="with the weights in 'model', got nothing"):
        read_model("opennmt", tmp_path / "file.pt")


def test_an_archive_without_arrays(tmp_path: Path) -> None:
    torch.save({"enc_emb": torch.ones(2)}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="not a file of numpy arrays: it holds"):
        read_model("g2p-en", tmp_path / "file.pt")


def test_numpy_gives_no_advice(tmp_path: Path) -> None:
    (tmp_path / "file.npz").write_bytes(pickle.dumps({"enc_emb": 1}))
    with pytest.raises(CheckpointError, match="not a file of numpy arrays") as refused:
        read_model("g2p-en", tmp_path / "file.npz")
    assert "allow_pickle=" not in str(refused.value)


def test_g2p_en_puts_out_twenty_phonemes_at_most(tmp_path: Path) -> None:
    size = 4
    arrays = {"enc_emb": torch.ones(29, 3), "dec_emb": torch.ones(74, 3)}
    for side in ("enc", "dec"):
        for name, tensor in torch.nn.GRUCell(3, size).state_dict().items():
            kind, part = name.split("_")
            arrays[f"{side}_{kind[0]}_{part}"] = tensor
    bias = torch.zeros(74)
    bias[7] = 99.0  # never an end
    arrays |= {"fc_w": torch.zeros(74, size), "fc_b": bias}
    path = tmp_path / "checkpoint20.npz"
    numpy.savez(path, allow_pickle=False, **{name: x.numpy() for name, x in arrays.items()})
    assert len(read_model("g2p-en", path)("word").split()) == 20


LAYERS = torch.nn.GRU(3, 4).state_dict()
BAD_LAYERS: dict[str, tuple[dict[object, object], str]] = {
    "no-recurrent-weights": ({"weight_ih_l0": torch.ones(12, 3)}, "weight_hh_l0 is missing"),
    "of-a-cell": ({"weight_ih": torch.ones(12, 3)}, "weight_hh is missing"),
    "no-tensor": ({"weight_ih_l0": "x"}, "weight_ih_l0 is missing"),
    "integers": (
        {**LAYERS, "weight_hh_l0": torch.ones(12, 4, dtype=torch.int8)},
        "weight_hh_l0 must be floating-point numbers, got torch.int8",
    ),
    "other-names": ({**LAYERS, 3: torch.ones(1), "foo": torch.ones(1)}, "no place for 3, foo"),
}


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_layers_that_are_none(case: str) -> None:
    state, match = BAD_LAYERS[case]
    with pytest.raises(CheckpointError, match=match):
        read_layers(state)  # type: ignore[arg-type]
