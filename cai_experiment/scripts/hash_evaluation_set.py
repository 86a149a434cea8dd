"""An evaluation set as hashes: every later run refuses instructions that stand in it, and none of its text is kept.

Run: python cai_experiment/scripts/hash_evaluation_set.py FILE --name NAME --source WHERE --licence WHICH

HarmBench and MT-Bench are shipped so. FILE is any file that --exclude and --instructions read. What is written to
cai_experiment/constitution/evaluation_sets/ holds for every run from then on; --out writes it elsewhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_OK
from cai_experiment.pipeline.evaluation_sets import SHIPPED, read_evaluation_set
from cai_experiment.scripts._common import run_main


def main(argv: Sequence[str] | None = None) -> int:
    """Hash one file; gives the exit code."""
    args = _parser().parse_args(argv)
    found = read_evaluation_set(args.file, args.name, args.field)
    path = args.out or SHIPPED / f"{''.join(c if c.isalnum() else '_' for c in args.name.lower())}.json"
    found.write(path, args.source, args.licence)
    print(f"{len(found):,} texts of {args.file} stand as hashes in {path} ({path.stat().st_size / 1000:.0f} kB)")
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the set: .txt .jsonl .json or .csv")
    parser.add_argument("--name", required=True, help="what reports call it")
    parser.add_argument("--source", default="", help="where its texts are from")
    parser.add_argument("--licence", default="", help="under which licence, and whose")
    parser.add_argument("--field", help="the field of FILE that holds the instruction")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write here instead")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_main(main))
