"""The flags of eval_model.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from cai_experiment.milestones import MILESTONES
from cai_experiment.scripts import _suite_detection, _suite_forgetting, _suite_harmbench, _suite_mtbench
from cai_experiment.scripts._common import base_parser, positive_int
from cai_experiment.scripts._held_out import add_held_out_flags
from cai_experiment.scripts._judge import add_judge_flags

SUITES = ("milestone", "detection", "harmbench", "mtbench", "forgetting")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The flags of eval_model.py, whose docstring is `doc`."""
    flags = base_parser(doc)
    group = flags.add_argument_group("what is evaluated")
    group.add_argument("--milestone", choices=MILESTONES, help="its run, its suites and its gates")
    group.add_argument("--suite", action="append", choices=SUITES, help="only this one (repeatable)")
    group.add_argument("--adapter", type=Path, metavar="DIR", help="(default: CHECKPOINT_DIR/NAME/final)")
    group.add_argument("--pairs", type=Path, metavar="FILE", help="what it was trained on (default: the run's pairs)")
    group.add_argument("--compare", nargs="+", metavar="RUN", help="set finished runs beside each other, and no more")
    add_held_out_flags(flags)
    add_judge_flags(flags)
    for suite in (_suite_harmbench, _suite_mtbench, _suite_forgetting, _suite_detection):
        suite.add_flags(flags)
    group = flags.add_argument_group("engine")
    group.add_argument("--engine", choices=("auto", "hf", "unsloth"), default="auto",
                       help="auto: hf, which answers in large batches, in 4 bit too; Unsloth cannot")  # fmt: skip
    group.add_argument("--max-length", type=positive_int, default=4096, metavar="N", help="longer pairs are left out")
    return flags
