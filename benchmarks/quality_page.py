# SPDX-License-Identifier: Apache-2.0
"""What the trials come to in words and tables: docs/quality.md, its numbers as JSON, its chart.

Whether a claim holds is worked out here from the results, seed by seed, and never typed in.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pyseq import g2p

from .document import table
from .files import write_text
from .machine import environment
from .quality_chart import Curve, draw
from .quality_parts import LEAST_TRUTH, Part, Table
from .tasks import DESCRIPTIONS
from .trials import Archive, Result

_INTRODUCTION = """\
What the parts of pyseq are good for, shown on models that were trained for this page. All that is
said here on what holds was worked out from the results by the command above.

- Error rates are those of greedy search on lines that no training saw, unless a beam is named:
  `tokens` counts edits per token of the nearest right answer (PER of phonemes), `lines` the lines
  that are not right to the last token (WER of words).
- A cell is the mean over seeds, with the lowest and the highest in brackets. The seed decides on
  weights, dropout and the order of the data; the data are the same for all. No seed was left out.
- Small models are trained for a fixed number of epochs, and the last epoch is what is measured:
  nothing was chosen by its test errors. Sizes and rates are the same for all rows of a table and
  favour none on purpose, which also means that none has got the settings that suit it best.
- `seconds` is the mean processor time of a training. It is more where other work runs on the same
  machine, so it is there to tell minutes from hours; for speed see [benchmarks.md](benchmarks.md).
- Claims are tried seed by seed: `yes (3 of 3)` says that the mean is lower, and so it is for each
  of 3 seeds; `in the mean (2 of 3)` that only the mean is, and 2 of 3 seeds; `no` that it is not.
- With two or three seeds, differences smaller than the brackets mean nothing.
"""

Measure = Callable[[Result], float]


@dataclass(frozen=True)
class Page:
    """What is written."""

    text: str
    numbers: Mapping[str, object]
    curves: Sequence[Curve]  # of the chart; empty where their trials are not done

    def write(self, folder: Path) -> None:
        """Write quality.md, quality.json and, if there are curves, quality.svg."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "quality.md", self.text)
        write_text(folder / "quality.json", _json(self.numbers))
        if self.curves:
            draw(self.curves, folder / "quality.svg")


def _json(numbers: Mapping[str, object]) -> str:
    """One line for each entry, and for each of those in a list."""
    entries = []
    for name, value in numbers.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        entries.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


@dataclass(frozen=True)
class Found:
    """The finished trials of a table: results of each variant by seed."""

    results: Mapping[str, Mapping[int, Result]]

    @classmethod
    def of(cls, made: Table, archive: Archive) -> Found:
        """What the archive has."""
        by_variant: dict[str, dict[int, Result]] = {}
        for name in made.variants:
            for trial in made.trials(name):
                result = archive.find(trial)
                if result is not None:
                    by_variant.setdefault(name, {})[trial.seed] = result
        return cls(by_variant)

    def values(self, variant: str, measure: Measure) -> list[float]:
        """One for each seed."""
        return [measure(result) for result in self.results[variant].values()]

    def cell(self, variant: str, measure: Measure) -> str:
        """Mean, and lowest to highest, as shares in percent."""
        values = self.values(variant, measure)
        mean = f"{statistics.mean(values):.2%}"
        return mean if len(values) == 1 else f"{mean} ({min(values):.2%}–{max(values):.2%})"

    def mean(self, variant: str, measure: Measure) -> float:
        """Over the seeds."""
        return statistics.mean(self.values(variant, measure))

    def compared(self, better: str, worse: str, measure: Measure) -> str:
        """Whether one variant is below another, in the mean and in how many seeds."""
        results = [self.results.get(name, {}) for name in (better, worse)]
        seeds = sorted(results[0].keys() & results[1].keys())
        if not seeds:
            return "not finished"
        low, high = ([measure(result[seed]) for seed in seeds] for result in results)
        wins = sum(one < other for one, other in zip(low, high, strict=True))
        if sum(low) < sum(high):
            verdict = "yes" if wins == len(seeds) else "in the mean"
        else:
            verdict = "equal" if sum(low) == sum(high) else "**no**"
        return f"{verdict} ({wins} of {len(seeds)})"

    def claims(self, pairs: Sequence[tuple[str, str]], measures: Mapping[str, Measure]) -> str:
        """A table of whether the first of each pair is below the second, by each measure."""
        return table(
            ("claim", *measures),
            [
                (
                    f"{better} below {worse}",
                    *(self.compared(better, worse, measure) for measure in measures.values()),
                )
                for better, worse in pairs
            ],
        )


def _error(kind: str, beam: int = 1) -> Measure:
    """``"token"`` or ``"line"``."""

    def measure(result: Result) -> float:
        return float(result["errors"][str(beam)][kind])

    return measure


def _places(name: str) -> Measure:
    """``"next_step"`` or ``"free_running"``: the share of all tokens of the targets."""

    def measure(result: Result) -> float:
        targets = result["targets"]
        wrong = sum(share * count for share, count in zip(result[name], targets, strict=True))
        return float(wrong / sum(targets))

    return measure


def _gap(result: Result) -> float:
    return _places("free_running")(result) - _places("next_step")(result)


def _seconds(found: Found, variant: str) -> str:
    return f"{found.mean(variant, lambda result: result['train_seconds']):.0f}"


def _error_table(found: Found, first: str) -> str:
    return table(
        (first, "tokens", "lines", "parameters", "seconds"),
        [
            (
                name,
                found.cell(name, _error("token")),
                found.cell(name, _error("line")),
                f"{next(iter(found.results[name].values()))['parameters']:,}",
                _seconds(found, name),
            )
            for name in found.results
        ],
    )


def wrapped(*paragraphs: str) -> str:
    """Paragraphs in lines as long as those of the other pages."""
    return "\n\n".join(
        textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
        for text in paragraphs
    )


def _listed(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence[0].upper()}{sentence[1:]}" for sentence in sentences)


def _setting(made: Table) -> str:
    """What is common to the variants of a table, as a sentence."""
    models = [model for model, _ in made.variants.values()]
    trainings = [training for _, training in made.variants.values()]
    shown = []
    for options in (models, trainings):
        common = {k: v for k, v in options[0].items() if all(o.get(k) == v for o in options)}
        shown.append(", ".join(f"`{name}={value!r}`" for name, value in common.items()))
    seeds = ", ".join(map(str, made.seeds))
    return wrapped(
        DESCRIPTIONS[made.task],
        f"Model: {shown[0] or 'as below'}. Training: {shown[1] or 'as below'}. Else the defaults "
        f"of `ModelOptions` and `TrainingOptions`. Seeds {seeds}.",
    )


# The sections.

#: Runs of source lengths that the section on length puts together.
_RUN = 5

_NONE, _PLAIN, _FED = "no attention", "attention", "attention and input feeding"


def _attention_text(part: Part, archive: Archive) -> tuple[str, list[Curve]]:
    texts = ["## No attention, attention, input feeding\n"]
    curves: list[Curve] = []
    for number, made in enumerate(part.tables):
        found = Found.of(made, archive)
        texts.append(f"{_setting(made)}\n")
        if not found.results:
            texts.append("Not done.\n")
            continue
        texts.append(f"{_error_table(found, 'decoder')}\n")
        errors = {f"{kind}s": _error(kind) for kind in ("token", "line")}
        texts.append(f"{found.claims(((_PLAIN, _NONE), (_FED, _PLAIN)), errors)}\n")
        if number == 0:
            text, curves = _length_text(found)
            texts.append(text)
    return "\n".join(texts), curves


def _by_length(result: Result, run: range) -> float:
    """Errors in tokens of the lines whose source is so long; each length counts by its lines."""
    groups = result["errors"]["1"]["by_length"]
    chosen = [groups[str(length)] for length in run if str(length) in groups]
    lines = sum(group["lines"] for group in chosen)
    return float(sum(group["token"] * group["lines"] for group in chosen) / lines)


def _length_text(found: Found) -> tuple[str, list[Curve]]:
    some = next(iter(next(iter(found.results.values())).values()))
    lengths = sorted(map(int, some["errors"]["1"]["by_length"]))
    runs = [
        range(begin, min(begin + _RUN, lengths[-1] + 1))
        for begin in range(lengths[0], lengths[-1] + 1, _RUN)
    ]

    def measure(run: range) -> Measure:
        return lambda result: _by_length(result, run)

    names = list(found.results)
    rows = []
    for run in runs:
        cells = [found.cell(name, measure(run)) for name in names]
        rows.append((f"{run[0]} to {run[-1]}", *cells))
    curves = [
        Curve(
            name,
            [statistics.mean(run) for run in runs],
            [found.values(name, measure(run)) for run in runs],
        )
        for name in names
    ]
    text = (
        "### By length of the source\n\nThe same trials: errors in tokens (Luong et al. 2015, "
        f"figure 6, shows BLEU).\n\n{table(('letters', *names), rows)}\n"
    )
    if _NONE in names and _PLAIN in names:
        gaps = [found.mean(_NONE, measure(run)) - found.mean(_PLAIN, measure(run)) for run in runs]
        grows = all(before < after for before, after in pairwise(gaps))
        shown = ", ".join(f"{gap:.1%}" for gap in gaps)
        verdict = "grows from each row to the next" if grows else "**does not grow at every row**"
        text += (
            f"\nThe gap between no attention and attention {verdict}: {shown}.\n"
            "\n![Errors by length](quality.svg)\n"
        )
    return text, curves


def _kinds_text(part: Part, archive: Archive) -> tuple[str, list[Curve]]:
    (made,) = part.tables
    found = Found.of(made, archive)
    text = (
        "## Kinds of attention\n\nWhat they compute is in [attention.md](attention.md).\n\n"
        f"{_setting(made)}\n\n"
    )
    if not found.results:
        return f"{text}Not done.\n", []
    best = min(found.results, key=lambda name: found.mean(name, _error("token")))
    within = [
        name
        for name in found.results
        if name != best
        and min(found.values(name, _error("token"))) <= max(found.values(best, _error("token")))
    ]
    conclusion = wrapped(
        f"Fewest errors in tokens: {best}. Its brackets meet those of "
        f"{'; '.join(within) or 'no other'}.",
        "A window about step t suits words, whose letters and phonemes number t stand near each "
        "other; where source and target differ in order it would not. The score location does not "
        "look at what it weighs at all.",
    )
    return f"{text}{_error_table(found, 'attention')}\n\n{conclusion}\n", []


_FORCED = "teacher forcing"


def _sampling_text(part: Part, archive: Archive) -> tuple[str, list[Curve]]:
    texts = [
        "## Scheduled sampling\n",
        wrapped(
            "`next step` is the share of wrong tokens where the decoder reads the truth, `running "
            "free` where it reads its own likeliest tokens; both are compared with the first right "
            "answer place by place, so that one token too many makes all that follow wrong. The "
            "gap between them is what scheduled sampling is for (Bengio et al. 2015). The "
            f"probability of the truth falls linearly from 1 to {LEAST_TRUTH} at the end of the "
            "training, see [training.md](training.md)."
        )
        + "\n",
    ]
    for made in part.tables:
        found = Found.of(made, archive)
        texts.append(f"{_setting(made)}\n")
        if not found.results:
            texts.append("Not done.\n")
            continue
        rows = [
            (
                name,
                found.cell(name, _places("next_step")),
                found.cell(name, _places("free_running")),
                found.cell(name, _gap),
                found.cell(name, _error("token")),
                found.cell(name, _error("line")),
                _seconds(found, name),
            )
            for name in found.results
        ]
        header = ("reads", "next step", "running free", "gap", "tokens", "lines", "seconds")
        texts.append(f"{table(header, rows)}\n")
        pairs = [(name, _FORCED) for name in made.variants if name != _FORCED]
        pairs += [
            (f"coin per token, {how}", f"coin per sequence, {how}")
            for how in ("likeliest", "drawn")
        ]
        measures = {
            "gap": _gap,
            "running free": _places("free_running"),
            "tokens": _error("token"),
            "lines": _error("line"),
        }
        texts.append(f"{found.claims(pairs, measures)}\n")
    return "\n".join(texts), []


#: Word error rates to reach: of a single model, and of an ensemble.
_GOALS = (0.26, 0.24)


def _goal_text(name: str, values: Sequence[float], goal: float) -> str:
    if not values:
        return f"{name}: not finished."
    mean = statistics.mean(values)
    of = f" in the mean of {len(values)} seeds" if len(values) > 1 else ""
    return f"{name}: WER {mean:.2%}{of}, goal {goal:.0%}: " + (
        "reached." if mean <= goal else "**missed**."
    )


def _alone_and_together(
    part: Part, made: Table, found: Found, archive: Archive
) -> tuple[str, list[float], list[float]]:
    """Each model and the ensemble of all, and the WER of both by the widest search."""
    beams = made.beams
    header = [
        f"{kind}, {'greedy' if beam == 1 else f'beam {beam}'}"
        for beam in beams
        for kind in ("PER", "WER")
    ]
    rows: list[tuple[str, ...]] = []
    alone: list[float] = []
    together: list[float] = []

    def rates(errors: Result) -> tuple[str, ...]:
        return tuple(f"{errors[str(b)][kind]:.2%}" for b in beams for kind in ("token", "line"))

    for name, results in found.results.items():
        for seed, result in results.items():
            minutes = f"{result['train_seconds'] / 60:.1f}"
            rows.append((f"seed {seed}", *rates(result["errors"]), minutes))
            alone.append(result["errors"][str(beams[-1])]["line"])
        team = part.teams(archive).get(name, [])
        measured = {str(beam): archive.find_together(team, beam) for beam in beams}
        errors = {beam: one["errors"] for beam, one in measured.items() if one is not None}
        if len(errors) == len(beams):
            rows.append((f"ensemble of {len(team)}", *rates(errors), ""))
            together.append(errors[str(beams[-1])]["line"])
    return table(("model", *header, "minutes"), rows), alone, together


def _ensemble_text(part: Part, archive: Archive) -> tuple[str, list[Curve]]:
    (made,) = part.tables
    found = Found.of(made, archive)
    text = f"## Ensembles and beams\n\n{_setting(made)}\n\n"
    if not found.results:
        return f"{text}Not done.\n", []
    return f"{text}{_alone_and_together(part, made, found, archive)[0]}\n", []


def _full_text(part: Part, archive: Archive) -> tuple[str, list[Curve]]:
    (made,) = part.tables
    found = Found.of(made, archive)
    text = (
        "## The pronouncing dictionary, in full\n\n"
        f"{_setting(made)}\n\nThe epoch that gets most validation words right is measured.\n\n"
    )
    if not found.results:
        return f"{text}Not done.\n", []
    shown, alone, together = _alone_and_together(part, made, found, archive)
    some = next(iter(next(iter(found.results.values())).values()))
    goals = [
        _goal_text(f"{name}, beam {made.beams[-1]}", values, goal)
        for name, values, goal in zip(
            ("single", "ensemble"), (alone, together), _GOALS, strict=True
        )
    ]
    text += (
        f"{some['parameters']:,} parameters, {some['pairs']:,} pairs to learn from, "
        f"{some['errors'][str(made.beams[0])]['lines']:,} words to be tested on.\n\n{shown}\n\n"
        f"{_listed(goals)}\n\n"
    )
    notes = [
        "Published figures for attention models on this dictionary, on other splits: WER 21.7% "
        "single, 20.2% as an ensemble (Toshniwal and Livescu 2016, arXiv 1610.06540)."
    ]
    if list(made.variants.values()) != [(g2p.MODEL, g2p.TRAINING)]:
        notes.append(
            "These are not the settings of `pyseq train --task g2p`, which trains for "
            f"{g2p.TRAINING['epochs']} epochs; the README has its figures."
        )
    return f"{text}{wrapped(*notes)}\n", []


_SECTIONS: dict[str, Callable[[Part, Archive], tuple[str, list[Curve]]]] = {
    "attention": _attention_text,
    "kinds": _kinds_text,
    "sampling": _sampling_text,
    "ensemble": _ensemble_text,
    "g2p": _full_text,
}


def compose(parts: Mapping[str, Part], archive: Archive, command: str, *, threads: int) -> Page:
    """The page of all finished trials of these parts."""
    facts = environment()
    del facts["onnxruntime"], facts["load"]
    facts["threads"] = threads
    texts, curves = [], []
    results: list[Result] = []
    for name, part in parts.items():
        text, drawn = _SECTIONS[name](part, archive)
        texts.append(text)
        curves += drawn
        results += _results(name, part, archive)
    finished = {
        trial.fingerprint: result["train_seconds"]
        for part in parts.values()
        for trial in part.trials
        if (result := archive.find(trial)) is not None
    }
    facts["models"] = f"{len(finished)}, trained in {sum(finished.values()) / 60:.0f} minutes"
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    text = f"# Quality\n\nWritten by `{command}`.\n\n{_INTRODUCTION}\n{listed}\n\n" + "\n".join(
        texts
    )
    numbers = {
        "environment": facts,
        "command": command,
        "unit": "shares of 1, processor seconds",
        "goals": {"single": _GOALS[0], "ensemble": _GOALS[1], "beam": g2p.BEAM_SIZE},
        "results": results,
    }
    return Page(text, numbers, curves)


def _results(name: str, part: Part, archive: Archive) -> list[Result]:
    """All that is known of a part, variant by variant."""
    found: list[Result] = []
    for made in part.tables:
        for variant in made.variants:
            trials = made.trials(variant)
            for trial in trials:
                result = archive.find(trial)
                if result is not None:
                    found.append({"part": name, "variant": variant, **result})
            team = part.teams(archive).get(variant, [])
            for beam in part.ensemble_beams:
                together = archive.find_together(team, beam)
                if together is not None:
                    found.append({"part": name, "variant": variant, **together})
    return found
