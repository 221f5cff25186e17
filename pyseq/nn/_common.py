# SPDX-License-Identifier: Apache-2.0
"""What the modules share: names of cells, checks of arguments, access to weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TypeGuard, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import init
from torch.nn.modules import module as _of_all_modules

from .._checks import autocasts, check_positive
from .._packed import QuantizedName, computing_dtype, is_quantized
from ..types import GATES, CellName, LayerNormWeights

Device = torch.device | str | int | None
M = TypeVar("M", bound=torch.nn.Module)


def cell_name(cell: str) -> CellName:
    """``cell`` as the operators spell it; ``"rnn"`` stands for ``"rnn_tanh"``.

    Raises:
        ValueError: there is no such cell.
    """
    name = "rnn_tanh" if cell == "rnn" else cell
    if name not in GATES:
        raise ValueError(f"cell must be one of {', '.join(GATES)}, rnn, got {cell!r}")
    return cast(CellName, name)


def check_nonlinearity(nonlinearity: object) -> None:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")


def check_layer_norm(
    layer_norm: bool, *, reset_after: bool = True, peepholes: bool = False
) -> None:
    if layer_norm and not reset_after:
        raise ValueError("layer_norm goes with reset_after=True, got True and False")
    if layer_norm and peepholes:
        raise ValueError("layer_norm goes without peepholes, got both")


def check_slstm(hidden_size: int, num_heads: int, forget_gate: str) -> None:
    if forget_gate not in ("sigmoid", "exp"):
        raise ValueError(f"forget_gate must be one of sigmoid, exp, got {forget_gate!r}")
    check_positive(hidden_size=hidden_size, num_heads=num_heads)
    if hidden_size % num_heads != 0:
        raise ValueError(
            f"hidden_size must be a multiple of num_heads, {num_heads}, got {hidden_size}"
        )


def check_input(name: str, tensor: Tensor, weight: Tensor, training: bool) -> None:
    """Raise unless a module with this weight can compute with ``tensor``, in this mode."""
    if tensor.dtype == weight.dtype:
        return
    dtype = computing_dtype(weight)
    if tensor.dtype != dtype and not autocasts(tensor.device):
        other = "" if is_quantized(weight) else f", or convert model: model.to({tensor.dtype})"
        raise ValueError(
            f"RNN {name} dtype ({tensor.dtype}) does not match weight dtype ({dtype}). "
            f"Convert {name}: {name}.to({dtype}){other}"
        )
    if training and is_quantized(weight):
        raise RuntimeError("a quantized module is for inference: call eval() on it, got train()")


def weights_now(module: torch.nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The attributes ``names`` of ``module`` as they are now.

    A parameter is found in its dictionary five times faster than by ``getattr``; what stands
    in for one (a parametrization, a pruned or normalised weight) is not in there.
    """
    parameters: dict[str, Any] = module._parameters
    try:
        return [parameters[name] for name in names]
    except KeyError:
        return [getattr(module, name) for name in names]


def is_bare(module: torch.nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether calling ``module`` is the ``forward`` of ``kind`` and nothing else: no hook of its
    own and no other ``forward``. A parametrised module is bare too: its weight is made where it is
    read. Hooks of all modules (profilers, counters of operations) are for what is called: they do
    not split an operator into its parts."""
    if type(module).forward is not kind.forward or "forward" in vars(module):
        return False
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return not any(len(each) for each in hooks)


def all_are_hooked() -> bool:
    """Whether torch calls hooks around the ``forward`` of every module."""
    hooks = _of_all_modules._global_forward_hooks, _of_all_modules._global_forward_pre_hooks
    return any(hooks)


def check_not_quantized(module: torch.nn.Module) -> None:
    """Raise a RuntimeError if ``module`` is quantized: such weights are not drawn."""
    if quantized_repr(module):
        raise RuntimeError(
            "the weights of a quantized module cannot be drawn anew: draw those of the module "
            f"that it was made of, got a quantized {type(module).__name__}"
        )


def quantized_repr(module: torch.nn.Module) -> str:
    """For ``extra_repr``: what :func:`pyseq.quantize` has made of the weights, if it has."""
    kind: QuantizedName | None = getattr(module, "_quantized", None)
    return "" if kind is None else f", quantized={kind!r}"


def changed_options(module: torch.nn.Module, **defaults: object) -> str:
    """For ``extra_repr``: these attributes of ``module``, where they are not at their defaults."""
    given = {name: getattr(module, name) for name in defaults}
    return "".join(
        f", {name}={value!r}" for name, value in given.items() if value != defaults[name]
    )


def add_weight(module: torch.nn.RNNBase | torch.nn.RNNCellBase, name: str, *shape: int) -> None:
    """Give ``module`` a parameter drawn within 1/sqrt(H), in the place of one that is there."""
    bound = 1 / math.sqrt(max(module.hidden_size, 1))
    like = next(module.parameters())
    weight = torch.nn.Parameter(like.new_empty(shape))
    init.uniform_(weight, -bound, bound)
    module.register_parameter(name, weight)


def norm_sizes(cell: CellName, hidden_size: int) -> dict[str, int]:
    """How the gains and biases of layer normalisation begin, and how many numbers they are."""
    sizes = dict.fromkeys(("gain_ih", "gain_hh"), GATES[cell] * hidden_size)
    return sizes | (dict.fromkeys(("gain_c", "bias_c"), hidden_size) if cell == "lstm" else {})


def reset_norm(norm: LayerNormWeights) -> None:
    """Start from no change: gains of one, a bias of zero."""
    init.ones_(norm.gain_ih)
    init.ones_(norm.gain_hh)
    if norm.gain_c is not None and norm.bias_c is not None:
        init.ones_(norm.gain_c)
        init.zeros_(norm.bias_c)


def set_forget_bias(
    module: torch.nn.Module, biases: Iterable[Sequence[str]], forget_bias: float
) -> None:
    """Start the forget gates of an LSTM from this number: in each of these pairs of names the
    first bias has it, since both add up, and the second has zero."""
    with torch.no_grad():
        for b_ih, b_hh in biases:
            for name, value in ((b_ih, forget_bias), (b_hh, 0.0)):
                bias = getattr(module, name)
                size = len(bias) // GATES["lstm"]
                bias[size : 2 * size] = value


def refuse_script(module: torch.nn.Module) -> NoReturn:
    """What torch.jit.script asks for by the name ``__prepare_scriptable__``."""
    raise TypeError(
        f"torch.jit.script must be given layers of torch.nn, got pyseq's {type(module).__name__}; "
        "script pyseq.revert(copy.deepcopy(model)), or trace the model"
    )
