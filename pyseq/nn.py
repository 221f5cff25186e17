# SPDX-License-Identifier: Apache-2.0
"""Modules over the fused operators: recurrent layers, their cells, attention, its decoder.

RNN, GRU, LSTM and the cells replace those of torch.nn: same arguments, parameter names and
initialisation. Modules keep parameters and check arguments; ``functional`` computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor
from torch.nn import init
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import functional
from ._checks import autocasts, check_like, check_positive, check_shape, check_tensor
from ._dropout import apply_dropout, bernoulli_mask, check_probability
from ._packed import computing_dtype, is_quantized
from .reference import without_padding
from .types import (
    DEFAULT_HISTORY_SIZE,
    DEFAULT_WINDOW_SIZE,
    FEEDS,
    GATES,
    HISTORIES,
    ORDERS,
    SCAN_GATES,
    SCORES,
    WINDOWS,
    CellName,
    DecoderOutput,
    DecoderStart,
    DecoderState,
    FeedName,
    HistoryName,
    LayerNormWeights,
    LayerWeights,
    OrderName,
    ScanStates,
    ScoreName,
    State,
    decoder_parts,
    join_parts,
    state_parts,
)

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "SLSTM",
    "Attention",
    "AttentionDecoder",
    "AttentionOptions",
    "GRUCell",
    "IndRNN",
    "IndRNNCell",
    "LSTMCell",
    "Positions",
    "RNNCell",
    "SLSTMCell",
    "Score",
    "cell_name",
]

Device = torch.device | str | int | None

#: w_ih, w_hh, b_ih, b_hh, w_hr and w_ch of one layer and direction, as functional.scan takes them.
_ScanWeights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def cell_name(cell: str) -> CellName:
    """``cell`` as the operators spell it; ``"rnn"`` stands for ``"rnn_tanh"``.

    Raises:
        ValueError: there is no such cell.
    """
    name = "rnn_tanh" if cell == "rnn" else cell
    if name not in GATES:
        raise ValueError(f"cell must be one of {', '.join(GATES)}, rnn, got {cell!r}")
    return cast(CellName, name)


#: Cells by the mode of RNNBase.
_CELLS = {name.upper(): cell_name(name) for name in GATES}


def _check_nonlinearity(nonlinearity: object) -> None:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")


def _refuse_projection(proj_size: object) -> None:
    if proj_size is not None:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


def _check_input(name: str, tensor: Tensor, weight: Tensor, training: bool) -> None:
    """Raise unless a module with this weight can compute with ``tensor``, in this mode."""
    if tensor.dtype == weight.dtype:
        return
    dtype = computing_dtype(weight)
    if tensor.dtype != dtype and not autocasts(tensor.device):
        raise ValueError(
            f"RNN {name} dtype ({tensor.dtype}) does not match weight dtype ({dtype}). "
            f"Convert {name}: {name}.to({dtype}), or convert model: model.to({tensor.dtype})"
        )
    if training and is_quantized(weight):
        raise RuntimeError("a quantized module is for inference: call eval() on it, got train()")


class _ScanExtras(NamedTuple):
    """What acts on one layer and direction besides its weights, as functional.scan takes it."""

    h_mask: Tensor | None = None
    zoneout_h: Tensor | None = None
    zoneout_c: Tensor | None = None
    reset_state: State | None = None
    layer_norm: LayerNormWeights | None = None


class _Regularization(NamedTuple):
    """What a call does to stacked layers besides running them; see :class:`RNN`. Probabilities
    of dropout are those of this call: 0 in evaluation."""

    training: bool = False
    residual: bool = False
    variational_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    reset_parts: tuple[Tensor, ...] = ()  # (L*D, .) each, or () to reset to zero
    layer_norms: tuple[LayerNormWeights, ...] = ()  # of each layer and direction, or none

    def weights(self, own: _ScanWeights) -> _ScanWeights:
        """Those of one layer and direction, as this call sees them."""
        if self.weight_dropout == 0:
            return own
        w_ih, w_hh, *_ = own
        return w_ih, apply_dropout(w_hh, self.weight_dropout), own[2], own[3], own[4], own[5]

    @property
    def leaves_scans_alone(self) -> bool:
        acts = (self.recurrent_dropout, self.zoneout_h, self.zoneout_c)
        return not (any(acts) or self.reset_parts or self.layer_norms)

    def extras(self, x: Tensor, own: _ScanWeights, cell: CellName, index: int) -> _ScanExtras:
        """For the layer and direction of that index, whose input is ``x`` (T, B, I)."""
        if self.leaves_scans_alone:
            return _ScanExtras()
        w_hh, w_hr = own[1], own[4]
        steps, batch, _ = x.shape
        hidden = w_hh.shape[0] // SCAN_GATES[cell]
        width = hidden if w_hr is None else w_hr.shape[0]
        # Under autocast x may be of a type in which 1 / (1 - p) is inexact.
        like = w_hh if w_hh.is_floating_point() else x

        def share(probability: float, size: int) -> Tensor | None:
            if probability == 0:
                return None
            if self.training:
                return bernoulli_mask((steps, batch, size), probability, like)
            return like.new_full((1, 1, size), probability)

        mask = None
        if self.recurrent_dropout > 0:
            mask = apply_dropout(like.new_ones(batch, width), self.recurrent_dropout)
        parts = tuple(part[index] for part in self.reset_parts)
        return _ScanExtras(
            mask,
            share(self.zoneout_h, width),
            share(self.zoneout_c, hidden),
            join_parts(parts) if parts else None,
            self.layer_norms[index] if self.layer_norms else None,
        )


_PLAIN = _Regularization()


def _scan_layers(
    x: Tensor,
    weights: Sequence[_ScanWeights],
    parts: tuple[Tensor, ...],
    *,
    cell: CellName,
    directions: int = 1,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    dropout: float = 0.0,
    dropout_masks: Tensor | None = None,
    keep_every: int = 1,
    regularization: _Regularization = _PLAIN,
    return_states: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Stacked layers, one scan for each layer and direction.

    Args:
        x: (T, B, I).
        weights: those of each layer, and in it of each direction.
        parts: the initial state, ``()`` for zero, else h (L*D, B, P) and for LSTM c.
        cell, lengths, resets, keep_every, return_states: as in ``functional.scan``.
        directions: D, 1 or 2.
        dropout: probability of zeroing an output of a layer that is not the last one.
        dropout_masks: (L-1, T, B, D*P), what to multiply such outputs with, in its place.
        regularization: what else to do to them.

    Returns:
        The output (T, B, D*P) of the last layer, the last state in parts, and the states after
        every step in parts (L*D, T, B, .), ``()`` unless they are wanted.
    """
    states: list[tuple[Tensor, ...]] = []
    all_steps: list[tuple[Tensor, ...]] = []
    for first in range(0, len(weights), directions):
        below = x
        if first > 0 and dropout_masks is not None:
            x = x * dropout_masks[first // directions - 1]
        elif first > 0 and dropout > 0:
            x = apply_dropout(x, dropout)
        if regularization.variational_dropout > 0:
            shape = x.shape[1:]
            x = x * apply_dropout(x.new_ones(shape), regularization.variational_dropout)
        own = slice(first, first + directions)
        x, last, steps = _scan_layer(
            x,
            [regularization.weights(each) for each in weights[own]],
            tuple(part[own] for part in parts),
            cell=cell,
            lengths=lengths,
            resets=resets,
            keep_every=keep_every,
            return_states=return_states,
            regularization=regularization,
            first=first,
        )
        if regularization.residual and below.shape[-1] == x.shape[-1]:
            # Padding above the first layer is zero already.
            x = x + (below if states else without_padding(below, lengths))
        states.append(last)
        all_steps.append(steps)
    if len(states) == 1:
        return x, states[0], all_steps[0]
    return x, _join_layers(torch.cat, states), _join_layers(torch.cat, all_steps)


def _join_layers(
    join: Callable[[list[Tensor]], Tensor], states: list[tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """States in parts, each part of all layers or directions as one tensor."""
    return tuple(join(list(part)) for part in zip(*states, strict=True))


def _scan_layer(
    x: Tensor,
    weights: Sequence[_ScanWeights],
    parts: tuple[Tensor, ...],
    *,
    cell: CellName,
    lengths: Tensor | None,
    resets: Tensor | None,
    keep_every: int,
    return_states: bool,
    regularization: _Regularization,
    first: int,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """One layer of :func:`_scan_layers`, whose states are (D, B, P); ``first`` counts the layers
    and directions before it."""
    together = len(weights) == 2 and regularization.leaves_scans_alone and not return_states
    # A trace knows no list with None in it.
    if together and not torch.is_grad_enabled() and not torch.jit.is_tracing():
        state = join_parts(parts) if parts else None
        output, last = functional.scan_both(
            x, weights[0], weights[1], state, cell=cell, lengths=lengths, resets=resets
        )
        return output, state_parts(cell, last), ()
    outputs: list[Tensor] = []
    states: list[tuple[Tensor, ...]] = []
    all_steps: list[tuple[Tensor, ...]] = []
    for direction, own in enumerate(weights):
        extras = regularization.extras(x, own, cell, first + direction)
        result = functional.scan(
            x,
            *own[:5],
            join_parts(tuple(part[direction] for part in parts)) if parts else None,
            cell=cell,
            lengths=lengths,
            resets=resets,
            reverse=direction == 1,
            keep_every=keep_every,
            return_states=return_states,
            w_ch=own[5],
            h_mask=extras.h_mask,
            zoneout_h=extras.zoneout_h,
            zoneout_c=extras.zoneout_c,
            reset_state=extras.reset_state,
            layer_norm=extras.layer_norm,
        )
        outputs.append(result.output)
        states.append(state_parts(cell, result.state))
        all_steps.append(state_parts(cell, result.states) if isinstance(result, ScanStates) else ())
    if len(outputs) == 1:
        # The same as stacking, without a copy.
        ends, steps = (tuple(p.unsqueeze(0) for p in each[0]) for each in (states, all_steps))
        return outputs[0], ends, steps
    output = torch.cat(outputs, -1)
    return output, _join_layers(torch.stack, states), _join_layers(torch.stack, all_steps)


def _weights_now(module: torch.nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The attributes ``names`` of ``module`` as they are now.

    A parameter is found in its dictionary five times faster than by ``getattr``; what stands
    in for one (a parametrization, a pruned or normalised weight) is not in there.
    """
    parameters: dict[str, Any] = module._parameters
    try:
        return [parameters[name] for name in names]
    except KeyError:
        return [getattr(module, name) for name in names]


def _add_weight(module: _Recurrent | _Cell, name: str, *shape: int) -> None:
    """Give ``module`` a parameter drawn within 1/sqrt(H), in the place of one that is there."""
    bound = 1 / math.sqrt(module.hidden_size)
    like = module.weight_ih if isinstance(module, _Cell) else module.weight_ih_l0
    weight = torch.nn.Parameter(like.new_empty(shape))
    init.uniform_(weight, -bound, bound)
    module.register_parameter(name, weight)


def _refuse_script(module: torch.nn.Module) -> NoReturn:
    """What torch.jit.script asks for by the name ``__prepare_scriptable__``."""
    raise TypeError(
        f"torch.jit.script must be given layers of torch.nn, got pyseq's {type(module).__name__}; "
        "script pyseq.revert(copy.deepcopy(model)), or trace the model"
    )


class _Recurrent(torch.nn.RNNBase):
    """What the recurrent layers share.

    RNNBase gives the parameters, their initialisation and the argument checks. (The
    compiler front end refuses subclasses of torch.nn.LSTM itself, not of RNNBase.)
    """

    weight_ih_l0: Tensor

    #: k above 1 keeps only every k-th state for backward; see ``functional.scan``. May be set
    #: at any time.
    keep_every: int = 1

    #: Whether each option that torch.nn does not have is at its default, which is that of the
    #: class; found anew when one is set.
    _plain: bool = True

    # The options that torch.nn does not have. Their defaults stand here, so that modules pickled
    # before there were such options have them too.
    residual: bool = False
    variational_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    layer_norm: bool = False
    learned_state: bool = False
    forget_bias: float | None = None
    peepholes: bool = False
    reset_after: bool = True
    h_0: torch.nn.Parameter
    c_0: torch.nn.Parameter

    def _set_options(
        self,
        *,
        residual: bool,
        variational_dropout: float,
        weight_dropout: float,
        zoneout_h: float,
        learned_state: bool,
        recurrent_dropout: float = 0.0,
        layer_norm: bool = False,
        zoneout_c: float = 0.0,
        forget_bias: float | None = None,
    ) -> None:
        """Check and keep the options of :class:`RNN` and :class:`LSTM`, and make what they need."""
        for name, probability in (
            ("variational_dropout", variational_dropout),
            ("recurrent_dropout", recurrent_dropout),
            ("weight_dropout", weight_dropout),
            ("zoneout_h", zoneout_h),
            ("zoneout_c", zoneout_c),
        ):
            check_probability(name, probability)
            setattr(self, name, float(probability))
        directions = 2 if self.bidirectional else 1
        width = self.proj_size or self.hidden_size
        if residual and self.num_layers == 1 and self.input_size != directions * width:
            raise ValueError(
                "residual needs a layer whose input has the size of its output: num_layers "
                f"above 1, or input_size {directions * width}, got num_layers 1 and input_size "
                f"{self.input_size}"
            )
        self.residual = residual
        if forget_bias is not None and not self.bias:
            raise ValueError(
                f"forget_bias needs bias=True, got forget_bias {forget_bias!r} and no bias"
            )
        self.forget_bias = forget_bias
        self.learned_state = learned_state
        if learned_state:
            like, count = self.weight_ih_l0, self.num_layers * directions
            self.h_0 = torch.nn.Parameter(like.new_empty(count, width))
            if self.cell == "lstm":
                self.c_0 = torch.nn.Parameter(like.new_empty(count, self.hidden_size))
        self.layer_norm = layer_norm
        if layer_norm:
            for suffix in self._suffixes():
                for name, size in self._norm_sizes().items():
                    parameter = torch.nn.Parameter(self.weight_ih_l0.new_empty(size))
                    self.register_parameter(f"{name}_{suffix}", parameter)
        self._reset_options()

    def _norm_sizes(self) -> dict[str, int]:
        """How the gains and biases of layer normalisation begin, and how many numbers they are."""
        gates = GATES[self.cell] * self.hidden_size
        sizes = {"gain_ih": gates, "gain_hh": gates}
        if self.cell == "lstm":
            sizes |= {"gain_c": self.hidden_size, "bias_c": self.hidden_size}
        return sizes

    def _layer_norms(self) -> tuple[LayerNormWeights, ...]:
        """Those of each layer and direction as they are now, or none."""
        if not self.layer_norm:
            return ()
        return tuple(
            LayerNormWeights(*(getattr(self, f"{name}_{suffix}") for name in self._norm_sizes()))
            for suffix in self._suffixes()
        )

    def reset_parameters(self) -> None:
        """Draw all weights anew as torch.nn does; then set what the options say: learned
        states to zero, gains to one, the biases of forget gates to ``forget_bias``."""
        super().reset_parameters()
        self._reset_options()

    def _reset_options(self) -> None:
        for state in self._learned():
            init.zeros_(state)
        for norm in self._layer_norms():
            init.ones_(norm.gain_ih)
            init.ones_(norm.gain_hh)
            if norm.gain_c is not None and norm.bias_c is not None:
                init.ones_(norm.gain_c)
                init.zeros_(norm.bias_c)
        if self.forget_bias is None:
            return
        forget = slice(self.hidden_size, 2 * self.hidden_size)
        with torch.no_grad():
            for suffix in self._suffixes():
                getattr(self, f"bias_ih_{suffix}")[forget] = self.forget_bias
                getattr(self, f"bias_hh_{suffix}")[forget] = 0

    def _learned(self) -> tuple[Tensor, ...]:
        """The learned initial state in parts, each (L*D, .), or ``()``."""
        if not self.learned_state:
            return ()
        return (self.h_0, self.c_0) if self.cell == "lstm" else (self.h_0,)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name in (
            "residual",
            "variational_dropout",
            "recurrent_dropout",
            "weight_dropout",
            "zoneout_h",
            "zoneout_c",
            "layer_norm",
            "learned_state",
            "peepholes",
        ):
            if getattr(self, name):
                text += f", {name}={getattr(self, name)}"
        if not self.reset_after:
            text += ", reset_after=False"
        return text if self.forget_bias is None else f"{text}, forget_bias={self.forget_bias}"

    # RNNBase keeps a list of the weights for cuDNN and watches it at each assignment and call.
    # Here they are read by name at each call, which is what makes parametrizations,
    # functional_call and deepcopy of them work; the list is made for those who ask for it.

    @property
    def _flat_weights(self) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """All weights as they are now, in the order of torch.nn; a tuple, as changing it would
        change nothing else."""
        return tuple(getattr(self, name, None) for names in self._all_weights for name in names)

    __prepare_scriptable__ = _refuse_script

    def _init_flat_weights(self) -> None:
        self._flat_weight_refs = []

    def _update_flat_weights(self) -> None:
        """Do nothing: there is no list that could be out of date."""

    def __setattr__(self, name: str, value: Any) -> None:
        torch.nn.Module.__setattr__(self, name, value)
        cls = type(self)
        if hasattr(cls, name) and not name.startswith("_"):
            options = (each for each in vars(self) if hasattr(cls, each) and each[0] != "_")
            self._plain = all(getattr(self, each) == getattr(cls, each) for each in options)

    def _replicate_for_data_parallel(self) -> _Recurrent:
        return torch.nn.Module._replicate_for_data_parallel(self)

    @property
    def cell(self) -> CellName:
        """The cell's name in ``pyseq.functional``."""
        return _CELLS[self.mode] if self.reset_after else "gru_reset_before"

    def flatten_parameters(self) -> None:
        """Do nothing; the operators read the weights where they lie."""

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise unless ``input`` has this module's dtype, dimensions and input size."""
        (weight,) = _weights_now(self, ("weight_ih_l0",))
        _check_input("input", input, weight, self.training)
        expected_dim = 3 if batch_sizes is None else 2
        if input.dim() != expected_dim:
            raise RuntimeError(f"input must have {expected_dim} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.size(-1)}"
            )

    def _check_state(self, parts: tuple[Tensor, ...], batch: int) -> None:
        count = self.num_layers * (2 if self.bidirectional else 1)
        expected = (count, batch, self.proj_size or self.hidden_size)
        if len(parts) < 2:
            for h in parts:
                self.check_hidden_size(h, expected)
        else:
            for index, part in enumerate(parts):
                self.check_hidden_size(
                    part, expected, f"Expected hidden[{index}] size {{}}, got {{}}"
                )
                expected = (count, batch, self.hidden_size)

    def _refuse_state_dim(self, dim: int, parts: tuple[Tensor, ...]) -> NoReturn:
        kind = "batched" if dim == 3 else "unbatched"
        got = [f"{part.dim()}-D" for part in parts]
        what, tensors = "hx", f"{got[0]} tensor"
        if len(parts) > 1:
            what, tensors = "hx and cx", f"({', '.join(got)}) tensors"
        raise RuntimeError(
            f"For {kind} {dim}-D input, {what} should also be {dim}-D but got {tensors}"
        )

    def _explain(self, x: Tensor, parts: tuple[Tensor, ...]) -> None:
        """Raise what torch.nn says of tensors that the operators refuse, where it has words.

        Asked only when they did: a check of devices before would take as long as a small cell.
        """
        if x.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        others = [("parameter", self.weight_ih_l0), *(("hidden", part) for part in parts)]
        for name, tensor in others:
            if tensor.device != x.device:
                raise RuntimeError(
                    f"Input and {name} tensors are not at the same device, found input tensor at "
                    f"{x.device} and {name} tensor at {tensor.device}"
                )

    def _suffixes(self) -> list[str]:
        """How the names of the weights of each layer and direction end."""
        return [
            suffix
            for layer in range(self.num_layers)
            for suffix in (f"l{layer}", f"l{layer}_reverse")[: 2 if self.bidirectional else 1]
        ]

    def weight_names(self) -> list[str]:
        """The names of all matrices."""
        kinds = ("weight_ih", "weight_hh", *(("weight_hr",) if self.proj_size else ()))
        return [f"{kind}_{suffix}" for suffix in self._suffixes() for kind in kinds]

    def _weights(self) -> list[_ScanWeights]:
        """The weights of each layer and direction as they are now."""
        layers: list[_ScanWeights] = []
        for names in self._all_weights:
            w_ih, w_hh, *rest = _weights_now(self, names)
            w_ch = rest.pop() if self.peepholes else None
            w_hr = rest.pop() if self.proj_size else None
            b_ih, b_hh = rest or (None, None)
            layers.append((w_ih, w_hh, b_ih, b_hh, w_hr, w_ch))
        return layers

    def _scan(
        self,
        x: Tensor,
        parts: tuple[Tensor, ...],
        lengths: Tensor | None,
        resets: Tensor | None,
        return_states: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Time-major and batched: the output, the last state and those of every step in parts."""
        learned = self._learned()
        try:
            plain = self._plain and not self.bidirectional and not return_states
            if plain and lengths is None and resets is None and not self._drops():
                return self._scan_plain(x, parts)
            if not parts:
                parts = tuple(part.unsqueeze(1).expand(-1, x.shape[1], -1) for part in learned)
            return _scan_layers(
                x,
                self._weights(),
                parts,
                cell=self.cell,
                directions=2 if self.bidirectional else 1,
                lengths=lengths,
                resets=resets,
                dropout=self.dropout if self._drops() else 0.0,
                keep_every=self.keep_every,
                regularization=_Regularization(
                    self.training,
                    self.residual,
                    self.variational_dropout if self.training else 0.0,
                    self.recurrent_dropout if self.training else 0.0,
                    self.weight_dropout if self.training else 0.0,
                    self.zoneout_h,
                    self.zoneout_c,
                    () if resets is None else learned,
                    self._layer_norms(),
                ),
                return_states=return_states,
            )
        except RuntimeError:
            self._explain(x, parts)
            raise

    def _drops(self) -> bool:
        """Whether there is dropout between the layers of this call."""
        return self.training and self.dropout > 0 and self.num_layers > 1

    def _scan_plain(
        self, x: Tensor, parts: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """:meth:`_scan` of layers in one direction that do nothing besides. In single steps of
        small layers the bookkeeping for more would take as long as the operator."""
        cell, state, states = self.cell, None, []
        for index, weights in enumerate(self._weights()):
            if parts:
                state = join_parts(tuple([part[index] for part in parts]))
            # Peepholes, behind these five, are no plain layer's.
            x, last = functional.scan(x, *weights[:5], state, cell=cell)
            states.append(state_parts(cell, last))
        if len(states) == 1:
            return x, tuple([part.unsqueeze(0) for part in states[0]]), ()
        return x, _join_layers(torch.stack, states), ()

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        *,
        return_states: bool = False,
    ) -> tuple[Tensor | PackedSequence, State] | tuple[Tensor | PackedSequence, State, State]:
        """Run all layers and directions over ``input``.

        Args:
            input: (T, B, I), or (B, T, I) with ``batch_first``, or (T, I) for one sequence,
                in the dtype of the weights; or a PackedSequence of such rows.
            hx: h (L*D, B, P), where D counts directions and P is ``proj_size`` or H; for
                LSTM the pair of it and c (L*D, B, H). Without B for one sequence.
                Default: zero, or the learned initial state.
            lengths: (B,) int64, valid steps of each row, in any order, on any device.
                Outputs at later steps are zero, the reverse direction starts at
                ``lengths[b] - 1``, the last state is that after the last valid step.
                Not with a PackedSequence, which has lengths of its own.
            resets: bool, True where the row's state is set to zero, or to the learned one,
                before that step (as each direction meets it); (T, B), (B, T) with
                ``batch_first``, (T,) for one sequence; rows in the order before packing for a
                PackedSequence.
            return_states: also return the state of every layer and direction after every step.

        Returns:
            The output, (T, B, D*P) or in the form of the input, and the last state in the
            form of ``hx``. With ``return_states`` a third: the states after every step in the
            form of ``hx`` with a dimension for the steps, h (L*D, T, B, P) and for LSTM c
            (L*D, T, B, H); (L*D, B, T, .) with ``batch_first``, (L*D, T, .) for one sequence;
            padded, rows in the order before packing, for a PackedSequence. Layers lie as in
            ``hx``: layer 0 forward, layer 0 reverse, layer 1 forward. They are zero at steps
            beyond a row's length. Gradients flow back from all of it.

        Raises:
            ValueError: the dtype of the input, its number of dimensions or the form of
                ``hx`` is wrong.
            RuntimeError: a size or a device is wrong.
            TypeError: ``lengths`` or ``resets`` is not a tensor.
        """
        parts = state_parts(self.cell, hx)
        if lengths is not None:
            check_tensor("lengths", lengths)
        if resets is not None:
            check_tensor("resets", resets)
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths must be None for a PackedSequence, which has its own")
            packed, parts, steps = self._forward_packed(input, parts, resets, return_states)
            return self._result(packed, parts, steps, batched=True)

        dim = input.dim()
        if dim not in (2, 3):
            # torch.nn's words, which are not the same for all three.
            tensor = " tensor" if self.mode.startswith("RNN") else ""
            raise ValueError(
                f"{self.mode.split('_')[0]}: Expected input to be 2D or 3D, "
                f"got {dim}D{tensor} instead"
            )
        batched = dim == 3
        for part in parts:
            if part.dim() != dim:
                self._refuse_state_dim(dim, parts)
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
            parts = tuple(part.unsqueeze(1) for part in parts)
            if lengths is not None:
                if lengths.numel() != 1:
                    raise RuntimeError(
                        f"lengths must be one number for one sequence, got {tuple(lengths.shape)}"
                    )
                lengths = lengths.reshape(1)
            resets = None if resets is None else resets.unsqueeze(batch_dim)
        self.check_input(input, None)
        if parts:
            self._check_state(parts, input.size(batch_dim))

        if self.batch_first:
            input = input.transpose(0, 1)
            resets = None if resets is None else resets.transpose(0, 1)
        output, parts, steps = self._scan(input, parts, lengths, resets, return_states)
        if self.batch_first:
            output = output.transpose(0, 1)
        if not batched:
            output = output.squeeze(batch_dim)
            parts = tuple(part.squeeze(1) for part in parts)
        return self._result(output, parts, steps, batched=batched)

    def _result(
        self,
        output: Tensor | PackedSequence,
        parts: tuple[Tensor, ...],
        steps: tuple[Tensor, ...],
        *,
        batched: bool,
    ) -> tuple[Tensor | PackedSequence, State] | tuple[Tensor | PackedSequence, State, State]:
        """What ``forward`` returns; ``steps``, (L*D, T, B, .) each, is empty if not wanted."""
        if not steps:
            return output, join_parts(parts)
        if not batched:
            steps = tuple(part.squeeze(2) for part in steps)
        elif self.batch_first:
            steps = tuple(part.transpose(1, 2) for part in steps)
        return output, join_parts(parts), join_parts(steps)

    def _forward_packed(
        self,
        input: PackedSequence,
        parts: tuple[Tensor, ...],
        resets: Tensor | None,
        return_states: bool,
    ) -> tuple[PackedSequence, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The same for packed rows. They stay in their sorted order inside, so that only
        the states, which are small, need permuting."""
        data, batch_sizes, order, inverse = input
        self.check_input(data, batch_sizes)
        if parts:
            self._check_state(parts, int(batch_sizes[0]))
        x, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        if resets is not None and self.batch_first:
            resets = resets.transpose(0, 1)
        if order is not None:
            parts = tuple(part.index_select(1, order) for part in parts)
            resets = None if resets is None else resets.index_select(1, order)
        output, parts, steps = self._scan(x, parts, lengths, resets, return_states)
        if inverse is not None:
            parts = tuple(part.index_select(1, inverse) for part in parts)
            steps = tuple(part.index_select(2, inverse) for part in steps)
        packed = pack_padded_sequence(output, lengths)
        return PackedSequence(packed.data, batch_sizes, order, inverse), parts, steps


class RNN(_Recurrent):
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
    ) -> None:
        _refuse_projection(proj_size)
        _check_nonlinearity(nonlinearity)
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
        )
        self.nonlinearity = nonlinearity
        self._set_options(
            residual=residual,
            variational_dropout=variational_dropout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
            zoneout_h=zoneout_h,
            layer_norm=layer_norm,
            learned_state=learned_state,
        )


class GRU(_Recurrent):
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
        reset_after: bool = True,
    ) -> None:
        _refuse_projection(proj_size)
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
        )
        if not reset_after and (recurrent_dropout or layer_norm):
            raise ValueError(
                "recurrent_dropout and layer_norm go with reset_after=True, got "
                f"recurrent_dropout {recurrent_dropout!r}, layer_norm {layer_norm!r} and False"
            )
        self.reset_after = reset_after
        self._set_options(
            residual=residual,
            variational_dropout=variational_dropout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
            zoneout_h=zoneout_h,
            layer_norm=layer_norm,
            learned_state=learned_state,
        )


class LSTM(_Recurrent):
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
        zoneout_c: float = 0.0,
        forget_bias: float | None = None,
        peepholes: bool = False,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        if peepholes and layer_norm:
            raise ValueError("layer_norm goes without peepholes, got both")
        self.peepholes = peepholes
        if peepholes:
            for names, suffix in zip(self._all_weights, self._suffixes(), strict=True):
                _add_weight(self, f"weight_ch_{suffix}", 3 * hidden_size)
                names.append(f"weight_ch_{suffix}")
        self._set_options(
            residual=residual,
            variational_dropout=variational_dropout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
            zoneout_h=zoneout_h,
            layer_norm=layer_norm,
            learned_state=learned_state,
            zoneout_c=zoneout_c,
            forget_bias=forget_bias,
        )


class IndRNN(_Recurrent):
    """Independently recurrent layers, whose units see of the state themselves alone.

    ``h_t = relu(W_ih x_t + b_ih + w_hh * h_{t-1} + b_hh)`` with a vector ``w_hh``, or tanh. A
    step costs H multiplications instead of H^2; units meet in the layer above.

    Args, Raises: as :class:`RNN`, but for ``recurrent_dropout`` and ``layer_norm``, which are of
        the recurrent product; ``nonlinearity`` is ``"relu"`` by default. ``weight_hh_l0``
        is (H,) and drawn uniformly from 0 to 1, so that from the start there are units that
        forget at once and units that hardly do; all others within 1/sqrt(H). With relu, a weight
        above 1 lets its unit grow without bound: the paper keeps weights below 2^(1/T).

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
        weight_dropout: float = 0.0,
        zoneout_h: float = 0.0,
        learned_state: bool = False,
    ) -> None:
        _check_nonlinearity(nonlinearity)
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
        )
        self.nonlinearity = nonlinearity
        for suffix in self._suffixes():
            _add_weight(self, f"weight_hh_{suffix}", hidden_size)
        self._set_options(
            residual=residual,
            variational_dropout=variational_dropout,
            weight_dropout=weight_dropout,
            zoneout_h=zoneout_h,
            learned_state=learned_state,
        )

    @property
    def cell(self) -> CellName:
        """The cell's name in ``pyseq.functional``."""
        return "indrnn_relu" if self.nonlinearity == "relu" else "indrnn_tanh"

    def _reset_options(self) -> None:
        super()._reset_options()
        for suffix in self._suffixes():
            init.uniform_(getattr(self, f"weight_hh_{suffix}"))


def _check_slstm(hidden_size: int, num_heads: int, forget_gate: str) -> None:
    if forget_gate not in ("sigmoid", "exp"):
        raise ValueError(f"forget_gate must be one of sigmoid, exp, got {forget_gate!r}")
    check_positive(hidden_size=hidden_size, num_heads=num_heads)
    if hidden_size % num_heads != 0:
        raise ValueError(
            f"hidden_size must be a multiple of num_heads, {num_heads}, got {hidden_size}"
        )


class SLSTM(_Recurrent):
    """LSTM layers with an exponential input gate, a normaliser and heads: sLSTM.

    ``i, f, z, o`` from ``W_ih x_t + b_ih + W_hh h_{t-1} + b_hh``, with ``i = exp(.)``,
    ``f = sigmoid(.)`` or ``exp(.)``, ``z = tanh(.)``, ``o = sigmoid(.)``;
    ``c_t = f c_{t-1} + i z``, ``n_t = f n_{t-1} + i``, ``h_t = o * c_t / n_t``, where c and n are
    kept relative to ``exp(m_t)`` with ``m_t = max(log f + m_{t-1}, log i)``.
    A unit sees of the state the units of its own head: ``weight_hh_l0`` is (4*H, H / heads).

    Args, Raises: as :class:`RNN`, without ``nonlinearity``, ``layer_norm`` and
        ``learned_state``, and
        num_heads: heads of each layer, equal groups of its units; H must be a multiple.
        forget_gate: ``"sigmoid"`` or ``"exp"``.
        forget_bias: as in :class:`LSTM`.

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
        forget_bias: float | None = None,
    ) -> None:
        _check_slstm(hidden_size, num_heads, forget_gate)
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
        )
        self.num_heads = num_heads
        self.forget_gate = forget_gate
        for suffix in self._suffixes():
            _add_weight(self, f"weight_hh_{suffix}", 4 * hidden_size, hidden_size // num_heads)
        self._set_options(
            residual=residual,
            variational_dropout=variational_dropout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
            zoneout_h=zoneout_h,
            learned_state=False,
            forget_bias=forget_bias,
        )

    @property
    def cell(self) -> CellName:
        """The cell's name in ``pyseq.functional``."""
        return "slstm_exp" if self.forget_gate == "exp" else "slstm_sigmoid"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_heads={self.num_heads}, forget_gate={self.forget_gate}"


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Cell(torch.nn.RNNCellBase):
    """What the cells share: one step is a scan with T = 1."""

    __prepare_scriptable__ = _refuse_script

    def weight_names(self) -> list[str]:
        """The names of all matrices."""
        return ["weight_ih", "weight_hh"]

    def _step(
        self, cell: CellName, input: Tensor, hx: State | None, w_ch: Tensor | None = None
    ) -> State:
        if input.dim() != 2:
            parts = state_parts(cell, hx)
            self._check_dim(input, parts)
            rows = tuple(part.unsqueeze(0) for part in parts)
            last = self._step(cell, input.unsqueeze(0), join_parts(rows) if rows else None, w_ch)
            return join_parts(tuple(part.squeeze(0) for part in state_parts(cell, last)))
        w_ih, w_hh, b_ih, b_hh = _weights_now(self, _CELL_WEIGHTS)
        if input.dtype != w_ih.dtype:
            _check_input("input", input, w_ih, self.training)
        try:
            return functional.scan(
                input.unsqueeze(0), w_ih, w_hh, b_ih, b_hh, state=hx, cell=cell, w_ch=w_ch
            ).state
        except RuntimeError:
            self._explain(input, state_parts(cell, hx))
            raise

    def _check_dim(self, input: Tensor, parts: tuple[Tensor, ...]) -> None:
        """Raise unless the input is one row or a batch of them, and the state likewise."""
        name, dim = type(self).__name__, input.dim()
        if dim not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {dim}D instead")
        for index, part in enumerate(parts):
            what = "hidden" if len(parts) == 1 else f"hx[{index}]"
            if part.dim() not in (1, 2):
                raise ValueError(
                    f"{name}: Expected {what} to be 1D or 2D, got {part.dim()}D instead"
                )
            if part.dim() != dim:
                raise ValueError(
                    f"{name}: Expected {what} to be {dim}D like the input, "
                    f"got {part.dim()}D instead"
                )

    def _explain(self, input: Tensor, parts: tuple[Tensor, ...]) -> None:
        """Raise what torch.nn says of a batch (B, I) and state that the operators refuse; asked
        only when they did, as in :class:`_Recurrent`."""
        self._check_dim(input, parts)
        if input.size(1) != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.size(1)} expected {self.input_size}"
            )
        for index, part in enumerate(parts):
            if part.size(0) != input.size(0):
                raise RuntimeError(
                    f"Input batch size {input.size(0)} doesn't match hidden{index} batch size "
                    f"{part.size(0)}"
                )
            if part.size(1) != self.hidden_size:
                raise RuntimeError(
                    f"hidden{index} has inconsistent hidden_size: got {part.size(1)}, "
                    f"expected {self.hidden_size}"
                )


class RNNCell(_Cell):
    """One step of :class:`RNN`; a drop-in for torch.nn.RNNCell.

    Args:
        input_size: I.
        hidden_size: H.
        bias: whether the cell has ``bias_ih`` and ``bias_hh``.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        device, dtype: of the parameters.

    Raises:
        ValueError: the nonlinearity is unknown.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_nonlinearity(nonlinearity)
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """New h (B, H) or (H,) from input (B, I) or (I,) and h, by default zero."""
        h = self._step("rnn_tanh" if self.nonlinearity == "tanh" else "rnn_relu", input, hx)
        assert isinstance(h, Tensor)
        return h


class GRUCell(_Cell):
    """One step of :class:`GRU`; a drop-in for torch.nn.GRUCell.

    Args: as :class:`RNNCell`, without ``nonlinearity``, and
        reset_after: as for :class:`GRU`.
    """

    reset_after: bool = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)
        self.reset_after = reset_after

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """New h (B, H) or (H,) from input (B, I) or (I,) and h, by default zero."""
        h = self._step("gru" if self.reset_after else "gru_reset_before", input, hx)
        assert isinstance(h, Tensor)
        return h


class LSTMCell(_Cell):
    """One step of :class:`LSTM`; a drop-in for torch.nn.LSTMCell.

    Args: as :class:`RNNCell`, without ``nonlinearity``, and
        peepholes: whether the cell has ``weight_ch`` (3*H,); see :class:`LSTM`.
    """

    peepholes: bool = False
    weight_ch: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        peepholes: bool = False,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        self.peepholes = peepholes
        if peepholes:
            _add_weight(self, "weight_ch", 3 * hidden_size)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """New (h, c), each (B, H) or (H,), from input (B, I) or (I,) and (h, c)."""
        h, c = self._step("lstm", input, hx, self.weight_ch if self.peepholes else None)
        return h, c


class IndRNNCell(_Cell):
    """One step of :class:`IndRNN`.

    Args: as :class:`RNNCell`, where ``nonlinearity`` is ``"relu"`` by default; ``weight_hh`` is
        (H,).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "relu",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_nonlinearity(nonlinearity)
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity
        _add_weight(self, "weight_hh", hidden_size)
        init.uniform_(self.weight_hh)

    def reset_parameters(self) -> None:
        """Draw all weights anew, as :class:`IndRNN` does."""
        super().reset_parameters()
        init.uniform_(self.weight_hh)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """New h (B, H) or (H,) from input (B, I) or (I,) and h, by default zero."""
        h = self._step("indrnn_relu" if self.nonlinearity == "relu" else "indrnn_tanh", input, hx)
        assert isinstance(h, Tensor)
        return h


class SLSTMCell(_Cell):
    """One step of :class:`SLSTM`.

    Args: as :class:`RNNCell`, without ``nonlinearity``, and ``num_heads`` and ``forget_gate`` of
        :class:`SLSTM`; ``weight_hh`` is (4*H, H / heads).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        num_heads: int = 1,
        forget_gate: str = "sigmoid",
    ) -> None:
        _check_slstm(hidden_size, num_heads, forget_gate)
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        self.num_heads = num_heads
        self.forget_gate = forget_gate
        _add_weight(self, "weight_hh", 4 * hidden_size, hidden_size // num_heads)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """New (h, c, n, m), each (B, H) or (H,), from input (B, I) or (I,) and such a state."""
        cell: CellName = "slstm_exp" if self.forget_gate == "exp" else "slstm_sigmoid"
        h, c, n, m = self._step(cell, input, hx)
        return h, c, n, m


class Score(torch.nn.Module):
    """The weights of an attention score, and the part of it that needs no query.

    dot ``q . m``; scaled_dot ``q . m / sqrt(M / N)``; general ``q . (W m)``; concat
    ``v . tanh(W_q q + W_m m)``; location ``(W q)_s`` for position s. Each of N heads has its own
    share of the components of query and key, and so of the rows of W (general), W_q, W_m, v.

    Args:
        score: ``"dot"``, ``"scaled_dot"``, ``"general"``, ``"concat"`` or ``"location"``.
        query_size: Q.
        memory_size: M; for dot and scaled_dot it must be Q.
        attention_size: A, concat only. Default: Q.
        heads: N, which divides M and the size of the keys: A for concat, otherwise Q.
        max_positions: R, location only, which needs it: positions that can have a weight.
        history_size: K, odd, concat only: how many neighbours' past weights enter the score of a
            position. Default: none.
        device, dtype: of the parameters.

    Attributes:
        weight: general (Q, M), location (R, Q), else None.
        weight_query, weight_memory, weight_v: (A, Q), (A, M) and (A,), concat only.
        weight_history: (A, K), with ``history_size`` only.
        fused: the score that is left for the operators on projected keys.

    Raises:
        ValueError: the score is unknown, or a size does not go with it.

    Reference:
        Luong et al. 2015, arXiv 1508.04025, eq. 7 and 8; concat with separate matrices for query
        and memory is Bahdanau et al. 2015, arXiv 1409.0473; Vaswani et al. 2017,
        arXiv 1706.03762, eq. 1 (scaled dot) and section 3.2.2 (heads).
    """

    weight: Tensor | None
    weight_query: Tensor | None
    weight_memory: Tensor | None
    weight_v: Tensor | None
    weight_history: Tensor | None

    __prepare_scriptable__ = _refuse_script

    def __init__(
        self,
        score: str,
        query_size: int,
        memory_size: int,
        attention_size: int | None = None,
        *,
        heads: int = 1,
        max_positions: int | None = None,
        history_size: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        if score in ("dot", "scaled_dot") and query_size != memory_size:
            raise ValueError(
                f"score {score!r} needs the query as long as the memory is wide, "
                f"got query size {query_size} and memory_size {memory_size}"
            )
        if attention_size is None:
            attention_size = query_size
        elif score != "concat":
            raise ValueError(f"attention_size goes with score 'concat', got {score!r}")
        check_positive(attention_size=attention_size, heads=heads)
        for name, size in (("the size of the keys", attention_size), ("memory_size", memory_size)):
            if size % heads:
                raise ValueError(f"heads must divide {name}, {size}, got {heads}")
        if (max_positions is not None) != (score == "location"):
            raise ValueError(
                "max_positions must be given for score 'location' and no other, "
                f"got {max_positions!r} for {score!r}"
            )
        if history_size is not None:
            check_positive(history_size=history_size)
            if score != "concat" or history_size % 2 == 0:
                raise ValueError(
                    "history_size must be odd and goes with score 'concat', "
                    f"got {history_size} and {score!r}"
                )
        self.name = score
        self.heads = heads
        self.fused: ScoreName = "concat" if score == "concat" else "dot"
        shapes: dict[str, tuple[int, ...]] = {}
        if score == "general":
            shapes = {"weight": (query_size, memory_size)}
        elif score == "location":
            check_positive(max_positions=max_positions)
            shapes = {"weight": (max_positions or 0, query_size)}
        elif score == "concat":
            shapes = {
                "weight_query": (attention_size, query_size),
                "weight_memory": (attention_size, memory_size),
                "weight_v": (attention_size,),
            }
            if history_size is not None:
                shapes["weight_history"] = (attention_size, history_size)
        for name in ("weight", "weight_query", "weight_memory", "weight_v", "weight_history"):
            parameter = None
            if name in shapes:
                parameter = torch.nn.Parameter(
                    torch.empty(shapes[name], device=device, dtype=dtype)
                )
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every weight uniformly within 1/sqrt of the size that it sums over."""
        for weight in self.parameters():
            bound = 1 / math.sqrt(weight.shape[-1])
            init.uniform_(weight, -bound, bound)

    def project(self, memory: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The keys (S, B, A) of ``memory`` (S, B, M): ``W m``, ``W_m m``, ``m / sqrt(M / N)``,
        the memory itself, or for location the rows of W.

        Args:
            memory: (S, B, M).
            lengths: (B,) int64, valid positions of each row. Left out, the padding must be
                finite, or the gradient of the weight is not.

        Raises:
            RuntimeError: a tensor has the wrong shape, dtype or device.
        """
        if self.name == "location":
            assert self.weight is not None
            return functional.position_keys(self.weight, memory, lengths)[0]
        if self.name == "scaled_dot":
            return functional.scale_keys(memory, self.heads)
        weight = self.weight if self.weight_memory is None else self.weight_memory
        if weight is None:
            return memory
        check_shape("memory", memory, "(S, B, M)", (-1, -1, weight.shape[1]))
        check_like("memory", memory, "the score's weight", weight)
        return functional.project_memory(memory, weight, lengths)

    def limit(self, memory: Tensor, lengths: Tensor | None) -> Tensor | None:
        """How many positions of each row (B,) may have a weight: ``lengths``, but for location
        at most R."""
        if self.name != "location":
            return lengths
        assert self.weight is not None
        return functional.position_limit(self.weight, memory, lengths)

    def extra_repr(self) -> str:
        return self.name if self.heads == 1 else f"{self.name}, heads={self.heads}"


class Positions(torch.nn.Module):
    """Where in the source each query looks: ``p_t = S sigmoid(v . tanh(W q_t))``.

    Args:
        query_size: Q.
        device, dtype: of the parameters.

    Attributes:
        weight, weight_v: ``W`` (Q, Q) and ``v`` (Q,).

    Reference:
        Luong et al. 2015, arXiv 1508.04025, eq. 9.
    """

    def __init__(
        self, query_size: int, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        weight = torch.empty((query_size, query_size), device=device, dtype=dtype)
        self.weight = torch.nn.Parameter(weight)
        self.weight_v = torch.nn.Parameter(torch.empty(query_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both weights uniformly within 1/sqrt(Q)."""
        bound = 1 / math.sqrt(len(self.weight_v))
        for weight in self.parameters():
            init.uniform_(weight, -bound, bound)

    def forward(self, query: Tensor, source: int, lengths: Tensor | None = None) -> Tensor:
        """The positions (T, B) of ``query`` (T, B, Q) in rows of ``source`` positions, or of
        ``lengths`` (B,); see :func:`pyseq.functional.predict_positions`."""
        return functional.predict_positions(query, self.weight, self.weight_v, source, lengths)


def _check_window(window: str | None, window_size: int | None) -> int | None:
    """D of the windows, or None where a query sees everything."""
    if window is not None and window not in WINDOWS:
        raise ValueError(f"window must be one of {', '.join(WINDOWS)} or None, got {window!r}")
    if window_size is None:
        return None if window is None else DEFAULT_WINDOW_SIZE
    if window is None:
        raise ValueError(f"window_size goes with a window, got {window_size!r} without one")
    check_positive(window_size=window_size)
    return window_size


class Attention(torch.nn.Module):
    """Attention: ``a_ts = softmax_s score(q_t, m_s)``, ``context_t = sum_s a_ts m_s``.

    Over all of the memory, or a window in it: the positions within D of ``p_t``, which is t
    for local-m, and for local-p is predicted by :class:`Positions` and weighed by a Gaussian of
    standard deviation D/2 around it. See :func:`pyseq.functional.attend`.

    Args:
        query_size: Q.
        memory_size: M; for the scores ``"dot"`` and ``"scaled_dot"`` it must be Q.
        score: ``"dot"``, ``"scaled_dot"``, ``"general"``, ``"concat"`` or ``"location"``; see
            :class:`Score` for its weights.
        attention_size: A, units of the score ``"concat"``. Default: Q.
        heads: N, which divides M and the size of the keys.
        window: ``"local-m"``, ``"local-p"``, or None for all of the memory.
        window_size: D, at least 1 position. Default: 10, with a window.
        max_positions: positions that can have a weight, score ``"location"`` only.
        device, dtype: of the parameters.

    Raises:
        ValueError: an option is unknown, or does not go with another.

    Reference:
        Luong et al. 2015, arXiv 1508.04025, eq. 7 to 10.
    """

    __prepare_scriptable__ = _refuse_script

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        *,
        score: str = "general",
        attention_size: int | None = None,
        heads: int = 1,
        window: str | None = None,
        window_size: int | None = None,
        max_positions: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(query_size=query_size, memory_size=memory_size)
        self.query_size = query_size
        self.memory_size = memory_size
        self.window = window
        self.window_size = _check_window(window, window_size)
        self.score = Score(
            score,
            query_size,
            memory_size,
            attention_size,
            heads=heads,
            max_positions=max_positions,
            device=device,
            dtype=dtype,
        )
        self.positions: Positions | None = None
        if window == "local-p":
            self.positions = Positions(query_size, device=device, dtype=dtype)

    def forward(
        self,
        query: Tensor,
        memory: Tensor,
        lengths: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with every query over the memory of its row.

        Args:
            query: (T, B, Q).
            memory: (S, B, M).
            lengths: (B,) int64, valid positions of each row, on any device. Default: S.
            need_weights: also return the weights.

        Returns:
            The context (T, B, M), and the weights (T, B, S), of several heads (T, B, N, S),
            or None.

        Raises:
            RuntimeError: a tensor has the wrong shape, dtype or device.
            TypeError: what must be a tensor is none.
        """
        check_shape("query", query, "(T, B, Q)", (-1, -1, self.query_size))
        check_shape("memory", memory, "(S, B, M)", (-1, query.shape[1], self.memory_size))
        positions = None
        if self.positions is not None:
            positions = self.positions(query, memory.shape[0], lengths)
        return functional.attend(
            query,
            self.score.project(memory, lengths),
            memory,
            self.score.limit(memory, lengths),
            score=self.score.fused,
            weight_query=self.score.weight_query,
            weight_v=self.score.weight_v,
            heads=self.score.heads,
            window=self.window_size,
            positions=positions,
            need_weights=need_weights,
        )

    def extra_repr(self) -> str:
        text = f"{self.query_size}, {self.memory_size}"
        if self.window is None:
            return text
        return f"{text}, window={self.window!r}, window_size={self.window_size}"


@dataclass(frozen=True)
class AttentionOptions:
    """How a decoder attends, beside its score; see :class:`AttentionDecoder`."""

    attention_size: int | None = None
    max_positions: int | None = None
    order: str = "luong"
    feed: str | None = None
    heads: int = 1
    window: str | None = None
    window_size: int | None = None
    history: str | None = None
    history_size: int | None = None


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

    __prepare_scriptable__ = _refuse_script

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
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability in [0, 1], got {dropout!r}")
        if score is None:
            for name, scores, value in (
                ("attention_size", "score 'concat'", attention_size),
                ("max_positions", "score 'location'", max_positions),
                ("feed", "a score", feed),
                ("window", "a score", window),
                ("history", "score 'concat'", history),
                ("heads", "a score", None if heads == 1 else heads),
                ("order", "a score", None if order == "luong" else order),
            ):
                if value is not None:
                    raise ValueError(f"{name} goes with {scores}, got None")
        for name, value, allowed in (
            ("order", order, ORDERS),
            ("feed", feed, (None, *FEEDS)),
            ("history", history, (None, *HISTORIES)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if order == "bahdanau" and (feed == "output" or not input_feeding):
            raise ValueError(
                "order 'bahdanau' feeds the context of the same step, got "
                + (f"feed {feed!r}" if input_feeding else "input_feeding False")
            )
        if feed is not None and not input_feeding:
            raise ValueError(f"feed goes with input_feeding, got {feed!r} without")
        if history_size is not None and history is None:
            raise ValueError(f"history_size goes with a history, got {history_size!r} without one")
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
        self.window_size = _check_window(window, window_size)
        self.history = cast(HistoryName | None, history)
        if history is not None and history_size is None:
            history_size = DEFAULT_HISTORY_SIZE

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

    @staticmethod
    def _layer_names(layer: int) -> tuple[str, ...]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return tuple(f"{name}_l{layer}" for name in names)

    def _reset_layers(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for weight in self.parameters(recurse=False):
            init.uniform_(weight, -bound, bound)

    def reset_parameters(self) -> None:
        """Draw all weights anew: those of the layers as torch.nn does, within 1/sqrt(H)."""
        if self.score is not None and self.combine is not None:
            self.score.reset_parameters()
            self.combine.reset_parameters()
        if self.positions is not None:
            self.positions.reset_parameters()
        self._reset_layers()

    def layer_weights(self) -> list[LayerWeights]:
        """The weights of each layer as they are now."""
        return [
            LayerWeights(*(getattr(self, name) for name in self._layer_names(layer)))
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
        if self.score is None:
            return None
        if self.batch_first and memory.dim() == 3:
            return self.score.project(memory.transpose(0, 1), lengths).transpose(0, 1)
        return self.score.project(memory, lengths)

    def is_plain(self) -> bool:
        """Whether attention is global, in one head, after the cells, without a memory of its
        weights, and the output is what is fed, if anything."""
        return (
            self.window is None
            and self.history is None
            and self.order == "luong"
            and self.feed == "output"
            and (self.score is None or self.score.heads == 1)
        )

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
    ) -> DecoderOutput:
        """Run all steps of ``x``.

        Args:
            x: (T, B, I), T at least 1, in the dtype of the weights.
            memory: (S, B, M). Not read, and may be left out, with ``score=None``.
            lengths: (B,) int64, valid positions of each row of the memory, on any device.
                Default: S.
            state: what the last call returned, or ``(hidden, feed)``: h (L, B, H), or for LSTM
                (h, c), and what is fed (B, F), either of them None for zero. Default: all zero.
            need_weights: also return the attention weights.
            keys: what :meth:`project` gave for this memory. Default: computed here.
            dropout_masks: (L-1, T, B, H), what :meth:`draw_dropout_masks` gave, where several
                calls are to drop the same. Default: drawn here, in training.

        Returns:
            The output (T, B, H), the weights (T, B, S), of several heads (T, B, N, S), or None,
            and the state from which the next call goes on.

        Raises:
            ValueError: the state has the wrong form, or x another dtype than the weights.
            RuntimeError: a tensor has the wrong shape, dtype or device, or is missing.
            TypeError: what must be a tensor is none.
        """
        if self.batch_first and x.dim() == 3:
            x = x.transpose(0, 1)
        check_shape("x", x, "(T, B, I)", (-1, -1, self.input_size))
        _check_input("x", x, self.weight_ih_l0, self.training)
        parts = self._check_state(state, x.shape[1])
        if self.score is None:
            result = self._forward_plain(x, parts, dropout_masks)
        else:
            if memory is None:
                raise RuntimeError("memory must be given unless score is None, got None")
            if self.batch_first and memory.dim() == 3:
                memory = memory.transpose(0, 1)
                keys = None if keys is None else keys.transpose(0, 1)
            check_shape("memory", memory, "(S, B, M)", (-1, x.shape[1], self.memory_size))
            result = self._forward_attentive(
                x, memory, keys, lengths, state, need_weights, dropout_masks
            )
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
        output, parts, _ = _scan_layers(
            x,
            [(*layer, None, None) for layer in self.layer_weights()],
            parts,
            cell=self.cell,
            dropout=self.dropout if self.training else 0.0,
            dropout_masks=dropout_masks,
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
    ) -> DecoderOutput:
        assert self.score is not None
        assert self.combine is not None
        if dropout_masks is None:
            dropout_masks = self.draw_dropout_masks(x.shape[0], x.shape[1])
        return functional.decode(
            x,
            self.layer_weights(),
            self.score.project(memory, lengths) if keys is None else keys,
            memory,
            self.combine.weight,
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
            input_feeding=self.input_feeding,
            feed=self.feed,
            heads=self.score.heads,
            window=self.window_size,
            history=self.history,
            dropout_masks=dropout_masks,
            need_weights=need_weights,
        )

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, {self.memory_size}, {self.num_layers}"
        text += f", cell={self.cell!r}, input_feeding={self.input_feeding}"
        for name, value, default in (
            ("order", self.order, "luong"),
            ("feed", self.feed, "output"),
            ("window", self.window, None),
            ("window_size", self.window_size, None),
            ("history", self.history, None),
        ):
            if value != default:
                text += f", {name}={value!r}"
        if self.dropout:
            text += f", dropout={self.dropout}"
        return text + (", batch_first=True" if self.batch_first else "")
