# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.importers: files that are damaged or of no layout, and where outputs end."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy
import pytest
import torch

from pyseq.errors import CheckpointError
from pyseq.importers import read_model
from pyseq.importers._pickles import load_pickle


def _damaged() -> dict[str, bytes]:
    whole = io.BytesIO()
    torch.save({"model": {"w": torch.ones(2)}}, whole, _use_new_zipfile_serialization=False)
    return {
        "empty": b"",
        "noise": b"\x80\x02R.",
        "cut": whole.getvalue()[:-5],
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
