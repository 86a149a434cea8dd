"""The comparison as tables and in sentences, the same on the page and on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cai_experiment.comparison.result import ITS_OWN_WORD
from cai_experiment.evaluation.reporting.words import figure, p_text

Comparison = Mapping[str, Any]
Table = dict[str, Any]  # as report.json holds it
DASH = "–"
ALL_DIFFERENCES = "p-values are Holm's over all differences of the table."
ROLES = {
    "critic": "reads all models' answers",
    "generator": "its answers, whoever criticised them",
    "detector": "labelled texts",
}


def tables(result: Comparison) -> list[Table]:
    """Every table: rates, differences, work, one matrix each, bias."""
    found = [rates_table(result), differences_table(result), work_table(result)]
    found += [matrix_table(result, name) for name in result["matrix"]]
    return [one for one in [*found, bias_table(result), missed_table(result)] if one["rows"]]


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
         "same items" if less["same_items"] else "by instruction"]
        for one in result["measures"].values()
        for model, less in one["against_first"].items()
    ]  # fmt: skip
    note = (
        "Same items: Bonett and Price's interval, McNemar's exact test. By instruction: each model has items of its "
        f"own; bootstrap and permutation over instructions. {ALL_DIFFERENCES}"
    )
    return _table("differences", "Differences", ["measure", "difference of", "points", "p (Holm)", "items"], rows, note)


def work_table(result: Comparison) -> Table:
    """Speed, memory, time and cost."""
    rows = []
    for model, used in result["usage"].items():
        memory = DASH if used["memory_gb"] is None else f"{figure(used['memory_gb'])} GB ({used['memory_is']})"
        speed = DASH if used["tokens_per_second"] is None else (
            f"{figure(used['tokens_per_second'])} ({used['tokens']:,} tokens)"
        )  # fmt: skip
        verdicts = DASH if used["weighed_per_second"] is None else f"{figure(used['weighed_per_second'])}"
        total = used["speaking_seconds"] + used["weighing_seconds"]
        rows.append([
            model, speed, verdicts, f"{figure(total)}\u00a0s",
            f"{figure(used['loading_seconds'])} s, {used['loads']} times",
            memory, f"${used['dollars']:.4f}", f"{used['engine']}, {used['quantization']}",
        ])  # fmt: skip
    columns = ("model", "tokens a second", "verdicts a second", "work", "loading", "memory", "cost", "engine")
    note = (
        "Tokens a second: generated tokens over the wall clock of the lists in which it spoke, many at a time. "
        "Cost: work and loading at --price-per-hour."
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


def bias_table(result: Comparison) -> Table:
    """Self-judging bias."""
    rows = [
        [one["who"], _scaled(one["result"], "points"), p_text(one["p_value"]), says_of_bias(one)]
        for one in result["self_bias"]
    ]
    note = (
        "How much kinder a critic is to its own answers than the other critics are to the same answers, less how much "
        "kinder it is to answers of others; above 0 it favours its own. Bootstrap over instructions; after Panickssery "
        "et al. 2024 (arXiv 2404.13076) and Zheng et al. 2023 (arXiv 2306.05685)."
    )
    if len(result["models"]) == 2:
        note += " With two models only the mean of both biases can be told; a third one tells them apart."
    return _table("self_bias", "Self-judging bias", ["critic", "favours its own by", "p", "reading"], rows, note)


def missed_table(result: Comparison) -> Table:
    """Flaws missed, own against others', by the truth."""
    rows = [
        [critic, _scaled(one["own"], "rate"), _scaled(one["others"], "rate"), _scaled(one["own_less_others"], "points")]
        for critic, one in result["missed_own"].items()
    ]
    note = "Answers with a flaw in which the critic sees none. Own flaws may be harder to see; the bias allows for it."
    columns = ("critic", "of its own answers", "of others' answers", "own − others")
    return _table("missed_own", "Flaws missed, by the world's truth", columns, rows, note)


# ---------------------------------------------------------------- in sentences


def clear(result: Mapping[str, Any]) -> bool:
    """True if the interval does not include 0."""
    interval = result["interval"]
    return interval is not None and (interval[0] > 0 or interval[1] < 0)


def points(result: Mapping[str, Any]) -> str:
    """ "+12.0 points (3.1 to 20.9)"."""
    low, high = (f"{100 * bound:+.1f}".replace("-", "−") for bound in result["interval"])
    return f"{100 * result['value']:+.1f} points ({low} to {high})".replace("-", "−")


def says_of_bias(one: Mapping[str, Any]) -> str:
    """What an interval of a bias allows to say."""
    if one["result"]["interval"] is None:
        return "too few instructions"
    if one["result"]["interval"][0] == one["result"]["interval"][1]:
        return "own and other answers fare alike on every instruction"
    if not clear(one["result"]):
        return "the interval includes 0: no bias that it would exclude"
    return "favours its own" if one["result"]["value"] > 0 else "harder on its own"


def readings(result: Comparison) -> list[str]:
    """What the comparison says, in a line each: clear differences, what cannot be told apart, the bias."""
    lines = list(_of_measures(result))
    lines += [
        f"self-judging bias, {one['who']}: {points(one['result'])}; {says_of_bias(one)}"
        for one in result["self_bias"]
        if one["result"]["interval"] is not None
    ]
    return [*lines, *result["notes"]]


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
