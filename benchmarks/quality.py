# SPDX-License-Identifier: Apache-2.0
"""Trains small models and the full one, and writes docs/quality.md: what each part is good for.

``python -m benchmarks.quality --help`` lists the options. Trials that are finished are not done
again: their results lie in the folder ``--work``, and what is written is all that lies there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pyseq.training import Interrupted

from . import quality_page
from .quality_parts import PARTS, parts
from .trials import Archive

PROGRAM = "python -m benchmarks.quality"
_ROOT = Path(__file__).resolve().parent.parent


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument(
        "--only",
        metavar="PARTS",
        help=f"parts to work on, separated by commas (default: {','.join(PARTS)})",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny models on few pairs, to see that all of it runs"
    )
    parser.add_argument(
        "--no-training", action="store_true", help="write what is finished, and train nothing"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument(
        "--work",
        type=Path,
        default=_ROOT / "build" / "quality",
        metavar="FOLDER",
        help="where models and results are kept (default: build/quality)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where quality.md and its numbers are written (default: docs after a full run, "
        "nowhere after a part of one)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Try, measure and write, as the command line says; returns the exit code."""
    parser = _options()
    options = parser.parse_args(argv)
    names = PARTS if options.only is None else options.only.split(",")
    for name in names:
        if name not in PARTS:
            parser.error(f"--only must name parts among {', '.join(PARTS)}, got {name!r}")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    torch.set_num_threads(options.threads)
    archive = Archive(options.work, log=lambda line: print(line, flush=True))
    every = parts(quick=options.quick)
    for name in names:
        print(f"{name}: {len(every[name].trials)} trials", flush=True)
        try:
            every[name].run(archive, train=not options.no_training)
        except Interrupted as error:
            print(f"{PROGRAM}: {error}; the same command goes on from there", file=sys.stderr)
            return 128 + error.signum
    part = options.quick or options.only or options.no_training
    out = options.out or (None if part else _ROOT / "docs")
    # What was done earlier is shown too, so --only and where the files lie make no difference.
    command = PROGRAM + (" --quick" if options.quick else "")
    page = quality_page.compose(every, archive, command, threads=options.threads)
    if out is None:
        print(page.text)
        print("Nothing was written: a part of a run goes nowhere without --out.")
    else:
        page.write(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
