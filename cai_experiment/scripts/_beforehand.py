"""What can be said of a milestone before a model is loaded: its plan, and the report of a run that is finished."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from cai_experiment.constitution.principles import load_constitution
from cai_experiment.milestones import Milestone
from cai_experiment.models.hardware import detect
from cai_experiment.models.presets import ModelChoice
from cai_experiment.pipeline.length_matching import BLOCK, KEEP
from cai_experiment.pipeline.settings import RunSettings
from cai_experiment.records.files import ExampleFile, ends_whole
from cai_experiment.records.manifest import Manifest
from cai_experiment.scripts._generation import WITH_TRAINING
from cai_experiment.scripts._inputs import chosen_model, earlier

PAIRS_A_STEP = 8  # DPO's effective batch


def plan_lines(args: argparse.Namespace, milestone: Milestone, settings: RunSettings) -> list[str]:
    """Memory, tokens, hours and dollars of the whole milestone, for the terminal; nothing is loaded or asked for."""
    from cai_experiment.models.plan import Workload, generation_lines, plan

    hardware = detect()
    choice = resolve_model(args.generator or args.model, hardware)
    weighed = len(load_constitution(args.constitution).principles) if args.principles == "targeted" else 1
    pairs = math.ceil(settings.pairs * BLOCK / KEEP) if settings.match_lengths else settings.pairs
    quantization = args.quantization or hardware.quantization
    lines = [f"model       {choice.name} | {quantization} | {choice.reason}"]
    if milestone.name in WITH_TRAINING:
        work = Workload(pairs, settings.stages.rounds, PAIRS_A_STEP * (milestone.dpo_steps or 0), weighed)
        lines += plan(choice, hardware, quantization, work, args.price_per_hour).lines()
    else:
        work = Workload(pairs, settings.stages.rounds, 0, weighed)
        lines += generation_lines(choice, hardware, work, args.price_per_hour)
    if settings.guard:
        lines.append(f"guard       {settings.guard}; access, disk and memory are checked before the first token")
    return [*lines, f"budget      {milestone.budget_hours:g} hours, ${milestone.budget_dollars:.2f} on the pod"]


def finished_report(
    args: argparse.Namespace, milestone: Milestone, settings: RunSettings, constitution_sha256: str
) -> dict[str, Any] | None:
    """The report of a run that came to its end with these very settings, else None (then the run goes on)."""
    path = args.data_dir / args.run
    manifest = _same_run(args, settings, constitution_sha256)
    if manifest is None or not (path / "report.json").exists():
        return None
    from cai_experiment.evaluation.report import read_report

    report = read_report(path)
    reported = report["settings"].get("generation", {})
    if (reported.get("pairs"), reported.get("guard")) != (settings.pairs, settings.guard or "none"):
        return None  # of the run before it was extended, or guarded
    parts = {gate.get("part") for gate in report["gates"]}
    trains = milestone.name in WITH_TRAINING and (report["counts"]["accepted"] or args.random_weights)
    untrained = trains and "training" not in parts
    return None if untrained else report


def generation_ended(args: argparse.Namespace, settings: RunSettings, constitution_sha256: str) -> bool:
    """True if an earlier session with these settings reached its pairs, so that only the guard's part is left."""
    files = [args.data_dir / args.run / name for name in ("pairs.jsonl", "rejected.jsonl")]
    if _same_run(args, settings, constitution_sha256) is None or not all(file.exists() for file in files):
        return False
    return all(map(ends_whole, files)) and len(ExampleFile(files[0])) >= settings.pairs


def _same_run(args: argparse.Namespace, settings: RunSettings, constitution_sha256: str) -> Manifest | None:
    """The folder's manifest if it was written by a run with these very settings, else None."""
    manifest = None if args.fresh else earlier(args.data_dir / args.run)
    if manifest is None:
        return None
    asked = json.loads(json.dumps(settings.recorded()))
    same = (asked, settings.seed, constitution_sha256) == (
        manifest.settings, manifest.seed, manifest.constitution.get("sha256"),
    )  # fmt: skip
    return manifest if same and _same_models(args, manifest.models) else None


def _same_models(args: argparse.Namespace, models: dict[str, dict[str, Any]]) -> bool:
    """True if the flags name the models that the run was made with, as far as is known without loading them."""
    named = {"generator": args.generator or args.model, "critic": args.critic or args.model}
    hardware, random = detect(), args.random_weights
    return all(
        models[role].get("model") == (f"random:{random}" if random else resolve_model(name, hardware).name)
        for role, name in named.items()
    )
