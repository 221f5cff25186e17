# SPDX-License-Identifier: Apache-2.0
"""The operators that run a decoder on its own tokens, for devices without kernels for them.

Registered for the dispatcher: ``pyseq::generate`` and ``pyseq::scheduled_inputs``, step by step
with the operators that such devices have. No step waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import Library

from ..types import PAD, AttentionState, DecoderState
from .options import SearchOptions
from .protocols import EncodedSource, Step
from .resident import run_resident
from .rules import choose, widened
from .trace import collect

_PER_LAYER = 4  # w_ih, w_hh, b_ih, b_hh


class _How(NamedTuple):
    """How a decoder attends beside its score."""

    weight_history: Tensor | None
    weight_position: Tensor | None
    weight_position_v: Tensor | None
    heads: int
    window: int
    history: str  # or "none"
    order: str
    fed: str

    @property
    def looks_back(self) -> bool:
        """Whether attention looks at the number of the step, or at its last weights."""
        return self.window > 0 or self.history != "none"


@dataclass(frozen=True)
class _Decoder:
    """A decoder as the operators take it, which the searches see as a model that has read its
    sources."""

    embedding: Tensor  # (V, E)
    layers: Sequence[Tensor]
    combine: Tensor | None
    output_weight: Tensor  # (V, H)
    output_bias: Tensor | None
    weight_query: Tensor | None
    weight_v: Tensor | None
    cell: str
    score: str  # or "none"
    input_feeding: bool
    how: _How
    encoded: EncodedSource
    first: DecoderState

    def modules(self) -> Iterator[torch.nn.Module]:
        return iter(())

    def encode_source(self, source: Tensor, lengths: Tensor) -> tuple[EncodedSource, DecoderState]:
        return self.encoded, self.first

    def step(
        self, tokens: Tensor, encoded: EncodedSource, state: DecoderState, *, need_weights: bool
    ) -> Step:
        output, weights, after = self.advance(
            self.embedding[tokens], encoded, state, need_weights=need_weights
        )
        return Step(torch.log_softmax(widened(self.logits(output)), 1), weights, after)

    def logits(self, output: Tensor) -> Tensor:
        return torch.nn.functional.linear(output, self.output_weight, self.output_bias)

    def advance(
        self,
        x: Tensor,
        encoded: EncodedSource,
        state: DecoderState,
        masks: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, DecoderState]:
        """Output (N, H), attention (N, S) and state after reading x (N, E), with the masks
        (L - 1, N, H) of dropout."""
        h, c = state.hidden if isinstance(state.hidden, tuple) else (state.hidden, None)
        if self.score == "none":
            return self._advance_layers(x, h, c, masks)
        how, attention = self.how, state.attention
        step, past = (None, None) if attention is None else attention
        output, attn, h_n, c_n, context, past_n = torch.ops.pyseq.decode(
            x.unsqueeze(0),
            self.layers,
            encoded.keys,
            encoded.memory,
            self.combine,
            self.weight_query,
            self.weight_v,
            h,
            c,
            state.feed,
            encoded.lengths,
            None if masks is None else masks.unsqueeze(1),
            self.cell,
            self.score,
            self.input_feeding,
            need_weights,
            how.weight_history,
            how.weight_position,
            how.weight_position_v,
            step,
            past,
            how.heads,
            how.window,
            how.history,
            how.order,
            how.fed,
        )
        if step is not None:
            attention = AttentionState(step + 1, None if how.history == "none" else past_n)
        after = DecoderState(
            h_n if c is None else (h_n, c_n),
            context if how.fed == "context" else output[0],
            attention,
        )
        return output[0], attn[0] if need_weights else None, after

    def _advance_layers(
        self, x: Tensor, h: Tensor, c: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, None, DecoderState]:
        """The same of layers alone."""
        hs, cs = [], []
        for layer, h_0 in enumerate(h.unbind()):
            if layer > 0 and masks is not None:
                x = x * masks[layer - 1]
            w_ih, w_hh, b_ih, b_hh = self.layers[_PER_LAYER * layer : _PER_LAYER * (layer + 1)]
            c_0 = None if c is None else c[layer]
            y, h_n, c_n, _ = torch.ops.pyseq.scan(
                x.unsqueeze(0),
                w_ih,
                w_hh,
                b_ih,
                b_hh,
                None,
                h_0,
                c_0,
                None,
                None,
                self.cell,
                False,
            )
            x = y[0]
            hs.append(h_n)
            cs.append(c_n)
        h_n = torch.stack(hs)
        return x, None, DecoderState(h_n if c is None else (h_n, torch.stack(cs)), x)


def _decoder(
    embedding: Tensor,
    layers: Sequence[Tensor],
    keys: Tensor | None,
    memory: Tensor | None,
    combine: Tensor | None,
    output_weight: Tensor,
    output_bias: Tensor | None,
    weight_query: Tensor | None,
    weight_v: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    feed: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    score: str,
    input_feeding: bool,
    step: Tensor | None,
    past: Tensor | None,
    how: _How,
) -> _Decoder:
    """With what the operators leave out where it is zero."""
    batch, size = h_0.shape[1:]
    if cell == "lstm" and c_0 is None:
        c_0 = torch.zeros_like(h_0)
    if feed is None:
        fed_size = size if how.fed == "output" or memory is None else memory.shape[2]
        feed = h_0.new_zeros(batch, fed_size)
    attention: AttentionState | None = None
    if how.looks_back:
        step = torch.zeros(batch, dtype=torch.int64, device=h_0.device) if step is None else step
        attention = AttentionState(step, past)
    return _Decoder(
        embedding,
        layers,
        combine,
        output_weight,
        output_bias,
        weight_query,
        weight_v,
        cell,
        score,
        input_feeding,
        how,
        EncodedSource(memory, keys, lengths),
        DecoderState(h_0 if c_0 is None else (h_0, c_0), feed, attention),
    )


def generate(
    embedding: Tensor,
    layers: Sequence[Tensor],
    keys: Tensor | None,
    memory: Tensor | None,
    combine: Tensor | None,
    output_weight: Tensor,
    output_bias: Tensor | None,
    weight_query: Tensor | None,
    weight_v: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    feed: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    score: str,
    input_feeding: bool,
    max_length: int,
    beam_size: int,
    length_penalty: float,
    need_weights: bool,
    min_length: int = 0,
    n_best: int = 1,
    block_ngrams: int = 0,
    prefix: Tensor | None = None,
    weight_history: Tensor | None = None,
    weight_position: Tensor | None = None,
    weight_position_v: Tensor | None = None,
    step: Tensor | None = None,
    past: Tensor | None = None,
    heads: int = 1,
    window: int = 0,
    history: str = "none",
    order: str = "luong",
    fed: str = "output",
    coverage_penalty: float = 0.0,
    sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator of :func:`pyseq.functional.generate`; see ``csrc/search.h``.

    Raises:
        SearchError: the logits are not finite.
    """
    keeps = need_weights and memory is not None
    options = SearchOptions(
        max_length=max_length,
        beam_size=beam_size,
        length_penalty=length_penalty,
        need_weights=keeps,
        min_length=min_length,
        n_best=n_best,
        block_ngrams=block_ngrams or None,
        coverage_penalty=coverage_penalty,
        sample=sample,
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p,
        prefix=_sequences(prefix),
    )
    batch, like = h_0.shape[1], embedding
    positions = 0 if memory is None else memory.shape[0]
    attended = (positions,) if heads == 1 else (heads, positions)
    if batch == 0:
        nothing = like.new_empty((0, 0), dtype=torch.int64)
        attention = like.new_empty((0, 0, *attended) if keeps else 0)
        return nothing, nothing.new_empty(0), like.new_empty(0), attention
    decoder = _decoder(
        embedding,
        layers,
        keys,
        memory,
        combine,
        output_weight,
        output_bias,
        weight_query,
        weight_v,
        h_0,
        c_0,
        feed,
        lengths,
        cell,
        score,
        input_feeding,
        step,
        past,
        _How(
            weight_history,
            weight_position,
            weight_position_v,
            heads,
            window,
            history,
            order,
            fed,
        ),
    )
    source = torch.empty(batch, 0, dtype=torch.int64, device=like.device)
    if lengths is None:
        lengths = torch.full((batch,), positions, device=like.device)
    number = torch.full((), seed, device=like.device) if sample else None
    trace, finished = run_resident(decoder, source, lengths, options, number)
    all_tokens, weights = collect(trace, finished)
    sizes = finished.lengths.flatten()
    longest = int(sizes.max())
    beyond = torch.arange(longest, device=like.device) >= sizes.unsqueeze(1)
    tokens = all_tokens.flatten(0, 1)[:, :longest].masked_fill(beyond, PAD)
    attention = like.new_empty(0)
    if keeps and weights is not None:
        hidden = beyond.view(*beyond.shape, *(1 for _ in attended))
        attention = weights.flatten(0, 1)[:, :longest].masked_fill(hidden, 0)
    return tokens, sizes.clone(), finished.scores.flatten().to(like.dtype), attention.to(like.dtype)


def _sequences(prefix: Tensor | None) -> list[list[int]]:
    """The tokens of each row of a prefix (B, P)."""
    found = []
    for row in [] if prefix is None else prefix.tolist():
        end = row.index(PAD) if PAD in row else len(row)
        if any(row[end:]):
            raise ValueError(
                f"prefix must hold 0 only beyond the end of a row's tokens, got {row} in it"
            )
        found.append(row[:end])
    return found


def scheduled_inputs(
    tokens: Tensor,
    coins: Tensor,
    draws: Tensor | None,
    embedding: Tensor,
    layers: Sequence[Tensor],
    keys: Tensor | None,
    memory: Tensor | None,
    combine: Tensor | None,
    output_weight: Tensor,
    output_bias: Tensor | None,
    weight_query: Tensor | None,
    weight_v: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    feed: Tensor | None,
    lengths: Tensor | None,
    embedding_masks: Tensor | None,
    dropout_masks: Tensor | None,
    output_masks: Tensor | None,
    cell: str,
    score: str,
    input_feeding: bool,
    weight_history: Tensor | None = None,
    weight_position: Tensor | None = None,
    weight_position_v: Tensor | None = None,
    step: Tensor | None = None,
    past: Tensor | None = None,
    heads: int = 1,
    window: int = 0,
    history: str = "none",
    order: str = "luong",
    fed: str = "output",
) -> Tensor:
    """The operator of :func:`pyseq.functional.scheduled_inputs`."""
    decoder = _decoder(
        embedding,
        layers,
        keys,
        memory,
        combine,
        output_weight,
        output_bias,
        weight_query,
        weight_v,
        h_0,
        c_0,
        feed,
        lengths,
        cell,
        score,
        input_feeding,
        step,
        past,
        _How(
            weight_history,
            weight_position,
            weight_position_v,
            heads,
            window,
            history,
            order,
            fed,
        ),
    )
    read, state = tokens.clone(), decoder.first
    for t in range(len(tokens) - 1):
        x = embedding[read[t]]
        if embedding_masks is not None:
            x = x * embedding_masks[t]
        masks = None if dropout_masks is None else dropout_masks[:, t]
        output, _, state = decoder.advance(x, decoder.encoded, state, masks)
        if output_masks is not None:
            output = output * output_masks[t]
        chosen = choose(decoder.logits(output), None if draws is None else draws[t + 1])
        read[t + 1] = torch.where(coins[t + 1], read[t + 1], chosen)
    return read


_LIBRARY = Library("pyseq", "FRAGMENT")
for _operator in (generate, scheduled_inputs):
    _LIBRARY.impl(_operator.__name__, _operator, "CompositeExplicitAutograd")
