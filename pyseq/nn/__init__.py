# SPDX-License-Identifier: Apache-2.0
"""Modules over the fused operators: recurrent layers, their cells, attention, its decoder.

RNN, GRU, LSTM and the cells replace those of torch.nn: same arguments, parameter names and
initialisation. Modules keep parameters and check arguments; ``functional`` computes.
"""

from __future__ import annotations

from ._attention_options import AttentionOptions
from ._common import cell_name
from .attention import Attention
from .cells import GRUCell, IndRNNCell, LSTMCell, RNNCell, SLSTMCell
from .decoder import AttentionDecoder
from .layers import GRU, LSTM, RNN, SLSTM, IndRNN
from .score import Positions, Score

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "SLSTM",
    "Attention",
    "AttentionDecoder",
    "AttentionOptions",
    "GRUCell",
    "IndRNN",
    "IndRNNCell",
    "LSTMCell",
    "Positions",
    "RNNCell",
    "SLSTMCell",
    "Score",
    "cell_name",
]

# Pickles and messages name what is public by where users find it, not by the file.
for _name in __all__:
    globals()[_name].__module__ = __name__
