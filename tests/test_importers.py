# SPDX-License-Identifier: Apache-2.0
"""Tests of pyseq.importers: small models in the layout of each library, computed here in plain
torch one sentence at a time, give the same probabilities and outputs once they are read.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import pickle
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn

import pyseq
from pyseq import cli
from pyseq.errors import CheckpointError
from pyseq.importers import g2p_en, load_layers, read_layers, read_model
from pyseq.importers._pickles import load_pickle
from pyseq.text import encode_sources
from pyseq.translator import Translator
from pyseq.types import START, UNK

pytest.importorskip("safetensors", reason="saving needs the extra 'train'")

LETTERS = list("abcdefg")
WORDS = ["ga", "bu", "zo", "meu", "ni", "xa"]
E, H = 5, 6  # sizes of embeddings and states


class Model(nn.Module):
    """A library's model: its names of the weights, and its arithmetic for one sentence."""

    def start(self, source: list[int]) -> Any:
        """The state before the first target symbol; memory included."""
        raise NotImplementedError

    def step(self, state: Any, token: int) -> tuple[Tensor, Any]:
        """The logits (V,) after a target symbol, and the state then."""
        raise NotImplementedError


class Case(NamedTuple):
    """A checkpoint and what it should do."""

    layout: str
    model: Model
    source_symbols: list[str]
    target_symbols: list[str]
    wrap: Callable[[list[int]], list[int]]  # what the library puts around a source
    pad: int
    unk: int
    start: int
    stop: int
    write: Callable[[Path], None]
    options: dict[str, Any] = {}  # noqa: RUF012 (read only)


def embed(table: nn.Embedding, tokens: Sequence[int]) -> Tensor:
    """(T, 1, E) of one sentence."""
    return table(torch.tensor(list(tokens))).unsqueeze(1)


def attend(scores: Tensor, memory: Tensor) -> Tensor:
    """The context (M,) of scores (S,) over a memory (S, M)."""
    return torch.softmax(scores, 0) @ memory


def directions_together(state: Tensor, bidirectional: bool) -> Tensor:
    """(L * D, 1, H) to (L, 1, D * H)."""
    return torch.cat([state[0::2], state[1::2]], 2) if bidirectional else state


# OpenNMT-py


class GlobalAttention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "general":
            self.linear_in = nn.Linear(H, H, bias=False)
        elif kind == "mlp":
            self.linear_context = nn.Linear(H, H, bias=False)
            self.linear_query = nn.Linear(H, H)
            self.v = nn.Linear(H, 1, bias=False)
        self.kind = kind
        self.linear_out = nn.Linear(2 * H, H, bias=kind == "mlp")

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        asked = self.linear_in(query) if self.kind == "general" else query
        if self.kind == "mlp":
            keys = self.linear_context(memory) + self.linear_query(query)
            context = attend(self.v(torch.tanh(keys)).squeeze(1), memory)
            return self.linear_out(torch.cat([context, query]))
        context = attend(memory @ asked, memory)
        return torch.tanh(self.linear_out(torch.cat([context, query])))


class EmbeddingPart(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.make_embedding = nn.Module()
        self.make_embedding.emb_luts = nn.ModuleList([nn.Embedding(count, E)])

    def table(self) -> nn.Embedding:
        return self.make_embedding.emb_luts[0]  # type: ignore[index, return-value]


class OpenNMT(Model):
    def __init__(
        self,
        sizes: tuple[int, int],
        *,
        cell: str,
        kind: str | None,
        feeding: bool,
        bidirectional: bool,
        bridge: bool,
    ) -> None:
        super().__init__()
        layers = 2
        rnn = nn.LSTM if cell == "lstm" else nn.GRU
        one = nn.LSTMCell if cell == "lstm" else nn.GRUCell
        self.lstm, self.feeding, self.bidirectional = cell == "lstm", feeding, bidirectional
        half = H // 2 if bidirectional else H
        self.encoder = nn.Module()
        self.encoder.embeddings = EmbeddingPart(sizes[0])
        self.encoder.rnn = rnn(E, half, layers, bidirectional=bidirectional)
        if bridge:
            self.encoder.bridge = nn.ModuleList(
                nn.Linear(half * layers, half * layers) for _ in range(2 if self.lstm else 1)
            )
        self.decoder = nn.Module()
        self.decoder.embeddings = EmbeddingPart(sizes[1])
        if feeding:
            self.decoder.rnn = nn.Module()
            self.decoder.rnn.layers = nn.ModuleList([one(E + H, H), one(H, H)])
        else:
            self.decoder.rnn = rnn(E, H, layers)
        if kind is not None:
            self.decoder.attn = GlobalAttention(kind)
        self.generator = nn.Linear(H, sizes[1])
        self.half, self.layers = half, layers

    def bridged(self, index: int, part: Tensor) -> Tensor:
        if not hasattr(self.encoder, "bridge"):
            return part
        rows = part.transpose(0, 1).reshape(-1, self.half * self.layers)
        return (
            torch.relu(self.encoder.bridge[index](rows)).reshape(1, -1, self.half).transpose(0, 1)
        )

    def start(self, source: list[int]) -> Any:
        memory, last = self.encoder.rnn(embed(self.encoder.embeddings.table(), source))
        parts = last if self.lstm else (last,)
        state = [
            directions_together(self.bridged(i, part), self.bidirectional)
            for i, part in enumerate(parts)
        ]
        return memory[:, 0], state, torch.zeros(H)

    def step(self, state: Any, token: int) -> tuple[Tensor, Any]:
        memory, parts, feed = state
        x = embed(self.decoder.embeddings.table(), [token])
        if self.feeding:
            inputs = torch.cat([x[0], feed.unsqueeze(0)], 1)
            after: list[list[Tensor]] = []
            for layer, one in enumerate(self.decoder.rnn.layers):
                before = tuple(part[layer] for part in parts)
                new = one(inputs, before if self.lstm else before[0])
                after.append(list(new) if self.lstm else [new])
                inputs = after[-1][0]
            parts = [torch.stack(layers) for layers in zip(*after, strict=True)]
            query = inputs[0]
        else:
            output, new = self.decoder.rnn(x, tuple(parts) if self.lstm else parts[0])
            parts, query = (list(new) if self.lstm else [new]), output[0, 0]
        found = self.decoder.attn(query, memory) if hasattr(self.decoder, "attn") else query
        return self.generator(found), (memory, parts, found)


def opennmt(version: int = 3, start: str | None = None, **given: Any) -> Case:
    options = {"cell": "lstm", "kind": "general", "feeding": True, "bidirectional": True}
    options = {**options, "bridge": False, **given}
    specials = ["<unk>", "<blank>", "<s>", "</s>"]
    source = [*(specials if version == 3 else specials[:2]), *LETTERS]
    target = [*specials, *WORDS]
    model = OpenNMT((len(source), len(target)), **options)

    def write(path: Path) -> None:
        weights = {k: v for k, v in model.state_dict().items() if not k.startswith("generator")}
        prefix = "" if version == 3 else "0."
        generator = {f"{prefix}{k}": v for k, v in model.generator.state_dict().items()}
        vocab: Any = {"src": source, "tgt": target, "data_task": "seq2seq"}
        if start is not None:
            vocab["decoder_start_token"] = start
        if version < 3:
            vocab = fields(source, target, version)
        opt = argparse.Namespace(rnn_type="LSTM", global_attention_function="softmax")
        content = {"model": weights, "generator": generator, "vocab": vocab, "opt": opt}
        # Version 1 is of a time when torch wrote no archives.
        torch.save(
            {**content, "optim": {"step": 3}}, path, _use_new_zipfile_serialization=version > 1
        )

    begin = 3 if start == "</s>" else 2
    return Case("opennmt", model, source, target, list, 1, 0, begin, 3, write)


class Elsewhere:
    """Makes objects of classes that exist only while a checkpoint is written."""

    def __init__(self, module: str, name: str) -> None:
        self.class_ = type(name, (), {"__module__": module})
        self.names = [module.rpartition(".")[0], module] if "." in module else [module]

    def make(self, **state: Any) -> Any:
        made = self.class_()
        made.__dict__.update(state)
        for name in self.names:
            sys.modules.setdefault(name, ModuleType(name))
        setattr(sys.modules[self.names[-1]], self.class_.__name__, self.class_)
        return made


def fields(source: list[str], target: list[str], version: int) -> Any:
    """Vocabularies as torchtext's objects: in fields in version 2, alone in version 1."""
    vocab = Elsewhere("torchtext_gone.vocab", "Vocab")
    sides = {}
    for name, symbols in (("src", source), ("tgt", target)):
        stoi = defaultdict(int, {symbol: index for index, symbol in enumerate(symbols)})
        sides[name] = vocab.make(itos=symbols, stoi=stoi, freqs=Counter(symbols))
    if version == 1:
        return list(sides.items())
    field = Elsewhere("torchtext_gone.data", "Field")
    return {name: field.make(vocab=side, lower=False) for name, side in sides.items()}


@pytest.fixture(autouse=True)
def forget_what_is_elsewhere() -> Any:
    """Reading must do without the modules that writing needed."""
    yield
    for name in list(sys.modules):
        if name.startswith("torchtext_gone"):
            del sys.modules[name]


# fairseq


class Fairseq(Model):
    def __init__(
        self,
        sizes: tuple[int, int],
        *,
        layers: int,
        bidirectional: bool,
        encoder_size: int,
        share: bool,
        inner: int | None,
    ) -> None:
        super().__init__()
        self.layers, self.bidirectional = layers, bidirectional
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.embed_tokens = nn.Embedding(sizes[0], E)
        self.encoder.lstm = nn.LSTM(E, encoder_size, layers, bidirectional=bidirectional)
        memory_size = encoder_size * (2 if bidirectional else 1)
        width = H if inner is None else inner
        embedding = width if share else E
        self.decoder.embed_tokens = nn.Embedding(sizes[1], embedding)
        if memory_size != H:
            self.decoder.encoder_hidden_proj = nn.Linear(memory_size, H)
            self.decoder.encoder_cell_proj = nn.Linear(memory_size, H)
        self.decoder.layers = nn.ModuleList(
            nn.LSTMCell(embedding + H if layer == 0 else H, H) for layer in range(layers)
        )
        self.decoder.attention = nn.Module()
        self.decoder.attention.input_proj = nn.Linear(H, memory_size, bias=False)
        self.decoder.attention.output_proj = nn.Linear(H + memory_size, H, bias=False)
        if inner is not None:
            self.decoder.additional_fc = nn.Linear(H, inner)
        if not share:
            self.decoder.fc_out = nn.Linear(width, sizes[1])

    def start(self, source: list[int]) -> Any:
        memory, last = self.encoder.lstm(embed(self.encoder.embed_tokens, source))
        parts = [directions_together(part, self.bidirectional) for part in last]
        if hasattr(self.decoder, "encoder_hidden_proj"):
            parts = [
                self.decoder.encoder_hidden_proj(parts[0]),
                self.decoder.encoder_cell_proj(parts[1]),
            ]
        return memory[:, 0], parts, torch.zeros(1, H)

    def step(self, state: Any, token: int) -> tuple[Tensor, Any]:
        memory, (h, c), feed = state
        inputs = torch.cat([embed(self.decoder.embed_tokens, [token])[0], feed], 1)
        hidden, cells = [], []
        for layer, one in enumerate(self.decoder.layers):
            inputs, cell = one(inputs, (h[layer], c[layer]))
            hidden.append(inputs)
            cells.append(cell)
        scores = memory @ self.decoder.attention.input_proj(inputs[0])
        joined = torch.cat([attend(scores, memory), inputs[0]])
        out = torch.tanh(self.decoder.attention.output_proj(joined))
        x = self.decoder.additional_fc(out) if hasattr(self.decoder, "additional_fc") else out
        if hasattr(self.decoder, "fc_out"):
            logits = self.decoder.fc_out(x)
        else:
            logits = self.decoder.embed_tokens.weight @ x
        return logits, (memory, (torch.stack(hidden), torch.stack(cells)), out.unsqueeze(0))


def fairseq(tmp: Path, *, known: bool = True, **given: Any) -> Case:
    options = {"layers": 2, "bidirectional": True, "encoder_size": 4, "share": False}
    options = {**options, "inner": None, **given}
    source, target = (["<s>", "<pad>", "</s>", "<unk>", *words] for words in (LETTERS, WORDS))
    model = Fairseq((len(source), len(target)), **options)

    def write(path: Path) -> None:
        args = argparse.Namespace(arch="lstm", decoder_layers=2)
        weights = {**model.state_dict(), "encoder.version": torch.tensor([2])}
        torch.save({"args": args, "model": weights, "extra_state": {"epoch": 1}}, path)
        for name, symbols in (("src", source), ("tgt", target)):
            lines = [f"{symbol} {9 - i}" for i, symbol in enumerate(symbols[4:])]
            (tmp / f"dict.{name}.txt").write_text("\n".join(lines) + "\n")

    files = {"source_vocab": tmp / "dict.src.txt", "target_vocab": tmp / "dict.tgt.txt"}

    def wrap(ids: list[int]) -> list[int]:
        return [*ids, 2]

    return Case("fairseq", model, source, target, wrap, 1, 3, 2, 2, write, files if known else {})


# JoeyNMT


class Joey(Model):
    def __init__(
        self,
        sizes: tuple[int, int],
        *,
        cell: str,
        kind: str,
        initial: str,
        feeding: bool,
        scale: bool,
        half: int,
    ) -> None:
        super().__init__()
        self.lstm, self.kind, self.initial, self.feeding = cell == "lstm", kind, initial, feeding
        self.scale = math.sqrt(E) if scale else 1.0
        rnn = nn.LSTM if self.lstm else nn.GRU
        for side, count in zip(("src", "trg"), sizes, strict=True):
            part = nn.Module()
            part.lut = nn.Embedding(count, E)
            setattr(self, f"{side}_embed", part)
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.rnn = rnn(E, half, 2, bidirectional=True)
        self.decoder.rnn = rnn(E + (H if feeding else 0), H, 2)
        self.decoder.att_vector_layer = nn.Linear(H + 2 * half, H)
        self.decoder.output_layer = nn.Linear(H, sizes[1], bias=False)
        self.decoder.attention = nn.Module()
        self.decoder.attention.key_layer = nn.Linear(2 * half, H, bias=False)
        if kind == "bahdanau":
            self.decoder.attention.query_layer = nn.Linear(H, H, bias=False)
            self.decoder.attention.energy_layer = nn.Linear(H, 1, bias=False)
        if initial == "bridge":
            self.decoder.bridge_layer = nn.Linear(2 * half, H)

    def start(self, source: list[int]) -> Any:
        memory, last = self.encoder.rnn(embed(self.src_embed.lut, source) * self.scale)
        h = last[0] if self.lstm else last
        final = torch.cat([h[-2], h[-1]], 1)
        if self.initial == "bridge":
            first = torch.tanh(self.decoder.bridge_layer(final))
        elif self.initial == "last":
            first = final[:, :H]
        else:
            first = torch.zeros(1, H)
        first = first.expand(2, 1, H).contiguous()
        return memory[:, 0], ((first, first) if self.lstm else first), torch.zeros(1, 1, H)

    def step(self, state: Any, token: int) -> tuple[Tensor, Any]:
        memory, hidden, feed = state
        x = embed(self.trg_embed.lut, [token]) * self.scale
        output, hidden = self.decoder.rnn(torch.cat([x, feed], 2) if self.feeding else x, hidden)
        query, keys = output[0, 0], self.decoder.attention.key_layer(memory)
        if self.kind == "bahdanau":
            asked = self.decoder.attention.query_layer(query)
            scores = self.decoder.attention.energy_layer(torch.tanh(asked + keys)).squeeze(1)
        else:
            scores = keys @ query
        joined = torch.cat([query, attend(scores, memory)])
        vector = torch.tanh(self.decoder.att_vector_layer(joined))
        return self.decoder.output_layer(vector), (memory, hidden, vector.reshape(1, 1, H))


def joey(tmp: Path, **given: Any) -> Case:
    options = {"cell": "gru", "kind": "bahdanau", "initial": "bridge", "feeding": True}
    options = {**options, "scale": False, "half": 4, **given}
    source, target = (["<unk>", "<pad>", "<s>", "</s>", *words] for words in (LETTERS, WORDS))
    model = Joey((len(source), len(target)), **options)

    def write(path: Path) -> None:
        torch.save({"steps": 10, "model_state": model.state_dict(), "scaler_state": None}, path)
        (tmp / "src_vocab.txt").write_text("\n".join(source))
        (tmp / "trg_vocab.txt").write_text("\n".join(target) + "\n")

    extra: dict[str, Any] = {"scaled_embeddings": options["scale"]}
    if options["initial"] != "bridge":
        extra["initial_state"] = options["initial"]
    files = {"source_vocab": tmp / "src_vocab.txt", "target_vocab": tmp / "trg_vocab.txt"}

    def wrap(ids: list[int]) -> list[int]:
        return [*ids, 3]

    return Case("joeynmt", model, source, target, wrap, 1, 0, 2, 3, write, {**files, **extra})


# Stanza


class Stanza(Model):
    def __init__(self, count: int, *, kind: str, layers: int) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(count, E)
        self.encoder = nn.LSTM(E, H // 2, layers, bidirectional=True)
        self.decoder = nn.Module()
        self.decoder.lstm_cell = nn.LSTMCell(E, H)
        attention = nn.Module()
        attention.linear_in = nn.Linear(H, H, bias=False)
        attention.linear_out = nn.Linear(2 * H, H, bias=False)
        if kind == "mlp":
            attention.linear_c = nn.Linear(H, H)
            attention.linear_v = nn.Linear(H, 1, bias=False)
        self.decoder.attention_layer = attention
        self.dec2vocab = nn.Linear(H, count)

    def start(self, source: list[int]) -> Any:
        memory, last = self.encoder(embed(self.embedding, source))
        h, c = (torch.cat([part[-1], part[-2]], 1) for part in last)
        return memory[:, 0], (h, c)

    def step(self, state: Any, token: int) -> tuple[Tensor, Any]:
        memory, hidden = state
        hidden = self.decoder.lstm_cell(embed(self.embedding, [token])[0], hidden)
        query, attention = hidden[0][0], self.decoder.attention_layer
        asked = attention.linear_in(query)
        if self.kind == "mlp":
            scores = attention.linear_v(torch.tanh(asked + attention.linear_c(memory))).squeeze(1)
        else:
            scores = memory @ asked
        found = torch.tanh(attention.linear_out(torch.cat([attend(scores, memory), query])))
        return self.dec2vocab(found), (memory, hidden)


def stanza(**given: Any) -> Case:
    symbols = ["<PAD>", "<UNK>", "<SOS>", "<EOS>", *LETTERS]
    model = Stanza(len(symbols), **{"kind": "soft", "layers": 2, **given})

    def write(path: Path) -> None:
        vocab = {
            "lang": "xx",
            "_id2unit": symbols,
            "_unit2id": {s: i for i, s in enumerate(symbols)},
        }
        config = {"hidden_dim": H, "attn_type": model.kind}
        weights = {**model.state_dict(), "SOS_tensor": torch.tensor([2])}
        content = {"model": weights, "config": config, "vocab": vocab, "dict": {"ab": "a b"}}
        torch.save(content, path, _use_new_zipfile_serialization=False)

    def wrap(ids: list[int]) -> list[int]:
        return [2, *ids, 3]

    return Case("stanza", model, symbols, symbols, wrap, 0, 1, 2, 3, write)


# g2p-en


class G2P(Model):
    def __init__(self) -> None:
        super().__init__()
        self.enc_emb = nn.Embedding(len(g2p_en.GRAPHEMES), E)
        self.dec_emb = nn.Embedding(len(g2p_en.PHONEMES), E)
        self.enc, self.dec = nn.GRU(E, H), nn.GRUCell(E, H)
        self.fc = nn.Linear(H, len(g2p_en.PHONEMES))

    def start(self, source: list[int]) -> Any:
        return self.enc(embed(self.enc_emb, source))[1][0]

    def step(self, state: Any, token: int) -> tuple[Tensor, Any]:
        state = self.dec(embed(self.dec_emb, [token])[0], state)
        return self.fc(state[0]), state

    def arrays(self) -> dict[str, Any]:
        found = {"enc_emb": self.enc_emb.weight, "dec_emb": self.dec_emb.weight}
        found |= {"fc_w": self.fc.weight, "fc_b": self.fc.bias}
        for side, layer, suffix in (("enc", self.enc, "_l0"), ("dec", self.dec, "")):
            for kind in ("weight", "bias"):
                for name in ("ih", "hh"):
                    value = getattr(layer, f"{kind}_{name}{suffix}")
                    found[f"{side}_{kind[0]}_{name}"] = value
        return {name: value.detach().numpy() for name, value in found.items()}


def g2p() -> Case:
    model = G2P()

    def write(path: Path) -> None:
        with open(path, "wb") as stream:
            numpy.savez(stream, **model.arrays())

    def wrap(ids: list[int]) -> list[int]:
        return [*ids, 2]

    graphemes, phonemes = list(g2p_en.GRAPHEMES), list(g2p_en.PHONEMES)
    return Case("g2p-en", model, graphemes, phonemes, wrap, 0, 1, 2, 3, write)


CASES: dict[str, Callable[[Path], Case]] = {
    "opennmt-3-lstm-general-feeding": lambda _: opennmt(),
    "opennmt-3-starts-with-stop": lambda _: opennmt(start="</s>"),
    "opennmt-2-gru-dot": lambda _: opennmt(2, cell="gru", kind="dot", feeding=False),
    "opennmt-1-gru-general-bridge": lambda _: opennmt(1, cell="gru", bridge=True),
    "opennmt-3-lstm-bridge-one-direction": lambda _: opennmt(bridge=True, bidirectional=False),
    "opennmt-2-lstm-bridge-both-directions": lambda _: opennmt(2, bridge=True),
    "opennmt-3-lstm-no-attention": lambda _: opennmt(kind=None, feeding=False),
    "opennmt-3-lstm-mlp-feeding": lambda _: opennmt(kind="mlp"),
    "opennmt-2-gru-mlp": lambda _: opennmt(2, kind="mlp", cell="gru", feeding=False),
    "fairseq-other-sizes": lambda tmp: fairseq(tmp),
    "fairseq-same-sizes-one-direction": lambda tmp: fairseq(
        tmp, bidirectional=False, encoder_size=H, layers=1
    ),
    "fairseq-shared-and-inner-layer": lambda tmp: fairseq(tmp, share=True, inner=7),
    "fairseq-inner-layer": lambda tmp: fairseq(tmp, inner=4),
    "joeynmt-gru-bahdanau-bridge": lambda tmp: joey(tmp),
    "joeynmt-gru-luong-last": lambda tmp: joey(tmp, kind="luong", initial="last", half=H),
    "joeynmt-lstm-luong-zero-scaled": lambda tmp: joey(
        tmp, cell="lstm", kind="luong", initial="zero", feeding=False, scale=True
    ),
    "joeynmt-lstm-bahdanau-bridge": lambda tmp: joey(tmp, cell="lstm"),
    "joeynmt-lstm-luong-last": lambda tmp: joey(
        tmp, cell="lstm", kind="luong", initial="last", half=H // 2
    ),
    "stanza-soft": lambda _: stanza(),
    "stanza-mlp-one-layer": lambda _: stanza(kind="mlp", layers=1),
    "g2p-en": lambda _: g2p(),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    made = CASES[request.param](tmp_path)
    with torch.no_grad():
        for weight in made.model.parameters():
            weight.mul_(2)  # else every output is the same
    made.write(tmp_path / "model")
    for name in list(sys.modules):
        if name.startswith("torchtext_gone"):
            del sys.modules[name]
    return made


def log_probabilities(model: Model, source: list[int], target: list[int]) -> Tensor:
    """(T, V) after each symbol of a target that begins with the start."""
    state, rows = model.start(source), []
    for token in target:
        logits, state = model.step(state, token)
        rows.append(torch.log_softmax(logits, 0))
    return torch.stack(rows)


def greedy(case: Case, source: list[int], length: int) -> list[int]:
    state, token, found = case.model.start(source), case.start, list[int]()
    for _ in range(length):
        logits, state = case.model.step(state, token)
        # What a search does not emit: <pad>, and <start> where <stop> is another symbol.
        logits[[case.pad, *({case.start} - {case.stop})]] = -math.inf
        token = int(logits.argmax())
        if token == case.stop:
            break
        found.append(token)
    return found


SENTENCES = ["abcde", "g", "bad", "caged"]


@torch.no_grad()
def test_the_model_gives_the_same_output(case: Case, tmp_path: Path) -> None:
    found = read_model(case.layout, tmp_path / "model", **case.options)
    sources = [[case.source_symbols.index(letter) for letter in line] for line in SENTENCES]
    # Their ids of our target symbols; the first four of ours are special.
    theirs = [case.target_symbols.index(symbol) for symbol in found.target_vocab.symbols[4:]]
    targets = [theirs[n % len(theirs) :][:3] for n in (0, 2, 1, 3)]
    source, lengths = encode_sources(
        found.source_vocab, [list(line) for line in SENTENCES], marks=found.source_marks
    )
    target_in = torch.tensor(
        [[START, *(4 + theirs.index(token) for token in target)] for target in targets]
    )
    logits = found.model(source, lengths, target_in)
    ours = torch.log_softmax(logits, 2)
    for row, (line, target) in enumerate(zip(sources, targets, strict=True)):
        expected = log_probabilities(case.model, case.wrap(line), [case.start, *target])
        torch.testing.assert_close(ours[row, :, 4:], expected[:, theirs], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[row, :, 2], expected[:, case.stop], rtol=1e-4, atol=1e-5)
    for line, hypothesis in zip(
        sources, found.model.generate(source, lengths, max_length=9), strict=True
    ):
        tokens = greedy(case, case.wrap(line), 9)
        assert hypothesis.tokens == [
            UNK if token == case.unk else 4 + theirs.index(token) for token in tokens
        ]


def test_text_goes_through_the_saved_model(case: Case, tmp_path: Path) -> None:
    found = read_model(case.layout, tmp_path / "model", **case.options)
    found.save(tmp_path / "out")
    loaded = Translator.load(tmp_path / "out")
    joined = (" " if found.source_tokenizer.name == "space" else "").join("bad")
    (result,), (again,) = found.translate([joined]), loaded.translate([joined])
    assert (result.text, result.score) == (again.text, again.score)
    if result.weights is not None:
        # One column for each letter and one for what is around them.
        assert result.weights.shape == (len(result.tokens), 4)
        torch.testing.assert_close(result.weights.sum(1), torch.ones(len(result.tokens)))


# What is refused.


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def test_an_unknown_weight_is_refused_with_the_list_of_keys(tmp_path: Path) -> None:
    case = opennmt()
    case.write(tmp_path / "model")
    rewrite(tmp_path / "model", lambda c: c["model"].update({"decoder.copy.weight": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"no place for decoder\.copy\.weight") as raised:
        read_model("opennmt", tmp_path / "model")
    assert "encoder.rnn.weight_ih_l0, " in str(raised.value)


def test_another_layout_is_refused_with_the_list_of_keys(tmp_path: Path) -> None:
    joey(tmp_path).write(tmp_path / "model")
    with pytest.raises(CheckpointError, match="'model', got steps, model_state, scaler_state"):
        read_model("fairseq", tmp_path / "model")
    stanza().write(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"encoder\.rnn\.weight_ih_l0 is missing.*dec2vocab"):
        read_model("opennmt", tmp_path / "model")
    with pytest.raises(CheckpointError, match="not a file of numpy arrays"):
        read_model("g2p-en", tmp_path / "model")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp: joey(tmp, initial="last"), "must have 6 numbers or twice as many, got 8"),
    ],
)
def test_what_pyseq_does_not_have_is_named(
    make: Callable[[Path], Case], message: str, tmp_path: Path
) -> None:
    case = make(tmp_path)
    case.write(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message):
        read_model(case.layout, tmp_path / "model", **case.options)


def test_an_unknown_start_is_refused(tmp_path: Path) -> None:
    opennmt(start="<go>").write(tmp_path / "model")
    with pytest.raises(CheckpointError, match="no symbol '<go>', with which the decoder starts"):
        read_model("opennmt", tmp_path / "model")


def test_two_cells_in_one_model_are_refused(tmp_path: Path) -> None:
    case = joey(tmp_path)
    case.write(tmp_path / "model")

    def change(content: dict[str, Any]) -> None:
        for name in list(content["model_state"]):
            if name.startswith("encoder.rnn."):
                tensor = content["model_state"][name]
                more = tensor[: len(tensor) // 3]
                content["model_state"][name] = torch.cat([tensor, more])

    rewrite(tmp_path / "model", change)
    with pytest.raises(CheckpointError, match="the same cell, got lstm and gru; its weights are"):
        read_model("joeynmt", tmp_path / "model", **case.options)


def test_numbers_that_only_repeat_are_refused(tmp_path: Path) -> None:
    case = joey(tmp_path)
    case.write(tmp_path / "model")
    huge = torch.zeros(1).expand(1 << 40, 4)
    rewrite(tmp_path / "model", lambda c: c["model_state"].update({"src_embed.lut.weight": huge}))
    with pytest.raises(CheckpointError, match="fewer numbers in the file than its shape"):
        read_model("joeynmt", tmp_path / "model", **case.options)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_unknown_classes_are_found_in_one_reading(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"a": argparse.Namespace(x=1), "b": Counter("ab"), "c": Path("d")}
    torch.save(
        {"model": {}, "opt": values}, tmp_path / "file", _use_new_zipfile_serialization=zipped
    )
    loads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: (loads.append(1), load(*a, **k))[1])
    found = load_pickle(tmp_path / "file")
    assert found["opt"]["a"].get("x") == 1
    assert not zipped or len(loads) == 1


@pytest.mark.parametrize("name", ["decoder.rnn.weight_hh_l0", "src_embed.lut.weight"])
@pytest.mark.parametrize("shape", [(), (3,), (1, 1), (4, 0), (2, 2, 2)], ids=str)
def test_other_shapes_are_refused(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    case = joey(tmp_path)
    case.write(tmp_path / "model")
    rewrite(tmp_path / "model", lambda c: c["model_state"].update({name: torch.ones(shape)}))
    with pytest.raises(CheckpointError, match="model: "):
        read_model("joeynmt", tmp_path / "model")


def test_an_initial_state_is_not_guessed(tmp_path: Path) -> None:
    joey(tmp_path, initial="zero").write(tmp_path / "model")
    with pytest.raises(CheckpointError, match="does not say what the decoder starts from"):
        read_model("joeynmt", tmp_path / "model")
    with pytest.raises(ValueError, match="go with the layout 'joeynmt', got 'stanza'"):
        read_model("stanza", tmp_path / "model", initial_state="zero")
    joey(tmp_path).write(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"starts from a bridge .*leave the initial"):
        read_model("joeynmt", tmp_path / "model", initial_state="zero")
    with pytest.raises(ValueError, match="one vocabulary for both sides"):
        read_model("stanza", tmp_path / "model", source_vocab="a", target_vocab="b")
    with pytest.raises(ValueError, match="layout must be one of opennmt, fairseq"):
        read_model("marian", tmp_path / "model")


def test_options_that_show_in_no_weight_are_refused(tmp_path: Path) -> None:
    opennmt().write(tmp_path / "model")
    opt = argparse.Namespace(global_attention_function="sparsemax")
    rewrite(tmp_path / "model", lambda content: content.update(opt=opt))
    with pytest.raises(CheckpointError, match="no global_attention_function = 'sparsemax'"):
        read_model("opennmt", tmp_path / "model")


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    case = fairseq(tmp_path)
    case.write(tmp_path / "model")
    (tmp_path / "dict.tgt.txt").write_text("ga 1\n")
    with pytest.raises(CheckpointError, match=r"dict.tgt.txt: the model has 10 symbols .* of 5"):
        read_model("fairseq", tmp_path / "model", **case.options)


def test_a_target_must_begin_and_end(tmp_path: Path) -> None:
    case = opennmt()
    case.write(tmp_path / "model")
    (tmp_path / "words").write_text("\r\n".join(f"w{n}" for n in range(len(case.target_symbols))))
    with pytest.raises(CheckpointError, match="no symbol of its target vocabulary begins, or ends"):
        read_model("opennmt", tmp_path / "model", target_vocab=tmp_path / "words")


def test_symbols_without_a_vocabulary_are_called_by_their_ids(tmp_path: Path) -> None:
    fairseq(tmp_path).write(tmp_path / "model")
    found = read_model("fairseq", tmp_path / "model")
    assert found.target_vocab.symbols[4:6] == ("#0", "#4")


class Bomb:
    """Leaves a file when it is unpickled as pickle does it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("command", [False, True])
def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, command: bool) -> None:
    opennmt().write(tmp_path / "model")
    trap: Any = Bomb(tmp_path / "burnt")
    if command:
        trap = type("Command", (), {"__reduce__": lambda _: (os.system, ("true",))})()
    content = torch.load(tmp_path / "model", weights_only=False)
    torch.save({**content, "trap": trap}, tmp_path / "model")
    if command:
        with pytest.raises(CheckpointError, match="cannot be read without running what is in it"):
            read_model("opennmt", tmp_path / "model")
    else:
        read_model("opennmt", tmp_path / "model")
        assert not (tmp_path / "burnt").exists()
    arrays = io.BytesIO()
    numpy.savez(arrays, enc_emb=numpy.array([trap], dtype=object))
    (tmp_path / "arrays").write_bytes(arrays.getvalue())
    with pytest.raises(CheckpointError, match="not a file of numpy arrays"):
        read_model("g2p-en", tmp_path / "arrays")
    assert not (tmp_path / "burnt").exists()


def test_a_damaged_file_of_arrays(tmp_path: Path) -> None:
    arrays = io.BytesIO()
    numpy.savez_compressed(arrays, enc_emb=numpy.arange(1000.0))
    whole = arrays.getvalue()
    damaged = {"cut": whole[:1000], "changed": whole[:200] + bytes(99) + whole[299:]}
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match="not a file of numpy arrays"):
            read_model("g2p-en", tmp_path / name)


@pytest.mark.parametrize(
    "data",
    [b"", b"no checkpoint", pickle.dumps([1], protocol=2)],
    ids=["empty", "text", "a plain pickle"],
)
def test_a_file_that_is_no_checkpoint(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model").write_bytes(data)
    for layout in ("opennmt", "joeynmt", "g2p-en"):
        with pytest.raises(CheckpointError, match=r"model: "):
            read_model(layout, tmp_path / "model")
    with pytest.raises(FileNotFoundError):
        read_model("opennmt", tmp_path / "missing")


# Layers.


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(3, 4, 2, bidirectional=True),
        nn.LSTM(3, 4, proj_size=2),
        nn.GRU(3, 5, bias=False),
        nn.RNN(3, 4, nonlinearity="relu"),
    ],
    ids=["lstm", "projected", "gru", "rnn"],
)
def test_layers_of_torch(layer: Any, tmp_path: Path) -> None:
    torch.save({"inner": layer.state_dict()}, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"has no recurrent layer of torch\.nn or haste, but"):
        read_layers(tmp_path / "other")
    model = nn.Sequential(nn.Linear(2, 3), layer)
    torch.save(model.state_dict(), tmp_path / "state")
    found = read_layers(tmp_path / "state", nonlinearity="relu")
    assert list(found) == ["1"]
    assert type(found["1"]).__module__ == "pyseq.nn"
    x = torch.randn(6, 2, 3)
    torch.testing.assert_close(found["1"](x)[0], layer(x)[0])
    assert list(read_layers(layer.state_dict())) == [""]


def haste_normed(rows: Tensor, weights: dict[str, Tensor], part: int) -> Tensor:
    if "gamma" not in weights:
        return rows
    return nn.functional.layer_norm(rows, rows.shape[-1:], weights["gamma"][part])


def haste_lstm(x: Tensor, weights: dict[str, Tensor], zoneout: float = 0.0) -> Tensor:
    h = c = torch.zeros(x.shape[1], len(weights["recurrent_kernel"]))
    steps = []
    for step in x:
        gates = haste_normed(step @ weights["kernel"], weights, 0) + weights["bias"]
        gates = gates + haste_normed(h @ weights["recurrent_kernel"], weights, 1)
        i, g, f, o = gates.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        seen = c
        if "gamma_h" in weights:
            size = c.shape[-1:]
            seen = nn.functional.layer_norm(c, size, weights["gamma_h"], weights["beta_h"])
        h = zoneout * h + (1 - zoneout) * torch.sigmoid(o) * torch.tanh(seen)
        steps.append(h)
    return torch.stack(steps)


def haste_gru(x: Tensor, weights: dict[str, Tensor], zoneout: float = 0.0) -> Tensor:
    h = torch.zeros(x.shape[1], len(weights["recurrent_kernel"]))
    steps = []
    for step in x:
        of_x = haste_normed(step @ weights["kernel"], weights, 0) + weights["bias"]
        of_h = haste_normed(h @ weights["recurrent_kernel"], weights, 1)
        zx, rx, gx = of_x.chunk(3, 1)
        zh, rh, gh = (of_h + weights["recurrent_bias"]).chunk(3, 1)
        z, r = torch.sigmoid(zx + zh), torch.sigmoid(rx + rh)
        new = z * h + (1 - z) * torch.tanh(gx + r * gh)
        h = zoneout * h + (1 - zoneout) * new
        steps.append(h)
    return torch.stack(steps)


@pytest.mark.parametrize(("gates", "compute"), [(4, haste_lstm), (3, haste_gru)])
def test_layers_of_haste(gates: int, compute: Callable[..., Tensor]) -> None:
    weights = {"kernel": torch.randn(3, gates * 5), "recurrent_kernel": torch.randn(5, gates * 5)}
    weights["bias"] = torch.randn(gates * 5)
    if gates == 3:
        weights["recurrent_bias"] = torch.randn(gates * 5)
    x = torch.randn(6, 2, 3)
    found = read_layers({f"rnn.{name}": value for name, value in weights.items()})["rnn"]
    torch.testing.assert_close(found(x)[0], compute(x, weights))
    zoned = read_layers(weights, zoneout=0.25)[""]
    torch.testing.assert_close(zoned(x)[0], compute(x, weights, zoneout=0.25))
    weights["gamma"] = torch.rand(2, gates * 5)
    if gates == 4:
        weights |= {"gamma_h": torch.rand(5), "beta_h": torch.rand(5)}
    normed = read_layers(weights)[""]
    torch.testing.assert_close(normed(x)[0], compute(x, weights))
    with pytest.raises(CheckpointError, match="no place for gamma_x; its weights are: kernel,"):
        read_layers({**weights, "gamma_x": torch.ones(2)})
    with pytest.raises(ValueError, match="zoneout must be a probability, got 2"):
        read_layers(weights, zoneout=2)
    with pytest.raises(CheckpointError, match="20 columns are no gates of 4 units"):
        read_layers({**weights, "recurrent_kernel": torch.randn(4, 20)})


def test_an_indrnn_of_haste() -> None:
    weights = {"kernel": torch.randn(3, 5), "recurrent_scale": torch.randn(5)}
    weights["bias"] = torch.randn(5)
    x, h = torch.randn(6, 2, 3), torch.zeros(2, 5)
    steps = []
    for step in x:
        h = torch.tanh(step @ weights["kernel"] + h * weights["recurrent_scale"] + weights["bias"])
        steps.append(h)
    found = read_layers(weights)[""]
    assert isinstance(found, pyseq.nn.IndRNN)
    torch.testing.assert_close(found(x)[0], torch.stack(steps))


CELLS = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_cells_of_torch(kind: str, bias: bool) -> None:
    model = nn.ModuleList([nn.Linear(2, 2), CELLS[kind](3, 4, bias=bias)])
    found = read_layers(model.state_dict())
    assert list(found) == ["1"]
    x = torch.randn(2, 3)
    expected, got = model[1](x), found["1"](x)
    for ours, theirs in zip(
        *((r if kind == "lstm" else (r,)) for r in (got, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_layers_go_through_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors", reason="layers are saved with the extra 'train'")
    model = nn.ModuleDict({"a": nn.GRU(3, 4, 2, bidirectional=True), "b": nn.LSTMCell(3, 4)})
    model["c"] = nn.RNN(3, 4, bias=False, nonlinearity="relu")
    torch.save(model.state_dict(), tmp_path / "state")
    out = str(tmp_path / "layers.safetensors")
    arguments = ["import", str(tmp_path / "state"), "--from", "layers", "--out", out]
    assert cli.main([*arguments, "--nonlinearity", "relu"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[1] == "pyseq: b: LSTMCell(input_size=3, hidden_size=4, bias=True)"
    found = load_layers(out)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(found["a"](x)[0], model["a"](x)[0])
    torch.testing.assert_close(found["b"](x[0])[0], model["b"](x[0])[0])
    torch.testing.assert_close(found["c"](x)[0], model["c"](x)[0])
    assert cli.main(arguments) == 1
    assert "is there already; give --overwrite" in capsys.readouterr().err
    assert cli.main([*arguments, "--initial-state", "zero"]) == 1
    assert "--initial-state does not go with --from layers" in capsys.readouterr().err
    assert cli.main([*arguments[:3], "stanza", "--out", out, "--zoneout", "0.1"]) == 1
    assert "--zoneout does not go with --from stanza" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kind, sizes: (kind, {**sizes, "hidden_size": 60000}), "size mismatch for"),
        (lambda kind, sizes: ("Linear", sizes), "must be one of RNN, .*got Linear"),
        (lambda kind, sizes: (kind, {**sizes, "num_layers": 10**9}), "4 tensors for 1000000000"),
        (lambda kind, sizes: (kind, {**sizes, "depth": 1}), "unexpected keyword argument 'depth'"),
        (lambda kind, sizes: 3, "not a file of layers"),
    ],
)
def test_a_damaged_file_of_layers_is_refused(
    change: Callable[[str, dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="needs the extra 'train'")
    layer, path = nn.GRU(3, 4), tmp_path / "layers"
    record = {"a": change("GRU", {"input_size": 3, "hidden_size": 4})}
    state = {f"a.{name}": value for name, value in layer.state_dict().items()}
    path.write_bytes(safetensors.save(state, metadata={"pyseq.layers": json.dumps(record)}))
    with pytest.raises(CheckpointError, match=message):
        load_layers(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="not a file of layers"):
        load_layers(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        load_layers(tmp_path / "missing")


def test_layers_of_other_shapes_are_refused() -> None:
    state = nn.GRU(3, 4).state_dict()
    for name in state:
        for shape in ((), (2,), (2, 0), (2, 3, 4)):
            with pytest.raises(CheckpointError, match="state dictionary: "):
                read_layers({**state, name: torch.ones(shape)})
    with pytest.raises(CheckpointError, match="it has 5 tensors for 1000000000 layers"):
        read_layers({**state, "weight_ih_l999999999": torch.ones(1)})


# The command line.


def test_import_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = joey(tmp_path, initial="zero", scale=True)
    case.write(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["import", str(tmp_path / "model"), "--from", "joeynmt", "--out", str(out)]
    vocab = [f"--{side}-vocab={case.options[f'{side}_vocab']}" for side in ("source", "target")]
    assert cli.main([*arguments, *vocab]) == 1
    assert "give the initial state, zero or last" in capsys.readouterr().err
    options = [*vocab, "--initial-state", "zero", "--scaled-embeddings"]
    assert cli.main([*arguments, *options]) == 0
    assert "11 source and 10 target symbols" in capsys.readouterr().err
    assert cli.main([*arguments, *options]) == 1
    assert "holds a model already; give --overwrite" in capsys.readouterr().err
    assert cli.main([*arguments, *options, "--overwrite"]) == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"b a d\n")))
    assert cli.main(["predict", str(out), "--max-length", "5"]) == 0
    expected = read_model("joeynmt", tmp_path / "model", **case.options)
    (result,) = expected.translate(["b a d"], max_length=5)
    assert capsys.readouterr().out == f"{result.text}\n"
    wrong = ["import", str(tmp_path / "model"), "--from", "stanza", "--out", str(tmp_path / "x")]
    assert cli.main([*wrong, "--initial-state", "zero"]) == 1
    assert "go with the layout 'joeynmt'" in capsys.readouterr().err


def test_names() -> None:
    assert pyseq.importers.read_model is read_model
    assert len(g2p_en.GRAPHEMES) == 29
    assert len(g2p_en.PHONEMES) == 74
