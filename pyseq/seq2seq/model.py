# SPDX-License-Identifier: Apache-2.0
"""The model: encoder, bridge and decoder, built of one set of options."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._arguments import constructor_takes
from .._checks import check_all, check_shape, check_tensor
from ..bridge import SOURCELESS, Bridge
from ..extra import Conditions
from ..scheduled import Sampling
from ..search import EncodedSource, FusedSearch, SearchOptions, Step
from ..search.rules import widened
from ..types import PAD, Copies, DecoderState, State, kind, state_parts
from . import whole
from .decoder import Decoder
from .encoder import Encoder
from .inputs import check_vocab_size, rows_together, valid_steps
from .options import Placing, Seq2SeqArguments, config_of
from .searched import Searched

__all__ = ["Seq2Seq"]


#: What a search in one call makes no use of.
_LEFT_OUT = ("encode_source", "step", "fused_search", "_encode", "_copies")


class _Encoded(NamedTuple):
    """What an encoder and a bridge give the decoder."""

    memory: Tensor  # (S, B, M)
    hidden: State  # what the decoder starts from
    context: Tensor | None  # (B, M), if it is read at every step


class Seq2Seq(Searched):
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
        cell: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` (or ``"rnn"``) or ``"rnn_relu"``; without
            input feeding also ``"gru_reset_before"``, ``"indrnn_relu"`` (or ``"indrnn"``),
            ``"indrnn_tanh"``, ``"slstm_sigmoid"`` (or ``"slstm"``) and ``"slstm_exp"``.
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
        encoder_cell: that of the encoder, any of these. Default: cell. The bridge ``"copy"``
            hands on what both have, h at least.
        encoder_options, decoder_options: what the recurrent layers of either side do besides
            running their cell: :class:`pyseq.LayerOptions`, or a mapping of their names. Those of
            the decoder but ``forget_bias`` go without input feeding.
        bridge: ``"copy"``, ``"linear"``, ``"tanh"``, ``"relu"``, ``"zero"`` or ``"learned"``;
            see :class:`pyseq.bridge.Bridge`. Copying needs equal layers and sizes; with the last
            two a decoder without attention knows the source by ``context_every_step`` alone, and
            without that not at all, of which a warning tells.
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
            token, ids from V on (V, V + 1, ... in each row, so below V + S) standing for tokens
            that the vocabulary lacks, and those below ``<unk>`` for what may not be copied. Targets
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
        device, dtype: of the parameters. Default: torch's.

    Raises:
        ValueError: an option is unknown or a size is out of its range.

    Reference:
        Luong et al. 2015, arXiv 1508.04025; without attention Sutskever et al. 2014,
        arXiv 1409.3215. Cho et al. 2014, arXiv 1406.1078, eq. 3 (context at every step;
        there the output layer reads it too). Press & Wolf 2017, arXiv 1608.05859 (tying).
    """

    @constructor_takes(Seq2SeqArguments)
    def __init__(self, options: Seq2SeqArguments) -> None:
        super().__init__()
        if options.source_vocab_size is not None:  # else the encoder asks for features
            check_vocab_size("source_vocab_size", options.source_vocab_size)
        check_vocab_size("target_vocab_size", options.target_vocab_size)
        options.check_extra()
        if options.memory_bias and options.score is None:
            raise ValueError("memory_bias goes with a score, got None")
        self._config = config_of(options)
        if not (options.score or options.context_every_step) and options.bridge in SOURCELESS:
            warnings.warn(
                "the decoder knows nothing of the source: it starts from the bridge "
                f"{options.bridge!r} and has no attention; give it a score, another bridge or "
                "context_every_step",
                stacklevel=3,  # past the wrapper of the constructor
            )

        def or_else(size: int | None, default: int) -> int:
            return default if size is None else size

        place: Placing = {"device": options.device, "dtype": options.dtype}
        memory_size = or_else(options.encoder_hidden_size, options.hidden_size)
        encoder_layers = or_else(options.encoder_num_layers, options.num_layers)
        encoder_cell = options.encoder_cell or options.cell
        self.encoder = Encoder(
            options.source_vocab_size,
            embedding_size=or_else(options.source_embedding_size, options.embedding_size),
            hidden_size=memory_size,
            num_layers=encoder_layers,
            cell=encoder_cell,
            bidirectional=options.bidirectional,
            dropout=options.dropout,
            features=options.source_features,
            extra=options.extra(options.source_extra_size),
            constant=options.memory_bias,
            options=options.encoder_options,
            **place,
        )
        self.bridge = Bridge(
            options.bridge,
            cell=options.cell,
            encoder_cell=encoder_cell,
            encoder_layers=encoder_layers,
            encoder_size=memory_size,
            decoder_layers=options.num_layers,
            decoder_size=options.hidden_size,
            c_from_h=options.bridge_c_from_h,
            **place,
        )
        self.decoder = Decoder(
            options.target_vocab_size,
            embedding_size=or_else(options.target_embedding_size, options.embedding_size),
            hidden_size=options.hidden_size,
            num_layers=options.num_layers,
            cell=options.cell,
            options=options.decoder_options,
            score=options.score,
            input_feeding=options.input_feeding,
            dropout=options.dropout,
            memory_size=memory_size + options.memory_bias,
            tie_embeddings=options.tie_embeddings,
            context_size=memory_size if options.context_every_step else None,
            extra=options.extra(options.target_extra_size),
            copy=options.copy,
            attention=options.attention,
            coverage_loss=options.coverage_loss,
            **place,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Pickled by a version that had fewer options: the others are at their defaults.
        options = Seq2SeqArguments(**self._config)
        self._config = config_of(options)
        if "bridge" not in self._modules:
            encoder = self.encoder.rnn
            self.bridge = Bridge(
                "copy",
                cell=options.cell,
                encoder_layers=encoder.num_layers,
                encoder_size=options.hidden_size,
                decoder_layers=options.num_layers,
                decoder_size=options.hidden_size,
            )

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments by name, without device and dtype:
        ``Seq2Seq(**model.config)`` is its like."""
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
            model that copies the log-probabilities (B, T, V + S), in nats: minus infinity for
            ids beyond V that a row's source does not have.

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
        has read until then, or a draw from its distribution, but never ``<pad>`` or ``<start>``.
        What is fed then decides what is chosen next, so this goes step by step; what
        :meth:`forward` makes of the result has the gradient of scheduled sampling, since none
        passes through a choice.

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
        ids = ids.masked_fill(~valid_steps(lengths, ids), PAD)
        # No row has more tokens beyond the vocabulary than positions.
        extra = ids.shape[1]
        vocab = self.decoder.embedding.num_embeddings
        check_all(
            (ids >= 0) & (ids < vocab + extra),
            "copies must hold ids of at least 0 and below V + S",
            lambda: (
                f"copies must hold ids of at least 0 and below V + S = {vocab} + {extra}, got "
                f"{int(ids.min())} to {int(ids.max())}"
            ),
        )
        return Copies(ids, extra)

    def _encode(
        self,
        source: Tensor,
        source_lengths: Tensor,
        target_in: Tensor | None,
        source_extra: Tensor | None,
    ) -> _Encoded:
        """What the decoder is given, for the sources of ``target_in``, if there is one."""
        memory, hidden = self.encoder(source, source_lengths, source_extra)
        if target_in is not None:
            check_tensor("target_in", target_in)
        if target_in is not None and target_in.shape[0] != source.shape[0]:
            raise RuntimeError(
                f"target_in must have one row for each of the {source.shape[0]} sources, "
                f"got {target_in.shape[0]}"
            )
        context = None
        if self.decoder.context_size is not None:
            context = state_parts(self.encoder.cell, hidden)[0][-1]
        return _Encoded(memory, self.bridge(hidden), context)

    def encode_source(
        self,
        source: Tensor,
        lengths: Tensor,
        source_extra: Tensor | None = None,
        copies: Tensor | None = None,
    ) -> tuple[EncodedSource, DecoderState]:
        """What a search begins with; see :class:`pyseq.search.SearchModel`."""
        check_tensor("lengths", lengths)
        checked = self._copies(copies, source, lengths)
        memory, hidden, context = self._encode(source, lengths, None, source_extra)
        rnn = self.decoder.rnn
        score = rnn.score
        state = rnn.start(hidden)
        projected = rnn.project(memory)
        if projected is None or score is None:
            return EncodedSource(None, None, None, context), state
        # Every step reads both row by row, so they are laid out like that once; where nothing is
        # projected they are one.
        laid_out = rows_together(memory)
        keys = laid_out if projected is memory else rows_together(projected)
        memory = laid_out
        limit = score.limit(memory, lengths.to(source.device))
        rows = None
        if memory.is_cpu:  # on other devices each hypothesis has a row of its own
            rows = torch.arange(memory.shape[1])
        return EncodedSource(memory, keys, limit, context, checked, rows), state

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
            memory_rows=encoded.rows,
        )
        log_probs = logits[:, 0]
        if encoded.copies is None:
            log_probs = torch.log_softmax(widened(log_probs), -1)
        weights = None if decoded.weights is None else decoded.weights[0]
        if weights is not None and weights.dim() == 3:
            weights = weights.mean(1)  # over the heads
        return Step(log_probs, weights, decoded.state)

    def fused_search(self) -> FusedSearch | None:
        """The searches of :mod:`pyseq.search` in one operator; see its ``SearchModel``.

        None if :meth:`step` does more than the operator: in a subclass or an object that has its
        own, or with a decoder that is not :meth:`Decoder.is_fused`.
        """
        own = type(self).step is not Seq2Seq.step or "step" in vars(self)
        decoder = self.decoder
        return None if own or not decoder.is_fused() else decoder.generate

    def search_whole(
        self,
        source: Tensor,
        lengths: Tensor,
        options: SearchOptions,
        prefix: Tensor | None,
        seed: int,
    ) -> list[tuple[list[int], float, Tensor | None]] | None:
        """A search in one call from the source on; see ``SearchModel``.

        None if a method that it leaves out is not this class's, or where it does not apply.
        """
        own, cls = vars(self), type(self)
        for name in _LEFT_OUT:
            if name in own:
                return None
            if cls is not Seq2Seq and getattr(cls, name) is not getattr(Seq2Seq, name):
                return None
        return whole.search_whole(self, source, lengths, options, prefix, seed)
