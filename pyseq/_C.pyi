# SPDX-License-Identifier: Apache-2.0
"""The compiled part of pyseq; its operators are under ``torch.ops.pyseq``."""

from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

def scan(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: str,
    reverse: bool,
    keep_every: int = 1,
    return_states: bool = False,
    w_ch: Tensor | None = None,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    gain_ih: Tensor | None = None,
    gain_hh: Tensor | None = None,
    gain_c: Tensor | None = None,
    bias_c: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.pyseq.scan``: y, h_n, c_n, c_steps."""

def step(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    cell: str,
    w_ch: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.pyseq.scan`` of one step, x (B, I) without its T: h_n, c_n."""

def scan_layers(
    module: Module,
    parameters: dict[str, Parameter | None],
    names: list[list[str]],
    input: object,
    hx: object,
    lengths: object,
    cell: str,
    bidirectional: bool,
    batch_first: bool,
    training: bool,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]] | None:
    """What a recurrent ``module`` of pyseq.nn without options returns for its input, state and
    lengths; None if the call must go through the operators: where anything but the CPU's kernels
    would see it, or somebody has a word to say about an argument."""

def decode_whole(
    module: Module,
    parameters: dict[str, Parameter | None],
    names: list[str],
    score: Module,
    combine: Module,
    x: object,
    memory: object,
    keys: object,
    lengths: object,
    state: object,
    cell: str,
    order: str,
    fed: str,
    heads: int,
    input_feeding: bool,
    batch_first: bool,
    training: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None, Tensor | tuple[Tensor, Tensor], Tensor] | None:
    """What an attention decoder of pyseq.nn returns, steps first: output, weights, the last state
    and what is fed. None if the call must go through the operators, as for ``scan_layers``."""

def search_whole(
    others: tuple[Module, ...],
    encoder: tuple[Module, Module],
    encoder_names: list[list[str]],
    bridge: Module,
    decoder: tuple[Module, ...],
    decoder_names: list[str],
    source: object,
    lengths: object,
    encoder_cell: str,
    bidirectional: bool,
    bridge_kind: str,
    c_from_h: bool,
    decoder_layers: int,
    hidden_size: int,
    cell: str,
    order: str,
    fed: str,
    heads: int,
    input_feeding: bool,
    max_length: int,
    beam_size: int,
    length_penalty: float,
    need_weights: bool,
    min_length: int,
    n_best: int,
    block_ngrams: int,
    prefix: object,
    coverage_penalty: float,
    sample: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> list[tuple[list[int], float, Tensor | None]] | None:
    """What a search of a model of pyseq.seq2seq finds: tokens, score and weights of n_best results
    for each row. The modules are (embedding, layers) of the encoder, (embedding, layers, output) of
    the decoder with (score, combine) where it attends, and others that are called on the way. None
    if the call must go through the operators, as for ``scan_layers``."""

def attend(
    query: Tensor,
    keys: Tensor,
    memory: Tensor,
    weight_v: Tensor | None,
    lengths: Tensor | None,
    score: str,
    positions: Tensor | None = None,
    window: int = 0,
    heads: int = 1,
    step: Tensor | None = None,
    need_weights: bool = True,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.pyseq.attend``: context, weights."""

def decode(
    x: Tensor,
    layers: list[Tensor],
    keys: Tensor,
    memory: Tensor,
    combine: Tensor,
    weight_query: Tensor | None,
    weight_v: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    feed: Tensor | None,
    lengths: Tensor | None,
    dropout_masks: Tensor | None,
    cell: str,
    score: str,
    input_feeding: bool,
    need_weights: bool,
    weight_history: Tensor | None = None,
    weight_position: Tensor | None = None,
    weight_position_v: Tensor | None = None,
    step: Tensor | None = None,
    past: Tensor | None = None,
    heads: int = 1,
    window: int = 0,
    history: str = "none",
    order: str = "luong",
    fed: str = "output",
    memory_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.pyseq.decode``: output, weights, h_n, c_n, feed_n, past_n."""

def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    /,
) -> Tensor:
    """``torch.ops.pyseq.linear_cross_entropy``: the loss."""

def quantize_weight(weight: Tensor, *, gates: int, columns: list[int], kind: str) -> Tensor:
    """A matrix as quantized weights in uint8; see ``pyseq._packed.pack``."""

def quantized_values(weight: Tensor, /) -> list[tuple[Tensor, Tensor]]:
    """The numbers and scales of each run of quantized weights."""

def build_info() -> dict[str, str]:
    """What the extension was built with and for: torch, compiler, flags, cuda."""

def cuda_plan(
    operator: str, device: dict[str, float], sizes: dict[str, int], *, dtype: str, path: str
) -> dict[str, int | float | str]:
    """How a loop would run on a CUDA device; see ``pyseq.cuda``."""

def cuda_device() -> dict[str, Any]:
    """What a plan asks of the current CUDA device; empty without kernels for one."""

def has_lost_threads() -> bool:
    """Whether this thread is a forked child's, and had led others before."""

def cpu_tier() -> str:
    """The CPU tier in use: avx512, avx2, neon or plain."""

def compiled_tiers() -> str:
    """The CPU tiers compiled in, best first, separated by commas."""

def multiply_add_rate(*, threads: int, rounds: int) -> float:
    """Float32 operations per second of ``threads`` threads that only multiply and add.

    Two for each multiply-add; ``rounds`` of 24 or 12 vectors each, in registers.

    Raises:
        ValueError: an argument is not positive.
    """

def read_rate(*, threads: int, bytes: int, passes: int) -> float:
    """Bytes per second that ``threads`` threads read, each ``passes`` times its own ``bytes``.

    Raises:
        ValueError: an argument is not positive.
    """
