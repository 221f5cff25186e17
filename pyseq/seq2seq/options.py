# SPDX-License-Identifier: Apache-2.0
"""The options of the models, each in one place: their names, types and defaults.

The constructors, training and the command line take them from here, and a saved model's
``config.json`` holds them. What they mean is told by ``Seq2Seq``, ``Tagger``, ``Classifier``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypedDict

import torch

from ..extra import ExtraOptions
from ..nn import AttentionOptions
from ..nn._common import Device
from ..recurrent import LayerOptions, layer_cell

__all__ = ["ClassifierOptions", "EncoderOptions", "Seq2SeqOptions", "TaggerOptions"]


class Placing(TypedDict):
    """Where and as what the parameters of a module are made."""

    device: Device
    dtype: torch.dtype | None


_NO_OPTIONS = LayerOptions()


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """What all models are made of; see :class:`pyseq.Tagger`, which has these options too."""

    embedding_size: int = 256
    hidden_size: int = 256
    num_layers: int = 1
    cell: str = "lstm"
    bidirectional: bool = True
    dropout: float = 0.1
    source_features: int | None = None
    #: A mapping of their names will do, as :attr:`pyseq.Seq2Seq.config` has them.
    encoder_options: LayerOptions = _NO_OPTIONS

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(each.default, bool) and not isinstance(value, bool):
                raise ValueError(f"{each.name} must be True or False, got {value!r}")
        object.__setattr__(self, "encoder_options", LayerOptions.of(self.encoder_options))


@dataclass(frozen=True, kw_only=True)
class _SourceExtraOptions:
    """How extra information enters; see :class:`pyseq.Seq2Seq`."""

    source_extra_size: int | None = None
    extra_mode: str = "concat"
    extra_hidden_size: int | None = None
    extra_place: str = "output"

    def extra(self, size: int | None) -> ExtraOptions | None:
        """How a side takes ``size`` numbers of extra information; None if it takes none."""
        if size is None:
            return None
        return ExtraOptions(size, self.extra_mode, self.extra_hidden_size, self.extra_place)

    def check_extra(self) -> None:
        """Raise a ValueError if it is told how extra information enters, but not that it does."""
        names = [each.name for each in fields(self) if each.name.endswith("_extra_size")]
        told = (self.extra_mode, self.extra_hidden_size, self.extra_place)
        if told != ("concat", None, "output") and all(getattr(self, n) is None for n in names):
            raise ValueError(
                f"extra_mode, extra_hidden_size and extra_place go with {' or '.join(names)}, got "
                f"{told[0]!r}, {told[1]!r} and {told[2]!r} without"
            )


@dataclass(frozen=True, kw_only=True)
class TaggerOptions(EncoderOptions, _SourceExtraOptions):
    """See :class:`pyseq.Tagger`."""


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(TaggerOptions):
    """See :class:`pyseq.Classifier`."""

    pooling: str = "last"


@dataclass(frozen=True, kw_only=True)
class Seq2SeqOptions(EncoderOptions, _SourceExtraOptions, AttentionOptions):
    """See :class:`pyseq.Seq2Seq`: ``Seq2Seq(source_vocab_size, target_vocab_size,
    **asdict(options))`` is a model with these."""

    encoder_cell: str | None = None
    decoder_options: LayerOptions = _NO_OPTIONS
    score: str | None = "general"
    input_feeding: bool = True
    source_embedding_size: int | None = None
    target_embedding_size: int | None = None
    encoder_hidden_size: int | None = None
    encoder_num_layers: int | None = None
    bridge: str = "copy"
    tie_embeddings: bool = False
    context_every_step: bool = False
    target_extra_size: int | None = None
    copy: str | None = None
    memory_bias: bool = False
    bridge_c_from_h: bool = False
    coverage_loss: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "decoder_options", LayerOptions.of(self.decoder_options))

    @property
    def attention(self) -> AttentionOptions:
        """How the decoder attends."""
        return AttentionOptions(**{each.name: getattr(self, each.name) for each in _ATTENTION})


_ATTENTION = fields(AttentionOptions)


# What the constructors take: the options, how large the vocabularies are, and what the weights
# are made as, which is no property of the model.


@dataclass(frozen=True)
class Seq2SeqArguments(Seq2SeqOptions):
    """What :class:`pyseq.Seq2Seq` takes."""

    source_vocab_size: int | None
    target_vocab_size: int
    device: Device = field(default=None, kw_only=True)
    dtype: torch.dtype | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class TaggerArguments(TaggerOptions):
    """What :class:`pyseq.Tagger` takes."""

    source_vocab_size: int | None
    num_labels: int
    device: Device = field(default=None, kw_only=True)
    dtype: torch.dtype | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class ClassifierArguments(ClassifierOptions):
    """What :class:`pyseq.Classifier` takes."""

    source_vocab_size: int | None
    num_labels: int
    device: Device = field(default=None, kw_only=True)
    dtype: torch.dtype | None = field(default=None, kw_only=True)


def config_of(
    arguments: Seq2SeqArguments | TaggerArguments | ClassifierArguments,
) -> dict[str, Any]:
    """What a model is made of, in values that JSON knows; cells by their full names."""
    config = asdict(arguments)
    del config["device"], config["dtype"]
    for name in ("cell", "encoder_cell"):
        if config.get(name) is not None:
            config[name] = layer_cell(config[name])
    for name in ("encoder_options", "decoder_options"):
        if name in config:
            config[name] = getattr(arguments, name).changed()
    return config
