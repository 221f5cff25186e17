# SPDX-License-Identifier: Apache-2.0
"""Seq2Seq: an encoder, an attention decoder and a vocabulary's worth of logits.

Built of ``nn``; trained by ``training``, searched by ``search``. Token ids come in
batch-first; everything between the embeddings and the logits is time-major.
"""

from .decoder import Decoder
from .encoder import Encoder
from .given import Given
from .inputs import valid_steps
from .model import Seq2Seq
from .options import ClassifierOptions, EncoderOptions, Seq2SeqOptions, TaggerOptions

__all__ = [
    "ClassifierOptions",
    "Decoder",
    "Encoder",
    "EncoderOptions",
    "Given",
    "Seq2Seq",
    "Seq2SeqOptions",
    "TaggerOptions",
    "valid_steps",
]
