# SPDX-License-Identifier: Apache-2.0
"""What the recurrent layers share: access to weights, forward of all forms of input."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .. import functional
from .._checks import check_tensor
from ..functional import scans
from ..types import (
    SCAN_GATES,
    State,
    join_parts,
    kind,
    state_parts,
)
from ._common import check_input, refuse_script, weights_now
from ._masks import DrawnMasks, Probabilities, draw_masks
from ._recurrent_options import RecurrentOptions
from ._stack import Regularization, ScanWeights, join_layers, runs_both, scan_layers


class Recurrent(RecurrentOptions):
    """What the recurrent layers share: their weights, and forward of all forms of input."""

    # RNNBase keeps a list of the weights for cuDNN and watches it at each assignment and call.
    # Here they are read by name at each call, which is what makes parametrizations,
    # functional_call and deepcopy of them work; the list is made for those who ask for it.

    @property
    def _flat_weights(self) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # a list there
        """All weights as they are now, in the order of torch.nn; a tuple, as changing it would
        change nothing else."""
        return tuple(getattr(self, name, None) for names in self._all_weights for name in names)

    __prepare_scriptable__ = refuse_script

    def _init_flat_weights(self) -> None:
        self._flat_weight_refs = []

    def _update_flat_weights(self) -> None:
        """Do nothing: there is no list that could be out of date."""

    def _replicate_for_data_parallel(self) -> Recurrent:
        return torch.nn.Module._replicate_for_data_parallel(self)

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
        masks: DrawnMasks | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Time-major and batched: the output, the last state and those of every step in parts."""
        learned = self._learned()
        try:
            plain = self._plain and masks is None and not return_states and not self._drops()
            if plain and self.bidirectional and runs_both(x, self.keep_every):
                return self._scan_plain_both(x, parts, lengths, resets)
            if plain and not self.bidirectional and lengths is None and resets is None:
                return self._scan_plain(x, parts)
            steps, batch, _ = x.shape
            if masks is None:
                masks = self.draw_masks(steps, batch)
            elif (masks.steps, masks.batch) != (steps, batch):
                raise RuntimeError(
                    f"masks must be drawn for T, B = {steps}, {batch}, got {masks.steps}, "
                    f"{masks.batch}"
                )
            if not parts:
                parts = tuple(part.unsqueeze(1).expand(-1, batch, -1) for part in learned)
            return scan_layers(
                x,
                self._weights(),
                parts,
                cell=self.cell,
                directions=2 if self.bidirectional else 1,
                lengths=lengths,
                resets=resets,
                masks=masks,
                keep_every=self.keep_every,
                regularization=Regularization(
                    self.residual,
                    0.0 if self.training else self.zoneout_h,
                    0.0 if self.training else self.zoneout_c,
                    () if resets is None else learned,
                    self._layer_norms(),
                ),
                return_states=return_states,
            )
        except RuntimeError:
            self._explain(x, parts)
            raise

    def draw_masks(self, steps: int, batch: int) -> DrawnMasks | None:
        """What a call drops, for several calls that are to drop the same.

        Args:
            steps, batch: T and B of the calls. Of calls that each run a part of a sequence, those
                of all of it, and then ``of_steps`` of the result for each.

        Returns:
            The masks; None if nothing is dropped, as in evaluation.
        """
        probabilities = Probabilities(
            self.dropout if self._drops() else 0.0,
            self.variational_dropout,
            self.recurrent_dropout,
            self.weight_dropout,
            self.zoneout_h,
            self.zoneout_c,
        )
        if not self.training or not any(probabilities):
            return None
        return draw_masks(
            probabilities,
            [(own[0], own[1], own[4]) for own in self._weights()],
            2 if self.bidirectional else 1,
            steps,
            batch,
            SCAN_GATES[self.cell],
        )

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

    def _scan_plain_both(
        self,
        x: Tensor,
        parts: tuple[Tensor, ...],
        lengths: Tensor | None,
        resets: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The same in both directions."""
        cell, state, states = self.cell, None, []
        weights = self._weights()
        for first in range(0, len(weights), 2):
            if parts:
                state = join_parts(tuple([part[first : first + 2] for part in parts]))
            x, last = functional.scan_both(
                x,
                weights[first][:5],
                weights[first + 1][:5],
                state,
                cell=cell,
                lengths=lengths,
                resets=resets,
            )
            states.append(state_parts(cell, last))
        return x, states[0] if len(states) == 1 else join_layers(torch.cat, states), ()

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        *,
        return_states: bool = False,
        masks: DrawnMasks | None = None,
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
            masks: what :meth:`draw_masks` gave, in training, where several calls are to drop the
                same. Not with a PackedSequence. Default: drawn here.
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
        if (
            self._plain
            and resets is masks is None
            and not (return_states or (self.dropout and self._drops()) or is_dynamo_compiling())
        ):
            # All at once where nothing looks on: a small step takes less time than what follows.
            result = scans.scan_layers(
                self,
                self._parameters,
                self._all_weights,
                input,
                hx,
                lengths,
                self.cell,
                self.bidirectional,
                self.batch_first,
                self.training,
            )
            if result is not None:
                return result
        parts = state_parts(self.cell, hx)
        if lengths is not None:
            check_tensor("lengths", lengths)
        if resets is not None:
            check_tensor("resets", resets)
        if masks is not None and not isinstance(masks, DrawnMasks):
            raise TypeError(f"masks must be what draw_masks gave, got {kind(masks)}")
        if masks is not None and (not self.training or isinstance(input, PackedSequence)):
            raise ValueError(
                "masks must be None in evaluation, and for a PackedSequence, whose rows are in "
                "another order, got some"
            )
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
        output, parts, steps = self._scan(input, parts, lengths, resets, return_states, masks)
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
