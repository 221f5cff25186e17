# SPDX-License-Identifier: Apache-2.0
"""Copying from the source: a distribution over the vocabulary and the tokens of the source.

A head on top of the decoder, after its loop: all steps at once, in plain torch, and in log space
from end to end. Used by ``seq2seq.Decoder``.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ._checks import check_all, check_smoothing
from .nn._common import Device
from .search.rules import widened
from .types import PAD, UNK, Copies

CopyName = Literal["pointer", "joint"]
COPIES: tuple[str, ...] = ("pointer", "joint")


class Copying(torch.nn.Module):
    """Generates a token of the vocabulary or copies one of the source.

    For the output h of the decoder, the source's positions m_s and the logits g of the
    vocabulary, the copy scores are ``e_s = h^T W m_s``, over positions that may be copied.

    - ``"pointer"``: ``P(y) = p_gen softmax(g)_y + (1 - p_gen) sum_{s: id_s = y} a_s`` with
      ``a = softmax(e)``, ``c = sum_s a_s m_s`` and ``p_gen = sigmoid(w^T [c; h; x] + b)``, x
      being the embedding of the token that was read.
    - ``"joint"``: generating and copying share one softmax,
      ``P(y) = (exp(g_y) + sum_{s: id_s = y} exp(e_s)) / Z``.

    In a row of which nothing may be copied everything is generated. The attention of See et al.
    is that of the decoder and its gate reads the state; here both belong to the head, whose h
    is made of context and state. Gu et al. put a tanh around ``W m_s``.

    Args:
        kind: ``"pointer"`` or ``"joint"``.
        hidden_size, memory_size, embedding_size: H, M, E.
        device, dtype: of the parameters.

    Raises:
        ValueError: ``kind`` is unknown.

    Reference:
        See et al. 2017, arXiv 1704.04368, eq. 8 and 9 (pointer); Gu et al. 2016,
        arXiv 1603.06393, eq. 4 to 8 (joint).
    """

    def __init__(
        self,
        kind: str,
        *,
        hidden_size: int,
        memory_size: int,
        embedding_size: int,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in COPIES:
            raise ValueError(f"copy must be one of {', '.join(COPIES)} or None, got {kind!r}")
        self.query = torch.nn.Linear(
            hidden_size, memory_size, bias=False, device=device, dtype=dtype
        )
        self.gate: torch.nn.Linear | None = None
        if kind == "pointer":
            inputs = memory_size + hidden_size + embedding_size
            self.gate = torch.nn.Linear(inputs, 1, device=device, dtype=dtype)

    def forward(
        self, logits: Tensor, hidden: Tensor, memory: Tensor, embedded: Tensor, copies: Copies
    ) -> Tensor:
        """Log-probabilities of the vocabulary and what follows it.

        Args:
            logits: (B, T, V).
            hidden: (B, T, H), the decoder's output.
            memory: (B, S, M).
            embedded: (B, T, E), what the decoder read.
            copies: the target's token at each source position.

        Returns:
            (B, T, V + X), in nats; minus infinity for ids beyond V that a row's source does
            not have. In float32 where the logits are of a shorter dtype.
        """
        logits = widened(logits)
        generates, copied = self._choices(logits, hidden, memory, embedded, copies)
        generated = torch.log_softmax(logits, 2) + generates
        return _add_copies(F.pad(generated, (0, copies.extra), value=-math.inf), copied, copies.ids)

    def loss(
        self,
        logits: Tensor,
        hidden: Tensor,
        memory: Tensor,
        embedded: Tensor,
        copies: Copies,
        target: Tensor,
        *,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross entropy in nats, averaged over the tokens of ``target`` that are not ``<pad>``.

        Without smoothing no probabilities but those of the target are computed.

        Args:
            logits, hidden, memory, embedded, copies: as in :meth:`forward`.
            target: (B, T) int64, ids below V + X.
            label_smoothing: share of the target probability that is spread over the vocabulary,
                since of the ids beyond it most have no probability.

        Returns:
            0-dimensional; NaN if every token is ``<pad>``.

        Raises:
            ValueError: ``label_smoothing`` is out of its range.
            RuntimeError: a token of the target is neither in the vocabulary nor in a source.
        """
        check_smoothing(label_smoothing)
        vocab = logits.shape[2]
        dtype, logits = logits.dtype, widened(logits)
        same = copies.ids.unsqueeze(1) == target.unsqueeze(2)
        same = same & (copies.ids >= UNK).unsqueeze(1)
        _check_target(target, same, vocab, copies.extra)
        if label_smoothing > 0:
            log_probs = self(logits, hidden, memory, embedded, copies)
            losses = -log_probs.gather(2, target.unsqueeze(2)).squeeze(2)
            spread = -log_probs[:, :, :vocab].mean(2)
            losses = (1 - label_smoothing) * losses + label_smoothing * spread
        else:
            generates, copied = self._choices(logits, hidden, memory, embedded, copies)
            known = target < vocab
            picked = logits.gather(2, target.masked_fill(~known, UNK).unsqueeze(2))
            generated = picked - torch.logsumexp(logits, 2, keepdim=True) + generates
            losses = -_log_sum(generated.squeeze(2), known, copied, same)
        valid = target != PAD
        return (losses.masked_fill(~valid, 0.0).sum() / valid.sum()).to(dtype)

    def _choices(
        self, logits: Tensor, hidden: Tensor, memory: Tensor, embedded: Tensor, copies: Copies
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, T, 1) of generating, and (B, T, S) of copying each position."""
        fixed = (copies.ids < UNK).unsqueeze(1)  # (B, 1, S), what is not copied
        nothing = fixed.all(2, keepdim=True)
        scores = widened(self.query(hidden) @ memory.transpose(1, 2))
        scores = scores.masked_fill(fixed, -math.inf)
        # Finite where there is nothing to choose from, which is masked again below.
        scores = scores.masked_fill(nothing, 0.0)
        attn = torch.log_softmax(scores, 2)
        if self.gate is not None:
            context = attn.exp().masked_fill(fixed, 0.0).to(memory.dtype) @ memory
            gate = widened(self.gate(torch.cat([context, hidden, embedded], 2)))
        else:
            # One softmax over both is one over each, and this gate between them.
            gate = torch.logsumexp(logits, 2, keepdim=True)
            gate = gate - torch.logsumexp(scores, 2, keepdim=True)
        generates = F.logsigmoid(gate).masked_fill(nothing, 0.0)
        return generates, (attn + F.logsigmoid(-gate)).masked_fill(fixed, -math.inf)


def _check_target(target: Tensor, same: Tensor, vocab: int, extra: int) -> None:
    """Raise unless each token is in the vocabulary, or the same as one that the row's own source
    has to copy, (B, T, S) bool."""
    bound = vocab + extra
    check_all(
        target < bound,
        "target_out must be below V + S, the vocabulary and what may be copied",
        lambda: (
            f"target_out must be below {bound}, the vocabulary and what may be copied, got "
            f"{int(target.max())}"
        ),
    )
    missing = (target >= vocab) & ~same.any(2)
    must = f"target_out must hold, from {vocab} on, what the source of its own row has to copy"

    def said() -> str:
        row, step = missing.nonzero()[0].tolist()
        return f"{must}, got {int(target[row, step])} in row {row}, of another row or of none"

    check_all(~missing, must, said)


def _log_sum(generated: Tensor, known: Tensor, copied: Tensor, same: Tensor) -> Tensor:
    """``log(exp(generated) + sum_s exp(copied_s))`` of each target, by its gradient too.

    Args:
        generated: (B, T), which counts where the target is ``known``, (B, T) bool.
        copied: (B, T, S), which counts where it is the ``same``, (B, T, S) bool.
    """
    found = same.any(2)
    # No logarithm is taken of zero, even where it does not count: it would have no gradient.
    terms = copied.masked_fill(~same, -math.inf).masked_fill(~found.unsqueeze(2), 0.0)
    summed = torch.logsumexp(terms, 2)
    alone = torch.where(found, summed, generated.masked_fill(~known, -math.inf))
    return torch.where(found & known, torch.logaddexp(generated, summed), alone)


def _add_copies(generated: Tensor, copied: Tensor, ids: Tensor) -> Tensor:
    """``log(exp(generated_y) + sum_{s: id_s = y} exp(copied_s))``, by its gradient too.

    Args:
        generated: (B, T, W).
        copied: (B, T, S).
        ids: (B, S).
    """
    places = ids.unsqueeze(1).expand_as(copied)
    # Of each token the largest term, so that none of the sums underflows.
    lowest = torch.full_like(generated, -math.inf)
    largest = lowest.scatter_reduce(2, places, copied.detach(), "amax")
    present = largest > -math.inf
    largest = largest.masked_fill(~present, 0.0)
    terms = (copied - largest.gather(2, places)).exp()
    sums = torch.zeros_like(generated).scatter_add(2, places, terms)
    # A logarithm of zero would have no gradient, even where it is not taken.
    logs = sums.masked_fill(~present, 1.0).log() + largest
    return torch.where(present, torch.logaddexp(generated, logs), generated)
