"""The comparison as tables and in sentences, the same on the page and on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cai_experiment.comparison.result import ITS_OWN_WORD
from cai_experiment.evaluation.reporting.words import figure, p_text

Comparison = Mapping[str, Any]
Table = dict[str, Any]  # as report.json holds it
DASH = "–"
FEW = 20  # instructions; with fewer of them a bootstrap's interval is too narrow
SEES_MORE = "a critic that sees more, and whose answers have fewer flaws, shows this without sparing its own"
ROLES = {
    "critic": "reads all models' answers",
    "generator": "its answers, whoever criticised them",
    "detector": "labelled texts",
}


def tables(result: Comparison) -> list[Table]:
    """Every table: rates, differences, work, one matrix each, bias."""
    found = [rates_table(result), differences_table(result), ended_table(result), work_table(result)]
    found += [matrix_table(result, name) for name in result["matrix"]]
    found += [missed_more_table(result), missed_table(result), kinder_table(result)]
    return [one for one in found if one["rows"]]


def _table(name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> Table:
    return {"name": name, "title": title, "columns": list(columns), "rows": [list(r) for r in rows], "note": note}


def _scaled(result: Mapping[str, Any] | None, scale: str) -> Any:
    return DASH if result is None or result["value"] is None else {**result, "scale": scale}


def rates_table(result: Comparison) -> Table:
    """A row a measure, a column a model."""
    names = result["detectors"]
    rows = [
        [one["label"], "more" if one["better"] == "up" else "less",
         *(_scaled(one["rates"].get(name), "rate") for name in names)]
        for one in result["measures"].values()
    ]  # fmt: skip
    note = f"Rightness and repair by {result['by_words']}; {result['instructions']} instructions. "
    note += "Intervals take the instruction as the unit."
    return _table("models", "The models on the same work", ["measure", "better", *names], rows, note)


def differences_table(result: Comparison) -> Table:
    """Each model less the first."""
    rows = [
        [one["label"], f"{model} − {one['first']}", _scaled(less, "points"), p_text(less["p_holm"]),
         "same items" if less["same_items"] else "by group"]
        for one in result["measures"].values()
        for model, less in one["against_first"].items()
    ]  # fmt: skip
    note = (
        "Same items: Bonett and Price's interval, McNemar's exact test. By group: several items to an instruction, or "
        "not the same ones; bootstrap and sign flips over instructions (of detection: texts). p-values are Holm's, "
        "over all differences in the work and, apart from these, over all in detection. Each model is held against "
        "the first one alone."
    )
    return _table("differences", "Differences", ["measure", "difference of", "points", "p (Holm)", "items"], rows, note)


def work_table(result: Comparison) -> Table:
    """Speed, memory, time and cost."""
    rows = []
    for model, used in result["usage"].items():
        memory = DASH if used["memory_gb"] is None else f"{figure(used['memory_gb'])} GB ({used['memory_is']})"
        if used["weights_gb"] is not None:
            memory += f"; weights {figure(used['weights_gb'])} GB by arithmetic"
        cost = DASH if used["dollars"] is None else f"${used['dollars']:.4f}"
        speed = DASH if used["tokens_per_second"] is None else (
            f"{figure(used['tokens_per_second'])} ({used['tokens']:,} tokens)"
        )  # fmt: skip
        verdicts = DASH if used["weighed_per_second"] is None else f"{figure(used['weighed_per_second'])}"
        total = used["speaking_seconds"] + used["weighing_seconds"]
        rows.append([
            model, speed, verdicts, f"{figure(total)}\u00a0s",
            f"{figure(used['loading_seconds'])} s, {used['loads']} times",
            memory, cost, f"{used['engine']}, {used['quantization']}, {used['slots']} slots",
        ])  # fmt: skip
    columns = ("model", "tokens a second", "verdicts a second", "work", "loading", "memory", "cost", "engine")
    note = (
        "Tokens a second: generated tokens over the wall clock of the lists in which it spoke, many at a time. "
        "Cost: work and loading at --price-per-hour. "
        "Speed and memory of different engines or slots do not compare the models."
    )
    return _table("work", "Speed, memory and cost", columns, rows, note)


def matrix_table(result: Comparison, name: str) -> Table:
    """Generators as rows, critics as columns."""
    found = result["matrix"][name]
    whose = "The critic's own word." if name in ITS_OWN_WORD else f"By {result['by_words']}."
    rows = [[generator, *(_scaled(cell, "rate") for cell in row.values())] for generator, row in found["rates"].items()]
    if not any(isinstance(cell, dict) for row in rows for cell in row):
        rows = []
    columns = ["generator", *(f"critic {model}" for model in result["models"])]
    return _table(f"matrix_{name}", f"Generator and critic: {found['label']}", columns, rows, whose)


def ended_table(result: Comparison) -> Table:
    """Turns with which a cell ended early."""
    found = result["ended_early"]
    rows = [[one["model"], one["turn"], one["reason"].replace("_", " "), str(one["times"])] for one in found]
    note = "Such a cell counts as far as it came: an empty or cut critique is a miss, and none that could be right."
    return _table("ended_early", "Ended early", ["model", "its turn", "why", "times"], rows, note)


def missed_more_table(result: Comparison) -> Table:
    """Of answers with a flaw: does a critic miss more of its own?"""
    note = (
        "Answers that have a flaw, by the world's truth. How much more than the other critics a critic misses in its "
        "own, less how much more than they in others' answers. It may spare its own, or be blind to the kinds of flaws "
        "that it makes: this does not tell which. Bootstrap and sign flips over instructions; p is Holm's over the "
        f"critics. {_source(result)}"
    )
    title = "Of answers with a flaw: missed more in its own than in others', held against the other critics"
    return _table("missed_more", title, _BIAS, _bias_rows(result, "missed_more"), note)


def kinder_table(result: Comparison) -> Table:
    """Kinder to its own, on top of how much it sees in general: no proof of a bias."""
    note = (
        "How much fewer flaws than the other critics it sees in its own answers, less how much fewer than they in "
        f"others' answers. This alone is no bias: {SEES_MORE}. Bootstrap and sign flips over instructions; p is "
        f"Holm's over the critics. {_source(result)}"
    )
    title = "Kinder to its own answers, on top of how much it sees in general"
    return _table("kinder", title, _BIAS, _bias_rows(result, "kinder"), note)


_BIAS = ("critic", "points", "p (Holm)", "reading")


def _bias_rows(result: Comparison, name: str) -> list[list[Any]]:
    return [
        [one["who"], _scaled(one["result"], "points"), p_text(one["p_holm"]), says_of_bias(one, name)]
        for one in result[name]
    ]


def _source(result: Comparison) -> str:
    two = "With two models only the mean of both can be told; a third one tells them apart. "
    after = "After Panickssery et al. 2024 (arXiv 2404.13076) and Zheng et al. 2023 (arXiv 2306.05685)."
    return (two if len(result["models"]) == 2 else "") + after


def missed_table(result: Comparison) -> Table:
    """Flaws missed, own and others', by the truth."""
    rows = [[who, _scaled(one["own"], "rate"), _scaled(one["others"], "rate")] for who, one in result["missed"].items()]
    note = "Answers with a flaw in which the critic sees none. Own flaws may be harder to see, for any critic."
    columns = ("critic", "of its own answers", "of others' answers")
    return _table("missed", "Flaws missed, by the world's truth", columns, rows, note)


# ---------------------------------------------------------------- in sentences


def clear(result: Mapping[str, Any]) -> bool:
    """True if the interval does not include 0."""
    interval = result["interval"]
    return interval is not None and (interval[0] > 0 or interval[1] < 0)


def points(result: Mapping[str, Any]) -> str:
    """ "+12.0 points (+3.1 to +20.9)"; without its interval where it has none."""
    value = f"{100 * result['value']:+.1f} points".replace("-", "−")
    if result["interval"] is None:
        return value
    low, high = (f"{100 * bound:+.1f}".replace("-", "−") for bound in result["interval"])
    return f"{value} ({low} to {high})"


SAYS = {  # what stands its interval and Holm's test: (above 0, below 0)
    "missed_more": ("misses more of its own flaws than the other critics' sight explains",
                    "misses fewer of its own flaws than the other critics' sight explains"),
    "kinder": ("kinder to its own; no proof of a bias", "harder on its own; no proof of a bias"),
}  # fmt: skip


def says_of_bias(one: Mapping[str, Any], name: str) -> str:
    """What a figure of `missed_more` or `kinder` allows to say."""
    found = one["result"]
    if found["interval"] is None:
        return f"{one['why']}: no interval"
    if not clear(found) or one["p_holm"] >= 0.05:
        return "no difference that stands its interval and Holm's test"
    return SAYS[name][found["value"] < 0]


def readings(result: Comparison) -> list[str]:
    """What the comparison says, in a line each: clear differences, what cannot be told apart, own answers, failures."""
    lines = list(_of_measures(result))
    name = "missed_more" if result["missed_more"] else "kinder"  # by the truth, where it is known
    lines += [f"{_OF[name]}, {one['who']}: {_figure(one)}{says_of_bias(one, name)}" for one in result[name]]
    if name == "kinder" and lines and result["kinder"]:
        lines.append(f"kinder to its own is no proof of a bias: {SEES_MORE}")
    if result["instructions"] < FEW:
        few = f"{result['instructions']} instructions: with fewer than {FEW}"
        lines.append(f"{few}, intervals by bootstrap are too narrow")
    return [*lines, *_of_failures(result), *result["notes"]]


_OF = {
    "missed_more": "flaws missed, own against others'",
    "kinder": "kinder to its own, on top of how much it sees in general",
}


def _figure(one: Mapping[str, Any]) -> str:
    return "" if one["result"]["value"] is None else f"{points(one['result'])}; "


def _of_failures(result: Comparison) -> Iterator[str]:
    some = [f"{one['model']}: {one['turn']}, {one['reason'].replace('_', ' ')} ({one['times']})"
            for one in result["ended_early"]]  # fmt: skip
    if some:
        yield f"ended early, and counted as far as they came: {'; '.join(some)}"


def _of_measures(result: Comparison) -> Iterator[str]:
    unclear: dict[str, list[str]] = {}
    for one in result["measures"].values():
        for model, less in one["against_first"].items():
            if not clear(less) or less["p_holm"] >= 0.05:
                unclear.setdefault(f"{model} − {one['first']}", []).append(f"{one['label']} {points(less)}")
                continue
            better = (less["value"] > 0) is (one["better"] == "up")
            yield f"{model} is {'better' if better else 'worse'} than {one['first']} at {one['label']}: {points(less)}"
    for models, some in unclear.items():
        yield f"{models}: no difference that stands its interval and Holm's test: {'; '.join(some)}"
