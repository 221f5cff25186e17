# SPDX-License-Identifier: Apache-2.0
"""Inputs for the tests of the operators, and one way to run an operator on them.

A case names sizes and options and has a readable id; its call holds the tensors. The same
call runs on ``pyseq.functional`` and on ``pyseq.reference``.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyseq import reference
from pyseq.types import (
    DIAGONAL,
    GATES,
    SCAN_GATES,
    STATES,
    CellName,
    FeedName,
    HistoryName,
    OrderName,
    ScoreName,
)

DTYPES = (torch.float32, torch.float64)
DEVICES = ("cpu",)

#: The target of rows that do not count in the loss.
IGNORED = -1

#: Inputs that carry no gradient.
CONSTANTS = (
    "lengths",
    "resets",
    "dropout_masks",
    "target",
    "h_mask",
    "zoneout_h",
    "zoneout_c",
    "step",
)


class Call(NamedTuple):
    """One call of an operator."""

    op: str  # the operator's name, such as "scan"
    inputs: dict[str, Any]  # tensors, and tuples or lists of them, by argument name
    options: dict[str, Any]  # everything else, by argument name


class Results(NamedTuple):
    """What a call gave: tensors by name, such as ``state[0]``."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested tuples, lists and dictionaries, with its name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}" if name else key)
    elif isinstance(value, (tuple, list)):
        keys = getattr(value, "_fields", range(len(value)))
        for key, item in zip(keys, value, strict=True):
            label = f"[{key}]" if isinstance(key, int) else f".{key}"
            yield from leaves(item, name + label if name else str(key))


def map_leaves(function: Callable[[str, Tensor], Tensor], value: Any, name: str = "") -> Any:
    """``value`` with every tensor replaced by ``function(name, tensor)``."""
    if isinstance(value, Tensor):
        return function(name, value)
    if isinstance(value, Mapping):
        return {
            key: map_leaves(function, item, f"{name}.{key}" if name else key)
            for key, item in value.items()
        }
    if isinstance(value, (tuple, list)):
        return type(value)(
            [map_leaves(function, item, f"{name}[{i}]") for i, item in enumerate(value)]
        )
    return value


def changed(call: Call, function: Callable[[str, Tensor], Tensor]) -> Call:
    """``call`` with every input tensor replaced by ``function(name, tensor)``."""
    return call._replace(inputs=map_leaves(function, call.inputs))


def in_double(call: Call) -> Call:
    """``call`` with its floating-point inputs in float64."""
    return changed(call, lambda _, t: t.double() if t.is_floating_point() else t)


def poisoned(call: Call) -> Call:
    """``call`` with NaN in every padded step of x, position of keys and memory, and row that
    does not count in the loss."""
    if call.op == "linear_cross_entropy":
        ignored = (call.inputs["target"] == IGNORED).unsqueeze(1)
        hidden = call.inputs["hidden"].masked_fill(ignored, torch.nan)
        return call._replace(inputs=call.inputs | {"hidden": hidden})
    lengths = call.inputs["lengths"]

    def poison(name: str, tensor: Tensor) -> Tensor:
        if name not in ("x", "keys", "memory") or (name == "x" and call.op == "decode"):
            return tensor
        padded = torch.arange(tensor.shape[0]).unsqueeze(1) >= lengths
        return tensor.masked_fill(padded.unsqueeze(2), torch.nan)

    return changed(call, poison)


def differentiable(call: Call) -> list[str]:
    """The names of the inputs that a gradient can be asked for."""
    return [
        name
        for name, tensor in leaves(call.inputs)
        if tensor.is_floating_point() and name not in CONSTANTS
    ]


def tracked(call: Call, names: Collection[str] | None = None) -> Call:
    """``call`` on detached inputs, of which ``names`` (default: all that can) want gradients.

    The storage is shared, so strides stay as they are.
    """
    wanted = differentiable(call) if names is None else names
    return changed(call, lambda name, t: t.detach().requires_grad_(name in wanted))


def outputs_of(module: ModuleType, call: Call) -> dict[str, Tensor]:
    """Run the call on ``pyseq.functional`` or ``pyseq.reference``; of the results those that a
    gradient can come from."""
    results = leaves(getattr(module, call.op)(**call.inputs, **call.options))
    return {name: tensor for name, tensor in results if tensor.is_floating_point()}


def cotangents(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A fixed random gradient for each output; the same for every dtype."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(out.shape, generator=generator).to(out) for name, out in outputs.items()
    }


def run(
    module: ModuleType,
    call: Call,
    *,
    wanted: Collection[str] | None = None,
    used: Collection[str] | None = None,
) -> Results:
    """Outputs of the call and gradients of a random weighted sum of them.

    Args:
        module: ``pyseq.functional`` or ``pyseq.reference``.
        call: what to run.
        wanted: inputs to ask gradients for. Default: all that can have one.
        used: outputs that enter the sum. Default: all.
    """
    call = tracked(call, wanted)
    outputs = outputs_of(module, call)
    total = sum_of(outputs, used)
    asked = {name: tensor for name, tensor in leaves(call.inputs) if tensor.requires_grad}
    gradients = torch.autograd.grad(total, list(asked.values()), materialize_grads=True)
    return Results(
        {name: out.detach() for name, out in outputs.items()},
        dict(zip(asked, gradients, strict=True)),
    )


def sum_of(outputs: Mapping[str, Tensor], used: Collection[str] | None = None) -> Tensor:
    """The weighted sum of the outputs (of those ``used``) that tests differentiate."""
    weights = cotangents(outputs)
    terms = [(out * weights[name]).sum() for name, out in outputs.items()]
    names = list(outputs)
    return torch.stack(
        [t for n, t in zip(names, terms, strict=True) if not used or n in used]
    ).sum()


def expected_of(call: Call, **options: Any) -> Results:
    """What :func:`run` must give: the reference's results in float64."""
    return run(reference, in_double(call), **options)


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few settings in which any two values of two factors occur together at least once.

    Greedy: start from a pair still missing, fill up at random several times, keep the
    filling that covers most. The full product would take hours.
    """
    rng = random.Random(0)
    names = list(factors)

    def pairs(row: Mapping[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)}

    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    rows = []
    while missing:
        a, i, b, j = min(missing)
        candidates = [
            {name: rng.randrange(len(factors[name])) for name in names} | {a: i, b: j}
            for _ in range(40)
        ]
        best = max(candidates, key=lambda row: len(missing & pairs(row)))
        missing -= pairs(best)
        rows.append({name: factors[name][index] for name, index in best.items()})
    return rows


def make_lengths(kind: str | None, steps: int, batch: int) -> Tensor | None:
    """Lengths (B,) in no order. Kinds: ragged (1 to T), holes (0 to T), zero, full."""
    if kind is None:
        return None
    lengths = torch.full((batch,), steps)
    if kind in ("ragged", "holes"):
        lengths = torch.randint(1, steps + 1, (batch,))
        lengths[batch // 2 : batch // 2 + 1] = steps
    if kind == "holes":
        lengths[::3] = 0
    return torch.zeros_like(lengths) if kind == "zero" else lengths


def make_resets(kind: str | None, steps: int, batch: int) -> Tensor | None:
    """Resets (T, B). Kinds: first (at step 0), all, random."""
    if kind is None:
        return None
    resets = torch.full((steps, batch), kind == "all")
    if kind == "first":
        resets[0] = True
    return torch.rand(steps, batch) < 0.3 if kind == "random" else resets


def _weight(rows: int, columns: int, **kind: Any) -> Tensor:
    """A random matrix that keeps the magnitude of what it multiplies."""
    return torch.randn(rows, columns, **kind) / max(columns, 1) ** 0.5


def _join(*parts: str | bool | None) -> str:
    return "-".join(part for part in parts if isinstance(part, str) and part)


def _biases(kind: str, rows: int, **tensor: Any) -> dict[str, Tensor]:
    """``b_ih`` and ``b_hh`` (rows,). Kinds: both, ih, none."""
    names = {"both": ("b_ih", "b_hh"), "ih": ("b_ih",), "none": ()}[kind]
    return {name: torch.randn(rows, **tensor) for name in names}


@dataclass(frozen=True)
class ScanCase:
    """Sizes and options of one call of ``scan``."""

    cell: CellName = "lstm"
    sizes: tuple[int, int, int, int] = (5, 3, 4, 7)  # T, B, I, H
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    projection: int = 0  # P, or 0 for none
    lengths: str | None = None
    resets: str | None = None
    reverse: bool = False
    state: bool = True
    bias: str = "both"
    keep_every: int = 1
    return_states: bool = False
    peepholes: bool = False
    heads: int = 1  # sLSTM
    mask: bool = False  # on h, where the recurrent weights read it
    zoneout: str | None = None  # steps (a mask for each), one (number for all)
    reset_state: str | None = None  # rows (one for each), one (for all); with resets only
    layer_norm: bool = False

    @property
    def id(self) -> str:
        steps, batch, inputs, hidden = self.sizes
        return _join(
            self.cell,
            self.device,
            str(self.dtype).removeprefix("torch."),
            f"T{steps}-B{batch}-I{inputs}-H{hidden}",
            self.projection > 0 and f"P{self.projection}",
            self.lengths and f"lengths_{self.lengths}",
            self.resets and f"resets_{self.resets}",
            self.reverse and "reverse",
            not self.state and "nostate",
            self.bias != "both" and f"bias_{self.bias}",
            self.keep_every > 1 and f"keep{self.keep_every}",
            self.return_states and "states",
            self.peepholes and "peepholes",
            self.heads > 1 and f"heads{self.heads}",
            self.mask and "mask",
            self.zoneout and f"zoneout_{self.zoneout}",
            self.resets and self.reset_state and f"to_{self.reset_state}",
            self.layer_norm and "norm",
        )

    def call(self) -> Call:
        """The call, on tensors that depend on nothing but the case."""
        torch.manual_seed(0)
        steps, batch, inputs, hidden = self.sizes
        kind: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        rows, width = SCAN_GATES[self.cell] * hidden, self.projection or hidden
        diagonal = self.cell in DIAGONAL
        tensors: dict[str, Any] = {
            "x": torch.randn(steps, batch, inputs, **kind),
            "w_ih": _weight(rows, inputs, **kind),
            "w_hh": torch.rand(rows, **kind)
            if diagonal
            else _weight(rows, width // self.heads, **kind),
            **_biases(self.bias, rows, **kind),
        }
        if self.peepholes:
            tensors["w_ch"] = torch.randn(3 * hidden, **kind)
        if self.projection:
            tensors["w_hr"] = _weight(width, hidden, **kind)
        if self.state:
            tensors["state"] = self._state((batch,), width, **kind)
        if self.lengths:
            tensors["lengths"] = make_lengths(self.lengths, steps, batch)
        if self.resets:
            tensors["resets"] = make_resets(self.resets, steps, batch)
        tensors |= self._extras(width, **kind)
        options = {
            "cell": self.cell,
            "reverse": self.reverse,
            "keep_every": self.keep_every,
            "return_states": self.return_states,
        }
        return Call("scan", tensors, options)

    def _state(self, rows: tuple[int, ...], width: int, **kind: Any) -> Any:
        """A random state of these rows, whose h is of ``width`` numbers."""
        hidden = self.sizes[3]
        h = torch.randn(*rows, width, **kind)
        others = [torch.randn(*rows, hidden, **kind) for _ in STATES.get(self.cell, "")]
        if len(others) > 1:
            others[1] = others[1].abs() + 0.5  # the normaliser, a sum of positive numbers
        return (h, *others) if others else h

    def _extras(self, width: int, **kind: Any) -> dict[str, Any]:
        """What else acts on the states, whose h is of ``width`` numbers."""
        steps, batch, _, hidden = self.sizes
        tensors: dict[str, Any] = {}
        if self.mask:
            tensors["h_mask"] = torch.randint(0, 2, (batch, width)).to(**kind) * 2
        parts = {"h": width, "c": hidden} if self.cell == "lstm" else {"h": width}
        for part, size in parts.items():
            if self.zoneout == "steps":
                tensors[f"zoneout_{part}"] = torch.randint(0, 2, (steps, batch, size)).to(**kind)
            elif self.zoneout == "one":
                tensors[f"zoneout_{part}"] = torch.full((1, 1, size), 0.3, **kind)
        if self.reset_state and self.resets:  # without which it has nothing to do
            rows = (batch,) if self.reset_state == "rows" else ()
            tensors["reset_state"] = self._state(rows, width, **kind)
        if self.layer_norm:
            sizes = [SCAN_GATES[self.cell] * hidden] * 2 + [hidden] * 2 * (self.cell == "lstm")
            tensors["layer_norm"] = tuple(torch.randn(size, **kind) for size in sizes)
        return tensors


@dataclass(frozen=True)
class AttendCase:
    """Sizes and options of one call of ``attend``."""

    score: ScoreName = "dot"
    sizes: tuple[int, int, int, int, int, int] = (4, 5, 3, 6, 7, 8)  # T, S, B, A, M, Q
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    lengths: str | None = None
    need_weights: bool = False
    project_query: bool = True  # concat: with weight_query
    heads: int = 1
    window: int | None = None
    positions: bool = False  # whether the windows are around given positions
    step: bool = False  # whether rows have had queries before

    @property
    def id(self) -> str:
        letters = zip("TSBAMQ", self.sizes, strict=True)
        return _join(
            self.score,
            self.device,
            str(self.dtype).removeprefix("torch."),
            "-".join(f"{letter}{size}" for letter, size in letters),
            self.lengths and f"lengths_{self.lengths}",
            self.need_weights and "weights",
            self.score == "concat" and not self.project_query and "projected",
            self.heads > 1 and f"N{self.heads}",
            self.window is not None and f"D{self.window}",
            self.positions and "positions",
            self.step and "step",
        )

    def call(self) -> Call:
        """The call, on tensors that depend on nothing but the case."""
        torch.manual_seed(0)
        steps, source, batch, size, width, query = self.sizes
        kind: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        # Heads split what they get, so there are N times as many of everything.
        size, width, query = (self.heads * n for n in (size, width, query))
        own = _projects_query(self.score, self.project_query)
        tensors: dict[str, Any] = {
            "query": torch.randn(steps, batch, query if own else size, **kind),
            **_keys(self.score, source, batch, size, **kind),
            "memory": torch.randn(source, batch, width, **kind),
            **_score_weights(self.score, query, size, own, source, **kind),
        }
        if self.lengths:
            tensors["lengths"] = make_lengths(self.lengths, source, batch)
        if self.positions:
            # Some of them outside the memory, with its ends in the window or not.
            tensors["positions"] = torch.rand(steps, batch, **kind) * (source + 8) - 4
        if self.step:
            tensors["step"] = torch.arange(batch, device=self.device) * 2
        options = {"score": self.score, "need_weights": self.need_weights}
        if self.heads > 1:
            options["heads"] = self.heads
        if self.window is not None:
            options["window"] = self.window
        return Call("attend", tensors, options)


def _projects_query(score: ScoreName, project_query: bool) -> bool:
    """Whether the score lets the query have another size than the keys."""
    return score in ("general", "location") or (score == "concat" and project_query)


def _keys(score: ScoreName, source: int, batch: int, size: int, **kind: Any) -> dict[str, Any]:
    if score == "location":
        return {"keys": None}
    keys = torch.randn(source, batch, size, **kind)
    # Scores of dot and general then have a variance of 1.
    return {"keys": keys / size**0.5 if score in ("dot", "general") and size else keys}


def _score_weights(
    score: ScoreName, query: int, size: int, project_query: bool, source: int, **kind: Any
) -> dict[str, Tensor]:
    """The weights that go with a score: queries of ``query``, keys of ``size`` numbers."""
    if score == "general":
        return {"weight": _weight(query, size, **kind)}
    if score == "location":
        # Of too few rows and of too many, in turns.
        return {"weight": _weight(source + 1 - 2 * (source % 2), query, **kind)}
    if score != "concat":
        return {}
    weights = {"weight_v": torch.randn(size, **kind)}
    if project_query:
        weights["weight_query"] = _weight(size, query, **kind)
    return weights


@dataclass(frozen=True)
class DecodeCase:
    """Sizes and options of one call of ``decode``."""

    cell: CellName = "lstm"
    score: ScoreName = "dot"
    sizes: tuple[int, int, int, int, int, int, int] = (4, 5, 3, 6, 7, 8, 9)  # T S B I H A M
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    layers: int = 1
    input_feeding: bool = True
    lengths: str | None = None
    dropout: bool = False
    state: bool = True
    bias: str = "both"
    need_weights: bool = False
    project_query: bool = True  # concat: with weight_query
    heads: int = 1  # A, H and M are so many times as large
    window: int | None = None
    predict: bool = False  # whether the windows are where W_p says, of P = A + 1 units
    history: HistoryName | None = None  # of K = 3 positions
    order: OrderName = "luong"
    feed: FeedName = "output"

    @property
    def id(self) -> str:
        letters = zip("TSBIHAM", self.sizes, strict=True)
        return _join(
            self.cell,
            self.score,
            self.device,
            str(self.dtype).removeprefix("torch."),
            "-".join(f"{letter}{size}" for letter, size in letters),
            f"L{self.layers}",
            not self.input_feeding and "nofeed",
            self.lengths and f"lengths_{self.lengths}",
            self.dropout and "dropout",
            not self.state and "nostate",
            self.bias != "both" and f"bias_{self.bias}",
            self.need_weights and "weights",
            self.score == "concat" and not self.project_query and "projected",
            self.heads > 1 and f"N{self.heads}",
            self.window is not None and f"D{self.window}",
            self.predict and "predict",
            self.history,
            self.order != "luong" and self.order,
            self.feed != "output" and self.feed,
        )

    def call(self) -> Call:
        """The call, on tensors that depend on nothing but the case."""
        torch.manual_seed(0)
        steps, source, batch, inputs, hidden, size, width = self.sizes
        hidden, size, width = (self.heads * n for n in (hidden, size, width))
        fed_size = hidden if self.feed == "output" else width
        kind: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        own = _projects_query(self.score, self.project_query)
        # The top state is the query; unless something projects it, A is H.
        size = size if own else hidden
        rows = GATES[self.cell] * hidden
        stack = []
        for layer in range(self.layers):
            fed = fed_size if self.input_feeding else 0
            columns = hidden if layer else inputs + fed
            biases = _biases(self.bias, rows, **kind)
            stack.append(
                (
                    _weight(rows, columns, **kind),
                    _weight(rows, hidden, **kind),
                    biases.get("b_ih"),
                    biases.get("b_hh"),
                )
            )
        tensors: dict[str, Any] = {
            "x": torch.randn(steps, batch, inputs, **kind),
            "layers": stack,
            "keys": None if self.score == "location" else torch.randn(source, batch, size, **kind),
            "memory": torch.randn(source, batch, width, **kind),
            "combine": _weight(hidden, width + hidden, **kind),
            **_score_weights(self.score, hidden, size, own, source, **kind),
        }
        if self.predict:
            tensors["weight_position"] = _weight(size + 1, hidden, **kind)
            # A steep sigmoid would make positions, and all that follows, ill-conditioned.
            tensors["weight_position_v"] = torch.randn(size + 1, **kind) / (size + 1) ** 0.5
        if self.history is not None:
            tensors["weight_history"] = torch.randn(size, 3, **kind)
        if self.state:
            h = torch.randn(self.layers, batch, hidden, **kind)
            # In Bahdanau's order a step is fed what it makes itself.
            first = self.order == "luong"
            feed = torch.randn(batch, fed_size, **kind) if first else None
            tensors["state"] = ((h, torch.randn_like(h)) if self.cell == "lstm" else h, feed)
            if self.window is not None or self.history is not None:
                past = None
                if self.history is not None:
                    past = torch.rand(batch, self.heads, source, **kind)
                step = torch.arange(batch) % 3
                tensors["state"] = (*tensors["state"], (step, past))
        if self.lengths:
            tensors["lengths"] = make_lengths(self.lengths, source, batch)
        if self.dropout:
            shape = (self.layers - 1, steps, batch, hidden)
            tensors["dropout_masks"] = (torch.rand(shape, **kind) > 0.25) / 0.75
            tensors["dropout_masks"] = tensors["dropout_masks"].to(self.dtype)
        options = {
            "cell": self.cell,
            "score": self.score,
            "input_feeding": self.input_feeding,
            "need_weights": self.need_weights,
        }
        plain = DecodeCase()
        for name in ("heads", "window", "history", "order", "feed"):
            if getattr(self, name) != getattr(plain, name):
                options[name] = getattr(self, name)
        return Call("decode", tensors, options)


@dataclass(frozen=True)
class LinearCrossEntropyCase:
    """Sizes and options of one call of ``linear_cross_entropy``."""

    sizes: tuple[int, int, int] = (9, 7, 5)  # N, V, H
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    ignored: str | None = None  # rows that do not count: some, or most
    label_smoothing: float = 0.0
    bias: bool = True

    @property
    def id(self) -> str:
        rows, vocab, size = self.sizes
        return _join(
            self.device,
            str(self.dtype).removeprefix("torch."),
            f"N{rows}-V{vocab}-H{size}",
            self.ignored and f"ignored_{self.ignored}",
            self.label_smoothing > 0 and "smoothing",
            not self.bias and "nobias",
        )

    def call(self) -> Call:
        """The call, on tensors that depend on nothing but the case."""
        torch.manual_seed(0)
        rows, vocab, size = self.sizes
        kind: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        ignored = torch.rand(rows) < {None: 0.0, "some": 0.3, "most": 0.9}[self.ignored]
        ignored[rows // 2] = False
        tensors = {
            "hidden": torch.randn(rows, size, **kind),
            "weight": _weight(vocab, size, **kind),
            "target": torch.randint(vocab, (rows,)).masked_fill(ignored, IGNORED),
        }
        if self.bias:
            tensors["bias"] = torch.randn(vocab, **kind)
        options = {"ignore_index": IGNORED, "label_smoothing": self.label_smoothing}
        return Call("linear_cross_entropy", tensors, options)


Case = ScanCase | AttendCase | DecodeCase | LinearCrossEntropyCase


def op_of(case: Case) -> str:
    """The name of the operator that the case calls."""
    words = re.findall("[A-Z][a-z]*", type(case).__name__.removesuffix("Case"))
    return "_".join(words).lower()


CELLS: tuple[CellName, ...] = ("rnn_tanh", "rnn_relu", "gru", "lstm")
#: Cells of a scan that no decoder takes, with the options that make them.
SCAN_CELLS: tuple[dict[str, Any], ...] = (
    {"cell": "lstm", "peepholes": True},
    {"cell": "indrnn_tanh"},
    {"cell": "indrnn_relu"},
    {"cell": "gru_reset_before"},
    {"cell": "slstm_sigmoid"},
    {"cell": "slstm_exp"},
)

# Widths next to 8, 16, 32 and 64 meet the borders of vectors and tiles on every tier; the
# batches 1 to 9 and 13 those of rows in a tile; the large ones are shared by the threads.
SCAN_SIZES = (
    (1, 1, 1, 1),
    (1, 2, 3, 5),
    (5, 2, 4, 7),
    (3, 13, 1, 15),
    (4, 1, 5, 16),
    (4, 2, 8, 17),
    (2, 3, 8, 33),
    (3, 4, 6, 64),
    (3, 5, 6, 65),
    (2, 6, 3, 67),
    (2, 7, 16, 31),
    (2, 8, 5, 32),
    (3, 9, 7, 48),
    (2, 64, 3, 24),
    (6, 0, 3, 5),
    (40, 3, 4, 16),
    (3, 17, 20, 130),
    (4, 1, 4, 256),
    (2, 33, 3, 128),
)
ATTEND_SIZES = (
    (1, 1, 1, 1, 1, 1),
    (4, 5, 3, 6, 7, 8),
    (1, 7, 2, 15, 16, 3),
    (5, 1, 4, 16, 33, 9),
    (3, 17, 5, 33, 15, 7),
    (2, 16, 6, 17, 64, 16),
    (7, 9, 7, 64, 1, 65),
    (9, 15, 8, 65, 17, 33),
    (16, 64, 1, 8, 67, 64),
    (17, 33, 9, 67, 31, 2),
    (3, 4, 0, 5, 6, 7),
    (6, 65, 13, 31, 32, 17),
    (33, 8, 2, 128, 130, 31),
)
DECODE_SIZES = (
    (1, 1, 1, 1, 1, 1, 1),
    (4, 5, 3, 6, 7, 8, 9),
    (1, 4, 2, 5, 15, 16, 15),
    (3, 1, 4, 8, 16, 17, 16),
    (5, 3, 1, 1, 17, 33, 8),
    (2, 7, 5, 3, 33, 15, 33),
    (3, 16, 6, 4, 64, 7, 65),
    (2, 17, 7, 9, 65, 64, 64),
    (3, 6, 8, 5, 67, 1, 2),
    (2, 4, 0, 3, 5, 6, 7),
    (3, 9, 9, 4, 32, 31, 17),
    (2, 33, 13, 7, 31, 65, 1),
    (12, 5, 2, 3, 7, 9, 16),
    (3, 15, 17, 16, 130, 32, 67),
    (3, 8, 1, 4, 256, 128, 128),
)
LENGTHS = (None, "ragged", "holes", "zero", "full")
# 513 and more rows of a small vocabulary, and 130 of a large one, are more than one chunk.
LOSS_SIZES = (
    (1, 1, 1),
    (1, 2, 3),
    (9, 7, 5),
    (15, 16, 17),
    (16, 65, 64),
    (17, 33, 1),
    (33, 130, 31),
    (64, 64, 8),
    (65, 200, 16),
    (3, 5, 0),
    (600, 12, 20),
    (130, 40000, 3),
)


#: Scores, and whether the operator itself projects the query.
SCORES: tuple[tuple[ScoreName, bool], ...] = (
    ("dot", True),
    ("scaled_dot", True),
    ("general", True),
    ("concat", True),
    ("concat", False),
    ("location", True),
)
#: Windows of attention, and whether their centres are given.
WINDOWS: tuple[tuple[int | None, bool], ...] = (
    (None, False),
    (1, False),
    (3, False),
    (1, True),
    (2, True),
    (40, True),
)


def scan_cases() -> list[ScanCase]:
    """Cases of ``scan``: for each device, dtype and cell, every pair of settings."""
    rows = pairwise(
        {
            "sizes": SCAN_SIZES,
            "lengths": LENGTHS,
            "resets": (None, "first", "all", "random"),
            "reverse": (False, True),
            "state": (True, False),
            "bias": ("both", "none", "ih"),
            "keep_every": (1, 2, 100),
            "return_states": (False, True),
            "mask": (False, True),
            "zoneout": (None, "steps", "one"),
            "reset_state": (None, "rows", "one"),
            "layer_norm": (False, True),
        }
    )
    cases = []
    for device, dtype, row in itertools.product(DEVICES, DTYPES, rows):
        cases += [ScanCase(cell=cell, dtype=dtype, device=device, **row) for cell in CELLS]
        hidden = row["sizes"][3]
        # A projection to fewer numbers, as is usual, and for some sizes to more.
        width = hidden + 2 if hidden % 16 == 0 else max(1, hidden // 2)
        cases.append(ScanCase(projection=width, dtype=dtype, device=device, **row))
        plain = row | {"layer_norm": False}  # which goes with torch.nn's cells only
        cases += [ScanCase(dtype=dtype, device=device, **cell, **plain) for cell in SCAN_CELLS]
        # As many heads as the units can be shared among, up to four.
        heads = next(count for count in (4, 3, 2, 1) if hidden % count == 0)
        if heads > 1:
            heads_of: dict[str, Any] = {"cell": "slstm_exp", "heads": heads}
            cases.append(ScanCase(dtype=dtype, device=device, **heads_of, **plain))
    return cases


def attend_cases() -> list[AttendCase]:
    """Cases of ``attend``: for each device, dtype and score, every pair of settings."""
    rows = pairwise(
        {
            "sizes": ATTEND_SIZES,
            "lengths": LENGTHS,
            "need_weights": (False, True),
            "heads": (1, 2, 3),
            "window": WINDOWS,
        }
    )
    for row in rows:
        row["window"], row["positions"] = row["window"]
    return [
        AttendCase(score=score, project_query=project, dtype=dtype, device=device, **row)
        for device, dtype, (score, project), row in itertools.product(DEVICES, DTYPES, SCORES, rows)
    ]


def decode_cases() -> list[DecodeCase]:
    """Cases of ``decode``: for each device, dtype and cell, every pair of settings."""
    rows = pairwise(
        {
            "score": SCORES,
            "sizes": DECODE_SIZES,
            "layers": (1, 2, 3),
            "input_feeding": (True, False),
            "lengths": LENGTHS,
            "dropout": (False, True),
            "state": (True, False),
            "bias": ("both", "none", "ih"),
            "need_weights": (False, True),
        }
    )
    for row in rows:
        row["score"], row["project_query"] = row["score"]
    return [
        DecodeCase(cell=cell, dtype=dtype, device=device, **row)
        for device, dtype, cell, row in itertools.product(DEVICES, DTYPES, CELLS, rows)
    ]


#: How a decoder attends: window, whether it is predicted, and history.
ATTENTIONS: tuple[tuple[int | None, bool, HistoryName | None], ...] = (
    (None, False, None),
    (2, False, None),
    (2, True, None),
    (None, False, "previous"),
    (None, False, "cumulative"),
    (3, True, "cumulative"),
)
#: Order, and what is fed: if anything.
FEEDINGS: tuple[tuple[OrderName, FeedName, bool], ...] = (
    ("luong", "output", True),
    ("luong", "context", True),
    ("luong", "output", False),
    ("bahdanau", "context", True),
)
#: Sizes with few steps, positions and units, since there are so many other settings.
ATTENTIVE_SIZES = (
    (1, 1, 1, 1, 1, 1, 1),
    (4, 5, 3, 6, 7, 8, 9),
    (5, 9, 2, 3, 16, 17, 5),
    (3, 7, 5, 2, 9, 3, 33),
    (2, 3, 0, 3, 5, 6, 7),
    (6, 17, 9, 4, 33, 16, 2),
    (9, 4, 1, 2, 5, 4, 16),
)


def attentive_cases() -> list[DecodeCase]:
    """Cases of ``decode`` with other attention than Luong's global: every pair of settings, for
    each device and dtype."""
    rows = pairwise(
        {
            "cell": CELLS,
            "score": SCORES,
            "sizes": ATTENTIVE_SIZES,
            "layers": (1, 2),
            "lengths": LENGTHS,
            "state": (True, False),
            "need_weights": (False, True),
            "heads": (1, 2, 3),
            "attention": ATTENTIONS,
            "feeding": FEEDINGS,
        }
    )
    for row in rows:
        row["score"], row["project_query"] = row["score"]
        row["window"], row["predict"], row["history"] = row.pop("attention")
        row["order"], row["feed"], row["input_feeding"] = row.pop("feeding")
        if row["history"] is not None:
            row["score"] = "concat"
    return [
        DecodeCase(dtype=dtype, device=device, **row)
        for device, dtype, row in itertools.product(DEVICES, DTYPES, rows)
    ]


def loss_cases() -> list[LinearCrossEntropyCase]:
    """Cases of ``linear_cross_entropy``: for each device and dtype, every pair of settings."""
    rows = pairwise(
        {
            "sizes": LOSS_SIZES,
            "ignored": (None, "some", "most"),
            "label_smoothing": (0.0, 0.1, 1.0),
            "bias": (True, False),
        }
    )
    return [
        LinearCrossEntropyCase(dtype=dtype, device=device, **row)
        for device, dtype, row in itertools.product(DEVICES, DTYPES, rows)
    ]


def small_cases(dtype: torch.dtype = torch.float32) -> list[Case]:
    """A handful that meets every kernel once: each cell, each score, all options on."""
    scans = [
        ScanCase(cell=cell, lengths="holes", resets="random", reverse=reverse, dtype=dtype)
        for cell in CELLS
        for reverse in (False, True)
    ]
    scans.append(
        ScanCase(
            lengths="holes",
            resets="random",
            reverse=True,
            keep_every=2,
            return_states=True,
            dtype=dtype,
        )
    )
    scans.append(
        ScanCase(
            cell="slstm_sigmoid",
            heads=3,
            sizes=(5, 3, 4, 9),
            lengths="holes",
            resets="random",
            dtype=dtype,
        )
    )
    scans += [
        ScanCase(
            lengths="holes",
            resets="random",
            reverse=True,
            return_states=True,
            zoneout="one",
            reset_state="one",
            dtype=dtype,
            **cell,
        )
        for cell in SCAN_CELLS
    ]
    everything: dict[str, Any] = {"lengths": "holes", "resets": "random", "mask": True}
    scans += [
        ScanCase(cell=cell, reverse=True, dtype=dtype, **everything)
        for cell in ("indrnn_relu", "gru_reset_before")
    ]
    scans += [
        ScanCase(
            cell=cell,
            zoneout=zoneout,
            reset_state=state,
            layer_norm=norm,
            dtype=dtype,
            **everything,
        )
        for cell, zoneout, state in zip(
            CELLS, ("steps", "one") * 2, ("one", "rows", "one", "rows"), strict=True
        )
        for norm in (False, True)
    ]
    base = ScanCase(projection=3, lengths="ragged", return_states=True, dtype=dtype)
    attends = [
        AttendCase(score=score, lengths="holes", need_weights=True, dtype=dtype)
        for score in ("dot", "scaled_dot", "general", "concat", "location")
    ]
    attends += [
        AttendCase(
            score=score,
            lengths="holes",
            need_weights=True,
            heads=heads,
            window=2,
            positions=positions,
            step=step,
            dtype=dtype,
        )
        for score, heads, positions, step in (
            ("dot", 1, True, False),
            ("concat", 2, True, False),
            ("dot", 2, False, False),
            ("concat", 2, False, True),
        )
    ]
    scores: tuple[ScoreName, ...] = ("dot", "general", "concat", "concat")
    decodes = [
        DecodeCase(
            cell=cell,
            score=score,
            layers=2,
            lengths="holes",
            dropout=True,
            need_weights=True,
            dtype=dtype,
        )
        for cell, score in zip(CELLS, scores, strict=True)
    ]
    decodes += [
        DecodeCase(
            cell=cell,
            score=score,
            layers=2,
            lengths="holes",
            need_weights=True,
            heads=heads,
            window=window,
            predict=predict,
            history=history,
            order=order,
            feed=feed,
            dtype=dtype,
        )
        for cell, score, heads, (window, predict, history), (order, feed, _) in (
            ("lstm", "dot", 1, ATTENTIONS[1], FEEDINGS[1]),
            ("gru", "location", 2, ATTENTIONS[2], FEEDINGS[0]),
            ("lstm", "concat", 1, ATTENTIONS[3], FEEDINGS[3]),
            ("rnn_tanh", "concat", 2, ATTENTIONS[5], FEEDINGS[3]),
            ("gru", "concat", 1, ATTENTIONS[4], FEEDINGS[0]),
        )
    ]
    losses = [
        LinearCrossEntropyCase(ignored="some", label_smoothing=smoothing, dtype=dtype)
        for smoothing in (0.0, 0.1)
    ]
    return [*scans, base, *attends, *decodes, *losses]
