"""A report in three answers, for a reader who has a minute: did it help, how sure is that, what did it cost.

All from report.json's content, so that the page, the terminal and a comparison say the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Mapping, Sequence

from cai_experiment.evaluation.reporting.naming import GROUPS, Group, Named, is_rate, named, pairs_of_arms
from cai_experiment.evaluation.reporting.words import (
    cost_text,
    count_text,
    p_text,
    range_text,
    report_alarms,
    sentence_case,
    signed_range,
    signed_text,
    value_text,
)

Direction = Literal["better", "worse", "unclear", "none"]
SAYS: dict[Direction, str] = {
    "better": "better", "worse": "worse", "unclear": "no clear change", "none": "",
}  # fmt: skip
SIGNIFICANT = 0.05  # after Holm
SHOWN = 3  # measures that each answer names
EMPTY: Mapping[str, Any] = {  # what a report of before may lack
    "gates": [], "metrics": {}, "tests": {}, "differences": {}, "notes": [], "alarms": [], "answers": [], "tables": [],
    "cases": [], "methods": {}, "history": [], "settings": {}, "seconds": {}, "dataset": None, "next": "",
    "counts": {"accepted": 0, "rejected": 0, "reasons": {}},
    "cost": {"hours": 0.0, "dollars": 0.0, "budget_hours": 0.0, "budget_dollars": 0.0},
}  # fmt: skip


def completed(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with every key that the page and the terminal read."""
    return {**EMPTY, **report}


@dataclass(frozen=True, slots=True)
class Effect:
    """One measure of base and trained, with its paired difference (None if it has none), as the page shows it."""

    name: str
    named: Named
    rate: bool
    base: Mapping[str, Any]
    trained: Mapping[str, Any]
    change: Mapping[str, Any] | None
    p_holm: float | None

    @property
    def direction(self) -> Direction:
        """Better or worse, by the way that the measure should go, if the difference's interval leaves out 0 and its
        p-value, where it has one, is below 0.05 after Holm's adjustment."""
        change = self.change
        if change is None or change.get("interval") is None or change.get("value") is None:
            return "none"
        low, high = change["interval"]
        if low <= 0 <= high or (self.p_holm is not None and self.p_holm >= SIGNIFICANT):
            return "unclear"
        if self.named.better == "same":
            return "worse"
        if not self.named.better:
            return "none"
        return "better" if (low > 0) == (self.named.better == "up") else "worse"

    @property
    def says(self) -> str:
        """The direction in a word; of what should stay as it is, "moved"."""
        return "moved" if self.named.better == "same" and self.direction == "worse" else SAYS[self.direction]

    @property
    def change_text(self) -> str:
        """ "−58.0 points", or a dash."""
        return "–" if self.change is None else signed_text(self.change["value"], self.rate, self.named.unit)

    @property
    def signed_text(self) -> str:
        """The same without its unit, for a narrow table."""
        return "–" if self.change is None else signed_text(self.change["value"], self.rate).removesuffix(" points")

    @property
    def between_text(self) -> str:
        """The difference's interval; "no item differs" where it has no width at 0, which is no certainty."""
        if self.change is None:
            return "not paired"
        still = self.change["value"] == 0 and list(self.change["interval"] or ()) == [0, 0]
        return "no item differs" if still else signed_range(self.change["interval"], self.rate)

    @property
    def range_text(self) -> str:
        """The difference's interval and n."""
        return self.between_text + (f", {count_text(self.change['n'])}" if self.change else "")

    @property
    def p_text(self) -> str:
        """McNemar's p, adjusted by Holm."""
        return p_text(self.p_holm)

    def sentence(self) -> str:
        """The whole of it on one line."""
        values = f"{value_text(self.base, self.rate)} → {value_text(self.trained, self.rate)}"
        change = f" ({self.change_text}; {self.range_text})" if self.change else f" ({count_text(self.base['n'])})"
        says = f", {self.says}" if self.says else ""
        return f"{sentence_case(self.named.label)}: {values}{says}{change}"


def effects(report: Mapping[str, Any]) -> list[Effect]:
    """Everything that was measured for base and trained, by group."""
    metrics, changes, tests = report["metrics"], report.get("differences", {}), report.get("tests", {})
    return [
        Effect(
            name, named(name), is_rate(f"{name}_base", metrics[f"{name}_base"]), metrics[f"{name}_base"],
            metrics[f"{name}_trained"], changes.get(name), tests.get(name, {}).get("p_holm"),
        )
        for name in pairs_of_arms(metrics)
    ]  # fmt: skip


def grouped(found: Sequence[Effect]) -> list[tuple[str, list[Effect]]]:
    """The groups that have effects, with their question."""
    groups: dict[Group, list[Effect]] = {group: [] for group in GROUPS}
    for one in found:
        groups[one.named.group].append(one)
    return [(GROUPS[group], members) for group, members in groups.items() if members]


def headline(report: Mapping[str, Any]) -> str:
    """How the gates stand, and which did not pass."""
    gates = report["gates"]
    missed = [gate["name"] for gate in gates if not gate["passed"]]
    if not gates:
        return "No gate was measured."
    if not missed:
        return f"All {len(gates)} gates passed." if len(gates) > 1 else "The one gate passed."
    return f"{len(missed)} of {len(gates)} gates did not pass: {', '.join(missed)}."


def in_short(report: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The three questions, each with its answers."""
    found = effects(report)
    return [("Did it help?", _helped(report, found)), ("How sure is that?", _sure(report, found)),
            ("What did it cost?", _cost(report, found))]  # fmt: skip


def _helped(report: Mapping[str, Any], found: Sequence[Effect]) -> list[str]:
    lines = [one.sentence() for one in found if one.named.group == "safer"][:SHOWN]
    for name in ("preference_accuracy", "win_rate"):
        if name in report["metrics"]:
            lines.append(_figure_line(name, report["metrics"][name]))
    return lines or ["Nothing was compared with the base model in this report; its gates speak of the pairs."]


def _figure_line(name: str, metric: Mapping[str, Any]) -> str:
    """One metric with interval and n."""
    rate = is_rate(name, metric)
    between = range_text(metric["interval"], rate)
    label = sentence_case(named(name).label)
    return f"{label}: {value_text(metric, rate)} ({between}, {count_text(metric['n'])})"


def _sure(report: Mapping[str, Any], found: Sequence[Effect]) -> list[str]:
    lines = []
    paired = [one for one in found if one.change is not None and one.change.get("interval") is not None]
    if paired:
        counts = {way: sum(one.direction == way for one in paired) for way in ("better", "worse", "unclear")}
        lines.append(
            f"Of {len(paired)} paired differences, {counts['better']} are clearly better, {counts['worse']} clearly "
            f"worse or moved, {counts['unclear']} cannot be told from no change."
        )
    wide = [g for g in report["gates"] if g["interval"] is not None and g["interval"][1] - g["interval"][0] > 0.2]
    if wide:
        lines.append(f"The interval of {len(wide)} of {len(report['gates'])} gates is wider than 20 points.")
    kappas = [name for name in report["metrics"] if name.endswith("kappa") or name == "judge_fitness"]
    lines += [_figure_line(name, report["metrics"][name]) for name in kappas[:SHOWN]]
    unparsed = sum(metric.get("unparsed", 0) for metric in report["metrics"].values())
    if unparsed:
        lines.append(f"{unparsed:,} judgements could not be read; they stand outside every rate.")
    return lines or ["Every figure stands below with its interval and its number of items."]


def _cost(report: Mapping[str, Any], found: Sequence[Effect]) -> list[str]:
    lost = [one for one in found if one.named.group in ("helpful", "lost") and one.direction == "worse"]
    kept = [one for one in found if one.named.group == "lost" and one.direction in ("better", "unclear")]
    lines = [one.sentence() for one in lost]
    if kept and not lost:
        lines.append(f"No measured loss. {kept[0].sentence()}")
    elif kept:
        lines.append(f"Kept: {', '.join(one.named.label for one in kept)}.")
    alarms = len(report_alarms(report))
    if alarms:
        lines.append(f"{alarms} alarm{'s stand' if alarms > 1 else ' stands'} below.")
    return [*lines, f"Time and money: {cost_text(report['cost'])}."]
