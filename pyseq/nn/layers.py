# SPDX-License-Identifier: Apache-2.0
"""The recurrent layers: RNN, GRU, LSTM, IndRNN, SLSTM."""

from __future__ import annotations

import torch
from torch.nn import init

from ..types import CellName
from ._common import (
    Device,
    add_weight,
    changed_options,
    check_layer_norm,
    check_nonlinearity,
    check_slstm,
)
from ._recurrent import Recurrent


def _refuse_projection(proj_size: object) -> None:
    if proj_size is not None:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


class RNN(Recurrent):
    """Elman layers: ``h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)``, or relu.

    A drop-in for torch.nn.RNN that also takes ``lengths`` and ``resets``.

    Args:
        input_size: I, features of a step.
        hidden_size: H, units of a layer and direction.
        num_layers: layers; each reads the outputs of the one below.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: whether the layers have ``bias_ih`` and ``bias_hh``.
        batch_first: tensors are (B, T, .) instead of (T, B, .); states are not concerned.
        dropout: probability of zeroing an output of any layer but the last, in training.
        bidirectional: run each layer in both directions and concatenate their outputs.
        device, dtype: of the parameters.
        proj_size: refused with torch.nn's words, as there.
        residual: add a layer's input, as it was before any dropout, to its output. Layers whose
            input has another size than their output stay plain; above the first there are none.
        variational_dropout: probability of zeroing a feature of a layer's input, of every
            layer, in all steps of a row at once, in training. One mask per call and row.
        recurrent_dropout: the same of h_{t-1} where ``weight_hh`` reads it, with a mask of its
            own for each layer and direction. What a GRU carries over of h stays whole.
        weight_dropout: probability of zeroing a number of ``weight_hh`` (DropConnect), in
            training. One mask per call, the same in all steps and rows.
        zoneout_h: probability that a unit of h keeps its old value in a step, in training; in
            evaluation the old value's share in the new one.
        layer_norm: normalise ``W_ih x`` and ``W_hh h``, each over all gates of a row, and in an
            LSTM c on its way to h. Adds the gains ``gain_ih`` and ``gain_hh`` (G*H) and for LSTM
            ``gain_c`` and ``bias_c`` (H) of each layer and direction, named as the weights are;
            ``bias_ih`` and ``bias_hh`` are added after the normalisation.
        learned_state: make the initial state parameters ``h_0`` (L*D, P) and for LSTM ``c_0``
            (L*D, H), zero at first, that stand in where a call gives no state, and that
            ``resets`` return to.
        keep_every: above 1 backward keeps the state at every k-th step only and runs each stretch
            of k steps forward once more; see :func:`pyseq.functional.scan`. May be set later too.

    With ``residual`` the last state is that of the cells, to which no input is added: it is not the
    last step of the output then.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument has the wrong type.

    Reference:
        Elman 1990, Finding Structure in Time; Gal & Ghahramani 2016, arXiv 1512.05287
        (variational and recurrent dropout); Krueger et al. 2017, arXiv 1606.01305, section 3.2
        (zoneout); Ba et al. 2016, arXiv 1607.06450, eq. 20 to 22 (layer normalisation); Merity
        et al. 2018, arXiv 1708.02182, section 2 (weight dropout).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: None = None,
        residual: bool = False,
        variational_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout_h: float = 0.0,
        layer_norm: bool = False,
        learned_state: bool = False,
        keep_every: int = 1,
    ) -> None:
        _refuse_projection(proj_size)
        check_nonlinearity(nonlinearity)
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__(f"RNN_{nonlinearity.upper()}", *sizes, 0, device, dtype)
        self.nonlinearity = nonlinearity
        self._set_options(
            residual=residual,
            variational_dropout=variational_dropout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
            zoneout_h=zoneout_h,
            layer_norm=layer_norm,
            learned_state=learned_state,
            keep_every=keep_every,
        )


class GRU(Recurrent):
    """Gated recurrent units, with the reset gate applied after the recurrent product.

    ``r, z = sigmoid(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)``,
    ``n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))``,
    ``h_t = (1 - z) * n + z * h_{t-1}``.
    A drop-in for torch.nn.GRU that also takes ``lengths`` and ``resets``.

    Args, Raises: as :class:`RNN`, without ``nonlinearity``, and
        reset_after: whether the reset gate is applied after the product, as in torch.nn; False
            for ``n = tanh(W_in x_t + b_in + W_hn (r * h_{t-1}) + b_hn)``, which takes two
            products a step that wait for one another.

    Reference:
        Cho et al. 2014, arXiv 1406.1078, eq. 5 to 8, where the reset gate comes before the product.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: None = None,
        residual: bool = False,
        variational_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout_h: float = 0.0,
        layer_norm: bool = False,
        learned_state: bool = False,
        keep_every: int = 1,
        reset_after: bool = True,
    ) -> None:
        _refuse_projection(proj_size)
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__("GRU", *sizes, 0, device, dtype)
        check_layer_norm(layer_norm, reset_after=reset_after)
        self.reset_after = reset_after
        self._set_options(
            residual=residual,
            variational_dropout=variational_dropout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
            zoneout_h=zoneout_h,
            layer_norm=layer_norm,
            learned_state=learned_state,
            keep_every=keep_every,
        )


class LSTM(Recurrent):
    """Long short-term memory, optionally with a projected hidden state.

    ``i, f, g, o`` from ``W_ih x_t + b_ih + W_hh h_{t-1} + b_hh`` (sigmoid, tanh for g);
    ``c_t = f * c_{t-1} + i * g``; ``h_t = o * tanh(c_t)``, or with ``proj_size``
    ``h_t = W_hr (o * tanh(c_t))``. With peepholes the gates see c as well: what i and f are the
    sigmoid of has ``w_i * c_{t-1}`` and ``w_f * c_{t-1}`` added, and that of o ``w_o * c_t``.
    A drop-in for torch.nn.LSTM that also takes ``lengths`` and ``resets``.

    Args, Raises: as :class:`RNN`, without ``nonlinearity``, and
        proj_size: P, size of the projected hidden state, below H; 0 for none.
        zoneout_c: as ``zoneout_h``, of c.
        forget_bias: what the forget gates start from. Their two biases add up, so ``bias_ih``
            starts at this number and ``bias_hh`` at zero. Default: drawn as all others.
        peepholes: whether each layer and direction has ``weight_ch_l0`` (3*H,), the peepholes of
            i, f and o; drawn within 1/sqrt(H) like all others. Not with ``layer_norm``.

    Reference:
        Hochreiter & Schmidhuber 1997; Gers et al. 2000 (forget gate); Gers & Schmidhuber 2000,
        Recurrent nets that time and count (peepholes); Sak et al. 2014,
        arXiv 1402.1128, eq. 7 (projection); Jozefowicz et al. 2015, An Empirical Exploration
        of Recurrent Network Architectures, section 3.2 (a forget bias of 1).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        residual: bool = False,
        variational_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout_h: float = 0.0,
        layer_norm: bool = False,
        learned_state: bool = False,
        keep_every: int = 1,
        zoneout_c: float = 0.0,
        forget_bias: float | None = None,
        peepholes: bool = False,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__("LSTM", *sizes, proj_size, device, dtype)
        check_layer_norm(layer_norm, peepholes=peepholes)
        self.peepholes = peepholes
        if peepholes:
            for names, suffix in zip(self._all_weights, self._suffixes(), strict=True):
                add_weight(self, f"weight_ch_{suffix}", 3 * hidden_size)
                names.append(f"weight_ch_{suffix}")
        self._set_options(
            residual=residual,
            variational_dropout=variational_dropout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
            zoneout_h=zoneout_h,
            layer_norm=layer_norm,
            learned_state=learned_state,
            keep_every=keep_every,
            zoneout_c=zoneout_c,
            forget_bias=forget_bias,
        )


class IndRNN(Recurrent):
    """Independently recurrent layers, whose units see of the state themselves alone.

    ``h_t = relu(W_ih x_t + b_ih + w_hh * h_{t-1} + b_hh)`` with a vector ``w_hh``, or tanh. A
    step costs H multiplications instead of H^2; units meet in the layer above.

    Args, Raises: as :class:`RNN`, but for ``layer_norm``, which is of the recurrent product;
        ``nonlinearity`` is ``"relu"`` by default. ``weight_hh_l0`` is (H,) and drawn uniformly
        from 0 to 1, so that from the start there are units that forget at once and units that
        hardly do; all others within 1/sqrt(H). With relu, a weight above 1 lets its unit grow
        without bound: the paper keeps weights below 2^(1/T).

    Reference:
        Li et al. 2018, arXiv 1803.04831, eq. 4.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "relu",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        residual: bool = False,
        variational_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout_h: float = 0.0,
        learned_state: bool = False,
        keep_every: int = 1,
    ) -> None:
        check_nonlinearity(nonlinearity)
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__(f"RNN_{nonlinearity.upper()}", *sizes, 0, device, dtype)
        self.nonlinearity = nonlinearity
        for suffix in self._suffixes():
            add_weight(self, f"weight_hh_{suffix}", hidden_size)
        self._set_options(
            residual=residual,
            variational_dropout=variational_dropout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
            zoneout_h=zoneout_h,
            learned_state=learned_state,
            keep_every=keep_every,
        )

    @property
    def cell(self) -> CellName:
        """The cell's name in ``pyseq.functional``."""
        return "indrnn_relu" if self.nonlinearity == "relu" else "indrnn_tanh"

    def extra_repr(self) -> str:
        return super().extra_repr() + changed_options(self, nonlinearity="relu")

    def _reset_options(self) -> None:
        super()._reset_options()
        for suffix in self._suffixes():
            init.uniform_(getattr(self, f"weight_hh_{suffix}"))


class SLSTM(Recurrent):
    """LSTM layers with an exponential input gate, a normaliser and heads: sLSTM.

    ``i, f, z, o`` from ``W_ih x_t + b_ih + W_hh h_{t-1} + b_hh``, with ``i = exp(.)``,
    ``f = sigmoid(.)`` or ``exp(.)``, ``z = tanh(.)``, ``o = sigmoid(.)``;
    ``c_t = f c_{t-1} + i z``, ``n_t = f n_{t-1} + i``, ``h_t = o * c_t / n_t``, where c and n are
    kept relative to ``exp(m_t)`` with ``m_t = max(log f + m_{t-1}, log i)``.
    A unit sees of the state the units of its own head: ``weight_hh_l0`` is (4*H, H / heads).

    Args, Raises: as :class:`RNN`, without ``nonlinearity`` and ``layer_norm``, and
        num_heads: heads of each layer, equal groups of its units; H must be a multiple.
        forget_gate: ``"sigmoid"`` or ``"exp"``.
        forget_bias: as in :class:`LSTM`.
        learned_state: the parameters are ``h_0``, ``c_0`` and ``m_0`` (L*D, H), zero at first, and
            n is one: the scale ``exp(m)`` makes it any positive number. (From the empty state,
            which the first step forgets whatever it is, nothing could be learned.)

    The state is (h, c, n, m), each (L*D, B, H); zero is empty. All weights are drawn within
    1/sqrt(H).

    Reference:
        Beck et al. 2024, arXiv 2405.04517, section 2.2 and appendix A.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        num_heads: int = 1,
        forget_gate: str = "sigmoid",
        residual: bool = False,
        variational_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout_h: float = 0.0,
        learned_state: bool = False,
        keep_every: int = 1,
        forget_bias: float | None = None,
    ) -> None:
        check_slstm(hidden_size, num_heads, forget_gate)
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__("LSTM", *sizes, 0, device, dtype)
        self.num_heads = num_heads
        self.forget_gate = forget_gate
        for suffix in self._suffixes():
            add_weight(self, f"weight_hh_{suffix}", 4 * hidden_size, hidden_size // num_heads)
        self._set_options(
            residual=residual,
            variational_dropout=variational_dropout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
            zoneout_h=zoneout_h,
            learned_state=learned_state,
            keep_every=keep_every,
            forget_bias=forget_bias,
        )

    @property
    def cell(self) -> CellName:
        """The cell's name in ``pyseq.functional``."""
        return "slstm_exp" if self.forget_gate == "exp" else "slstm_sigmoid"

    def extra_repr(self) -> str:
        return super().extra_repr() + changed_options(self, num_heads=1, forget_gate="sigmoid")
