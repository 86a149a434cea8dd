"""Make the three shipped experts again, from nothing: a layperson, then one expert for each field of their world.

Run: python cai_experiment/scripts/train_experts.py --out FOLDER      (two free cores: some 20 minutes)

A finished one of the four is kept in WORK, and the same command goes on with the next. Measure the result with

    python cai_experiment/scripts/train_ensemble.py --models FOLDER/general FOLDER/medical FOLDER/mathematical
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.ensemble.shipped.speakers import FIELDS
from cai_experiment.errors import EXIT_OK, BadInputError
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts._common import ROOT, plain_parser, positive_int, run_main


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, train, say what to do next."""
    parser = plain_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the three experts go")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "experts", help="what is finished, to go on from")
    parser.add_argument("--fresh", action="store_true", help="start anew; what is in WORK is moved to WORK.<time>")
    parser.add_argument("--base_steps", type=positive_int, metavar="N", help="of the layperson (default: the shipped)")
    parser.add_argument("--field_steps", type=positive_int, metavar="N", help="of each expert (default: the shipped)")
    parser.add_argument("--seed", type=int, help="another seed makes other experts of the same kind")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="(default: 2)")
    args = parser.parse_args(argv)
    if args.out.exists() and not _is_ours(args.out):
        raise BadInputError(f"--out {args.out} is there and holds something else", "name a new folder")

    from cai_experiment.ensemble.shipped.training import ExpertSettings, train

    names = ("base_steps", "field_steps", "seed", "threads")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    with RunFolder(args.work, args.fresh):
        train(args.out, args.work, ExpertSettings(**given), _say)
    folders = " ".join(str(args.out / field) for field in FIELDS)
    print(f"next: python cai_experiment/scripts/train_ensemble.py --models {folders}")
    return EXIT_OK


def _is_ours(folder: Path) -> bool:
    """An empty folder, or one with experts alone: a call that was cut off while it published goes on."""
    ours = {*FIELDS, *(f"{field}.tmp" for field in FIELDS)}
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= ours


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
