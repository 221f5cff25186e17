# SPDX-License-Identifier: Apache-2.0
"""The attention decoder: stacked cells, attention and their combination in one operator."""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import init

from .. import functional
from .._checks import check_number, check_positive, check_shape
from .._dropout import apply_dropout, check_probability
from .._packed import QuantizedName
from .._pickled import fill_in
from ..types import (
    GATES,
    AttentionState,
    DecoderOutput,
    DecoderStart,
    DecoderState,
    FeedName,
    HistoryName,
    LayerWeights,
    OrderName,
    State,
    decoder_parts,
    join_parts,
    state_parts,
)
from ._attention_options import check_attention, check_history
from ._common import (
    Device,
    cell_name,
    changed_options,
    check_input,
    check_not_quantized,
    is_bare,
    quantized_repr,
    refuse_script,
    set_forget_bias,
    weights_now,
)
from ._masks import Probabilities, draw_masks, dropout_alone
from ._stack import scan_layers
from ._stepwise import decode_stepwise
from ._whole import decode_whole
from .attention import check_window
from .score import Positions, Score

#: What decoders pickled before there were such options are.
_PICKLED = {
    "order": "luong",
    "feed": "output",
    "window": None,
    "window_size": None,
    "history": None,
    "positions": None,
    "forget_bias": None,
}


class AttentionDecoder(torch.nn.Module):
    """An attention decoder, all steps in one operator.

    At each step the stacked cells read ``[x_t; out_{t-1}]`` (input feeding) or ``x_t``, the
    top state ``h_t`` attends over ``memory`` for the context ``c_t``, and
    ``out_t = tanh(W_c [c_t; h_t])``. With ``score=None`` there is no attention and no
    feeding: stacked cells, whose output is ``h_t``. In Bahdanau's order the state before the
    step attends, and the cells read ``[x_t; c_t]``. See :func:`pyseq.functional.decode`.

    Args:
        input_size: I, features of a step, such as an embedding.
        hidden_size: H, units of each layer and of the output.
        memory_size: M, features of the memory; for the scores ``"dot"`` and ``"scaled_dot"`` it
            must be H.
        num_layers: L.
        cell: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` (or ``"rnn"``) or ``"rnn_relu"``.
        score: ``"dot"``, ``"scaled_dot"``, ``"general"``, ``"concat"``, ``"location"``, or None
            for no attention.
        input_feeding: whether the first layer sees the last output; needs a score.
        dropout: probability of zeroing an output of any layer but the last, in training.
        batch_first: tensors are (B, T, .) and (B, S, .); states are not concerned.
        attention_size: A, units of the score ``"concat"``. Default: H.
        max_positions: positions that can have a weight, score ``"location"`` only.
        order: ``"luong"`` or ``"bahdanau"``.
        feed: what is fed, ``"output"`` (out_{t-1}) or ``"context"`` (c_{t-1}; in Bahdanau's order
            c_t, which is its default and has to be fed). Default: output.
        heads: N, which divides M and the size of the keys: A for concat, otherwise H.
        window: ``"local-m"``, ``"local-p"``, or None for all of the memory; see
            :class:`Attention`.
        window_size: D, at least 1 position. Default: 10, with a window.
        history: ``"previous"`` or ``"cumulative"``: past weights that enter the score concat,
            those of the last step or the sum of all. The latter with ``history_size=1`` is
            coverage; both with more are location-sensitive.
        history_size: K, odd: how many neighbours' past weights the score of a position sees.
            Default: 31, with a history.
        forget_bias: what the forget gates of the cell ``"lstm"`` start from, as in
            :class:`pyseq.nn.LSTM`. Default: drawn as all others.
        device, dtype: of the parameters.

    Attributes:
        weight_ih_l{k}, weight_hh_l{k}, bias_ih_l{k}, bias_hh_l{k}: as in torch.nn, but
            ``weight_ih_l0`` is (G*H, I + F), columns [x; fed], with input feeding, where F is H,
            or M for the context.
        score: the :class:`Score`, or None.
        positions: the :class:`Positions` of local-p, or None.
        fed_size: F.
        combine: ``W_c`` (H, M + H), columns [context; h], or None.

    Raises:
        ValueError: an option is unknown or a size is out of its range.

    Reference:
        Luong et al. 2015, arXiv 1508.04025, eq. 5 to 10 and section 3.3 (input feeding);
        Bahdanau et al. 2015, arXiv 1409.0473 (order); Chorowski et al. 2015, arXiv 1506.07503
        (location-sensitive); See et al. 2017, arXiv 1704.04368 (coverage); without attention,
        the decoder of Sutskever et al. 2014, arXiv 1409.3215.
    """

    weight_ih_l0: Tensor

    #: What :func:`pyseq.quantize` has made of the weights: ``"int8"``, ``"bfloat16"`` or nothing.
    _quantized: QuantizedName | None = None

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        memory_size: int,
        num_layers: int = 1,
        *,
        cell: str = "lstm",
        score: str | None = "general",
        input_feeding: bool = True,
        dropout: float = 0.0,
        batch_first: bool = False,
        attention_size: int | None = None,
        max_positions: int | None = None,
        order: str = "luong",
        feed: str | None = None,
        heads: int = 1,
        window: str | None = None,
        window_size: int | None = None,
        history: str | None = None,
        history_size: int | None = None,
        forget_bias: float | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(
            input_size=input_size,
            hidden_size=hidden_size,
            memory_size=memory_size,
            num_layers=num_layers,
        )
        check_probability("dropout", dropout)
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout is between the layers, so that it does nothing with one, got "
                f"dropout={dropout} and num_layers=1",
                stacklevel=2,
            )
        check_attention(
            score,
            attention_size=attention_size,
            max_positions=max_positions,
            input_feeding=input_feeding,
            order=order,
            feed=feed,
            heads=heads,
            window=window,
            history=history,
        )
        history_size = check_history(score, history, history_size)
        if forget_bias is not None and cell != "lstm":
            raise ValueError(f"forget_bias goes with the cell 'lstm', got {cell!r}")
        if forget_bias is not None:
            check_number("forget_bias", forget_bias)
        self.forget_bias = forget_bias
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.memory_size = memory_size
        self.num_layers = num_layers
        self.cell = cell_name(cell)
        self.input_feeding = input_feeding and score is not None
        self.dropout = float(dropout)
        self.batch_first = batch_first
        self.order = cast(OrderName, order)
        self.feed = cast(FeedName, feed or ("context" if order == "bahdanau" else "output"))
        self.fed_size = memory_size if self.feed == "context" else hidden_size
        self.window = window
        self.window_size = check_window(window, window_size)
        self.history = cast(HistoryName | None, history)
        self._names = [name for layer in range(num_layers) for name in self._layer_names(layer)]

        rows = GATES[self.cell] * hidden_size
        for layer in range(num_layers):
            columns = hidden_size
            if layer == 0:
                columns = input_size + (self.fed_size if self.input_feeding else 0)
            shapes = ((rows, columns), (rows, hidden_size), (rows,), (rows,))
            for name, shape in zip(self._layer_names(layer), shapes, strict=True):
                weight = torch.empty(shape, device=device, dtype=dtype)
                self.register_parameter(name, torch.nn.Parameter(weight))
        self.score: Score | None = None
        self.positions: Positions | None = None
        self.combine: torch.nn.Linear | None = None
        if score is not None:
            self.score = Score(
                score,
                hidden_size,
                memory_size,
                attention_size,
                heads=heads,
                max_positions=max_positions,
                history_size=history_size,
                device=device,
                dtype=dtype,
            )
            if window == "local-p":
                self.positions = Positions(hidden_size, device=device, dtype=dtype)
            self.combine = torch.nn.Linear(
                memory_size + hidden_size, hidden_size, bias=False, device=device, dtype=dtype
            )
        self._reset_layers()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        fill_in(self, _PICKLED)
        names = [name for layer in range(self.num_layers) for name in self._layer_names(layer)]
        fill_in(self, {"fed_size": self.hidden_size, "_names": names})

    @staticmethod
    def _layer_names(layer: int) -> tuple[str, ...]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return tuple(f"{name}_l{layer}" for name in names)

    def _reset_layers(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for weight in self.parameters(recurse=False):
            init.uniform_(weight, -bound, bound)
        if self.forget_bias is not None:
            set_forget_bias(
                self,
                [names[2:] for names in map(self._layer_names, range(self.num_layers))],
                self.forget_bias,
            )

    def reset_parameters(self) -> None:
        """Draw all weights anew: those of the layers as torch.nn does, within 1/sqrt(H); then set
        the biases of forget gates to ``forget_bias``."""
        check_not_quantized(self)
        if self.score is not None and self.combine is not None:
            self.score.reset_parameters()
            self.combine.reset_parameters()
        if self.positions is not None:
            self.positions.reset_parameters()
        self._reset_layers()

    def layer_weights(self) -> list[LayerWeights]:
        """The weights of each layer as they are now."""
        return [
            LayerWeights(*weights_now(self, self._layer_names(layer)))
            for layer in range(self.num_layers)
        ]

    def project(self, memory: Tensor, lengths: Tensor | None = None) -> Tensor | None:
        """The keys of ``memory``, for ``forward(..., keys=...)``; None without attention.

        Whoever calls ``forward`` many times with the same memory, as step by step
        generation does, computes them once.

        Args:
            memory: (S, B, M), or (B, S, M) with ``batch_first``; the keys likewise.
            lengths: (B,) int64, as in :meth:`Score.project`.
        """
        score = self.score
        if score is None:
            return None
        if self.batch_first:
            check_shape("memory", memory, "(B, S, M)", (-1, -1, self.memory_size))
            return score.project(memory.transpose(0, 1), lengths).transpose(0, 1)
        return score.project(memory, lengths)

    def start(self, hidden: State) -> DecoderState:
        """The state before the first step: nothing is fed yet, and no weights are past.

        Args:
            hidden: h (L, B, H), or for LSTM (h, c).
        """
        h = state_parts(self.cell, hidden)[0]
        attention = None
        if self.window is not None or self.history is not None:
            step = torch.zeros(h.shape[1], dtype=torch.int64, device=h.device)
            attention = AttentionState(step, None)
        return DecoderState(hidden, h.new_zeros(h.shape[1], self.fed_size), attention)

    def _check_state(self, state: DecoderStart | None, batch: int) -> tuple[Tensor, ...]:
        """The parts of the hidden state, ``()`` for zero."""
        parts, feed = decoder_parts(self.cell, state)
        expected = (self.num_layers, batch, self.hidden_size)
        for name, part in zip(("h", "c"), parts, strict=False):
            check_shape(f"{name} of state.hidden", part, "(L, B, H)", expected)
        if feed is not None:
            letters = "(B, H)" if self.feed == "output" else "(B, M)"
            check_shape("state.feed", feed, letters, (batch, self.fed_size))
        return parts

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        state: DecoderStart | None = None,
        need_weights: bool = False,
        keys: Tensor | None = None,
        dropout_masks: Tensor | None = None,
        memory_rows: Tensor | None = None,
    ) -> DecoderOutput:
        """Run all steps of ``x``.

        Args:
            x: (T, B, I), T at least 1, in the dtype of the weights.
            memory: (S, B, M). Not read, and may be left out, with ``score=None``.
            lengths: (B,) int64, valid positions of each row of the memory, on any device.
                Default: S.
            state: what the last call returned, or ``(hidden, feed)``: h (L, B, H), or for LSTM
                (h, c), and what is fed (B, F), either of them None for zero; ``(hidden, None)`` or
                :meth:`start` to begin with a window or a history. Default: all zero.
            need_weights: also return the attention weights.
            keys: what :meth:`project` gave for this memory. Default: computed here.
            dropout_masks: (L-1, T, B, H), what :meth:`draw_dropout_masks` gave, where several
                calls are to drop the same. Default: drawn here, in training.
            memory_rows: (B,) int64, the row of memory, keys and lengths that each row attends to,
                of as many as these have. Default: its own.

        Returns:
            The output (T, B, H), the weights (T, B, S), of several heads (T, B, N, S), or None,
            and the state from which the next call goes on.

        Raises:
            ValueError: the state has the wrong form, or x another dtype than the weights.
            RuntimeError: a tensor has the wrong shape, dtype or device, or is missing.
            TypeError: what must be a tensor is none.
        """
        if type(self) is AttentionDecoder and dropout_masks is memory_rows is None:
            whole = decode_whole(self, self._names, x, memory, keys, lengths, state, need_weights)
            if whole is not None:
                return self._in_layout(whole)
        letters = "(B, T, I)" if self.batch_first else "(T, B, I)"
        check_shape("x", x, letters, (-1, -1, self.input_size))
        if self.batch_first:
            x = x.transpose(0, 1)
        check_input("x", x, self.weight_ih_l0, self.training)
        parts = self._check_state(state, x.shape[1])
        if self.score is None:
            result = self._forward_plain(x, parts, dropout_masks)
        else:
            if memory is None:
                raise RuntimeError("memory must be given unless score is None, got None")
            batch = x.shape[1] if memory_rows is None else -1
            if self.batch_first:
                check_shape("memory", memory, "(B, S, M)", (batch, -1, self.memory_size))
                memory = memory.transpose(0, 1)
                if keys is not None:
                    check_shape("keys", keys, "(B, S, A)", (batch, -1, -1))
                    keys = keys.transpose(0, 1)
            else:
                check_shape("memory", memory, "(S, B, M)", (-1, batch, self.memory_size))
            result = self._forward_attentive(
                x, memory, keys, lengths, state, need_weights, dropout_masks, memory_rows
            )
        return self._in_layout(result)

    def _in_layout(self, result: DecoderOutput) -> DecoderOutput:
        if not self.batch_first:
            return result
        weights = None if result.weights is None else result.weights.transpose(0, 1)
        return DecoderOutput(result.output.transpose(0, 1), weights, result.state)

    def draw_dropout_masks(self, steps: int, batch: int) -> Tensor | None:
        """What the outputs of all layers but the last are multiplied with in a call.

        Args:
            steps, batch: T and B of the call.

        Returns:
            (L-1, T, B, H); None if nothing is dropped.
        """
        if not self.training or self.dropout == 0 or self.num_layers == 1:
            return None
        shape = (self.num_layers - 1, steps, batch, self.hidden_size)
        return apply_dropout(self.weight_ih_l0.new_ones(shape), self.dropout)

    def _forward_plain(
        self, x: Tensor, parts: tuple[Tensor, ...], dropout_masks: Tensor | None
    ) -> DecoderOutput:
        layers = self.layer_weights()
        masks = None if dropout_masks is None else dropout_alone(dropout_masks)
        if masks is None:
            masks = draw_masks(
                Probabilities(self.dropout if self.training else 0.0),
                [(layer.w_ih, layer.w_hh, None) for layer in layers],
                1,
                x.shape[0],
                x.shape[1],
                GATES[self.cell],
            )
        output, parts, _ = scan_layers(
            x, [(*layer, None, None) for layer in layers], parts, cell=self.cell, masks=masks
        )
        return DecoderOutput(output, None, DecoderState(join_parts(parts), output[-1]))

    def _forward_attentive(
        self,
        x: Tensor,
        memory: Tensor,
        keys: Tensor | None,
        lengths: Tensor | None,
        state: DecoderStart | None,
        need_weights: bool,
        dropout_masks: Tensor | None,
        memory_rows: Tensor | None,
    ) -> DecoderOutput:
        assert self.score is not None
        assert self.combine is not None
        if dropout_masks is None:
            dropout_masks = self.draw_dropout_masks(x.shape[0], x.shape[1])
        if keys is None:
            keys = self.score.project(memory, lengths)
        whole = is_bare(self.combine, torch.nn.Linear)
        if not whole or not (self.positions is None or is_bare(self.positions, Positions)):
            return decode_stepwise(
                self, x, memory, keys, lengths, state, need_weights, dropout_masks, memory_rows
            )
        return self._decode(
            x,
            memory,
            keys,
            self.combine.weight,
            lengths,
            state,
            need_weights,
            dropout_masks,
            memory_rows,
            input_feeding=self.input_feeding,
            feed=self.feed,
        )

    def _decode(
        self,
        x: Tensor,
        memory: Tensor,
        keys: Tensor,
        combine: Tensor,
        lengths: Tensor | None,
        state: DecoderStart | None,
        need_weights: bool,
        dropout_masks: Tensor | None,
        memory_rows: Tensor | None,
        *,
        input_feeding: bool,
        feed: FeedName,
    ) -> DecoderOutput:
        assert self.score is not None
        return functional.decode(
            x,
            self.layer_weights(),
            keys,
            memory,
            combine,
            cell=self.cell,
            score=self.score.fused,
            weight_query=self.score.weight_query,
            weight_v=self.score.weight_v,
            weight_history=self.score.weight_history,
            weight_position=None if self.positions is None else self.positions.weight,
            weight_position_v=None if self.positions is None else self.positions.weight_v,
            state=state,
            lengths=self.score.limit(memory, lengths),
            order=self.order,
            input_feeding=input_feeding,
            feed=feed,
            heads=self.score.heads,
            window=self.window_size,
            history=self.history,
            dropout_masks=dropout_masks,
            need_weights=need_weights,
            memory_rows=memory_rows,
        )

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, {self.memory_size}, {self.num_layers}"
        text += f", cell={self.cell!r}, input_feeding={self.input_feeding}"
        text += changed_options(
            self,
            order="luong",
            feed="context" if self.order == "bahdanau" else "output",
            window=None,
            window_size=None,
            history=None,
            forget_bias=None,
            dropout=0.0,
            batch_first=False,
        )
        return text + quantized_repr(self)
