# SPDX-License-Identifier: Apache-2.0
"""A decoder of any recurrent layers, which attends when they have run: nothing is fed back.

What ``Decoder`` is built on where the fused operator of :class:`pyseq.nn.AttentionDecoder` does
not know the cell or an option of the layers.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor

from .._checks import check_positive, check_shape
from .._pickled import fill_in
from ..nn import AttentionDecoder, AttentionOptions, Positions, Score
from ..nn._attention_options import check_history
from ..nn._common import Device, changed_options
from ..nn._masks import DrawnMasks
from ..nn.attention import check_window
from ..recurrent import LayerOptions, build_layers, check_layer_options, layer_cell
from ..types import (
    GATES,
    AttendOutput,
    AttentionState,
    CellName,
    DecoderOutput,
    DecoderStart,
    DecoderState,
    HistoryName,
    State,
    attention_parts,
    decoder_parts,
    join_parts,
    state_parts,
)
from .sharing import Groups


class ScannedDecoder(torch.nn.Module):
    """Recurrent layers over all steps, then attention over all steps: two kinds of fused operators.

    With the output h_t of the top layer, ``out_t = tanh(W_c [c_t; h_t])`` where h_t attends
    over the memory for the context c_t, step after step where past weights enter the score; with
    ``score=None`` it is h_t. The arguments are those of :class:`pyseq.nn.AttentionDecoder`.

    Attributes:
        layers: the recurrent layers.
        score, positions, combine: as in :class:`pyseq.nn.AttentionDecoder`.

    Raises:
        ValueError: an option is unknown, a size is out of its range, or the attention is of a
            kind that feeds the steps after it.

    Reference:
        Luong et al. 2015, arXiv 1508.04025, eq. 5 to 10, without section 3.3 (input feeding).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        memory_size: int,
        num_layers: int,
        *,
        cell: CellName,
        score: str | None,
        dropout: float,
        attention: AttentionOptions,
        options: LayerOptions,
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
        if options.learned_state:
            raise ValueError(
                "learned_state is no option of a decoder, which starts from what it is given: the "
                "bridge 'learned' gives it a learned state"
            )
        allowed = AttentionOptions(
            attention_size=attention.attention_size,
            max_positions=attention.max_positions,
            heads=attention.heads,
            window=attention.window,
            window_size=attention.window_size,
            history=attention.history,
            history_size=attention.history_size,
        )
        if attention != (allowed if score is not None else AttentionOptions()):
            raise ValueError(
                f"a decoder with {_described(cell, options)} attends after its layers, feeds "
                "nothing back, and attends only with a score, "
                f"got score {score!r} and {attention}"
            )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.memory_size = memory_size
        self.num_layers = num_layers
        self.cell = cell
        self.fed_size = hidden_size
        self.layers = build_layers(
            cell,
            input_size,
            hidden_size,
            num_layers,
            options,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        self.window = attention.window
        self.window_size = check_window(attention.window, attention.window_size)
        history_size = check_history(score, attention.history, attention.history_size)
        self.history = cast(HistoryName | None, attention.history)
        self.score: Score | None = None
        self.positions: Positions | None = None
        self.combine: torch.nn.Linear | None = None
        if score is not None:
            self.score = Score(
                score,
                hidden_size,
                memory_size,
                attention.attention_size,
                heads=attention.heads,
                max_positions=attention.max_positions,
                history_size=history_size,
                device=device,
                dtype=dtype,
            )
            if attention.window == "local-p":
                self.positions = Positions(hidden_size, device=device, dtype=dtype)
            self.combine = torch.nn.Linear(
                memory_size + hidden_size, hidden_size, bias=False, device=device, dtype=dtype
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        fill_in(self, {"window": None, "history": None})

    def extra_repr(self) -> str:
        return changed_options(self, window=None, window_size=None, history=None).removeprefix(", ")

    def project(self, memory: Tensor, lengths: Tensor | None = None) -> Tensor | None:
        """The keys of ``memory`` (S, B, M); None without attention."""
        return None if self.score is None else self.score.project(memory, lengths)

    def start(self, hidden: State) -> DecoderState:
        """The state before the first step, with these hidden states."""
        h = state_parts(self.cell, hidden)[0]
        return DecoderState(
            hidden,
            h.new_zeros(h.shape[1], self.fed_size),
            self._after(None, 0, None, h[0]),
        )

    def _remembers(self) -> bool:
        """Whether attention looks at the number of the step, or at its last weights."""
        return self.window == "local-m" or self.history is not None

    def _after(
        self, step: Tensor | None, steps: int, past: Tensor | None, like: Tensor
    ) -> AttentionState | None:
        """What attention remembers ``steps`` steps after that one, of rows as in ``like`` (B, .):
        where a local-m window is, and past weights."""
        if not self._remembers():
            return None
        if step is None:
            step = torch.zeros(len(like), dtype=torch.int64, device=like.device)
        return AttentionState(step + steps, past)

    def draw_dropout_masks(self, steps: int, batch: int) -> DrawnMasks | None:
        """What the layers drop in a call; see :meth:`pyseq.nn.LSTM.draw_masks`."""
        return self.layers.draw_masks(steps, batch)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        state: DecoderStart | None = None,
        need_weights: bool = False,
        keys: Tensor | None = None,
        dropout_masks: DrawnMasks | None = None,
        memory_rows: Tensor | None = None,
    ) -> DecoderOutput:
        """Run all steps of ``x``.

        Args:
            x, memory, lengths, state, need_weights, keys, memory_rows: as in
                :meth:`pyseq.nn.AttentionDecoder.forward`, time-major. The state's feed is (B, H)
                or None, and not read.
            dropout_masks: what :meth:`draw_dropout_masks` gave, where several calls are to drop the
                same. Default: drawn here, in training.

        Returns, Raises: as there.
        """
        check_shape("x", x, "(T, B, I)", (-1, -1, self.input_size))
        parts, feed = decoder_parts(self.cell, state)
        if feed is not None:
            check_shape("state.feed", feed, "(B, H)", (x.shape[1], self.fed_size))
        step, past = attention_parts(state)
        if self._remembers() and feed is not None and step is None:
            raise ValueError(
                "state must have a third part (step, weights) with a window or a history, as what "
                "a call returned has; (hidden, None) starts anew; got (hidden, feed) without it"
            )
        hidden, last = self.layers(x, join_parts(parts) if parts else None, masks=dropout_masks)
        if self.score is None or self.combine is None:
            return DecoderOutput(hidden, None, DecoderState(last, hidden[-1]))
        if memory is None:
            raise RuntimeError("memory must be given unless score is None, got None")
        batch = x.shape[1] if memory_rows is None else -1
        check_shape("memory", memory, "(S, B, M)", (-1, batch, self.memory_size))
        keys = self.score.project(memory, lengths) if keys is None else keys
        number = step if self.window == "local-m" else None
        if self.history is not None:
            if memory_rows is not None:  # those that share a row are no steps in order
                memory, keys = memory[:, memory_rows], keys[:, memory_rows]
                lengths = None if lengths is None else lengths[memory_rows]
            context, weights, past = self.score.attend_history(
                hidden,
                keys,
                memory,
                lengths,
                history=self.history,
                past=past,
                positions=self.positions,
                window_size=self.window_size,
                step=number,
                need_weights=need_weights,
            )
        else:
            context, weights = self._attend(
                hidden, keys, memory, lengths, number, need_weights, memory_rows
            )
        output = self.combine(torch.cat([context, hidden], 2)).tanh()
        after = self._after(step, x.shape[0], past, x[0])
        return DecoderOutput(output, weights, DecoderState(last, output[-1], after))

    def _attend(
        self,
        query: Tensor,
        keys: Tensor,
        memory: Tensor,
        lengths: Tensor | None,
        step: Tensor | None,
        need_weights: bool,
        memory_rows: Tensor | None,
    ) -> AttendOutput:
        """Context and weights of all steps of ``query`` (T, B, H)."""
        assert self.score is not None

        def attend(query: Tensor, step: Tensor | None) -> AttendOutput:
            assert self.score is not None
            return self.score.attend(
                query,
                keys,
                memory,
                lengths,
                positions=self.positions,
                window_size=self.window_size,
                step=step,
                need_weights=need_weights,
            )

        if memory_rows is None:
            return attend(query, step)
        groups = Groups.of(memory_rows, memory.shape[1])
        rows = groups.gather(query.transpose(0, 1))  # (R, k * T, H)
        if self.window != "local-m":
            found = [attend(rows.transpose(0, 1), None)]
        else:
            # Windows go by the number of the step, so that of those side by side each has a call.
            if step is None:
                step = memory_rows.new_zeros(query.shape[1])
            steps = groups.gather(step.unsqueeze(1))  # (R, k)
            found = [
                attend(each.transpose(0, 1), own.contiguous())
                for each, own in zip(rows.split(query.shape[0], 1), steps.unbind(1), strict=True)
            ]
        context, *weights = (
            groups.scatter(torch.cat(parts).transpose(0, 1)).transpose(0, 1)
            for parts in zip(*found, strict=True)
            if parts[0] is not None
        )
        return AttendOutput(context, weights[0] if weights else None)


def build_decoder(
    input_size: int,
    hidden_size: int,
    memory_size: int,
    num_layers: int,
    *,
    cell: str,
    options: LayerOptions,
    score: str | None,
    input_feeding: bool,
    dropout: float,
    attention: AttentionOptions,
    device: Device,
    dtype: torch.dtype | None,
) -> AttentionDecoder | ScannedDecoder:
    """The layers of a decoder with its attention; the arguments are those of ``Decoder``.

    Raises:
        ValueError: an option is unknown, or does not go with the others.
    """
    name = layer_cell(cell)
    given = options.changed()
    check_layer_options(name, options)
    if name not in GATES or given.keys() - ({"forget_bias"} if name == "lstm" else set()):
        if input_feeding and score is not None:
            raise ValueError(
                "input_feeding goes with a decoder of the cells "
                f"{', '.join(GATES)} and of no layer options but forget_bias, got cell {name!r} "
                f"and {given}: pass input_feeding=False, or give them to the encoder alone"
            )
        return ScannedDecoder(
            input_size,
            hidden_size,
            memory_size,
            num_layers,
            cell=name,
            score=score,
            dropout=dropout,
            attention=attention,
            options=options,
            device=device,
            dtype=dtype,
        )
    return AttentionDecoder(
        input_size,
        hidden_size,
        memory_size,
        num_layers,
        cell=name,
        score=score,
        input_feeding=input_feeding,
        dropout=dropout if num_layers > 1 else 0.0,  # it is between layers
        device=device,
        dtype=dtype,
        forget_bias=options.forget_bias,
        **asdict(attention),
    )


def _described(cell: CellName, options: LayerOptions) -> str:
    names = ", ".join(options.changed())
    return f"the cell {cell}" + (f" and {names}" if names else "")
