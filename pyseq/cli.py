# SPDX-License-Identifier: Apache-2.0
"""The command line: ``pyseq train | predict | evaluate | import | info``.

Reads arguments and files and prints; the work is done by ``training``, ``translator``
and ``metrics``. What a user can mend ends in one sentence on standard error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from . import (
    checkpoint,
    distributed,
    embeddings,
    g2p,
    importers,
    info,
    metrics,
    scheduled,
    training,
)
from .averaging import AVERAGES
from .bridge import BRIDGES
from .copying import COPIES
from .embeddings import EmbeddingsFile
from .errors import DataError, PyseqError
from .extra import EXTRA_MODES, EXTRA_PLACES
from .labeler import Labeler
from .labels import check_labels
from .plot import save_heatmap
from .search import SearchOptions
from .seq2seq import Seq2Seq
from .tagger import POOLINGS
from .text import (
    SPECIALS,
    TOKENS,
    Pair,
    PairsFile,
    TextPair,
    Tokenizer,
    hold_out,
    read_lines,
    read_pairs,
)
from .text import tokenise_pairs as tokenise
from .training import Data, Interrupted, LabelerOptions, ModelOptions, Trainer, TrainingOptions
from .translator import Translation, Translator
from .types import FEEDS, GATES, HISTORIES, ORDERS, SCORES, STOP, WINDOWS

# How BLEU splits predictions and references, by how the model splits its target.
_BLEU_TOKENIZE = {"char": "char", "space": "none", "word": "13a"}

#: The task that a saved model was trained for, by what it is.
_TASK_OF: dict[str, training.TaskName] = {"Tagger": "tag", "Classifier": "classify"}

_EXIT_ERROR = 1
_EXIT_SIGNAL = 128  # plus the signal's number, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0: done. 1: an error, described on standard error. 2: wrong arguments. 130 and 143:
    stopped by SIGINT (Ctrl-C) and SIGTERM.

    Args:
        argv: arguments without the program's name. Default: those of the process.
    """
    try:
        arguments = _parser().parse_args(argv)
        run: Callable[[argparse.Namespace], None] = arguments.run
        run(arguments)
        sys.stdout.flush()
    except SystemExit as error:  # argparse: 0 after --help, 2 after wrong arguments
        return error.code if isinstance(error.code, int) else _EXIT_ERROR
    except Interrupted as error:
        _say(f"{error}; --resume goes on from there")
        return _EXIT_SIGNAL + error.signum
    except KeyboardInterrupt:
        _say("stopped")
        return _EXIT_SIGNAL + 2
    except BrokenPipeError:
        # Whoever read our output has left; the interpreter's last flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_ERROR
    except PyseqError as error:
        _say(str(error))
        return _EXIT_ERROR
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _say(f"{where}{error.strerror or error}")
        return _EXIT_ERROR
    return 0


def _say(text: str) -> None:
    print(f"pyseq: {text}", file=sys.stderr)


# Arguments.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyseq", description="Recurrent sequence-to-sequence models with fused kernels."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_predict(commands)
    _add_evaluate(commands)
    _add_import(commands)
    command = commands.add_parser("info", help="print versions, CPU tier, threads")
    command.set_defaults(run=lambda _: print("\n".join(info.lines())))
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {value}")
    return value


def _schedule(text: str) -> scheduled.Schedule:
    try:
        return scheduled.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# argparse prints the name of the function when a text is not a number.
_positive.__name__ = "positive integer"
_share.__name__ = "share"


def _add_threads(command: Any) -> None:
    command.add_argument(
        "--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)"
    )


def _add_search(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--with",
        dest="others",
        action="append",
        default=[],
        metavar="DIR",
        help="a further model that predicts together with the first; may be given again",
    )
    command.add_argument(
        "--batch-size",
        type=_positive,
        default=64,
        metavar="N",
        help="lines computed together (default: 64)",
    )
    group = command.add_argument_group("search")
    group.add_argument(
        "--beam-size",
        type=_positive,
        default=1,
        metavar="N",
        help="hypotheses that the search keeps (default: 1, greedy)",
    )
    group.add_argument(
        "--max-length",
        type=_positive,
        metavar="N",
        help="tokens an output may have (default: half as many again as the "
        "longest target in training)",
    )
    _add_search_option(group, "min_length", int, "tokens an output must have")
    _add_search_option(group, "length_penalty", float, "prefer longer outputs; 0.6 to 1 are usual")
    _add_search_option(
        group, "coverage_penalty", float, "prefer outputs that looked at the whole line"
    )
    _add_search_option(
        group, "block_ngrams", _positive, "let no N tokens in a row occur twice in an output"
    )
    group.add_argument("--prefix", default="", metavar="TEXT", help="what every output begins with")
    group.add_argument(
        "--replace-unknown",
        action="store_true",
        help="put for each <unk> the symbol of the line that it looked at most",
    )
    group = command.add_argument_group("sampling")
    group.add_argument(
        "--sample", action="store_true", help="draw outputs at random instead of searching"
    )
    _add_search_option(group, "temperature", float, "below 1 the likely becomes likelier")
    _add_search_option(group, "top_k", _positive, "draw from the N likeliest tokens")
    _add_search_option(
        group, "top_p", float, "draw from the likeliest tokens that make up this probability"
    )
    group.add_argument(
        "--seed", type=int, default=1, metavar="N", help="fixes what is drawn (default: 1)"
    )
    command.set_defaults(of_search={name: command.get_default(name) for name in _OF_SEARCH})


#: Arguments that mean nothing to a model that gives labels.
_OF_SEARCH = (
    "others",
    "beam_size",
    "max_length",
    "min_length",
    "length_penalty",
    "coverage_penalty",
    "block_ngrams",
    "prefix",
    "replace_unknown",
    "sample",
    "temperature",
    "top_k",
    "top_p",
    "n_best",
    "attention",
)


def _refuse_search(arguments: argparse.Namespace) -> None:
    """Refuse the options of a search, for a model that does not search."""
    for name, default in arguments.of_search.items():
        if getattr(arguments, name, default) != default:
            raise PyseqError(
                f"{arguments.model}: this model gives labels and does not search: leave out what "
                f"sets {name}"
            )


def _add_search_option(group: Any, name: str, kind: Callable[[str], Any], text: str) -> None:
    """An argument for one field of the search's options."""
    default = getattr(SearchOptions, name)
    group.add_argument(
        f"--{name.replace('_', '-')}",
        type=kind,
        default=default,
        metavar="N",
        help=text if default is None else f"{text} (default: {default})",
    )


def _add_train(commands: Any) -> None:
    command = commands.add_parser(
        "train",
        help="train a model from a file of pairs",
        description="Train a model. PAIRS.tsv holds one pair a line, source and target "
        "separated by a tab, in UTF-8; further columns are ignored, or hold extra information. "
        "For --task tag the target is one label for each token of the source, separated by "
        "spaces; for --task classify it is one label. DIR gets the best model, DIR/last the last "
        "checkpoint.",
    )
    command.set_defaults(run=_train)
    command.add_argument("pairs", nargs="?", metavar="PAIRS.tsv", help="the training pairs")
    command.add_argument(
        "--task",
        choices=["g2p", *training.TASKS],
        help="g2p: train on the CMU pronouncing dictionary instead of PAIRS.tsv; tag: a label for "
        "each token; classify: a label for each line",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="where the model goes")
    command.add_argument(
        "--tensorboard", metavar="FOLDER", help="write curves there that TensorBoard shows"
    )
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on from DIR/last with the options of that run; --epochs may be raised",
    )
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew though DIR holds a model, which the new run's first checkpoint replaces",
    )
    command.add_argument(
        "--skip-bad-lines",
        action="store_true",
        help="leave out lines that are not pairs instead of stopping",
    )

    group = command.add_argument_group("data")
    group.add_argument("--tokens", choices=TOKENS, help="how both sides are split (default: char)")
    group.add_argument("--source-tokens", choices=TOKENS, help="how the source is split")
    group.add_argument("--target-tokens", choices=TOKENS, help="how the target is split")
    group.add_argument(
        "--min-count",
        type=_positive,
        metavar="N",
        help="symbols that a new run sees less often are read as <unk> (default: 1)",
    )
    group.add_argument(
        "--reverse-source",
        action="store_true",
        help="read sources backwards; helps models without attention that read in one direction",
    )
    held_out = group.add_mutually_exclusive_group()
    held_out.add_argument("--valid", metavar="FILE", help="validation pairs")
    held_out.add_argument(
        "--valid-share",
        type=_share,
        default=0.05,
        metavar="SHARE",
        help="share of the sources held out for validation if there is no --valid (default: 0.05)",
    )

    group = command.add_argument_group("model")
    _add_option(group, ModelOptions, "embedding_size", _positive, "numbers in an embedding")
    _add_option(group, ModelOptions, "hidden_size", _positive, "units of a layer")
    _add_option(group, ModelOptions, "num_layers", _positive, "layers of encoder and decoder")
    _add_option(group, ModelOptions, "cell", str, "recurrent cell", choices=tuple(GATES))
    _add_option(group, ModelOptions, "score", str, "attention score", choices=(*SCORES, "none"))
    for name, kind, text, choices in (
        ("order", str, "attention after the cells, or before them", ORDERS),
        ("feed", str, "what is fed to the next step (default: output)", FEEDS),
        ("heads", _positive, "heads of attention", None),
        ("window", str, "attention over a window only", WINDOWS),
        ("window_size", _positive, "positions on either side of its centre (default: 10)", None),
        ("history", str, "past weights that enter --score concat", HISTORIES),
        ("history_size", _positive, "how many neighbours of a position's (default: 31)", None),
        ("attention_size", _positive, "units of --score concat (default: --hidden-size)", None),
        ("max_positions", _positive, "positions that --score location can see", None),
        ("coverage_loss", float, "weight of the coverage loss (default: 0)", None),
    ):
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            choices=choices,
            default=argparse.SUPPRESS,
            metavar=None if choices else "N",
            help=text,
        )
    _add_option(group, ModelOptions, "copy", str, "copy symbols of the source", choices=COPIES)
    _add_switch(group, "bidirectional", "read the source forwards only")
    _add_switch(group, "input_feeding", "do not feed the attentional vector into the next step")
    _add_option(group, ModelOptions, "dropout", float, "dropout probability")
    for name, text, default in (
        ("source_embedding_size", "numbers in an embedding of the source", "embedding_size"),
        ("target_embedding_size", "numbers in an embedding of the target", "embedding_size"),
        ("encoder_hidden_size", "units of a layer of the encoder", "hidden_size"),
        ("encoder_num_layers", "layers of the encoder", "num_layers"),
    ):
        _add_option(group, ModelOptions, name, _positive, text, default_text=default)
    _add_option(group, ModelOptions, "bridge", str, "what the decoder starts from", choices=BRIDGES)
    group.add_argument(
        "--tie-embeddings",
        action="store_true",
        default=argparse.SUPPRESS,
        help="one matrix as the decoder's embedding and in its output layer",
    )
    group.add_argument(
        "--context-every-step",
        action="store_true",
        default=argparse.SUPPRESS,
        help="let the decoder read the encoder's last state at every step",
    )

    for side in ("source", "target"):
        text = f"numbers of extra information for the {side}, in a further column"
        _add_option(group, ModelOptions, f"{side}_extra_size", _positive, text)
    _add_option(group, ModelOptions, "extra_mode", str, "how it enters", choices=EXTRA_MODES)
    _add_option(
        group, ModelOptions, "extra_hidden_size", _positive, "hidden units of --extra-mode mlp"
    )
    _add_option(group, ModelOptions, "extra_place", str, "where it enters", choices=EXTRA_PLACES)
    group.add_argument(
        "--pooling",
        choices=POOLINGS,
        default=argparse.SUPPRESS,
        help="what --task classify judges by: the last state, or mean or maximum over all "
        "(default: last)",
    )

    group = command.add_argument_group("pretrained embeddings")
    for side in ("source", "target"):
        group.add_argument(
            f"--{side}-embeddings",
            metavar="FILE",
            help=f"vectors with which the embeddings of the {side} begin: word2vec, GloVe, or "
            "X.npy with the words in X.txt; FILE may end in .gz",
        )
        group.add_argument(
            f"--freeze-{side}",
            type=_positive,
            nargs="?",
            const=None,
            default=argparse.SUPPRESS,
            metavar="EPOCHS",
            help=f"do not train the embeddings of the {side}: in the first epochs, or without a "
            "number in all",
        )
    group.add_argument(
        "--embeddings-format",
        choices=embeddings.FORMATS,
        help="of both files (default: by the name or the first line)",
    )
    group.add_argument(
        "--fold-case",
        action="store_true",
        help="a word may take the vector of another that differs in upper and lower case",
    )

    group = command.add_argument_group("training")
    _add_option(group, TrainingOptions, "epochs", _positive, "passes over the data")
    _add_option(group, TrainingOptions, "batch_size", _positive, "pairs of a batch")
    _add_option(
        group, TrainingOptions, "optimizer", str, "what updates", choices=training.OPTIMIZERS
    )
    _add_option(group, TrainingOptions, "learning_rate", float, "learning rate; for sgd try 1")
    _add_option(
        group, TrainingOptions, "schedule", str, "of the learning rate", choices=training.SCHEDULES
    )
    _add_option(
        group,
        TrainingOptions,
        "select",
        str,
        "what tells the best epoch, of the validation pairs",
        choices=training.SELECTIONS,
    )
    _add_option(group, TrainingOptions, "warmup_steps", int, "steps of --schedule warmup")
    _add_option(group, TrainingOptions, "halve_after", float, "epochs of --schedule halving")
    _add_option(group, TrainingOptions, "halve_every", float, "epochs between its halvings")
    _add_option(
        group, TrainingOptions, "patience", _positive, "epochs without a better one, then stop"
    )
    _add_option(
        group,
        TrainingOptions,
        "average",
        str,
        "of the weights, which is what DIR gets",
        choices=AVERAGES,
    )
    _add_option(group, TrainingOptions, "average_decay", float, "of --average exponential")
    _add_option(group, TrainingOptions, "average_epochs", _positive, "epochs of --average epochs")
    _add_option(group, TrainingOptions, "clip_norm", float, "largest norm of the gradients")
    _add_option(group, TrainingOptions, "label_smoothing", float, "share spread over all symbols")
    _add_option(
        group,
        TrainingOptions,
        "scheduled_sampling",
        _schedule,
        "how often the decoder reads the truth: constant:EPSILON, linear:SLOPE[,BEGIN[,LEAST]], "
        "exponential:K or inverse-sigmoid:K, by the number of updates",
    )
    _add_option(
        group,
        TrainingOptions,
        "sampling_choice",
        str,
        "what it reads else",
        choices=scheduled.CHOICES,
    )
    _add_option(
        group, TrainingOptions, "sampling_coin", str, "thrown for each", choices=scheduled.COINS
    )
    _add_option(group, TrainingOptions, "seed", int, "fixes everything random")
    _add_option(group, TrainingOptions, "checkpoint_every", _positive, "steps between checkpoints")
    _add_threads(group)


def _add_option(
    group: Any,
    options: type[ModelOptions] | type[TrainingOptions],
    name: str,
    kind: Callable[[str], Any],
    text: str,
    *,
    choices: Sequence[str] | None = None,
    default_text: str | None = None,
) -> None:
    """An argument for one field of an options class, absent from the result if not given."""
    default = getattr(options, name)
    group.add_argument(
        f"--{name.replace('_', '-')}",
        type=kind,
        choices=choices,
        default=argparse.SUPPRESS,
        metavar=None if choices else "N",
        help=f"{text} (default: {default if default_text is None else default_text})",
    )


def _add_switch(group: Any, name: str, text: str) -> None:
    """``--no-NAME`` for a field that is true by default, absent from the result if not given."""
    group.add_argument(
        f"--no-{name.replace('_', '-')}",
        dest=name,
        action="store_false",
        default=argparse.SUPPRESS,
        help=text,
    )


def _add_predict(commands: Any) -> None:
    command = commands.add_parser(
        "predict",
        help="read lines from standard input, write one output line for each",
        description="Read lines from standard input and write one output line for each.",
    )
    command.set_defaults(run=_predict)
    command.add_argument("model", metavar="DIR", help="a folder that pyseq train wrote")
    command.add_argument(
        "--attention",
        metavar="FOLDER",
        help="write a picture of the attention weights for each line: FOLDER/line-000001.png ...",
    )
    command.add_argument(
        "--n-best",
        type=_positive,
        metavar="N",
        help="write the N best outputs of each line instead of one, or N draws with --sample: "
        "number of the line, log-probability in nats and output, separated by tabs",
    )
    _add_search(command)
    _add_threads(command)


def _add_evaluate(commands: Any) -> None:
    command = commands.add_parser(
        "evaluate",
        help="print error rates, BLEU and chrF on a file of pairs, or how well labels are found",
        description="Print error rates, BLEU and chrF on a file of pairs. Lines with the same "
        "source are right answers to one question: the closest counts. Of a model trained with "
        "--task tag or classify: accuracy, and precision, recall and F1 of each label.",
    )
    command.set_defaults(run=_evaluate)
    command.add_argument("model", metavar="DIR", help="a folder that pyseq train wrote")
    command.add_argument("pairs", nargs="?", metavar="PAIRS.tsv", help="the pairs")
    command.add_argument(
        "--task", choices=["g2p"], help="the test words of the dictionary instead of PAIRS.tsv"
    )
    command.add_argument(
        "--skip-bad-lines",
        action="store_true",
        help="leave out lines that are not pairs instead of stopping",
    )
    command.add_argument(
        "--by-position",
        action="store_true",
        help="also print the share of wrong tokens at each place of the answers, where the model "
        "reads the answer and where it reads its own tokens",
    )
    _add_search(command)
    _add_threads(command)


def _add_import(commands: Any) -> None:
    command = commands.add_parser(
        "import",
        help="turn a model of another library into one of pyseq",
        description="Read a checkpoint of another library, without running what is in it, and "
        "save the model for pyseq predict and pyseq evaluate.",
    )
    command.set_defaults(run=_import)
    command.add_argument("checkpoint", metavar="FILE", help="the other library's file")
    command.add_argument(
        "--from", dest="layout", required=True, choices=importers.LAYOUTS, help="the library"
    )
    command.add_argument("--out", required=True, metavar="DIR", help="where the model goes")
    command.add_argument(
        "--overwrite", action="store_true", help="replace the model that DIR holds"
    )
    for side in ("source", "target"):
        command.add_argument(
            f"--{side}-vocab",
            metavar="FILE",
            help=f"the library's vocabulary of the {side}, where the checkpoint does not hold it",
        )
    command.add_argument(
        "--initial-state",
        choices=("zero", "last"),
        help="of a joeynmt decoder without bridge: init_hidden in its configuration",
    )
    command.add_argument(
        "--scaled-embeddings",
        action="store_true",
        help="of a joeynmt model: scale is set for the embeddings in its configuration",
    )


def _begin(arguments: argparse.Namespace) -> None:
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)


def _gives_labels(folder: str) -> bool:
    return checkpoint.kind(folder) != Seq2Seq.__name__


def _load(arguments: argparse.Namespace) -> Translator:
    return Translator.load(arguments.model, *arguments.others)


def _search(
    arguments: argparse.Namespace, translator: Translator
) -> Callable[[list[str]], list[list[Translation]]]:
    """What finds the outputs for some lines, as the arguments say."""
    names = {field.name for field in fields(SearchOptions)} - {"prefix"}  # which is text here
    given = {name: value for name, value in vars(arguments).items() if name in names}
    for name, default in (("max_length", translator.max_length), ("n_best", 1)):
        if given.get(name) is None:
            given[name] = default
    generator = torch.Generator(next(translator.model.parameters()).device)
    try:
        options = SearchOptions(**given)
        generator.manual_seed(arguments.seed)
    except (ValueError, RuntimeError) as error:  # what argparse cannot judge
        raise PyseqError(str(error)) from error

    def search(lines: list[str]) -> list[list[Translation]]:
        try:
            return translator.search(
                lines,
                options,
                prefix=arguments.prefix,
                replace_unknown=arguments.replace_unknown,
                batch_size=arguments.batch_size,
                generator=generator,
            )
        except PyseqError:
            raise
        except ValueError as error:  # an option that does not go with the model
            raise PyseqError(f"{arguments.model}: {error}") from error

    search([])  # so that such an option is refused before there is anything to read
    return search


def _require_one_source(arguments: argparse.Namespace) -> None:
    if (arguments.pairs is None) != (arguments.task == "g2p"):
        raise PyseqError("give either a file of pairs or --task g2p")


def _read(path: str, *, skip_bad_lines: bool) -> list[TextPair]:
    found: PairsFile = read_pairs(path, skip_bad_lines=skip_bad_lines)
    if found.skipped:
        _say(f"{len(found.skipped)} bad lines left out, the first: {found.skipped[0]}")
    return found.pairs


# train


def _train(arguments: argparse.Namespace) -> None:
    _begin(arguments)
    _require_one_source(arguments)
    if arguments.task == "g2p":
        metrics.require_packages(text_scores=False)
    out = Path(arguments.out)
    if not arguments.resume and not arguments.overwrite:
        for folder in (out, out / training.LAST):
            if checkpoint.exists(folder):
                raise PyseqError(
                    f"{folder}: holds a model already; give --resume to go on with it, "
                    "--overwrite to begin anew, or another --out"
                )
    with distributed.joined(torch.device("cpu")) as processes:
        trainer = _resume(arguments, out) if arguments.resume else _start(arguments, out)
        if not processes.is_first:
            try:
                trainer.run()
            except Interrupted as error:  # the first one says so
                raise SystemExit(_EXIT_SIGNAL + error.signum) from error
            return
        validation = trainer.validation
        _say(
            f"{len(trainer.examples):,} training pairs, "
            f"{0 if validation is None else len(validation):,} for validation, "
            f"{sum(p.numel() for p in trainer.model.parameters()):,} weights, "
            f"{torch.get_num_threads()} threads"
            + (f" in each of {processes.count} processes" if processes.count > 1 else "")
        )
        trainer.run()
    if arguments.task == "g2p":
        print(g2p.summary(Translator.load(out)))


def _names(options: type) -> list[str]:
    return [field.name for field in fields(options)]


def _label_options(arguments: argparse.Namespace) -> LabelerOptions:
    """What a Tagger or Classifier is made of; what belongs to a decoder is refused."""
    given = set(_given(arguments, ModelOptions)) - set(_names(LabelerOptions))
    others = ("target_tokens", "target_embeddings", "reverse_source", "min_count")
    for name in (*sorted(given), *(name for name in others if getattr(arguments, name))):
        raise PyseqError(f"a model of labels has no decoder and takes no {name}: leave it out")
    return LabelerOptions(**_given(arguments, LabelerOptions))


def _given(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """The fields of an options class that were given as arguments."""
    names = _names(options)
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    if given.get("score") == "none":
        given["score"] = None
        given.setdefault("input_feeding", False)  # what is fed back is made by attention
    return given


def _embeddings_file(arguments: argparse.Namespace, side: str) -> EmbeddingsFile | None:
    path = getattr(arguments, f"{side}_embeddings")
    if path is None:
        return None
    return EmbeddingsFile(path, format=arguments.embeddings_format, fold_case=arguments.fold_case)


def _start(arguments: argparse.Namespace, out: Path) -> Trainer:
    tokens = (
        arguments.source_tokens or arguments.tokens or "char",
        arguments.target_tokens or arguments.tokens or "char",
    )
    if arguments.task in training.TASKS:
        source_tokens = training.LABELER_TOKENS[arguments.task]
        tokens = (arguments.source_tokens or arguments.tokens or source_tokens, "space")
    model_given = _given(arguments, ModelOptions)
    training_given = _given(arguments, TrainingOptions)
    if arguments.task == "g2p":
        tokens = (g2p.SOURCE_TOKENS, g2p.TARGET_TOKENS)
        model_given = {**g2p.MODEL, **model_given}
        training_given = {**g2p.TRAINING, **training_given}
    try:
        options = TrainingOptions(**training_given)
        data, validation = _data(arguments, tokens, options.seed, model_given)
        if arguments.task in training.TASKS:
            return training.start_labeler(
                data,
                validation,
                task=arguments.task,
                tokens=tokens[0],
                model=_label_options(arguments),
                options=options,
                out=out,
                progress=True,
                log=_say,
                tensorboard=arguments.tensorboard,
                source_embeddings=_embeddings_file(arguments, "source"),
            )
        if hasattr(arguments, "pooling"):
            raise PyseqError("--pooling goes with --task classify")
        return training.start(
            data,
            validation,
            tokens=tokens,
            reverse_source=arguments.reverse_source,
            min_count=arguments.min_count or 1,
            model=ModelOptions(**model_given),
            options=options,
            out=out,
            progress=True,
            log=_say,
            tensorboard=arguments.tensorboard,
            source_embeddings=_embeddings_file(arguments, "source"),
            target_embeddings=_embeddings_file(arguments, "target"),
        )
    except PyseqError:
        raise
    except ValueError as error:  # an option that argparse cannot judge
        raise PyseqError(str(error)) from error


def _resume(arguments: argparse.Namespace, out: Path) -> Trainer:
    saved, state = training.last_checkpoint(out)
    tokens = (saved.source_tokens or "char", saved.target_tokens or "char")
    task = _TASK_OF.get(type(saved.model).__name__)
    if arguments.task not in (task, None if task is not None else "g2p"):
        raise PyseqError(f"--resume goes on with --task {task}, got {arguments.task}")
    if task is not None:
        _label_options(arguments)
        arguments.task = task
        tokens = (tokens[0], tokens[0])  # --tokens is about the source
    begun = vars(training.begun_options(state))
    _refuse_changes(arguments, {**saved.model.config, **begun}, tokens)
    if arguments.reverse_source and not saved.reverse_source:
        raise PyseqError(
            "--resume goes on with sources as they stand: leave --reverse-source out, or begin "
            "a new run"
        )
    seed = state.record["options"]["seed"]
    data, validation = _data(arguments, tokens, seed, saved.model.config)
    return training.resume(
        data,
        validation,
        out=out,
        epochs=getattr(arguments, "epochs", None),
        checkpoint_every=getattr(arguments, "checkpoint_every", None),
        patience=getattr(arguments, "patience", None),
        progress=True,
        log=_say,
        tensorboard=arguments.tensorboard,
        source_embeddings=_embeddings_file(arguments, "source"),
        target_embeddings=_embeddings_file(arguments, "target"),
    )


def _refuse_changes(
    arguments: argparse.Namespace, options: dict[str, Any], tokens: tuple[str, str]
) -> None:
    """Refuse arguments that contradict the run to be resumed."""
    now: dict[str, Any] = {}
    for kind in (ModelOptions, LabelerOptions, TrainingOptions):
        now |= _given(arguments, kind)
    before = {**options, "source_tokens": tokens[0], "target_tokens": tokens[1]}
    for side in ("source_tokens", "target_tokens"):
        value = getattr(arguments, side) or arguments.tokens
        if value is not None:
            now[side] = value
    for name, value in now.items():
        if name not in training.FREE_ON_RESUME and before.get(name) != value:
            raise PyseqError(
                f"--resume goes on with {name} = {before.get(name)}, got {value}: leave the "
                "option out, or begin a new run"
            )


def _data(
    arguments: argparse.Namespace, tokens: tuple[str, str], seed: int, options: Mapping[str, Any]
) -> tuple[Data, Data | None]:
    """Training and validation pairs, for a model with these options."""
    if arguments.task == "g2p":
        parts = g2p.load()
        return (
            Data(g2p.pairs(parts.train), "cmudict (training words)"),
            Data(g2p.pairs(parts.validation), "cmudict (validation words)"),
        )

    def read(path: str) -> list[Pair]:
        texts = _read(path, skip_bad_lines=arguments.skip_bad_lines)
        if arguments.task in training.TASKS:
            return training.tokenise_labels(texts, task=arguments.task, tokens=tokens[0])
        return tokenise(
            texts,
            source=Tokenizer(tokens[0]),
            target=Tokenizer(tokens[1]),
            extra_sizes=(options.get("source_extra_size"), options.get("target_extra_size")),
            name=path,
        )

    pairs = read(arguments.pairs)
    if arguments.valid is not None:
        held = read(arguments.valid)
        return Data(pairs, arguments.pairs), Data(held, arguments.valid)
    pairs, held = hold_out(pairs, arguments.valid_share, seed=seed)
    return Data(pairs, arguments.pairs), Data(held, arguments.pairs) if held else None


# import


def _import(arguments: argparse.Namespace) -> None:
    if checkpoint.exists(arguments.out) and not arguments.overwrite:
        raise PyseqError(
            f"{arguments.out}: holds a model already; give --overwrite to replace it, or another "
            "--out"
        )
    try:
        translator = importers.read_model(
            arguments.layout,
            arguments.checkpoint,
            source_vocab=arguments.source_vocab,
            target_vocab=arguments.target_vocab,
            initial_state=arguments.initial_state,
            scaled_embeddings=arguments.scaled_embeddings,
        )
    except PyseqError:
        raise
    except ValueError as error:  # options that do not go together
        raise PyseqError(str(error)) from error
    translator.save(arguments.out)
    _say(
        f"{len(translator.source_vocab):,} source and {len(translator.target_vocab):,} target "
        f"symbols, {sum(p.numel() for p in translator.model.parameters()):,} weights"
    )


# predict


def _predict(arguments: argparse.Namespace) -> None:
    _begin(arguments)
    if _gives_labels(arguments.model):
        _refuse_search(arguments)
        _predict_labels(arguments)
        return
    translator = _load(arguments)
    search = _search(arguments, translator)
    pictures = None if arguments.attention is None else Path(arguments.attention)
    if pictures is not None:
        if any(model.config["score"] is None for model in (translator.model, *translator.others)):
            raise PyseqError(f"{arguments.model}: this model has no attention to draw")
        pictures.mkdir(parents=True, exist_ok=True)
    for batch in _input_batches(translator, arguments.batch_size):
        texts = [text for _, text in batch]
        for (number, text), results in zip(batch, search(texts), strict=True):
            if arguments.n_best is None:
                print(results[0].text)
            else:
                for result in results:
                    print(f"{number}\t{result.score:.4f}\t{result.text}")
            if pictures is not None:
                _draw(pictures / f"line-{number:06}.png", text, results[0])
        sys.stdout.flush()


def _predict_labels(arguments: argparse.Namespace) -> None:
    labeler = Labeler.load(arguments.model)
    for batch in _input_batches(labeler, arguments.batch_size):
        for result in labeler.predict([text for _, text in batch]):
            print(result.text)
        sys.stdout.flush()


def _input_batches(model: Translator | Labeler, batch_size: int) -> Iterator[list[tuple[int, str]]]:
    """Numbers and texts of lines that are computed together; says once what is unknown."""
    # At a terminal each line is answered before the next one is typed.
    size = 1 if sys.stdin.isatty() else batch_size
    warned = False
    for batch in _batches(_input_lines(), size):
        for number, text in batch:
            unknown = model.unknown_symbols(text)
            if unknown and not warned:
                warned = True
                _say(
                    f"line {number}: {unknown[0]!r} was not in the training data and is read as "
                    "<unk>, like all such symbols from here on"
                )
        yield batch


def _input_lines() -> Iterator[tuple[int, str]]:
    for number, text in read_lines(sys.stdin.buffer, name="standard input"):
        if isinstance(text, DataError):
            raise text
        yield number, text


def _batches(lines: Iterator[tuple[int, str]], size: int) -> Iterator[list[tuple[int, str]]]:
    while batch := list(islice(lines, size)):
        yield batch


def _draw(path: Path, text: str, result: Translation) -> None:
    columns = [*result.source_tokens, SPECIALS[STOP]]
    # A blank line is not read, and nothing is looked at for an empty output.
    weights = torch.empty(0, len(columns)) if not result.tokens else result.weights
    assert weights is not None  # _predict refuses models without attention
    save_heatmap(
        path,
        weights,
        rows=result.tokens,
        columns=columns,
        title=f"{text} → {result.text}",
    )


# evaluate


def _evaluate(arguments: argparse.Namespace) -> None:
    _begin(arguments)
    _require_one_source(arguments)
    if _gives_labels(arguments.model):
        _refuse_search(arguments)
        if arguments.by_position:
            raise PyseqError(f"{arguments.model}: this model gives labels: leave out --by-position")
        _evaluate_labels(arguments)
        return
    metrics.require_packages(text_scores=True)
    translator = _load(arguments)
    search = _search(arguments, translator)
    if arguments.by_position and arguments.others:
        raise PyseqError("--by-position goes with one model: leave out --with")
    if arguments.task == "g2p":
        entries = g2p.load().test
        pairs = g2p.pairs(entries)
        answers = {
            entry.word: [" ".join(phonemes) for phonemes in entry.pronunciations]
            for entry in entries
        }
    else:
        found = _read(arguments.pairs, skip_bad_lines=arguments.skip_bad_lines)
        pairs = tokenise(
            found,
            source=translator.source_tokenizer,
            target=translator.target_tokenizer,
            extra_sizes=translator.extra_sizes,
            name=arguments.pairs,
        )
        answers = {}
        columns = sum(size is not None for size in translator.extra_sizes)
        for pair in found:
            line = "\t".join((pair.source, *pair.columns[:columns]))
            answers.setdefault(line, []).append(pair.target)
    results = [best[0] for best in search(list(answers))]
    references = list(answers.values())
    tokenizer = translator.target_tokenizer
    rates = metrics.error_rates(
        [result.tokens for result in results],
        [[tokenizer.split(text) for text in texts] for texts in references],
    )
    scores = metrics.text_scores(
        [result.text for result in results],
        references,
        tokenize=_BLEU_TOKENIZE[tokenizer.name],
    )
    print(f"lines  {rates.lines:,}")
    print(f"PER    {rates.token:.2%}  (edits over {tokenizer.name} tokens of the closest answer)")
    print(f"WER    {rates.line:.2%}  (lines that equal no answer)")
    print(f"BLEU   {scores.bleu:.2f}  ({scores.bleu_signature})")
    print(f"chrF   {scores.chrf:.2f}  ({scores.chrf_signature})")
    if arguments.by_position:
        _print_positions(arguments, translator, pairs)


def _print_positions(
    arguments: argparse.Namespace, translator: Translator, pairs: list[Pair]
) -> None:
    """Where the errors are, next step by next step and running free."""
    examples = translator.encode(pairs, name=arguments.pairs or "cmudict (test words)")
    shares = [
        training.errors_by_position(
            translator.model,
            examples,
            batch_size=arguments.batch_size,
            free_running=free_running,
        )
        for free_running in (False, True)
    ]
    print("\nposition  wrong after the answer  wrong after its own tokens")
    for place, (forced, free) in enumerate(zip(*shares, strict=True), start=1):
        print(f"{place:>8}  {forced:>22.2%}  {free:>26.2%}")


def _evaluate_labels(arguments: argparse.Namespace) -> None:
    if arguments.task is not None:
        raise PyseqError(f"{arguments.model}: this model gives labels: give a file of pairs")
    labeler = Labeler.load(arguments.model)
    task = _TASK_OF[type(labeler.model).__name__]
    pairs = _read(arguments.pairs, skip_bad_lines=arguments.skip_bad_lines)
    tokens = labeler.source_tokenizer.name
    expected = training.tokenise_labels(pairs, task=task, tokens=tokens)
    check_labels(expected, name=arguments.pairs, per_token=labeler.per_token)
    results = labeler.predict([pair.source for pair in pairs], batch_size=arguments.batch_size)
    predicted, right = [result.labels for result in results], [pair.target for pair in expected]
    scores = metrics.label_scores(predicted, right)
    print(f"lines     {scores.lines:,}")
    print(f"accuracy  {scores.accuracy:.2%}  (labels that are right)")
    print(f"whole     {scores.line_accuracy:.2%}  (lines whose labels are all right)")
    print(f"macro F1  {scores.macro_f1:.2%}  (mean over the labels in the file)")
    if labeler.per_token and metrics.is_spans(scores.labels):
        whole = metrics.span_scores(predicted, right)
        print(
            f"span F1   {whole.f1:.2%}  (precision {whole.precision:.2%}, recall "
            f"{whole.recall:.2%}, {whole.support:,} spans of B- and I- labels)"
        )
    width = max(map(len, scores.labels))
    print(f"\n{'label':{width}}  precision   recall       F1  in the file")
    for label, score in scores.labels.items():
        print(
            f"{label:{width}}  {score.precision:>9.2%}  {score.recall:>7.2%}  {score.f1:>7.2%}"
            f"  {score.support:>11,}"
        )
