# SPDX-License-Identifier: Apache-2.0
"""The fused operators: scan, attend, decode, generate and the loss of an output layer.

Each is one call into C++ forward and one backward, whatever the number of steps, but
attend_history on other devices than the CPU, which is one of attend at each. Options are checked
here, tensors in C++. All of a call have one dtype; float16 and bfloat16 are added up in float32.
``pyseq.reference`` has the same in plain torch.
"""

from __future__ import annotations

from .. import transforms as transforms  # registers what stands in for the operators there
from . import _stepwise as _stepwise  # registers operators for devices without kernels for them
from .attention import attend, coverage_loss, predict_positions
from .attention_history import attend_history
from .decoding import decode
from .generation import generate, scheduled_inputs
from .keys import position_keys, position_limit, project_memory, scale_keys
from .products import linear, linear_cross_entropy
from .scans import scan, scan_both, step

__all__ = [
    "attend",
    "attend_history",
    "coverage_loss",
    "decode",
    "generate",
    "linear",
    "linear_cross_entropy",
    "position_keys",
    "position_limit",
    "predict_positions",
    "project_memory",
    "scale_keys",
    "scan",
    "scan_both",
    "scheduled_inputs",
    "step",
]
