# SPDX-License-Identifier: Apache-2.0
"""Other people's checkpoints, read without running what is in them.

``read_model`` turns a model of another library into a :class:`pyseq.Translator` with the same
output, ``read_layers`` recurrent layers into those of :mod:`pyseq.nn`; see docs/checkpoints.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..translator import Translator
from . import fairseq, g2p_en, joeynmt, opennmt, stanza
from ._layout import shapes_may_differ
from .joeynmt import InitialState
from .layers import convert_layers, load_layers, read_layers

__all__ = [
    "LAYOUTS",
    "InitialState",
    "convert_layers",
    "load_layers",
    "read_layers",
    "read_model",
]

_READERS: dict[str, Callable[..., Translator]] = {
    "opennmt": opennmt.read,
    "fairseq": fairseq.read,
    "joeynmt": joeynmt.read,
    "stanza": stanza.read,
    "g2p-en": g2p_en.read,
}

#: The libraries whose models can be read.
LAYOUTS: tuple[str, ...] = tuple(_READERS)


def read_model(
    layout: str,
    path: str | Path,
    *,
    source_vocab: str | Path | None = None,
    target_vocab: str | Path | None = None,
    initial_state: InitialState | None = None,
    scaled_embeddings: bool = False,
) -> Translator:
    """A model of another library as a translator that gives the same output.

    Args:
        layout: one of :data:`LAYOUTS`.
        path: the checkpoint.
        source_vocab, target_vocab: the library's files of the vocabularies, where the checkpoint
            does not hold them; without them a symbol is called by its id, ``#7``.
        initial_state, scaled_embeddings: see :func:`pyseq.importers.joeynmt.read`.

    Returns:
        The translator, in eval mode, float32.

    Raises:
        ValueError: an unknown layout, or an option of another one.
        CheckpointError: the file is of another layout or has a part that pyseq does not have;
            the text lists its weights.
        OSError: a file cannot be read.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    path = Path(path)
    source = None if source_vocab is None else Path(source_vocab)
    target = None if target_vocab is None else Path(target_vocab)
    options: dict[str, Any] = {}
    if layout == "joeynmt":
        options = {"initial_state": initial_state, "scaled_embeddings": scaled_embeddings}
    elif initial_state is not None or scaled_embeddings:
        raise ValueError(
            f"initial_state and scaled_embeddings go with the layout 'joeynmt', got {layout!r}"
        )
    if layout == "stanza" and source is not None and target is not None:
        raise ValueError(
            "stanza has one vocabulary for both sides: give source_vocab or target_vocab, got both"
        )
    with shapes_may_differ(path):
        return _READERS[layout](path, source_vocab=source, target_vocab=target, **options)
