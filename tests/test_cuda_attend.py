# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of attention, run on the CPU through the shim, against the reference."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import pytest
import torch
from cuda_shim import build, check, pointer
from tolerances import assert_close, assert_same_bits
from torch import Tensor

from pyseq import reference


class Case(NamedTuple):
    """Sizes of a call, and what its score has."""

    steps: int = 3
    batch: int = 2
    source: int = 5
    size: int = 6
    additive: bool = False
    heads: int = 1
    window: int = 0
    predicted: bool = False
    continued: bool = False  # after some steps of earlier calls
    ragged: bool = False
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        extras = [
            "additive" * self.additive,
            "ragged" * self.ragged,
            "continued" * self.continued,
            f"window{self.window}{'p' * self.predicted}" if self.window else "",
            f"heads{self.heads}" if self.heads > 1 else "",
        ]
        sizes = f"T{self.steps}-B{self.batch}-S{self.source}-A{self.size}"
        return "-".join([str(self.dtype)[6:], sizes, *filter(None, extras)])


CASES = [
    Case(),
    Case(additive=True),
    Case(ragged=True, batch=3),
    Case(additive=True, ragged=True, batch=3),
    Case(steps=1, batch=1, source=1, size=1),
    Case(additive=True, steps=1, batch=1, source=1, size=1),
    Case(source=41, size=37, ragged=True, batch=3),
    Case(additive=True, source=41, size=37, steps=2),
    Case(heads=3, size=12, ragged=True),
    Case(heads=2, size=10, additive=True),
    Case(window=1, steps=6, ragged=True, batch=3),
    Case(window=2, predicted=True, source=9, ragged=True, batch=3),
    Case(window=1, steps=4, additive=True),
    Case(window=1, continued=True, batch=3, source=9),
    Case(window=2, predicted=True, heads=2, size=8, additive=True),
    Case(window=2, predicted=True, dtype=torch.float32, ragged=True, batch=3),
    Case(dtype=torch.float32, ragged=True, batch=3),
    Case(dtype=torch.float16, ragged=True, batch=3),
    Case(dtype=torch.bfloat16, additive=True),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("attend_kernels", tmp_path_factory.mktemp("cuda_attend"))


def random(*sizes: int, case: Case) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64).to(case.dtype)


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


class Inputs(NamedTuple):
    query: Tensor
    keys: Tensor
    memory: Tensor
    weight_v: Tensor | None
    lengths: Tensor | None
    positions: Tensor | None
    step: Tensor | None


def inputs_of(case: Case) -> Inputs:
    torch.manual_seed(0)
    query = random(case.steps, case.batch, case.size, case=case)
    keys = random(case.source, case.batch, case.size, case=case)
    memory = random(case.source, case.batch, 2 * case.size, case=case)
    lengths = None
    if case.ragged:
        # One row is whole, one has no valid position.
        lengths = torch.tensor([case.source, 0, case.source // 2])[: case.batch]
        for row in range(case.batch):
            keys[lengths[row] :, row] = memory[lengths[row] :, row] = torch.nan
    positions = None
    if case.predicted:
        positions = torch.rand(case.steps, case.batch, dtype=torch.float64) * case.source
        positions = positions.to(case.dtype)
    weight_v = random(case.size, case=case) if case.additive else None
    step = torch.arange(case.batch) if case.continued else None
    return Inputs(query, keys, memory, weight_v, lengths, positions, step)


def expected(case: Case, inputs: Inputs, d_context: Tensor, d_attn: Tensor) -> list[Tensor]:
    """context, attn and all gradients by the reference, in float64."""
    query, keys, memory, weight_v, lengths, positions, step = inputs
    wide = [
        None if x is None else x.double().clone()
        for x in (query, keys, memory, weight_v, positions)
    ]
    if lengths is not None:
        for row in range(case.batch):
            for padded in wide[1:3]:
                assert padded is not None
                padded[lengths[row] :, row] = 0
    leaves = [None if x is None else x.requires_grad_() for x in wide]
    result = reference.attend(
        leaves[0],
        leaves[1],
        leaves[2],
        lengths,
        score="concat" if case.additive else "dot",
        weight_v=leaves[3],
        heads=case.heads,
        window=case.window or None,
        positions=leaves[4],
        step=step,
        need_weights=True,
    )
    attn = result.weights
    assert attn is not None
    given = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(
        [result.context, attn], given, [d_context.double(), d_attn.double().view_as(attn)]
    )
    return [result.context.detach(), attn.detach(), *gradients]


def run(kernels: ctypes.CDLL, case: Case, sizes: list[int], data: list[Tensor | None]) -> None:
    function = getattr(kernels, "attend_" + str(case.dtype).removeprefix("torch."))
    check(
        kernels,
        function(
            (ctypes.c_int64 * len(sizes))(*sizes),
            (ctypes.c_void_p * len(data))(*map(pointer, data)),
        ),
    )


def actual(
    kernels: ctypes.CDLL, case: Case, inputs: Inputs, d_context: Tensor, d_attn: Tensor
) -> list[Tensor]:
    """The same by the kernels, and what the operators make of it."""
    T, N, S = case.steps, case.heads, case.source
    B = case.batch * N
    A, M = case.size // N, 2 * case.size // N
    keys, memory = by_rows(inputs.keys, N), by_rows(inputs.memory, N)

    def empty(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=case.dtype)

    attn, context = empty(T, B, S), empty(T, B, M)
    d_scores, d_query, d_keys = empty(T, B, S), empty(T, B, A), empty(B, S, A)
    d_v, d_memory, d_centers = empty(B, A), empty(B, S, M), empty(T, B)
    positions = inputs.positions
    sizes = [case.additive, T, B, N, S, A, M, case.window]
    data = [inputs.query, keys, memory, inputs.weight_v, inputs.lengths, positions, attn, context]
    data.append(inputs.step)
    run(kernels, case, [*sizes, 0], data)
    data += [d_context, d_attn, d_scores, d_query, d_keys, d_v, d_memory]
    data.append(None if positions is None else d_centers)
    run(kernels, case, [*sizes, 1], data)
    if not case.additive and not case.window:
        d_keys = torch.einsum("tbs,tba->bsa", d_scores, inputs.query.view(T, B, A))
    if not case.window:
        d_memory = torch.einsum("tbs,tbm->bsm", attn, d_context.view(T, B, M))
    results = [context.view(T, case.batch, -1), attn]
    results += [d_query.view_as(inputs.query), by_steps(d_keys, N), by_steps(d_memory, N)]
    if case.additive:
        results.append(d_v.view(case.batch, N * A).sum(0))
    if positions is not None:
        results.append(d_centers.view(T, case.batch, N).sum(2))
    return results


NAMES = ("context", "attn", "d_query", "d_keys", "d_memory", "d_weight_v", "d_positions")


def named(case: Case, results: list[Tensor]) -> dict[str, Tensor]:
    """Results with their names, in one shape whatever the heads."""
    names = [
        name
        for name in NAMES
        if (name != "d_weight_v" or case.additive) and (name != "d_positions" or case.predicted)
    ]
    shaped = [result.reshape(result.shape[0], -1) for result in results]
    return dict(zip(names, shaped, strict=True))


def compare(kernels: ctypes.CDLL, case: Case, inputs: Inputs, lengths: Tensor | None) -> None:
    """Check the kernels against the reference with ``lengths``, and themselves."""
    d_context = random(case.steps, case.batch, 2 * case.size, case=case)
    d_attn = random(case.steps, case.batch * case.heads, case.source, case=case)
    kernels.shim_seed(1)
    found = named(case, actual(kernels, case, inputs, d_context, d_attn))
    kernels.shim_seed(2)
    again = named(case, actual(kernels, case, inputs, d_context, d_attn))
    assert_same_bits(again, found)  # whatever the order of the threads
    inputs = inputs._replace(lengths=lengths)
    assert_close(found, named(case, expected(case, inputs, d_context, d_attn)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_give_the_references_values_and_gradients(kernels: ctypes.CDLL, case: Case) -> None:
    inputs = inputs_of(case)
    compare(kernels, case, inputs, inputs.lengths)


def test_more_positions_than_shared_memory_holds(kernels: ctypes.CDLL) -> None:
    case = Case(steps=1, batch=1, source=4100, size=1)
    compare(kernels, case, inputs_of(case), None)


def test_lengths_out_of_range_stay_within_the_memory(kernels: ctypes.CDLL) -> None:
    case = Case()
    inputs = inputs_of(case)._replace(lengths=torch.tensor([-3, 1 << 40]))
    compare(kernels, case, inputs, torch.tensor([0, case.source]))
