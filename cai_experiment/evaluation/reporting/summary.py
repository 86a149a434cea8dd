"""A report in three answers, for a reader who has a minute: did it help, how sure is that, what did it cost.

All from report.json's content, so that the page, the terminal and a comparison say the same.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, Mapping, Sequence

from cai_experiment.evaluation.gates import MAY_FORGET
from cai_experiment.evaluation.reporting.naming import GROUPS, Group, Named, is_rate, named, pairs_of_arms
from cai_experiment.evaluation.reporting.words import (
    cost_text,
    count_text,
    figure,
    p_text,
    range_text,
    report_alarms,
    sentence_case,
    signed_range,
    signed_text,
    value_text,
)

Direction = Literal["better", "worse", "moved", "unclear", "none"]
SAYS: dict[Direction, str] = {
    "better": "better", "worse": "worse", "moved": "moved", "unclear": "no clear change", "none": "",
}  # fmt: skip
SIGNIFICANT = 0.05  # after Holm
SHOWN = 4  # measures that each answer names
HELPED_FIRST = ("attack_success", "flawed_answers", "harm_flagged", "harm_score")  # then the others, as measured
SHORTCUTS = {"bag_of_words_accuracy": "by their words alone", "length_only_accuracy": "by length alone"}
KAPPAS_FIRST = ("judge_fitness", "judge_fitness_harmbench", "judge_person_kappa", "win_rate_kappa", "judge_kappa")
COLLAPSE = "no collapse"  # the gate of `collapse.collapse_watch`
COLLAPSED = "The trained model's language has collapsed: what looks safer may only be broken."
LOW_KAPPA = "kappa is low too where nearly all judgements are alike"
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
        p-value is below 0.05 after Holm's adjustment; "moved" of what is neither gain nor loss. Without a p-value
        nothing is clear."""
        change = self.change
        if change is None or change.get("interval") is None or change.get("value") is None:
            return "none"
        low, high = change["interval"]
        if low <= 0 <= high or (self.p_holm is not None and self.p_holm >= SIGNIFICANT):
            return "unclear"
        if self.p_holm is None or not self.named.better:
            return "none"
        if self.named.better == "same":
            return "moved"
        return "better" if (low > 0) == (self.named.better == "up") else "worse"

    @property
    def says(self) -> str:
        """The direction in a word."""
        return SAYS[self.direction]

    @property
    def worst(self) -> float | None:
        """The bad end of the difference's interval; None without one, and where neither way is bad."""
        interval = (self.change or {}).get("interval")
        ends = {"up": 0, "down": 1}
        return interval[ends[self.named.better]] if interval and self.named.better in ends else None

    @property
    def margin(self) -> float | None:
        """How much of it may be lost and it still counts as kept; None if that is not stated."""
        share, base = self.named.margin, self.base.get("value")
        if share is None or not self.named.of_base:
            return share
        return None if base is None else share * base

    @property
    def kept(self) -> bool:
        """True if even the bad end of the interval is within the margin: that it holds 0 alone proves nothing."""
        worst, margin = self.worst, self.margin
        if worst is None or margin is None:
            return False
        return (-worst if self.named.better == "up" else worst) <= margin

    def worst_text(self) -> str:
        """What may have been lost at most, for people: "short sums right (at worst −1.8 points)"."""
        worst = signed_text(self.worst, self.rate, self.named.unit)
        limit = "" if self.rate or self.margin is None else f", tolerated {figure(self.margin)}"
        return f"{self.named.label} (at worst {worst}{limit})"

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
        """The p-value, adjusted by Holm."""
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
    """How the gates stand, which did not pass, and what a go does not say: that nothing is clear, that alarms rang."""
    gates = report["gates"]
    missed = [gate["name"] for gate in gates if not gate["passed"]]
    if not gates:
        text = "No gate was measured."
    elif not missed:
        text = f"All {len(gates)} gates passed." if len(gates) > 1 else "The one gate passed."
    else:
        text = f"{len(missed)} of {len(gates)} gates did not pass: {'; '.join(missed)}."
    return " ".join([text, *_doubts(report)])


def _doubts(report: Mapping[str, Any]) -> list[str]:
    """What a reader of the verdict alone would miss."""
    safer = [one for one in effects(report) if one.named.group == "safer"]
    unproven = safer and not any(one.direction == "better" for one in safer)
    alarms = len(report_alarms(report))
    collapsed = any(gate["name"] == COLLAPSE and not gate["passed"] for gate in report["gates"])
    return [
        *([COLLAPSED] if collapsed else []),
        *(["No measure of safety is clearly better."] if unproven else []),
        *([f"{alarms} alarm{'' if alarms == 1 else 's'}."] if alarms else []),
    ]


def in_short(report: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The three questions, each with its answers."""
    found = effects(report)
    return [("Did it help?", _helped(report, found)), ("How sure is that?", _sure(report, found)),
            ("What did it cost?", _cost(report, found))]  # fmt: skip


def _helped(report: Mapping[str, Any], found: Sequence[Effect]) -> list[str]:
    safer = sorted((one for one in found if one.named.group == "safer"), key=_helped_first)  # stable
    lines = [one.sentence() for one in safer[:SHOWN]] + preference_lines(report)
    return lines or ["Nothing was compared with the base model in this report; its gates speak of the pairs."]


def _helped_first(one: Effect) -> int:
    return HELPED_FIRST.index(one.name) if one.name in HELPED_FIRST else len(HELPED_FIRST)


def preference_lines(report: Mapping[str, Any]) -> list[str]:
    """How often the held-out revision is preferred, and the trained model's answer: figures without a base. What tells
    the pairs apart without understanding them stands beside the first."""
    metrics = report["metrics"]
    lines = {name: _figure_line(name, metrics[name]) for name in ("preference_accuracy", "win_rate") if name in metrics}
    beside = [f"{how} {value_text(metrics[name], True)} ({count_text(metrics[name]['n'])})"
              for name, how in SHORTCUTS.items() if name in metrics]  # fmt: skip
    if beside and "preference_accuracy" in lines:
        lines["preference_accuracy"] += f"; {', '.join(beside)}"
    return list(lines.values())


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
        counts = Counter(one.direction for one in paired)
        moved = f", {counts['moved']} clearly moved (neither gain nor loss)" if counts["moved"] else ""
        lines.append(
            f"Of {len(paired)} paired differences, {counts['better']} are clearly better, {counts['worse']} clearly "
            f"worse{moved}, {counts['unclear']} cannot be told from no change."
        )
    wide = [g for g in report["gates"] if g["interval"] is not None and g["interval"][1] - g["interval"][0] > 0.2]
    if wide:
        lines.append(f"The interval of {len(wide)} of {len(report['gates'])} gates is wider than 20 points.")
    lines += _agreement(report["metrics"])
    unparsed = sum(metric.get("unparsed", 0) for metric in report["metrics"].values())
    if unparsed:
        lines.append(f"{unparsed:,} judgements could not be read; they stand outside every rate.")
    return lines or ["Every figure stands below with its interval and its number of items."]


def _agreement(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Whether the judge may be believed: its fitness first, and where it agrees no more than by chance."""
    names = [name for name in metrics if name.endswith("kappa") or name.startswith("judge_fitness")]
    names.sort(key=lambda name: KAPPAS_FIRST.index(name) if name in KAPPAS_FIRST else len(KAPPAS_FIRST))  # stable
    chance = [name for name in names if (ends := metrics[name]["interval"]) is not None and ends[0] <= 0 <= ends[1]]
    first = [name for name in names if name not in chance][: SHOWN - 1]
    if "judge_fitness" in chance:
        first.insert(0, "judge_fitness")
    lines = [_figure_line(name, metrics[name]) + (", near chance" if name in chance else "") for name in first]
    rest = "; ".join(_figure_line(name, metrics[name]) for name in chance if name not in first)
    return [*lines, *([f"Near chance ({LOW_KAPPA}): {rest}"] if rest else [])]


def _cost(report: Mapping[str, Any], found: Sequence[Effect]) -> list[str]:
    asked = [one for one in found if one.named.group in ("helpful", "lost") and one.worst is not None]
    lost = [one for one in asked if one.direction == "worse"]
    kept = [one for one in asked if one.direction != "worse" and one.kept]
    unknown = [one for one in asked if one.direction != "worse" and not one.kept]
    lines = [one.sentence() for one in lost]
    if kept:
        nothing = "No measured loss. " if not lost and not unknown else ""
        labels = "; ".join(one.worst_text() for one in kept)
        lines.append(f"{nothing}Kept, within {100 * MAY_FORGET:.0f} points or what is tolerated: {labels}.")
    if unknown:
        labels = "; ".join(one.worst_text() for one in unknown)
        lines.append(f"Cannot be told from so few items: {labels}.")
    alarms = len(report_alarms(report))
    if alarms:
        lines.append(f"{alarms} alarm{'s stand' if alarms > 1 else ' stands'} below.")
    return [*lines, f"Time and money: {cost_text(report['cost'])}."]
