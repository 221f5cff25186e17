# SPDX-License-Identifier: Apache-2.0
"""The ``lstm`` models of fairseq."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..translator import Translator
from ._layout import (
    Parts,
    Side,
    Stack,
    Weights,
    build,
    make_side,
    read_symbols,
    take_cells,
    take_stack,
    translator,
)
from ._pickles import attributes, load_dictionary

_LAYOUT = "fairseq (lstm)"

# Every dictionary begins with these, which its file does not hold.
_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
_PAD, _STOP, _UNK = 1, 2, 3


def read(
    path: Path, *, source_vocab: Path | None = None, target_vocab: Path | None = None
) -> Translator:
    """A model that ``fairseq-train --arch lstm...`` saved.

    Args:
        path: the file, ``checkpoint_best.pt``.
        source_vocab, target_vocab: the dictionaries, ``dict.xx.txt``.

    Raises:
        CheckpointError: it is of another layout, or has a part that pyseq does not have.
        OSError: a file cannot be read.
    """
    content = load_dictionary(path, "model", layout=_LAYOUT)
    weights = Weights(content["model"], path=path, layout=_LAYOUT)
    options = attributes(content.get("args")) or attributes(
        attributes(content.get("cfg")).get("model")
    )
    if options.get("decoder_residuals") or options.get("residuals"):
        raise weights.refuse("pyseq's decoder has no residual connections between its layers")
    weights.drop("encoder.version", "decoder.version")

    encoder = take_stack(weights, "encoder.lstm.")
    decoder = take_cells(weights, "decoder.layers.")
    source_table = weights.take("encoder.embed_tokens.weight")
    target_table = weights.take("decoder.embed_tokens.weight")
    if "decoder.attention.input_proj.weight" not in weights:
        raise weights.refuse(
            "it feeds its output back without attention, which pyseq's decoder does with "
            "attention alone"
        )
    bridge, bridge_weights = _bridge(weights, encoder)
    output, output_bias = _output(weights, target_table)
    parts = Parts(
        encoder,
        decoder,
        _side(source_vocab, len(source_table), path),
        _side(target_vocab, len(target_table), path),
        source_table,
        target_table,
        output,
        output_bias,
        bridge=bridge,
        bridge_weights=bridge_weights,
        score="general",
        # (W q) . m here, q . (W m) there.
        score_weights={"weight": weights.take("decoder.attention.input_proj.weight").t()},
        combine=weights.take("decoder.attention.output_proj.weight"),
        input_feeding=True,
    )
    if encoder.layers != decoder.layers:
        raise weights.refuse(
            f"encoder and decoder must have as many layers, got {encoder.layers} and "
            f"{decoder.layers}"
        )
    return translator(build(weights, parts), parts, source_marks="stop")


def _bridge(weights: Weights, encoder: Stack) -> tuple[str, dict[str, Tensor]]:
    """The same linear map for every layer, if the sizes differ."""
    if "decoder.encoder_hidden_proj.weight" not in weights:
        return "copy", {}
    found = {}
    for part, name in (("h", "hidden"), ("c", "cell")):
        weight = weights.take(f"decoder.encoder_{name}_proj.weight")
        found[f"weight_{part}"] = torch.block_diag(*[weight] * encoder.layers)
        bias = weights.take(f"decoder.encoder_{name}_proj.bias")
        found[f"bias_{part}"] = bias.repeat(encoder.layers)
    return "linear", found


def _output(weights: Weights, table: Tensor) -> tuple[Tensor, Tensor | None]:
    """The output layer; two linear maps in a row are one."""
    weight: Tensor = table
    bias: Any = None
    if "decoder.fc_out.weight" in weights:
        weight = weights.take("decoder.fc_out.weight")
        bias = weights.take("decoder.fc_out.bias")
    if "decoder.additional_fc.weight" in weights:
        inner = weights.take("decoder.additional_fc.bias")
        bias = weight @ inner if bias is None else weight @ inner + bias
        weight = weight @ weights.take("decoder.additional_fc.weight")
    return weight, bias


def _side(file: Path | None, count: int, path: Path) -> Side:
    """A dictionary; what a target begins with is the symbol that ends it."""
    lines = read_symbols(file)
    symbols = None
    if lines is not None:
        # Each line is a symbol and how often it was seen, perhaps marked as a double.
        symbols = _SPECIALS + [
            line.removesuffix(" #fairseq:overwrite").rpartition(" ")[0] for line in lines
        ]
    return make_side(
        symbols,
        count,
        pad=_PAD,
        start=None,
        stop=_STOP,
        unk=_UNK,
        path=file or path,
        begin=_STOP,
    )
