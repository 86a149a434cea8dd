r"""Milestone 3, first part: 5,000 pairs or more, read by a guard. train_dpo.py --milestone full is the second part.

Run: python cai_experiment/scripts/generate_full.py --plan        (tokens, hours and dollars; nothing is loaded)
     python cai_experiment/scripts/generate_full.py               (the pod: with training 5 hours and more, $8.70)
     python cai_experiment/scripts/generate_full.py --mix self:0.6,red_team.jsonl:0.2,helpful.json:0.2 \
         --exclude held_out.csv    (an evaluation set; rows of HarmBench and MT-Bench are refused anyway)
     python cai_experiment/scripts/generate_full.py --add 1000    (extends the finished run, once: see below)

Writes cai_experiment/data/full/; the same command again resumes, and once finished shows the report. So the same --add
again never extends a second time: it says the --count that does. Exit code 0: go; 3: a gate says no-go.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.scripts._common import run_main
from cai_experiment.scripts._milestone import run_milestone


def main(argv: Sequence[str] | None = None) -> int:
    """Run the milestone; gives the exit code."""
    return run_milestone(__doc__, "full", argv)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
