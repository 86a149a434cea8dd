"""Measure this machine: every figure with its target, its limit and all its arms, from one run.

Run: python cai_experiment/scripts/bench.py --suite generation --json bench.json    (an hour on two cores)
     python cai_experiment/scripts/bench.py --suite dpo          (300 pairs, both arms against TRL: ten minutes)
     python cai_experiment/scripts/bench.py --suite records
     python cai_experiment/scripts/bench.py --suite scale        (5,000 examples to the end, and 500: hours)
     python cai_experiment/scripts/bench.py --suite equality     (the same greedy texts from every engine)
     python cai_experiment/scripts/bench.py --suite log          (what the content log costs a run: two minutes)
     python cai_experiment/scripts/bench.py --suite ensemble --model model_outputs   (trained heads)
     python cai_experiment/scripts/bench.py --suite generation --gpu --random-weights qwen2.5-32b
     python cai_experiment/scripts/bench.py --suite dpo --gpu --random-weights qwen2.5-32b
     ... the same with --engine vllm (generation), --model (real weights: Unsloth too), or --tiny: a dry run on a CPU

generation: useful tokens/s of the whole chain (answer, verdicts, critique, revision, as in milestone mvp) by the
pipeline, by its engine alone, by plain transformers `generate` at batch 16 and 1, and by distilabel in an environment
of its own. All arms take the same model, instructions and stages; they draw their own texts, so tokens are compared,
not rows. Loading is excluded. Medians of interleaved rounds. docs/BENCHMARKS.md holds the last figures.

JSON: {NAME: {"value", "target", "limit", "arms": {ARM: figure}, "rounds": {ARM: [figure of each round]}}, "setting":
{...}}; a value that could not be had is null, with "reason". "setting" is no figure: it says what was measured on what.
Exit code 0 if every target is met, 3 if one is missed or not measured.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_NO_GO, EXIT_OK, BadInputError
from cai_experiment.scripts._common import QUANTIZATIONS, positive_int, run_main

if TYPE_CHECKING:
    from cai_experiment.scripts._bench_figures import Report

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cai_experiment"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a suite, print its table, write its JSON; gives the exit code."""
    args = _parser().parse_args(argv)
    if (args.random_weights or args.tiny or args.engine != "hf") and not args.gpu:
        raise BadInputError("--random-weights, --engine and --tiny measure a card", "add --gpu")
    if args.gpu and args.suite not in ("generation", "dpo"):
        raise BadInputError(f"--gpu measures the suites generation and dpo, not {args.suite}", "leave it out")
    from cai_experiment.records.files import write_json
    from cai_experiment.scripts._bench_figures import print_table

    report = _suite(args)
    print_table(report.figures)
    if args.json:
        write_json(args.json, report.as_json())
        print(f"written: {args.json}")
    return EXIT_OK if all(figure.met for figure in report.figures) else EXIT_NO_GO


def _suite(args: argparse.Namespace) -> Report:
    if args.suite == "records":
        from cai_experiment.scripts._bench_records import records

        return records(args, _say)
    if args.suite == "scale":
        from cai_experiment.scripts._bench_scale import scale

        return scale(args, _say)
    import torch

    torch.set_num_threads(args.threads)
    if args.suite == "dpo" and args.gpu:
        from cai_experiment.scripts._bench_dpo_gpu import on_card as dpo_on_card

        return dpo_on_card(args, _say)
    if args.suite == "dpo":
        from cai_experiment.scripts._bench_dpo import dpo

        return dpo(args, _say)
    if args.suite == "ensemble":
        from cai_experiment.scripts._bench_ensemble import ensemble

        return ensemble(args, _say)
    if args.suite == "log":
        from cai_experiment.scripts._bench_log import log

        return log(args, _say)
    if args.suite == "equality":
        from cai_experiment.scripts._bench_equality import equality

        return equality(args, _say)
    if args.gpu:
        from cai_experiment.scripts._bench_gpu import on_card

        return on_card(args, _say)
    from cai_experiment.scripts._bench_generation import generation

    return generation(args, _say)


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    suites = ("generation", "dpo", "records", "scale", "equality", "log", "ensemble")
    parser.add_argument("--suite", choices=suites, required=True)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    rows = ("examples (400), pairs (300), journal lines (100,000), examples of the larger run (5,000), prompts (50), "
            "examples of the log's runs (100), the ensemble's prompts (200)")  # fmt: skip
    parser.add_argument("--rows", type=positive_int, metavar="N", help=rows)
    parser.add_argument("--repeats", type=positive_int, default=3, help="interleaved rounds; medians are shown")
    parser.add_argument("--threads", type=positive_int, default=2, help="CPU threads of every arm (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    principles = "as in the milestones: targeted asks a verdict for each principle, random for one a round"
    parser.add_argument("--principles", choices=("targeted", "random"), default="targeted", help=principles)
    parser.add_argument("--model", help="a model folder or preset (default: what the hardware allows); ensemble: heads")
    parser.add_argument("--batch-size", type=positive_int, metavar="N", help="slots of our engine (default: its own)")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="dpo: these pairs (default: makes them)")
    parser.add_argument("--no-distilabel", action="store_true", help="leave that arm out; its figure is then null")
    parser.add_argument("--cache-dir", type=Path, default=CACHE, help="where distilabel's environment is kept")
    parser.add_argument("--ray", action="store_true", help="measure two Ray actors against one as well")
    card = parser.add_argument_group("a card")
    card.add_argument("--gpu", action="store_true", help="speed, memory and shares of the card's limits instead")
    card.add_argument("--engine", choices=("hf", "vllm", "unsloth"), default="hf", help="whose speed (default: hf)")
    card.add_argument("--random-weights", metavar="PRESET", help="its architecture, nothing to download")
    card.add_argument("--tokenizer", metavar="FOLDER", help="for random weights (default: one token a byte)")
    card.add_argument("--quantization", choices=QUANTIZATIONS, help="default: hf 4bit, vllm bf16")
    card.add_argument("--tiny", action="store_true", help="two narrow layers: a dry run, on a CPU too")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_main(main))
