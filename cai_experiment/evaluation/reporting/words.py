"""A report's figures and warnings in words, the same on the page and on the terminal."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, Mapping, Sequence

from cai_experiment.evaluation.reporting.naming import is_rate
from cai_experiment.judging.result import WIDE

SHOWN_SHARES = ("source", "kind", "length")  # on the terminal; the page has topics and principles too
ALARM = "ALARM"  # how a note of training begins that must be looked at
PLUMBING = "1 to 10 steps prove that the plumbing works and no more."


def figure(value: float | None, digits: int = 3) -> str:
    """A number with three significant digits; "not measured" for None."""
    if value is None:
        return "not measured"
    if abs(value) < 1e-9:
        return "0"
    whole = float(value).is_integer() or abs(float(f"{value:.{digits}g}")) >= 1000  # 999.6 is 1,000, not 1e+03
    return (f"{value:,.0f}" if whole else f"{value:.{digits}g}").replace("-", "−")


def interval_text(interval: Sequence[float] | None) -> str:
    """A 95% interval, or a dash."""
    return "–" if interval is None else f"{figure(interval[0])} to {figure(interval[1])}"


@dataclass(frozen=True, slots=True)
class GateCells:
    """A gate in words: what was found, what it asks (">= 70.0%"), and the interval or a dash."""

    value: str
    asked: str
    interval: str


def gate_cells(gate: Mapping[str, Any], report: Mapping[str, Any]) -> GateCells:
    """A gate of the report, by the scale of the figure that it holds against its limit.

    With as many digits as it takes to tell value and limit apart. A gate on the lower end of a difference shows the
    difference beside it.
    """
    value, threshold, interval = gate["value"], gate["threshold"], gate["interval"]
    scale, change = gate_scale(gate, report)
    if gate["rule"] == "finite":
        return GateCells(figure(value), "a finite number", interval_text(interval))
    digits = 3
    while value != threshold and _scaled(value, scale, digits) == _scaled(threshold, scale, digits) and digits < 12:
        digits += 1
    shown = _scaled(value, scale, digits)
    if change is not None and interval is not None and value == interval[0] and value != change["value"]:
        shown = f"{shown} (lower end of {_scaled(change['value'], scale, digits).removesuffix(' points')})"
    between = {"value": None, "interval": interval, "scale": scale}
    asked = f"{gate['rule']} {_scaled(threshold, scale, digits)}"
    return GateCells(shown, asked, "–" if interval is None else scaled_range(between))


def gate_scale(
    gate: Mapping[str, Any], report: Mapping[str, Any]
) -> tuple[Literal["", "rate", "points"], Mapping[str, Any] | None]:
    """What a gate's figures are, and the difference that it is on, if any: by the measure with the same interval."""
    interval, n = gate["interval"], gate["n"]
    if interval is None:  # a check, not a sample
        same = (m for m in report.get("metrics", {}).items() if m[1]["interval"] is None)
        rate = any((m["value"], m["n"]) == (gate["value"], n) and is_rate(name, m) for name, m in same)
        return ("rate" if rate and gate["value"] is not None else ""), None
    for name, change in report.get("differences", {}).items():
        if list(change["interval"] or ()) == list(interval) and change["n"] == n:
            base = report.get("metrics", {}).get(f"{name}_base")
            rate = change.get("scale") == "points" if base is None else is_rate(f"{name}_base", base)
            return ("points" if rate else ""), change
    for name, metric in report.get("metrics", {}).items():
        if list(metric["interval"] or ()) == list(interval) and metric["n"] == n and is_rate(name, metric):
            return "rate", None
    return "", None


def _scaled(value: float | None, scale: str, digits: int) -> str:
    """A figure by its scale, with one decimal in percent for three digits, and so on."""
    if value is None or not scale:
        return figure(value, digits)
    shown = f"{100 * value:.{digits - 2}f}".replace("-", "−")
    return f"{shown}%" if scale == "rate" else f"{shown} points"


def value_text(metric: Mapping[str, Any], rate: bool = False) -> str:
    """A metric's value; a rate in percent ("92.8%")."""
    value = metric.get("value")
    return figure(value) if value is None or not rate else f"{100 * value:.1f}%"


def range_text(interval: Sequence[float] | None, rate: bool = False) -> str:
    """An interval as "87.6 to 95.9%", or what it takes for figures; "no interval" where there is none."""
    if interval is None:
        return "no interval"
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}%" if rate else interval_text(interval)


def signed_text(value: float | None, rate: bool = False, unit: str = "") -> str:
    """A difference with its sign: "−58.0 points" of a rate, "+4.06 words"."""
    if value is None:
        return "not measured"
    shown = f"{abs(100 * value):.1f}" if rate else figure(abs(value))
    sign = "" if not float(re.sub("[^0-9.e-]", "", shown)) else "+" if value > 0 else "−"
    return f"{sign}{shown}{' points' if rate else f' {unit}' if unit else ''}"


def signed_range(interval: Sequence[float] | None, rate: bool = False) -> str:
    """The interval of a difference: "−65.0 to −51.0"."""
    if interval is None:
        return "no interval"
    low, high = (signed_text(one, rate).removesuffix(" points") for one in interval)
    return f"{low} to {high}"


def scaled_value(metric: Mapping[str, Any]) -> str:
    """A result's value by its own scale: "92.8%", "−0.8 points", "4.06"."""
    scale = metric.get("scale", "")
    if scale in ("points", "change"):
        return signed_text(metric.get("value"), scale == "points")
    return value_text(metric, scale == "rate")


def scaled_range(metric: Mapping[str, Any]) -> str:
    """A result's interval by its own scale; "no interval" where there is none."""
    scale, interval = metric.get("scale", ""), metric.get("interval")
    if scale in ("points", "change"):
        return signed_range(interval, scale == "points")
    return range_text(interval, scale == "rate")


def result_text(metric: Mapping[str, Any]) -> str:
    """A result on one line for a table: "92.8% [87.6, 95.9], n = 153"."""
    interval, unparsed = metric.get("interval"), metric.get("unparsed", 0)
    between = "" if interval is None else f" [{scaled_range(metric).replace(' to ', ', ').replace('%', '')}]"
    return f"{scaled_value(metric)}{between}, n = {metric.get('n', 0)}" + (f", {unparsed} unparsed" if unparsed else "")


def count_text(n: int) -> str:
    """ "n = 200", which does not break."""
    return f"n\u00a0=\u00a0{n:,}"


def sentence_case(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def p_text(p: float | None) -> str:
    """A p-value for people."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def report_alarms(report: Mapping[str, Any]) -> list[str]:
    """What must be looked at: the parts' alarms, and those that training wrote among its notes."""
    noted = [note for note in report.get("notes", []) if note.startswith(ALARM)]
    return [sentence_case(text.removeprefix(ALARM).lstrip(": ")) for text in (*report.get("alarms", []), *noted)]


def report_warnings(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing a go: wide intervals, small milestones, the evaluation's notes."""
    found = [
        f"{gate['name']}: the interval ({gate_cells(gate, report).interval}) is wide with n = {gate['n']}"
        for gate in report["gates"]
        if gate["interval"] is not None and gate["interval"][1] - gate["interval"][0] > WIDE
    ]
    if report["milestone"] in ("single", "batch"):
        found.append(PLUMBING)
    return [*(note for note in report.get("notes", []) if not note.startswith(ALARM)), *found]


def dataset_lines(dataset: Mapping[str, Any]) -> list[str]:
    """The data of a run in a few lines: shares, refusals, lengths, the guard, speed."""
    lines = [f"{name}: {shares_text(values)}" for name, values in dataset["shares"].items() if name in SHOWN_SHARES]
    if dataset.get("tempting") is not None:
        lines.append(f"kinds that tempt, in which the easy answer is a wrong one: {dataset['tempting']:.0%} of the "
                     "pairs that the model wrote the instruction of")  # fmt: skip
    for name, drawn in dataset["ran_out"].items():
        lines.append(f"{name} ran out after {drawn:,} instructions; the other sources took its share")
    if dataset["refused"]:
        refused = ", ".join(f"{reason} {count:,}" for reason, count in dataset["refused"].items())
        lines.append(f"instructions refused: {refused}")
    if "evaluation_sets" in dataset:  # a report of before knows none
        sets, held = ", ".join(dataset["evaluation_sets"]), dataset["refused"].get("in_evaluation_set", 0)
        lines.append(f"evaluation sets checked: {sets or 'none'}; {held:,} instructions stood in them and were refused")
    if dataset.get("allow_evaluation_sets"):
        lines.append("--allow-evaluation-sets: what stands in HarmBench or MT-Bench was used; they measure nothing now")
    lines.append(lengths_text(dataset["lengths"]))
    if dataset["guard"] is not None:
        lines.append(guard_text(dataset["guard"]))
    if dataset["tokens_per_second"] is not None:
        tokens = dataset["tokens"].get("completion", 0)
        lines.append(f"{tokens:,} tokens written, {dataset['tokens_per_second']:,.0f} a second over the whole run")
    return lines


def shares_text(values: Mapping[str, Mapping[str, float]]) -> str:
    """Shares of the accepted pairs: "how-to 18%, fix 16%"."""
    return ", ".join(f"{value} {row['share']:.0%}" for value, row in values.items())


def lengths_text(lengths: Mapping[str, Any]) -> str:
    """Words of chosen and rejected, and how far apart they are."""
    if lengths["log_ratio"] is None:
        return "answer lengths: not measured"
    text = (f"answer lengths: chosen {lengths['chosen_words']:.0f} words, rejected {lengths['rejected_words']:.0f}; "
            f"mean log ratio {lengths['log_ratio']:+.3f}")  # fmt: skip
    if not lengths["left_out"]:
        return text
    return f"{text} ({lengths['log_ratio_unmatched']:+.3f} before {lengths['left_out']:,} pairs were left out)"


def guard_text(guard: Mapping[str, Any]) -> str:
    """What the guard said, by category."""
    unsafe = ", ".join(f"{row['category']} {row['words']} {row['count']}" for row in guard["categories"])
    return (f"guard {guard['name']}: {guard['safe']:,} safe, {guard['unsafe']:,} unsafe"
            f"{f' ({unsafe})' if unsafe else ''} and {guard['unparsed']:,} unparsed, both rejected")  # fmt: skip


def cost_text(cost: Mapping[str, Any]) -> str:
    """Time and dollars against the budget, and the peak of GPU memory where there is one, on one line."""
    spent = f"{cost['hours'] * 60:.1f} min, ${cost['dollars']:.2f}"
    budget = f"{cost['budget_hours'] * 60:.0f} min, ${cost['budget_dollars']:.2f} on the pod"
    text = f"{spent} (budget {budget})" + ("; over the time budget" if cost["hours"] > cost["budget_hours"] else "")
    peaks = {phase: peak for phase, peak in cost.get("peak_gpu_gb", {}).items() if peak}
    memory = ", ".join(f"{peak['allocated']:.1f} GB in {phase}" for phase, peak in peaks.items())
    return f"{text}; peak GPU memory {memory}" if memory else text
