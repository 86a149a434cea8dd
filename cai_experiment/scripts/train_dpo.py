"""Train by DPO on a milestone's pairs or on any TRL preference file, then evaluate. The same command resumes.

Run: python cai_experiment/scripts/train_dpo.py --milestone mvp
     python cai_experiment/scripts/train_dpo.py --milestone mvp --sft-first --helpful answers.jsonl
     python cai_experiment/scripts/train_dpo.py --pairs my_pairs.jsonl --model qwen2.5-7b

Reads DATA_DIR/NAME/pairs.jsonl, writes checkpoints, metrics.jsonl and final/ (the adapter) to CHECKPOINT_DIR/NAME and
the report to DATA_DIR/NAME. --fresh starts the checkpoints anew; pairs are never touched. --max-hours and --max-cost
end a call after its current step, with exit code 0; they count this call alone, downloading and loading included.
--sft-first fine-tunes on the revisions of a share of the instructions (in CHECKPOINT_DIR/NAME/sft), and DPO goes on
from there with the others. A --helpful file holds {instruction, answer} or TRL's {prompt, completion} a line.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_NO_GO, EXIT_OK, BadInputError
from cai_experiment.milestones import CHECKPOINT_DIR, DATA_DIR, MILESTONES, SCRIPTS, Milestone
from cai_experiment.models.choice import ModelChoice, resolve_model
from cai_experiment.models.hardware import Hardware
from cai_experiment.nano import is_nano
from cai_experiment.observe.content_logger import CONTENT_LOG, ContentLogger
from cai_experiment.records.files import show
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts import _plan, _sft, _training, _training_flags
from cai_experiment.scripts._common import run_main
from cai_experiment.scripts._following import take_generator
from cai_experiment.scripts._verbosity import last_word
from cai_experiment.training import dpo, processes, sft
from cai_experiment.training.data import HELD_OUT_SHARE, Pair, read_pairs, split_by_instruction
from cai_experiment.training.settings import DPOSettings, total_steps

EVALUATED = "evaluated"  # an empty file beside the adapter: the report in the data folder speaks of it
OWN_PAIRS = ("single", "batch")  # too small to hold any out: they train and evaluate on the same pairs


def parser() -> argparse.ArgumentParser:
    """The flags, those of every script among them (--batch-size: pairs at a time)."""
    return _training_flags.parser(__doc__)


def milestone_of(name: str | None, pairs: int) -> Milestone:
    """The milestone named, or that of the file's size."""
    size = "single" if pairs <= 1 else "batch" if pairs <= 10 else "mvp" if pairs < 5000 else "full"
    return MILESTONES[name or size]


def main(argv: Sequence[str] | None = None) -> int:
    """Read the pairs, train or resume, evaluate, report; gives the exit code."""
    args = parser().parse_args(argv)
    args.started = time.monotonic()
    processes.start()
    if args.milestone is None and args.pairs is None:
        raise BadInputError("neither --milestone nor --pairs is given", "e.g. --milestone batch")
    args.run = args.run or args.milestone or args.pairs.stem
    _sft.check_flags(args)
    check_resume(args)
    hardware = _plan.machine(args)
    whose = take_generator(args)
    choice = resolve_model(args.model, hardware)
    everything = pairs_of(args)
    milestone = milestone_of(args.milestone, len(everything))
    share = 0.0 if milestone.name in OWN_PAIRS else HELD_OUT_SHARE
    both, held_out = split_by_instruction(everything, args.seed, share)
    first, pairs = _sft.divide(args, both)
    say_heading(args, hardware, choice)
    print(whose, end="")
    settings = _training.training_settings(args, pairs, len(everything), choice, hardware, held_out)
    warm = _sft.warm_start(args, settings, first, [*pairs, *held_out], choice)
    if warm is not None:
        print(warm.line)
    print(size_line(args, settings, len(held_out)))
    if args.plan:
        parts = _sft.trainings(settings, warm)
        print(*_plan.training_lines(args, milestone, parts, len(held_out), choice, hardware), sep="\n")
        return EXIT_OK
    command = shlex.join(["python", "cai_experiment/scripts/train_dpo.py", *(sys.argv[1:] if argv is None else argv)])
    with ExitStack() as stack:
        if processes.is_first():
            stack.enter_context(RunFolder(settings.output_dir, args.fresh))
            stack.enter_context(RunFolder(args.data_dir / args.run))
        processes.wait()
        return train_and_report(args, milestone, settings, held_out, choice, command.replace(" --fresh", ""), warm)


def say_heading(args: argparse.Namespace, hardware: Hardware, choice: ModelChoice) -> None:
    """The first lines: which model, where and why; of a plan, whether there are pairs yet."""
    if not args.plan:
        _training.say_model(args, hardware)
        return
    print(*_plan.heading(args, hardware, choice), sep="\n")
    if not place_of_pairs(args).exists():
        print(f"pairs       none at {show(place_of_pairs(args))} yet: planned with the milestone's number")


def size_line(args: argparse.Namespace, settings: DPOSettings, held_out: int) -> str:
    """Pairs and steps of DPO, where SFT has left it any, and what follows."""
    line, pairs = f"{held_out} held out", len(settings.pairs)
    if pairs:
        steps = f"{total_steps(settings, pairs)} steps of {settings.effective_batch} pairs"
        line = f"{pairs} training pairs, {line}; {steps}"
    return line if args.no_eval or args.plan else f"{line}; then evaluation"


def place_of_pairs(args: argparse.Namespace) -> Path:
    """The file of the pairs: --pairs, or the run's own."""
    return args.pairs or args.data_dir / args.run / "pairs.jsonl"


def pairs_of(args: argparse.Namespace) -> list[Pair]:
    """The pairs to train on; for the plan of a milestone that has none yet, as many as it will make."""
    path = place_of_pairs(args)
    if args.plan and args.pairs is None and not path.exists():
        return _plan.stand_ins(MILESTONES[args.milestone])
    return read_pairs(path)


def check_resume(args: argparse.Namespace) -> None:
    """Raise BadInputError for a --resume that cannot be followed; nothing is loaded for it."""
    if args.resume is None:
        return
    folder = args.checkpoint_dir / args.run
    if args.fresh and folder.resolve() in args.resume.resolve().parents:
        message = f"--fresh moves {show(folder)} away, and --resume names a checkpoint in it"
        raise BadInputError(message, "leave one of the two out")
    dpo.check_resume(args.resume, folder / sft.FOLDER if _sft.is_of_sft(args) else folder)


def train_and_report(
    args: argparse.Namespace,
    milestone: Milestone,
    settings: DPOSettings,
    held_out: Sequence[Pair],
    choice: ModelChoice,
    command: str,
    warm: _sft.WarmStart | None = None,
) -> int:
    """Train or resume, then evaluate; a run that did all of it before only shows its report again."""
    from cai_experiment.evaluation.report import print_report, read_report

    marker = settings.output_dir / EVALUATED
    if marker.exists() and _sft.all_finished(settings, warm):
        report = read_report(args.data_dir / args.run)
    else:
        started = time.monotonic()
        engine = _training.load_for_training(args)
        settings = replace(settings, base=_training.base_of(engine))
        with ContentLogger(args.verbosity, settings.output_dir / CONTENT_LOG) as content:
            settings, trained = _sft.train(settings, warm, engine, content)
        if not processes.is_first():  # the first one evaluates
            return EXIT_OK
        if trained.stopped:
            stopped = f"stopped by {trained.stopped}, its checkpoint is written; resume with: {command}"
            print(stopped)
            last_word(args.verbosity, stopped)
            return EXIT_OK
        if args.no_eval:
            print(f"not evaluated; do it with: {command.replace(' --no-eval', '')}")
            return EXIT_OK
        truth = is_nano(choice.path_or_id) and args.random_weights is None
        seconds = _training.seconds_of_training(trained, time.monotonic() - started)
        seconds += _sft.seconds_before(warm, trained)
        report = _training.evaluate_and_report(
            args, milestone, settings, held_out, trained, engine, truth, seconds, warm
        )
        marker.touch()
    print_report(report)
    last_word(args.verbosity, f"{report['verdict']}; report: {show(args.data_dir / args.run / 'report.html')}")
    if report["verdict"] == "go":
        folders = [] if args.checkpoint_dir == CHECKPOINT_DIR else ["--checkpoint-dir", str(args.checkpoint_dir)]
        folders += [] if args.data_dir == DATA_DIR else ["--data-dir", str(args.data_dir)]
        words = ["export_model.py", "--run", args.run, "--to", "merged", *folders]
        print(f"use it elsewhere: {SCRIPTS}{shlex.join(words)}")
    return EXIT_OK if report["verdict"] == "go" else EXIT_NO_GO


if __name__ == "__main__":
    raise SystemExit(run_main(main))
