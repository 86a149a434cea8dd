"""A model investigates itself over several turns: it writes Python, the code runs in a sandbox, the output comes back.

Run: python cai_experiment/scripts/run_investigation.py                     (no documents; the shipped model on a CPU)
     python cai_experiment/scripts/run_investigation.py --condition all --model qwen2.5-7b
     python cai_experiment/scripts/run_investigation.py --style research-driven
     python cai_experiment/scripts/run_investigation.py --compare           (Qwen2.5-3B-Instruct against 7B)

Conditions: none; early (documents from the start); late (before the last task); delayed (conclusions first, then
documents, then a chance to revise); wrong (as early, about another subject). Under each every task has its share of the
context, and the documents' room is kept free. The shipped model cannot write code: it shows how an investigation works,
and finds nothing. Writes DATA_DIR/NAME/CONDITION/conversation.json and .md, notes.json and summary.json, and
comparison.json beside them. The same command goes on where a killed one was, and shows what is finished.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_OK, BadInputError
from cai_experiment.investigations.compare import COMPARED_TURNS, MOST_REPEATS
from cai_experiment.investigations.conditions import CONDITIONS, HERITAGE, OTHER
from cai_experiment.investigations.prompts import FINISH
from cai_experiment.investigations.room import UNKNOWN_CONTEXT
from cai_experiment.investigations.session import SessionSettings
from cai_experiment.investigations.tasks import STYLES
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts import _investigation, _investigation_model
from cai_experiment.scripts._common import base_parser, not_negative, positive_int, run_main

RUN = "investigation"


def parser() -> argparse.ArgumentParser:
    """The flags, those of every script among them."""
    flags, usual = base_parser(__doc__, RUN), SessionSettings()
    group = flags.add_argument_group("investigation")
    group.add_argument("--condition", choices=(*CONDITIONS, "all"), default="none", help="when documents arrive")
    group.add_argument(
        "--style",
        choices=STYLES,
        default="guided",
        help="guided: the tasks in order; research-driven: the model names its own questions",
    )
    group.add_argument("--documents", type=Path, default=HERITAGE, metavar="FOLDER",
                       help="of .txt or .md files (default: four short texts on examining oneself)")  # fmt: skip
    group.add_argument(
        "--other-documents",
        type=Path,
        default=OTHER,
        metavar="FOLDER",
        help="those of condition wrong (default: three texts on bread, tides and clocks)",
    )
    group.add_argument("--repeats", type=positive_int, default=1, metavar="N",
                       help="sessions a condition, each with the next seed; from 2 on there are intervals")  # fmt: skip
    group.add_argument("--compare", nargs="*", metavar="MODEL",
                       help="two models on the architecture task (default: Qwen2.5-3B-Instruct and 7B; without a GPU "
                            "the shipped nano and nano-b)")  # fmt: skip
    _add_limits(flags.add_argument_group("limits"), usual)
    group = flags.add_argument_group("engine and sandbox")
    group.add_argument("--engine", choices=("auto", "hf", "generate", "unsloth"), default="auto",
                       help="one that holds the weights in this process, for introspection (default: hf)")  # fmt: skip
    group.add_argument(
        "--unsafe-local",
        action="store_true",
        help="run the model's code without a sandbox where none works: it can do what you can",
    )
    return flags


def _add_limits(group: argparse._ArgumentGroup, usual: SessionSettings) -> None:
    """Where a task and a session end."""
    group.add_argument(
        "--turns",
        type=positive_int,
        metavar="N",
        help=f"replies a task (default: {usual.task_turns}; with --compare {COMPARED_TURNS})",
    )
    group.add_argument("--reply-tokens", type=positive_int, default=usual.reply_tokens, metavar="N",
                       help="new tokens a reply (default: %(default)s)")  # fmt: skip
    group.add_argument(
        "--max-tokens",
        type=positive_int,
        default=UNKNOWN_CONTEXT,
        metavar="N",
        help="tokens of a whole conversation, at most the model's context (default: %(default)s)",
    )
    group.add_argument("--temperature", type=not_negative, default=usual.temperature, help="(default: %(default)s)")
    group.add_argument("--finish-phrase", default=FINISH, metavar="TEXT", help='ends a task (default: "%(default)s")')


def check(args: argparse.Namespace) -> None:
    """Raise BadInputError for flags that do not go together."""
    if args.compare is not None and len(args.compare) not in (0, 2):
        raise BadInputError(f"--compare takes two models or none, not {len(args.compare)}",
                            "e.g. --compare qwen2.5-3b qwen2.5-7b")  # fmt: skip
    if args.compare and args.model is not None:
        raise BadInputError("--compare names its models, and --model does too", "leave --model out")
    if args.compare is not None and args.random_weights is not None:
        raise BadInputError("--random-weights is one model, and --compare takes two", "leave one of them out")
    if args.repeats > MOST_REPEATS:
        raise BadInputError(f"--repeats {args.repeats} is more than {MOST_REPEATS}", "use fewer")
    if not args.finish_phrase.strip() or "\n" in args.finish_phrase:
        raise BadInputError("--finish-phrase is one line that is not empty", f'e.g. "{FINISH}"')


def main(argv: Sequence[str] | None = None) -> int:
    """Investigate under the conditions asked for, or compare two models; gives the exit code."""
    args = parser().parse_args(argv)
    check(args)
    if args.plan:
        print(*_investigation_model.plan(args), sep="\n")
        return EXIT_OK
    documents = _investigation.documents_of(args)  # before anything is loaded, as is the sandbox
    tier = _investigation.sandbox_tier(args)
    with RunFolder(args.data_dir / args.run, args.fresh) as folder:
        if folder.moved_to is not None:
            print(f"the old run is now {folder.moved_to}")
        if args.compare is not None:
            _investigation.compare(args, folder, documents, tier)
        else:
            _investigation.investigate(args, folder, documents, tier)
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(run_main(main))
