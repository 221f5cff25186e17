# SPDX-License-Identifier: Apache-2.0
"""Text in, labels out: a Tagger or Classifier with its vocabulary, labels and tokeniser.

What ``pyseq.train_labeler`` returns, and what ``pyseq predict`` and ``evaluate`` use for such
models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checkpoint
from ._checks import check_lines, check_positive, integer
from .devices import AnyDevice
from .errors import CheckpointError
from .labels import LabelExamples, Labels
from .search.evaluation import in_eval_mode, search_mode
from .seq2seq.inputs import weight_of
from .tagger import Classifier, Tagger
from .text import Extra, Features, Pair, Tokenizer, Vocab, extra_tensor
from .text.batches import pad_rows
from .text.extra import check_extra, read_line
from .text.features import ReadsFeatures
from .types import PAD

__all__ = ["Labeler", "Labelling"]


class Labelling(NamedTuple):
    """What a model says of one line."""

    labels: list[str]  # one for each source token, or of a Classifier one alone
    probabilities: list[float]  # of each of them
    source_tokens: list[str]  # as split, spelled out where unknown to the model

    @property
    def text(self) -> str:
        """The labels, separated by spaces."""
        return " ".join(self.labels)


class Labeler(ReadsFeatures):
    """A model that reads text and gives labels.

    ``labeler("the cat sat")`` is ``"DET NOUN VERB"``, say, or of a classifier ``"animals"``.

    Args:
        model: the model; dropout is off in every call, whatever its mode.
        source_vocab: what its ids mean; None for a model that reads features.
        labels: what its outputs mean.
        source_tokens: how text is split: ``"char"``, ``"space"``, ``"word"``, ``"line"``.
        features: of a model with ``source_features``: lines are the names of these arrays, which
            may be given later.

    Raises:
        ValueError: an unknown way to split, or vocabulary or labels of another size than the
            model's.
    """

    def __init__(
        self,
        model: Tagger | Classifier,
        source_vocab: Vocab | None,
        labels: Labels,
        *,
        source_tokens: str = "space",
        features: Features | None = None,
    ) -> None:
        for name, given in (("source_vocab_size", source_vocab), ("num_labels", labels)):
            size = None if given is None else len(given)
            if size != model.config[name]:
                raise ValueError(f"{name} of the model is {model.config[name]}, got {size}")
        self.model = model
        self.source_vocab = source_vocab
        self.labels = labels
        self.source_tokenizer = Tokenizer(source_tokens)
        self.features = features

    def _configs(self) -> list[dict[str, Any]]:
        return [self.model.config]

    @property
    def per_token(self) -> bool:
        """Whether every token gets a label, or every line one."""
        return isinstance(self.model, Tagger)

    def __call__(self, line: str) -> str:
        """The labels for one line as text; :meth:`predict` does many at once."""
        return self.predict([line])[0].text

    def predict(self, lines: Sequence[str], *, batch_size: int = 256) -> list[Labelling]:
        """The likeliest labels of lines, in batches of similar length.

        An unknown symbol is read as ``<unk>``. A blank line has no tokens to tag; a
        classifier judges it as an empty one. For a model with extra information a line goes on
        with its numbers after a tab, as for :meth:`pyseq.Translator.search`; a blank one has
        zeros.

        Args:
            lines: the lines.
            batch_size: lines of one batch.

        Returns:
            One result for each line, in their order.

        Raises:
            DataError: a line has not the extra information that the model takes.
            ValueError: ``batch_size`` is below 1.
            TypeError: ``lines`` is a single string, or no sequence.
        """
        check_lines(lines)
        check_positive(batch_size=integer("batch_size", batch_size))
        read = [self._read(line) for line in lines]
        sources = [source for source, _ in read]
        results: dict[int, Labelling] = {}
        order = sorted(range(len(lines)), key=lambda i: self._steps(sources[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            found = self._predict_batch([sources[i] for i in rows], [read[i][1] for i in rows])
            results.update(zip(rows, found, strict=True))
        return [results[i] for i in range(len(lines))]

    @property
    def extra_size(self) -> int | None:
        """Numbers of a vector of extra information; None for none."""
        size: int | None = self.model.config["source_extra_size"]
        return size

    def _read(self, line: str) -> tuple[list[str], Extra]:
        """The tokens of a line, and the extra information behind them."""
        text, extra = read_line(line, (self.extra_size, None))
        source = self.source_tokenizer.split(text)
        if not source:
            return source, Extra((0.0,) * (self.extra_size or 0))
        check_extra(
            extra, (self.extra_size, None), (self._steps(source), None), place=f"the line {text!r}"
        )
        return source, extra

    def _source(self) -> Vocab | Features:
        """What makes numbers of sources.

        Raises:
            DataError: the features have not been given.
        """
        return self.named_features() if self.source_vocab is None else self.source_vocab

    def _steps(self, source: list[str]) -> int:
        """Steps of a source as the encoder reads it."""
        return len(self._source().encode(source)) if source else 0

    def _rows(self, sources: list[list[str]]) -> list[list[int] | Tensor]:
        """Sources in numbers, with a step of padding at least, for blank lines."""
        encoder = self._source()
        blank = [PAD] if isinstance(encoder, Vocab) else torch.zeros(1, encoder.size)
        return [encoder.encode(source) if source else blank for source in sources]

    def _predict_batch(self, sources: list[list[str]], extras: list[Extra]) -> list[Labelling]:
        weight = weight_of(self.model)
        source, _ = pad_rows(self._rows(sources))
        if source.is_floating_point():
            source = source.to(weight.dtype)
        steps = [self._steps(tokens) for tokens in sources]
        lengths = torch.tensor(steps)
        extra = extra_tensor(
            [each.source for each in extras], self.extra_size, steps=source.shape[1]
        )
        told = {} if extra is None else {"source_extra": extra.to(weight)}
        model = in_eval_mode(self.model)
        with search_mode(model):
            logits = model(source.to(weight.device), lengths.to(weight.device), **told)
        probabilities = logits.softmax(-1)
        best, numbers = probabilities.max(-1)
        results = []
        for row, tokens in enumerate(sources):
            kept = slice(row, row + 1) if not self.per_token else (row, slice(steps[row]))
            labels = self.labels.decode(numbers[kept].tolist())
            results.append(Labelling(labels, best[kept].tolist(), tokens))
        return results

    def unknown_symbols(self, line: str) -> list[str]:
        """The tokens of ``line`` that the model has never seen."""
        vocab = self.source_vocab
        if vocab is None:
            return []
        return [token for token in self._read(line)[0] if token not in vocab]

    def encode(self, pairs: Sequence[Pair], *, name: str) -> LabelExamples:
        """Tokens and labels as the numbers that the model is trained on.

        Raises:
            DataError: a line has not the right number of labels, or one that is unknown.
        """
        return LabelExamples.encode(
            pairs,
            self._source(),
            self.labels,
            name=name,
            per_token=self.per_token,
            extra_size=self.extra_size,
        )

    def save(self, path: str | Path, *, training: checkpoint.TrainingState | None = None) -> None:
        """Save as a folder; see :func:`pyseq.save`."""
        checkpoint.save(
            path,
            self.model,
            source_vocab=self.source_vocab,
            labels=self.labels,
            source_tokens=self.source_tokenizer.name,
            training=training,
        )

    @classmethod
    def load(
        cls, path: str | Path, *, features: Features | None = None, device: AnyDevice = None
    ) -> Labeler:
        """Load what :meth:`save` wrote.

        Args:
            path: the folder.
            features: as for the constructor.
            device: as for :func:`pyseq.load`.

        Raises:
            CheckpointError: there is no saved model, it is damaged, it is of another kind, or
                it was saved without vocabulary or labels.
        """
        found = cls.from_saved(checkpoint.load(path, device=device), path)
        found.features = features
        return found

    @classmethod
    def from_saved(cls, saved: checkpoint.Saved, path: str | Path) -> Labeler:
        """The labeler of a model that was loaded from ``path``."""
        if not isinstance(saved.model, (Tagger, Classifier)):
            raise CheckpointError(
                f"{path}: the model must be a Tagger or a Classifier, got "
                f"{type(saved.model).__name__}"
            )
        reads_features = saved.model.config["source_features"] is not None
        if (saved.source_vocab is None) != reads_features or saved.labels is None:
            raise CheckpointError(f"{path}: this model was saved without its vocabulary or labels")
        return cls(
            saved.model,
            saved.source_vocab,
            saved.labels,
            source_tokens=saved.source_tokens or "space",
        )
