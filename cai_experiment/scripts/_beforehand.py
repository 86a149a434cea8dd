"""What can be said of a milestone before a model is loaded: the report of a run that is finished, how far it came."""

from __future__ import annotations

import argparse
import json
from typing import Any

from cai_experiment.milestones import Milestone
from cai_experiment.models.choice import ModelChoice
from cai_experiment.models.hardware import detect
from cai_experiment.pipeline.settings import RunSettings
from cai_experiment.records.files import ExampleFile, ends_whole
from cai_experiment.records.manifest import Manifest
from cai_experiment.scripts._generation import WITH_TRAINING
from cai_experiment.scripts._inputs import chosen_model, earlier


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
    if args.judge is not None and reported.get("judge") != args.judge:
        return None  # another judge's
    parts = {gate.get("part") for gate in report["gates"]}
    trains = milestone.name in WITH_TRAINING and (report["counts"]["accepted"] or args.random_weights)
    untrained = trains and "training" not in parts
    return None if untrained else report


def generation_ended(args: argparse.Namespace, settings: RunSettings, constitution_sha256: str) -> bool:
    """True if an earlier session with these settings generated to its end, so that only the guard's part is left."""
    manifest = _same_run(args, settings, constitution_sha256)
    if manifest is None or not manifest.finished:
        return False
    files = {args.data_dir / args.run / f"{name}.jsonl": count for name, count in (
        ("pairs", manifest.counts["accepted"]), ("rejected", manifest.counts["rejected"]))}  # fmt: skip
    return all(file.exists() and ends_whole(file) and len(ExampleFile(file)) == n for file, n in files.items())


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
    """True if the flags name the models that the run was made with, as far as is known without loading or asking."""
    hardware, random = detect(), args.random_weights
    for role in ("generator", "critic"):
        choice, model = chosen_model(args, hardware, critic=role == "critic"), models[role]
        if args.server:
            same = _same_served(args.server, choice, model)
        else:
            same = model.get("model") == (f"random:{random}" if random else choice.name)
        if not same:
            return False
    return True


def _same_served(server: str, choice: ModelChoice, model: dict[str, Any]) -> bool:
    """True if a server's `model` is the chosen one: by name, or without one what this address served."""
    from cai_experiment.engines.server_address import read_address
    from cai_experiment.engines.server_probe import is_named

    if model.get("engine") != "server":
        return False
    if not choice.path_or_id:
        return bool(model.get("url") == read_address(server)[0])
    card = {"id": model.get("model"), **(model.get("served") or {})}
    return is_named(choice.path_or_id, card) or is_named(choice.path_or_id, card, loosely=True)
