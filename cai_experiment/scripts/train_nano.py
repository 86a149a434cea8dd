"""Make the shipped model again, from nothing.

Run: python cai_experiment/scripts/train_nano.py            (two free cores: some 40 minutes, by its pace so far)
     python cai_experiment/scripts/train_nano.py --from FOLDER --out FOLDER_B   (nano trained on, 8 minutes: nano-b)

It stops by steps, not by the clock, and the same command resumes. The model grows in WORK/model; only after the last
step it becomes OUT, and the model that was there is moved to OUT.<time>. Measure the result with check_nano.py.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.constitution.principles import DEFAULT_CONSTITUTION, Principle, load_constitution
from cai_experiment.errors import EXIT_OK, BadInputError
from cai_experiment.nano import NANO_DIR, is_nano
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts._common import ROOT, plain_parser, positive_int, run_main


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, train, say what to do next."""
    args = _parser().parse_args(argv)
    principles = load_constitution(DEFAULT_CONSTITUTION).principles

    from cai_experiment.nano.train import TrainSettings, train

    changes = {"steps": args.steps, "seed": args.seed, "threads": args.threads}
    given = {name: value for name, value in changes.items() if value is not None}
    with RunFolder(args.work, args.fresh):
        if args.start is None:
            train(TrainSettings(**given), principles, args.out, args.work, _say)
        else:
            _train_on(args, given, principles)
    check = [] if args.out.resolve() == NANO_DIR else ["--model", str(args.out)]
    print("next: " + shlex.join(["python", "cai_experiment/scripts/check_nano.py", *check]))
    return EXIT_OK


def _train_on(args: argparse.Namespace, given: dict[str, Any], principles: Sequence[Principle]) -> None:
    """--from: more steps of the last course from finished weights."""
    from cai_experiment.nano import train_on
    from cai_experiment.nano.train import TrainSettings

    if not is_nano(args.start):
        raise BadInputError(f"--from {args.start}: holds no model of the written world", f"give {NANO_DIR}")
    if args.out.resolve() == args.start.resolve():
        raise BadInputError(f"--out {args.out} is where --from begins", "name another folder with --out")
    settings = TrainSettings(**{"steps": train_on.STEPS, "seed": train_on.SEED, **given})
    train_on.train_on(args.start, principles, args.out, args.work, settings, _say)


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = plain_parser(__doc__)
    parser.add_argument("--out", type=Path, default=NANO_DIR, help="the finished model (default: the shipped one)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "nano", help="where the training resumes from")
    parser.add_argument("--from", dest="start", type=Path, metavar="FOLDER",
                        help="train this finished model on, in its last course, not one from nothing")  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="start anew; what is in WORK is moved to WORK.<time>")
    parser.add_argument("--steps", type=positive_int, metavar="N", help="(default: the shipped model's)")
    parser.add_argument("--seed", type=int, help="another seed makes another model of the same kind")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="(default: 2)")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
