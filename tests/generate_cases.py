# SPDX-License-Identifier: Apache-2.0
"""Calls of ``generate`` and ``scheduled_inputs`` by name, compared with what goes step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from operator_cases import leaves, make_lengths, map_leaves, pairwise
from tolerances import assert_same_bits
from torch import Tensor

from pyseq import functional, reference
from pyseq.types import (
    GATES,
    PAD,
    UNK,
    CellName,
    FeedName,
    GenerateOutput,
    HistoryName,
    OrderName,
    ScoreName,
)

#: Largest difference of scores and attention weights: both carry the errors of all steps.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}


@dataclass(frozen=True)
class GenerateCase:
    """One call of ``generate``; ``sizes`` are S, B, E, H, A, M and V.

    How it attends is as in ``DecodeCase``.
    """

    cell: CellName = "lstm"
    score: ScoreName | None = "general"
    sizes: tuple[int, ...] = (4, 3, 5, 7, 6, 8, 9)
    dtype: torch.dtype = torch.float64
    layers: int = 1
    input_feeding: bool = True
    lengths: str | None = "ragged"
    bias: bool = True
    feed: bool = True
    project_query: bool = True
    sharpness: float = 1.5
    max_length: int = 8
    beam_size: int = 1
    length_penalty: float = 0.0
    min_length: int = 0  # but for max_length
    n_best: int = 1  # but for beam_size
    block_ngrams: int | None = None
    prefix: str | None = None  # "ragged" or "long"
    heads: int = 1  # H, A and M are so many times as large
    window: int | None = None
    predict: bool = False
    history: HistoryName | None = None
    order: OrderName = "luong"
    fed: FeedName = "output"
    coverage_penalty: float = 0.0
    draws: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def _prefix(self, batch: int, vocab: int) -> Tensor | None:
        return make_prefix(self.prefix, batch, vocab, self.max_length)

    @property
    def id(self) -> str:
        letters = zip("SBEHAMV", self.sizes, strict=True)
        return "-".join(
            (
                self.cell,
                str(self.score),
                str(self.dtype).removeprefix("torch."),
                *(f"{letter}{size}" for letter, size in letters),
                f"L{self.layers}",
                "fed" if self.input_feeding else "unfed",
                f"lengths_{self.lengths}",
                f"max{self.max_length}",
                f"beam{self.beam_size}",
                f"penalty{self.length_penalty:g}",
                *([f"min{self.min_length}"] if self.min_length else []),
                *([f"best{self.n_best}"] if self.n_best > 1 else []),
                *([f"block{self.block_ngrams}"] if self.block_ngrams else []),
                *([f"prefix_{self.prefix}"] if self.prefix else []),
                *([f"N{self.heads}"] if self.heads > 1 else []),
                *([f"D{self.window}"] if self.window else []),
                *(["predict"] if self.predict else []),
                *([self.history] if self.history else []),
                *([self.order] if self.order != "luong" else []),
                *([self.fed] if self.fed != "output" else []),
                *([f"covers{self.coverage_penalty:g}"] if self.coverage_penalty else []),
                *([f"draws{self.draws}"] if self.draws else []),
                *([f"t{self.temperature:g}"] if self.temperature != 1 else []),
                *([f"top{self.top_k}"] if self.top_k else []),
                *([f"p{self.top_p:g}"] if self.top_p != 1 else []),
            )
        )

    def arguments(self) -> dict[str, Any]:
        """Tensors and options that depend on nothing but the case."""
        torch.manual_seed(0)
        source, batch, features, hidden, size, width, vocab = self.sizes
        hidden, size, width = (self.heads * n for n in (hidden, size, width))

        def random(*shape: int) -> Tensor:
            """A weight, or a bias, that keeps the magnitude of what it multiplies."""
            # Drawn in one precision, so that cases differ in nothing else.
            values = torch.randn(shape, dtype=torch.float64) / max(shape[-1], 1) ** 0.5
            return values.to(self.dtype)

        rows, attends = GATES[self.cell] * hidden, self.score is not None
        projected = self.score == "general" or (self.score == "concat" and self.project_query)
        size = size if projected else hidden
        fed_size = hidden if self.fed == "output" else width
        fed = fed_size if attends and self.input_feeding else 0
        layers = []
        for layer in range(self.layers):
            columns = hidden if layer else features + fed
            biases = (random(rows), random(rows)) if self.bias else (None, None)
            w_ih, w_hh = random(rows, columns), random(rows, hidden)
            layers.append((w_ih * self.sharpness, w_hh * self.sharpness, *biases))
        h = random(self.layers, batch, hidden)
        state: tuple[Any, ...] = (
            (h, random(self.layers, batch, hidden)) if self.cell == "lstm" else h,
            random(batch, fed_size) if self.feed else None,
        )
        if self.window is not None or self.history is not None:
            past = None if self.history is None else random(batch, self.heads, source).abs()
            state = (*state, (torch.arange(batch) % 3, past))
        arguments: dict[str, Any] = {
            "embedding": random(vocab, features) * features**0.5 * self.sharpness,
            "layers": layers,
            "state": state,
            "output_weight": random(vocab, hidden) * 4,
            "output_bias": random(vocab) if self.bias else None,
            "cell": self.cell,
            "score": self.score,
            "input_feeding": bool(fed),
            "max_length": self.max_length,
            "beam_size": self.beam_size,
            "length_penalty": self.length_penalty,
            "need_weights": attends,
            "min_length": min(self.min_length, self.max_length),
            "n_best": min(self.n_best, self.beam_size),
            "block_ngrams": self.block_ngrams,
            "prefix": self._prefix(batch, vocab),
        }
        if attends:
            arguments["keys"] = random(source, batch, size) * 3
            arguments["memory"] = random(source, batch, width) * 3
            arguments["combine"] = random(hidden, width + hidden)
            arguments["lengths"] = make_lengths(self.lengths, source, batch)
        if self.score == "general":
            arguments["weight"] = random(hidden, size)
        if self.score == "location":
            arguments |= {"keys": None, "weight": random(source - 1, hidden) * 3}
        if self.score == "concat":
            arguments["weight_v"] = random(size) * 4
            arguments["weight_query"] = random(size, hidden) if self.project_query else None
        if self.predict:
            arguments["weight_position"] = random(size + 1, hidden)
            arguments["weight_position_v"] = random(size + 1) * size**0.5
        if self.history is not None:
            arguments["weight_history"] = random(size, 3)
        plain = GenerateCase()
        for name in ("heads", "window", "history", "order"):
            if getattr(self, name) != getattr(plain, name):
                arguments[name] = getattr(self, name)
        if self.fed != "output":
            arguments["feed"] = self.fed
        if self.coverage_penalty:
            arguments["coverage_penalty"] = self.coverage_penalty
        if self.draws:
            arguments |= {"sample": True, "n_best": self.draws, "seed": 2**62 + 5}
            for name in ("temperature", "top_k", "top_p"):
                arguments[name] = getattr(self, name)
        return arguments


#: Options of models that attend otherwise than to all of a source by what is there alone.
MODEL_KINDS: dict[str, dict[str, Any]] = {
    "location": {"score": "location", "max_positions": 4},
    "local-m": {"window": "local-m", "window_size": 1},
    "local-p": {"window": "local-p", "window_size": 2, "cell": "gru"},
    "location-sensitive": {"score": "concat", "history": "previous", "history_size": 3},
    "coverage": {"score": "concat", "history": "cumulative", "history_size": 1, "num_layers": 2},
    "heads": {"heads": 2, "window": "local-m", "window_size": 2},
    "bahdanau": {"score": "concat", "order": "bahdanau", "cell": "gru"},
    "context": {"feed": "context"},
}

#: Windows, whether they are predicted, and history; and in which order what is fed.
ATTENTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"window": 1},
    {"window": 2, "predict": True},
    {"history": "previous"},
    {"history": "cumulative"},
    {"window": 2, "history": "cumulative"},
    {"window": 1, "predict": True, "history": "previous"},
)
FEEDINGS: tuple[dict[str, Any], ...] = (
    {},
    {"input_feeding": False},
    {"fed": "context"},
    {"fed": "context", "order": "bahdanau"},
)


def kinds(options: dict[str, tuple[Any, ...]]) -> list[GenerateCase]:
    """Cases of every kind of attention, with each pair of ``options`` and of those."""
    own: dict[str, tuple[Any, ...]] = {
        "cell": tuple(GATES),
        "score": ("dot", "general", "concat"),
        "attention": ATTENTIONS,
        "feeding": FEEDINGS,
        "heads": (1, 2, 3),
        "project_query": (True, False),
    }
    found = []
    for row in pairwise(own | options):
        row |= row.pop("attention") | row.pop("feeding")
        if row.get("history") is not None:
            row["score"] = "concat"
        found.append(GenerateCase(**row))
    return found


def make_prefix(kind: str | None, batch: int, vocab: int, limit: int) -> Tensor | None:
    """Tokens that rows begin with: of different lengths, or as many as there may be."""
    if kind is None:
        return None
    prefix = torch.randint(UNK, vocab, (batch, limit if kind == "long" else min(limit, 3)))
    if kind == "ragged":
        for row in range(batch):
            prefix[row, row % (prefix.shape[1] + 1) :] = PAD
    return prefix


def check(case: GenerateCase) -> GenerateOutput:
    """Compare the operator with the reference in float64; returns what it found."""
    arguments = case.arguments()
    found = functional.generate(**arguments)
    exact = map_leaves(lambda _, t: t.double() if t.is_floating_point() else t, arguments)
    expected = reference.generate(**exact)
    assert found.scores.dtype == case.dtype
    assert torch.equal(found.lengths, expected.lengths)
    assert torch.equal(found.tokens, expected.tokens)
    missing = expected.scores == -torch.inf
    assert torch.equal(found.scores == -torch.inf, missing)
    difference = (found.scores.double() - expected.scores)[~missing].abs()
    assert difference.le(TOLERANCES[case.dtype]).all()
    assert (found.weights is None) == (expected.weights is None)
    if found.weights is not None and expected.weights is not None:
        difference = (found.weights.double() - expected.weights).abs()
        assert difference.le(TOLERANCES[case.dtype]).all()
    return found


def scheduled_arguments(
    case: GenerateCase, *, masked: bool = False, drawn: bool = False, share: float = 0.4
) -> dict[str, Any]:
    """A call of ``scheduled_inputs`` with as many steps as ``max_length`` says."""
    arguments = case.arguments()
    for name in ("max_length", "beam_size", "length_penalty", "need_weights"):
        del arguments[name]
    for name in ("min_length", "n_best", "block_ngrams", "prefix"):
        del arguments[name]
    _, batch, features, hidden, _, _, vocab = case.sizes
    steps, hidden = case.max_length, case.heads * hidden

    def mask(*shape: int) -> Tensor:
        return torch.randint(0, 3, shape).to(case.dtype)

    arguments["tokens"] = torch.randint(0, vocab, (steps, batch))
    arguments["coins"] = torch.rand(steps, batch) < share
    if drawn:
        arguments["draws"] = torch.rand(steps, batch, dtype=torch.float64).to(case.dtype)
    if masked:
        arguments["embedding_masks"] = mask(steps, batch, features)
        arguments["output_masks"] = mask(steps, batch, hidden)
        if case.layers > 1:
            arguments["dropout_masks"] = mask(case.layers - 1, steps, batch, hidden)
    return arguments


def check_scheduled(case: GenerateCase, *, masked: bool, drawn: bool) -> None:
    """Compare ``scheduled_inputs`` with the reference in float64."""
    arguments = scheduled_arguments(case, masked=masked, drawn=drawn)
    before = {name: tensor.clone() for name, tensor in leaves(arguments)}
    found = functional.scheduled_inputs(**arguments)
    exact = map_leaves(lambda _, t: t.double() if t.is_floating_point() else t, arguments)
    assert torch.equal(found, reference.scheduled_inputs(**exact))
    assert_same_bits(dict(leaves(arguments)), before)
