"""eval_model.py --suite forgetting: lm-eval's tasks for both arms, and GSM8K asked directly."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cai_experiment.evaluation.found import ITEMS_FOLDER
from cai_experiment.models.choice import ModelChoice, numbers_of
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.plan import Part, memory_gb, tokens_per_second
from cai_experiment.scripts._common import positive_int, separated
from cai_experiment.scripts._plan_parts import cost_of, in_line

if TYPE_CHECKING:
    from cai_experiment.evaluation.benchmarks.gsm8k import Problem
    from cai_experiment.evaluation.benchmarks.lm_eval_tasks import Tasks, TaskSettings
    from cai_experiment.evaluation.found import Evaluation
    from cai_experiment.scripts._target import Target


class Wanted(NamedTuple):
    """What is asked: lm-eval's tasks with their data, and GSM8K's problems (none without --gsm8k)."""

    tasks: Tasks
    problems: list[Problem]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The suite's own flags."""
    group = parser.add_argument_group("forgetting")
    group.add_argument("--tasks", metavar="A,B,...", type=separated,
                       help="tasks of lm-eval (default: arc_easy,hellaswag,gsm8k)")  # fmt: skip
    group.add_argument("--task-limit", metavar="N", type=positive_int,
                       help="the first N items of each (default: 200, at full all)")  # fmt: skip
    group.add_argument("--task-folder", metavar="DIR", type=Path,
                       help="task files of your own (YAML; with data_files they need no network)")  # fmt: skip
    group.add_argument("--gsm8k", metavar="FILE", type=Path,
                       help="ask GSM8K's problems directly too: JSONL of {question, answer}")  # fmt: skip


def read(args: argparse.Namespace) -> Wanted:
    """Tasks, their data sets and problems, before any model is loaded; a line for each task that cannot be run.

    Raises BadInputError for a folder, file or name that is none.
    """
    from cai_experiment.evaluation.benchmarks.gsm8k import load_gsm8k
    from cai_experiment.evaluation.benchmarks.lm_eval_tasks import load_tasks

    problems = load_gsm8k(args.gsm8k, limit_of(args)) if args.gsm8k is not None else []
    tasks = load_tasks(settings_of(args))
    for name, why in tasks.failed.items():
        print(f"lm-eval {name} will not be run: {why}", flush=True)
    return Wanted(tasks, problems)


def run(args: argparse.Namespace, wanted: Wanted, target: Target, folder: Path) -> Evaluation:
    """What was forgotten. Nobody judges; what both arms said is remembered in `folder`, the run's."""
    from cai_experiment.evaluation.benchmarks.lm_eval_said import FILE, Said
    from cai_experiment.evaluation.benchmarks.lm_eval_tasks import run_tasks, version

    speakers = target.speakers()
    said = Said(folder / ITEMS_FOLDER / FILE, f"{target.remembered().whose} lm-eval {version()}")
    try:
        found = run_tasks(speakers.model, speakers.tokenizer, wanted.tasks, said, args.verbosity)
    finally:
        said.close()
    return found + ask_gsm8k(args, wanted.problems, target) if wanted.problems else found


def ask_gsm8k(args: argparse.Namespace, problems: list[Problem], target: Target) -> Evaluation:
    """Both arms' answers to the problems, with a bar."""
    from cai_experiment.evaluation.arms import BothArms
    from cai_experiment.evaluation.benchmarks.gsm8k import gsm8k
    from cai_experiment.observe.progress import Progress

    said = target.speakers()
    with Progress(2 * len(problems), "GSM8K answers", args.verbosity) as progress:
        return gsm8k(BothArms(said.bare(), said.model, args.seed, progress, target.remembered()), problems)


def limit_of(args: argparse.Namespace) -> int | None:
    """Items a task: --task-limit, else all at full and MVP_ITEMS elsewhere."""
    from cai_experiment.evaluation.benchmarks.lm_eval_tasks import MVP_ITEMS

    if args.task_limit is not None:
        return int(args.task_limit)
    return None if args.milestone == "full" else MVP_ITEMS


def settings_of(args: argparse.Namespace) -> TaskSettings:
    """lm-eval's part of the flags."""
    from cai_experiment.evaluation.benchmarks.lm_eval_tasks import DEFAULT_TASKS, TaskSettings

    return TaskSettings(args.tasks or DEFAULT_TASKS, limit_of(args), args.task_folder, args.batch_size)


def plan_lines(
    args: argparse.Namespace, choice: ModelChoice, hardware: Hardware, engine: str, quantization: str
) -> tuple[list[Part], list[str]]:
    """(part, line): both arms' reading and writing, for the tasks whose size is known."""
    from cai_experiment.evaluation.benchmarks.lm_eval_tasks import BATCH_ROWS_CPU, BATCH_ROWS_GPU, work_of

    settings = settings_of(args)
    work = work_of(settings.tasks, settings.limit)
    rows = settings.batch_rows or (BATCH_ROWS_CPU if hardware.kind == "cpu" else BATCH_ROWS_GPU)
    part = _part(choice, hardware, engine, quantization, rows, 2 * work.read, 2 * work.written)
    said = f"lm-eval {', '.join(settings.tasks)}, base and trained, {part.read:,} tokens read and {part.written:,} "
    said += f"written: {cost_of(part, args.price_per_hour)}"
    unknown = f"; not counted: {', '.join(work.unknown)}" if work.unknown else ""
    return [part], [in_line("forgetting", said + unknown)]


def _part(
    choice: ModelChoice, hardware: Hardware, engine: str, quantization: str, rows: int, read: int, written: int
) -> Part:  # fmt: skip
    """lm-eval generates with transformers' `generate`, whatever engine the weights are in."""
    numbers = numbers_of(choice)
    speeds = tokens_per_second(numbers, hardware, rows, quantization, "generate")
    hours = None if speeds is None else (written / speeds[0] + read / speeds[1]) / 3600
    return Part(engine, quantization, 0.0, 0.0, memory_gb(numbers, hardware, ""), rows, written, read, hours)
