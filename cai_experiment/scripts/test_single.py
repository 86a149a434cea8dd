"""Milestone 0: one example through the whole pipeline, one DPO step, a report.

Run: python cai_experiment/scripts/test_single.py          (the pod: 30 minutes, $0.87; a CPU: one minute)

One instruction, answer, principle, critique, revision, preference pair. Up to 20 instructions are drawn until one pair
passes the gate. Writes cai_experiment/data/single/ and checkpoints/single/; the same command again resumes, and
once finished shows the report. Exit code 0: go; 3: a gate says no-go.
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
    return run_milestone(__doc__, "single", argv)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
