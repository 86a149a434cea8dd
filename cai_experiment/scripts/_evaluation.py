"""The suites of eval_model.py and the report that they add to."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.constitution.principles import load_constitution
from cai_experiment.constitution.prompts import ask_for_answer
from cai_experiment.errors import EXIT_OK, BadInputError
from cai_experiment.evaluation.found import Evaluation
from cai_experiment.evaluation.gates import FIT, Gate
from cai_experiment.milestones import MILESTONES, SCRIPTS, Milestone
from cai_experiment.models.choice import ModelChoice, resolve_model
from cai_experiment.nano import is_nano
from cai_experiment.observe.content_logger import CONTENT_LOG, ContentLogger
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
from cai_experiment.scripts._judge import check_judge, is_url, shown
from cai_experiment.scripts._target import Target, Trained, finished_training
from cai_experiment.training.data import Pair, normalized, read_pairs

if TYPE_CHECKING:
    from cai_experiment.evaluation.milestone import Scope

PLUMBING_ONLY = ("single", "batch")
NOT_YET = "the milestone's own suite has been run"  # without it other suites are no ground for a go
NO_DPO_GATES = "DPO's own gates (train_dpo.py writes them)"  # which no suite measures at milestones 0 and 1
SUMS = 400  # short sums: a rate of 98% is then known to within 2 points
AFTER_EVALUATION = {
    "single": f"{SCRIPTS}test_batch.py", "batch": f"{SCRIPTS}generate_mvp.py", "mvp": f"{SCRIPTS}generate_full.py",
    "full": f"{SCRIPTS}export_model.py --run full --to merged",
}  # fmt: skip
FETCHED = ("harmbench", "mtbench")  # suites whose questions mean nothing to the shipped model
SUITES: dict[str, Any] = {  # beside the milestone's own; each has `read` and `run`
    "detection": _suite_detection, "forgetting": _suite_forgetting, "harmbench": _suite_harmbench,
    "mtbench": _suite_mtbench,
}  # fmt: skip


def suites_of(args: argparse.Namespace, milestone: Milestone, truth: bool) -> list[str]:
    """The suites that were asked for; else the milestone's own, of which the shipped model has only the first."""
    if args.suite:
        return list(dict.fromkeys(args.suite))
    if truth or args.random_weights is not None or milestone.name in PLUMBING_ONLY:
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
    truth = is_nano(choice.path_or_id) and args.random_weights is None
    names, report = suites_of(args, milestone, truth), {}
    target = Target(args, finished_training(args))
    check_judge(args)
    try:
        if is_url(args.judge):
            target.judge()  # an endpoint that does not answer is named now, not when the target has spoken
        wanted = {name: SUITES[name].read(args) for name in names if name in SUITES}  # files, before hours of answers
        for suite in names:
            started = time.monotonic()
            if suite in SUITES:
                found = SUITES[suite].run(args, wanted[suite], target, args.data_dir / args.run)
            else:
                found = milestone_suite(args, milestone, truth, target)
            report = add_to_report(args, milestone, target, suite, found, time.monotonic() - started)
            tell_found(args, args.data_dir / args.run, found)
    finally:
        target.close()
    return report


def tell_found(args: argparse.Namespace, folder: Path, found: Evaluation) -> None:
    """What a suite read, into the content log of `folder`; the screen shows what -v asks for."""
    from cai_experiment.evaluation.content import tell

    with ContentLogger(args.verbosity, folder / CONTENT_LOG) as log:
        tell(log, found)


def add_to_report(
    args: argparse.Namespace, milestone: Milestone, target: Target, suite: str, found: Evaluation, seconds: float
) -> dict[str, Any]:
    """Write one suite's findings into the run's report. Their gates are of the suite's part, whatever they say."""
    from cai_experiment.evaluation.report import RunFacts, write_report

    folder, part = args.data_dir / args.run, part_of(suite, milestone)
    found.gates = [replace(gate, part=part) for gate in found.gates]
    parts = {part: found}
    if part != "training" and not has_gates(folder, "training", target.trained.sha256):
        missing = NO_DPO_GATES if milestone.name in PLUMBING_ONLY else NOT_YET
        parts["training"] = Evaluation(gates=[Gate(missing, None, "=", 1.0, None, 0, "training")])
    accepted, rejected = run_examples(folder)
    facts = RunFacts(
        milestone, args.run, accepted, rejected,
        settings=target.described() | {"adapter": target.trained.sha256[:16]} | told(args, suite),
        seconds={f"evaluation: {suite}": seconds},
        peak_gpu_gb={f"evaluation: {suite}": _training.peak_gpu_gb()},
        price_per_hour=args.price_per_hour,
        next_command=next_command(args, milestone, AFTER_EVALUATION[milestone.name]),
        history=[] if target.trained.result is None else target.trained.result.history,
        settings_part=f"evaluation: {suite}", adapter=target.trained.sha256, trained_with=target.trained.settings,
    )  # fmt: skip
    return write_report(folder, parts, facts)


def part_of(suite: str, milestone: Milestone) -> str:
    """The part of the report that a suite writes. The milestone's suite takes the place of train_dpo.py's findings, but
    at milestones 0 and 1, whose few steps only DPO's own gates speak of.
    """
    if suite != "milestone":
        return suite
    return "evaluation" if milestone.name in PLUMBING_ONLY else "training"


def has_gates(folder: Path, part: str, adapter: str) -> bool:
    """True if the run's report holds gates of that part, for that adapter."""
    if not (folder / "report.json").exists():
        return False
    report = read_json(folder / "report.json")
    return report.get("adapter") == adapter and any(gate.get("part") == part for gate in report.get("gates", []))


def told(args: argparse.Namespace, suite: str) -> dict[str, Any]:
    """The flags that a suite's figures depend on."""
    judge = re.sub(r"//[^/@]*@", "//", shown(args.judge)) if args.judge else "the base model"  # no name and key
    found: dict[str, Any] = {"seed": args.seed, "judge": judge}
    return found | ({"held_out_instructions": args.held_out} if suite == "milestone" else {})


# ---------------------------------------------------------------- the milestone's suite


def milestone_suite(args: argparse.Namespace, milestone: Milestone, truth: bool, target: Target) -> Evaluation:
    """Held-out pairs, answers, harm, collapse, what was forgotten, and a judge's word."""
    from cai_experiment.evaluation import labels
    from cai_experiment.evaluation import milestone as full
    from cai_experiment.evaluation.reporting.merging import Parts, write_items

    scope = scope_of(args, milestone, target.trained, truth)
    found = full.ask_target(scope, target.speakers(), target.remembered())
    folder = args.data_dir / args.run
    judge = target.judge()
    found += full.ask_judge(scope, judge, found.answers)
    if args.judge is not None:
        principles = load_constitution(args.constitution).principles
        found += full.judge_again(scope, judge, *run_examples(folder), principles)
        if (found.metrics["judge_fitness"].value or 0.0) >= FIT:  # 1,600 questions are not put to another
            found += full.harm_by_judge(judge, found.answers)
    found = full.conclude(scope, found)
    found.notes += target.trained.notes
    write_items(folder, Parts.of({"training": found}))  # which the labels are held against
    return found + labels.agreement(folder)


def run_examples(folder: Path) -> tuple[list[Example], list[Example]]:
    """(accepted, rejected) examples of a run; none where the pairs came from elsewhere."""
    files = (folder / name for name in ("pairs.jsonl", "rejected.jsonl"))
    accepted, rejected = (read_examples(file) if file.exists() else [] for file in files)
    return accepted, rejected


def scope_of(args: argparse.Namespace, milestone: Milestone, trained: Trained, truth: bool) -> Scope:
    """What the milestone's suite is about; makes the held-out pairs, or reads those of --held-out-pairs."""
    from cai_experiment.evaluation.milestone import Scope, principle_of
    from cai_experiment.evaluation.slices import UNKNOWN

    common = (trained.reference, args.seed, SUMS, args.verbosity)
    if args.held_out_pairs is not None:
        pairs = separate(args.held_out_pairs, trained.pairs)
        questions = list(dict.fromkeys(pair.turns[0].text for pair in pairs if len(pair.turns) == 1))[: args.held_out]
        return Scope(milestone.name, truth, trained.pairs, pairs, [UNKNOWN] * len(pairs), questions, {}, *common)
    if args.random_weights is None and not (args.data_dir / args.run / "manifest.json").exists():
        raise BadInputError(
            f"{show(args.data_dir / args.run)} holds no generated run, whose pipeline would make held-out pairs",
            "name a file of pairs that nobody trained on with --held-out-pairs",
        )
    others = [] if args.pairs is None else [pair.turns[-1].text for pair in trained.pairs]
    accepted, rejected = _held_out.held_out_run(args, milestone, trained_on=others)
    return Scope(
        milestone.name, truth, trained.pairs, [pair_of(example) for example in accepted],
        [principle_of(example) for example in accepted], _held_out.held_out_questions(accepted, rejected),
        {example.instruction: principle_of(example) for example in (*accepted, *rejected)}, *common,
    )  # fmt: skip


def separate(path: Path, trained_on: Sequence[Pair]) -> list[Pair]:
    """The pairs of a file. BadInputError if one of them asks what was trained on."""
    known = {normalized(pair.instruction) for pair in trained_on}
    pairs = read_pairs(path)
    for pair in pairs:
        if normalized(pair.instruction) in known:
            raise BadInputError(f"{pair.place} asks what the adapter was trained on", "take the row out")
    return pairs


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

    found = _suite_detection.run(args, _suite_detection.read(args), None, args.data_dir / "detection")
    folder = args.data_dir / "detection"
    write_items(folder, Parts.of(found))
    tell_found(args, folder, found)
    write_tables(folder, [table.to_json() for table in found.tables])
    print_tables([table.to_json() for table in found.tables])
    print(*found.notes, f"tables: {show(folder)}", sep="\n")
    return EXIT_OK


def detection_plan(args: argparse.Namespace) -> list[str]:
    """What the detection table asks of each model; nothing is run."""
    from cai_experiment.scripts import _plan

    hardware = _plan.machine(args)
    return _suite_detection.plan_lines(args, resolve_model(args.model, hardware), hardware, "", "")[1]


def plan(args: argparse.Namespace, milestone: Milestone, choice: ModelChoice) -> list[str]:
    """Memory, hours and dollars of the milestone's suites; nothing is run."""
    from cai_experiment.scripts import _plan, _plan_harmbench
    from cai_experiment.scripts._plan_training import evaluation_lines

    hardware = _plan.machine(args)
    choice = _plan.drawn(args, choice, hardware)
    truth = is_nano(choice.path_or_id) and args.random_weights is None
    quantization = args.quantization or hardware.training_quantization
    engine = "unsloth" if args.engine == "unsloth" else "hf"
    lines = _plan.heading(args, hardware, choice)
    parts, needs, said = _held_out.held_out_plan(args, milestone, choice, hardware)
    lines += said
    suites = suites_of(args, milestone, truth)
    if "milestone" in suites:
        part, said = evaluation_lines(args, choice, hardware, args.held_out // 2, args.held_out, engine)
        parts, lines = [*parts, *part], [*lines, *said]
    others = SUITES | {"harmbench": _plan_harmbench}
    for name in suites:
        if name in others:
            part, said = others[name].plan_lines(args, choice, hardware, engine, quantization)
            parts, lines = [*parts, *part], [*lines, *said]
    return [*lines, *_plan.disk_lines(args, needs), *_plan.ending(args, hardware, milestone, parts)]
