"""A report's figures and warnings in words, the same on the page and on the terminal."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from cai_experiment.judging.result import WIDE

SHOWN_SHARES = ("source", "kind", "length")  # on the terminal; the page has topics and principles too
PLUMBING = "1 to 10 steps prove that the plumbing works and no more."


def figure(value: float | None, digits: int = 3) -> str:
    """A number with three significant digits; "not measured" for None."""
    if value is None:
        return "not measured"
    if abs(value) < 1e-9:
        return "0"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.{digits}g}"


def interval_text(interval: Sequence[float] | None) -> str:
    """A 95% interval, or a dash."""
    return "–" if interval is None else f"{figure(interval[0])} to {figure(interval[1])}"


def gate_figures(gate: Mapping[str, Any]) -> tuple[str, str]:
    """A gate's value, and what it asks (">= 0.7"), with as many digits as it takes to tell the two apart."""
    value, threshold = gate["value"], gate["threshold"]
    if gate["rule"] == "finite":
        return figure(value), "a finite number"
    digits = 3
    while value != threshold and figure(value, digits) == figure(threshold, digits) and digits < 12:
        digits += 1
    return figure(value, digits), f"{gate['rule']} {figure(threshold, digits)}"


def report_warnings(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing a go: wide intervals, small milestones, the evaluation's notes."""
    found = [
        f"{gate['name']}: the interval ({interval_text(gate['interval'])}) is wide with n = {gate['n']}"
        for gate in report["gates"]
        if gate["interval"] is not None and gate["interval"][1] - gate["interval"][0] > WIDE
    ]
    if report["milestone"] in ("single", "batch"):
        found.append(PLUMBING)
    return [*report["notes"], *found]


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
