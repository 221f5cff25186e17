# SPDX-License-Identifier: Apache-2.0
"""The network of g2p-en, arrays of numpy that spell English words."""

from __future__ import annotations

import string
from pathlib import Path

import numpy
import torch

from .._checks import numpy_reason
from ..errors import CheckpointError
from ..translator import Translator
from ._layout import Parts, Stack, Weights, build, make_side, read_symbols, translator

GRAPHEMES: tuple[str, ...] = ("<pad>", "<unk>", "</s>", *string.ascii_lowercase)

_MOST_PHONEMES = 20  # that g2p-en puts out for a word

_VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW"
_CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH"
#: A vowel comes in three stresses, and UW without any too.
PHONEMES: tuple[str, ...] = (
    "<pad>",
    "<unk>",
    "<s>",
    "</s>",
    *sorted(
        [f"{vowel}{stress}" for vowel in _VOWELS.split() for stress in "012"]
        + ["UW", *_CONSONANTS.split()]
    ),
)


def read(
    path: Path, *, source_vocab: Path | None = None, target_vocab: Path | None = None
) -> Translator:
    """The network in ``checkpoint20.npz`` of the package g2p-en.

    Args:
        path: the file.
        source_vocab, target_vocab: files of symbols, one a line, for a checkpoint of this
            layout with other ones than g2p-en's.

    Raises:
        CheckpointError: it is of another layout.
        OSError: the file cannot be read.
    """
    try:
        with numpy.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except OSError:
        raise
    except Exception as error:  # numpy parses archives and headers: it may be any
        raise CheckpointError(
            f"{path}: not a file of numpy arrays: {numpy_reason(error)}"
        ) from error
    for name, array in found.items():  # other archives hold bytes
        if not isinstance(array, numpy.ndarray):
            raise CheckpointError(f"{path}: not a file of numpy arrays: it holds {name}")
    tensors = {name: torch.from_numpy(array.copy()) for name, array in found.items()}
    weights = Weights(tensors, path=path, layout="g2p-en")
    source_table, target_table = weights.take("enc_emb"), weights.take("dec_emb")
    source = read_symbols(source_vocab) or list(GRAPHEMES)
    target = read_symbols(target_vocab) or list(PHONEMES)
    parts = Parts(
        _stack(weights, "enc"),
        _stack(weights, "dec"),
        make_side(
            source, len(source_table), pad=0, start=None, stop=2, unk=1, path=source_vocab or path
        ),
        make_side(
            target, len(target_table), pad=0, start=2, stop=3, unk=1, path=target_vocab or path
        ),
        source_table,
        target_table,
        weights.take("fc_w"),
        weights.take("fc_b"),
    )
    return translator(
        build(weights, parts),
        parts,
        source_marks="stop",
        tokens=("char", "space"),
        max_length=_MOST_PHONEMES,
    )


def _stack(weights: Weights, side: str) -> Stack:
    found = {
        f"{kind}_{name}_l0": weights.take(f"{side}_{short}_{name}")
        for name in ("ih", "hh")
        for kind, short in (("weight", "w"), ("bias", "b"))
    }
    (rows, hidden_size), inputs = found["weight_hh_l0"].shape, found["weight_ih_l0"].shape[1]
    if rows != 3 * hidden_size:
        raise weights.refuse(f"{side}_w_hh must be that of a GRU, got {rows} x {hidden_size}")
    return Stack("gru", 1, False, inputs, hidden_size, found)
