# SPDX-License-Identifier: Apache-2.0
"""Workloads of the whole model: a training step, and searches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pyseq.comparison import reference_operators
from pyseq.seq2seq import Seq2Seq
from pyseq.text import Batch
from pyseq.training import training_step
from pyseq.types import PAD, STOP

from . import floors
from .rivals import LoopSeq2Seq
from .workloads import Implementation, ImplementationName, Results, Workload

#: H and V of the models that are searched; embeddings are as wide as the state.
SIZES = ((64, 50), (256, 50), (256, 1000))
STEPS = 20  # T and S
SMOOTHING = 0.1


def workloads() -> list[Workload]:
    """All of them: LSTM, general score, input feeding, a bidirectional encoder."""
    return [
        _seq2seq(),
        *(
            _generate(search, batch, hidden, vocab)
            for hidden, vocab in SIZES
            for search in ("greedy", "beam5")
            for batch in (1, 32)
        ),
    ]


def _model(hidden: int, vocab: int) -> Seq2Seq:
    """Without dropout, so that the implementations can be compared."""
    torch.manual_seed(0)
    return Seq2Seq(vocab, vocab, embedding_size=hidden, hidden_size=hidden, dropout=0.0)


def _tokens(vocab: int, batch: int, steps: int) -> Tensor:
    """Random token ids (B, T) that are not special."""
    return torch.randint(4, vocab, (batch, steps))


def _seq2seq() -> Workload:
    """One update: forward, loss with label smoothing, backward, clipping, Adam."""
    batch, hidden, vocab = 32, 256, 10_000

    def prepare() -> Mapping[ImplementationName, Implementation]:
        model = _model(hidden, vocab)
        loop = LoopSeq2Seq(model)
        lengths = torch.randint(STEPS // 2, STEPS + 1, (batch,))
        source, target = _tokens(vocab, batch, STEPS), _tokens(vocab, batch, STEPS + 1)
        source = source.masked_fill(torch.arange(STEPS) >= lengths.unsqueeze(1), PAD)
        data = Batch(source, lengths, target[:, :-1], target[:, 1:], lines=list(range(batch)))
        # A rate of zero costs as much as any other and leaves the weights as they are, so
        # that every call must give the same result.
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0)

        def results(loss: float) -> Results:
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            return {"loss": torch.tensor(loss), **gradients}

        def step() -> Results:
            clip_norm, label_smoothing = 1e6, SMOOTHING
            return results(
                training_step(
                    model, data, optimizer, clip_norm=clip_norm, label_smoothing=label_smoothing
                )
            )

        def plain_step(run: Callable[..., Tensor]) -> Results:
            optimizer.zero_grad(set_to_none=True)
            logits = run(data.source, data.source_lengths, data.target_in)
            loss = cross_entropy(
                logits.flatten(0, 1),
                data.target_out.flatten(),
                ignore_index=PAD,
                label_smoothing=SMOOTHING,
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
            optimizer.step()
            return results(loss.item())

        def reference_step() -> Results:
            with reference_operators():
                return plain_step(model)

        return {"pyseq": step, "torch": lambda: plain_step(loop), "reference": reference_step}

    sizes = {"source": STEPS, "batch": batch, "inputs": hidden, "hidden": hidden}
    cost = (
        floors.encode("lstm", **sizes)
        + floors.decode("lstm", steps=STEPS, **sizes)
        + floors.product(batch * STEPS, hidden, vocab)
    )
    return Workload(
        op="seq2seq",
        kind="lstm-general",
        shape=f"B{batch}-H{hidden}-T{STEPS}-S{STEPS}-V{vocab}",
        mode="training",
        tokens=batch * STEPS,
        cost=cost.of("training"),
        prepare=prepare,
        implementations=("pyseq", "torch", "reference"),
    )


def _generate(search: Literal["greedy", "beam5"], batch: int, hidden: int, vocab: int) -> Workload:
    """20 tokens for each source of 20; results are scores, since two sequences that are equally
    likely but for rounding may change places."""
    beam_size = 1 if search == "greedy" else 5

    def prepare() -> Mapping[ImplementationName, Implementation]:
        model = _model(hidden, vocab).eval()
        with torch.no_grad():
            # It never stops by itself, so that every search has the same number of steps.
            model.decoder.output.bias[STOP] = -1e4
        loop = LoopSeq2Seq(model)
        source, lengths = _tokens(vocab, batch, STEPS), torch.full((batch,), STEPS)

        def ours() -> Results:
            found = model.generate(source, lengths, max_length=STEPS, beam_size=beam_size)
            return {"scores": torch.tensor([hypothesis.score for hypothesis in found])}

        def theirs() -> Results:
            if beam_size == 1:
                return {"scores": loop.greedy(source, lengths, max_length=STEPS)}
            scores = loop.beam(source, lengths, max_length=STEPS, beam_size=beam_size)
            return {"scores": scores}

        def plainly() -> Results:
            with reference_operators():
                return ours()

        return {"pyseq": ours, "torch": theirs, "reference": plainly}

    cost = floors.encode("lstm", source=STEPS, batch=batch, inputs=hidden, hidden=hidden)
    cost += floors.search(
        "lstm",
        steps=STEPS,
        source=STEPS,
        batch=batch,
        beam=beam_size,
        hidden=hidden,
        vocab=vocab,
    )
    return Workload(
        op="generate",
        kind=search,
        shape=f"B{batch}-H{hidden}-T{STEPS}-S{STEPS}-V{vocab}",
        mode="inference",
        tokens=batch * STEPS,
        cost=cost,
        prepare=prepare,
        implementations=("pyseq", "torch", "reference"),
    )
