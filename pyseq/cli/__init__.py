# SPDX-License-Identifier: Apache-2.0
"""The command line: ``pyseq train | predict | evaluate | import | info``.

Each command has a module that reads arguments and files and prints; the work is done by
``training``, ``translator`` and ``metrics``. What a user can mend ends in one sentence on
standard error.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import __version__, info
from ..errors import PyseqError
from ..training import Interrupted
from . import convert, evaluate, predict, train
from .common import EXIT_SIGNAL, Parser, say

_EXIT_ERROR = 1
_PACKAGE = str(Path(__file__).parents[1]) + os.sep


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0: done. 1: an error, described on standard error. 2: wrong arguments. 130 and 143:
    stopped by SIGINT (Ctrl-C) and SIGTERM.

    Args:
        argv: arguments without the program's name. Default: those of the process.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Files of text are UTF-8 here, whatever the locale, and this may be piped into one.
        sys.stdout.reconfigure(encoding="utf-8")
    try:
        arguments = _parser().parse_args(argv)
        run: Callable[[argparse.Namespace], None] = arguments.run
        with _saying_warnings():
            run(arguments)
        sys.stdout.flush()
    except SystemExit as error:  # argparse: 0 after --help, 2 after wrong arguments
        return error.code if isinstance(error.code, int) else _EXIT_ERROR
    except Interrupted as error:
        say(f"{error}; --resume goes on from there")
        return EXIT_SIGNAL + error.signum
    except KeyboardInterrupt:
        say("stopped")
        return EXIT_SIGNAL + 2
    except BrokenPipeError:
        # Whoever read our output has left; the interpreter's last flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_ERROR
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        say("not enough memory: a smaller model, or a smaller --batch-size, would need less")
        return _EXIT_ERROR
    except PyseqError as error:
        say(str(error))
        return _EXIT_ERROR
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        say(f"{where}{error.strerror or error}")
        return _EXIT_ERROR
    return 0


@contextmanager
def _saying_warnings() -> Iterator[None]:
    """Say pyseq's own warnings like all else, without the line of the program."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(
            message: Warning | str, category: type[Warning], filename: str, *rest: Any, **more: Any
        ) -> None:
            if filename.startswith(_PACKAGE):
                say(f"warning: {message}")
            else:
                others(message, category, filename, *rest, **more)

        warnings.showwarning = show
        yield


def _is_lack_of_memory(error: Exception) -> bool:
    # torch's allocator of the CPU has no class of its own for it.
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _parser() -> Parser:
    parser = Parser(
        prog="pyseq", description="Recurrent sequence-to-sequence models with fused kernels."
    )
    parser.add_argument("--version", action="version", version=f"pyseq {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train.add(commands)
    predict.add(commands)
    evaluate.add(commands)
    convert.add(commands)
    command = commands.add_parser("info", help="print versions, CPU tier, threads")
    command.set_defaults(run=lambda _: print("\n".join(info.lines())))
    return parser
