"""What can be said of a milestone before a model is loaded: its plan, and the report of a run that is finished."""

from __future__ import annotations

import argparse
import json
from typing import Any

from cai_experiment.milestones import Milestone
from cai_experiment.models.hardware import detect
from cai_experiment.models.presets import resolve_model
from cai_experiment.pipeline.settings import RunSettings
from cai_experiment.scripts._generation import earlier

WITH_TRAINING = ("single", "batch")  # milestones whose script trains as well
PAIRS_A_STEP = 8  # DPO's effective batch


def plan_lines(args: argparse.Namespace, milestone: Milestone, settings: RunSettings) -> list[str]:
    """Memory, tokens, hours and dollars of the whole milestone, for the terminal."""
    from cai_experiment.models.plan import Workload, plan

    hardware = detect()
    choice = resolve_model(args.generator or args.model, hardware)
    trained = PAIRS_A_STEP * (milestone.dpo_steps or 0) if milestone.name in WITH_TRAINING else 0
    work = Workload(settings.pairs, settings.stages.rounds, trained)
    quantization = args.quantization or hardware.quantization
    budget = f"budget      {milestone.budget_hours:g} hours, ${milestone.budget_dollars:.2f} on the pod"
    first = f"model       {choice.name} | {quantization} | {choice.reason}"
    return [first, *plan(choice, hardware, quantization, work, args.price_per_hour).lines(), budget]


def finished_report(
    args: argparse.Namespace, milestone: Milestone, settings: RunSettings, constitution_sha256: str
) -> dict[str, Any] | None:
    """The report of a run that came to its end with these very settings, else None (then the run goes on)."""
    path = args.data_dir / args.run
    manifest = earlier(path)
    if manifest is None or not (path / "report.json").exists():
        return None
    asked = json.loads(json.dumps(settings.recorded()))
    same = (asked, settings.seed, constitution_sha256) == (
        manifest.settings, manifest.seed, manifest.constitution.get("sha256"),
    )  # fmt: skip
    if not same or not _same_models(args, manifest.models):
        return None
    from cai_experiment.evaluation.report import read_report

    report = read_report(path)
    parts = {gate.get("part") for gate in report["gates"]}
    untrained = milestone.name in WITH_TRAINING and report["counts"]["accepted"] and "training" not in parts
    return None if untrained else report


def _same_models(args: argparse.Namespace, models: dict[str, dict[str, Any]]) -> bool:
    """True if the flags name the models that the run was made with, as far as is known without loading them."""
    named = {"generator": args.generator or args.model, "critic": args.critic or args.model}
    hardware, random = detect(), args.random_weights
    return all(
        models[role].get("model") == (f"random:{random}" if random else resolve_model(name, hardware).name)
        for role, name in named.items()
    )
