# SPDX-License-Identifier: Apache-2.0
"""Recurrent models of JoeyNMT."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..translator import Translator
from ._layout import (
    Parts,
    Side,
    Stack,
    Weights,
    build,
    named_side,
    read_symbols,
    take_stack,
    translator,
)
from ._pickles import load_dictionary

_LAYOUT = "JoeyNMT (recurrent)"

InitialState = Literal["zero", "last"]

_NAMES = {"pad": "<pad>", "start": "<s>", "stop": "</s>", "unk": "<unk>"}
_IDS = {"pad": 1, "start": 2, "stop": 3, "unk": 0}


def read(
    path: Path,
    *,
    source_vocab: Path | None = None,
    target_vocab: Path | None = None,
    initial_state: InitialState | None = None,
    scaled_embeddings: bool = False,
) -> Translator:
    """A model that ``joeynmt train`` saved.

    Args:
        path: the file, ``best.ckpt``.
        source_vocab, target_vocab: ``src_vocab.txt`` and ``trg_vocab.txt``.
        initial_state: ``init_hidden`` of the configuration, for a model without a bridge; the
            checkpoint does not say.
        scaled_embeddings: ``scale`` of the embeddings in the configuration: they are multiplied
            by the root of their size.

    Raises:
        CheckpointError: it is of another layout, or has a part that pyseq does not have.
        OSError: a file cannot be read.
    """
    content = load_dictionary(path, "model_state", layout=_LAYOUT)
    weights = Weights(content["model_state"], path=path, layout=_LAYOUT)
    encoder = take_stack(weights, "encoder.rnn.")
    decoder = take_stack(weights, "decoder.rnn.")
    if encoder.cell != decoder.cell:
        raise weights.refuse(
            f"pyseq reads models whose encoder and decoder have the same cell, got {encoder.cell} "
            f"and {decoder.cell}"
        )
    tables = [weights.take(f"{side}_embed.lut.weight") for side in ("src", "trg")]
    if scaled_embeddings:
        tables = [table * math.sqrt(table.shape[1]) for table in tables]
    source_table, target_table = tables
    bridge, bridge_weights = _bridge(weights, encoder, decoder, initial_state)
    score, score_weights = _score(weights)
    # Columns [state; context] there, [context; state] here.
    combine = weights.take("decoder.att_vector_layer.weight")
    combine = torch.cat([combine[:, decoder.hidden_size :], combine[:, : decoder.hidden_size]], 1)
    parts = Parts(
        encoder,
        decoder,
        _side(source_vocab, len(source_table), path),
        _side(target_vocab, len(target_table), path),
        source_table,
        target_table,
        weights.take("decoder.output_layer.weight"),
        None,
        bridge=bridge,
        bridge_weights=bridge_weights,
        # An LSTM's c begins like its h.
        bridge_c_from_h=decoder.cell == "lstm" and bridge != "zero",
        score=score,
        score_weights=score_weights,
        combine=combine,
        combine_bias=weights.take("decoder.att_vector_layer.bias"),
        input_feeding=decoder.input_size != target_table.shape[1],
    )
    return translator(build(weights, parts), parts, source_marks="stop")


def _score(weights: Weights) -> tuple[str, dict[str, Tensor]]:
    keys = weights.take("decoder.attention.key_layer.weight")
    if "decoder.attention.energy_layer.weight" not in weights:
        return "general", {"weight": keys}
    return "concat", {
        "weight_memory": keys,
        "weight_query": weights.take("decoder.attention.query_layer.weight"),
        "weight_v": weights.take("decoder.attention.energy_layer.weight").squeeze(0),
    }


def _bridge(
    weights: Weights, encoder: Stack, decoder: Stack, initial_state: InitialState | None
) -> tuple[str, dict[str, Tensor]]:
    """What starts every layer of the decoder: made of the top state h of the encoder alone."""
    size, states = encoder.output_size, encoder.layers * encoder.output_size
    if "decoder.bridge_layer.weight" in weights:
        if initial_state is not None:
            raise weights.refuse(
                f"its decoder starts from a bridge (decoder.bridge_layer): leave the initial state "
                f"out, got {initial_state!r}"
            )
        kind = "tanh"
        weight = weights.take("decoder.bridge_layer.weight")
        bias = weights.take("decoder.bridge_layer.bias")
    elif initial_state == "zero":
        return "zero", {}
    elif initial_state == "last":
        kind = "linear"
        # Of two directions the first, if both together are too long.
        weight = torch.eye(decoder.hidden_size, size)
        bias = torch.zeros(decoder.hidden_size)
        if size not in (decoder.hidden_size, 2 * decoder.hidden_size):
            raise weights.refuse(
                f"the encoder's state must have {decoder.hidden_size} numbers or twice as many, "
                f"got {size}"
            )
    else:
        raise weights.refuse(
            "it has no bridge, and the checkpoint does not say what the decoder starts from: give "
            "the initial state, zero or last, that init_hidden of its configuration names"
        )
    whole = torch.zeros(decoder.hidden_size, states)
    whole[:, states - size :] = weight  # the top layer is last
    whole, bias = whole.repeat(decoder.layers, 1), bias.repeat(decoder.layers)
    parts = ("h", "c") if decoder.cell == "lstm" else ("h",)
    return kind, {
        f"{name}_{part}": value
        for part in parts
        for name, value in (("weight", whole), ("bias", bias))
    }


def _side(file: Path | None, count: int, path: Path) -> Side:
    return named_side(read_symbols(file), count, names=_NAMES, ids=_IDS, path=file or path)
