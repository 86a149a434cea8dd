"""Milestone 1: ten pairs of two rounds each, ten DPO steps, and whether the trained model prefers the revisions.

Run: python cai_experiment/scripts/test_batch.py           (the pod: 1 hour, $1.74; a CPU: four minutes)
     python cai_experiment/scripts/test_batch.py --run mine --instructions my_questions.csv --field question

Writes cai_experiment/data/batch/ and checkpoints/batch/; the same command again resumes, and once finished shows the
report. Exit code 0: go; 3: a gate says no-go.
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
    return run_milestone(__doc__, "batch", argv)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
