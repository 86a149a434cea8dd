"""A run's report: report.json for programs, report.html for people, a table for the terminal.

The page is made from report.json's content and the examples alone, so a later part (training) keeps what an earlier one
(generation) found.
"""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Sequence

from cai_experiment.errors import BadInputError
from cai_experiment.evaluation.found import Evaluation
from cai_experiment.evaluation.screen import print_report
from cai_experiment.judging.result import holm
from cai_experiment.milestones import DATA_DIR, SCRIPTS, Milestone
from cai_experiment.records.files import read_json, write_atomic, write_json
from cai_experiment.records.schema import Example

__all__ = ["RunFacts", "print_report", "read_report", "write_report"]

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
SHOWN_ANSWERS = 10


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the report says beside the evaluation.

    `settings` is shown as it is (model, engine, quantisation, seed ...), under the part that it is of; `seconds` maps
    a phase ("generation", "training", "evaluation") to its wall seconds, `peak_gpu_gb` one to its peak of GPU memory
    ("allocated" and "reserved" GB; None without a GPU); `history` is training's metrics.jsonl;
    `dataset` is `describe_pairs`' part, of the run that made the pairs; `next_command` follows a go.
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


def write_report(folder: Path, evaluation: Evaluation, facts: RunFacts) -> dict[str, Any]:
    """Write report.json and report.html into `folder` and give the report back.

    Of an earlier report the part that is not measured now is kept, if it speaks of the same number of pairs.
    Raises DiskError or BadInputError where the folder cannot be written.
    """
    from cai_experiment.evaluation.page import render_page

    report = build_report(evaluation, facts, _earlier(folder, len(facts.accepted)))
    if report["verdict"] != "go":  # look first
        report["next"] = _inspect_command(folder, facts.run)
    write_json(folder / REPORT_JSON, report)
    html = render_page(report, facts.accepted)
    write_atomic(folder / REPORT_HTML, [html.encode("utf-8", "backslashreplace")])
    return report


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a finished run. Raises BadInputError if there is none."""
    return read_json(folder / REPORT_JSON)


def _earlier(folder: Path, accepted: int) -> dict[str, Any]:
    """The folder's report, or {} if there is none, or if it speaks of other pairs."""
    try:
        report = read_report(folder)
        same = report["counts"]["accepted"] == accepted and {"gates", "metrics", "seconds"} <= report.keys()
    except (BadInputError, KeyError, TypeError):
        return {}
    return report if same else {}


def build_report(evaluation: Evaluation, facts: RunFacts, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """report.json's content: the house plan's keys, and what the page needs beside them."""
    measured = {gate.part for gate in evaluation.gates}
    gates = [gate for gate in earlier.get("gates", []) if gate.get("part") not in measured]
    gates += [gate.to_json() for gate in evaluation.gates]
    gates.sort(key=lambda gate: str(gate.get("part")))  # generation stands before training
    go = all(gate["passed"] for gate in gates)
    report: dict[str, Any] = {
        "verdict": "go" if go else "no-go",
        "milestone": facts.milestone.name,
        "run": facts.run,
        "gates": gates,
        "metrics": {**earlier.get("metrics", {}), **{k: v.to_json() for k, v in evaluation.metrics.items()}},
        "tests": {**earlier.get("tests", {}), **_tests(evaluation)},
        "counts": _counts(facts),
        **_time_and_cost(facts, earlier),
        "settings": {**earlier.get("settings", {}), " and ".join(sorted(measured)): dict(facts.settings)},
        "dataset": facts.dataset or earlier.get("dataset"),
        "next": facts.next_command,
    }
    if "training" in measured or not earlier:
        report |= {"notes": evaluation.notes, "history": list(facts.history), "answers": _answers(evaluation)}
    else:
        report |= {name: earlier.get(name, []) for name in ("notes", "history", "answers")}
    return report


def _inspect_command(folder: Path, run: str) -> str:
    """The command that shows the run's examples."""
    command = f"{SCRIPTS}inspect_data.py --run {shlex.quote(run)}"
    elsewhere = folder.parent.resolve() != DATA_DIR
    return f"{command} --data-dir {shlex.quote(str(folder.parent))}" if elsewhere else command


def _tests(evaluation: Evaluation) -> dict[str, Any]:
    """McNemar's counts and p-values, these also adjusted by Holm for their number."""
    adjusted = holm([test.p_value for test in evaluation.tests.values()])
    return {
        name: {"only_base": t.only_before, "only_trained": t.only_after, "p_value": t.p_value, "p_holm": p}
        for (name, t), p in zip(evaluation.tests.items(), adjusted, strict=True)
    }


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


def _answers(evaluation: Evaluation) -> list[dict[str, str]]:
    """The first held-out answers of both models, to be read beside the figures."""
    shown = evaluation.answers[:SHOWN_ANSWERS]
    return [{"instruction": a.instruction, "base": a.base.text, "trained": a.trained.text} for a in shown]
