# SPDX-License-Identifier: Apache-2.0
"""pyseq: recurrent sequence-to-sequence models with fused kernels for PyTorch."""

# Before all else: it checks the build, and loads the extension that the others call.
from . import _library as _library  # isort: split

from . import embeddings, functional, importers, nn, reference
from .checkpoint import load, save
from .conversion import convert, revert
from .cuda import cuda_plan
from .labeler import Labeler
from .labels import Labels
from .quantized import quantize
from .recurrent import LayerOptions
from .search import Ensemble, Hypothesis, SearchOptions
from .seq2seq import Seq2Seq
from .tagger import Classifier, Tagger
from .text import Vocab
from .training import train, train_labeler
from .translator import Translator

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "Ensemble",
    "Hypothesis",
    "Labeler",
    "Labels",
    "LayerOptions",
    "SearchOptions",
    "Seq2Seq",
    "Tagger",
    "Translator",
    "Vocab",
    "__version__",
    "convert",
    "cuda_plan",
    "embeddings",
    "functional",
    "importers",
    "load",
    "nn",
    "quantize",
    "reference",
    "revert",
    "save",
    "train",
    "train_labeler",
]
