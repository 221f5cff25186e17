# SPDX-License-Identifier: Apache-2.0
"""Hypotheses of one source share its memory: in the operator, and in every search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from generate_cases import MODEL_KINDS
from operator_cases import ATTENTIONS, FEEDINGS, DecodeCase, leaves, map_leaves
from tolerances import assert_same_bits
from torch import Tensor

from pyseq import Seq2Seq, functional, reference, search
from pyseq.search import EncodedSource, SearchOptions
from pyseq.search.protocols import Step
from pyseq.seq2seq.sharing import Groups
from pyseq.types import Copies, DecoderOutput

#: Which of three sources each row attends to.
ROWS = torch.tensor([2, 0, 0, 2, 1])


def decode_cases() -> dict[str, DecodeCase]:
    plain = DecodeCase(dtype=torch.float64, lengths="ragged", need_weights=True, layers=2)
    cases = []
    for number, (window, predict, history) in enumerate(ATTENTIONS):
        order, feed, fed = FEEDINGS[number % len(FEEDINGS)]
        how: dict[str, Any] = {"window": window, "predict": predict, "history": history}
        score = "concat" if history is not None else ("dot", "general", "concat")[number % 3]
        own = replace(plain, **how, score=score, order=order, feed=feed, input_feeding=fed)
        cases += [own, replace(own, heads=2)]
    return {case.id: case for case in (*cases, replace(plain, score="location"))}


DECODE_CASES = decode_cases()


def call(case: DecodeCase) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of ``decode`` of five rows on three sources, and on one for each row."""
    steps, source, _, *sizes = case.sizes
    given = replace(case, sizes=(steps, source, 5, *sizes)).call()
    own = {**given.inputs, **given.options}
    shared = dict(own)
    for name, axis in (("keys", 1), ("memory", 1), ("lengths", 0)):
        if own.get(name) is not None:
            shared[name] = own[name].narrow(axis, 0, 3).clone()
            own[name] = shared[name].index_select(axis, ROWS)
    return shared | {"memory_rows": ROWS}, own


def results(output: DecoderOutput) -> dict[str, Tensor]:
    return dict(leaves(output._asdict()))


@pytest.mark.parametrize("name", DECODE_CASES)
def test_decode_reads_the_memory_of_another_row(name: str) -> None:
    shared, own = call(DECODE_CASES[name])
    assert_same_bits(results(functional.decode(**shared)), results(functional.decode(**own)))
    expected = results(reference.decode(**shared))
    for key, value in results(functional.decode(**shared)).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list(DECODE_CASES)[::3])
def test_gradients_of_a_shared_memory_are_sums(name: str) -> None:
    gradients = []
    for module in (functional, reference):
        shared, _ = call(DECODE_CASES[name])
        shared = map_leaves(lambda _, t: t.requires_grad_() if t.is_floating_point() else t, shared)
        output = module.decode(**shared)
        weights = output.weights
        assert weights is not None
        (output.output.sin().sum() + weights.square().sum()).backward()
        gradients.append({key: t.grad for key, t in leaves(shared) if t.grad is not None})
    assert "memory" in gradients[0]
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-8, atol=1e-9)


def test_opcheck() -> None:
    shared, _ = call(DecodeCase(history="previous", score="concat", state=False))
    recorded: list[tuple[Any, ...]] = []
    operator = torch.ops.pyseq.decode

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is operator.default:
                recorded.append((args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Recorder():
        functional.decode(**shared)
    args, kwargs = recorded[0]
    torch.library.opcheck(operator, args, kwargs)


def test_vmap_goes_sample_by_sample() -> None:
    shared, _ = call(DecodeCase(dtype=torch.float64))
    x = torch.randn(2, *shared["x"].shape, dtype=torch.float64)
    both = torch.vmap(lambda x: functional.decode(**(shared | {"x": x})).output)(x)
    for index in range(2):
        alone = functional.decode(**(shared | {"x": x[index]})).output
        torch.testing.assert_close(both[index], alone)


@pytest.mark.parametrize("gradients", [False, True], ids=["values", "gradients"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 0]), "memory_rows must be between 0 and 2, got 3 at row 3"),
        (torch.tensor([0, 1, -1, 0, 0]), "memory_rows must be between 0 and 2, got -1 at row 2"),
        (ROWS[:4], r"memory_rows must be int64 \(B,\) = \(5,\), got .*4"),
        (ROWS.int(), "memory_rows must be int64"),
    ],
    ids=["large", "negative", "few", "int32"],
)
def test_rows_that_do_not_fit_are_refused(rows: Tensor, message: str, gradients: bool) -> None:
    shared, _ = call(DecodeCase())
    x = shared["x"].detach().requires_grad_(gradients)
    with pytest.raises(RuntimeError, match=message), torch.set_grad_enabled(gradients):
        functional.decode(**(shared | {"x": x, "memory_rows": rows}))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("memory", lambda memory: memory[0], r"memory must be \(S, B, M\)"),
        ("keys", lambda keys: keys[:, :2], r"keys must be \(S, B, A\)"),
        ("lengths", lambda lengths: lengths[:2], r"lengths must be \(B,\) = \(3,\)"),
        ("lengths", lambda lengths: lengths + 99, "lengths must be between 0 and S"),
    ],
    ids=["memory", "keys", "lengths", "too-long"],
)
def test_what_rows_are_taken_of_is_checked_before(
    name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    """With gradients and without them."""
    shared, _ = call(DecodeCase(lengths="ragged"))
    wrong = shared | {name: change(shared[name].detach())}
    found = []
    for gradients in (False, True):
        x = shared["x"].detach().requires_grad_(gradients)
        with (
            pytest.raises(RuntimeError, match=message) as caught,
            torch.set_grad_enabled(gradients),
        ):
            functional.decode(**(wrong | {"x": x}))
        found.append(str(caught.value))
    assert found[0] == found[1]


def test_groups_come_back_as_they_went() -> None:
    groups = Groups.of(ROWS, 4)
    x = torch.randn(5, 3, 2)
    together = groups.gather(x)
    assert together.shape == (4, 2 * 3, 2)
    assert torch.equal(groups.scatter(together), x)
    assert torch.equal(together[2], torch.cat([x[0], x[3]]))
    assert torch.equal(together[3], torch.zeros(6, 2))


def test_a_selection_keeps_the_memory_until_half_of_the_sources_are_done() -> None:
    memory = torch.randn(3, 5, 2)
    encoded = EncodedSource(
        memory,
        memory + 1,
        torch.arange(5),
        torch.randn(5, 4),
        Copies(torch.arange(15).view(5, 3), 0),
        torch.arange(5),
    )
    three = encoded.select(torch.tensor([0, 0, 2, 3]))
    assert three.memory is memory
    assert three.rows is not None
    assert three.rows.tolist() == [0, 0, 2, 3]
    two = three.select(torch.tensor([1, 3, 3]))
    assert two.memory is not None
    assert two.keys is not None
    assert two.rows is not None
    assert two.lengths is not None
    assert two.copies is not None
    assert two.context is not None
    assert two.rows.tolist() == [0, 1, 1]
    assert torch.equal(two.memory, memory[:, [0, 3]])
    assert torch.equal(two.keys, memory[:, [0, 3]] + 1)
    assert two.lengths.tolist() == [0, 3]
    assert two.copies.ids[:, 0].tolist() == [0, 9]
    assert encoded.context is not None
    assert torch.equal(two.context, encoded.context[[0, 3, 3]])


# With models

MODELS: dict[str, dict[str, Any]] = {
    "general": {},
    **MODEL_KINDS,
    "scanned": {"input_feeding": False, "decoder_options": {"layer_norm": True}},
    "scanned-local-m": {
        "input_feeding": False,
        "decoder_options": {"layer_norm": True},
        "window": "local-m",
        "window_size": 1,
    },
    "scanned-local-p": {
        "input_feeding": False,
        "decoder_options": {"layer_norm": True},
        "window": "local-p",
        "window_size": 2,
    },
}
HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "draws": {"sample": True, "n_best": 3},
    "beam": {"beam_size": 4, "n_best": 2},
}
MAX_LENGTH = 9


def model_and_sources(**options: Any) -> tuple[Seq2Seq, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Seq2Seq(11, 9, embedding_size=6, hidden_size=8, **options).double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # sharp enough for the rows to differ
    return model, torch.randint(4, 11, (5, 6)), torch.tensor([6, 3, 1, 5, 4])


def unshared(encoded: EncodedSource) -> EncodedSource:
    """The same with a memory for each hypothesis."""
    assert encoded.rows is not None
    return encoded._sources(encoded.rows)._replace(context=encoded.context)


@pytest.mark.parametrize(
    ("copy", "how"),
    [*((None, how) for how in HOW), ("pointer", "beam"), ("joint", "draws")],
    ids=[*HOW, "pointer-beam", "joint-draws"],
)
@pytest.mark.parametrize("name", MODELS)
def test_no_step_of_a_search_has_more_memory_than_sources(
    name: str, copy: str | None, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each says what it would say if every hypothesis had its own."""
    model, source, lengths = model_and_sources(**MODELS[name], copy=copy)
    given = {} if copy is None else {"copies": torch.randint(4, 12, (5, 6))}
    plain = Seq2Seq.step
    addresses, widths = set(), set()

    def step(self: Seq2Seq, tokens: Tensor, encoded: Any, state: Any, **options: Any) -> Step:
        rows, memory = encoded.rows, encoded.memory
        assert memory.shape[1] == encoded.keys.shape[1] == len(encoded.lengths) <= 5
        assert 2 * len(rows.unique()) > memory.shape[1]
        addresses.add((memory.shape[1], memory.data_ptr(), encoded.keys.data_ptr()))
        widths.add(len(rows) / len(rows.unique()))
        found = plain(self, tokens, encoded, state, **options)
        alone = plain(self, tokens, unshared(encoded), state, **options)
        torch.testing.assert_close(found.log_probs, alone.log_probs, rtol=1e-10, atol=1e-10)
        assert (found.weights is None) == (alone.weights is None)
        if found.weights is not None:
            torch.testing.assert_close(found.weights, alone.weights, rtol=1e-10, atol=1e-10)
        return found

    monkeypatch.setattr(Seq2Seq, "step", step)
    monkeypatch.setattr(Seq2Seq, "search_whole", lambda *_: None)
    monkeypatch.setattr(Seq2Seq, "fused_search", lambda self: None)
    options = SearchOptions(max_length=MAX_LENGTH, **HOW[how])
    generator = torch.Generator().manual_seed(1)
    model.search(source, lengths, options, generator=generator, **given)
    # One memory for each number of sources that there was: 5, and what halves left.
    assert len(addresses) == len({count for count, *_ in addresses}) <= 3
    assert max(widths) == max(1, options.beam_size if how == "beam" else options.n_best)


def peak_allocation(model: Seq2Seq, source: Tensor, lengths: Tensor, **options: Any) -> int:
    """The largest piece of memory, in bytes, that a search asks for."""
    found = SearchOptions(max_length=4, min_length=4, need_weights=False, **options)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        search.search(model, source, lengths, found)
    events = profile.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("name", ["location-sensitive", "local-p", "bahdanau", "scanned"])
def test_no_memory_is_copied_for_hypotheses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Seq2Seq, "search_whole", lambda *_: None)
    monkeypatch.setattr(Seq2Seq, "fused_search", lambda self: None)
    torch.manual_seed(0)
    rows, positions, size, beam_size = 2, 300, 16, 8
    model = Seq2Seq(11, 9, embedding_size=6, hidden_size=size, **MODELS[name]).eval()
    source, lengths = torch.randint(4, 11, (rows, positions)), torch.full((rows,), positions)
    memory = 4 * rows * positions * size
    # The largest are the gates of the encoder, of four times that.
    assert peak_allocation(model, source, lengths, beam_size=beam_size) < beam_size * memory
