# SPDX-License-Identifier: Apache-2.0
"""A decoder forward and backward by the CUDA kernels on the shim, beside products in torch: what
the operators do on a device. `Case` names sizes and options, `inputs_of` makes the tensors."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from cuda_shim import check, pointer
from torch import Tensor

from pyseq import reference
from pyseq.types import CellName, FeedName, HistoryName, OrderName, ScoreName

CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")  # in the order of CellKind
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
#: What is added up and carried from step to step is held in; other types in themselves.
CARRIED = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


@dataclass(frozen=True)
class Case:
    """Sizes of a call, what the decoder has, and how the work is shared out."""

    cell: CellName = "lstm"
    score: ScoreName = "dot"
    steps: int = 3
    batch: int = 3
    hidden: int = 5
    layers: int = 1
    source: int = 4
    memory: int = 6
    projects: bool = True  # concat: a query of its own size
    feeding: bool = True
    order: OrderName = "luong"
    fed: FeedName = "output"
    heads: int = 1
    window: int = 0
    predicted: bool = False
    history: HistoryName | None = None
    ragged: bool = False
    dropout: bool = False
    dtype: torch.dtype = torch.float64
    tiles: int = 2  # 0: launches for every step, with products between them
    groups: int = 2

    def __str__(self) -> str:
        parts = [
            self.cell,
            self.score,
            f"T{self.steps}-B{self.batch}-H{self.hidden}-L{self.layers}",
        ]
        parts += [name for name in ("predicted", "ragged", "dropout") if getattr(self, name)]
        parts += ["unprojected"] * (self.additive and not self.projects)
        parts += ["plain"] * (not self.feeding) + [f"window{self.window}"] * (self.window > 0)
        parts += [f"heads{self.heads}"] * (self.heads > 1)
        parts += filter(None, (self.order, self.fed, self.history))
        return "-".join([*parts, f"{self.tiles}x{self.groups}", str(self.dtype)[6:]])

    @property
    def additive(self) -> bool:
        return self.score == "concat"

    @property
    def projects_query(self) -> bool:
        return self.additive and self.projects

    @property
    def key_size(self) -> int:
        return 4 if self.projects_query else self.hidden

    @property
    def fed_size(self) -> int:
        return self.memory if self.fed == "context" else self.hidden

    @property
    def carried(self) -> torch.dtype:
        return CARRIED.get(self.dtype, self.dtype)


@dataclass
class Inputs:
    """The reference's arguments; `leaves` are differentiated, in the order of `named`."""

    layers: list[Tensor]
    named: dict[str, Tensor]  # the other ones that the case has
    lengths: Tensor | None = None
    masks: Tensor | None = None
    step: Tensor | None = None

    @property
    def leaves(self) -> dict[str, Tensor]:
        return self.named | {f"layers{i}": weight for i, weight in enumerate(self.layers)}


def inputs_of(case: Case) -> Inputs:
    torch.manual_seed(0)
    T, B, H, L, S, M = (
        case.steps, case.batch, case.hidden, case.layers, case.source, case.memory,
    )  # fmt: skip
    A, G, K, P, size = case.key_size, GATES[case.cell], 3, 2, 2

    def random(*sizes: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64).mul_(0.6).to(dtype)

    layers = []
    for layer in range(L):
        below = H if layer else size + (case.fed_size if case.feeding else 0)
        layers += [random(G * H, below), random(G * H, H), random(G * H), random(G * H)]
    named = {"x": random(T, B, size), "memory": random(S, B, M), "combine": random(H, M + H)}
    if case.score == "location":
        # One position fewer than there are, which the last one cannot be attended to for.
        named["weight"] = random(max(1, S - 1), H)
    else:
        named["keys"] = random(S, B, M if case.score == "general" else A)
        if case.score == "general":
            named["weight"] = random(H, M)
    named["h_0"] = random(L, B, H)
    if case.cell == "lstm":
        named["c_0"] = random(L, B, H, dtype=case.carried)
    if case.feeding:
        named["feed"] = random(B, case.fed_size)
    if case.projects_query:
        named["weight_query"] = random(A, H)
    if case.additive:
        named["weight_v"] = random(A)
    if case.predicted:
        named |= {"weight_position": random(P, H), "weight_position_v": random(P)}
    if case.history is not None:
        named["weight_history"] = random(A, K)
        named["past"] = random(B, case.heads, S, dtype=case.carried)
    inputs = Inputs(layers, named)
    if case.window and not case.predicted:
        inputs.step = torch.arange(B)
    if case.dropout:
        inputs.masks = 2.0 * torch.randint(0, 2, (L - 1, T, B, H)).to(case.dtype)
    if case.ragged:
        # One row is whole, one has no valid position.
        inputs.lengths = torch.tensor([S, 0, S // 2])[:B]
        for name in named.keys() & {"keys", "memory"}:
            for row in range(B):
                named[name][inputs.lengths[row] :, row] = torch.nan
    return inputs


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


def product(equation: str, one: Tensor, other: Tensor) -> Tensor:
    """What the operators leave to a library, exactly."""
    return torch.einsum(equation, one.double(), other.double())


class Call:
    """One call of the kernels, and what the operators make of it outside the loops."""

    def __init__(self, kernels: ctypes.CDLL, case: Case, inputs: Inputs, *, save: bool) -> None:
        self.kernels, self.case, self.inputs, self.save = kernels, case, inputs, save
        T, B, H, S = case.steps, case.batch, case.hidden, case.source
        G, L, N, A, M = GATES[case.cell], case.layers, case.heads, case.key_size, case.memory
        slots, kept, named = (T + 1 if save else 2), (T if save else 1), inputs.named
        self.gru, self.lstm = case.cell == "gru", case.cell == "lstm"
        # The keys of every score but concat are made outside.
        self.sources = {
            name: named[name].double().requires_grad_()
            for name in ("keys", "memory", "weight")
            if name in named
        }
        if inputs.lengths is not None:
            with torch.no_grad():
                for row, length in enumerate(inputs.lengths.tolist()):
                    for name in self.sources.keys() & {"keys", "memory"}:
                        self.sources[name][length:, row] = 0
        self.made_keys = reference.score_keys(
            case.score,
            self.sources.get("keys"),
            self.sources["memory"],
            None,
            self.sources.get("weight"),
            N,
        )
        self.keys = by_rows(self.made_keys.detach().to(case.dtype).contiguous(), N)
        self.memory = by_rows(named["memory"], N)
        self.lengths = inputs.lengths
        if case.score == "location":
            self.lengths = reference.with_weight(
                "location", inputs.lengths, named["weight"], named["memory"]
            )
        self.feed = named.get("feed", self.empty(B, case.fed_size).zero_())
        self.columns = inputs.layers[0].shape[1]
        self.bias, self.apart_bias = [], []
        for b_ih, b_hh in zip(inputs.layers[2::4], inputs.layers[3::4], strict=True):
            both = b_ih + b_hh
            self.bias.append(torch.cat([both[: 2 * H], b_ih[2 * H :]]) if self.gru else both)
            self.apart_bias.append(b_hh[2 * H :].clone() if self.gru else None)
        w_x = inputs.layers[0][:, : named["x"].shape[2]]
        first = product("tbi,gi->tbg", named["x"], w_x) + self.bias[0]
        self.gates = [first.to(case.dtype)]
        self.gates += [self.empty(kept, B, G * H) for _ in range(L - 1)]
        self.apart = [self.empty(T, B, H) if self.gru and save else None for _ in range(L)]
        self.states = self.empty(L, slots, B, H)
        self.states[:, 0] = named["h_0"]
        self.cells = self.carried(L, slots, B, H) if self.lstm else None
        if self.cells is not None:
            self.cells[:, 0] = named["c_0"]
        self.query = self.empty(kept, B, A) if case.projects_query else None
        self.context, self.output = self.empty(kept, B, M), self.empty(T, B, H)
        self.attn = self.empty(T, B * N, S)
        self.w_history = self.past = self.positions = self.centers = None
        self.taps = self.position_size = 0
        if case.history is not None:
            self.taps = named["weight_history"].shape[1]
            by_tap = named["weight_history"].reshape(N, A // N, self.taps)
            self.w_history = by_tap.transpose(1, 2).contiguous()
            self.past = self.carried(slots, B * N, S)
            self.past[0] = named["past"].view(B * N, S)
        if case.predicted:
            self.position_size = named["weight_position"].shape[0]
            self.positions = self.empty(kept, B, self.position_size)
            self.centers = self.carried(kept, B)
        self.d_layers: list[list[Tensor | None]] = [[None] * 4 for _ in range(L)]

    def empty(self, *sizes: int) -> Tensor:
        return torch.full(sizes, torch.nan, dtype=self.case.dtype)

    def carried(self, *sizes: int) -> Tensor:
        return torch.full(sizes, torch.nan, dtype=self.case.carried)

    def run(self, backward: list[Tensor | None] | None) -> None:
        case, named, inputs = self.case, self.inputs.named, self.inputs
        sizes = [
            CELLS.index(case.cell), case.additive, case.feeding, self.save, case.fed == "context",
            case.order == "bahdanau", case.steps, case.batch, case.hidden, case.layers,
            case.source, case.key_size, case.memory, self.attn[0].numel(), case.heads,
            case.window, self.position_size, self.taps, case.history == "cumulative", self.columns,
        ]  # fmt: skip
        data = [
            self.feed, self.keys, self.memory, named["combine"], named.get("weight_query"),
            named.get("weight_v"), self.lengths, self.attn, self.query, self.context,
            self.output, inputs.step, named.get("weight_position"),
            named.get("weight_position_v"), self.w_history, self.positions, self.centers,
            self.past,
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
        results = {"output": self.output, "weights": self.attn, "h_n": self.states[:, last]}
        if N > 1:
            results["weights"] = self.attn.view(-1, B, N, S)
        if self.cells is not None:
            results["c_n"] = self.cells[:, last]
        results["feed_n"] = self.context[-1] if self.case.fed == "context" else self.output[-1]
        if self.past is not None:
            results["past_n"] = self.past[last].view(B, N, S)
        return results

    def backward(self, d_results: dict[str, Tensor]) -> dict[str, Tensor]:
        case, inputs, named = self.case, self.inputs, self.inputs.named
        T, B, H, S = case.steps, case.batch, case.hidden, case.source
        G, L, N, A, M = GATES[case.cell], case.layers, case.heads, case.key_size, case.memory
        P, K = self.position_size, self.taps
        d_output, d_fed = d_results["output"].clone(), d_results["feed_n"]
        if case.fed != "context":
            d_output[-1] += d_fed
        d_x_gates = self.empty(L, T, B, G * H)
        d_r_gates = self.empty(L, T, B, G * H) if self.gru else d_x_gates
        d_h = d_results["h_n"].to(case.carried, copy=True)
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
            d_output, d_results["weights"], d_sum, d_context, d_scores, d_query, d_keys, d_v,
            d_feed, d_fed if case.fed == "context" else None, d_memory, d_positions, d_shares,
            d_past, d_taps,
        ])  # fmt: skip

        top = self.states[-1]
        asking = top[:T] if case.order == "bahdanau" else top[1:]
        queries = asking if self.query is None else self.query
        if d_keys is None:
            d_keys = product("tbs,tba->bsa", d_scores, queries.reshape(T, B * N, A // N))
        if d_memory is None:
            d_memory = product("tbs,tbm->bsm", self.attn, d_context.view(T, B * N, M // N))
        size = named["x"].shape[2]
        gradients: dict[str, Any] = {
            "x": product("tbg,gi->tbi", d_x_gates[0], inputs.layers[0][:, :size]),
            "combine": product("tbh,tbk->hk", d_sum, torch.cat([self.context, top[1:]], 2)),
            "h_0": d_h,
            "c_0": d_c,
            "feed": d_feed,
        }
        made = list(self.sources.values())
        of_keys = torch.autograd.grad(
            self.made_keys, made, by_steps(d_keys, N).double(), allow_unused=True
        )
        gradients |= dict(zip(self.sources, of_keys, strict=True))
        of_memory = by_steps(d_memory, N)
        gradients["memory"] = (
            of_memory if gradients["memory"] is None else gradients["memory"] + of_memory
        )
        if case.fed == "context":
            # Bahdanau's context is fed in the step that made it.
            fed = torch.cat([self.feed[None], self.context[:-1]])
            fed = self.context if case.order == "bahdanau" else fed
        else:
            fed = torch.cat([self.feed[None], self.output[:-1]])
        for index in range(L):
            below = torch.cat([named["x"], fed], 2) if case.feeding else named["x"]
            if index:
                below = self.states[index - 1, 1:]
                below = below if inputs.masks is None else below * inputs.masks[index - 1]
            d_x, d_r = d_x_gates[index], d_r_gates[index]
            gradients[f"layers{4 * index}"] = product("tbg,tbi->gi", d_x, below)
            gradients[f"layers{4 * index + 1}"] = product(
                "tbg,tbi->gi", d_r, self.states[index, :T]
            )
            gradients[f"layers{4 * index + 2}"] = d_x.double().sum((0, 1))
            gradients[f"layers{4 * index + 3}"] = d_r.double().sum((0, 1))
        if d_query is not None and d_v is not None:
            gradients["weight_query"] = product("tba,tbh->ah", d_query, asking)
            gradients["weight_v"] = d_v.double().sum(0)
        if d_positions is not None and d_shares is not None and self.positions is not None:
            gradients["weight_position"] = product("tbp,tbh->ph", d_positions, asking)
            gradients["weight_position_v"] = product("tb,tbp->p", d_shares, self.positions)
        if d_taps is not None and d_past is not None:
            gradients["weight_history"] = d_taps.double().sum(0).transpose(1, 2).reshape(A, K)
            gradients["past"] = d_past
        return {
            f"d_{name}": gradients[name].view_as(leaf).to(leaf.dtype)
            for name, leaf in inputs.leaves.items()
        }
