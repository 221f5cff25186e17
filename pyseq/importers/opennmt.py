# SPDX-License-Identifier: Apache-2.0
"""Recurrent models of OpenNMT-py, 1.x to 3.x."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..translator import Translator
from ._layout import (
    Parts,
    Side,
    Stack,
    Weights,
    build,
    named_side,
    read_symbols,
    take_cells,
    take_stack,
    translator,
)
from ._pickles import attributes, find, load_dictionary

_LAYOUT = "OpenNMT-py"

_TABLE = "embeddings.make_embedding.emb_luts.0.weight"
_NAMES = {"pad": "<blank>", "start": "<s>", "stop": "</s>", "unk": "<unk>"}
_SOURCE_IDS = {"pad": 1, "start": None, "stop": None, "unk": 0}
_TARGET_IDS = {"pad": 1, "start": 2, "stop": 3, "unk": 0}


def read(
    path: Path, *, source_vocab: Path | None = None, target_vocab: Path | None = None
) -> Translator:
    """A model that ``onmt_train`` saved.

    Args:
        path: the file, ``..._step_N.pt``.
        source_vocab, target_vocab: files of symbols, one a line in the order of their ids, where
            those in the checkpoint cannot be read.

    Raises:
        CheckpointError: it is of another layout, or has a part that pyseq does not have.
        OSError: a file cannot be read.
    """
    content = load_dictionary(path, "model", layout=_LAYOUT)
    tensors = dict(content["model"])
    for name, value in (content.get("generator") or {}).items():
        # A linear layer alone, or the first one of a sequence.
        tensors[f"generator.{name.removeprefix('0.')}"] = value
    weights = Weights(tensors, path=path, layout=_LAYOUT)
    options = attributes(content.get("opt"))
    _refuse_options(weights, options)

    encoder = take_stack(weights, "encoder.rnn.")
    input_feeding = "decoder.rnn.layers.0.weight_ih" in weights
    if input_feeding:
        decoder = take_cells(weights, "decoder.rnn.layers.")
    else:
        decoder = take_stack(weights, "decoder.rnn.")
    source_table = weights.take(f"encoder.{_TABLE}")
    target_table = weights.take(f"decoder.{_TABLE}")
    score, score_weights = _score(weights)
    bridge, bridge_weights = _bridge(weights, encoder)
    parts = Parts(
        encoder,
        decoder,
        _side(content, "src", source_vocab, len(source_table), path),
        _side(content, "tgt", target_vocab, len(target_table), path),
        source_table,
        target_table,
        weights.take("generator.weight"),
        weights.take("generator.bias"),
        bridge=bridge,
        bridge_weights=bridge_weights,
        score=score,
        score_weights=score_weights,
        combine=None if score is None else weights.take("decoder.attn.linear_out.weight"),
        combine_bias=weights.take("decoder.attn.linear_out.bias") if score == "concat" else None,
        combine_tanh=score != "concat",
        # The query's there: one sum, whichever side has it.
        key_bias=weights.take("decoder.attn.linear_query.bias") if score == "concat" else None,
        input_feeding=input_feeding,
    )
    return translator(build(weights, parts), parts, source_marks="none")


def _refuse_options(weights: Weights, options: dict[str, Any]) -> None:
    """Refuse what changes the output and shows in no weight."""
    for name, allowed in (
        ("global_attention_function", ("softmax",)),
        ("generator_function", ("softmax", "log_softmax")),
        ("position_encoding", (False,)),
        ("copy_attn", (False,)),
        ("coverage_attn", (False,)),
    ):
        value = options.get(name, allowed[0])
        if value not in allowed:
            raise weights.refuse(f"pyseq has no {name} = {value!r}")


def _score(weights: Weights) -> tuple[str | None, dict[str, torch.Tensor]]:
    """Name and weights of the score; ``mlp`` is concat."""
    if "decoder.attn.linear_query.weight" in weights:
        return "concat", {
            "weight_query": weights.take("decoder.attn.linear_query.weight"),
            "weight_memory": weights.take("decoder.attn.linear_context.weight"),
            "weight_v": weights.take("decoder.attn.v.weight").squeeze(0),
        }
    if "decoder.attn.linear_in.weight" in weights:
        # (W q) . m here, q . (W m) there.
        return "general", {"weight": weights.take("decoder.attn.linear_in.weight").t()}
    return ("dot" if "decoder.attn.linear_out.weight" in weights else None), {}


def _bridge(weights: Weights, encoder: Stack) -> tuple[str, dict[str, torch.Tensor]]:
    """``relu(W s + b)``, where with two directions s is each half of the layers in turn."""
    if "encoder.bridge.0.weight" not in weights:
        return "copy", {}
    halves = 2 if encoder.bidirectional else 1
    found = {}
    for index, part in enumerate(("h", "c") if encoder.cell == "lstm" else ("h",)):
        weight = weights.take(f"encoder.bridge.{index}.weight")
        found[f"weight_{part}"] = torch.block_diag(*[weight] * halves)
        found[f"bias_{part}"] = weights.take(f"encoder.bridge.{index}.bias").repeat(halves)
    return "relu", found


def _side(content: dict[str, Any], side: str, file: Path | None, count: int, path: Path) -> Side:
    symbols = read_symbols(file)
    if symbols is None:
        symbols = _symbols(content.get("vocab"), side)
    ids = _SOURCE_IDS if side == "src" else _TARGET_IDS
    names, begin = dict(_NAMES), None
    start = attributes(content.get("vocab")).get("decoder_start_token") or _NAMES["start"]
    if side == "tgt" and symbols is not None and start != _NAMES["start"]:  # 3.x may choose it
        if start not in symbols:
            raise CheckpointError(
                f"{file or path}: the target has no symbol {start!r}, with which the decoder starts"
            )
        if start == _NAMES["stop"]:
            names["start"], begin = "", symbols.index(start)
        else:
            names["start"] = str(start)
    return named_side(symbols, count, names=names, ids=ids, path=file or path, begin=begin)


def _symbols(vocab: Any, side: str) -> list[str] | None:
    """The symbols of one side: a list of them (3.x), in a field (2.x), in a pair (1.x)."""
    if isinstance(vocab, (list, tuple)):
        vocab = {pair[0]: pair[1] for pair in vocab if isinstance(pair, tuple) and len(pair) == 2}
    own = attributes(vocab).get(side)
    if isinstance(own, (list, tuple)) and own and all(isinstance(each, str) for each in own):
        return list(own)
    for itos in find(own, "itos"):
        if isinstance(itos, list) and all(isinstance(each, str) for each in itos):
            return itos
    return None
