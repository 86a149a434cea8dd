"""Ask a trained ensemble: a question, a file of questions, or one after the other at a prompt.

Run: python cai_experiment/scripts/answer_generator.py "A box holds 12 eggs. How many eggs are in 4 boxes?"
     python cai_experiment/scripts/answer_generator.py --questions my_questions.txt --show-experts
     python cai_experiment/scripts/answer_generator.py                      (a prompt; an empty line ends)

--questions takes .txt (a question a line), .jsonl, .json, .csv or .parquet ("question" or "prompt", and "options" where
it has any). --show-experts shows who spoke: each stretch of one expert has its letter, and on a terminal its colour.
--json prints a line of JSON for each question. Sampling is keyed: the same question, seed and heads give one answer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_CTRL_C, EXIT_OK, BadInputError
from cai_experiment.scripts._common import QUANTIZATIONS, not_negative, plain_parser, positive_int, run_main

HEADS = Path("model_outputs/best_model_heads.safetensors")  # where train_ensemble.py puts them


def parser() -> argparse.ArgumentParser:
    """The flags, named as those of the ensemble's other scripts."""
    flags = plain_parser(__doc__)
    flags.add_argument("question", nargs="?", help="(default: those of --questions, else a prompt)")
    flags.add_argument("--questions", type=Path, metavar="FILE", help="of questions, answered in batches")
    flags.add_argument("--show-experts", "--show_experts", action="store_true", help="who spoke which token")
    flags.add_argument("--json", action="store_true", help="a line of JSON a question: answer, speakers, their shares")
    flags.add_argument("--model_weights", type=Path, default=HEADS, metavar="FILE",
                       help="the heads, or their folder (default: ./%(default)s)")  # fmt: skip
    flags.add_argument("--models", nargs="+", metavar="MODEL", help="the experts (default: the heads' own)")
    flags.add_argument("--max_new_tokens", type=positive_int, default=200, metavar="N", help="(default: %(default)s)")
    flags.add_argument("--temperature", type=not_negative, default=0.3, help="(default: %(default)s; 0: greedy)")
    flags.add_argument("--mode", choices=("select", "mixture"), default="select",
                       help="the selected expert speaks, or the mixture of all (default: %(default)s)")  # fmt: skip
    flags.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    flags.add_argument("--precision", choices=QUANTIZATIONS, help="of the experts (default: bf16, on a CPU fp32)")
    flags.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="(default: auto)")
    flags.add_argument("--batch_size", type=positive_int, metavar="N", help="answers at a time (default: 16)")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Answer; gives the exit code."""
    args = parser().parse_args(argv)
    if args.question is not None and args.questions is not None:
        raise BadInputError("a question and --questions both say what to ask", "use one of them")
    if args.question is not None and not args.question.strip():
        raise BadInputError("the question is empty", "write one, or leave it out for a prompt")
    try:
        _answer(args)
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)  # nothing is kept here that a next run could go on from
        return getattr(stop, "exit_code", EXIT_CTRL_C)
    return EXIT_OK


def _answer(args: argparse.Namespace) -> None:
    from cai_experiment.scripts import _answers

    asked = _answers.read_questions(args.questions) if args.questions is not None else None  # before models are loaded
    speaker = _answers.Speaker(args)
    if asked is not None:
        speaker.answer_all(asked)
    elif args.question is not None:
        speaker.answer(args.question)
    else:
        speaker.converse()


if __name__ == "__main__":
    raise SystemExit(run_main(main))
