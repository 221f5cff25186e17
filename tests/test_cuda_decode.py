# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the decoder, run on the CPU through the shim, against the CPU operator,
which test_functional.py holds against the reference."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cuda_shim import build, check, pointer
from tolerances import assert_close, assert_same_bits
from torch import Tensor

from pyseq import _library as _library  # registers the operators

CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")  # in the order of cpu::CellKind
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}


@dataclass(frozen=True)
class Case:
    """Sizes of a call, what the decoder has, and how the work is shared out."""

    cell: str = "lstm"
    steps: int = 3
    batch: int = 3
    hidden: int = 5
    layers: int = 1
    source: int = 4
    memory: int = 6
    additive: bool = False
    feeding: bool = True
    order: str = "luong"
    fed: str = "output"
    heads: int = 1
    window: int = 0
    predicted: bool = False
    history: str = "none"
    ragged: bool = False
    dropout: bool = False
    dtype: torch.dtype = torch.float64
    tiles: int = 2
    groups: int = 2

    def __str__(self) -> str:
        parts = [self.cell, f"T{self.steps}-B{self.batch}-H{self.hidden}-L{self.layers}"]
        for name in ("additive", "predicted", "ragged", "dropout"):
            parts += [name] * getattr(self, name)
        parts += ["plain"] * (not self.feeding) + [f"window{self.window}"] * (self.window > 0)
        parts += [f"heads{self.heads}"] * (self.heads > 1)
        parts += [value for value in (self.order, self.fed, self.history) if value != "none"]
        return "-".join([*parts, f"{self.tiles}x{self.groups}", str(self.dtype)[6:]])

    @property
    def key_size(self) -> int:
        return 4 if self.additive else self.hidden

    @property
    def fed_size(self) -> int:
        return self.memory if self.fed == "context" else self.hidden


CASES = [
    Case(),
    Case(cell="gru", ragged=True),
    Case(cell="rnn_tanh", feeding=False),
    Case(cell="rnn_relu", fed="context"),
    Case(layers=2, dropout=True, additive=True),
    Case(cell="gru", layers=2, dropout=True, additive=True, ragged=True),
    Case(additive=True, order="bahdanau", fed="context", ragged=True),
    Case(cell="gru", order="bahdanau", fed="context"),
    Case(additive=True, history="cumulative", ragged=True),
    Case(additive=True, history="previous", order="bahdanau", fed="context", heads=2),
    Case(window=1, ragged=True),
    Case(window=2, predicted=True, source=9, ragged=True),
    Case(window=2, predicted=True, additive=True, heads=2, cell="gru"),
    Case(heads=2, hidden=8),
    Case(steps=1, batch=1, hidden=1, source=1, memory=1, tiles=1, groups=1),
    Case(steps=2, batch=11, hidden=13, source=7, tiles=3, groups=1),
    Case(batch=2, hidden=3, tiles=5, groups=2, cell="gru"),
    Case(dtype=torch.float32, additive=True, layers=2, ragged=True),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("decode_kernels", tmp_path_factory.mktemp("cuda_decode"))


@dataclass
class Inputs:
    """The operator's arguments; all but `rest` are differentiated."""

    x: Tensor
    layers: list[Tensor]
    keys: Tensor
    memory: Tensor
    combine: Tensor
    rest: dict[str, Tensor] = field(default_factory=dict)  # those that the case has
    lengths: Tensor | None = None
    masks: Tensor | None = None
    step: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Everything with a gradient."""
        names = {"x": self.x, "keys": self.keys, "memory": self.memory, "combine": self.combine}
        names |= {f"layers{i}": weight for i, weight in enumerate(self.layers)}
        return names | self.rest


def inputs_of(case: Case) -> Inputs:
    torch.manual_seed(0)
    T, B, H, L, S, M = (
        case.steps, case.batch, case.hidden, case.layers, case.source, case.memory,
    )  # fmt: skip
    A, G, K, P, size = case.key_size, GATES[case.cell], 3, 2, 2

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64).mul_(0.6).to(case.dtype)

    layers = []
    for layer in range(L):
        below = H if layer else size + (case.fed_size if case.feeding else 0)
        layers += [random(G * H, below), random(G * H, H), random(G * H), random(G * H)]
    inputs = Inputs(random(T, B, size), layers, random(S, B, A), random(S, B, M), random(H, M + H))
    rest = inputs.rest
    rest["h_0"] = random(L, B, H)
    if case.cell == "lstm":
        rest["c_0"] = random(L, B, H)
    if case.feeding:
        rest["feed"] = random(B, case.fed_size)
    if case.additive:
        rest |= {"weight_query": random(A, H), "weight_v": random(A)}
    if case.predicted:
        rest |= {"weight_position": random(P, H), "weight_position_v": random(P)}
    if case.history != "none":
        rest |= {"weight_history": random(A, K), "past": random(B, case.heads, S)}
    if case.window and not case.predicted:
        inputs.step = torch.arange(B)
    if case.dropout:
        inputs.masks = 2.0 * torch.randint(0, 2, (L - 1, T, B, H)).to(case.dtype)
    if case.ragged:
        # One row is whole, one has no valid position.
        inputs.lengths = torch.tensor([S, 0, S // 2])[:B]
        for row in range(B):
            inputs.keys[inputs.lengths[row] :, row] = 0
            inputs.memory[inputs.lengths[row] :, row] = 0
    return inputs


RESULTS = ("output", "attn", "h_n", "c_n", "feed_n", "past_n")


def expected(case: Case, inputs: Inputs, d_results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results and gradients of the CPU operator in float64."""
    leaves = {name: value.double().requires_grad_() for name, value in inputs.named().items()}
    given: dict[str, Any] = {name: leaves.get(name) for name in inputs.rest}
    call = torch.ops.pyseq.decode(
        leaves["x"],
        [leaves[f"layers{i}"] for i in range(len(inputs.layers))],
        leaves["keys"],
        leaves["memory"],
        leaves["combine"],
        *(given.pop(n, None) for n in ("weight_query", "weight_v", "h_0", "c_0", "feed")),
        inputs.lengths,
        None if inputs.masks is None else inputs.masks.double(),
        case.cell,
        "concat" if case.additive else "dot",
        case.feeding,
        True,
        step=inputs.step,
        heads=case.heads,
        window=case.window,
        history=case.history,
        order=case.order,
        fed=case.fed,
        **given,
    )
    results = dict(zip(RESULTS, call, strict=True))
    kept = {name: results[name] for name in d_results}
    gradients = torch.autograd.grad(
        list(kept.values()), list(leaves.values()), [d.double() for d in d_results.values()]
    )
    values = {name: value.detach() for name, value in kept.items()}
    return values | {f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}


def by_rows(tensor: Tensor, heads: int) -> Tensor:
    """(S, B, D) as the kernels want keys and memory: (B*N, S, D/N)."""
    source, batch, size = tensor.shape
    split = tensor.view(source, batch, heads, size // heads).permute(1, 2, 0, 3)
    return split.reshape(batch * heads, source, size // heads).contiguous()


def by_steps(rows: Tensor, heads: int) -> Tensor:
    """The inverse."""
    count, source, size = rows.shape
    split = rows.view(count // heads, heads, source, size).permute(2, 0, 1, 3)
    return split.reshape(source, count // heads, heads * size)


class Call:
    """One call of the kernels, and what the operators make of it outside the loops."""

    def __init__(self, kernels: ctypes.CDLL, case: Case, inputs: Inputs, *, save: bool) -> None:
        self.kernels, self.case, self.inputs, self.save = kernels, case, inputs, save
        T, B, H, S = case.steps, case.batch, case.hidden, case.source
        G, L, N, A, M = GATES[case.cell], case.layers, case.heads, case.key_size, case.memory
        slots, kept, rest = (T + 1 if save else 2), (T if save else 1), inputs.rest
        self.gru, self.lstm = case.cell == "gru", case.cell == "lstm"
        self.keys, self.memory = by_rows(inputs.keys, N), by_rows(inputs.memory, N)
        self.feed = rest.get("feed", self.empty(B, case.fed_size).zero_())
        self.columns = inputs.layers[0].shape[1]
        bias, self.apart_bias = [], []
        for b_ih, b_hh in zip(inputs.layers[2::4], inputs.layers[3::4], strict=True):
            both = b_ih + b_hh
            bias.append(torch.cat([both[: 2 * H], b_ih[2 * H :]]) if self.gru else both)
            self.apart_bias.append(b_hh[2 * H :].clone() if self.gru else None)
        self.bias = bias
        w_x = inputs.layers[0][:, : inputs.x.shape[2]]
        self.gates = [inputs.x @ w_x.T + bias[0]]
        self.gates += [self.empty(kept, B, G * H) for _ in range(L - 1)]
        self.apart = [self.empty(T, B, H) if self.gru and save else None for _ in range(L)]
        self.states = self.empty(L, slots, B, H)
        self.states[:, 0] = rest["h_0"]
        self.cells = self.empty(L, slots, B, H) if self.lstm else None
        if self.cells is not None:
            self.cells[:, 0] = rest["c_0"]
        self.query = self.empty(kept, B, A) if case.additive else None
        self.context, self.output = self.empty(kept, B, M), self.empty(T, B, H)
        self.attn = self.empty(T, B * N, S)
        self.w_history = self.past = self.positions = self.centers = None
        self.taps = self.position_size = 0
        if case.history != "none":
            self.taps = rest["weight_history"].shape[1]
            by_tap = rest["weight_history"].reshape(N, A // N, self.taps)
            self.w_history = by_tap.transpose(1, 2).contiguous()
            self.past = self.empty(slots, B * N, S)
            self.past[0] = rest["past"].view(B * N, S)
        if case.predicted:
            self.position_size = rest["weight_position"].shape[0]
            self.positions, self.centers = self.empty(kept, B, self.position_size), None
            self.centers = self.empty(kept, B)
        self.d_layers: list[list[Tensor | None]] = [[None] * 4 for _ in range(L)]

    def empty(self, *sizes: int) -> Tensor:
        return torch.full(sizes, torch.nan, dtype=self.case.dtype)

    def run(self, backward: list[Tensor | None] | None) -> None:
        case, rest, inputs = self.case, self.inputs.rest, self.inputs
        sizes = [
            CELLS.index(case.cell), case.additive, case.feeding, self.save, case.fed == "context",
            case.order == "bahdanau", case.steps, case.batch, case.hidden, case.layers,
            case.source, case.key_size, case.memory, self.attn[0].numel(), case.heads,
            case.window, self.position_size, self.taps, case.history == "cumulative", self.columns,
        ]  # fmt: skip
        data = [
            self.feed, self.keys, self.memory, inputs.combine, rest.get("weight_query"),
            rest.get("weight_v"), inputs.lengths, self.attn, self.query, self.context,
            self.output, inputs.step, rest.get("weight_position"), rest.get("weight_position_v"),
            self.w_history, self.positions, self.centers, self.past,
        ]  # fmt: skip
        layers: list[int | None] = []
        for index in range(case.layers):
            w_ih, w_hh = inputs.layers[4 * index], inputs.layers[4 * index + 1]
            width = case.hidden if index else case.fed_size
            w_in = w_ih.data_ptr() + (w_ih.shape[1] - width) * w_ih.element_size()
            masked = inputs.masks is not None and index + 1 < case.layers
            tensors = [
                w_hh, self.bias[index], self.apart_bias[index], self.gates[index],
                self.apart[index], self.states[index],
                None if self.cells is None else self.cells[index],
                inputs.masks[index] if masked and inputs.masks is not None else None,
                *self.d_layers[index],
            ]  # fmt: skip
            layers += [w_in if index or case.feeding else None, *map(pointer, tensors)]
        function = getattr(self.kernels, "decode_" + str(case.dtype)[6:])
        backward_data = None
        if backward is not None:
            backward_data = (ctypes.c_void_p * len(backward))(*map(pointer, backward))
        status = function(
            (ctypes.c_int64 * len(sizes))(*map(int, sizes)),
            case.tiles,
            case.groups,
            (ctypes.c_void_p * len(data))(*map(pointer, data)),
            (ctypes.c_void_p * len(layers))(*layers),
            backward_data,
        )
        check(self.kernels, status)

    def forward(self) -> dict[str, Tensor]:
        self.run(None)
        last = self.case.steps if self.save else self.case.steps % 2
        N, B, S = self.case.heads, self.case.batch, self.case.source
        results = {"output": self.output, "attn": self.attn, "h_n": self.states[:, last]}
        if N > 1:
            results["attn"] = self.attn.view(-1, B, N, S)
        if self.cells is not None:
            results["c_n"] = self.cells[:, last]
        if self.case.fed == "context":
            results["feed_n"] = self.context[-1]
        if self.past is not None:
            results["past_n"] = self.past[last].view(B, N, S)
        return results

    def backward(self, d_results: dict[str, Tensor]) -> dict[str, Tensor]:
        case, inputs = self.case, self.inputs
        T, B, H, S = case.steps, case.batch, case.hidden, case.source
        G, L, N, A, M = GATES[case.cell], case.layers, case.heads, case.key_size, case.memory
        P, K = self.position_size, self.taps
        d_x_gates = self.empty(L, T, B, G * H)
        d_r_gates = self.empty(L, T, B, G * H) if self.gru else d_x_gates
        d_h = d_results["h_n"].clone()
        d_c = d_results["c_n"].clone() if self.lstm else None
        for index in range(L):
            self.d_layers[index] = [
                d_x_gates[index], d_r_gates[index], d_h[index],
                None if d_c is None else d_c[index],
            ]  # fmt: skip
        windows, inside = case.window > 0, case.additive or case.window > 0
        d_sum, d_context = self.empty(T, B, H), self.empty(T, B, M)
        d_scores, d_feed = self.empty(T, B * N, S), self.empty(B, case.fed_size)
        d_query = self.empty(T, B, A) if case.additive else None
        d_keys = self.empty(B * N, S, A // N) if inside else None
        d_memory = self.empty(B * N, S, M // N) if windows else None
        d_v = self.empty(B, A) if case.additive else None
        d_positions = self.empty(T, B, P) if case.predicted else None
        d_shares = self.empty(T, B) if case.predicted else None
        d_past = d_results["past_n"].clone() if K else None
        d_taps = self.empty(B, N, K, A // N) if K else None
        self.run([
            d_results["output"], d_results["attn"], d_sum, d_context, d_scores, d_query, d_keys,
            d_v, d_feed, d_results.get("feed_n"), d_memory, d_positions, d_shares, d_past, d_taps,
        ])  # fmt: skip

        asking = self.states[-1, :T] if case.order == "bahdanau" else self.states[-1, 1:]
        queries = asking if self.query is None else self.query
        if d_keys is None:
            d_keys = torch.einsum("tbs,tba->bsa", d_scores, queries.reshape(T, B * N, A // N))
        if d_memory is None:
            d_memory = torch.einsum("tbs,tbm->bsm", self.attn, d_context.view(T, B * N, M // N))
        size = inputs.x.shape[2]
        gradients = {
            "x": d_x_gates[0] @ inputs.layers[0][:, :size],
            "keys": by_steps(d_keys, N),
            "memory": by_steps(d_memory, N),
            "combine": torch.einsum(
                "tbh,tbk->hk", d_sum, torch.cat([self.context, self.states[-1, 1:]], 2)
            ),
        }
        if case.fed == "context":
            # Bahdanau's context is fed in the step that made it.
            fed = torch.cat([self.feed[None], self.context[:-1]])
            fed = self.context if case.order == "bahdanau" else fed
        else:
            fed = torch.cat([self.feed[None], self.output[:-1]])
        for index in range(L):
            below = torch.cat([inputs.x, fed], 2) if case.feeding else inputs.x
            if index:
                below = self.states[index - 1, 1:]
                below = below if inputs.masks is None else below * inputs.masks[index - 1]
            d_x, d_r = d_x_gates[index], d_r_gates[index]
            before = self.states[index, :T]
            gradients[f"layers{4 * index}"] = torch.einsum("tbg,tbi->gi", d_x, below)
            gradients[f"layers{4 * index + 1}"] = torch.einsum("tbg,tbi->gi", d_r, before)
            gradients[f"layers{4 * index + 2}"] = d_x.sum((0, 1))
            gradients[f"layers{4 * index + 3}"] = d_r.sum((0, 1))
        gradients["h_0"] = d_h
        if d_c is not None:
            gradients["c_0"] = d_c
        if case.feeding:
            gradients["feed"] = d_feed
        if d_query is not None and d_v is not None:
            gradients["weight_query"] = torch.einsum("tba,tbh->ah", d_query, asking)
            gradients["weight_v"] = d_v.sum(0)
        if d_positions is not None and d_shares is not None and self.positions is not None:
            gradients["weight_position"] = torch.einsum("tbp,tbh->ph", d_positions, asking)
            gradients["weight_position_v"] = torch.einsum("tb,tbp->p", d_shares, self.positions)
        if d_taps is not None and d_past is not None:
            gradients["weight_history"] = d_taps.sum(0).transpose(1, 2).reshape(A, K)
            gradients["past"] = d_past
        assert list(gradients) == list(inputs.named())
        return {f"d_{name}": gradients[name].view_as(inputs.named()[name]) for name in gradients}


def result_gradients(results: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        name: torch.randn(value.shape, dtype=torch.float64).to(value.dtype)
        for name, value in results.items()
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_give_the_operators_values_and_gradients(kernels: ctypes.CDLL, case: Case) -> None:
    inputs = inputs_of(case)
    found: list[dict[str, Tensor]] = []
    for seed in (1, 2):
        kernels.shim_seed(seed)
        call = Call(kernels, case, inputs, save=True)
        results = {name: value.clone() for name, value in call.forward().items()}
        d_results = result_gradients(results)
        found.append(results | call.backward(d_results))
    assert_same_bits(found[1], found[0])  # whatever the order of blocks and threads
    assert_close(found[0], expected(case, inputs, d_results))


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_nothing_is_kept_without_gradients(kernels: ctypes.CDLL, case: Case) -> None:
    inputs = inputs_of(case)
    kernels.shim_seed(3)
    kept = Call(kernels, case, inputs, save=True).forward()
    assert_same_bits(Call(kernels, case, inputs, save=False).forward(), kept)
