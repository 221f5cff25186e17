# SPDX-License-Identifier: Apache-2.0
"""The same model on the fused and on the reference operators, to compare the two.

Used by the demo and by the benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from . import functional, reference
from .functional import decoding, generation, products, scans


@contextmanager
def reference_operators() -> Iterator[None]:
    """Let every module of pyseq compute with the operators of ``pyseq.reference`` meanwhile.

    They have the same signatures, so the same model and the same weights run in plain
    torch: what is compared is the operators and nothing else. In all threads at once.
    """
    names = (
        "scan",
        "scan_both",
        "step",
        "attend",
        "attend_history",
        "decode",
        "generate",
        "scheduled_inputs",
        "linear",
        "linear_cross_entropy",
    )
    # Products are what the other operators call themselves.
    places = [(functional, name) for name in names]
    places += [(products, name) for name in names if hasattr(products, name)]
    instead = [getattr(reference, name) for _, name in places]
    for place in (
        (scans, "scan_layers"),
        (decoding, "decode_whole"),
        (generation, "search_whole"),
    ):
        places.append(place)
        instead.append(lambda *_: None)  # the modules are to call the operators
    fused = [getattr(module, name) for module, name in places]
    try:
        for (module, name), operator in zip(places, instead, strict=True):
            setattr(module, name, operator)
        yield
    finally:
        for (module, name), operator in zip(places, fused, strict=True):
            setattr(module, name, operator)
