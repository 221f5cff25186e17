# SPDX-License-Identifier: Apache-2.0
"""The attention decoder on its own tokens: generate, scheduled_inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_shape
from .._library import _C  # which registers torch.ops.pyseq
from ..errors import SearchError
from ..types import (
    GATES,
    CellName,
    DecoderStart,
    FeedName,
    GenerateOutput,
    HistoryName,
    LayerWeights,
    OrderName,
    ScoreName,
    decoder_parts,
)
from ._attending import attending
from ._common import beside, check_option, flatten, h_and_c
from .keys import check_keys, check_score, core, core_keys

#: What the models of :mod:`pyseq.seq2seq` ask before they call the operators.
search_whole = _C.search_whole


def generate(
    embedding: Tensor,
    layers: Sequence[LayerWeights | tuple[Tensor | None, ...]],
    state: DecoderStart,
    output_weight: Tensor,
    output_bias: Tensor | None = None,
    keys: Tensor | None = None,
    memory: Tensor | None = None,
    combine: Tensor | None = None,
    *,
    max_length: int,
    beam_size: int = 1,
    length_penalty: float = 0.0,
    cell: CellName = "lstm",
    score: ScoreName | None = "dot",
    weight: Tensor | None = None,
    weight_query: Tensor | None = None,
    weight_v: Tensor | None = None,
    lengths: Tensor | None = None,
    input_feeding: bool = True,
    need_weights: bool = False,
    min_length: int = 0,
    n_best: int = 1,
    block_ngrams: int | None = None,
    prefix: Tensor | None = None,
    weight_history: Tensor | None = None,
    weight_position: Tensor | None = None,
    weight_position_v: Tensor | None = None,
    order: OrderName = "luong",
    feed: FeedName = "output",
    heads: int = 1,
    window: int | None = None,
    history: HistoryName | None = None,
    coverage_penalty: float = 0.0,
    sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> GenerateOutput:
    """Search for the likeliest sequences of each row with an attention decoder.

    At every step the decoder of :func:`decode` reads the embedding of the last token, first
    that of ``<start>``, and ``p(token) = softmax(W_o out_t + b)``. What beam search makes of
    it is said at :func:`pyseq.search.beam`; with one hypothesis and no length penalty it is
    greedy search. There is no gradient.

    Args:
        embedding: (V, E), floating-point, of the tokens; 0 is ``<pad>``, 1 ``<start>``,
            2 ``<stop>``.
        layers: as in :func:`decode`, with I equal to E; if score is None, stacked cells
            whose top state is the output, without combination and feeding.
        state: ``(hidden, feed)`` before the first token: h (L, B, H) or for LSTM the pair
            (h, c), and (B, F) or None for zero; with a window or a history as in :func:`decode`.
        output_weight: (V, H), ``W_o``.
        output_bias: (V,). Default: zero.
        keys, memory, combine: as in :func:`decode`; None exactly if score is None.
        max_length: the most tokens to emit, ``<stop>`` included.
        beam_size: unfinished hypotheses to follow in each row.
        length_penalty: the exponent, at least 0; 0 compares plain log-probabilities.
        cell, weight, weight_query, weight_v, lengths, input_feeding: as in :func:`decode`.
        score: as in :func:`decode`, or None for no attention.
        need_weights: also return the attention weights.
        min_length, n_best, block_ngrams: as in :class:`pyseq.search.SearchOptions`.
        prefix: (B, P) int64, tokens that each row begins with, 0 beyond the end of a row's.
        weight_history, weight_position, weight_position_v, order, feed, heads, window, history: as
            in :func:`decode`.
        coverage_penalty: as in :class:`pyseq.search.SearchOptions`.
        sample: draw ``n_best`` sequences of each row; ``beam_size`` is 1 then, and the penalties 0.
        temperature, top_k, top_p: as in :class:`pyseq.search.SearchOptions`, with ``sample``.
        seed: what the draws follow from, besides the number of the row, of the draw in it and of
            the step.

    Returns:
        ``tokens`` (B, T) without ``<start>`` and ``<stop>``, ``lengths`` (B,), ``scores``
        (B,), log P without the length penalty, and ``weights`` (B, T, S), of several heads
        (B, T, N, S), or None. With ``n_best`` above 1 there are B * n_best rows: those of a source
        together, the best one first; what was not found is empty, with a score of minus infinity.

    Raises:
        ValueError: an option is unknown or out of its range, a weight does not go with the
            score, or the state or a layer has the wrong form.
        RuntimeError: a tensor has the wrong shape, dtype or device.
        SearchError: the logits are not finite; a RuntimeError.
        TypeError: what must be a tensor is none.

    Reference:
        As :func:`decode`; Wu et al. 2016, arXiv 1609.08144, eq. 14 (length penalty).
    """
    h_0, c_0, fed, keys, lengths = _own_tokens(
        cell,
        score,
        weight,
        weight_query,
        weight_v,
        keys,
        memory,
        lengths,
        output_weight,
        state,
        heads,
    )
    how = attending(
        state,
        fed,
        weight_history=weight_history,
        weight_position=weight_position,
        weight_position_v=weight_position_v,
        order=order,
        feed=feed,
        heads=heads,
        window=window,
        history=history,
    )
    if coverage_penalty > 0 and score is None:
        raise ValueError(
            "coverage_penalty needs a model with attention, got score None and coverage_penalty "
            f"{coverage_penalty!r}"
        )
    more: dict[str, object] = {}  # to give the operator's defaults takes its time
    if not sample and (temperature, top_k, top_p) != (1.0, None, 1.0):
        raise ValueError(
            "temperature, top_k and top_p go with sample=True, got "
            f"{temperature!r}, {top_k!r} and {top_p!r} without"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k!r}")
    if sample:
        more = {"sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p}
        more["seed"] = seed
    if coverage_penalty != 0:
        more["coverage_penalty"] = coverage_penalty
    tokens, sizes, scores, weights = torch.ops.pyseq.generate(
        embedding,
        flatten(layers),
        keys,
        memory,
        combine,
        output_weight,
        output_bias,
        weight_query,
        weight_v,
        h_0,
        c_0,
        fed,
        beside("lengths", lengths, embedding),
        cell,
        "none" if score is None else core(score),
        input_feeding,
        max_length,
        beam_size,
        length_penalty,
        need_weights,
        min_length,
        n_best,
        block_ngrams or 0,
        prefix,
        *how.arguments,
        **more,
    )
    if any(map(math.isnan, scores.tolist())):
        raise SearchError("the model's logits must be finite, got NaN or infinity")
    kept = need_weights and score is not None
    return GenerateOutput(tokens, sizes, scores, weights if kept else None)


def _own_tokens(
    cell: CellName,
    score: ScoreName | None,
    weight: Tensor | None,
    weight_query: Tensor | None,
    weight_v: Tensor | None,
    keys: Tensor | None,
    memory: Tensor | None,
    lengths: Tensor | None,
    output_weight: Tensor,
    state: DecoderStart,
    heads: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``h_0``, ``c_0``, ``feed``, keys and lengths for an operator that runs a decoder on its
    own tokens, checked."""
    check_option("cell", cell, GATES)
    if score is not None:
        check_score(score, weight, weight_query, weight_v)
    if score is not None and memory is not None and (keys is not None or score == "location"):
        check_keys(score, keys)
        check_shape("output_weight", output_weight, "(V, H)", (-1, -1))
        keys, lengths = core_keys(
            score, keys, memory, lengths, weight, output_weight.shape[1], heads
        )
    parts, fed = decoder_parts(cell, state)
    if not parts:
        raise ValueError("state must hold the hidden state before the first token, got None")
    return *h_and_c(parts), fed, keys, lengths


def scheduled_inputs(
    tokens: Tensor,
    coins: Tensor,
    embedding: Tensor,
    layers: Sequence[LayerWeights | tuple[Tensor | None, ...]],
    state: DecoderStart,
    output_weight: Tensor,
    output_bias: Tensor | None = None,
    keys: Tensor | None = None,
    memory: Tensor | None = None,
    combine: Tensor | None = None,
    *,
    draws: Tensor | None = None,
    cell: CellName = "lstm",
    score: ScoreName | None = "dot",
    weight: Tensor | None = None,
    weight_query: Tensor | None = None,
    weight_v: Tensor | None = None,
    lengths: Tensor | None = None,
    input_feeding: bool = True,
    embedding_masks: Tensor | None = None,
    dropout_masks: Tensor | None = None,
    output_masks: Tensor | None = None,
    weight_history: Tensor | None = None,
    weight_position: Tensor | None = None,
    weight_position_v: Tensor | None = None,
    order: OrderName = "luong",
    feed: FeedName = "output",
    heads: int = 1,
    window: int | None = None,
    history: HistoryName | None = None,
) -> Tensor:
    """What an attention decoder reads that is shown the truth only now and then.

    At every step the decoder of :func:`decode` reads the embedding of a token, the first one of
    ``tokens``, and gives ``p = softmax(W_o out_t + b)``. The next token is that of ``tokens``
    where the coin is true; elsewhere the likeliest one, or if there are draws the first up to
    which the probabilities add up to more than the draw. ``<pad>`` and ``<start>`` are never
    chosen. There is no gradient; :func:`decode` on the result has that of scheduled sampling.

    Args:
        tokens: (T, B) int64, the truth, ``<start>`` first.
        coins: (T, B) bool, whether the truth is read. Those of the first step do not count.
        embedding, layers, state, output_weight, output_bias, keys, memory, combine: as in
            :func:`generate`.
        draws: (T, B), uniform in [0, 1): draw t decides what is read at step t. Default: the
            likeliest token is read.
        cell, score, weight, weight_query, weight_v, lengths, input_feeding: as in
            :func:`generate`.
        embedding_masks: (T, B, E), what the embeddings are multiplied with.
        dropout_masks: (L-1, T, B, H), as in :func:`decode`.
        output_masks: (T, B, H), what the output layer's input is multiplied with.
        weight_history, weight_position, weight_position_v, order, feed, heads, window, history: as
            in :func:`decode`.

    Returns:
        (T, B) int64, what is read. It does not depend on the number of threads.

    Raises:
        ValueError, RuntimeError, TypeError: as :func:`generate`.

    Reference:
        Bengio et al. 2015, arXiv 1506.03099, section 2.4.
    """
    h_0, c_0, fed, keys, lengths = _own_tokens(
        cell,
        score,
        weight,
        weight_query,
        weight_v,
        keys,
        memory,
        lengths,
        output_weight,
        state,
        heads,
    )
    how = attending(
        state,
        fed,
        weight_history=weight_history,
        weight_position=weight_position,
        weight_position_v=weight_position_v,
        order=order,
        feed=feed,
        heads=heads,
        window=window,
        history=history,
    )
    return torch.ops.pyseq.scheduled_inputs(
        tokens,
        coins,
        draws,
        embedding,
        flatten(layers),
        keys,
        memory,
        combine,
        output_weight,
        output_bias,
        weight_query,
        weight_v,
        h_0,
        c_0,
        fed,
        beside("lengths", lengths, embedding),
        embedding_masks,
        dropout_masks,
        output_masks,
        cell,
        "none" if score is None else core(score),
        input_feeding,
        *how.arguments,
    )
