# SPDX-License-Identifier: Apache-2.0
"""What the models read: checks of a batch, and which of its steps are no padding."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .._checks import check_like, check_positive, check_shape, check_tensor
from ..types import UNK


def weight_of(model: torch.nn.Module) -> Tensor:
    """A parameter with the device and dtype of the model. None is asked for by name: a part may
    be wrapped by another module, an adapter for example, or hold weights that are quantized."""
    return next(each for each in model.parameters() if each.is_floating_point())


def check_source(source: Tensor, embedding: torch.nn.Module) -> None:
    """Raise unless ``source`` is what ``embedding`` reads: token ids or features; what was put
    in its place reads what it wants."""
    if isinstance(embedding, torch.nn.Linear):
        check_shape("source", source, "(B, S, D)", (-1, -1, embedding.in_features))
        check_like("source", source, "the encoder's weights", embedding.weight)
    elif isinstance(embedding, torch.nn.Embedding):
        check_tokens("source", source)


def check_tokens(name: str, tokens: Tensor) -> None:
    check_tensor(name, tokens)
    if tokens.dim() != 2:
        raise RuntimeError(f"{name} must be 2-D token ids, batch first, got {tuple(tokens.shape)}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"{name} must be int64, got {tokens.dtype}")


def embed(name: str, embedding: torch.nn.Module, tokens: Tensor) -> Tensor:
    """What ``embedding`` makes of ids or features; an id that it lacks is named."""
    # To look at the ids before would take time, and on a device wait for it.
    if torch.compiler.is_compiling() or not isinstance(embedding, torch.nn.Embedding):
        return cast(Tensor, embedding(tokens))
    try:
        return cast(Tensor, embedding(tokens))
    except IndexError as error:
        last = embedding.num_embeddings - 1
        wrong = tokens[(tokens < 0) | (tokens > last)]
        got = f", got {int(wrong[0])}" if wrong.numel() else ""
        raise IndexError(f"{name} must hold ids from 0 to V - 1 = {last}{got}") from error


def check_vocab_size(name: str, size: int) -> None:
    """Raise unless a vocabulary of ``size`` tokens has room for the special ones."""
    check_positive(**{name: size})
    if size <= UNK:
        raise ValueError(f"{name} must be at least {UNK + 1}, for the special tokens, got {size}")


def valid_steps(lengths: Tensor, like: Tensor) -> Tensor:
    """(B, S) bool on the device of ``like`` (B, S, ...): whether each step is no padding."""
    check_shape("lengths", lengths, "(B,)", (like.shape[0],))
    steps = torch.arange(like.shape[1], device=like.device)
    return steps < lengths.to(like.device).unsqueeze(1)


def rows_together(x: Tensor) -> Tensor:
    """``x`` (S, B, .), in memory laid out as (B, S, .), which is how the operators read it."""
    rows = x.transpose(0, 1)
    return x if rows.is_contiguous() else rows.contiguous().transpose(0, 1)


def last_steps(x: Tensor, lengths: Tensor) -> Tensor:
    """(T, B, Z) to (B, Z): the last valid step of each row, the first where there is none."""
    last = lengths.to(x.device).clamp(min=1) - 1
    return x[last, torch.arange(x.shape[1], device=x.device)]
