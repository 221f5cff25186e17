# SPDX-License-Identifier: Apache-2.0
"""The character models of Stanza: its sequence-to-sequence lemmatizers and word expanders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..translator import Translator
from ._layout import Parts, Stack, Weights, build, make_side, read_symbols, take_stack, translator
from ._pickles import find, load_dictionary

_LAYOUT = "Stanza (seq2seq)"

_PAD, _UNK, _START, _STOP = 0, 1, 2, 3


def read(
    path: Path, *, source_vocab: Path | None = None, target_vocab: Path | None = None
) -> Translator:
    """A model of ``Seq2SeqModel``, which reads and writes characters of one vocabulary.

    Args:
        path: the file.
        source_vocab: a file of symbols, one a line in the order of their ids, where those in
            the checkpoint cannot be read.
        target_vocab: the same under another name; not both.

    Raises:
        CheckpointError: it is of another layout, or has a part that pyseq does not have.
        OSError: a file cannot be read.
    """
    content = load_dictionary(path, "model", layout=_LAYOUT)
    weights = Weights(content["model"], path=path, layout=_LAYOUT)
    if "pos_embedding.weight" in weights:
        raise weights.refuse("its source begins with a part of speech, and pyseq's is text alone")
    if "edit_clf.0.weight" in weights:
        raise weights.refuse("it decides between copying and rewriting, which pyseq does not")

    weights.drop("SOS_tensor")  # the id of the start, in some versions

    encoder = take_stack(weights, "encoder.")
    cell = {
        f"{kind}_l0": weights.take(f"decoder.lstm_cell.{kind}")
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    hidden_size, embedding_size = cell["weight_hh_l0"].shape[1], cell["weight_ih_l0"].shape[1]
    decoder = Stack("lstm", 1, False, embedding_size, hidden_size, cell)
    table = weights.take("embedding.weight")
    score, score_weights, key_bias = _score(weights)
    symbols = read_symbols(source_vocab or target_vocab) or _symbols(content.get("vocab"))
    side = make_side(
        symbols,
        len(table),
        pad=_PAD,
        start=_START,
        stop=_STOP,
        unk=_UNK,
        path=source_vocab or target_vocab or path,
    )
    # Of the top layer, the backward direction first.
    half, states = encoder.hidden_size, encoder.layers * encoder.output_size
    turned = torch.zeros(hidden_size, states)
    turned[:half, states - half :] = torch.eye(half)
    turned[half:, states - 2 * half : states - half] = torch.eye(half)
    zeros = torch.zeros(hidden_size)
    parts = Parts(
        encoder,
        decoder,
        side,
        side,
        table,
        table,
        weights.take("dec2vocab.weight"),
        weights.take("dec2vocab.bias"),
        bridge="linear",
        bridge_weights={"weight_h": turned, "weight_c": turned, "bias_h": zeros, "bias_c": zeros},
        score=score,
        score_weights=score_weights,
        combine=weights.take("decoder.attention_layer.linear_out.weight"),
        key_bias=key_bias,
    )
    model = build(weights, parts)
    return translator(model, parts, source_marks="both", tokens=("char", "char"))


def _score(weights: Weights) -> tuple[str, dict[str, torch.Tensor], torch.Tensor | None]:
    """Name and weights of the score, and the bias of its keys."""
    prefix = "decoder.attention_layer."
    if f"{prefix}linear_c.weight" in weights:
        return (
            "concat",
            {
                "weight_query": weights.take(f"{prefix}linear_in.weight"),
                "weight_memory": weights.take(f"{prefix}linear_c.weight"),
                "weight_v": weights.take(f"{prefix}linear_v.weight").squeeze(0),
            },
            weights.take(f"{prefix}linear_c.bias"),
        )
    for name, kind in (("linear.weight", "linear"), ("linear_v.weight", "deep")):
        if prefix + name in weights:
            raise weights.refuse(f"pyseq has no attention of the kind {kind!r}")
    # (W q) . m here, q . (W m) there.
    return "general", {"weight": weights.take(f"{prefix}linear_in.weight").t()}, None


def _symbols(vocab: Any) -> list[str] | None:
    """The characters, in the record of a vocabulary or of several by name."""
    if isinstance(vocab, dict) and "char" in vocab:
        vocab = vocab["char"]
    for symbols in find(vocab, "_id2unit"):
        if isinstance(symbols, list) and all(isinstance(each, str) for each in symbols):
            return symbols
    return None
