"""Label a sample of a run by hand: are its critiques meaningful, are its revisions better? The report shows how far
you and the judge agree.

python cai_experiment/scripts/label_critiques.py --run mvp --count 40
python cai_experiment/scripts/label_critiques.py --run mvp --count 40 --question meaningful --who anna

First pairs, in random order without their critiques, then critiques; what the judge said is not shown. Every answer is
written at once into DATA_DIR/NAME/labels.jsonl; the same command goes on where it stopped, and so can other people with
--who. Exit code 0, also after q or Ctrl-D; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Sequence

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_OK, BadInputError
from cai_experiment.records.files import read_examples, show
from cai_experiment.records.store import Journal
from cai_experiment.scripts._common import base_parser, positive_int, run_main
from cai_experiment.scripts.inspect_data import NEWEST, PAIRS, REJECTED, run_folder

if TYPE_CHECKING:
    from rich.console import Console

    from cai_experiment.evaluation.labels import Item
    from cai_experiment.scripts._labelling import Task

QUESTIONS = ("preferred", "meaningful")  # in this order: a critique tells which answer was the first


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = base_parser(__doc__, NEWEST, plans=False)
    group = parser.add_argument_group("labelling")
    group.add_argument("--count", type=positive_int, default=40, metavar="N",
                       help="pairs, and as many critiques (default: %(default)s)")  # fmt: skip
    group.add_argument("--question", choices=QUESTIONS, help="only this one (default: both)")
    group.add_argument("--who", default="person", metavar="NAME", help="who labels (default: %(default)s)")
    return parser


def tasks_of(folder: Path, args: argparse.Namespace) -> list[Task]:
    """The sample of a run that the flags ask for. Raises BadInputError for a run without anything to label."""
    from cai_experiment.scripts._labelling import sample

    accepted, rejected = (read_examples(folder / name) for name in (PAIRS, REJECTED))
    questions = [args.question] if args.question else QUESTIONS
    tasks = [t for q in questions for t in sample(folder, accepted, rejected, q, args.count, args.seed)]
    if not tasks:
        raise BadInputError(f"{show(folder)} holds nothing to label", "make pairs first, e.g. with generate_mvp.py")
    return tasks


def label(folder: Path, tasks: Sequence[Task], who: str, console: Console) -> None:
    """Ask for each task that `who` has not labelled; writes every answer as it comes."""
    from cai_experiment.evaluation.labels import LABELS, read_labels
    from cai_experiment.scripts._labelling import BACK, QUIT, ask, single_keys

    known = {(one.question, one.item) for one in read_labels(folder) if one.who == who}
    journal, at = Journal(folder / LABELS), _next(tasks, known, 0)
    try:
        with single_keys() as keys:
            while at < len(tasks):
                task = tasks[at]
                key = ask(task, f"{at + 1} of {len(tasks)}", keys, console)
                if key == QUIT:
                    break
                if key == BACK:
                    at = max(at - 1, 0)
                    continue
                journal.append(_row(task, task.label(key), who))
                known.add((task.question, task.item))
                at = _next(tasks, known, at + 1)
    finally:
        journal.close()


def _next(tasks: Sequence[Task], known: set[tuple[str, Item]], first: int) -> int:
    """The place of the first task from `first` on that is not labelled; their number if there is none."""
    todo = (i for i, task in enumerate(tasks) if i >= first and (task.question, task.item) not in known)
    return next(todo, len(tasks))


def _row(task: Task, label: str | None, who: str) -> dict[str, object]:
    row: dict[str, object] = {
        "id": task.example.id, "round": task.round, "question": task.question, "label": label, "who": who,
        "judge": task.judge, "time": round(time.time(), 3),
    }  # fmt: skip
    return row | ({"revision_first": task.revision_first} if task.round is None else {})


def print_agreement(folder: Path, tasks: Sequence[Task], who: str, console: Console) -> None:
    """How many are done, and judge against people by question, with n and intervals."""
    from rich.table import Table
    from rich.text import Text

    from cai_experiment.evaluation.labels import agreement, read_labels
    from cai_experiment.evaluation.reporting.words import result_text
    from cai_experiment.observe.screen import escaped

    known = {(one.question, one.item) for one in read_labels(folder) if one.who == who}
    done = sum((task.question, task.item) in known for task in tasks)
    more = "a larger --count asks for more" if done == len(tasks) else "the same command goes on"
    console.print(f"{done} of {len(tasks)} labelled by {escaped(who)}; {more}", markup=False, soft_wrap=True)
    for found in agreement(folder).tables:
        table = Table(title=Text(found.title), title_justify="left")
        for heading in found.columns:
            table.add_column(heading, overflow="fold")
        for row in found.rows:
            table.add_row(*(Text(escaped(c if isinstance(c, str) else result_text(c.to_json()))) for c in row))
        console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Label what the flags ask for, then show the agreement."""
    args = make_parser().parse_args(argv)
    folder = run_folder(args.data_dir, args.run)
    tasks = tasks_of(folder, args)

    from rich.console import Console

    console = Console(highlight=False)
    label(folder, tasks, args.who, console)
    print_agreement(folder, tasks, args.who, console)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_main(main))
