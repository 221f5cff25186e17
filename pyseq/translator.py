# SPDX-License-Identifier: Apache-2.0
"""Text in, text out: a Seq2Seq model with its vocabularies and tokenisers.

What ``pyseq.train`` returns and what ``pyseq predict`` and ``pyseq evaluate`` use.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import checkpoint
from .errors import CheckpointError
from .seq2seq import Seq2Seq
from .text import Tokenizer, Vocab, encode_sources


class Translation(NamedTuple):
    """The best output for one line."""

    text: str
    tokens: list[str]
    source_tokens: list[str]  # as split, in order, spelled out where unknown to the model
    score: float  # log-probability, nats
    # (T, S): a row for each token, a column for each source token and one more for the
    # <stop> behind them; None without attention and for a blank line.
    weights: Tensor | None


class Translator:
    """A model that reads and writes text.

    ``translator("早上好")`` is the best output for one line.

    Args:
        model: the model; dropout is off in every call, whatever its mode.
        source_vocab, target_vocab: what its ids mean.
        source_tokens, target_tokens: how text is split: ``"char"``, ``"space"``, ``"word"``.
        max_length: tokens an output may have, ``<stop>`` included.
        reverse_source: whether the model was trained on sources read backwards; results are
            in the order of the text all the same.

    Raises:
        ValueError: an unknown way to split, or ``max_length`` below 1.
    """

    def __init__(
        self,
        model: Seq2Seq,
        source_vocab: Vocab,
        target_vocab: Vocab,
        *,
        source_tokens: str = "char",
        target_tokens: str = "char",
        max_length: int = 100,
        reverse_source: bool = False,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.model = model
        self.source_vocab = source_vocab
        self.target_vocab = target_vocab
        self.source_tokenizer = Tokenizer(source_tokens)
        self.target_tokenizer = Tokenizer(target_tokens)
        self.max_length = max_length
        self.reverse_source = reverse_source

    def __call__(self, line: str, *, beam_size: int = 1) -> str:
        """The output text for one line; :meth:`translate` does many at once."""
        return self.translate([line], beam_size=beam_size)[0].text

    def translate(
        self,
        lines: Sequence[str],
        *,
        beam_size: int = 1,
        max_length: int | None = None,
        batch_size: int = 256,
    ) -> list[Translation]:
        """Translate lines, in batches of similar length.

        An unknown symbol is read as ``<unk>``; a blank line gives an empty output.

        Args:
            lines: the lines.
            beam_size: hypotheses that the search keeps; 1 is greedy.
            max_length: tokens an output may have. Default: the translator's own.
            batch_size: lines of one batch.

        Returns:
            One translation for each line, in their order.
        """
        sources = [self.source_tokenizer.split(line) for line in lines]
        results: list[Translation | None] = [None] * len(lines)
        order = sorted(range(len(lines)), key=lambda i: len(sources[i]))
        blank = [i for i in order if not sources[i]]
        for i in blank:
            results[i] = Translation("", [], [], 0.0, None)
        order = order[len(blank) :]
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [sources[i] for i in rows]
            found = self._translate_batch(batch, beam_size, max_length)
            for i, result in zip(rows, found, strict=True):
                results[i] = result
        return [result for result in results if result is not None]

    def _translate_batch(
        self, sources: list[list[str]], beam_size: int, max_length: int | None
    ) -> list[Translation]:
        device = next(self.model.parameters()).device
        source, lengths = encode_sources(
            self.source_vocab, [self.in_reading_order(source) for source in sources]
        )
        hypotheses = self.model.generate(
            source.to(device),
            lengths.to(device),
            max_length=self.max_length if max_length is None else max_length,
            beam_size=beam_size,
        )
        results = []
        for tokens, hypothesis in zip(sources, hypotheses, strict=True):
            output = self.target_vocab.decode(hypothesis.tokens)
            text = self.target_tokenizer.join(output)
            weights = hypothesis.weights
            if weights is not None and self.reverse_source:
                # Back to the order of the text; <stop> stays last.
                weights = torch.cat([weights[:, :-1].flip(1), weights[:, -1:]], 1)
            results.append(Translation(text, output, tokens, hypothesis.score, weights))
        return results

    def in_reading_order(self, source: list[str]) -> list[str]:
        """The tokens of a source as the model reads them: backwards with ``reverse_source``."""
        return source[::-1] if self.reverse_source else source

    def unknown_symbols(self, line: str) -> list[str]:
        """The tokens of ``line`` that the model has never seen."""
        return [t for t in self.source_tokenizer.split(line) if t not in self.source_vocab]

    def save(self, path: str | Path, *, training: checkpoint.TrainingState | None = None) -> None:
        """Save as a folder; see :func:`pyseq.save`."""
        checkpoint.save(
            path,
            self.model,
            source_vocab=self.source_vocab,
            target_vocab=self.target_vocab,
            source_tokens=self.source_tokenizer.name,
            target_tokens=self.target_tokenizer.name,
            max_length=self.max_length,
            reverse_source=self.reverse_source,
            training=training,
        )

    @classmethod
    def load(cls, path: str | Path) -> Translator:
        """Load what :meth:`save` wrote.

        Raises:
            CheckpointError: there is no saved model, it is damaged, or it was saved
                without vocabularies.
        """
        return cls.from_saved(checkpoint.load(path), path)

    @classmethod
    def from_saved(cls, saved: checkpoint.Saved, path: str | Path) -> Translator:
        """The translator of a model that was loaded from ``path``."""
        if saved.source_vocab is None or saved.target_vocab is None:
            raise CheckpointError(f"{path}: this model was saved without its vocabularies")
        return cls(
            saved.model,
            saved.source_vocab,
            saved.target_vocab,
            source_tokens=saved.source_tokens or "char",
            target_tokens=saved.target_tokens or "char",
            max_length=saved.max_length or 100,
            reverse_source=saved.reverse_source,
        )
