# SPDX-License-Identifier: Apache-2.0
"""Seq2Seq: an encoder, an attention decoder and a vocabulary's worth of logits.

Built of ``nn``; trained by ``training``, searched by ``search``. Token ids come in
batch-first; everything between the embeddings and the logits is time-major.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional, search
from ._checks import check_like, check_positive, check_shape
from ._dropout import apply_dropout
from .bridge import Bridge
from .copying import Copying
from .extra import Conditions, ExtraInformation, ExtraOptions, check_extra
from .nn import GRU, LSTM, RNN, AttentionDecoder, AttentionOptions, Score, cell_name
from .scheduled import Sampling
from .search import (
    EncodedSource,
    FusedSearch,
    Hypothesis,
    SearchModel,
    SearchOptions,
    Step,
    StreamedToken,
)
from .types import (
    PAD,
    UNK,
    CellName,
    Copies,
    DecoderOutput,
    DecoderStart,
    DecoderState,
    GenerateOutput,
    State,
    kind,
    state_parts,
)

__all__ = ["Decoder", "Encoder", "Seq2Seq"]


def _check_source(source: Tensor, embedding: torch.nn.Embedding | torch.nn.Linear) -> None:
    """Raise unless ``source`` is what ``embedding`` reads: token ids or features."""
    if isinstance(embedding, torch.nn.Linear):
        check_shape("source", source, "(B, S, D)", (-1, -1, embedding.in_features))
        check_like("source", source, "the encoder's weights", embedding.weight)
    else:
        _check_tokens("source", source)


def _check_tokens(name: str, tokens: Tensor) -> None:
    if tokens.dim() != 2:
        raise RuntimeError(f"{name} must be 2-D token ids, batch first, got {tuple(tokens.shape)}")


def valid_steps(lengths: Tensor, like: Tensor) -> Tensor:
    """(B, S) bool on the device of ``like`` (B, S, ...): whether each step is no padding."""
    steps = torch.arange(like.shape[1], device=like.device)
    return steps < lengths.to(like.device).unsqueeze(1)


def _last_steps(x: Tensor, lengths: Tensor) -> Tensor:
    """(T, B, Z) to (B, Z): the last valid step of each row, the first where there is none."""
    last = lengths.to(x.device).clamp(min=1) - 1
    return x[last, torch.arange(x.shape[1], device=x.device)]


def _recurrent(
    cell: CellName,
    input_size: int,
    hidden_size: int,
    num_layers: int,
    *,
    bidirectional: bool,
    dropout: float,
) -> RNN | GRU | LSTM:
    dropout = dropout if num_layers > 1 else 0.0  # it is between layers
    if cell == "lstm":
        return LSTM(
            input_size, hidden_size, num_layers, dropout=dropout, bidirectional=bidirectional
        )
    if cell == "gru":
        return GRU(
            input_size, hidden_size, num_layers, dropout=dropout, bidirectional=bidirectional
        )
    return RNN(
        input_size,
        hidden_size,
        num_layers,
        nonlinearity=cell.removeprefix("rnn_"),
        dropout=dropout,
        bidirectional=bidirectional,
    )


def _is_plain(module: torch.nn.Module, kind: type[torch.nn.Module]) -> bool:
    """Whether calling the module is its class's ``forward`` and nothing else, on weights that
    the operators can read: those of other classes of tensors may compute otherwise."""
    return (
        type(module) is kind
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and all(
            type(weight) is torch.nn.Parameter and weight.is_cpu and weight.is_floating_point()
            for weight in module._parameters.values()
            if weight is not None
        )
    )


class Encoder(torch.nn.Module):
    """Embedding and recurrent layers: the memory is the output of the top layer.

    Args:
        vocab_size: V, number of source tokens; None with ``features``.
        embedding_size: features of a token.
        hidden_size: H, features of the memory; with both directions H/2 each.
        num_layers: L.
        cell: as in :class:`pyseq.nn.AttentionDecoder`.
        bidirectional: run each layer in both directions.
        dropout: probability of zeroing a feature of an embedding, of what goes from one
            layer to the next, and of the memory, in training.
        features: D, where the source is no tokens but vectors of D numbers, such as frames of
            speech or the outputs of another model (ELMo, BERT).
        extra: how extra information enters, if it does: into the states of the top layer, or
            with the place ``"input"`` into what the bottom layer reads.
        constant: give the memory one more feature, which is 1.

    Attributes:
        embedding: the table of the tokens, or the linear map ``W x + b`` of the features, to
            embedding_size numbers a step.

    Raises:
        ValueError: an option is unknown or a size is out of its range.
    """

    embedding: torch.nn.Embedding | torch.nn.Linear

    def __init__(
        self,
        vocab_size: int | None,
        *,
        embedding_size: int,
        hidden_size: int,
        num_layers: int = 1,
        cell: str = "lstm",
        bidirectional: bool = True,
        dropout: float = 0.0,
        features: int | None = None,
        extra: ExtraOptions | None = None,
        constant: bool = False,
    ) -> None:
        super().__init__()
        if (vocab_size is None) == (features is None):
            raise ValueError(
                "the encoder reads either tokens or features: exactly one of the number of source "
                f"tokens and the number of features must be given, got {vocab_size!r} and "
                f"{features!r}"
            )
        check_positive(
            embedding_size=embedding_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
        )
        if bidirectional and hidden_size % 2:
            raise ValueError(
                "hidden_size must be even for a bidirectional encoder, which has half of it "
                f"in each direction, got {hidden_size}"
            )
        self.dropout = dropout
        self.bidirectional = bidirectional
        self.constant = constant
        if vocab_size is not None:
            check_positive(vocab_size=vocab_size)
            self.embedding = torch.nn.Embedding(vocab_size, embedding_size, padding_idx=PAD)
        else:
            check_positive(features=features)
            assert features is not None
            self.embedding = torch.nn.Linear(features, embedding_size)
        self.cell = cell_name(cell)
        self.rnn = _recurrent(
            self.cell,
            embedding_size,
            hidden_size // 2 if bidirectional else hidden_size,
            num_layers,
            bidirectional=bidirectional,
            dropout=dropout,
        )
        self.extra: ExtraInformation | None = None
        self.extra_at_input = extra is not None and extra.place == "input"
        if extra is not None:
            self.extra = extra.build(embedding_size if self.extra_at_input else hidden_size)

    def _join_directions(self, part: Tensor) -> Tensor:
        """(L*D, B, H/D) to (L, B, H), each layer's directions side by side."""
        if not self.bidirectional:
            return part
        layers = part.shape[0] // 2
        return part.reshape(layers, 2, *part.shape[1:]).transpose(1, 2).flatten(2)

    def _without_padding(self, source: Tensor, lengths: Tensor) -> Tensor:
        """``source``, with features of padding as zeros: a NaN there would reach the gradient."""
        if source.dim() == 2:
            return source
        return source.masked_fill(~valid_steps(lengths, source).unsqueeze(2), 0.0)

    def forward(
        self, source: Tensor, lengths: Tensor, extra: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Encode ``source``.

        Args:
            source: (B, S) int64, token ids; or (B, S, D), features in the dtype of the
                weights, where what lies in the padding does not matter.
            lengths: (B,) int64, valid steps of each row, on any device.
            extra: extra information (B, Z), or (S, B, Z), where what lies in the padding does
                not matter.

        Returns:
            The memory (S, B, H), or (S, B, H + 1) with ``constant``, zero at padding, and the
            last state: h (L, B, H), or for LSTM (h, c), the directions side by side. Extra
            information at the output enters the h of the top layer like the memory; that of each
            step by its last valid one.

        Raises:
            RuntimeError: a tensor has the wrong shape, dtype or device.
        """
        _check_source(source, self.embedding)
        x = self.embedding(self._without_padding(source, lengths).transpose(0, 1))
        x = apply_dropout(x, self.dropout, self.training)
        check_extra("source_extra", self.extra, extra, rows=x.shape[1], steps=x.shape[0])
        if extra is not None and extra.dim() == 3:
            extra = extra.masked_fill(~valid_steps(lengths, source).t().unsqueeze(2), 0.0)
        if self.extra is not None and extra is not None and self.extra_at_input:
            x = self.extra(x, extra)
        memory, state = self.rnn(x, lengths=lengths)
        parts = [self._join_directions(part) for part in state_parts(self.cell, state)]
        if self.extra is not None and extra is not None and not self.extra_at_input:
            valid = valid_steps(lengths, source).t().unsqueeze(2)
            memory = self.extra(memory, extra).masked_fill(~valid, 0.0)
            last = extra if extra.dim() == 2 else _last_steps(extra, lengths)
            top = self.extra(parts[0][-1:], last)
            parts[0] = torch.cat([parts[0][:-1], top])
        memory = apply_dropout(memory, self.dropout, self.training)
        if self.constant:
            ones = valid_steps(lengths, source).t().unsqueeze(2).to(memory.dtype)
            memory = torch.cat([memory, ones], 2)
        return memory, parts[0] if len(parts) == 1 else (parts[0], parts[1])


class _Masks(NamedTuple):
    """What dropout multiplies with in one pass of a decoder; None where nothing is dropped."""

    embedding: Tensor | None  # (T, B, E)
    layers: Tensor | None  # (L-1, T, B, H), the outputs of all layers but the last
    output: Tensor | None  # (T, B, H)

    def step(self, t: int) -> _Masks:
        """Those of one step."""
        return _Masks(
            None if self.embedding is None else self.embedding[t : t + 1],
            None if self.layers is None else self.layers[:, t : t + 1],
            None if self.output is None else self.output[t : t + 1],
        )


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


_GLOBAL = AttentionOptions()


class Decoder(torch.nn.Module):
    """Embedding, :class:`pyseq.nn.AttentionDecoder` and the linear layer to the logits.

    Args:
        vocab_size: V, number of target tokens.
        embedding_size: features of a token.
        hidden_size: H, units of each layer.
        num_layers, cell, score, input_feeding: as in :class:`pyseq.nn.AttentionDecoder`.
        dropout: probability of zeroing a feature of an embedding, of what goes from one
            layer to the next, and of the output, in training.
        memory_size: M, features of the memory. Default: H.
        tie_embeddings: one matrix serves as embedding and as weight of the output layer;
            embedding_size must be H.
        context_size: C, numbers of a context that the first layer reads at every step besides
            the embedding. Default: it reads none.
        extra: how extra information enters, if it does: into what the output layer reads, or
            with the place ``"input"`` into the embeddings.
        attention: how the decoder attends, beside the score.
        coverage_loss: what the coverage loss is multiplied with in :meth:`loss`, in training;
            above 0 it needs a score.
        copy: ``"pointer"`` or ``"joint"``, to copy tokens of the source too, which needs a
            score; see :class:`pyseq.copying.Copying`. What is predicted then are
            log-probabilities, and tokens beyond the vocabulary are read as ``<unk>``.

    Raises:
        ValueError: an option is unknown or a size is out of its range.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        embedding_size: int,
        hidden_size: int,
        num_layers: int = 1,
        cell: str = "lstm",
        score: str | None = "general",
        input_feeding: bool = True,
        dropout: float = 0.0,
        memory_size: int | None = None,
        tie_embeddings: bool = False,
        context_size: int | None = None,
        extra: ExtraOptions | None = None,
        copy: str | None = None,
        attention: AttentionOptions = _GLOBAL,
        coverage_loss: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= coverage_loss < math.inf or (coverage_loss > 0 and score is None):
            raise ValueError(
                f"coverage_loss must be at least 0, and 0 without a score, got {coverage_loss!r}"
            )
        self.coverage_loss = coverage_loss
        check_positive(vocab_size=vocab_size, embedding_size=embedding_size)
        if context_size is not None:
            check_positive(context_size=context_size)
        if copy is not None and score is None:
            raise ValueError(f"copy needs a score, since it looks at the memory, got {copy!r}")
        if tie_embeddings and embedding_size != hidden_size:
            raise ValueError(
                "tie_embeddings needs a target embedding of hidden_size numbers, the input of the "
                f"output layer: {hidden_size}, got {embedding_size}"
            )
        self.dropout = dropout
        self.embedding = torch.nn.Embedding(vocab_size, embedding_size, padding_idx=PAD)
        self.context_size = context_size
        self.rnn = AttentionDecoder(
            embedding_size + (context_size or 0),
            hidden_size,
            hidden_size if memory_size is None else memory_size,
            num_layers,
            cell=cell,
            score=score,
            input_feeding=input_feeding,
            dropout=dropout,
            **asdict(attention),
        )
        self.output = torch.nn.Linear(hidden_size, vocab_size)
        self.copying: Copying | None = None
        if copy is not None:
            self.copying = Copying(
                copy,
                hidden_size=hidden_size,
                memory_size=self.rnn.memory_size,
                embedding_size=self.rnn.input_size,
            )
        if tie_embeddings:
            self.output.weight = self.embedding.weight
            # As small as an output layer's weights: the logits of rows drawn from N(0, 1)
            # would be of the order of sqrt(H).
            with torch.no_grad():
                self.embedding.weight.div_(hidden_size**0.5)
        self.extra: ExtraInformation | None = None
        self.extra_at_input = extra is not None and extra.place == "input"
        if extra is not None:
            self.extra = extra.build(embedding_size if self.extra_at_input else hidden_size)

    def forward(
        self,
        target_in: Tensor,
        memory: Tensor | None,
        *,
        lengths: Tensor | None = None,
        state: DecoderStart | None = None,
        need_weights: bool = False,
        keys: Tensor | None = None,
        conditions: Conditions | None = None,
    ) -> tuple[Tensor, DecoderOutput]:
        """Predict, from each token and those before it, the next one.

        Args:
            target_in: (B, T) int64, token ids, ``<start>`` first.
            memory, lengths, state, need_weights, keys: as in
                :meth:`pyseq.nn.AttentionDecoder.forward`, time-major.
            conditions: the context (B, C), the extra information, (B, Z) or (T, B, Z), and
                what may be copied, of a decoder that has been built for them.

        Returns:
            The logits (B, T, V), or of a decoder that copies the log-probabilities
            (B, T, V + X), and what the recurrent decoder gave.

        Raises:
            RuntimeError: a tensor has the wrong shape, dtype or device.
        """
        hidden, decoded, x = self._hidden(
            target_in,
            memory,
            lengths=lengths,
            state=state,
            need_weights=need_weights,
            keys=keys,
            conditions=conditions,
        )
        return self._predict(hidden, x, memory, conditions), decoded

    def _predict(
        self, hidden: Tensor, x: Tensor, memory: Tensor | None, conditions: Conditions | None
    ) -> Tensor:
        """What :meth:`forward` returns first, for (T, B, H) and what was read, (T, B, I)."""
        if self.copying is not None:
            return self.copying(*self._copying_inputs(hidden, x, memory, conditions))
        # Transposed here, where it is narrow, so that the logits are contiguous.
        return self.output(hidden.transpose(0, 1))

    def _copying_inputs(
        self, hidden: Tensor, x: Tensor, memory: Tensor | None, conditions: Conditions | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Copies]:
        """What :class:`pyseq.copying.Copying` reads, batch first."""
        if memory is None or conditions is None or conditions.copies is None:
            raise RuntimeError("a decoder that copies must be given a memory and copies, got None")
        hidden = hidden.transpose(0, 1)
        return (
            self.output(hidden),
            hidden,
            memory.transpose(0, 1),
            x.transpose(0, 1),
            conditions.copies,
        )

    def loss(
        self,
        target_in: Tensor,
        target_out: Tensor,
        memory: Tensor | None,
        *,
        lengths: Tensor | None = None,
        state: DecoderStart | None = None,
        label_smoothing: float = 0.0,
        sampling: Sampling | None = None,
        conditions: Conditions | None = None,
    ) -> Tensor:
        """The cross entropy of what :meth:`forward` predicts; see :meth:`Seq2Seq.loss`.

        Args:
            target_in, target_out, label_smoothing, sampling: as in :meth:`Seq2Seq.loss`.
            memory, lengths, state: as in :meth:`pyseq.nn.AttentionDecoder.forward`, time-major.
            conditions: as in :meth:`forward`.
        """
        _check_tokens("target_in", target_in)
        check_shape("target_out", target_out, "(B, T)", tuple(target_in.shape))
        masks = self._draw_masks(target_in)
        if sampling is not None:
            target_in = self.scheduled_inputs(
                target_in,
                memory,
                sampling,
                lengths=lengths,
                state=state,
                masks=masks,
                unread=target_out == PAD,
                conditions=conditions,
            )
        covers = self.training and self.coverage_loss > 0
        hidden, decoded, x = self._hidden(
            target_in,
            memory,
            lengths=lengths,
            state=state,
            need_weights=covers,
            masks=masks,
            conditions=conditions,
        )
        if self.copying is not None:
            loss = self.copying.loss(
                *self._copying_inputs(hidden, x, memory, conditions),
                target_out,
                label_smoothing=label_smoothing,
            )
        else:
            loss = functional.linear_cross_entropy(
                hidden.flatten(0, 1),
                self.output.weight,
                target_out.t().flatten(),
                self.output.bias,
                ignore_index=PAD,
                label_smoothing=label_smoothing,
            )
        if covers and decoded.weights is not None:
            repeated = functional.coverage_loss(decoded.weights)
            repeated = repeated.flatten(2).mean(2) if repeated.dim() == 3 else repeated
            kept = target_out.t() != PAD
            # As many as the tokens that the cross entropy is a mean of: NaN for none, like that.
            loss = loss + self.coverage_loss * (repeated * kept).sum() / kept.sum()
        return loss

    def _hidden(
        self,
        target_in: Tensor,
        memory: Tensor | None,
        *,
        lengths: Tensor | None,
        state: DecoderStart | None,
        need_weights: bool = False,
        keys: Tensor | None = None,
        masks: _Masks | None = None,
        conditions: Conditions | None = None,
    ) -> tuple[Tensor, DecoderOutput, Tensor]:
        """What the output layer reads (T, B, H), what the recurrent decoder gave, and what it
        read (T, B, I)."""
        _check_tokens("target_in", target_in)
        if self.copying is not None:
            target_in = target_in.masked_fill(target_in >= self.embedding.num_embeddings, UNK)
        if masks is None:
            masks = self._draw_masks(target_in)
        context, extra, _ = conditions or Conditions()
        x = _masked(self.embedding(target_in.t()), masks.embedding)
        check_extra("target_extra", self.extra, extra, rows=x.shape[1], steps=x.shape[0])
        if self.extra is not None and extra is not None and self.extra_at_input:
            x = self.extra(x, extra)
        if self.context_size is not None:
            if context is None:
                raise RuntimeError(
                    f"the context must be (B, C) with C = {self.context_size}, got None"
                )
            check_shape("context", context, "(B, C)", (x.shape[1], self.context_size))
            x = torch.cat([x, context.expand(x.shape[0], -1, -1)], 2)
        decoded = self.rnn(
            x,
            memory,
            lengths=lengths,
            state=state,
            need_weights=need_weights,
            keys=keys,
            dropout_masks=masks.layers,
        )
        hidden = decoded.output
        if self.extra is not None and extra is not None and not self.extra_at_input:
            hidden = self.extra(hidden, extra)
        return _masked(hidden, masks.output), decoded, x

    def _draw_masks(self, target_in: Tensor) -> _Masks:
        """What dropout zeroes in one pass over ``target_in`` (B, T)."""
        batch, steps = target_in.shape
        layers = self.rnn.draw_dropout_masks(steps, batch)
        if not self.training or self.dropout == 0:
            return _Masks(None, layers, None)
        like = self.embedding.weight
        return _Masks(
            apply_dropout(like.new_ones(steps, batch, like.shape[1]), self.dropout),
            layers,
            apply_dropout(like.new_ones(steps, batch, self.rnn.hidden_size), self.dropout),
        )

    @torch.no_grad()
    def scheduled_inputs(
        self,
        target_in: Tensor,
        memory: Tensor | None,
        sampling: Sampling,
        *,
        lengths: Tensor | None = None,
        state: DecoderStart | None = None,
        masks: _Masks | None = None,
        unread: Tensor | None = None,
        generator: torch.Generator | None = None,
        conditions: Conditions | None = None,
    ) -> Tensor:
        """What the decoder reads by scheduled sampling; see :meth:`Seq2Seq.scheduled_inputs`.

        Args:
            target_in, sampling, generator: as in :meth:`Seq2Seq.scheduled_inputs`.
            memory, lengths, state: as in :meth:`pyseq.nn.AttentionDecoder.forward`, time-major.
            masks: what dropout zeroes. Default: drawn here, in training.
            unread: (B, T) bool, where it does not matter what is read.
            conditions: as in :meth:`forward`.

        Returns:
            (B, T) int64.
        """
        _check_tokens("target_in", target_in)
        if sampling.epsilon >= 1:
            return target_in
        batch, steps = target_in.shape
        if masks is None:
            masks = self._draw_masks(target_in)
        device = target_in.device
        thrown = (1 if sampling.coin == "sequence" else steps, batch)
        coins = torch.rand(thrown, generator=generator, device=device) < sampling.epsilon
        coins = coins.expand(steps, batch)
        if unread is not None:
            coins = coins | unread.t()
        draws = None
        if sampling.choice == "sample":
            like = self.embedding.weight
            draws = torch.rand((steps, batch), generator=generator, dtype=like.dtype, device=device)
        if self.is_fused() and state is not None and state[0] is not None:
            return self._inputs_fused(
                target_in.t(),
                coins,
                draws,
                memory,
                lengths=lengths,
                state=(state[0], state[1]),
                masks=masks,
            ).t()
        return self._inputs_step_by_step(
            target_in.t(),
            coins,
            draws,
            memory,
            lengths=lengths,
            state=state,
            masks=masks,
            conditions=conditions or Conditions(),
        ).t()

    def _inputs_step_by_step(
        self,
        tokens: Tensor,
        coins: Tensor,
        draws: Tensor | None,
        memory: Tensor | None,
        *,
        lengths: Tensor | None,
        state: DecoderStart | None,
        masks: _Masks,
        conditions: Conditions,
    ) -> Tensor:
        """See :func:`pyseq.functional.scheduled_inputs`; for any decoder."""
        fed = tokens.clone()
        keys = None if memory is None else self.rnn.project(memory, lengths)
        # Where all rows read the truth to the end nothing is to be found out.
        ends = (~coins).any(1).nonzero()
        for t in range(int(ends.max()) if len(ends) else 0):
            hidden, decoded, x = self._hidden(
                fed[t].unsqueeze(1),
                memory,
                lengths=lengths,
                state=state,
                keys=keys,
                masks=masks.step(t),
                conditions=conditions.step(t),
            )
            predicted = self._predict(hidden, x, memory, conditions)[:, 0]
            chosen = search.choose(predicted, None if draws is None else draws[t + 1])
            fed[t + 1] = torch.where(coins[t + 1], fed[t + 1], chosen)
            state = decoded.state
        return fed

    def generate(
        self,
        encoded: EncodedSource,
        state: DecoderState,
        *,
        max_length: int,
        beam_size: int,
        length_penalty: float,
        need_weights: bool,
        min_length: int = 0,
        n_best: int = 1,
        block_ngrams: int | None = None,
        prefix: Tensor | None = None,
    ) -> GenerateOutput:
        """Greedy or beam search in one operator, for a decoder that :meth:`is_fused`.

        Args, Returns, Raises: see :func:`pyseq.functional.generate`.
        """
        score, combine = self.rnn.score, self.rnn.combine
        return functional.generate(
            self.embedding.weight,
            self.rnn.layer_weights(),
            state,
            self.output.weight,
            self.output.bias,
            encoded.keys,
            encoded.memory,
            None if combine is None else combine.weight,
            max_length=max_length,
            beam_size=beam_size,
            length_penalty=length_penalty,
            cell=self.rnn.cell,
            score=None if score is None else score.fused,
            weight_query=None if score is None else score.weight_query,
            weight_v=None if score is None else score.weight_v,
            lengths=encoded.lengths,
            input_feeding=self.rnn.input_feeding,
            need_weights=need_weights,
            min_length=min_length,
            n_best=n_best,
            block_ngrams=block_ngrams,
            prefix=prefix,
        )

    def _inputs_fused(
        self,
        tokens: Tensor,
        coins: Tensor,
        draws: Tensor | None,
        memory: Tensor | None,
        *,
        lengths: Tensor | None,
        state: tuple[State, Tensor | None],
        masks: _Masks,
    ) -> Tensor:
        """See :func:`pyseq.functional.scheduled_inputs`; for a decoder that :meth:`is_fused`."""
        score, combine = self.rnn.score, self.rnn.combine
        attends = memory is not None and score is not None
        limit = None
        if memory is not None and score is not None:
            limit = score.limit(memory, lengths)
        return functional.scheduled_inputs(
            tokens,
            coins,
            self.embedding.weight,
            self.rnn.layer_weights(),
            state,
            self.output.weight,
            self.output.bias,
            self.rnn.project(memory, lengths) if attends and memory is not None else None,
            memory if attends else None,
            None if combine is None else combine.weight,
            draws=draws,
            cell=self.rnn.cell,
            score=None if score is None else score.fused,
            weight_query=None if score is None else score.weight_query,
            weight_v=None if score is None else score.weight_v,
            lengths=limit,
            input_feeding=self.rnn.input_feeding,
            embedding_masks=masks.embedding,
            dropout_masks=masks.layers,
            output_masks=masks.output,
        )

    def is_fused(self) -> bool:
        """Whether a step of ``forward`` in eval mode is what :meth:`generate` computes.

        Not with other attention than Luong's over all of the memory, see
        :meth:`pyseq.nn.AttentionDecoder.is_plain`; not on another device or in another dtype
        than the operator's; and not if a module
        has hooks, is parametrised or was replaced by one of another class, nor if it takes a
        context or extra information or copies.
        """
        if not (self.context_size is self.extra is self.copying is None and self.rnn.is_plain()):
            return False
        embedding, rnn = self.embedding, self.rnn
        parts = (
            (self, Decoder),
            (embedding, torch.nn.Embedding),
            (rnn, AttentionDecoder),
            (rnn.score, Score),
            (rnn.combine, torch.nn.Linear),
            (self.output, torch.nn.Linear),
        )
        # Looking up with a largest norm would change the weights.
        return embedding.max_norm is None and all(
            module is None or _is_plain(module, kind) for module, kind in parts
        )


class _Encoded(NamedTuple):
    """What an encoder and a bridge give the decoder."""

    memory: Tensor  # (S, B, M)
    hidden: State  # what the decoder starts from
    context: Tensor | None  # (B, M), if it is read at every step


class Seq2Seq(torch.nn.Module):
    """A model of target sequences given source sequences.

    ``memory, state = encoder(source)``, and
    ``p(y_t | y_<t, source) = softmax(W decoder([<start>, y_<t], memory, state)_t)``. The
    decoder starts from what the bridge makes of the encoder's last state. With ``score=None``
    that state is all it knows of the source.

    Args:
        source_vocab_size, target_vocab_size: numbers of token ids, the four special ones
            included (``<pad>`` 0, ``<start>`` 1, ``<stop>`` 2, ``<unk>`` 3). The source's is
            None with ``source_features``.
        embedding_size: features of a token, on both sides.
        hidden_size: H, units of the decoder and features of the memory; even if the
            encoder is bidirectional, since it then has H/2 units a direction.
        num_layers: layers of encoder and decoder.
        cell: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` (or ``"rnn"``) or ``"rnn_relu"``.
        bidirectional: whether the encoder reads in both directions.
        score: ``"dot"``, ``"scaled_dot"``, ``"general"``, ``"concat"``, ``"location"``, or None
            for no attention.
        input_feeding: whether the decoder reads its last output, or context; needs a score.
        dropout: probability of zeroing a feature of the embeddings, between layers, of the
            memory and of the decoder's output, in training.
        source_embedding_size, target_embedding_size: that of one side. Default:
            embedding_size.
        encoder_hidden_size, encoder_num_layers: those of the encoder, whose hidden_size is
            the number of features of the memory. Default: hidden_size and num_layers.
        bridge: ``"copy"``, ``"linear"``, ``"tanh"``, ``"relu"``, ``"zero"`` or ``"learned"``;
            see :class:`pyseq.bridge.Bridge`. Copying needs equal layers and sizes.
        tie_embeddings: one matrix serves as the decoder's embedding and as the weight of its
            output layer; needs a target embedding of hidden_size numbers.
        source_features: D, where the source is no tokens but (B, S, D) features.
        context_every_step: whether the decoder reads the last state of the encoder's top layer
            at every step, beside the embedding.
        source_extra_size, target_extra_size: Z, numbers of extra information for the encoder
            and for the decoder. Default: there is none.
        extra_mode, extra_hidden_size: how it enters, ``"add"``, ``"concat"`` or ``"mlp"``; see
            :class:`pyseq.extra.ExtraInformation`.
        extra_place: where: ``"output"``, into the encoder's states (memory and last state) and
            into what the output layer reads; or ``"input"``, into the embeddings, and so into
            all states.
        copy: ``"pointer"`` or ``"joint"``: the model may copy tokens of the source, those too
            that the target's vocabulary lacks; see :class:`pyseq.copying.Copying`. All its
            methods then take ``copies`` (B, S) int64: what each source position is as a target
            token, ids from V on (V, V + 1, ... in each row) standing for tokens that the
            vocabulary lacks, and those below ``<unk>`` for what may not be copied. Targets
            and results may hold such ids; :meth:`pyseq.Vocab.extend` makes them.
        memory_bias: give every vector of the memory one more feature, which is 1, so that the
            combination ``tanh(W_c [c; h])`` and the keys have biases: its columns of their
            weights. Not with the score ``"dot"``.
        bridge_c_from_h: whether the bridge makes the decoder's first c of the encoder's h.
        attention_size, max_positions, order, feed, heads, window, window_size, history,
            history_size: how the decoder attends; see :class:`pyseq.nn.AttentionDecoder`.
        coverage_loss: lambda of ``lambda sum_s min(a_ts, sum_{u<t} a_us)``, which in training
            is added to the loss of every target token, of several heads as their mean; see
            :func:`pyseq.functional.coverage_loss`.

    Raises:
        ValueError: an option is unknown or a size is out of its range.

    Reference:
        Luong et al. 2015, arXiv 1508.04025; without attention Sutskever et al. 2014,
        arXiv 1409.3215. Cho et al. 2014, arXiv 1406.1078, eq. 3 (context at every step;
        there the output layer reads it too). Press & Wolf 2017, arXiv 1608.05859 (tying).
    """

    def __init__(
        self,
        source_vocab_size: int | None,
        target_vocab_size: int,
        *,
        embedding_size: int = 256,
        hidden_size: int = 256,
        num_layers: int = 1,
        cell: str = "lstm",
        bidirectional: bool = True,
        score: str | None = "general",
        input_feeding: bool = True,
        dropout: float = 0.1,
        source_embedding_size: int | None = None,
        target_embedding_size: int | None = None,
        encoder_hidden_size: int | None = None,
        encoder_num_layers: int | None = None,
        bridge: str = "copy",
        tie_embeddings: bool = False,
        source_features: int | None = None,
        context_every_step: bool = False,
        source_extra_size: int | None = None,
        target_extra_size: int | None = None,
        extra_mode: str = "concat",
        extra_hidden_size: int | None = None,
        extra_place: str = "output",
        copy: str | None = None,
        memory_bias: bool = False,
        bridge_c_from_h: bool = False,
        attention_size: int | None = None,
        max_positions: int | None = None,
        order: str = "luong",
        feed: str | None = None,
        heads: int = 1,
        window: str | None = None,
        window_size: int | None = None,
        history: str | None = None,
        history_size: int | None = None,
        coverage_loss: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {
            "source_vocab_size": source_vocab_size,
            "target_vocab_size": target_vocab_size,
        }
        for name, size in sizes.items():
            if size is None and name == "source_vocab_size":
                continue  # the encoder asks for the number of features then
            check_positive(**{name: size})
            assert size is not None
            if size <= UNK:
                raise ValueError(
                    f"{name} must be at least {UNK + 1}, for the special tokens, got {size}"
                )
        attention = AttentionOptions(
            attention_size=attention_size,
            max_positions=max_positions,
            order=order,
            feed=feed,
            heads=heads,
            window=window,
            window_size=window_size,
            history=history,
            history_size=history_size,
        )
        self._config: dict[str, Any] = {
            **sizes,
            "embedding_size": embedding_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "cell": cell_name(cell),
            "bidirectional": bidirectional,
            "score": score,
            "input_feeding": input_feeding,
            "dropout": dropout,
            "source_embedding_size": source_embedding_size,
            "target_embedding_size": target_embedding_size,
            "encoder_hidden_size": encoder_hidden_size,
            "encoder_num_layers": encoder_num_layers,
            "bridge": bridge,
            "tie_embeddings": tie_embeddings,
            "source_features": source_features,
            "context_every_step": context_every_step,
            "source_extra_size": source_extra_size,
            "target_extra_size": target_extra_size,
            "extra_mode": extra_mode,
            "extra_hidden_size": extra_hidden_size,
            "extra_place": extra_place,
            "copy": copy,
            "memory_bias": memory_bias,
            "bridge_c_from_h": bridge_c_from_h,
            **asdict(attention),
            "coverage_loss": coverage_loss,
        }

        told = (extra_mode, extra_hidden_size, extra_place)
        if source_extra_size is target_extra_size is None and told != ("concat", None, "output"):
            raise ValueError(
                "extra_mode, extra_hidden_size and extra_place go with source_extra_size or "
                f"target_extra_size, got {extra_mode!r}, {extra_hidden_size!r} and {extra_place!r} "
                "without"
            )

        def extra(size: int | None) -> ExtraOptions | None:
            if size is None:
                return None
            return ExtraOptions(size, extra_mode, extra_hidden_size, extra_place)

        memory_size = hidden_size if encoder_hidden_size is None else encoder_hidden_size
        encoder_layers = num_layers if encoder_num_layers is None else encoder_num_layers
        self.encoder = Encoder(
            source_vocab_size,
            embedding_size=(
                embedding_size if source_embedding_size is None else source_embedding_size
            ),
            hidden_size=memory_size,
            num_layers=encoder_layers,
            cell=cell,
            bidirectional=bidirectional,
            dropout=dropout,
            features=source_features,
            extra=extra(source_extra_size),
            constant=memory_bias,
        )
        self.bridge = Bridge(
            bridge,
            cell=cell,
            encoder_layers=encoder_layers,
            encoder_size=memory_size,
            decoder_layers=num_layers,
            decoder_size=hidden_size,
            c_from_h=bridge_c_from_h,
        )
        self.decoder = Decoder(
            target_vocab_size,
            embedding_size=(
                embedding_size if target_embedding_size is None else target_embedding_size
            ),
            hidden_size=hidden_size,
            num_layers=num_layers,
            cell=cell,
            score=score,
            input_feeding=input_feeding,
            dropout=dropout,
            memory_size=memory_size + memory_bias,
            tie_embeddings=tie_embeddings,
            context_size=memory_size if context_every_step else None,
            extra=extra(target_extra_size),
            copy=copy,
            attention=attention,
            coverage_loss=coverage_loss,
        )

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments by name: ``Seq2Seq(**model.config)`` is its like."""
        return dict(self._config)

    def embeddings(self) -> dict[str, torch.nn.Embedding]:
        """The tables of the tokens of ``"source"`` (unless it is features) and ``"target"``."""
        tables = {"source": self.encoder.embedding, "target": self.decoder.embedding}
        return {
            side: table for side, table in tables.items() if isinstance(table, torch.nn.Embedding)
        }

    def forward(
        self,
        source: Tensor,
        source_lengths: Tensor,
        target_in: Tensor,
        *,
        source_extra: Tensor | None = None,
        target_extra: Tensor | None = None,
        copies: Tensor | None = None,
    ) -> Tensor:
        """Logits of every next target token, with teacher forcing.

        Args:
            source: (B, S) int64, token ids; or with ``source_features`` (B, S, D), in the
                dtype of the weights.
            source_lengths: (B,) int64, valid steps of each row, on any device.
            target_in: (B, T) int64, token ids: ``<start>`` and the target without its end.
            source_extra: extra information for the encoder: (B, Z), or of each step (S, B, Z),
                time-major; of a model with ``source_extra_size``.
            target_extra: that for the decoder: (B, Z) or (T, B, Z).
            copies: (B, S) int64, of a model that copies.

        Returns:
            (B, T, V), where ``[:, t]`` predicts the token after ``target_in[:, t]``. Of a
            model that copies the log-probabilities (B, T, V + X), in nats.

        Raises:
            RuntimeError: a tensor has the wrong shape, dtype or device.
        """
        encoded = self._encode(source, source_lengths, target_in, source_extra)
        logits, _ = self.decoder(
            target_in,
            encoded.memory,
            lengths=source_lengths,
            state=(encoded.hidden, None),
            conditions=Conditions(
                encoded.context, target_extra, self._copies(copies, source, source_lengths)
            ),
        )
        return logits

    def loss(
        self,
        source: Tensor,
        source_lengths: Tensor,
        target_in: Tensor,
        target_out: Tensor,
        *,
        label_smoothing: float = 0.0,
        sampling: Sampling | None = None,
        source_extra: Tensor | None = None,
        target_extra: Tensor | None = None,
        copies: Tensor | None = None,
    ) -> Tensor:
        """Cross entropy in nats, averaged over the target tokens that are not ``<pad>``.

        That of the logits that :meth:`forward` gives, which are never all in memory; see
        :func:`pyseq.functional.linear_cross_entropy`.

        Args:
            source, source_lengths, target_in: as in :meth:`forward`.
            target_out: (B, T) int64, token ids: the target with its end, ``<pad>`` after it.
            label_smoothing: share of the target probability that is spread over all tokens.
            sampling: what the decoder reads, in place of ``target_in``: see
                :meth:`scheduled_inputs`, with the same dropout as here. No gradient passes
                through the choice. Default: ``target_in``, which is teacher forcing.
            source_extra, target_extra, copies: as in :meth:`forward`.

        Returns:
            0-dimensional; NaN if every token of ``target_out`` is ``<pad>``.

        Raises:
            ValueError: ``label_smoothing`` is out of its range.
            RuntimeError: a tensor has the wrong shape, dtype or device.
        """
        encoded = self._encode(source, source_lengths, target_in, source_extra)
        return self.decoder.loss(
            target_in,
            target_out,
            encoded.memory,
            lengths=source_lengths,
            state=(encoded.hidden, None),
            label_smoothing=label_smoothing,
            sampling=sampling,
            conditions=Conditions(
                encoded.context, target_extra, self._copies(copies, source, source_lengths)
            ),
        )

    @torch.no_grad()
    def scheduled_inputs(
        self,
        source: Tensor,
        source_lengths: Tensor,
        target_in: Tensor,
        sampling: Sampling,
        *,
        generator: torch.Generator | None = None,
        source_extra: Tensor | None = None,
        target_extra: Tensor | None = None,
        copies: Tensor | None = None,
    ) -> Tensor:
        """What the decoder reads where it is shown the truth only now and then.

        After ``<start>``, each token is that of ``target_in`` if its coin says so, which it does
        with probability epsilon; otherwise it is the model's own: the likeliest after what it
        has read until then, or a draw from its distribution. What is fed then decides what is
        chosen next, so this goes step by step; what :meth:`forward` makes of the result has the
        gradient of scheduled sampling, since none passes through a choice.

        Args:
            source, source_lengths, target_in: as in :meth:`forward`.
            sampling: epsilon, how the model chooses, and whether each token has a coin or each
                row one for all its tokens.
            generator: source of randomness on the device of the model. Default: torch's.
            source_extra, target_extra, copies: as in :meth:`forward`.

        Returns:
            (B, T) int64. It does not depend on the number of threads.

        Raises:
            RuntimeError: a tensor has the wrong shape, dtype or device.

        Reference:
            Bengio et al. 2015, arXiv 1506.03099, section 2.4.
        """
        encoded = self._encode(source, source_lengths, target_in, source_extra)
        return self.decoder.scheduled_inputs(
            target_in,
            encoded.memory,
            sampling,
            lengths=source_lengths,
            state=(encoded.hidden, None),
            generator=generator,
            conditions=Conditions(
                encoded.context, target_extra, self._copies(copies, source, source_lengths)
            ),
        )

    def _copies(self, ids: Tensor | None, source: Tensor, lengths: Tensor) -> Copies | None:
        """What may be copied of a batch, checked; None for a model that does not copy."""
        copies = self._config["copy"] is not None
        if (ids is not None) != copies:
            raise ValueError(
                "copies must be given to a model that copies, and to no other: expected "
                f"{'a tensor' if copies else 'None'}, got {kind(ids)}"
            )
        if ids is None:
            return None
        check_shape("copies", ids, "(B, S)", tuple(source.shape[:2]))
        if ids.dtype != torch.int64:
            raise RuntimeError(f"copies must be int64, got {ids.dtype}")
        ids = ids.to(source.device)
        steps = torch.arange(ids.shape[1], device=ids.device)
        ids = ids.masked_fill(steps >= lengths.to(ids.device).unsqueeze(1), PAD)
        if ids.numel() and int(ids.min()) < 0:
            raise RuntimeError(f"copies must hold ids of at least 0, got {int(ids.min())}")
        vocab = self.decoder.output.out_features
        return Copies(ids, max(0, int(ids.max()) + 1 - vocab) if ids.numel() else 0)

    def _encode(
        self,
        source: Tensor,
        source_lengths: Tensor,
        target_in: Tensor | None,
        source_extra: Tensor | None,
    ) -> _Encoded:
        """What the decoder is given, for the sources of ``target_in``, if there is one."""
        memory, hidden = self.encoder(source, source_lengths, source_extra)
        if target_in is not None and target_in.shape[0] != source.shape[0]:
            raise RuntimeError(
                f"target_in must have one row for each of the {source.shape[0]} sources, "
                f"got {target_in.shape[0]}"
            )
        context = None
        if self.decoder.context_size is not None:
            context = state_parts(self.encoder.cell, hidden)[0][-1]
        return _Encoded(memory, self.bridge(hidden), context)

    def generate(
        self,
        source: Tensor,
        source_lengths: Tensor,
        *,
        max_length: int,
        beam_size: int = 1,
        length_penalty: float = 0.0,
        source_extra: Tensor | None = None,
        target_extra: Tensor | None = None,
        copies: Tensor | None = None,
    ) -> list[Hypothesis]:
        """The best target sequence that search finds for each source.

        The short form of :meth:`search`, which has more options and gives more hypotheses.

        Args:
            source, source_lengths: as in :meth:`forward`.
            max_length: the most tokens to emit, ``<stop>`` included.
            beam_size: hypotheses to follow; 1 is greedy search.
            length_penalty: as in :func:`pyseq.search.beam`.
            source_extra, target_extra, copies: as in :meth:`forward`; of each step, there
                must be at least max_length of them for the target.

        Returns:
            One :class:`pyseq.search.Hypothesis` per row, with tokens (no ``<start>``, no
            ``<stop>``), score (nats) and attention weights (len(tokens), S of the row),
            None without attention. Dropout is off, whatever the mode.

        Raises:
            ValueError: an option is out of its range.
            RuntimeError: the logits are not finite.
        """
        model = self._given(source_extra, target_extra, copies, max_length)
        options = SearchOptions(
            max_length=max_length, beam_size=beam_size, length_penalty=length_penalty
        )
        return [best[0] for best in search.search(model, source, source_lengths, options)]

    def search(
        self,
        source: Tensor,
        source_lengths: Tensor,
        options: SearchOptions,
        *,
        generator: torch.Generator | None = None,
        source_extra: Tensor | None = None,
        target_extra: Tensor | None = None,
        copies: Tensor | None = None,
    ) -> list[list[Hypothesis]]:
        """The target sequences that a search with these options finds for each source.

        Args, Returns, Raises: see :func:`pyseq.search.search`, and for the extra information
            and copies :meth:`generate`.
        """
        model = self._given(source_extra, target_extra, copies, options.max_length)
        return search.search(model, source, source_lengths, options, generator=generator)

    def stream(
        self,
        source: Tensor,
        source_lengths: Tensor,
        options: SearchOptions,
        *,
        generator: torch.Generator | None = None,
        source_extra: Tensor | None = None,
        target_extra: Tensor | None = None,
        copies: Tensor | None = None,
    ) -> Iterator[StreamedToken]:
        """The tokens of greedy search or sampling one by one, as they are found.

        Args, Returns, Raises: see :func:`pyseq.search.stream`, and for the extra information
            and copies :meth:`generate`.
        """
        model = self._given(source_extra, target_extra, copies, options.max_length)
        return search.stream(model, source, source_lengths, options, generator=generator)

    def given(
        self,
        *,
        source_extra: Tensor | None = None,
        target_extra: Tensor | None = None,
        copies: Tensor | None = None,
    ) -> Given:
        """This model with the extra information of some sources, and what may be copied of
        them, as :mod:`pyseq.search` and :class:`pyseq.Ensemble` take it.

        Args:
            source_extra, target_extra, copies: as in :meth:`forward`, for the sources to be
                searched.
        """
        return Given(self, source_extra, target_extra, copies)

    def _given(
        self,
        source_extra: Tensor | None,
        target_extra: Tensor | None,
        copies: Tensor | None,
        max_length: int,
    ) -> SearchModel:
        if target_extra is not None and target_extra.dim() == 3 and len(target_extra) < max_length:
            raise RuntimeError(
                f"target_extra must have at least max_length = {max_length} steps, got "
                f"{len(target_extra)}"
            )
        if source_extra is target_extra is copies is None:
            return self
        return self.given(source_extra=source_extra, target_extra=target_extra, copies=copies)

    def encode_source(
        self,
        source: Tensor,
        lengths: Tensor,
        source_extra: Tensor | None = None,
        copies: Tensor | None = None,
    ) -> tuple[EncodedSource, DecoderState]:
        """What a search begins with; see :class:`pyseq.search.SearchModel`."""
        checked = self._copies(copies, source, lengths)
        memory, hidden, context = self._encode(source, lengths, None, source_extra)
        rnn = self.decoder.rnn
        state = DecoderState(hidden, memory.new_zeros(memory.shape[1], rnn.fed_size))
        keys = rnn.project(memory)
        if keys is None or rnn.score is None:
            return EncodedSource(None, None, None, context), state
        # Every step reads the memory row by row, so it is laid out like that once.
        memory = memory.transpose(0, 1).contiguous().transpose(0, 1)
        limit = rnn.score.limit(memory, lengths.to(source.device))
        return EncodedSource(memory, keys, limit, context, checked), state

    def step(
        self,
        tokens: Tensor,
        encoded: EncodedSource,
        state: DecoderState,
        *,
        need_weights: bool = False,
        target_extra: Tensor | None = None,
    ) -> Step:
        """One step of N hypotheses; see :class:`pyseq.search.SearchModel`.

        Args:
            tokens: (N,) int64, the last token of each.
            encoded: what to attend to, N rows.
            state: the state of each before this step.
            need_weights: also give the attention weights.
            target_extra: (N, Z), extra information of this step.
        """
        logits, decoded = self.decoder(
            tokens.unsqueeze(1),
            encoded.memory,
            lengths=encoded.lengths,
            state=state,
            need_weights=need_weights,
            keys=encoded.keys,
            conditions=Conditions(encoded.context, target_extra, encoded.copies),
        )
        log_probs = logits[:, 0]
        if encoded.copies is None:
            log_probs = torch.log_softmax(log_probs, -1)
        weights = None if decoded.weights is None else decoded.weights[0]
        if weights is not None and weights.dim() == 3:
            weights = weights.mean(1)  # over the heads
        return Step(log_probs, weights, decoded.state)

    def fused_search(self) -> FusedSearch | None:
        """The searches of :mod:`pyseq.search` in one operator; see its ``SearchModel``.

        None if :meth:`step` does more than the operator: in a subclass that has its own, or
        with a decoder that is not :meth:`Decoder.is_fused`.
        """
        fused = type(self).step is Seq2Seq.step and self.decoder.is_fused()
        return self.decoder.generate if fused else None


class _GivenSource(NamedTuple):
    """What a search carries along of the sources and of the target's extra information."""

    source: EncodedSource
    extra: Tensor  # (N, Z), or (T, N, Z)

    def select(self, rows: Tensor) -> _GivenSource:
        """The given rows (N'), which may repeat."""
        return _GivenSource(self.source.select(rows), self.extra.index_select(-2, rows))


class _GivenState(NamedTuple):
    """The state of the decoder, and how many steps it has made."""

    decoder: DecoderState
    steps: int

    def select(self, rows: Tensor) -> _GivenState:
        """The given rows (N'), which may repeat."""
        return _GivenState(self.decoder.select(rows), self.steps)


class Given:
    """A model with the extra information of some sources, and what may be copied of them; what
    :meth:`Seq2Seq.given` returns."""

    def __init__(
        self,
        model: Seq2Seq,
        source_extra: Tensor | None,
        target_extra: Tensor | None,
        copies: Tensor | None = None,
    ) -> None:
        self.model = model
        self.copies = copies
        self.source_extra = source_extra
        self.target_extra = target_extra

    def modules(self) -> Iterator[torch.nn.Module]:
        """All modules of the model."""
        return self.model.modules()

    def encode_source(
        self, source: Tensor, lengths: Tensor
    ) -> tuple[EncodedSource | _GivenSource, DecoderState | _GivenState]:
        """What a search begins with; see :class:`pyseq.search.SearchModel`.

        Raises:
            RuntimeError: the extra information has not one row for each source, or is not what
                the model takes.
        """
        encoded, state = self.model.encode_source(source, lengths, self.source_extra, self.copies)
        extra = self.target_extra
        steps = -1 if extra is None or extra.dim() == 2 else len(extra)
        check_extra(
            "target_extra", self.model.decoder.extra, extra, rows=source.shape[0], steps=steps
        )
        if extra is None:
            return encoded, state
        return _GivenSource(encoded, extra), _GivenState(state, 0)

    def step(self, tokens: Tensor, encoded: Any, state: Any, *, need_weights: bool) -> Step:
        """One step of N hypotheses; see :class:`pyseq.search.SearchModel`."""
        if not isinstance(encoded, _GivenSource):
            return self.model.step(tokens, encoded, state, need_weights=need_weights)
        extra = Conditions(extra=encoded.extra).step(state.steps).extra
        step = self.model.step(
            tokens, encoded.source, state.decoder, need_weights=need_weights, target_extra=extra
        )
        return step._replace(state=_GivenState(step.state, state.steps + 1))

    def fused_search(self) -> FusedSearch | None:
        """As that of the model, which has none if the target takes extra information."""
        return self.model.fused_search()
