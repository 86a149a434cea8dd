"""The suites of eval_model.py and the report that they add to."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.constitution.principles import load_constitution
from cai_experiment.constitution.prompts import ask_for_answer
from cai_experiment.errors import EXIT_OK, BadInputError
from cai_experiment.milestones import MILESTONES, SCRIPTS, Milestone
from cai_experiment.models.presets import ModelChoice
from cai_experiment.nano import is_nano
from cai_experiment.records.files import read_examples, read_json, show
from cai_experiment.records.schema import Example
from cai_experiment.scripts import (
    _held_out,
    _suite_detection,
    _suite_forgetting,
    _suite_harmbench,
    _suite_mtbench,
    _training,
)
from cai_experiment.scripts._following import next_command
from cai_experiment.scripts._judge import check_judge, is_url
from cai_experiment.scripts._target import Target, Trained, finished_training
from cai_experiment.training.data import Pair, read_pairs

if TYPE_CHECKING:
    from cai_experiment.evaluation.found import Evaluation
    from cai_experiment.evaluation.milestone import Scope

PLUMBING_ONLY = ("single", "batch")
PART = {"milestone": "training"}  # of the report: the milestone's suite takes the place of train_dpo.py's findings
SUMS = 400  # short sums: a rate of 98% is then known to within 2 points
AFTER_EVALUATION = {
    "single": f"{SCRIPTS}test_batch.py", "batch": f"{SCRIPTS}generate_mvp.py", "mvp": f"{SCRIPTS}generate_full.py",
    "full": f"{SCRIPTS}export_model.py --run full --to merged",
}  # fmt: skip
FETCHED = ("harmbench", "mtbench")  # suites whose questions mean nothing to the shipped model


def suites_of(args: argparse.Namespace, milestone: Milestone, truth: bool) -> list[str]:
    """The suites that were asked for; else the milestone's own, of which the shipped model has only the first."""
    if args.suite:
        return list(dict.fromkeys(args.suite))
    if truth or milestone.name in PLUMBING_ONLY:
        return ["milestone"]
    if milestone.name != "full":
        return ["milestone", "forgetting"]
    if args.judge is None and not args.plan:
        raise BadInputError(
            "milestone full's MT-Bench is graded by a judge, and none is named",
            "add --judge URL or --judge MODEL, or name the suites that need none: --suite milestone --suite forgetting "
            "--suite harmbench",
        )
    return ["milestone", "forgetting", *FETCHED]


def evaluate(args: argparse.Namespace, milestone: Milestone, choice: ModelChoice) -> dict[str, Any]:
    """Run every suite; the report is written after each, so that a later one's failure loses nothing."""
    from cai_experiment.evaluation.report import RunFacts, write_report

    truth = is_nano(choice.path_or_id) and args.random_weights is None
    folder, report = args.data_dir / args.run, {}
    target = Target(args, finished_training(args))
    check_judge(args)
    try:
        if is_url(args.judge):
            target.judge()  # an endpoint that does not answer is named now, not when the target has spoken
        for suite in suites_of(args, milestone, truth):
            started = time.monotonic()
            found = run_suite(suite, args, milestone, truth, target)
            accepted, rejected = run_examples(folder)
            facts = RunFacts(
                milestone, args.run, accepted, rejected,
                settings=target.described() | {"adapter": target.trained.sha256[:16]} | told(args, suite),
                seconds={f"evaluation: {suite}": time.monotonic() - started},
                peak_gpu_gb={f"evaluation: {suite}": _training.peak_gpu_gb()},
                price_per_hour=args.price_per_hour,
                next_command=next_command(args, milestone, AFTER_EVALUATION[milestone.name]),
                history=target.trained.history, settings_part=f"evaluation: {suite}", adapter=target.trained.sha256,
            )  # fmt: skip
            report = write_report(folder, {PART.get(suite, suite): found}, facts)
    finally:
        target.close()
    return report


def told(args: argparse.Namespace, suite: str) -> dict[str, Any]:
    """The flags that a suite's figures depend on."""
    found: dict[str, Any] = {"seed": args.seed, "judge": args.judge or "the base model"}
    return found | ({"held_out_instructions": args.held_out} if suite == "milestone" else {})


def run_suite(suite: str, args: argparse.Namespace, milestone: Milestone, truth: bool, target: Target) -> Evaluation:
    """One suite's findings."""
    if suite == "milestone":
        return milestone_suite(args, milestone, truth, target)
    folder = args.data_dir / args.run
    if suite == "detection":
        target.close()
        return _suite_detection.run(args)
    if suite == "mtbench":
        from cai_experiment.evaluation.benchmarks.mtbench_grades import JUDGE_CONTEXT

        judge = partial(target.judge, JUDGE_CONTEXT)
        return _suite_mtbench.run(args, target.speakers, target.remembered, judge, folder)
    if suite == "harmbench":
        return _suite_harmbench.run(args, target.speakers, target.remembered, target.judge, folder, target.free)
    return _suite_forgetting.run(args, target.speakers, target.remembered)


# ---------------------------------------------------------------- the milestone's suite


def milestone_suite(args: argparse.Namespace, milestone: Milestone, truth: bool, target: Target) -> Evaluation:
    """Held-out pairs, answers, harm, collapse, what was forgotten, and a judge's word."""
    from cai_experiment.evaluation import labels
    from cai_experiment.evaluation import milestone as full

    accepted, rejected = _held_out.held_out_run(args, milestone)
    scope = scope_of(args, milestone, target.trained, accepted, rejected, truth)
    found = full.ask_target(scope, target.speakers(), target.remembered())
    folder = args.data_dir / args.run
    judge = target.judge()
    found += full.ask_judge(scope, judge, found.answers)
    if args.judge is not None:
        principles = load_constitution(args.constitution).principles
        found += full.judge_again(scope, judge, *run_examples(folder), principles)
    return full.conclude(scope, found) + labels.agreement(folder)


def run_examples(folder: Path) -> tuple[list[Example], list[Example]]:
    """(accepted, rejected) examples of a run; none where the pairs came from elsewhere."""
    files = (folder / name for name in ("pairs.jsonl", "rejected.jsonl"))
    accepted, rejected = (read_examples(file) if file.exists() else [] for file in files)
    return accepted, rejected


def scope_of(
    args: argparse.Namespace, milestone: Milestone, trained: Trained, accepted: Sequence[Example],
    rejected: Sequence[Example], truth: bool,
) -> Scope:  # fmt: skip
    """What the milestone's suite is about."""
    from cai_experiment.evaluation.milestone import Scope, principle_of

    return Scope(
        milestone.name, truth, trained.pairs, [pair_of(example) for example in accepted],
        [principle_of(example) for example in accepted], _held_out.held_out_questions(accepted, rejected),
        {example.instruction: principle_of(example) for example in (*accepted, *rejected)},
        trained.reference, args.seed, SUMS, args.verbosity,
    )  # fmt: skip


def pair_of(example: Example) -> Pair:
    """An accepted example as training reads it."""
    pair = example.preference_pair
    return Pair(example.id, ask_for_answer(pair.prompt), pair.chosen, pair.rejected)


# ---------------------------------------------------------------- without a run; and what it will take


def milestone_of(args: argparse.Namespace) -> str:
    """The milestone of --run: the report's word, or by the number of pairs."""
    place = args.data_dir / args.run / "report.json"
    if place.exists() and (name := read_json(place).get("milestone")) in MILESTONES:
        return str(name)
    from cai_experiment.scripts.train_dpo import milestone_of as by_size

    pairs = args.pairs or args.data_dir / args.run / "pairs.jsonl"
    return by_size(None, len(read_pairs(pairs))).name


def detection_alone(args: argparse.Namespace) -> int:
    """The detection table on its own, without a run: printed, and written to DATA_DIR/detection."""
    from cai_experiment.evaluation.reporting.merging import Parts, write_items
    from cai_experiment.evaluation.reporting.screen import print_tables
    from cai_experiment.evaluation.reporting.tables import write_tables

    found = _suite_detection.run(args)
    folder = args.data_dir / "detection"
    write_items(folder, Parts.of(found))
    write_tables(folder, [table.to_json() for table in found.tables])
    print_tables([table.to_json() for table in found.tables])
    print(*found.notes, f"tables: {show(folder)}", sep="\n")
    return EXIT_OK


def plan(args: argparse.Namespace, milestone: Milestone, choice: ModelChoice) -> list[str]:
    """Memory, hours and dollars of the milestone's suites; nothing is run."""
    from cai_experiment.scripts import _plan, _plan_harmbench
    from cai_experiment.scripts._plan_training import evaluation_lines

    hardware = _plan.machine(args)
    choice = _plan.drawn(args, choice, hardware)
    truth = is_nano(choice.path_or_id) and args.random_weights is None
    quantization = args.quantization or hardware.quantization
    engine = "unsloth" if args.engine == "unsloth" else "hf"
    lines = _plan.heading(args, hardware, choice)
    parts, needs, said = _held_out.held_out_plan(args, milestone, choice, hardware)
    lines += said
    suites = suites_of(args, milestone, truth)
    if "milestone" in suites:
        part, said = evaluation_lines(args, choice, hardware, args.held_out // 2, args.held_out, engine)
        parts, lines = [*parts, *part], [*lines, *said]
    others = {"forgetting": _suite_forgetting, "harmbench": _plan_harmbench, "mtbench": _suite_mtbench}
    for name in suites:
        if name in others:
            part, said = others[name].plan_lines(args, choice, hardware, engine, quantization)
            parts, lines = [*parts, *part], [*lines, *said]
    return [*lines, *_plan.disk_lines(args, needs), *_plan.ending(args, hardware, milestone, parts)]
