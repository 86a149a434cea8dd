"""One work, several models: the same instructions, critiques and labelled texts through each, one at a time in memory.

Run: python cai_experiment/scripts/compare_models.py             (on a CPU: nano, nano-b and the rules)
     python cai_experiment/scripts/compare_models.py --models qwen2.5-32b,qwen2.5-14b-base,rules --judge URL
     python cai_experiment/scripts/compare_models.py --models nano,nano-b,rules --count 100

Critique precision, repair rate, detection of harm, tokens a second, memory and cost, with intervals; and a matrix
generator x critic, which shows whether a model judges itself more kindly. "rules" are the harm rules, which take part
in detection alone. Writes DATA_DIR/NAME/comparison.json, comparison.html, tables/, figures/ and items/. The same
command goes on where a killed one was, and shows what is finished (docs/COMPARISON.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_OK, BadInputError
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts import _compare_models, _compare_wanted
from cai_experiment.scripts._common import base_parser, positive_int, run_main
from cai_experiment.scripts._judge import add_judge_flags, check_judge

RUN, COUNT = "compare", 60


def every_name(text: str) -> tuple[str, ...]:
    """argparse type: names between commas; a name that comes twice stays, since it is a mistake to be told."""
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise argparse.ArgumentTypeError("holds no name")
    return found


def parser() -> argparse.ArgumentParser:
    """The flags, those of every script among them."""
    flags = base_parser(__doc__, RUN)
    group = flags.add_argument_group("comparison")
    group.add_argument("--models", metavar="A,B,...", type=every_name, default=(),
                       help='presets, hub ids or folders, and "rules" (default: without a GPU nano,nano-b,rules; with '
                            "one what the hardware allows, its next smaller neighbour of the same family and kind, and "
                            "the rules)")  # fmt: skip
    group.add_argument("--instructions", type=Path, metavar="FILE",
                       help="the first --count of these (default: questions of the shipped model's world, or the 42 "
                            "general questions that ship with the project)")  # fmt: skip
    group.add_argument("--field", help="the field of FILE that holds the instruction")
    group.add_argument("--count", type=positive_int, default=COUNT, metavar="N",
                       help="instructions; more of them extend a run (default: %(default)s)")  # fmt: skip
    group.add_argument("--engine", choices=("auto", "hf", "vllm", "unsloth", "generate"), default="auto",
                       help="auto prints which and why")  # fmt: skip
    add_judge_flags(flags, "the world's truth for the shipped models, else each critic's own word")
    return flags


def check(args: argparse.Namespace) -> None:
    """Raise BadInputError for flags that do not go together."""
    if args.model is not None:
        raise BadInputError(f"--model {args.model} names one model", f"use --models {args.model},ANOTHER")
    if args.random_weights is not None:
        raise BadInputError("--random-weights: random words cannot be compared", "name models with --models")


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the models; gives the exit code."""
    args = parser().parse_args(argv)
    check(args)
    wanted = _compare_wanted.wanted(args)  # a wrong name is told before anything is loaded
    check_judge(args)
    if args.plan:
        from cai_experiment.scripts._compare_plan import plan

        print(*plan(args, wanted), sep="\n")
        return EXIT_OK
    with RunFolder(args.data_dir / args.run, args.fresh) as folder:
        if folder.moved_to is not None:
            print(f"the old run is now {folder.moved_to}")
        _compare_models.run(args, folder.path, wanted)
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(run_main(main))
