"""Is the ensemble better than its experts? The same questions through all of them, with paired intervals.

Run: python cai_experiment/scripts/eval_ensemble.py --model_weights ./model_outputs/best_model_heads.safetensors
     python cai_experiment/scripts/eval_ensemble.py --datasets gsm8k --sample_size 200 --mode mixture
     python cai_experiment/scripts/eval_ensemble.py --datasets my_questions.jsonl --only_ensemble

Arms: the ensemble, every expert alone, the uniform mixture, a router (the expert who finds the prompt least surprising
answers alone) and an oracle (right where any expert is). Writes OUTPUT_DIR/results.json, answers.jsonl, report.html and
plots/. The same command goes on where a killed one was; answers stay valid for as long as what decides them is the
same, so more questions, another mode or new heads cost no more than what is new.
--debug asks 3 questions of each dataset, shows every answer and any traceback, and writes to OUTPUT_DIR/debug.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_OK
from cai_experiment.scripts._common import QUANTIZATIONS, not_negative, plain_parser, positive_int, run_main

DEBUG_QUESTIONS = 3  # of each dataset


def parser() -> argparse.ArgumentParser:
    """The flags: the original's, then ours."""
    flags = plain_parser(__doc__)
    flags.add_argument("--datasets", nargs="+", default=["all"], metavar="NAME",
                       help="gsm8k, medqa, boolq, a local file, a hub id, a shipped set (general, medical, "
                            "mathematical, two), or all: gsm8k and medqa; with the shipped experts the four shipped "
                            "sets (default: all)")  # fmt: skip
    flags.add_argument("--sample_size", type=positive_int, default=50, metavar="N",
                       help="questions of each dataset (default: %(default)s)")  # fmt: skip
    flags.add_argument("--random_seed", type=int, default=42, help="of the sample and of decoding (default: 42)")
    flags.add_argument("--model_weights", type=Path, metavar="FILE",
                       default=Path("model_outputs/best_model_heads.safetensors"),
                       help="the heads, or their folder (default: ./%(default)s)")  # fmt: skip
    flags.add_argument("--only_ensemble", action="store_true", help="no single experts, router, mixture or oracle")
    flags.add_argument("--max_new_tokens", type=positive_int, default=512, metavar="N", help="(default: %(default)s)")
    flags.add_argument("--temperature", type=not_negative, default=0.3, help="(default: %(default)s; 0: greedy)")
    flags.add_argument("--output_dir", type=Path, default=Path("evaluation_results"), metavar="DIR",
                       help="(default: ./%(default)s)")  # fmt: skip
    flags.add_argument("--save_examples", action="store_true", help="also examples.jsonl: every token's weights")
    flags.add_argument("--num_examples", type=positive_int, default=5, metavar="N",
                       help="answers of each dataset shown in the report and saved (default: %(default)s)")  # fmt: skip
    flags.add_argument("--no_plots", action="store_true")
    flags.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="(default: auto)")
    ours = flags.add_argument_group("beyond the original")
    ours.add_argument("--models", nargs="+", metavar="MODEL", help="the experts (default: the heads' own)")
    ours.add_argument("--precision", choices=QUANTIZATIONS, help="of the experts (default: bf16, on a CPU fp32)")
    ours.add_argument("--mode", choices=("select", "mixture"), default="select",
                      help="the selected expert speaks, or the mixture of all (default: %(default)s)")  # fmt: skip
    ours.add_argument("--batch_size", type=positive_int, metavar="N", help="answers at a time (default: 16)")
    ours.add_argument("--no_accelerate", dest="accelerate", action="store_false",
                      help="every expert at every token: the same answers, slower")  # fmt: skip
    ours.add_argument("--prompt_column", metavar="NAME", help="the question's column in a file or hub set")
    ours.add_argument("--answer_column", metavar="NAME", help="the answer's column")
    ours.add_argument("--fresh", action="store_true", help="start anew; the old folder is moved to DIR.<time>")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; gives the exit code."""
    args = parser().parse_args(argv)
    if args.debug:
        args.sample_size, args.verbosity = min(args.sample_size, DEBUG_QUESTIONS), 3
        args.output_dir /= "debug"
    from cai_experiment.scripts import _eval_ensemble

    _eval_ensemble.run(args)
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(run_main(main))
