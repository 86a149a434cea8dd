"""Train the scalar heads of a token-level ensemble over frozen experts. The same command resumes.

Run: python cai_experiment/scripts/train_ensemble.py
     python cai_experiment/scripts/train_ensemble.py --datasets cola13/gsm8k_formatted cola13/medqa_formatted \\
         cola13/boolq_formatted --output_dir ./model_outputs --num_epochs 5 --batch_size 4 --learning_rate 1e-4
     python cai_experiment/scripts/train_ensemble.py --models FOLDER FOLDER --datasets my_questions.jsonl

With a GPU the experts are three Qwen2.5 models of 1.5B parameters (general, medical, mathematical) and the datasets the
three above; without one both are the small ones that ship with the project. Writes best_model_heads.safetensors (the
heads with the lowest held-out loss), train_log.jsonl, summary.json and checkpoints to OUTPUT_DIR. The first epoch
computes the experts' states and keeps them in OUTPUT_DIR/states, so that each further epoch costs next to nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_OK
from cai_experiment.scripts._common import (
    QUANTIZATIONS,
    dollars,
    not_negative,
    plain_parser,
    positive,
    positive_int,
    run_main,
)

MAX_LENGTH = 1024  # the longest BoolQ passages and MedQA cases have some 900 tokens


def share(text: str) -> float:
    """argparse type: a number between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def whole(text: str) -> int:
    """argparse type: a whole number of 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def two_or_more(text: str) -> int:
    """argparse type: a whole number of 2 or more."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text} is not 2 or more")
    return value


def below_one(text: str) -> float:
    """argparse type: a number from 0 to below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more and below 1")
    return value


def parser() -> argparse.ArgumentParser:
    """The flags: the original's, then ours."""
    flags = plain_parser(__doc__)
    flags.add_argument("--datasets", nargs="+", metavar="NAME",
                       help="hub ids, local files, gsm8k, medqa, boolq, or shipped sets (default: "
                            "cola13/gsm8k_formatted cola13/medqa_formatted cola13/boolq_formatted; over the shipped "
                            "experts general medical mathematical two)")  # fmt: skip
    flags.add_argument("--output_dir", type=Path, default=Path("model_outputs"), metavar="DIR",
                       help="(default: ./%(default)s)")  # fmt: skip
    flags.add_argument("--num_epochs", type=positive_int, default=5, metavar="N", help="(default: %(default)s)")
    flags.add_argument("--batch_size", type=positive_int, default=4, metavar="N",
                       help="rows a step (default: %(default)s)")  # fmt: skip
    flags.add_argument("--learning_rate", type=positive, default=1e-4, metavar="RATE", help="(default: 1e-4)")
    flags.add_argument("--warmup_steps", type=whole, default=50, metavar="N",
                       help="at most half of all steps (default: %(default)s)")  # fmt: skip
    flags.add_argument("--entropy_weight", type=not_negative, default=0.1, metavar="W", help="(default: %(default)s)")
    flags.add_argument("--head_hidden_dim", type=two_or_more, default=256, metavar="N", help="(default: %(default)s)")
    flags.add_argument("--head_dropout", type=below_one, default=0.1, metavar="P", help="(default: %(default)s)")
    flags.add_argument("--seed", type=int, default=42, help="(default: %(default)s)")
    flags.add_argument("--device", choices=("cuda", "cpu", "mps"), help="(default: the best there is)")
    flags.add_argument("--log_every_n_steps", type=positive_int, default=5, metavar="N", help="(default: %(default)s)")
    _ours(flags)
    return flags


def _ours(flags: argparse.ArgumentParser) -> None:
    ours = flags.add_argument_group("beyond the original")
    ours.add_argument("--models", nargs="+", metavar="MODEL",
                      help="the experts: hub ids, presets, folders, shipped names, random:PRESET (default: "
                           "CAI_ENSEMBLE_MODELS, else by the hardware)")  # fmt: skip
    ours.add_argument("--precision", choices=QUANTIZATIONS,
                      help="of the experts (default: bf16 on a GPU, fp32 on a CPU)")  # fmt: skip
    ours.add_argument("--tokenizer", metavar="FOLDER", help="the tokenizer of random:PRESET")
    ours.add_argument("--train_on_prompt", action="store_true", help="prompt tokens count too, as in the original")
    ours.add_argument("--max_rows", type=positive_int, metavar="N",
                      help="of each dataset (default: all of the smallest; of a shipped one 1,200)")  # fmt: skip
    ours.add_argument("--validation_share", type=share, default=0.1, metavar="S",
                      help="of each dataset's rows (default: %(default)s)")  # fmt: skip
    ours.add_argument("--max_length", type=positive_int, default=MAX_LENGTH, metavar="N",
                      help="longer rows are left out (default: %(default)s or the experts' context)")  # fmt: skip
    ours.add_argument("--prompt_column", metavar="NAME", help="the question's column in a file or hub set")
    ours.add_argument("--answer_column", metavar="NAME", help="the answer's column")
    ours.add_argument("--cache_dir", type=Path, metavar="DIR", help="for the states (default: OUTPUT_DIR/states)")
    ours.add_argument("--no_cache", action="store_true", help="compute the states anew in every epoch: no disk, slow")
    ours.add_argument("--report_to", choices=("none", "tensorboard", "wandb"), default="none")
    ours.add_argument("--fresh", action="store_true",
                      help="start anew; the old folder is moved to DIR.<time>, its states stay")  # fmt: skip
    ours.add_argument("--plan", action="store_true", help="show rows, disk, hours and dollars; run nothing")
    ours.add_argument("--price_per_hour", type=dollars, metavar="DOLLARS", help="(default: the pod's, else 0)")


def main(argv: Sequence[str] | None = None) -> int:
    """Train or resume; gives the exit code."""
    args = parser().parse_args(argv)
    from cai_experiment.scripts import _train_ensemble

    _train_ensemble.run(args)
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(run_main(main))
