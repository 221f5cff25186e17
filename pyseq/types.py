# SPDX-License-Identifier: Apache-2.0
"""Names shared by the operators and their reference: cells, scores, states, results."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor

CellName = Literal[
    "rnn_tanh",
    "rnn_relu",
    "gru",
    "lstm",
    "indrnn_tanh",
    "indrnn_relu",
    "gru_reset_before",
    "slstm_sigmoid",
    "slstm_exp",
]
ScoreName = Literal["dot", "general", "concat", "location", "scaled_dot"]
OrderName = Literal["luong", "bahdanau"]
FeedName = Literal["output", "context"]
HistoryName = Literal["previous", "cumulative"]
WindowName = Literal["local-m", "local-p"]

#: Rows of weight per hidden unit, in torch.nn's order (LSTM i, f, g, o; GRU r, z, n).
GATES: dict[str, int] = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
#: The same of the cells that a scan takes, where a decoder takes those above.
SCAN_GATES: dict[str, int] = {
    **GATES,
    "indrnn_tanh": 1,
    "indrnn_relu": 1,
    "gru_reset_before": 3,
    "slstm_sigmoid": 4,
    "slstm_exp": 4,
}
#: The parts of a state beside h, for cells that have some.
STATES: dict[str, str] = {"lstm": "c", "slstm_sigmoid": "cnm", "slstm_exp": "cnm"}
#: Cells of which no matrix multiplies the state: ``w_hh`` is (H,).
DIAGONAL: tuple[str, ...] = ("indrnn_tanh", "indrnn_relu")
SCORES: tuple[str, ...] = ("dot", "general", "concat", "location", "scaled_dot")
WINDOWS: tuple[str, ...] = ("local-m", "local-p")
ORDERS: tuple[str, ...] = ("luong", "bahdanau")
FEEDS: tuple[str, ...] = ("output", "context")
HISTORIES: tuple[str, ...] = ("previous", "cumulative")
DEFAULT_WINDOW_SIZE = 10  # D of Luong et al. 2015, arXiv 1508.04025, section 4.1
DEFAULT_HISTORY_SIZE = 31  # K of Shen et al. 2018, arXiv 1712.05884, section 2.3

#: h for RNN and GRU, (h, c) for LSTM, as in torch.nn; (h, c, n, m) for sLSTM.
State = Tensor | tuple[Tensor, ...]


def kind(value: object) -> str:
    """What ``value`` is, in the words of an error message."""
    size = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"{type(value).__name__}{size}"


def state_parts(cell: CellName, state: State | None) -> tuple[Tensor, ...]:
    """``state`` as a tuple: ``()`` for None, ``(h,)``, or what ``STATES`` says.

    Raises:
        ValueError: ``state`` does not have the form that ``cell`` takes.
    """
    if state is None:
        return ()
    if cell == "lstm":
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            raise ValueError(f"the state of an lstm must be a pair (h, c), got {kind(state)}")
        pair: Any = state
        h, c = pair
        if isinstance(h, Tensor) and isinstance(c, Tensor):
            return h, c
        name, part = ("c", c) if isinstance(h, Tensor) else ("h", h)
        raise ValueError(
            f"the state of an lstm must be a pair of tensors (h, c), got {kind(part)} for {name}"
        )
    if cell in STATES:
        names = "h" + STATES[cell]
        if not isinstance(state, (tuple, list)) or len(state) != len(names):
            raise ValueError(
                f"the state of {cell} must be a tuple ({', '.join(names)}), got {kind(state)}"
            )
        for name, part in zip(names, state, strict=True):
            if not isinstance(part, Tensor):
                raise ValueError(
                    f"the state of {cell} must be a tuple of tensors ({', '.join(names)}), got "
                    f"{kind(part)} for {name}"
                )
        return tuple(state)
    if not isinstance(state, Tensor):
        raise ValueError(f"the state of {cell} must be one tensor h, got {kind(state)}")
    return (state,)


def join_parts(parts: tuple[Tensor, ...]) -> State:
    """The inverse of :func:`state_parts` for a state that is there."""
    return parts[0] if len(parts) == 1 else parts


def decoder_parts(
    cell: CellName, state: DecoderStart | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The parts of ``state.hidden`` as :func:`state_parts` gives them, and ``state.feed``.

    Raises:
        ValueError: ``state`` is not a pair of what ``cell`` takes and a tensor, or None.
    """
    if state is None:
        return (), None
    # The third part, which not every decoder has, is for `attention_parts`.
    if not isinstance(state, (tuple, list)) or len(state) not in (2, 3):
        raise ValueError(f"state must be a pair (hidden, feed), got {kind(state)}")
    hidden, feed = state[:2]
    if feed is not None and not isinstance(feed, Tensor):
        raise ValueError(f"state.feed must be a tensor, got {kind(feed)}")
    return state_parts(cell, hidden), feed


def attention_parts(state: object) -> tuple[Tensor | None, Tensor | None]:
    """``state.attention`` as ``(step, weights)``, None for what is not there.

    Raises:
        ValueError: it is not a pair of tensors or None.
    """
    attention = state[2] if isinstance(state, (tuple, list)) and len(state) == 3 else None
    if attention is None:
        return None, None
    if not isinstance(attention, (tuple, list)) or len(attention) != 2:
        raise ValueError(f"state.attention must be a pair (step, weights), got {kind(attention)}")
    for name, part in zip(("step", "weights"), attention, strict=True):
        if part is not None and not isinstance(part, Tensor):
            raise ValueError(f"state.attention.{name} must be a tensor, got {kind(part)}")
    return attention[0], attention[1]


class LayerWeights(NamedTuple):
    """Weights of one recurrent layer; a plain tuple in this order serves as well."""

    w_ih: Tensor  # (G*H, I)
    w_hh: Tensor  # (G*H, H)
    b_ih: Tensor | None = None  # (G*H,)
    b_hh: Tensor | None = None  # (G*H,)


class LayerNormWeights(NamedTuple):
    """What scales a layer's normalised sums; a plain tuple in this order serves as well."""

    gain_ih: Tensor  # (G*H,), of W_ih x
    gain_hh: Tensor  # (G*H,), of W_hh h
    gain_c: Tensor | None = None  # (H,), of c, LSTM only
    bias_c: Tensor | None = None  # (H,), LSTM only


class ScanExtras(NamedTuple):
    """What acts on one direction of a layer besides its weights, which
    :func:`pyseq.functional.scan` takes by name; a plain tuple in this order serves as well."""

    h_mask: Tensor | None = None
    zoneout_h: Tensor | None = None
    zoneout_c: Tensor | None = None
    reset_state: State | None = None
    layer_norm: LayerNormWeights | tuple[Tensor, ...] | None = None


class ScanOutput(NamedTuple):
    """What ``scan`` returns."""

    output: Tensor  # (T, B, P), zero at padded steps
    state: State  # the state after each row's last valid step


class ScanStates(NamedTuple):
    """What ``scan`` returns with ``return_states``."""

    output: Tensor  # (T, B, P), zero at padded steps
    state: State  # the state after each row's last valid step
    states: State  # the state after every step, (T, B, .) each, zero at padded steps


class AttendOutput(NamedTuple):
    """What ``attend`` returns."""

    context: Tensor  # (T, B, M)
    #: (T, B, S), zero at padded positions; of several heads (T, B, N, S).
    weights: Tensor | None


class AttendHistoryOutput(NamedTuple):
    """What ``attend_history`` returns."""

    context: Tensor  # (T, B, M)
    #: (T, B, S), zero at padded positions; of several heads (T, B, N, S).
    weights: Tensor | None
    #: (B, N, S), the weights of the last step or the sum of all, from which the next call goes on.
    past: Tensor


class AttentionState(NamedTuple):
    """What attention itself remembers between two steps."""

    step: Tensor  # (B,) int64, how many steps there were
    #: (B, N, S), those of the last step or the sum of all, if they enter the score.
    weights: Tensor | None

    def select(self, rows: Tensor) -> AttentionState:
        """That of the given rows (N,) int64 of the batch, which may repeat."""
        weights = None if self.weights is None else self.weights.index_select(0, rows)
        return AttentionState(self.step.index_select(0, rows), weights)

    def detach(self) -> AttentionState:
        """The same without gradients to the steps before."""
        return AttentionState(self.step, None if self.weights is None else self.weights.detach())


class DecoderState(NamedTuple):
    """The state of an attention decoder between two steps."""

    hidden: State  # h (L, B, H), or (h, c) for LSTM
    #: What is fed back: the last attentional vector (B, H), or the last context (B, M).
    feed: Tensor
    #: None if attention looks neither at the number of the step nor at its last weights.
    attention: AttentionState | None = None

    def select(self, rows: Tensor) -> DecoderState:
        """That of the given rows (N,) int64 of the batch, which may repeat."""
        hidden = self.hidden
        selected: State = (
            hidden.index_select(1, rows)
            if isinstance(hidden, Tensor)
            else tuple([part.index_select(1, rows) for part in hidden])
        )
        attention = None if self.attention is None else self.attention.select(rows)
        return DecoderState(selected, self.feed.index_select(0, rows), attention)

    def detach(self) -> DecoderState:
        """The same without gradients to the steps before, for truncated back-propagation."""
        hidden = self.hidden
        detached: State = (
            hidden.detach()
            if isinstance(hidden, Tensor)
            else tuple(part.detach() for part in hidden)
        )
        attention = None if self.attention is None else self.attention.detach()
        return DecoderState(detached, self.feed.detach(), attention)


#: What a decoder starts from: its state, or of that the pair (hidden, feed); None is for zero.
DecoderStart = DecoderState | tuple[State | None, Tensor | None]


class DecoderOutput(NamedTuple):
    """What ``decode`` and ``AttentionDecoder`` return."""

    output: Tensor  # (T, B, H), the attentional vectors
    weights: Tensor | None  # (T, B, S), zero at padded positions
    state: DecoderState


class Copies(NamedTuple):
    """What a model that copies may copy: the target's token at each source position."""

    #: (B, S) int64: ids of the target's vocabulary, and from V on those of the tokens that it
    #: lacks, counted in each row; below ``UNK`` where nothing may be copied, as in the padding.
    ids: Tensor
    extra: int  # X: such tokens have ids below V + X

    def select(self, rows: Tensor) -> Copies:
        """Those of the given rows (N,) int64, which may repeat."""
        return Copies(self.ids.index_select(0, rows), self.extra)


class GenerateOutput(NamedTuple):
    """What ``generate`` returns: the best sequence of each row; the n best ones side by side where
    more are asked for, and then B stands for B * n."""

    tokens: Tensor  # (B, T) int64, T the longest, ``<pad>`` after the last token of a row
    lengths: Tensor  # (B,) int64, tokens of each row, ``<stop>`` not counted
    scores: Tensor  # (B,), log P in nats, that of ``<stop>`` included where it was reached
    weights: Tensor | None  # (B, T, S), attention, zero at padding on either side


#: Ids of the symbols that every vocabulary begins with: <pad>, <start>, <stop>, <unk>.
PAD, START, STOP, UNK = range(4)

#: What stands for a label that does not count, as in torch.nn.
IGNORE = -100
