# SPDX-License-Identifier: Apache-2.0
"""The specification of the operators that run a decoder on its own tokens.

Beside ``pyseq.reference``, which has them by name too: these stand on the searches of
``pyseq.search``, that on nothing but torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import search
from .reference import decode, linear, score_keys, stack_step, with_weight
from .search import EncodedSource, Hypothesis, SearchOptions, Step
from .search.followed import follow
from .types import (
    PAD,
    AttentionState,
    CellName,
    DecoderStart,
    DecoderState,
    FeedName,
    GenerateOutput,
    HistoryName,
    LayerWeights,
    OrderName,
    ScoreName,
    attention_parts,
    decoder_parts,
    join_parts,
)


def _start(cell: CellName, state: DecoderStart, memory: Tensor | None) -> DecoderState:
    """The whole of ``state``; what is fed is of the size of ``memory``, if there is one."""
    parts, feed = decoder_parts(cell, state)
    batch, size = parts[0].shape[1:]
    if feed is None:
        feed = parts[0].new_zeros(batch, size if memory is None else memory.shape[2])
    step, past = attention_parts(state)
    if step is None:
        step = torch.zeros(batch, dtype=torch.int64, device=feed.device)
    return DecoderState(join_parts(parts), feed, AttentionState(step, past))


def _plain_step(
    cell: CellName,
    layers: Sequence[LayerWeights],
    x: Tensor,
    before: DecoderState,
    masks: Tensor | None,
) -> tuple[Tensor, DecoderState]:
    """One step without attention: the top state, and the state after the step."""
    h_0, c_0 = (*decoder_parts(cell, before)[0], before.feed.unsqueeze(0))[:2]
    h, c = list(h_0.unbind(0)), list(c_0.expand_as(h_0).unbind(0))
    stack_step(cell, layers, x, h, c, masks)
    h_n = torch.stack(h)
    hidden = (h_n, torch.stack(c)) if cell == "lstm" else h_n
    return h[-1], DecoderState(hidden, h[-1])


class _Steps(NamedTuple):
    """What the searches see of :func:`generate`: a model that is encoded already."""

    encoded: EncodedSource
    state: DecoderState
    advance: Callable[[Tensor, EncodedSource, DecoderState], Step]

    def modules(self) -> Iterator[torch.nn.Module]:
        return iter(())

    def encode_source(self, source: Tensor, lengths: Tensor) -> tuple[EncodedSource, DecoderState]:
        return self.encoded, self.state

    def step(
        self, tokens: Tensor, encoded: EncodedSource, state: DecoderState, *, need_weights: bool
    ) -> Step:
        return self.advance(tokens, encoded, state)


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
    """Greedy or beam search, step by step; see :func:`pyseq.functional.generate`."""
    weights_of = [LayerWeights(*layer) for layer in layers]
    first = _start(cell, state, memory if feed == "context" else None)
    batch = first.feed.shape[0]
    core: ScoreName = "concat" if score == "concat" else "dot"
    if score is not None:
        assert memory is not None
        keys = score_keys(score, keys, memory, lengths, weight, heads)
        lengths = with_weight(score, lengths, weight, memory)
    if memory is not None and lengths is None:
        lengths = torch.full((batch,), memory.shape[0], device=memory.device)

    def advance(tokens: Tensor, encoded: EncodedSource, before: DecoderState) -> Step:
        x = embedding[tokens]
        weights: Tensor | None = None
        if score is None:
            output, after = _plain_step(cell, weights_of, x, before, None)
        else:
            assert encoded.keys is not None
            assert encoded.memory is not None
            assert combine is not None
            decoded = decode(
                x.unsqueeze(0),
                weights_of,
                encoded.keys,
                encoded.memory,
                combine,
                cell=cell,
                score=core,
                weight_query=weight_query,
                weight_v=weight_v,
                state=before,
                lengths=encoded.lengths,
                input_feeding=input_feeding,
                need_weights=need_weights,
                weight_history=weight_history,
                weight_position=weight_position,
                weight_position_v=weight_position_v,
                order=order,
                feed=feed,
                heads=heads,
                window=window,
                history=history,
            )
            output, after = decoded.output[0], decoded.state
            weights = None if decoded.weights is None else decoded.weights[0]
        log_probs = torch.log_softmax(linear(output, output_weight, output_bias), -1)
        return Step(log_probs, weights, after)

    model = _Steps(EncodedSource(memory, keys, lengths), first, advance)
    source_lengths = torch.zeros(batch, dtype=torch.int64) if lengths is None else lengths
    source = source_lengths.new_zeros(batch, 0)  # which is encoded already
    options = SearchOptions(
        max_length=max_length,
        beam_size=beam_size,
        length_penalty=length_penalty,
        min_length=min_length,
        n_best=n_best,
        block_ngrams=block_ngrams,
        coverage_penalty=coverage_penalty,
        sample=sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        prefix=[] if prefix is None else [[t for t in row if t != PAD] for row in prefix.tolist()],
    )
    nothing = Hypothesis([], -math.inf, None)
    if sample:
        searched = follow(model, source, source_lengths, options, torch.tensor(seed))
    else:
        searched = search.search(model, source, source_lengths, options)
    found = [
        hypothesis for best in searched for hypothesis in (*best, *[nothing] * (n_best - len(best)))
    ]
    sizes = [len(hypothesis.tokens) for hypothesis in found]
    tokens = torch.full((len(found), max(sizes, default=0)), PAD)
    kept = None
    if need_weights and memory is not None:
        per_head = (heads,) if heads > 1 else ()
        kept = memory.new_zeros(*tokens.shape, *per_head, memory.shape[0])
    for row, hypothesis in enumerate(found):
        tokens[row, : sizes[row]] = torch.tensor(hypothesis.tokens, dtype=torch.int64)
        if kept is not None and hypothesis.weights is not None:
            kept[row, : sizes[row], ..., : source_lengths[row // n_best]] = hypothesis.weights
    scores = embedding.new_tensor([hypothesis.score for hypothesis in found])
    return GenerateOutput(tokens, torch.tensor(sizes, dtype=torch.int64), scores, kept)


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
    """What scheduled sampling reads, step by step; see
    :func:`pyseq.functional.scheduled_inputs`."""
    weights_of = [LayerWeights(*layer) for layer in layers]
    before = _start(cell, state, memory if feed == "context" else None)
    fed = tokens.clone()
    for t in range(len(tokens) - 1):
        x = embedding[fed[t]]
        if embedding_masks is not None:
            x = x * embedding_masks[t]
        masks = None if dropout_masks is None else dropout_masks[:, t]
        if score is None:
            output, before = _plain_step(cell, weights_of, x, before, masks)
        else:
            assert memory is not None
            assert combine is not None
            decoded = decode(
                x.unsqueeze(0),
                weights_of,
                keys,
                memory,
                combine,
                cell=cell,
                score=score,
                weight=weight,
                weight_query=weight_query,
                weight_v=weight_v,
                state=before,
                lengths=lengths,
                input_feeding=input_feeding,
                dropout_masks=None if masks is None else masks.unsqueeze(1),
                weight_history=weight_history,
                weight_position=weight_position,
                weight_position_v=weight_position_v,
                order=order,
                feed=feed,
                heads=heads,
                window=window,
                history=history,
            )
            output, before = decoded.output[0], decoded.state
        if output_masks is not None:
            output = output * output_masks[t]
        chosen = search.choose(
            linear(output, output_weight, output_bias), None if draws is None else draws[t + 1]
        )
        fed[t + 1] = torch.where(coins[t + 1], fed[t + 1], chosen)
    return fed
