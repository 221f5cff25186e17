# SPDX-License-Identifier: Apache-2.0
"""What a user of torch alone would write instead: packing, and loops of torch.nn modules.

They share the parameters of the modules of pyseq that they stand in for, so that results and
gradients compare by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pyseq.nn import AttentionDecoder
from pyseq.seq2seq import Seq2Seq
from pyseq.types import PAD, START, STOP


def run_packed(layer: torch.nn.Module, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Output (T, B, .) and last state of a layer of torch.nn; lengths (B,) in any order."""
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, state = layer(packed)
    return pad_packed_sequence(output, total_length=x.shape[0])[0], state


def compile_for_one_shape(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.compile`` of a function, for the shapes that it will be called with first."""
    # What was compiled before for other shapes must not make these sizes variable ones.
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


class Attended(NamedTuple):
    """What every step attends to."""

    keys: Tensor  # (B, S, H)
    memory: Tensor  # (B, S, M)
    padding: Tensor | None  # (B, S), True where there is nothing

    def select(self, rows: Tensor) -> Attended:
        """The given rows, which may repeat."""
        return Attended(
            self.keys.index_select(0, rows),
            self.memory.index_select(0, rows),
            None if self.padding is None else self.padding.index_select(0, rows),
        )


class LoopState(NamedTuple):
    """What one step hands to the next, each (B, H)."""

    h: Tensor
    c: Tensor
    feed: Tensor

    def select(self, rows: Tensor) -> LoopState:
        """The given rows, which may repeat."""
        return LoopState(*(part.index_select(0, rows) for part in self))


class LoopDecoder(torch.nn.Module):
    """A :class:`pyseq.nn.AttentionDecoder` as a loop of modules.

    Args:
        decoder: whose parameters to use; one LSTM layer, general score, input feeding.
    """

    def __init__(self, decoder: AttentionDecoder) -> None:
        super().__init__()
        assert decoder.combine is not None
        assert decoder.score is not None
        weight = decoder.score.weight
        assert isinstance(weight, torch.nn.Parameter)
        hidden, memory = decoder.hidden_size, decoder.memory_size
        self.cell = torch.nn.LSTMCell(decoder.input_size + hidden, hidden)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(self.cell, name, getattr(decoder, f"{name}_l0"))
        self.key = torch.nn.Linear(memory, hidden, bias=False)
        self.key.weight = weight
        self.combine = decoder.combine

    def prepare(self, memory: Tensor, lengths: Tensor | None = None) -> Attended:
        """What to attend to in memory (S, B, M)."""
        memory = memory.transpose(0, 1).contiguous()
        if lengths is None:
            return Attended(self.key(memory), memory, None)
        padding = torch.arange(memory.shape[1]) >= lengths.unsqueeze(1)
        return Attended(self.key(memory), memory, padding)

    def step(self, x: Tensor, attended: Attended, state: LoopState) -> LoopState:
        """One step of x (B, I)."""
        h, c = self.cell(torch.cat((x, state.feed), 1), (state.h, state.c))
        scores = torch.bmm(attended.keys, h.unsqueeze(2)).squeeze(2)
        if attended.padding is not None:
            scores = scores.masked_fill(attended.padding, -torch.inf)
        weights = torch.softmax(scores, 1).unsqueeze(1)
        context = torch.bmm(weights, attended.memory).squeeze(1)
        return LoopState(h, c, torch.tanh(self.combine(torch.cat((context, h), 1))))

    def forward(self, x: Tensor, attended: Attended, state: LoopState | None = None) -> Tensor:
        """Outputs (T, B, H) of x (T, B, I), from a state of zeros unless one is given."""
        if state is None:
            zeros = x.new_zeros(x.shape[1], self.cell.hidden_size)
            state = LoopState(zeros, zeros, zeros)
        outputs = []
        for row in x.unbind(0):
            state = self.step(row, attended, state)
            outputs.append(state.feed)
        return torch.stack(outputs)


class LoopSeq2Seq(torch.nn.Module):
    """A :class:`pyseq.Seq2Seq` of modules of torch.nn.

    Args:
        model: whose parameters to use; without dropout, one LSTM layer each, the encoder
            bidirectional, general score, input feeding.
    """

    def __init__(self, model: Seq2Seq) -> None:
        super().__init__()
        config = model.config
        self.source_embedding = model.encoder.embedding
        self.encoder = torch.nn.LSTM(
            config["embedding_size"], config["hidden_size"] // 2, bidirectional=True
        )
        for name, parameter in model.encoder.rnn.named_parameters():
            setattr(self.encoder, name, parameter)
        self.target_embedding = model.decoder.embedding
        assert isinstance(model.decoder.rnn, AttentionDecoder)
        self.decoder = LoopDecoder(model.decoder.rnn)
        self.output = model.decoder.output

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Attended, LoopState]:
        """What to attend to in source (B, S), and the first state."""
        x = self.source_embedding(source.t())
        memory, (h, c) = run_packed(self.encoder, x, lengths)
        h, c = (torch.cat(tuple(part), 1) for part in (h, c))
        return self.decoder.prepare(memory, lengths), LoopState(h, c, torch.zeros_like(h))

    def forward(self, source: Tensor, lengths: Tensor, target_in: Tensor) -> Tensor:
        """Logits (B, T, V), as those of the model."""
        attended, state = self.encode(source, lengths)
        x = self.target_embedding(target_in.t())
        return self.output(self.decoder(x, attended, state).transpose(0, 1))

    def log_probs(
        self, tokens: Tensor, attended: Attended, state: LoopState
    ) -> tuple[Tensor, LoopState]:
        """Of the next tokens, (B, V), after tokens (B,), and the next state."""
        state = self.decoder.step(self.target_embedding(tokens), attended, state)
        log_probs = torch.log_softmax(self.output(state.feed), 1)
        log_probs[:, [PAD, START]] = -torch.inf
        return log_probs, state

    @torch.no_grad()
    def greedy(self, source: Tensor, lengths: Tensor, *, max_length: int) -> Tensor:
        """Log-probability (B,) of the sequence of likeliest tokens."""
        attended, state = self.encode(source, lengths)
        tokens = torch.full_like(lengths, START)
        scores, ended = torch.zeros(len(lengths)), torch.zeros(len(lengths), dtype=torch.bool)
        for _ in range(max_length):
            log_probs, state = self.log_probs(tokens, attended, state)
            values, tokens = log_probs.max(1)
            scores += values.masked_fill(ended, 0)
            ended |= tokens == STOP
            if ended.all():
                break
        return scores

    @torch.no_grad()
    def beam(self, source: Tensor, lengths: Tensor, *, max_length: int, beam_size: int) -> Tensor:
        """Log-probability (B,) of the best of ``beam_size`` hypotheses a row; those that end stay
        in the beam."""
        batch = len(lengths)
        attended, state = self.encode(source, lengths)
        every = torch.arange(batch).repeat_interleave(beam_size)
        attended, state = attended.select(every), state.select(every)
        tokens = torch.full((batch * beam_size,), START)
        # At first the hypotheses of a row are the same one, which must count once.
        scores = torch.full((batch, beam_size), -torch.inf)
        scores[:, 0] = 0
        ended = torch.zeros(batch * beam_size, dtype=torch.bool)
        first = beam_size * torch.arange(batch).unsqueeze(1)
        for _ in range(max_length):
            log_probs, state = self.log_probs(tokens, attended, state)
            log_probs[ended] = -torch.inf
            log_probs[ended, PAD] = 0
            flat = (scores.unsqueeze(2) + log_probs.view(batch, beam_size, -1)).flatten(1)
            scores, index = flat.topk(beam_size)
            vocab = log_probs.shape[1]
            rows, tokens = (first + index // vocab).flatten(), (index % vocab).flatten()
            state, ended = state.select(rows), ended[rows] | (tokens == STOP)
            if ended.all():
                break
        return scores[:, 0]
