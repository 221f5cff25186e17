# SPDX-License-Identifier: Apache-2.0
"""N-to-N and N-to-1: a label for every token, or one for the whole source.

Both are the encoder of ``Seq2Seq`` with an output layer; trained by ``training``, used on
text by ``labeler``.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from ._arguments import constructor_takes
from ._checks import check_positive, check_shape, check_tensor
from ._dropout import apply_dropout
from .nn._common import changed_options
from .seq2seq import Encoder, Seq2Seq, valid_steps
from .seq2seq.fused import output_loss
from .seq2seq.inputs import check_vocab_size
from .seq2seq.options import (
    ClassifierArguments,
    Placing,
    TaggerArguments,
    config_of,
)
from .types import IGNORE, state_parts

__all__ = ["POOLINGS", "AnyModel", "Classifier", "PoolingName", "Tagger"]

PoolingName = Literal["last", "mean", "max"]
POOLINGS: tuple[str, ...] = ("last", "mean", "max")


class _Labelling(torch.nn.Module):
    """What both models are made of, and their loss."""

    def __init__(self, options: TaggerArguments | ClassifierArguments) -> None:
        super().__init__()
        check_positive(num_labels=options.num_labels)
        if options.source_vocab_size is not None:  # else the encoder asks for features
            check_vocab_size("source_vocab_size", options.source_vocab_size)
        options.check_extra()
        self._config = config_of(options)
        place: Placing = {"device": options.device, "dtype": options.dtype}
        self.encoder = Encoder(
            options.source_vocab_size,
            embedding_size=options.embedding_size,
            hidden_size=options.hidden_size,
            num_layers=options.num_layers,
            cell=options.cell,
            bidirectional=options.bidirectional,
            dropout=options.dropout,
            features=options.source_features,
            extra=options.extra(options.source_extra_size),
            options=options.encoder_options,
            **place,
        )
        self.output = torch.nn.Linear(options.hidden_size, options.num_labels, **place)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments by name, without device and dtype:
        ``type(model)(**model.config)`` is its like."""
        return dict(self._config)

    def embeddings(self) -> dict[str, torch.nn.Embedding]:
        """The table of the tokens of ``"source"``, unless it is features."""
        table = self.encoder.embedding
        return {"source": table} if isinstance(table, torch.nn.Embedding) else {}

    def _cross_entropy(self, hidden: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        """That of labels (...) given what the output layer reads (..., H)."""
        return output_loss(
            self.output, hidden, labels, ignore_index=IGNORE, label_smoothing=label_smoothing
        )


class Tagger(_Labelling):
    """A label for every token: ``p(y_s | x) = softmax(W encoder(x)_s + b)``.

    Args:
        source_vocab_size: number of token ids, the four special ones included; None with
            ``source_features``.
        num_labels: N.
        embedding_size: features of a token.
        hidden_size: H, features of the memory; even if the encoder is bidirectional.
        num_layers, cell, bidirectional: of the encoder, as in :class:`pyseq.Seq2Seq`; any cell.
        dropout: probability of zeroing a feature of the embeddings, between layers, and of
            what the output layer reads, in training.
        source_features: D, where the source is no tokens but (B, S, D) features.
        encoder_options: what the recurrent layers do besides running their cell:
            :class:`pyseq.LayerOptions`, or a mapping of their names.
        source_extra_size: Z, numbers of extra information. Default: there is none.
        extra_mode, extra_hidden_size, extra_place: how and where it enters the encoder, as in
            :class:`pyseq.Seq2Seq`.
        device, dtype: of the parameters.

    Raises:
        ValueError: an option is unknown or a size is out of its range.

    Reference:
        Graves & Schmidhuber 2005, "Framewise phoneme classification with bidirectional LSTM";
        Huang et al. 2015, arXiv 1508.01991, section 2.3 (without the CRF).
    """

    @constructor_takes(TaggerArguments)
    def __init__(self, options: TaggerArguments) -> None:
        super().__init__(options)

    def forward(
        self, source: Tensor, source_lengths: Tensor, *, source_extra: Tensor | None = None
    ) -> Tensor:
        """Logits of the labels of every token.

        Args:
            source: (B, S) int64, token ids; or features (B, S, D).
            source_lengths: (B,) int64, valid steps of each row, on any device.
            source_extra: extra information (B, Z), or of each step (S, B, Z), time-major; of a
                model with ``source_extra_size``.

        Returns:
            (B, S, N), zero at padding.

        Raises:
            RuntimeError: a tensor has the wrong shape, dtype or device.
        """
        memory, _ = self.encoder(source, source_lengths, source_extra)
        # Transposed here, where it is narrow, so that the logits are contiguous.
        logits = self.output(memory.transpose(0, 1))
        valid = valid_steps(source_lengths, source)
        return torch.where(valid.unsqueeze(2), logits, 0.0)

    def loss(
        self,
        source: Tensor,
        source_lengths: Tensor,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        source_extra: Tensor | None = None,
    ) -> Tensor:
        """Cross entropy in nats, averaged over the tokens.

        Args:
            source, source_lengths: as in :meth:`forward`.
            labels: (B, S) int64, from 0 to N - 1, or -100 for a token that does not count;
                what stands at padding does not matter.
            label_smoothing: share of the target probability that is spread over all labels.
            source_extra: as in :meth:`forward`.

        Returns:
            0-dimensional; NaN if no token counts.

        Raises:
            ValueError: ``label_smoothing`` is out of its range.
            RuntimeError: a tensor has the wrong shape, dtype or device, or a label is none.
        """
        memory, _ = self.encoder(source, source_lengths, source_extra)
        check_shape("labels", labels, "(B, S)", tuple(source.shape[:2]))
        labels = labels.where(valid_steps(source_lengths, labels), IGNORE)
        return self._cross_entropy(memory, labels.t(), label_smoothing)


class Classifier(_Labelling):
    """One label for the source: ``p(y | x) = softmax(W pool(encoder(x)) + b)``.

    With the memory ``h_1..h_S`` and each row's own S, ``pool`` is

    - ``"last"``: the last state of the top layer, both directions side by side, each after
      all that it reads;
    - ``"mean"``: ``sum_s h_s / S``;
    - ``"max"``: ``max_s h_s``, for each feature by itself.

    For a row of length 0 all three are zero, but for what extra information adds, and for
    ``"last"`` a learned initial state.

    Args:
        source_vocab_size, num_labels, embedding_size, hidden_size, num_layers, cell,
            bidirectional, dropout, source_features, encoder_options, source_extra_size,
            extra_mode, extra_hidden_size, extra_place, device, dtype: as in :class:`Tagger`.
        pooling: one of the above.

    Raises:
        ValueError: an option is unknown or a size is out of its range.

    Reference:
        Conneau et al. 2017, arXiv 1705.02364, section 3.2 (last, mean and max).
    """

    @constructor_takes(ClassifierArguments)
    def __init__(self, options: ClassifierArguments) -> None:
        if options.pooling not in POOLINGS:
            raise ValueError(
                f"pooling must be one of {', '.join(POOLINGS)}, got {options.pooling!r}"
            )
        super().__init__(options)
        self.pooling = cast(PoolingName, options.pooling)

    def extra_repr(self) -> str:
        return changed_options(self, pooling="last").removeprefix(", ")

    def _pooled(self, source: Tensor, lengths: Tensor, extra: Tensor | None) -> Tensor:
        """What the output layer reads (B, H)."""
        memory, state = self.encoder(source, lengths, extra)
        if self.pooling == "last":
            h = state_parts(self.encoder.cell, state)[0]
            return apply_dropout(h[-1], self.encoder.dropout, self.training)
        check_tensor("lengths", lengths)
        lengths = lengths.to(memory.device)
        if self.pooling == "mean":  # padding is zero
            mean: Tensor = memory.sum(0) / lengths.clamp(min=1).unsqueeze(1)
            return mean
        valid = valid_steps(lengths, source).t().unsqueeze(2)
        highest = memory.masked_fill(~valid, float("-inf")).amax(0)
        return torch.where((lengths > 0).unsqueeze(1), highest, 0.0)

    def forward(
        self, source: Tensor, source_lengths: Tensor, *, source_extra: Tensor | None = None
    ) -> Tensor:
        """Logits of the labels.

        Args:
            source: (B, S) int64, token ids; or features (B, S, D); S at least 1.
            source_lengths: (B,) int64, valid steps of each row, on any device.
            source_extra: extra information (B, Z), or of each step (S, B, Z), time-major; of a
                model with ``source_extra_size``.

        Returns:
            (B, N).

        Raises:
            RuntimeError: a tensor has the wrong shape, dtype or device.
        """
        logits: Tensor = self.output(self._pooled(source, source_lengths, source_extra))
        return logits

    def loss(
        self,
        source: Tensor,
        source_lengths: Tensor,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        source_extra: Tensor | None = None,
    ) -> Tensor:
        """Cross entropy in nats, averaged over the rows.

        Args:
            source, source_lengths: as in :meth:`forward`.
            labels: (B,) int64, from 0 to N - 1, or -100 for a row that does not count.
            label_smoothing: share of the target probability that is spread over all labels.
            source_extra: as in :meth:`forward`.

        Returns:
            0-dimensional; NaN if no row counts.

        Raises:
            ValueError: ``label_smoothing`` is out of its range.
            RuntimeError: a tensor has the wrong shape, dtype or device, or a label is none.
        """
        pooled = self._pooled(source, source_lengths, source_extra)
        check_shape("labels", labels, "(B,)", tuple(source.shape[:1]))
        return self._cross_entropy(pooled, labels, label_smoothing)


#: What can be trained and saved.
AnyModel = Seq2Seq | Tagger | Classifier
