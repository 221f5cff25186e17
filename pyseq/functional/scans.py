# SPDX-License-Identifier: Apache-2.0
"""The recurrent layer over a sequence: scan, scan_both."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import has_torch_function_unary

from .._checks import check_positive, check_tensor
from .._library import _C  # which registers torch.ops.pyseq
from ..types import (
    SCAN_GATES,
    CellName,
    LayerNormWeights,
    ScanExtras,
    ScanOutput,
    ScanStates,
    State,
    kind,
    state_parts,
)
from ._common import beside, check_option, h_and_c, join_state

#: What the layers of :mod:`pyseq.nn` ask before they call the operators.
scan_layers = _C.scan_layers
#: Weights of a direction, ``w_ch`` included.
_WITH_PEEPHOLES = 6


#: The tensors among the arguments of the operator, by their places; the first three must be there.
_TENSORS = {0: "x", 1: "w_ih", 2: "w_hh", 3: "b_ih", 4: "b_hh", 5: "w_hr"}
_TENSORS |= {14: "w_ch", 15: "h_mask", 16: "zoneout_h", 17: "zoneout_c"}
_NEEDED = 3


def _check_tensors(*arguments: object) -> None:
    """Raise a TypeError that names what must be a tensor and is none. Asked when a call was
    refused: before each it would take a part of the time of a small step."""
    for place, name in _TENSORS.items():
        given = arguments[place] if place < len(arguments) else None
        if place < _NEEDED or given is not None:
            check_tensor(name, given)


def _scan_operator(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.pyseq.scan``, past its Python binding where nothing looks on there: a fifth of
    the time of a small step."""
    if not is_compiling() and not has_torch_function_unary(x):
        try:
            return _C.scan(x, *others)
        except TypeError:
            _check_tensors(x, *others)  # else the binding says better what is wrong
    return torch.ops.pyseq.scan(x, *others)


def _flat_extras(
    cell: CellName, extras: ScanExtras, resets: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Checked, as the operators take them one by one."""
    if extras.reset_state is not None and resets is None:
        raise ValueError(
            "reset_state is what resets set the state to, and must be None without them, got "
            f"{kind(extras.reset_state)}"
        )
    norm = (None,) * 4 if extras.layer_norm is None else LayerNormWeights(*extras.layer_norm)
    return (*extras[:3], *h_and_c(state_parts(cell, extras.reset_state)), *norm)


@overload
def scan(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    state: State | None = None,
    *,
    cell: CellName = "lstm",
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    keep_every: int = 1,
    return_states: Literal[False] = False,
    w_ch: Tensor | None = None,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    reset_state: State | None = None,
    layer_norm: LayerNormWeights | tuple[Tensor, ...] | None = None,
) -> ScanOutput: ...


@overload
def scan(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    state: State | None = None,
    *,
    cell: CellName = "lstm",
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    keep_every: int = 1,
    return_states: Literal[True],
    w_ch: Tensor | None = None,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    reset_state: State | None = None,
    layer_norm: LayerNormWeights | tuple[Tensor, ...] | None = None,
) -> ScanStates: ...


@overload
def scan(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    state: State | None = None,
    *,
    cell: CellName = "lstm",
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    keep_every: int = 1,
    return_states: bool,
    w_ch: Tensor | None = None,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    reset_state: State | None = None,
    layer_norm: LayerNormWeights | tuple[Tensor, ...] | None = None,
) -> ScanOutput | ScanStates: ...


def scan(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    state: State | None = None,
    *,
    cell: CellName = "lstm",
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    keep_every: int = 1,
    return_states: bool = False,
    w_ch: Tensor | None = None,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    reset_state: State | None = None,
    layer_norm: LayerNormWeights | tuple[Tensor, ...] | None = None,
) -> ScanOutput | ScanStates:
    """Run one recurrent layer over a sequence, in one direction.

    ``h_t, c_t = cell(W_ih x_t + b_ih, W_hh h_{t-1} + b_hh, h_{t-1}, c_{t-1})`` with the
    gates in torch.nn's order: LSTM i, f, g, o; GRU r, z, n. P is H, or the rows of ``w_hr``.
    In float32 and without gradients the weights may be quantized; see :func:`pyseq.quantize`.

    The cells beyond torch.nn's: ``"indrnn_relu"`` and ``"indrnn_tanh"``, whose units see of the
    state themselves alone, ``h_t = relu(W_ih x_t + b_ih + w_hh * h_{t-1} + b_hh)`` with a vector
    ``w_hh``; and ``"lstm"`` with peepholes ``w_ch``, by which its gates see c:
    ``i = sigmoid(... + w_i * c_{t-1})``, f likewise, ``o = sigmoid(... + w_o * c_t)``;
    ``"gru_reset_before"``, as GRU was published, with the reset gate before the product,
    ``n = tanh(W_in x_t + b_in + W_hn (r * h_{t-1}) + b_hn)``; and ``"slstm_sigmoid"`` and
    ``"slstm_exp"``, an LSTM whose input gate, and in the second forget gate, is an exponential::

        c_t = f c_{t-1} + i z,  n_t = f n_{t-1} + i,  h_t = o * c_t / n_t,  z = tanh(...)
        m_t = max(log f + m_{t-1}, log i): all is kept relative to exp(m_t)

    with the gates i, f, z, o and a matrix ``w_hh`` for each head: the rows of a unit have the
    columns of the units of its own head. A state with ``n = 0`` is empty: the first step from it
    sets c, n and m by itself.

    Args:
        x: (T, B, I), floating-point, T at least 1.
        w_ih: (G*H, I), the input weights; G is 1 for RNN and IndRNN, 3 for GRU, 4 for LSTM and
            sLSTM.
        w_hh: (G*H, P), the recurrent weights; (H,) for IndRNN; (G*H, H / heads) for sLSTM.
        b_ih: (G*H,), added to the input part. Default: zero.
        b_hh: (G*H,), added to the recurrent part. Default: zero.
        w_hr: (P, H), LSTM only: ``h_t = W_hr (o * tanh(c_t))``.
        state: h (B, P), for LSTM the pair h (B, P), c (B, H), for sLSTM h, c, n, m (B, H).
            Default: zero.
        cell: ``"rnn_tanh"``, ``"rnn_relu"``, ``"gru"``, ``"lstm"``, ``"indrnn_tanh"``,
            ``"indrnn_relu"``, ``"gru_reset_before"``, ``"slstm_sigmoid"`` or ``"slstm_exp"``.
        lengths: (B,) int64, valid steps of each row, 0 to T, in any order, on any device.
            Later steps leave the state as it is and give a zero output.
        resets: (T, B) bool; where true, the row's state is set to zero (or to
            ``reset_state``) before that step, in values and in gradients.
        reverse: run from the last step (of each row, ``lengths[b] - 1``) to the first.
        keep_every: k above 1 keeps for backward, besides x, the state at every k-th step
            only, instead of gates and states of all; backward runs each stretch of k steps
            forward once more. For long sequences, whose memory binds.
        return_states: also return the state after every step.
        w_ch: (3*H,), LSTM only: the peepholes of i, f and o. Default: none.
        h_mask: (B, P), the same at all steps: ``h_mask * h_{t-1}`` is what ``w_hh`` multiplies, in
            place of ``h_{t-1}``. What a GRU carries over, ``z * h_{t-1}``, is not masked.
        zoneout_h: (T or 1, B or 1, P), in [0, 1]: the share of the old h in the new one,
            ``h_t = zoneout_h * h_{t-1} + (1 - zoneout_h) * h``, where h is what the cell (and
            ``w_hr``) gave. Ones and zeros in training, their expectation in evaluation.
        zoneout_c: (T or 1, B or 1, H), LSTM only: the same of c. The cell's h comes of its own c.
        reset_state: what ``resets``, which it needs, set the state to, of the form of ``state``,
            with or without the B. Default: zero.
        layer_norm: gains (G*H,) of ``W_ih x`` and of ``W_hh h``, and for LSTM gain (H,) and bias
            (H,) of c; see :class:`pyseq.types.LayerNormWeights`. ``gain_ih * norm(W_ih x) + b_ih``
            then stands for ``W_ih x + b_ih``, likewise ``W_hh h``, and LSTM's h is ``o *
            tanh(gain_c * norm(c) + bias_c)``, where norm takes off a row's mean and divides by
            its standard deviation (of the variance plus 1e-5), over all gates at once.

    Returns:
        ``output`` (T, B, P), and ``state`` after the last valid step, shaped as given. With
        ``return_states`` a third, ``states``: the state after every step, h (T, B, P), which
        is ``output``, or with c (T, B, H), and n and m, beside it; zero at padded steps.
        Gradients flow back from all of it.

    Raises:
        ValueError: an option is unknown or out of its range, or the state has the wrong form.
        RuntimeError: a tensor has the wrong shape, dtype or device.
        TypeError: what must be a tensor is none.

    Reference:
        Elman 1990; Cho et al. 2014, arXiv 1406.1078, eq. 5 to 8 (GRU; in ``"gru"`` the reset gate
        applies after the recurrent product, as in cuDNN); Hochreiter & Schmidhuber 1997 and Gers
        et al. 2000 (LSTM); Gers & Schmidhuber 2000, Recurrent nets that time and count
        (peepholes); Sak et al. 2014, arXiv 1402.1128, eq. 7 (projection); Li et al. 2018,
        arXiv 1803.04831, eq. 4 (IndRNN); Beck et al. 2024, arXiv 2405.04517, section 2.2 (sLSTM);
        Chen et al. 2016, arXiv 1604.06174 (keeping some states); Gal & Ghahramani 2016, arXiv
        1512.05287, eq. 7 (``h_mask``); Krueger et al. 2017, arXiv 1606.01305, section 3.2
        (zoneout); Ba et al. 2016, arXiv 1607.06450, eq. 20 to 22 (layer normalisation; their GRU,
        eq. 23 to 25, normalises the candidate apart from the other gates).
    """
    check_tensor("x", x)
    check_option("cell", cell, SCAN_GATES)
    if type(keep_every) is not int or keep_every != 1:
        check_positive(keep_every=keep_every)
    h_0, c_0 = (None, None) if state is None else h_and_c(state_parts(cell, state))
    extras: tuple[Tensor | None, ...] = ()
    # Reading them takes time, so none is passed if none is given.
    if not (h_mask is zoneout_h is zoneout_c is reset_state is layer_norm is None):
        given = ScanExtras(h_mask, zoneout_h, zoneout_c, reset_state, layer_norm)
        extras = _flat_extras(cell, given, resets)
    output, h_n, c_n, c_steps = _scan_operator(
        x,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        w_hr,
        h_0,
        c_0,
        None if lengths is None else beside("lengths", lengths, x),
        None if resets is None else beside("resets", resets, x),
        cell,
        reverse,
        keep_every,
        return_states,
        w_ch,
        *extras,
    )
    last = join_state(cell, h_n, c_n)
    if not return_states:
        return ScanOutput(output, last)
    return ScanStates(output, last, join_state(cell, output, c_steps))


def step(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    state: State | None = None,
    *,
    cell: CellName = "lstm",
    w_ch: Tensor | None = None,
    layer_norm: LayerNormWeights | tuple[Tensor, ...] | None = None,
) -> State:
    """The state after one step of a cell: :func:`scan` with T = 1, for streams.

    Args:
        x: (B, I), floating-point.
        w_ih, w_hh, b_ih, b_hh, state, cell, w_ch, layer_norm: as in :func:`scan`.

    Returns:
        h (B, H), or for LSTM (h, c), for sLSTM (h, c, n, m).

    Raises:
        ValueError, RuntimeError, TypeError: as :func:`scan`.

    Reference:
        As :func:`scan`.
    """
    if layer_norm is not None or is_compiling() or has_torch_function_unary(x):
        last: State = scan(
            x.unsqueeze(0),
            w_ih,
            w_hh,
            b_ih,
            b_hh,
            state=state,
            cell=cell,
            w_ch=w_ch,
            layer_norm=layer_norm,
        ).state
        return last
    check_option("cell", cell, SCAN_GATES)
    h, c = (None, None) if state is None else h_and_c(state_parts(cell, state))
    try:
        return join_state(cell, *_C.step(x, w_ih, w_hh, b_ih, b_hh, h, c, cell, w_ch))
    except TypeError:
        _check_tensors(x, w_ih, w_hh, b_ih, b_hh)
        if w_ch is not None:
            check_tensor("w_ch", w_ch)
        raise


def scan_both(
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    weights_reverse: tuple[Tensor | None, ...],
    state: State | None = None,
    *,
    cell: CellName = "lstm",
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    extras: tuple[ScanExtras, ScanExtras] | None = None,
) -> ScanOutput:
    """Run one recurrent layer over a sequence in both directions.

    The same as :func:`scan` forward with ``weights`` and in reverse with ``weights_reverse``,
    and the two outputs concatenated. On a CUDA device the two run side by side, and so do their
    gradients; on the CPU, where no gradient is wanted, with two threads each direction takes one.

    Args:
        x: (T, B, I), floating-point, T at least 1.
        weights, weights_reverse: ``(w_ih, w_hh, b_ih, b_hh, w_hr)`` as in :func:`scan`, where
            the last three may be None; and ``w_ch`` after them, for both or for neither.
        state: h (2, B, P), or for LSTM the pair h (2, B, P), c (2, B, H), of the forward
            direction first. Default: zero.
        cell, lengths, resets: as in :func:`scan`.
        extras: what else :func:`scan` takes for each direction: masks, zoneout, the state that
            resets return to, layer normalisation. Default: nothing.

    Returns:
        ``output`` (T, B, 2*P), and ``state`` after the last valid step of each direction,
        shaped as given.

    Raises:
        ValueError: an option is unknown, or the state has the wrong form.
        RuntimeError: a tensor has the wrong shape, dtype or device, or needs a gradient and
            there are quantized weights.
        TypeError: what must be a tensor is none.

    Reference:
        Schuster & Paliwal 1997, Bidirectional recurrent neural networks.
    """
    check_option("cell", cell, SCAN_GATES)
    h_0, c_0 = h_and_c(state_parts(cell, state))
    both = [weights, weights_reverse]
    check_tensor("x", x)
    if extras is not None:
        # The operator takes them behind the peepholes.
        both = [
            (
                *own,
                *(None,) * (_WITH_PEEPHOLES - len(own)),
                *_flat_extras(cell, ScanExtras(*more), resets),
            )
            for own, more in zip(both, extras, strict=True)
        ]
    output, h_n, c_n = torch.ops.pyseq.scan_both(
        x,
        (*both[0], *both[1]),
        h_0,
        c_0,
        beside("lengths", lengths, x),
        beside("resets", resets, x),
        cell,
    )
    return ScanOutput(output, join_state(cell, h_n, c_n))
