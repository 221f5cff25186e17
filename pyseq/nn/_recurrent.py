# SPDX-License-Identifier: Apache-2.0
"""What the recurrent layers share: options, weights, forward of all forms of input."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import init
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .. import functional
from .._checks import check_positive, check_tensor
from .._dropout import check_probability
from ..types import (
    GATES,
    STATES,
    CellName,
    LayerNormWeights,
    State,
    join_parts,
    state_parts,
)
from ._common import cell_name, check_input, refuse_script, weights_now
from ._stack import Regularization, ScanWeights, join_layers, scan_layers

#: Cells by the mode of RNNBase.
CELLS_BY_MODE = {name.upper(): cell_name(name) for name in GATES}


class Recurrent(torch.nn.RNNBase):
    """What the recurrent layers share.

    RNNBase gives the parameters, their initialisation and the argument checks. (The
    compiler front end refuses subclasses of torch.nn.LSTM itself, not of RNNBase.)
    """

    weight_ih_l0: Tensor

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
    keep_every: int = 1
    forget_bias: float | None = None
    peepholes: bool = False
    reset_after: bool = True
    h_0: torch.nn.Parameter
    c_0: torch.nn.Parameter
    m_0: torch.nn.Parameter

    def _set_options(
        self,
        *,
        residual: bool,
        variational_dropout: float,
        weight_dropout: float,
        zoneout_h: float,
        learned_state: bool,
        keep_every: int,
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
        check_positive(keep_every=keep_every)
        self.keep_every = keep_every
        self.learned_state = learned_state
        if learned_state:
            count = self.num_layers * directions
            for part in self._learned_parts():
                size = width if part == "h" else self.hidden_size
                parameter = torch.nn.Parameter(self.weight_ih_l0.new_empty(count, size))
                self.register_parameter(f"{part}_0", parameter)
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
        for part in self._learned_parts() if self.learned_state else ():
            init.zeros_(getattr(self, f"{part}_0"))
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

    def _learned_parts(self) -> str:
        """The parts of the state that are parameters: of an sLSTM n is one, as whatever n is
        beside one, m can be instead, where n stays positive."""
        return "h" + STATES.get(self.cell, "").replace("n", "")

    def _learned(self) -> tuple[Tensor, ...]:
        """The learned initial state in parts, each (L*D, .), or ``()``."""
        if not self.learned_state:
            return ()
        if self.cell not in STATES:
            return (self.h_0,)
        if self.cell == "lstm":
            return self.h_0, self.c_0
        return self.h_0, self.c_0, torch.ones_like(self.c_0), self.m_0

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
        if self.keep_every != 1:
            text += f", keep_every={self.keep_every}"
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

    __prepare_scriptable__ = refuse_script

    def _init_flat_weights(self) -> None:
        self._flat_weight_refs = []

    def _update_flat_weights(self) -> None:
        """Do nothing: there is no list that could be out of date."""

    def __setattr__(self, name: str, value: Any) -> None:
        torch.nn.Module.__setattr__(self, name, value)
        if hasattr(type(self), name) and not name.startswith("_"):
            self._find_plain()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._find_plain()  # which a layer pickled by version 0.1.0 does not have

    def _find_plain(self) -> None:
        cls = type(self)
        options = (each for each in vars(self) if hasattr(cls, each) and each[0] != "_")
        self._plain = all(getattr(self, each) == getattr(cls, each) for each in options)

    def _replicate_for_data_parallel(self) -> Recurrent:
        return torch.nn.Module._replicate_for_data_parallel(self)

    @property
    def cell(self) -> CellName:
        """The cell's name in ``pyseq.functional``."""
        return CELLS_BY_MODE[self.mode] if self.reset_after else "gru_reset_before"

    def flatten_parameters(self) -> None:
        """Do nothing; the operators read the weights where they lie."""

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise unless ``input`` has this module's dtype, dimensions and input size."""
        (weight,) = weights_now(self, ("weight_ih_l0",))
        check_input("input", input, weight, self.training)
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

    def _weights(self) -> list[ScanWeights]:
        """The weights of each layer and direction as they are now."""
        layers: list[ScanWeights] = []
        for names in self._all_weights:
            w_ih, w_hh, *rest = weights_now(self, names)
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
            return scan_layers(
                x,
                self._weights(),
                parts,
                cell=self.cell,
                directions=2 if self.bidirectional else 1,
                lengths=lengths,
                resets=resets,
                dropout=self.dropout if self._drops() else 0.0,
                keep_every=self.keep_every,
                regularization=Regularization(
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
        return x, join_layers(torch.stack, states), ()

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
                PackedSequence. The sizes are checked, but where T is B nothing tells a (T, B)
                from a (B, T): give it in the layout of the input.
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
