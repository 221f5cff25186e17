# SPDX-License-Identifier: Apache-2.0
"""A search with the encoder and the bridge in one call, past Python and the dispatcher."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..bridge import Bridge
from ..functional import generation
from ..nn import GRU, LSTM, RNN, AttentionDecoder
from ..nn._common import all_are_hooked
from ..nn._whole import is_whole
from ..search import SearchOptions
from .decoder import Decoder
from .encoder import Encoder

if TYPE_CHECKING:
    from .model import Seq2Seq

#: Bridges that make a state of the encoder's, and nothing else.
_BRIDGES = ("copy", "linear", "tanh", "relu")
_LARGEST = 2**63 - 1  # int64
#: What a search in one call makes no use of, of a decoder and of the layers in it.
_LEFT_OUT = ("generate", "is_fused", "start", "project", "layer_weights")


def _fit(
    encoder: Encoder, layers: GRU | LSTM | RNN, bridge: Bridge, decoder: AttentionDecoder
) -> bool:
    """Whether cells and states of the parts are what the others take them for: each may have been
    put in the place of another."""
    size = (layers.proj_size or layers.hidden_size) * (2 if layers.bidirectional else 1)
    return (
        layers.bidirectional == encoder.bidirectional
        and layers.cell == encoder.cell == bridge.encoder_cell
        and layers.num_layers == bridge.encoder_layers
        and size == bridge.encoder_size
        and decoder.cell == bridge.cell
        and decoder.num_layers == bridge.decoder_layers
        and decoder.hidden_size == bridge.decoder_size
    )


def search_whole(
    model: Seq2Seq,
    source: Tensor,
    lengths: Tensor,
    options: SearchOptions,
    prefix: Tensor | None,
    seed: int,
) -> list[tuple[list[int], float, Tensor | None]] | None:
    """What :func:`pyseq.functional.generate` finds for ``model`` as it is in eval mode,
    whatever its own, where nothing looks on: around the operators Python takes longer than they do
    for one short sentence. None if they have to be called.

    Args:
        source, lengths, options: as :func:`pyseq.search.search` takes them.
        prefix: (B, P), as :func:`pyseq.functional.generate` takes it.
        seed: what draws follow from, with ``options.sample``.

    Returns:
        Tokens, score and weights of ``n_best`` results for each row.
    """
    # By the dictionaries: found by name a module takes four times as long.
    parts = model._modules
    encoder, bridge, decoder = parts.get("encoder"), parts.get("bridge"), parts.get("decoder")
    if (
        type(encoder) is not Encoder
        or type(bridge) is not Bridge
        or type(decoder) is not Decoder
        or encoder.constant
        or bridge.kind not in _BRIDGES
        or decoder.context_size is not None
        or is_dynamo_compiling()
        or all_are_hooked()
    ):
        return None
    reading, writing = encoder._modules, decoder._modules
    read, layers = reading["embedding"], reading["rnn"]
    embedding, rnn, output = writing["embedding"], writing["rnn"], writing["output"]
    if (
        not (reading.get("extra") is writing.get("extra") is writing.get("copying") is None)
        or type(read) is not torch.nn.Embedding
        or type(embedding) is not torch.nn.Embedding
        # Looking up with a largest norm would change the weights.
        or not (read.max_norm is embedding.max_norm is None)
        or not (type(layers) is LSTM or type(layers) is GRU or type(layers) is RNN)
        or not layers._plain
        or layers.batch_first
        or type(rnn) is not AttentionDecoder
        or rnn.batch_first
        or not (rnn.window is rnn.history is None)
        or type(output) is not torch.nn.Linear
        or not _fit(encoder, layers, bridge, rnn)
        or not vars(decoder).keys().isdisjoint(_LEFT_OUT)
        or not vars(rnn).keys().isdisjoint(_LEFT_OUT)
    ):
        return None
    attending = rnn._modules
    score, combine = attending.get("score"), attending.get("combine")
    heads = 1
    decoding: tuple[torch.nn.Module, ...] = (embedding, rnn, output)
    if score is not None:
        if not is_whole(score) or type(combine) is not torch.nn.Linear:
            return None
        heads, decoding = score.heads, (*decoding, score, combine)
    block_ngrams, top_k = options.block_ngrams or 0, options.top_k or 0
    if max(options.max_length, options.beam_size, options.n_best, block_ngrams, top_k) > _LARGEST:
        return None
    return generation.search_whole(
        (model, encoder, decoder),
        (read, layers),
        layers._all_weights,
        bridge,
        decoding,
        rnn._names,
        source,
        lengths,
        encoder.cell,
        encoder.bidirectional,
        bridge.kind,
        bridge.c_from_h,
        rnn.num_layers,
        rnn.hidden_size,
        rnn.cell,
        rnn.order,
        rnn.feed,
        heads,
        rnn.input_feeding,
        options.max_length,
        options.beam_size,
        options.length_penalty,
        options.need_weights,
        options.min_length,
        options.n_best,
        block_ngrams,
        prefix,
        options.coverage_penalty,
        options.sample,
        options.temperature,
        top_k,
        options.top_p,
        seed,
    )
