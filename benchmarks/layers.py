# SPDX-License-Identifier: Apache-2.0
"""Workloads of recurrent layers, attention and the attention decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pyseq import functional, nn, reference
from pyseq.types import ScoreName

from . import floors, onnx_rival
from .floors import Mode
from .rivals import LoopDecoder, compile_for_one_shape, run_packed
from .workloads import (
    MODES,
    Implementation,
    ImplementationName,
    Workload,
    differentiated,
    lazily,
    with_reference,
)

CELLS = ("rnn", "gru", "lstm")
STEPS = 50  # of the layers

SCAN_SIZES = tuple((batch, hidden) for hidden in (64, 128, 256, 512, 1024) for batch in (1, 16, 64))
DECODE_SIZES = (  # (B, H, T = S)
    (1, 64, 20),
    (16, 64, 20),
    (64, 64, 20),
    (1, 256, 30),
    (16, 256, 30),
    (64, 256, 30),
    (16, 512, 30),
    (64, 512, 30),
)
#: What torch.compile compiles, to train: a shape takes it minutes, so they are few.
COMPILED_SCANS = (("gru", 16, 256), ("lstm", 16, 256))
COMPILED_DECODES = ((16, 64, 20), (1, 256, 30), (16, 256, 30), (64, 256, 30))


def workloads() -> list[Workload]:
    """All of them."""
    return [
        *(_scan(cell, *size, mode) for mode in MODES for cell in CELLS for size in SCAN_SIZES),
        *(_bidirectional(c, batch, m) for m in MODES for c in CELLS for batch in (1, 16, 64)),
        *(_ragged(cell, batch, mode) for mode in MODES for cell in CELLS for batch in (16, 64)),
        *(_stream(cell, hidden) for cell in CELLS for hidden in (64, 256, 512)),
        *(_cell(cell, hidden) for cell in CELLS for hidden in (64, 256)),
        *(_attend("dot", steps, mode) for mode in MODES for steps in (50, 200)),
        *(_attend("concat", steps, mode) for mode in MODES for steps in (50, 200)),
        *(_decode(*size, mode) for mode in MODES for size in DECODE_SIZES),
    ]


def _pair(cell: str, inputs: int, hidden: int, **options: int) -> tuple[nn.LSTM, torch.nn.LSTM]:
    """The layer of pyseq.nn and that of torch.nn, with the same weights."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, cell.upper())(inputs, hidden, **options)
    ours = getattr(nn, cell.upper())(inputs, hidden, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _inputs(module: torch.nn.Module, **tensors: Tensor) -> dict[str, Tensor]:
    """All that a module's result is differentiated by."""
    return {**tensors, **dict(module.named_parameters())}


def _scan(cell: str, batch: int, hidden: int, mode: Mode) -> Workload:
    """One layer, as wide as its input."""

    def prepare() -> Mapping[ImplementationName, Implementation]:
        ours, theirs = _pair(cell, hidden, hidden)
        x = torch.randn(STEPS, batch, hidden)
        weights = (ours.weight_ih_l0, ours.weight_hh_l0, ours.bias_ih_l0, ours.bias_hh_l0)
        zeros = torch.zeros(batch, hidden)
        mine = _inputs(ours, x=x)

        def compiled() -> Implementation:
            run = compile_for_one_shape(_reference_scan)
            return differentiated(lambda: run(cell, zeros, x, weights), mine, mode)

        return {
            "pyseq": differentiated(lambda: ours(x)[0], mine, mode),
            "torch": differentiated(lambda: theirs(x)[0], _inputs(theirs, x=x), mode),
            "onnx": lazily(lambda: onnx_rival.layer(cell, theirs, x)),
            "compiled": lazily(compiled),
            "reference": differentiated(with_reference(lambda: ours(x)[0]), mine, mode),
        }

    names: list[ImplementationName] = ["pyseq", "torch"]
    if mode == "inference":
        names.append("onnx")
    elif (cell, batch, hidden) in COMPILED_SCANS:
        names.append("compiled")
    cost = floors.scan(
        nn.cell_name(cell), tokens=STEPS * batch, steps=STEPS, inputs=hidden, hidden=hidden
    )
    return Workload(
        op="scan",
        kind=cell,
        shape=f"B{batch}-H{hidden}-T{STEPS}",
        mode=mode,
        tokens=STEPS * batch,
        cost=cost.of(mode),
        prepare=prepare,
        implementations=(*names, "reference"),
    )


def _reference_scan(cell: str, zeros: Tensor, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """``reference.scan``; ``zeros`` (B, H) as in :func:`_reference_decode`."""
    w_ih, w_hh, b_ih, b_hh = weights
    state = (zeros, zeros) if cell == "lstm" else zeros
    name = nn.cell_name(cell)
    return reference.scan(x, w_ih, w_hh, b_ih, b_hh, state=state, cell=name).output


def _bidirectional(cell: str, batch: int, mode: Mode) -> Workload:
    """Two layers in both directions."""
    hidden, layers = 256, 2

    def prepare() -> Mapping[ImplementationName, Implementation]:
        ours, theirs = _pair(cell, hidden, hidden, num_layers=layers, bidirectional=True)
        x = torch.randn(STEPS, batch, hidden)
        mine = _inputs(ours, x=x)
        return {
            "pyseq": differentiated(lambda: ours(x)[0], mine, mode),
            "torch": differentiated(lambda: theirs(x)[0], _inputs(theirs, x=x), mode),
            "reference": differentiated(with_reference(lambda: ours(x)[0]), mine, mode),
        }

    name, tokens = nn.cell_name(cell), STEPS * batch
    first = floors.scan(name, tokens=tokens, steps=STEPS, inputs=hidden, hidden=hidden)
    second = floors.scan(name, tokens=tokens, steps=STEPS, inputs=2 * hidden, hidden=hidden)
    return Workload(
        op="bidirectional",
        kind=cell,
        shape=f"L{layers}-B{batch}-H{hidden}-T{STEPS}",
        mode=mode,
        tokens=tokens,
        cost=(first + first + second + second).of(mode),
        prepare=prepare,
        implementations=("pyseq", "torch", "reference"),
    )


def _ragged(cell: str, batch: int, mode: Mode) -> Workload:
    """Lengths spread evenly from a fifth of T to T, in no order; torch.nn packs."""
    hidden = 256
    spread = torch.linspace(STEPS // 5, STEPS, batch).round().long()
    lengths = spread[torch.randperm(batch, generator=torch.Generator().manual_seed(0))]
    tokens = int(lengths.sum())

    def prepare() -> Mapping[ImplementationName, Implementation]:
        ours, theirs = _pair(cell, hidden, hidden)
        x = torch.randn(STEPS, batch, hidden)

        def call() -> Tensor:
            output: Tensor = ours(x, lengths=lengths)[0]
            return output

        mine = _inputs(ours, x=x)
        return {
            "pyseq": differentiated(call, mine, mode),
            "torch": differentiated(
                lambda: run_packed(theirs, x, lengths)[0], _inputs(theirs, x=x), mode
            ),
            "reference": differentiated(with_reference(call), mine, mode),
        }

    cost = floors.scan(nn.cell_name(cell), tokens=tokens, steps=STEPS, inputs=hidden, hidden=hidden)
    return Workload(
        op="ragged",
        kind=cell,
        shape=f"B{batch}-H{hidden}-T{STEPS}",
        mode=mode,
        tokens=tokens,
        cost=cost.of(mode),
        prepare=prepare,
        implementations=("pyseq", "torch", "reference"),
    )


def _stream(cell: str, hidden: int) -> Workload:
    """A layer called for one step of one row at a time, as where input comes in live."""
    calls = 50

    def prepare() -> Mapping[ImplementationName, Implementation]:
        ours, theirs = _pair(cell, hidden, hidden)
        xs = torch.randn(calls, 1, 1, hidden).unbind(0)

        def loop(layer: torch.nn.Module) -> Tensor:
            outputs, state = [], None
            for x in xs:
                output, state = layer(x, state)
                outputs.append(output)
            return torch.cat(outputs)

        return {
            "pyseq": differentiated(lambda: loop(ours), _inputs(ours), "inference"),
            "torch": differentiated(lambda: loop(theirs), _inputs(theirs), "inference"),
            "onnx": lazily(lambda: onnx_rival.stream(cell, theirs, xs)),
            "reference": differentiated(
                with_reference(lambda: loop(ours)), _inputs(ours), "inference"
            ),
        }

    return Workload(
        op="stream",
        kind=cell,
        shape=f"B1-H{hidden}-{calls}x1",
        mode="inference",
        tokens=calls,
        cost=floors.stream(nn.cell_name(cell), calls=calls, inputs=hidden, hidden=hidden),
        prepare=prepare,
        implementations=("pyseq", "torch", "onnx", "reference"),
    )


def _cell(cell: str, hidden: int) -> Workload:
    """A cell called with one row and its state, again and again."""
    calls = 50

    def prepare() -> Mapping[ImplementationName, Implementation]:
        torch.manual_seed(0)
        name = f"{cell.upper()}Cell"
        theirs = getattr(torch.nn, name)(hidden, hidden)
        ours = getattr(nn, name)(hidden, hidden)
        ours.load_state_dict(theirs.state_dict())
        xs = torch.randn(calls, 1, hidden).unbind(0)

        def loop(module: torch.nn.Module) -> Tensor:
            outputs, state = [], None
            for x in xs:
                state = module(x, state)
                outputs.append(state[0] if cell == "lstm" else state)
            return torch.cat(outputs)

        weights = dict(ours.named_parameters())
        return {
            "pyseq": differentiated(lambda: loop(ours), weights, "inference"),
            "torch": differentiated(lambda: loop(theirs), weights, "inference"),
            "reference": differentiated(with_reference(lambda: loop(ours)), weights, "inference"),
        }

    return Workload(
        op="cell",
        kind=cell,
        shape=f"B1-H{hidden}-{calls}x1",
        mode="inference",
        tokens=calls,
        cost=floors.stream(nn.cell_name(cell), calls=calls, inputs=hidden, hidden=hidden),
        prepare=prepare,
        implementations=("pyseq", "torch", "reference"),
    )


def _attend(score: ScoreName, steps: int, mode: Mode) -> Workload:
    """All queries of 16 sequences at once, over memories with padding, T = S."""
    batch, size = 16, 256
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(steps // 2, steps + 1, (batch,), generator=generator)

    def prepare() -> Mapping[ImplementationName, Implementation]:
        torch.manual_seed(0)
        inputs = {
            "query": torch.randn(steps, batch, size),
            "keys": torch.randn(steps, batch, size) / size**0.5,
            "memory": torch.randn(steps, batch, size),
        }
        if score == "concat":
            inputs["weight_query"] = torch.randn(size, size) / size**0.5
            inputs["weight_v"] = torch.randn(size)
        valid = (torch.arange(steps) < lengths.unsqueeze(1)).unsqueeze(1)

        def with_torch() -> Tensor:
            query, keys, memory = (tensor.transpose(0, 1) for tensor in inputs.values())
            context = scaled_dot_product_attention(query, keys, memory, attn_mask=valid, scale=1.0)
            return context.transpose(0, 1)

        def ours() -> Tensor:
            return functional.attend(**inputs, lengths=lengths, score=score).context

        return {
            "pyseq": differentiated(ours, inputs, mode),
            "torch": differentiated(with_torch, inputs, mode),
            "reference": differentiated(with_reference(ours), inputs, mode),
        }

    cost = floors.attend(
        score,
        steps=steps,
        positions=int(lengths.sum()),
        batch=batch,
        keys=size,
        memory=size,
    )
    return Workload(
        op="attend",
        kind=score,
        shape=f"B{batch}-A{size}-T{steps}-S{steps}",
        mode=mode,
        tokens=steps * batch,
        cost=cost.of(mode),
        prepare=prepare,
        # torch has a fused attention for the dot score only.
        implementations=("pyseq", "torch", "reference")
        if score == "dot"
        else ("pyseq", "reference"),
    )


def _decode(batch: int, hidden: int, steps: int, mode: Mode) -> Workload:
    """LSTM, general score, input feeding; input, keys and memory as wide as the state, T = S."""

    def prepare() -> Mapping[ImplementationName, Implementation]:
        torch.manual_seed(0)
        decoder = nn.AttentionDecoder(hidden, hidden, hidden)
        loop = LoopDecoder(decoder)
        x, memory = torch.randn(steps, batch, hidden), torch.randn(steps, batch, hidden)
        inputs = _inputs(decoder, x=x, memory=memory)
        zeros = torch.zeros(1, batch, hidden)

        def ours() -> Tensor:
            return decoder(x, memory).output

        def compiled() -> Implementation:
            run = compile_for_one_shape(_reference_decode)
            return differentiated(lambda: run(zeros, **inputs), inputs, mode)

        return {
            "pyseq": differentiated(ours, inputs, mode),
            "torch": differentiated(lambda: loop(x, loop.prepare(memory)), inputs, mode),
            "compiled": lazily(compiled),
            "reference": differentiated(with_reference(ours), inputs, mode),
        }

    compiles = mode == "training" and (batch, hidden, steps) in COMPILED_DECODES
    projection = floors.product(steps * batch, hidden, hidden)
    cost = projection + floors.decode(
        "lstm", steps=steps, source=steps, batch=batch, inputs=hidden, hidden=hidden
    )
    return Workload(
        op="decode",
        kind="lstm-general",
        shape=f"B{batch}-H{hidden}-T{steps}-S{steps}",
        mode=mode,
        tokens=steps * batch,
        cost=cost.of(mode),
        prepare=prepare,
        implementations=("pyseq", "torch", "compiled", "reference")
        if compiles
        else ("pyseq", "torch", "reference"),
    )


def _reference_decode(zeros: Tensor, x: Tensor, memory: Tensor, **weights: Tensor) -> Tensor:
    """``reference.decode`` by the names that an :class:`pyseq.nn.AttentionDecoder` has.

    ``zeros`` (1, B, H) is the first state. Made in here, the compiler of torch 2.13 knows its
    value and gives wrong gradients for the first step.
    """
    layer = tuple(weights[f"{n}_l0"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    return reference.decode(
        x,
        [layer],
        memory,
        memory,
        weights["combine.weight"],
        score="general",
        weight=weights["score.weight"],
        state=((zeros, zeros), zeros[0]),
    ).output
