# SPDX-License-Identifier: Apache-2.0
"""The parts of the quality page: which trials each needs.

A part is a table of variants, each tried from some seeds; quality_page.py words the results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pyseq import g2p

from .trials import Archive, Trial

#: In the order of the page.
PARTS = ("attention", "kinds", "sampling", "ensemble", "g2p")

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Variants of a model on one task, each trained from the same seeds."""

    task: str
    seeds: tuple[int, ...]
    variants: Mapping[str, tuple[Options, Options]]  # of the model, of the training
    beams: tuple[int, ...] = (1,)

    def trials(self, variant: str) -> list[Trial]:
        """Those of a variant, one for each seed."""
        model, training = self.variants[variant]
        return [Trial(self.task, seed, model, training, self.beams) for seed in self.seeds]


@dataclass(frozen=True)
class Part:
    """What one section of the page needs."""

    tables: tuple[Table, ...]
    ensemble_beams: tuple[int, ...] = ()  # of all trials of a variant together

    @property
    def trials(self) -> list[Trial]:
        """All of them; the first seed of every variant, then the second."""
        return [
            trial
            for table in self.tables
            for same_seed in zip(*(table.trials(name) for name in table.variants), strict=True)
            for trial in same_seed
        ]

    def teams(self, archive: Archive) -> dict[str, list[Trial]]:
        """By variant the finished trials that predict together: two or more."""
        if not self.ensemble_beams:
            return {}
        finished = {
            name: [trial for trial in table.trials(name) if archive.find(trial) is not None]
            for table in self.tables
            for name in table.variants
        }
        return {name: trials for name, trials in finished.items() if len(trials) > 1}

    def run(self, archive: Archive, *, train: bool = True) -> None:
        """Do what is not done yet; without training, what finished trials come to together."""
        for trial in self.trials if train else ():
            archive.run(trial)
        for trials in self.teams(archive).values():
            for beam in self.ensemble_beams:
                archive.run_together(trials, beam)


def parts(*, quick: bool = False) -> dict[str, Part]:
    """Every part by its name, or the same with tiny models on few pairs."""
    sizes = _QUICK if quick else _SMALL
    return {
        "attention": Part(
            (_attention(sizes.generated, sizes), _attention(sizes.dictionary, sizes))
        ),
        "kinds": Part((_kinds(sizes),)),
        "sampling": Part(
            # Without attention, since with it hardly anything is wrong.
            (
                _sampling(sizes.generated, sizes, _NO_ATTENTION),
                _sampling(sizes.dictionary, sizes, {}),
            )
        ),
        "ensemble": Part((_ensemble(sizes),), ensemble_beams=_BEAMS),
        "g2p": Part((_full(sizes) if quick else _FULL,), ensemble_beams=_BEAMS),
    }


@dataclass(frozen=True)
class _Sizes:
    """How much of it: all, or as little as shows that everything runs."""

    generated: str  # the generated task
    dictionary: str  # the part of the dictionary
    model: Options
    training: Options
    seeds: tuple[int, ...]
    more_seeds: tuple[int, ...]  # where effects are small


#: What variants depart from. It is spelled out, so that the same model has the same fingerprint
#: in every part and is trained once.
_BASE: Options = {"score": "general", "input_feeding": True}

_NO_ATTENTION: Options = {"score": None, "input_feeding": False}

_SMALL = _Sizes(
    generated="reverse",
    dictionary="g2p part",
    model={**_BASE, "embedding_size": 32, "hidden_size": 64},
    training={"learning_rate": 4e-3},  # the linear schedule soon leaves it
    seeds=(1, 2),
    more_seeds=(1, 2, 3),
)
_QUICK = _Sizes(
    generated="reverse few",
    dictionary="g2p few",
    model={**_BASE, "embedding_size": 4, "hidden_size": 4},
    training={"learning_rate": 4e-3},
    seeds=(1,),
    more_seeds=(1,),
)

#: Passes over the training pairs.
_EPOCHS = {"reverse": 5, "g2p part": 8}


def _table(
    task: str,
    sizes: _Sizes,
    variants: Mapping[str, tuple[Options, Options]],
    *,
    seeds: tuple[int, ...],
) -> Table:
    """Variants of the model of these sizes."""
    training: Options = {**sizes.training, "epochs": _EPOCHS.get(task, 1)}
    return Table(
        task,
        seeds,
        {
            name: ({**sizes.model, **own_model}, {**training, **own_training})
            for name, (own_model, own_training) in variants.items()
        },
    )


def _attention(task: str, sizes: _Sizes) -> Table:
    variants: dict[str, tuple[Options, Options]] = {
        "no attention": (_NO_ATTENTION, {}),
        "attention": ({"input_feeding": False}, {}),
        "attention and input feeding": ({}, {}),
    }
    return _table(task, sizes, variants, seeds=sizes.more_seeds)


#: Positions that the location score has weights for: more than any word has letters.
_POSITIONS = 40

KINDS: dict[str, Options] = {
    "dot": {"score": "dot"},
    "scaled dot": {"score": "scaled_dot"},
    "general": {"score": "general"},
    "concat": {"score": "concat"},
    "location": {"score": "location", "max_positions": _POSITIONS},
    "general, 4 heads": {"score": "general", "heads": 4},
    "Bahdanau: concat, before the cell": {"score": "concat", "order": "bahdanau"},
    "location-sensitive, last weights": {
        "score": "concat",
        "history": "previous",
        "history_size": 5,
    },
    "location-sensitive, all weights": {
        "score": "concat",
        "history": "cumulative",
        "history_size": 5,
    },
    "coverage": {"score": "concat", "history": "cumulative", "history_size": 1},
    "coverage and its loss": {
        "score": "concat",
        "history": "cumulative",
        "history_size": 1,
        "coverage_loss": 0.1,
    },
    "general, window local-m, D = 4": {
        "score": "general",
        "window": "local-m",
        "window_size": 4,
    },
    "general, window local-p, D = 4": {
        "score": "general",
        "window": "local-p",
        "window_size": 4,
    },
}


def _kinds(sizes: _Sizes) -> Table:
    variants: dict[str, tuple[Options, Options]] = {
        name: (options, {}) for name, options in KINDS.items()
    }
    return _table(sizes.dictionary, sizes, variants, seeds=sizes.seeds)


#: Hypotheses where searches are compared.
_BEAMS = (1, g2p.BEAM_SIZE)


def _ensemble(sizes: _Sizes) -> Table:
    made = _table(sizes.dictionary, sizes, {"one": ({}, {})}, seeds=(1, 2, 3))
    return replace(made, beams=_BEAMS)


#: How often the truth is read at the end of a training; 1 at its beginning.
LEAST_TRUTH = 0.25

#: What the probability of the truth loses at each of the 1,565 and 1,900 updates.
_SLOPES = {"reverse": 0.00048, "g2p part": 0.0004}


def _sampling(task: str, sizes: _Sizes, model: Options) -> Table:
    fall = f"linear:{_SLOPES.get(task, 0.1)},1,{LEAST_TRUTH}"

    def sampled(**options: str) -> tuple[Options, Options]:
        return model, {"scheduled_sampling": fall, **options}

    variants: dict[str, tuple[Options, Options]] = {
        "teacher forcing": (model, {}),
        "coin per token, likeliest": sampled(),
        "coin per token, drawn": sampled(sampling_choice="sample"),
        "coin per sequence, likeliest": sampled(sampling_coin="sequence"),
        "coin per sequence, drawn": sampled(sampling_choice="sample", sampling_coin="sequence"),
    }
    return _table(task, sizes, variants, seeds=sizes.more_seeds)


_FULL_MODEL: Options = {
    "embedding_size": 64,
    "num_layers": 1,
    "encoder_num_layers": 2,
    "encoder_hidden_size": 512,
    "bridge": "linear",
    "dropout": 0.35,
    "score": "concat",
    "history": "previous",
    "history_size": 5,
}
_FULL_TRAINING: Options = {
    "batch_size": 64,
    "learning_rate": 1e-3,
    "epochs": 28,
    "label_smoothing": 0.1,
    "select": "accuracy",
}

_FULL = Table(
    "g2p",
    (1, 2, 3),
    {"LSTM, location-sensitive score, input feeding": (_FULL_MODEL, _FULL_TRAINING)},
    beams=_BEAMS,
)


def _full(sizes: _Sizes) -> Table:
    """The last part at other sizes."""
    training: Options = {**sizes.training, "epochs": 1}
    return Table(sizes.dictionary, (1, 2), {"tiny": (sizes.model, training)}, _BEAMS)
