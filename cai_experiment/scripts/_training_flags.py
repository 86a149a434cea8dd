"""The flags of train_dpo.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cai_experiment.milestones import MILESTONES
from cai_experiment.scripts import _sft
from cai_experiment.scripts._common import base_parser, dollars, not_negative, positive, positive_int
from cai_experiment.training.settings import BACKENDS, LOSSES


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The flags of train_dpo.py, whose docstring is `doc`."""
    flags = base_parser(doc)
    group = flags.add_argument_group("training")
    group.add_argument("--milestone", choices=MILESTONES, help="its pairs, steps and gates")
    group.add_argument("--pairs", type=Path, metavar="FILE", help=".jsonl or .json preference file; steps by its size")
    group.add_argument("--steps", "--max-steps", type=positive_int, metavar="N", help="default: by milestone or size")
    group.add_argument("--epochs", type=positive, metavar="N", help="passes over the training pairs")
    group.add_argument("--learning-rate", type=positive, metavar="RATE", help="(default: 5e-6, or the preset's)")
    group.add_argument("--beta", type=positive, default=0.1, help="hold on the reference (default: %(default)s)")
    group.add_argument("--lora-r", type=positive_int, default=32, metavar="N", help="(default: %(default)s)")
    group.add_argument("--lora-alpha", type=positive_int, default=64, metavar="N", help="(default: %(default)s)")
    group.add_argument("--effective-batch", type=positive_int, default=8, metavar="N", help="pairs a step (default: 8)")
    group.add_argument("--max-length", type=positive_int, metavar="N",
                       help="longer pairs are dropped (default: 4096, or less, by memory, from 1024 on)")  # fmt: skip
    _how(group)
    group.add_argument("--max-hours", type=positive, metavar="H", help="stop resumably after so many hours")
    group.add_argument("--max-cost", type=dollars, metavar="DOLLARS", help="stop resumably at this cost")
    group.add_argument("--report-to", choices=("none", "tensorboard", "wandb"), default="none")
    group.add_argument("--resume", type=Path, metavar="PATH", help="this checkpoint, not the newest whole one")
    group.add_argument("--no-eval", action="store_true", help="leave out the milestone's evaluation")
    _sft.add_flags(flags)
    flags.set_defaults(started=None)  # the clock of the limits
    return flags


def _how(group: Any) -> None:
    """Backend, loss, checkpoints, what is looked at on the way."""
    group.add_argument("--backend", choices=BACKENDS, default="auto", help="auto: unsloth on a GPU, fast on a CPU")
    group.add_argument("--loss", choices=LOSSES, default="sigmoid", help="(default: %(default)s)")
    group.add_argument("--nll-weight", type=not_negative, default=0.0, metavar="W", help="of chosen answers' NLL (0)")
    group.add_argument("--token-budget", type=positive_int, metavar="N", help="fast: tokens a pass (by memory)")
    group.add_argument("--save-every", type=positive_int, metavar="N", help="steps (default: a tenth, at most 25)")
    group.add_argument("--keep", type=positive_int, default=2, metavar="N", help="newest checkpoints, beside the best")
    group.add_argument("--eval-every", type=positive_int, metavar="N", help="steps between held-out margins")
    group.add_argument("--early-stop", type=positive_int, metavar="N", help="end after N of them without a better one")
    group.add_argument("--sample-every", type=positive_int, metavar="N", help="steps between sample answers")
