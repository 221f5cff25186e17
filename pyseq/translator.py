# SPDX-License-Identifier: Apache-2.0
"""Text in, text out: a Seq2Seq model with its vocabularies and tokenisers.

What ``pyseq.train`` returns and what ``pyseq predict`` and ``pyseq evaluate`` use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checkpoint
from . import search as searches
from ._checks import check_lines, check_positive, integer
from .devices import AnyDevice
from .errors import CheckpointError, DataError
from .search import Ensemble, Hypothesis, SearchModel, SearchOptions
from .search.options import check_kind
from .seq2seq import Seq2Seq
from .seq2seq.inputs import weight_of
from .text import (
    SOURCE_MARKS,
    Examples,
    Extra,
    Features,
    Pair,
    SourceMarks,
    Tokenizer,
    Vocab,
    encode_copies,
    encode_sources,
    extra_tensor,
)
from .text.batches import pad_features
from .text.extra import check_extra, read_line, reversed_steps
from .text.features import ReadsFeatures
from .types import UNK


class Translation(NamedTuple):
    """The best output for one line."""

    text: str
    tokens: list[str]
    source_tokens: list[str]  # as split, in order, spelled out where unknown to the model
    score: float  # log-probability, nats
    # (T, S): a row for each token, a column for each source token and one more for the
    # <stop> behind them (with a <start> before them, for both; zero where neither is read);
    # None without attention and for a blank line.
    weights: Tensor | None


class _Encoded(NamedTuple):
    """Some sources, as a search takes them."""

    model: SearchModel
    source: Tensor  # (B, S)
    lengths: Tensor  # (B,)
    extra: list[list[str]]  # of each, the tokens beyond the vocabulary that may be copied


class Translator(ReadsFeatures):
    """A model that reads and writes text.

    ``translator("早上好")`` is the best output for one line.

    Args:
        model: the model; dropout is off in every call, whatever its mode.
        source_vocab, target_vocab: what its ids mean; the source's is None for a model that reads
            features.
        source_tokens, target_tokens: how text is split: ``"char"``, ``"space"``, ``"word"``.
        max_length: tokens an output may have, ``<stop>`` included.
        reverse_source: whether the model was trained on sources read backwards; results are
            in the order of the text all the same.
        source_marks: what is put around the tokens of a source; see
            :func:`pyseq.text.encode_sources`. Models that pyseq trained want ``"stop"``.
        others: further models with the same vocabularies, which predict together with
            ``model``; see :class:`pyseq.Ensemble`.
        features: of a model with ``source_features``: lines are the names of these arrays, which
            may be given later.

    Raises:
        ValueError: an unknown way to split or to mark, ``max_length`` below 1, or a vocabulary of
            another size than the models'.
    """

    def __init__(
        self,
        model: Seq2Seq,
        source_vocab: Vocab | None,
        target_vocab: Vocab,
        *,
        source_tokens: str = "char",
        target_tokens: str = "char",
        max_length: int = 100,
        reverse_source: bool = False,
        source_marks: SourceMarks = "stop",
        others: Sequence[Seq2Seq] = (),
        features: Features | None = None,
    ) -> None:
        if source_marks not in SOURCE_MARKS:
            raise ValueError(
                f"source_marks must be one of {', '.join(SOURCE_MARKS)}, got {source_marks!r}"
            )
        if source_marks != "stop" and model.config["copy"] is not None:
            raise ValueError(f"a model that copies needs source_marks 'stop', got {source_marks!r}")
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        for side, vocab in (("source", source_vocab), ("target", target_vocab)):
            for each in (model, *others):
                size = each.config[f"{side}_vocab_size"]
                found = None if vocab is None else len(vocab)
                if found != size:
                    raise ValueError(
                        f"{side}_vocab must have {size} symbols like the model, got {found}"
                    )
        if source_vocab is None and (reverse_source or self._copies(model)):
            raise ValueError("reverse_source and copying go with tokens, got a model of features")
        self.model = model
        self.others = tuple(others)
        self.source_vocab = source_vocab
        self.target_vocab = target_vocab
        self.source_tokenizer = Tokenizer(source_tokens)
        self.target_tokenizer = Tokenizer(target_tokens)
        self.max_length = max_length
        self.reverse_source = reverse_source
        self.source_marks: SourceMarks = source_marks
        self.features = features

    @property
    def copies(self) -> bool:
        """Whether the model may copy tokens of the line, those too that it does not know."""
        return self._copies(self.model)

    @staticmethod
    def _copies(model: Seq2Seq) -> bool:
        return model.config["copy"] is not None

    def _configs(self) -> list[dict[str, Any]]:
        return [model.config for model in (self.model, *self.others)]

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
        """The best output for each line.

        The short form of :meth:`search`, which has more options and gives more outputs.

        Args:
            lines: the lines.
            beam_size: hypotheses that the search keeps; 1 is greedy.
            max_length: tokens an output may have. Default: the translator's own.
            batch_size: lines of one batch.

        Returns:
            One translation for each line, in their order.
        """
        options = SearchOptions(
            max_length=self.max_length if max_length is None else max_length, beam_size=beam_size
        )
        return [found[0] for found in self.search(lines, options, batch_size=batch_size)]

    def search(
        self,
        lines: Sequence[str],
        options: SearchOptions | None = None,
        *,
        prefix: str = "",
        replace_unknown: bool = False,
        batch_size: int = 256,
        generator: torch.Generator | None = None,
    ) -> list[list[Translation]]:
        """The outputs that a search finds for each line, in batches of similar length.

        An unknown symbol is read as ``<unk>``; a blank line gives an empty output. For a model
        with extra information a line goes on with its numbers, after a tab, for the source, for
        the target, or for both, with a tab between; semicolons separate those of steps, and the
        last step's hold for all that follow.

        Args:
            lines: the lines.
            options: what to look for and how. Default: greedy search, up to the translator's
                own ``max_length``.
            prefix: text that every output begins with, in place of ``options.prefix``.
            replace_unknown: put for every ``<unk>`` of an output the source token that it
                looked at most.
            batch_size: lines of one batch.
            generator: source of randomness for ``options.sample``, on the device of the model.
                Draws depend on how lines are put into batches. Default: torch's.

        Returns:
            For each line, in their order, what :func:`pyseq.search.search` gives for a row.

        Raises:
            ValueError: ``options.prefix`` is given, the options do not go with the model, or
                ``batch_size`` is below 1.
            DataError: the prefix holds a symbol that the model does not know, or a line has not
                the extra information that the model takes.
            TypeError: ``lines`` is a single string, or no sequence.

        Reference:
            Luong et al. 2015, arXiv 1508.04025, section 4.1 (replacing unknown words), without
            its dictionary.
        """
        check_lines(lines)
        check_positive(batch_size=integer("batch_size", batch_size))
        options = self._text_options(options, prefix, replace_unknown=replace_unknown)
        read = [self._read(line) for line in lines]
        sources = [source for source, _ in read]
        results: list[list[Translation]] = [[Translation("", [], [], 0.0, None)] for _ in lines]
        order = sorted(range(len(lines)), key=lambda i: self._steps(sources[i]))
        order = [i for i in order if sources[i]]
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = self._encode(
                *zip(*(read[i] for i in rows), strict=True), max_length=options.max_length
            )
            found = searches.search(
                batch.model, batch.source, batch.lengths, options, generator=generator
            )
            for i, hypotheses, extra in zip(rows, found, batch.extra, strict=True):
                results[i] = [
                    self._translation(sources[i], extra, hypothesis, replace_unknown)
                    for hypothesis in hypotheses
                ]
        return results

    def stream(
        self,
        line: str,
        options: SearchOptions | None = None,
        *,
        prefix: str = "",
        replace_unknown: bool = False,
        generator: torch.Generator | None = None,
    ) -> Iterator[str]:
        """The output for one line, piece by piece as it is found.

        Put together, the pieces are the text that :meth:`search` gives.

        Args, Raises: see :meth:`search`; the options are those of :func:`pyseq.search.stream`.
        """
        options = self._text_options(options, prefix, replace_unknown=replace_unknown)
        source, information = self._read(line)
        if not source:
            return iter(())
        batch = self._encode([source], [information], max_length=options.max_length)
        tokens = searches.stream(
            batch.model, batch.source, batch.lengths, options, generator=generator
        )
        return self._pieces(source, batch.extra[0], tokens, replace_unknown)

    def _pieces(
        self,
        source: list[str],
        extra: list[str],
        tokens: Iterator[searches.StreamedToken],
        replace_unknown: bool,
    ) -> Iterator[str]:
        output: list[str] = []
        said = ""
        for item in tokens:
            weights = None if item.weights is None else item.weights.unsqueeze(0)
            one = Hypothesis([item.token], item.score, weights)
            output += self._translation(source, extra, one, replace_unknown).tokens
            text = self.target_tokenizer.join(output)
            yield text[len(said) :]
            said = text

    @property
    def extra_sizes(self) -> tuple[int | None, int | None]:
        """Numbers of a vector of extra information, of source and target; None for none."""
        config = self.model.config
        return config["source_extra_size"], config["target_extra_size"]

    def _read(self, line: str) -> tuple[list[str], Extra]:
        """The tokens of a line, and the extra information behind them."""
        text, information = read_line(line, self.extra_sizes)
        source = self.source_tokenizer.split(text)
        if source:
            steps = (self._steps(source), None)
            check_extra(information, self.extra_sizes, steps, place=f"the line {text!r}")
        return source, information

    def _text_options(
        self, options: SearchOptions | None, prefix: str, *, replace_unknown: bool
    ) -> SearchOptions:
        """The options of a search, with the prefix as ids."""
        if options is None:
            options = SearchOptions(max_length=self.max_length)
        check_kind(options)
        if any(options.prefix):
            raise ValueError("give the prefix as text, by prefix=, not as ids in the options")
        if replace_unknown and any(
            model.config["score"] is None for model in (self.model, *self.others)
        ):
            raise ValueError("replace_unknown needs a model with attention, got one without")
        if replace_unknown and self.source_vocab is None:
            raise ValueError("replace_unknown needs a source of tokens, got a model of features")
        if replace_unknown:
            options = replace(options, need_weights=True)
        tokens = self.target_tokenizer.split(prefix)
        for token in tokens:
            if token not in self.target_vocab:
                raise DataError(f"prefix: {token!r} was not in the training data")
        return replace(options, prefix=[self.target_vocab.encode(tokens)])

    def _encode(
        self, sources: Sequence[list[str]], information: Sequence[Extra], *, max_length: int
    ) -> _Encoded:
        like = weight_of(self.model)
        lines = [self.in_reading_order(source) for source in sources]
        if self.source_vocab is None:
            source, lengths = pad_features([self.named_features().encode(line) for line in lines])
            source = source.to(like.dtype)
        else:
            source, lengths = encode_sources(self.source_vocab, lines, marks=self.source_marks)
        copies: Tensor | None = None
        extra: list[list[str]] = [[] for _ in lines]
        if self.copies:
            copies, extra = encode_copies(self.target_vocab, lines)
            copies = copies.to(like.device)
        told = [
            self._told_in_reading_order(each, len(line))
            for each, line in zip(information, sources, strict=True)
        ]
        of_source, of_target = self.extra_sizes
        z_source = extra_tensor([each.source for each in told], of_source, steps=source.shape[1])
        z_target = extra_tensor([each.target for each in told], of_target, steps=max_length)
        models: list[SearchModel] = []
        for model in (self.model, *self.others):
            weight = weight_of(model)
            models.append(
                model.given(
                    source_extra=None if z_source is None else z_source.to(weight),
                    target_extra=None if z_target is None else z_target.to(weight),
                    copies=copies,
                )
            )
        searched = Ensemble(models) if self.others else models[0]
        return _Encoded(searched, source.to(like.device), lengths.to(like.device), extra)

    def _translation(
        self, source: list[str], extra: list[str], hypothesis: Hypothesis, replace_unknown: bool
    ) -> Translation:
        weights = None if hypothesis.weights is None else hypothesis.weights.cpu()
        if self.source_vocab is None:
            source = [str(step) for step in range(1, self._steps(source) + 1)]
        if weights is not None and (self.source_marks == "none" or self.source_vocab is None):
            weights = torch.nn.functional.pad(weights, (0, 1))
        elif weights is not None and self.source_marks == "both":
            weights = torch.cat([weights[:, 1:-1], weights[:, :1] + weights[:, -1:]], 1)
        if weights is not None and self.reverse_source:
            # Back to the order of the text; <stop> stays last.
            weights = torch.cat([weights[:, :-1].flip(1), weights[:, -1:]], 1)
        output = self.target_vocab.decode(hypothesis.tokens, extra=extra)
        if replace_unknown and weights is not None and output:
            looked_at = weights[:, :-1].argmax(1).tolist()
            output = [
                source[place] if index == UNK else token
                for token, index, place in zip(output, hypothesis.tokens, looked_at, strict=True)
            ]
        text = self.target_tokenizer.join(output)
        return Translation(text, output, source, hypothesis.score, weights)

    def in_reading_order(self, source: list[str]) -> list[str]:
        """The tokens of a source as the model reads them: backwards with ``reverse_source``."""
        return source[::-1] if self.reverse_source else source

    def _told_in_reading_order(self, extra: Extra, count: int) -> Extra:
        """The extra information of a source of so many tokens, as the model reads these."""
        if not self.reverse_source:
            return extra
        return extra._replace(source=reversed_steps(extra.source, self.extra_sizes[0], count))

    def unknown_symbols(self, line: str) -> list[str]:
        """The tokens of ``line`` that the model has never seen."""
        vocab = self.source_vocab
        if vocab is None:
            return []
        return [token for token in self._read(line)[0] if token not in vocab]

    def _steps(self, source: list[str]) -> int:
        """Steps of a source as the encoder reads it; of a blank line none."""
        if not source:
            return 0
        if self.source_vocab is None:
            return len(self.named_features().encode(source))
        return len(source) + 1  # <stop>

    def encode(self, pairs: Sequence[Pair], *, name: str) -> Examples:
        """Pairs of tokens as the ids that the model is trained on.

        Args:
            pairs: the pairs.
            name: where they came from, for messages.

        Raises:
            DataError: a pair has not the extra information that the model takes.
        """
        for pair in pairs:
            steps = (self._steps(pair.source), len(pair.target) + 1)
            check_extra(pair.extra, self.extra_sizes, steps, place=f"{name}:{pair.line}")
        ordered = [
            pair._replace(
                source=self.in_reading_order(pair.source),
                extra=self._told_in_reading_order(pair.extra, len(pair.source)),
            )
            for pair in pairs
        ]
        return Examples.encode(
            ordered,
            self.named_features() if self.source_vocab is None else self.source_vocab,
            self.target_vocab,
            name=name,
            copy=self.copies,
            extra_sizes=self.extra_sizes,
        )

    def save(self, path: str | Path, *, training: checkpoint.TrainingState | None = None) -> None:
        """Save as a folder; see :func:`pyseq.save`.

        Raises:
            ValueError: there are ``others``, which have folders of their own.
        """
        if self.others:
            raise ValueError(
                f"one folder holds one model: save the {1 + len(self.others)} models of an "
                "ensemble one by one"
            )
        checkpoint.save(
            path,
            self.model,
            source_vocab=self.source_vocab,
            target_vocab=self.target_vocab,
            source_tokens=self.source_tokenizer.name,
            target_tokens=self.target_tokenizer.name,
            max_length=self.max_length,
            reverse_source=self.reverse_source,
            source_marks=self.source_marks,
            training=training,
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *others: str | Path,
        features: Features | None = None,
        device: AnyDevice = None,
    ) -> Translator:
        """Load what :meth:`save` wrote.

        Args:
            path: the folder.
            others: folders of further models that predict together with the first.
            features: as for the constructor.
            device: as for :func:`pyseq.load`.

        Raises:
            CheckpointError: there is no saved model, it is damaged, it was saved without
                vocabularies, or the others do not read and write text as the first does.
        """
        first = cls.from_saved(checkpoint.load(path, device=device), path)
        models = []
        for other in others:
            one = cls.from_saved(checkpoint.load(other, device=device), other)
            for what in (
                "source_vocab",
                "target_vocab",
                "reverse_source",
                "source_marks",
                "copies",
            ):
                if getattr(one, what) != getattr(first, what):
                    raise CheckpointError(
                        f"{other}: the models of an ensemble must have the same {what}, "
                        f"got another one than that of {path}"
                        + ("; training on the same pairs gives it" if "vocab" in what else "")
                    )
            names = [
                (each.source_tokenizer.name, each.target_tokenizer.name) for each in (first, one)
            ]
            if names[0] != names[1]:
                raise CheckpointError(
                    f"{other}: the models of an ensemble must split text alike, "
                    f"{' and '.join(names[0])} as in {path}, got {' and '.join(names[1])}"
                )
            models.append(one.model)
        first.others = tuple(models)
        first.features = features
        return first

    @classmethod
    def from_saved(cls, saved: checkpoint.Saved, path: str | Path) -> Translator:
        """The translator of a model that was loaded from ``path``."""
        if not isinstance(saved.model, Seq2Seq):
            raise CheckpointError(
                f"{path}: the model must be a Seq2Seq, got {type(saved.model).__name__}; "
                "pyseq.Labeler.load loads it"
            )
        reads_features = saved.model.config["source_features"] is not None
        if (saved.source_vocab is None) != reads_features or saved.target_vocab is None:
            raise CheckpointError(f"{path}: this model was saved without its vocabularies")
        return cls(
            saved.model,
            saved.source_vocab,
            saved.target_vocab,
            source_tokens=saved.source_tokens or "char",
            target_tokens=saved.target_tokens or "char",
            max_length=saved.max_length or 100,
            reverse_source=saved.reverse_source,
            source_marks=saved.source_marks,
        )
