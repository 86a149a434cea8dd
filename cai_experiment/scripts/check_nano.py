"""Measure the shipped model against its world's truth: on unseen combinations, unseen phrasings and unseen nouns.

Run: python cai_experiment/scripts/check_nano.py            (a minute or two on two cores)
     python cai_experiment/scripts/check_nano.py --json     {NAME: {"value", "n", "interval"}}
     python cai_experiment/scripts/check_nano.py --format base    the same through the few-shot layout

Exit code 0 if every target is met, 3 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Sequence

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.constitution.principles import DEFAULT_CONSTITUTION, load_constitution
from cai_experiment.errors import EXIT_NO_GO, EXIT_OK
from cai_experiment.nano import NANO_DIR
from cai_experiment.scripts._common import plain_parser, positive_int, run_main


def main(argv: Sequence[str] | None = None) -> int:
    """Load the model, measure every row, print them."""
    args = _parser().parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    from cai_experiment.engines.load import LoadSettings, load_engine
    from cai_experiment.evaluation.world_check import TARGETS, check

    engine = load_engine(LoadSettings(model=str(args.model), layout=args.format, batch_size=args.batch_size))
    rows = check(engine, load_constitution(DEFAULT_CONSTITUTION).principles, args.items, args.seed)
    missed = [name for name, met in TARGETS.items() if not met(rows[name].value or 0.0)]
    if args.json:
        print(
            json.dumps(
                {name: {"value": r.value, "n": r.n, "interval": r.interval} for name, r in rows.items()}, indent=1
            )
        )
    else:
        table = Table("row", "value", "95% interval", "n", "target")
        for name, r in rows.items():
            low, high = r.interval or (0.0, 0.0)
            verdict = "" if name not in TARGETS else "missed" if name in missed else "met"
            table.add_row(name, f"{r.value or 0.0:.3f}", f"{low:.3f}-{high:.3f}", str(r.n), verdict)
        Console().print(table)
    return EXIT_NO_GO if missed else EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = plain_parser(__doc__)
    parser.add_argument("--model", type=Path, default=NANO_DIR, help="of the written world: nano, nano-b or a folder")
    parser.add_argument("--items", type=positive_int, default=400, help="items a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=("auto", "chat", "base"), default="auto")
    parser.add_argument("--batch-size", type=positive_int, default=64)
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
