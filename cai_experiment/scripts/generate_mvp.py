"""Milestone 2, first half: 100 pairs of two rounds each. train_dpo.py --milestone mvp is the second half.

Run: python cai_experiment/scripts/generate_mvp.py              (the pod: with training 2-3 hours, $5.22)
     python cai_experiment/scripts/generate_mvp.py --add 50     (extends the finished run, once: see below)

Writes cai_experiment/data/mvp/; the same command again resumes, and once finished shows the report. So the same --add
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
    return run_milestone(__doc__, "mvp", argv)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
