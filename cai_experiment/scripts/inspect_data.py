"""Read the examples of a run in the terminal: a list, or one of them in full.

python cai_experiment/scripts/inspect_data.py --run batch
python cai_experiment/scripts/inspect_data.py --run batch --index 0
python cai_experiment/scripts/inspect_data.py --run mvp --rejected --reason near_identical --grep balcony -v 3
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Sequence

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_OK, BadInputError
from cai_experiment.records.files import read_examples, show
from cai_experiment.records.schema import Example
from cai_experiment.scripts._common import base_parser, run_main

NEWEST = "newest"
PAIRS, REJECTED = "pairs.jsonl", "rejected.jsonl"


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = base_parser(__doc__, NEWEST, plans=False)
    group = parser.add_argument_group("which examples")
    group.add_argument("--id", help="show this example in full, accepted or rejected")
    group.add_argument("--index", type=int, metavar="N", help="show the N-th example of the list in full (from 0)")
    group.add_argument("--rejected", action="store_true", help="the rejected examples instead of the accepted ones")
    group.add_argument("--reason", help="only those rejected for this reason (implies --rejected)")
    group.add_argument("--principle", metavar="ID", help="only those with a round on this principle")
    group.add_argument("--grep", metavar="TEXT", help="only those that hold this text anywhere, in any case")
    return parser


def run_folder(data_dir: Path, run: str) -> Path:
    """The folder of a run; of all runs the one written last for "newest". Raises BadInputError if there is none."""
    if run != NEWEST:
        return data_dir / run
    runs = sorted(data_dir.glob(f"*/{PAIRS}"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise BadInputError(f"{show(data_dir)} holds no run", "make one first, e.g. with test_single.py")
    return runs[-1].parent


def find(folder: Path, args: argparse.Namespace) -> list[tuple[int, Example]]:
    """The examples that the flags ask for, each with its place in its file. Raises BadInputError for an unknown one."""
    if args.id is not None:
        both = [*enumerate(read_examples(folder / PAIRS)), *enumerate(read_examples(folder / REJECTED))]
        return _known(
            [pair for pair in both if pair[1].id == args.id], "--id", args.id, {e.id for _, e in both}, folder
        )
    path = folder / (REJECTED if args.rejected or args.reason else PAIRS)
    found = list(enumerate(read_examples(path)))
    if args.reason:
        reasons = {reason for _, e in found for reason in e.reject_reasons}
        found = [pair for pair in found if args.reason in pair[1].reject_reasons]
        _known(found, "--reason", args.reason, reasons, path)
    if args.principle:
        principles = {one.principle_id for _, e in found for one in e.rounds}
        found = [pair for pair in found if any(one.principle_id == args.principle for one in pair[1].rounds)]
        _known(found, "--principle", args.principle, principles, path)
    if args.grep:
        found = [pair for pair in found if args.grep.lower() in _all_text(pair[1]).lower()]
    if args.index is not None:
        if not 0 <= args.index < len(found):
            raise BadInputError(f"--index {args.index}: {show(path)} has {len(found)} such examples", "count from 0")
        return [found[args.index]]
    return found


def _known(
    found: list[tuple[int, Example]], flag: str, value: str, known: set[str], place: Path
) -> list[tuple[int, Example]]:
    """`found`, or BadInputError that lists up to ten values that would find something."""
    if not found:
        have = ", ".join(sorted(known)[:10]) or "none"
        raise BadInputError(f"{show(place)} has no example for {flag} {value!r}", f"there are: {have}")
    return found


def _all_text(example: Example) -> str:
    rounds = [text for one in example.rounds for text in (one.critique, one.revised_answer)]
    return "\n".join([example.id, example.instruction, example.initial_answer, example.revised_answer, *rounds])


def main(argv: Sequence[str] | None = None) -> int:
    """Print what the flags ask for."""
    args = make_parser().parse_args(argv)
    folder = run_folder(args.data_dir, args.run)
    found = find(folder, args)

    from rich.console import Console

    from cai_experiment.evaluation.reporting.screen import print_example, print_list

    console = Console(highlight=False)
    if args.id is not None or args.index is not None or args.verbosity == 3:
        for _, example in found:
            print_example(example, console)
    else:
        print_list(found, console)
    console.print(f"{len(found)} shown from {show(folder)}", markup=False, soft_wrap=True)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_main(main))
