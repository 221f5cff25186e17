# SPDX-License-Identifier: Apache-2.0
"""The figures that pyseq is meant to reach on a CUDA device of the class of an H200, and what a run
of ``benchmarks.cuda`` came to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .cuda import Results, Row

#: The sizes that the targets are about.
HIDDEN = range(256, 1025)
#: Of an LSTM step by FlashRNN's fused kernel there are published 4.76 µs, on an H100.
FLASH_CASE, FLASH_MICROSECONDS = ("lstm", "bfloat16", "768", "16"), 2.4
DECODER_CASE = ("decode", "float32", "512", "32")


class Target(NamedTuple):
    """A bound on a figure of each line that it is about."""

    title: str
    bound: float
    at_most: bool  # else at least
    figure: Callable[[Row], float | None]  # None for lines that it is not about

    def is_kept(self, figure: float) -> bool:
        """Whether ``figure`` is within the bound."""
        return figure <= self.bound if self.at_most else figure >= self.bound


def in_range(row: Row) -> bool:
    """Whether the line is that of a layer of a size that targets name."""
    return row.case[0] != "decode" and int(row.case[2]) in HIDDEN


def takes_persistent(row: Row) -> bool:
    """Whether torch.nn runs what the targets call cuDNN's persistent path: an LSTM of float16, in
    one direction, every row as long, of sizes that its tiles divide."""
    name, precision, hidden, batch = row.case
    return (
        name == "lstm"
        and precision == "float16"
        and int(hidden) <= 1024
        and int(hidden) % 128 == 0
        and int(batch) % 8 == 0
    )


def _faster(row: Row, rival: int, *, training: bool) -> float | None:
    """How many times as long a rival takes."""
    timed = row.rivals[rival]
    if timed is None:
        return None
    if training:
        return timed.training / row.pyseq.training
    return timed.forward / row.pyseq.forward


def _against_cudnn(*, persistent: bool, training: bool) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        if not in_range(row) or takes_persistent(row) != persistent:
            return None
        return _faster(row, 0, training=training)

    return figure


def _decoder(rival: int) -> Callable[[Row], float | None]:
    return lambda row: _faster(row, rival, training=True) if row.case == DECODER_CASE else None


def _backward(row: Row) -> float | None:
    own = row.pyseq
    return (own.training - own.forward) / own.forward if in_range(row) else None


TARGETS = (
    *(
        Target(
            f"torch.nn on cuDNN's {kind} path, {what}, times as long",
            bound,
            at_most=False,
            figure=_against_cudnn(persistent=persistent, training=what != "forward"),
        )
        for kind, persistent, bound in (
            ("persistent", True, 0.8),
            ("standard", False, 3.0),
        )
        for what in ("forward", "with backward")
    ),
    Target(
        "LSTM of bfloat16, H = 768, B = 16, forward, µs",
        FLASH_MICROSECONDS,
        at_most=True,
        figure=lambda row: row.pyseq.forward if row.case == FLASH_CASE else None,
    ),
    Target("decoder of torch, eager, with backward, times as long", 20.0, False, _decoder(0)),
    Target("decoder of torch in a CUDA graph, likewise", 4.0, False, _decoder(1)),
    Target("backward of a layer, times as long as forward", 2.2, True, _backward),
)


def table(results: Results) -> Iterator[str]:
    """Lines of Markdown: of each target the bound, how many lines keep it, and the worst."""
    yield "| target | bound | kept by | worst | of |"
    yield "|---|---|---|---|---|"
    for target in TARGETS:
        found = [(target.figure(row), row) for row in (*results.layers, *results.decoders)]
        figures = [(figure, row) for figure, row in found if figure is not None]
        bound = f"{'at most' if target.at_most else 'at least'} {target.bound:g}"
        if not figures:
            yield f"| {target.title} | {bound} | not measured | | |"
            continue
        pick = max if target.at_most else min
        worst, row = pick(figures, key=lambda pair: pair[0])
        kept = sum(target.is_kept(figure) for figure, _ in figures)
        name, precision, hidden, batch = row.case
        yield (
            f"| {target.title} | {bound} | {kept} of {len(figures)} | {worst:.2f} | "
            f"{name}, {precision}, H = {hidden}, B = {batch} |"
        )
