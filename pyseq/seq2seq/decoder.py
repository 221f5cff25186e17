# SPDX-License-Identifier: Apache-2.0
"""The decoder: embedding, attention decoder and output layer, with its loss and its searches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional
from .._checks import check_number, check_positive, check_shape
from .._dropout import apply_dropout, check_probability
from .._pickled import fill_in
from ..copying import Copying
from ..extra import Conditions, ExtraInformation, ExtraOptions, check_extra
from ..nn import AttentionDecoder, AttentionOptions
from ..nn._common import Device, all_are_hooked, weights_now
from ..recurrent import LayerOptions
from ..scheduled import Sampling
from ..search import EncodedSource
from ..types import (
    PAD,
    UNK,
    Copies,
    DecoderOutput,
    DecoderStart,
    DecoderState,
    GenerateOutput,
    kind,
)
from . import fused
from .inputs import check_tokens, embed
from .masks import Masks, masked
from .scanned import build_decoder
from .sharing import Groups
from .stepwise import inputs_step_by_step

__all__ = ["Decoder"]


_GLOBAL = AttentionOptions()
_NO_OPTIONS = LayerOptions()
#: What decoders pickled before there were such options are.
_PICKLED = {
    "context_size": None,
    "extra": None,
    "extra_at_input": False,
    "copying": None,
    "coverage_loss": 0.0,
}


class Decoder(torch.nn.Module):
    """Embedding, :class:`pyseq.nn.AttentionDecoder` and the linear layer to the logits.

    Args:
        vocab_size: V, number of target tokens.
        embedding_size: features of a token.
        hidden_size: H, units of each layer.
        num_layers, score, input_feeding: as in :class:`pyseq.nn.AttentionDecoder`.
        cell, options: of the recurrent layers. What :class:`pyseq.nn.AttentionDecoder` does not
            know, any option but ``forget_bias``, goes without input feeding, or without a score.
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
        device, dtype: of the parameters.

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
        options: LayerOptions = _NO_OPTIONS,
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
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_number("coverage_loss", coverage_loss)
        if coverage_loss < 0 or (coverage_loss > 0 and score is None):
            raise ValueError(
                f"coverage_loss must be at least 0, and 0 without a score, got {coverage_loss!r}"
            )
        self.coverage_loss = coverage_loss
        check_positive(vocab_size=vocab_size, embedding_size=embedding_size)
        if context_size is not None:
            check_positive(context_size=context_size)
        if copy is not None and score is None:
            raise ValueError(
                f"copy needs a score, since it looks at the memory, got {copy!r} with score None"
            )
        if tie_embeddings and embedding_size != hidden_size:
            raise ValueError(
                "tie_embeddings needs a target embedding of hidden_size numbers, the input of the "
                f"output layer: {hidden_size}, got {embedding_size}"
            )
        check_probability("dropout", dropout)
        self.dropout = dropout
        self.embedding = torch.nn.Embedding(
            vocab_size, embedding_size, padding_idx=PAD, device=device, dtype=dtype
        )
        self.context_size = context_size
        self.rnn = build_decoder(
            embedding_size + (context_size or 0),
            hidden_size,
            hidden_size if memory_size is None else memory_size,
            num_layers,
            cell=cell,
            options=options,
            score=score,
            input_feeding=input_feeding,
            dropout=dropout,
            attention=attention,
            device=device,
            dtype=dtype,
        )
        self.output = torch.nn.Linear(hidden_size, vocab_size, device=device, dtype=dtype)
        self.copying: Copying | None = None
        if copy is not None:
            self.copying = Copying(
                copy,
                hidden_size=hidden_size,
                memory_size=self.rnn.memory_size,
                embedding_size=self.rnn.input_size,
                device=device,
                dtype=dtype,
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
            size = embedding_size if self.extra_at_input else hidden_size
            self.extra = extra.build(size, device=device, dtype=dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        fill_in(self, _PICKLED)

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
        memory_rows: Tensor | None = None,
    ) -> tuple[Tensor, DecoderOutput]:
        """Predict, from each token and those before it, the next one.

        Args:
            target_in: (B, T) int64, token ids, ``<start>`` first.
            memory, lengths, state, need_weights, keys: as in
                :meth:`pyseq.nn.AttentionDecoder.forward`, time-major.
            conditions: the context (B, C), the extra information, (B, Z) or (T, B, Z), and
                what may be copied, of a decoder that has been built for them.
            memory_rows: (B,) int64, the row of the memory, of keys, lengths and what may be
                copied that each row attends to, of as many as these have. Default: its own.

        Returns:
            The logits (B, T, V), or of a decoder that copies the log-probabilities
            (B, T, V + S), and what the recurrent decoder gave.

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
            memory_rows=memory_rows,
        )
        return self._predict(hidden, x, memory, conditions, memory_rows), decoded

    def _predict(
        self,
        hidden: Tensor,
        x: Tensor,
        memory: Tensor | None,
        conditions: Conditions | None,
        memory_rows: Tensor | None = None,
    ) -> Tensor:
        """What :meth:`forward` returns first, for (T, B, H) and what was read, (T, B, I)."""
        if self.copying is not None:
            inputs = self._copying_inputs(hidden, x, memory, conditions)
            if memory_rows is None:
                return self.copying(*inputs)
            logits, hidden, memory, x, copies = inputs
            groups = Groups.of(memory_rows, memory.shape[0])
            logits, hidden, x = map(groups.gather, (logits, hidden, x))
            return groups.scatter(self.copying(logits, hidden, memory, x, copies))
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
        check_tokens("target_in", target_in)
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
            loss = fused.output_loss(
                self.output,
                hidden,
                target_out.t(),
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
        masks: Masks | None = None,
        conditions: Conditions | None = None,
        memory_rows: Tensor | None = None,
    ) -> tuple[Tensor, DecoderOutput, Tensor]:
        """What the output layer reads (T, B, H), what the recurrent decoder gave, and what it
        read (T, B, I)."""
        check_tokens("target_in", target_in)
        if self.copying is not None:
            target_in = target_in.masked_fill(target_in >= self.embedding.num_embeddings, UNK)
        if masks is None:
            masks = self._draw_masks(target_in)
        context, extra, _ = conditions or Conditions()
        x = masked(embed("target_in", self.embedding, target_in.t()), masks.embedding)
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
            memory_rows=memory_rows,
        )
        hidden = decoded.output
        if self.extra is not None and extra is not None and not self.extra_at_input:
            hidden = self.extra(hidden, extra)
        return masked(hidden, masks.output), decoded, x

    def _draw_masks(self, target_in: Tensor) -> Masks:
        """What dropout zeroes in one pass over ``target_in`` (B, T)."""
        batch, steps = target_in.shape
        layers = self.rnn.draw_dropout_masks(steps, batch)
        if not self.training or self.dropout == 0:
            return Masks(None, layers, None)
        like = self.embedding.weight
        return Masks(
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
        masks: Masks | None = None,
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
        check_tokens("target_in", target_in)
        if not isinstance(sampling, Sampling):
            raise TypeError(f"sampling must be a Sampling, got {kind(sampling)}")
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
            dtype = torch.promote_types(self.embedding.weight.dtype, torch.float32)
            draws = torch.rand((steps, batch), generator=generator, dtype=dtype, device=device)
        if self.is_fused() and state is not None and state[0] is not None:
            return fused.scheduled_inputs(
                self,
                target_in.t(),
                coins,
                draws,
                memory,
                lengths=lengths,
                state=state,
                masks=masks,
            ).t()
        return inputs_step_by_step(
            self,
            target_in.t(),
            coins,
            draws,
            memory,
            lengths=lengths,
            state=state,
            masks=masks,
            conditions=conditions or Conditions(),
        ).t()

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
        coverage_penalty: float = 0.0,
        sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> GenerateOutput:
        """A search in one operator, for a decoder that :meth:`is_fused`.

        Args, Returns, Raises: see :func:`pyseq.functional.generate`.
        """
        rnn = self.rnn
        assert isinstance(rnn, AttentionDecoder)  # or it is not fused
        combine = rnn.combine
        (embedding,) = weights_now(self.embedding, ("weight",))
        output_weight, output_bias = weights_now(self.output, ("weight", "bias"))
        with fused.exact_results(embedding):
            found = functional.generate(
                embedding,
                rnn.layer_weights(),
                state,
                output_weight,
                output_bias,
                encoded.keys,
                encoded.memory,
                None if combine is None else combine.weight,
                max_length=max_length,
                beam_size=beam_size,
                length_penalty=length_penalty,
                lengths=encoded.lengths,
                need_weights=need_weights,
                min_length=min_length,
                n_best=n_best,
                block_ngrams=block_ngrams,
                prefix=prefix,
                coverage_penalty=coverage_penalty,
                sample=sample,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                **fused.options_of(rnn),
            )
        if found.weights is None or found.weights.dim() == 3:
            return found
        return found._replace(weights=found.weights.mean(2))  # over the heads

    def is_fused(self) -> bool:
        """Whether a step of ``forward`` in eval mode is what :meth:`generate` computes.

        Not with layers that attend when they have run; not on another device or in another dtype
        than the operator's; and not if a module has hooks, is parametrised or was replaced by one
        of another class, nor if it takes a context or extra information or copies.
        """
        if self.context_size is not None or all_are_hooked():
            return False
        # By the dictionary: found by name a module takes four times as long.
        own = self._modules
        if own.get("extra") is not None or own.get("copying") is not None:
            return False
        embedding = own["embedding"]
        if not isinstance(embedding, torch.nn.Embedding) or embedding.max_norm is not None:
            return False  # looking up with a largest norm would change the weights
        parts = ((self, Decoder), (embedding, torch.nn.Embedding), (own["output"], torch.nn.Linear))
        return all(
            module is not None and fused.is_plain(module, expected) for module, expected in parts
        ) and fused.attends_plainly(own["rnn"])
