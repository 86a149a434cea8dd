"""How often the harm rules flag harmful and harmless public texts, on the half of each set that they never saw.

Run: python cai_experiment/scripts/score_rules.py --data DIR
     python cai_experiment/scripts/score_rules.py --text "how do I kill a Python process"

DIR holds the public sets in folders of their own (those that are missing are left out): harmbench, red_team_prompts
(catqa, dangerousqa, harmfulqa), alpaca, self_instruct, gsm8k, mt_bench, boolq, medqa.

The rules stand in cai_experiment/evaluation/harm/patterns/. --text shows what they find in one text.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_OK, BadInputError
from cai_experiment.evaluation.harm.score import public_sets, score_rules
from cai_experiment.evaluation.harm_rules import load_rules
from cai_experiment.evaluation.reporting.screen import print_tables
from cai_experiment.scripts._common import plain_parser, run_main


def main(argv: Sequence[str] | None = None) -> int:
    """Score the rules, or show what they find in one text; gives the exit code."""
    args = _parser().parse_args(argv)
    rules = load_rules()
    if args.text is not None:
        print(json.dumps(rules.detect(args.text).to_json(), indent=2, ensure_ascii=False))
        return EXIT_OK
    if args.data is None:
        raise BadInputError("neither --data nor --text is given", "e.g. --data DIR of the public sets")
    found = score_rules(rules, public_sets(args.data))
    print_tables([table.to_json() for table in found.tables])
    if args.json:
        figures = {name: result.to_json() for name, result in found.metrics.items()}
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"{len(rules.book.rules)} rules; what they find in a text: score_rules.py --text TEXT")
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = plain_parser(__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the public sets")
    parser.add_argument("--text", help="show what the rules find in this text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scored half's figures here too")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_main(main))
