"""A run's report: report.json for programs, report.html for people, a table for the terminal.

The page is made from report.json's content and the examples alone, so a later part (training, a benchmark) keeps what
an earlier one (generation) found. For a paper: tables/NAME.csv and .tex, figures/NAME.pdf. Behind the figures:
evaluation/NAME.jsonl, a row an item.
"""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Sequence

from cai_experiment.errors import BadInputError
from cai_experiment.evaluation.found import Evaluation
from cai_experiment.evaluation.reporting.merging import Parts, make_folder, merge, only_generation, write_items
from cai_experiment.evaluation.reporting.plots import Plot
from cai_experiment.evaluation.reporting.screen import print_report
from cai_experiment.milestones import DATA_DIR, SCRIPTS, Milestone
from cai_experiment.records.files import read_json, write_atomic, write_json
from cai_experiment.records.schema import Example

__all__ = ["RunFacts", "print_report", "read_report", "write_report"]

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
BEFORE_TRAINING = ("loading", "generation", "guard")  # phases whose seconds another adapter does not undo


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the report says beside the evaluation.

    `settings` is shown as it is (model, engine, quantisation, seed ...), under `settings_part`, or the names of the
    parts measured; `seconds` maps a phase ("generation", "training", "evaluation") to its wall seconds, `peak_gpu_gb`
    one to its peak of GPU memory ("allocated" and "reserved" GB; None without a GPU); `history` is training's
    metrics.jsonl; `dataset` is `describe_pairs`' part, of the run that made the pairs; `next_command` follows a go.
    `adapter` is a hash of the trained weights: of an earlier report on others, only generation's part is kept.
    `trained_with` are its training's settings, where the part measured is another (train_dpo.py --no-eval wrote none).
    """

    milestone: Milestone
    run: str
    accepted: Sequence[Example]
    rejected: Sequence[Example]
    settings: Mapping[str, Any]
    seconds: Mapping[str, float]
    price_per_hour: float
    next_command: str
    history: Sequence[Mapping[str, Any]] = field(default=())
    dataset: Mapping[str, Any] | None = None
    peak_gpu_gb: Mapping[str, Mapping[str, float] | None] = field(default_factory=dict)
    settings_part: str = ""
    adapter: str = ""
    trained_with: Mapping[str, Any] = field(default_factory=dict)


def write_report(folder: Path, evaluation: Evaluation | Mapping[str, Evaluation], facts: RunFacts) -> dict[str, Any]:
    """Write report.json, report.html, items, tables/ and figures/ into `folder` and give the report back.

    `evaluation` is one part, which its gates name, or several by name ({"judge": ..., "harmbench": ...}). Of an earlier
    report the parts that are not measured now are kept, if it speaks of the same number of pairs and, but for
    generation, of the same adapter. Raises DiskError or BadInputError where the folder cannot be written.
    """
    from cai_experiment.evaluation.reporting.page import render_page, report_plots
    from cai_experiment.evaluation.reporting.tables import report_tables, write_tables

    parts = Parts.of(evaluation)
    report = build_report(parts, facts, _earlier(folder, facts))
    if report["verdict"] != "go":  # look first
        report["next"] = _inspect_command(folder, facts.run)
    write_items(folder, parts)
    write_json(folder / REPORT_JSON, report)
    plots = report_plots(report, facts.accepted)
    html = render_page(report, facts.accepted, plots)
    write_atomic(folder / REPORT_HTML, [html.encode("utf-8", "backslashreplace")])
    write_tables(folder / "tables", report_tables(report))
    write_figures(folder / "figures", plots)
    return report


def write_figures(folder: Path, plots: Sequence[Plot]) -> None:
    """Write each plot as NAME.pdf, for a paper."""
    if plots:
        make_folder(folder)
    for plot in plots:
        write_atomic(folder / f"{plot.name}.pdf", [plot.pdf])


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a finished run. Raises BadInputError if there is none."""
    return read_json(folder / REPORT_JSON)


def _earlier(folder: Path, facts: RunFacts) -> dict[str, Any]:
    """The folder's report, or {} if there is none, or if it speaks of other pairs; of another adapter, only what it
    says of generation."""
    try:
        report = read_report(folder)
        same = report["counts"]["accepted"] == len(facts.accepted) and {"gates", "metrics", "seconds"} <= report.keys()
    except (BadInputError, KeyError, TypeError):
        return {}
    if not same:
        return {}
    trained_again = facts.adapter and report.get("adapter") and report["adapter"] != facts.adapter
    return _before_training(report) if trained_again else report


def _before_training(report: dict[str, Any]) -> dict[str, Any]:
    """What a report says of the pairs alone."""
    seconds = {phase: spent for phase, spent in report["seconds"].items() if phase in BEFORE_TRAINING}
    settings = {part: values for part, values in report.get("settings", {}).items() if part == "generation"}
    return {**only_generation(report), "seconds": seconds, "settings": settings, "history": []}


def build_report(parts: Parts, facts: RunFacts, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """report.json's content: the house plan's keys, and what the page needs beside them."""
    found = merge(parts, earlier)
    go = all(gate["passed"] for gate in found["gates"])
    part = facts.settings_part or " and ".join(sorted(parts.found))
    return {
        "verdict": "go" if go else "no-go",
        "milestone": facts.milestone.name,
        "run": facts.run,
        **found,
        "counts": _counts(facts),
        **_time_and_cost(facts, earlier),
        "settings": {**_settings(facts, earlier), part: dict(facts.settings)},
        "dataset": facts.dataset or earlier.get("dataset"),
        "history": list(facts.history) or earlier.get("history", []),
        "adapter": facts.adapter or ("" if "training" in parts.measured else earlier.get("adapter", "")),
        "next": facts.next_command,
    }


def _settings(facts: RunFacts, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """The earlier report's settings by part, those of training completed."""
    known = dict(earlier.get("settings", {}))
    if facts.trained_with:
        known["training"] = {**known.get("training", {}), **facts.trained_with}
    return known


def _inspect_command(folder: Path, run: str) -> str:
    """The command that shows the run's examples."""
    command = f"{SCRIPTS}inspect_data.py --run {shlex.quote(run)}"
    elsewhere = folder.parent.resolve() != DATA_DIR
    return f"{command} --data-dir {shlex.quote(str(folder.parent))}" if elsewhere else command


def _counts(facts: RunFacts) -> dict[str, Any]:
    reasons = Counter(reason for example in facts.rejected for reason in example.reject_reasons)
    return {"accepted": len(facts.accepted), "rejected": len(facts.rejected), "reasons": dict(reasons.most_common())}


def _time_and_cost(facts: RunFacts, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds by phase, and hours, dollars and GPU memory of all phases against the milestone's budget."""
    seconds = {**earlier.get("seconds", {}), **facts.seconds}
    hours = sum(seconds.values()) / 3600
    return {
        "seconds": seconds,
        "cost": {
            "hours": hours,
            "dollars": hours * facts.price_per_hour,
            "price_per_hour": facts.price_per_hour,
            "budget_hours": facts.milestone.budget_hours,
            "budget_dollars": facts.milestone.budget_dollars,
            "peak_gpu_gb": {**earlier.get("cost", {}).get("peak_gpu_gb", {}), **facts.peak_gpu_gb},
        },
    }
