# SPDX-License-Identifier: Apache-2.0
"""``make demo``: learns to pronounce English from the CMU dictionary in a few minutes.

Times a training step against plain torch, trains, prints the error rates on words that it
never saw, pronounces words that no dictionary has, and draws where it looked.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import checkpoint, g2p, metrics, training
from .comparison import reference_operators
from .devices import find_device, finish
from .errors import PyseqError, require
from .plot import save_heatmap
from .text import SPECIALS
from .training import Data, Interrupted, ModelOptions, Trainer, TrainingOptions
from .translator import Translator
from .types import STOP

# Spelled like English, but in no dictionary.
_NEW_WORDS = ("blorptastic", "snorkelwick", "quizzify", "thunkable", "zephyrine", "wobblegate")
_DRAWN_WORD = "thunkable"

_TIMED_STEPS = 7


def time_training_step(trainer: Trainer, *, repeats: int = _TIMED_STEPS) -> tuple[float, float]:
    """Median seconds of a training step with the fused and with the reference operators.

    The two take turns on the same batch, so that whatever else the machine does meets
    both. The model of ``trainer`` is left as it was found.
    """
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    optimizer = torch.optim.Adam(trainer.model.parameters(), fused=True)
    examples, size = trainer.examples, trainer.options.batch_size
    device = training.device_of(trainer.model)
    seconds: tuple[list[float], list[float]] = ([], [])

    def timed_step() -> float:
        begin = time.perf_counter()
        training.training_step(trainer.model, batch, optimizer, clip_norm=trainer.options.clip_norm)
        finish(device)
        return time.perf_counter() - begin

    trainer.model.train()
    # Words of middle length, as many as in any batch.
    order = examples.by_length(range(len(examples)))
    batch = examples.collate(order[len(order) // 2 :][:size]).to(device)
    with torch.random.fork_rng():  # for dropout
        for turn in range(repeats + 1):
            fused = timed_step()
            with reference_operators():
                plain = timed_step()
            if turn > 0:  # the first turn warms up
                seconds[0].append(fused)
                seconds[1].append(plain)
    trainer.model.load_state_dict(weights)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pyseq.demo", description=__doc__)
    parser.add_argument(
        "--out",
        default="demo",
        metavar="DIR",
        help="where the model goes (default: demo); one that is there already is replaced",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=g2p.SHORT_TRAINING["epochs"],
        metavar="N",
        help="passes over the words (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="where the model is: cpu, cuda or cuda:1 (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    if arguments.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {arguments.epochs}")
    out = Path(arguments.out)
    try:
        _run(out, arguments.epochs, find_device(arguments.device))
    except Interrupted as error:
        resume = f"{sys.executable} -m pyseq train --task g2p --out {out} --resume"
        if arguments.device != "cpu":
            resume += f" --device {arguments.device}"
        print(f"demo: {error}; to go on from there: {resume}", file=sys.stderr)
        return 128 + error.signum
    except (PyseqError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def _run(out: Path, epochs: int, device: torch.device) -> None:
    begin = time.perf_counter()
    metrics.require_packages(text_scores=False)
    require("matplotlib.figure", extra="demo")
    parts = g2p.load()
    if any(checkpoint.exists(folder) for folder in (out, out / training.LAST)):
        print(f"{out}: the model of an earlier run is replaced", flush=True)
    print(
        f"CMU pronouncing dictionary: {len(parts.train):,} words to learn from, "
        f"{len(parts.validation):,} for validation, {len(parts.test):,} for the test",
        flush=True,
    )
    trainer = training.start(
        Data(g2p.pairs(parts.train), "cmudict (training words)"),
        Data(g2p.pairs(parts.validation), "cmudict (validation words)"),
        tokens=(g2p.SOURCE_TOKENS, g2p.TARGET_TOKENS),
        model=ModelOptions(**g2p.SHORT_MODEL),
        options=TrainingOptions(**{**g2p.SHORT_TRAINING, "epochs": epochs}),
        out=out,
        overwrite=True,
        device=device,
        progress=True,
        log=lambda line: print(line, flush=True),
    )
    fused, plain = time_training_step(trainer)
    step = (
        f"one training step, {trainer.options.batch_size} words, {_place(device)}: "
        f"{fused * 1e3:.0f} ms, with the same operators in plain torch {plain * 1e3:.0f} ms: "
        f"{plain / fused:.1f} times faster"
    )
    print(step, flush=True)
    learning = time.perf_counter()
    trainer.run()
    minutes = (time.perf_counter() - learning) / 60

    translator = Translator.load(out, device=device)
    print(f"\nafter {minutes:.1f} minutes of training: {g2p.summary(translator)}")
    known = {entry.word for part in parts for entry in part}
    words = [word for word in _NEW_WORDS if word not in known]
    print(f"\nwords that are not in the dictionary ({len(words)}):")
    for word, result in zip(
        words, translator.translate(words, beam_size=g2p.BEAM_SIZE), strict=True
    ):
        print(f"  {word:<14}{result.text}")
    picture = _draw(translator, out / f"attention-{_DRAWN_WORD}.png")
    print(f"\nwhere it looked: {picture}\n{step}")
    print(f"the whole demo: {(time.perf_counter() - begin) / 60:.1f} minutes; model: {out}")
    print(f"try: echo pronounceable | {sys.executable} -m pyseq predict {out}")


def _place(device: torch.device) -> str:
    """Where the steps were timed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads"


def _draw(translator: Translator, path: Path) -> Path:
    (result,) = translator.translate([_DRAWN_WORD])
    assert result.weights is not None  # the demo's model has attention
    save_heatmap(
        path,
        result.weights,
        rows=result.tokens,
        columns=[*result.source_tokens, SPECIALS[STOP]],
        title=_DRAWN_WORD,
    )
    return path


if __name__ == "__main__":
    sys.exit(main())
