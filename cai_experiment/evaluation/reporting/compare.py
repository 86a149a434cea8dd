"""Runs beside each other: which settings differ, and what that did to the trained models, item by item.

Each run is held against the first one named. Where both answered the same item (the rows' contract is in `found`; of a
pair both answers belong to the item), the difference is paired: McNemar's test and Bonett and Price's interval for
rates, a permutation test and the paired bootstrap for other figures. Where they did not, the difference stands between
two independent figures: its interval is Newcombe's for rates, and by the same formula for others (MOVER: G. Y. Zou and
A. Donner 2008), and it says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence

from cai_experiment.errors import BadInputError
from cai_experiment.evaluation.reporting.naming import Named, is_rate, named
from cai_experiment.evaluation.reporting.summary import Effect, completed
from cai_experiment.judging.result import Result, holm, mcnemar, paired_difference, paired_p_value
from cai_experiment.milestones import SCRIPTS
from cai_experiment.records.files import read_json, read_jsonl, show

ENOUGH_SHARED = 0.5  # of the smaller run's items; with fewer in common the difference is not paired

NO_OUTCOME = ("adapter", "exclude")  # settings that differ in every run and say nothing of how it was made
NO_PART = "not made in this run"

Key = tuple[str, ...]  # id and text of an item, of a pair both answers too
Values = dict[str, dict[Key, float]]  # measurement -> item -> what it says of the trained model


@dataclass(frozen=True, slots=True)
class Run:
    """A run to be compared: its report, its settings in one flat table, and its items."""

    name: str
    report: Mapping[str, Any]
    settings: Mapping[str, str]
    values: Values
    booleans: frozenset[str]  # the measurements whose items are true or false


@dataclass(frozen=True, slots=True)
class Comparison:
    """One measure of two runs' trained models: `effect.base` is the first run's, `effect.trained` the other's.

    `items` is how many items each run has of its own; of a paired one the figures are of those that both have.
    """

    effect: Effect
    paired: bool
    p_value: float | None
    items: tuple[int, int] = (0, 0)

    @property
    def note(self) -> str:
        """What a reader must know of the figures: that they are not paired, or not of all items; else ""."""
        n = self.effect.base["n"]
        if not self.paired:
            return "not paired"
        one, two = self.items
        return "" if (n, n) == self.items else f"on the {n:,} items that count in both runs ({one:,} and {two:,})"


# ---------------------------------------------------------------- reading


def read_runs(data_dir: Path, names: Sequence[str]) -> list[Run]:
    """The runs of a data folder. Raises BadInputError for fewer than two, the same one twice, an unknown one, and for
    one without a report."""
    if len(names) < 2:
        raise BadInputError(f"--compare names {len(names)} run, it takes two or more", f"{_runs_there(data_dir)}")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadInputError(f"--compare names {twice} twice", "name each run once")
    return [read_run(data_dir, name) for name in names]


def read_run(data_dir: Path, name: str) -> Run:
    """One run. Raises BadInputError if it is not there or has no report."""
    folder = data_dir / name
    if not folder.is_dir():
        raise BadInputError(f"there is no run {name} in {show(data_dir)}", _runs_there(data_dir))
    if not (folder / "report.json").exists():
        message = f"run {name} has no report ({show(folder / 'report.json')})"
        raise BadInputError(message, f"evaluate it first: {SCRIPTS}eval_model.py --run {name}")
    report = completed(read_json(folder / "report.json"))
    values, booleans = _read_items(folder, report)
    return Run(name, report, _flat_settings(report, folder / "manifest.json"), values, frozenset(booleans))


def _runs_there(data_dir: Path) -> str:
    runs = sorted(path.parent.name for path in data_dir.glob("*/report.json"))
    return f"runs with a report there: {', '.join(runs) or 'none'}"


def _flat_settings(report: Mapping[str, Any], manifest: Path) -> dict[str, str]:
    """The settings of every part, as text, and what the manifest knows beside them."""
    flat = {f"{part}: {name}": str(value) for part, own in report["settings"].items() for name, value in own.items()}
    made = read_json(manifest) if manifest.exists() else {}
    for role, loaded in made.get("models", {}).items():
        flat[f"{role}: model"] = str(loaded.get("model"))
        flat[f"{role}: weights"] = str(loaded.get("weights_sha256", loaded.get("revision", "")))[:12]
    flat["constitution"] = str(made.get("constitution", {}).get("sha256", ""))[:12]
    flat["seed"] = str(made.get("seed", ""))
    flat["git revision"] = str(made.get("git_revision", ""))[:12]
    return {name: value for name, value in flat.items() if value}


def _read_items(folder: Path, report: Mapping[str, Any]) -> tuple[Values, set[str]]:
    """What the rows behind a report's figures say of the trained model; which measurements are true or false."""
    values: Values = {}
    booleans: set[str] = set()
    files = {file for part in report.get("parts", {}).values() for file in part.get("items", [])}
    for path in sorted(folder / file for file in files):
        questions: dict[tuple[str, str], dict[Key, float]] = {}
        for row in read_jsonl(path, repair=False):
            pair = (str(row[side]) for side in ("chosen", "rejected") if side in row)
            key = (str(row.get("id", "")), str(row.get("instruction", row.get("text", ""))), *pair)
            for name, value in _measured(path.stem, row.get("trained")):
                if isinstance(value, bool):
                    booleans.add(name)
                if isinstance(value, bool) or "question_id" not in row:
                    values.setdefault(name, {})[key] = float(value)
                else:
                    questions.setdefault((name, str(row["question_id"])), {})[key] = float(value)
        for (name, _), turns in questions.items():  # the turns of a question are no independent items: one, their mean
            whole = tuple(text for key in sorted(turns) for text in key)
            values.setdefault(name, {})[whole] = sum(turns.values()) / len(turns)
    return values, booleans


def _measured(name: str, trained: Any) -> Iterator[tuple[str, bool | float]]:
    """(measurement, value) of a row: its own, or those of the object in it; what could not be judged is left out."""
    found = trained if isinstance(trained, Mapping) else {name: trained}
    for one, value in found.items():
        if isinstance(value, (bool, int, float)) and math.isfinite(value):
            yield one, value


# ---------------------------------------------------------------- comparing


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) of those that are not the same in all; "–" where a run has none. A part that a
    run lacks is one row."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name.split(": ")[-1] not in NO_OUTCOME)
    parts = [{name.split(": ")[0] for name in run.settings if ": " in name} for run in runs]
    lacking = [part for part in dict.fromkeys(name.split(": ")[0] for name in names if ": " in name)
               if not all(part in own for own in parts)]  # fmt: skip
    rows = [(part, ["made" if part in own else NO_PART for own in parts]) for part in lacking]
    rows += [(name, [run.settings.get(name, "–") for run in runs]) for name in names
             if name.split(": ")[0] not in lacking]  # fmt: skip
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def compare(runs: Sequence[Run]) -> list[list[Comparison]]:
    """For each run but the first, its comparisons with that; p-values adjusted by Holm over all of them."""
    found = [list(_against(runs[0], other)) for other in runs[1:]]
    values = [one.p_value for group in found for one in group if one.p_value is not None]
    adjusted = iter(holm(values))
    return [
        [one if one.p_value is None else replace(one, effect=replace(one.effect, p_holm=next(adjusted)))
         for one in group]
        for group in found
    ]  # fmt: skip


def _against(first: Run, other: Run) -> Iterator[Comparison]:
    """Every measure that both runs have: by their items where these agree, else by their figures."""
    paired = set()
    for name in first.values:
        shared = _shared(first.values[name], other.values.get(name, {}))
        if shared:
            paired.add(name)
            items = len(first.values[name]), len(other.values[name])
            yield _paired(name, shared, name in first.booleans and name in other.booleans, items)
    for metric, one in first.report["metrics"].items():
        two = other.report["metrics"].get(metric)
        name = metric.removesuffix("_trained")
        if two is not None and name not in paired and not metric.endswith("_base"):
            yield _unpaired(name, metric, one, two)


def _shared(one: Mapping[Key, float], two: Mapping[Key, float]) -> list[tuple[float, float]]:
    """Both values of the items that both have; empty if they have too few in common."""
    keys = [key for key in one if key in two]
    enough = max(2.0, ENOUGH_SHARED * min(len(one), len(two)))
    return [(one[key], two[key]) for key in keys] if len(keys) >= enough else []


def outcome(name: str) -> Named:
    """The measure's name; what says nothing of a trained model (the data, the judge) is neither better nor worse."""
    found = named(name)
    return replace(found, better="") if found.group == "other" else found


def _paired(name: str, shared: Sequence[tuple[float, float]], rate: bool, items: tuple[int, int]) -> Comparison:
    before, after = [a for a, _ in shared], [b for _, b in shared]
    one, two = (_summary(values, rate) for values in (before, after))
    if rate:
        p = mcnemar([bool(a) for a in before], [bool(b) for b in after]).p_value
    else:
        p = paired_p_value(before, after)
    change = paired_difference(before, after).to_json()
    return Comparison(Effect(name, outcome(name), rate, one, two, change, None), True, p, items)


def _summary(values: Sequence[float], rate: bool) -> dict[str, Any]:
    return (Result.rate(round(sum(values)), len(values)) if rate else Result.mean(values)).to_json()


def _unpaired(name: str, metric: str, one: Mapping[str, Any], two: Mapping[str, Any]) -> Comparison:
    rate = is_rate(metric, one) and is_rate(metric, two)
    tested = named(name).group != "other"  # what the data were like needs no test, and each test costs the others
    p = _fisher_p(one, two) if tested and rate and one["n"] and two["n"] else None
    return Comparison(Effect(name, outcome(name), rate, one, two, unpaired_difference(one, two), None), False, p)


def unpaired_difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any] | None:
    """two - one of independent figures as report.json holds them; None if either was not measured.

    The interval is [d - sqrt((v2 - l2)^2 + (u1 - v1)^2), d + sqrt((u2 - v2)^2 + (v1 - l1)^2)] with each figure's own
    bounds: with Wilson's it is Newcombe's (1998, method 10). `n` is the smaller of the two.
    """
    if one["value"] is None or two["value"] is None:
        return None
    difference, interval = two["value"] - one["value"], None
    if one["interval"] is not None and two["interval"] is not None:
        (low1, high1), (low2, high2) = one["interval"], two["interval"]
        below = math.hypot(two["value"] - low2, high1 - one["value"])
        above = math.hypot(high2 - two["value"], one["value"] - low1)
        interval = [difference - below, difference + above]
    return {"value": difference, "n": min(one["n"], two["n"]), "interval": interval, "unparsed": 0}


def _fisher_p(one: Mapping[str, Any], two: Mapping[str, Any]) -> float:
    """Fisher's exact test of two independent rates, two-sided."""
    from scipy.stats import fisher_exact

    table = [[round(m["value"] * m["n"]), m["n"] - round(m["value"] * m["n"])] for m in (one, two)]
    return float(fisher_exact(table)[1])


def standing(runs: Iterable[Run]) -> list[tuple[str, str, str, str, str]]:
    """Each run's verdict, gates passed, pairs, and time and dollars."""
    rows = []
    for run in runs:
        gates, cost = run.report["gates"], run.report["cost"]
        passed = f"{sum(gate['passed'] for gate in gates)} of {len(gates)}"
        spent = f"{cost['hours'] * 60:.1f} min, ${cost['dollars']:.2f}"
        rows.append((run.name, str(run.report["verdict"]), passed, f"{run.report['counts']['accepted']:,}", spent))
    return rows
