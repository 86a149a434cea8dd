"""A report is made in parts ("generation", "training", "harmbench" ...): measuring one again replaces its own findings
and leaves the others'. All of it is as report.json holds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

from cai_experiment.evaluation.found import ITEMS_FOLDER, Case, Evaluation
from cai_experiment.evaluation.generation import OF_PAIRS
from cai_experiment.evaluation.reporting.naming import file_name, pairs_of_arms, stem
from cai_experiment.evaluation.reporting.significance import adjusted, differences_of, holds, part_tests
from cai_experiment.judging.result import Result, paired_rate_difference
from cai_experiment.records.files import make_folder, write_jsonl

FIRST_PARTS = ("generation", "training")  # in this order, then the others as they are named
SHOWN_ANSWERS = 10
SHOWN_CASES = 50  # of each kind, in report.json and on the page; the file has all of them
NAMED = ("metrics", "tests", "differences", "methods")  # what maps a name to a finding
LISTED = ("gates", "answers", "tables", "cases")  # lists whose entries say their part
TEXTS = ("notes", "alarms")  # lists of texts: `parts` knows whose they are

Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Parts:
    """What was measured now, by part."""

    found: Mapping[str, Evaluation]

    @classmethod
    def of(cls, evaluation: Evaluation | Mapping[str, Evaluation]) -> Parts:
        """An evaluation alone is the part that its gates name, or "evaluation" if it has none."""
        if isinstance(evaluation, Evaluation):
            return cls({" and ".join(sorted({gate.part for gate in evaluation.gates})) or "evaluation": evaluation})
        return cls(dict(evaluation))

    @property
    def measured(self) -> set[str]:
        """The names of the parts, and of those that their gates name."""
        return {*self.found, *(gate.part for one in self.found.values() for gate in one.gates)}


def merge(parts: Parts, earlier: Mapping[str, Any]) -> Report:
    """The findings of both: `earlier`'s but for the parts that were measured again, then those of now.

    Tests are adjusted by Holm over all tests of the report; rates that were compared by McNemar's test alone get their
    paired difference from its counts, anew each time: an earlier one belongs to no part and would not be replaced.
    """
    report: Report = {name: dict(_kept_names(name, parts, earlier)) for name in NAMED}
    report |= {name: _kept_entries(name, parts, earlier) for name in LISTED}
    known = {part: dict(row) for part, row in _known_parts(earlier).items() if part not in parts.measured}
    for part, found in parts.found.items():
        new = _as_json(part, found)
        for name in NAMED:
            report[name] |= new[name]
        for name in LISTED:
            report[name] += new[name]
        known[part] = {name: list(new[name]) for name in (*NAMED, *TEXTS)} | {
            "items": list(map(items_file, found.items))
        }
    for name in TEXTS:
        report[name] = [text for part in sorted(known, key=_order) for text in known[part].get(name, [])]
    for name in LISTED:
        report[name].sort(key=lambda entry: _order(str(entry.get("part", ""))))
    report["parts"] = {part: known[part] for part in sorted(known, key=_order)}
    report["tests"] = adjusted(report["tests"])
    add_differences(report)
    return report


def _order(part: str) -> tuple[int, str]:
    """Generation stands before training, both before what follows them."""
    return (FIRST_PARTS.index(part) if part in FIRST_PARTS else len(FIRST_PARTS), part)


def _known_parts(earlier: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Which part found what. A report of before does not say it: what it says of the pairs is generation's by its name,
    and all else training's; where it says it of some, what no part owns belongs to a part that is gone."""
    known: dict[str, Mapping[str, Any]] = dict(earlier.get("parts", {}))
    of_pairs = [name for name in earlier.get("metrics", {}) if name in OF_PAIRS]
    if of_pairs and "generation" not in known:
        owned = {name for row in known.values() for name in row.get("metrics", [])}
        known["generation"] = {"metrics": [name for name in of_pairs if name not in owned]}
    if earlier and "parts" not in earlier:
        others = {kind: [name for name in earlier.get(kind, {}) if name not in of_pairs] for kind in NAMED}
        known["training"] = {**others, "notes": earlier.get("notes", [])}
    return known


def _kept_names(kind: str, parts: Parts, earlier: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """The earlier findings of a kind: those of the parts that were not measured again."""
    kept: set[str] = set()
    gone: set[str] = set()
    for part, row in _known_parts(earlier).items():
        (gone if part in parts.measured else kept).update(row.get(kind, []))
    return ((name, value) for name, value in earlier.get(kind, {}).items() if name in kept - gone)


def _kept_entries(kind: str, parts: Parts, earlier: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in earlier.get(kind, []) if entry.get("part", "training") not in parts.measured]


def only_generation(earlier: Mapping[str, Any]) -> Report:
    """An earlier report without what it says of a trained model (which is another one now)."""
    others = Parts({part: Evaluation() for part in {"training", *_known_parts(earlier)} - {"generation"}})
    kept = merge(others, earlier)
    kept["parts"] = {part: row for part, row in kept["parts"].items() if part == "generation"}
    return {**earlier, **kept}


def add_differences(report: Report) -> None:
    """Fill in the paired difference of every rate that has McNemar's counts and no difference yet."""
    metrics, tests, differences = report["metrics"], report["tests"], report["differences"]
    for name in pairs_of_arms(metrics):
        n, test = metrics[f"{name}_base"]["n"], tests.get(name, {})
        if "only_base" in test and name not in differences and n and n == metrics[f"{name}_trained"]["n"]:
            lost, gained = test["only_base"], test["only_trained"]
            unparsed = metrics[f"{name}_trained"]["unparsed"]
            same = [True] * (n - lost - gained)
            before, after = [True] * lost + [False] * gained + same, [False] * lost + [True] * gained + same
            differences[name] = paired_rate_difference(before, after, unparsed).to_json()


# ---------------------------------------------------------------- one part


def _as_json(part: str, found: Evaluation) -> Report:
    return {
        "metrics": {name: _metric(name, one, found.items) for name, one in found.metrics.items()},
        "tests": part_tests(found),
        "differences": {name: _metric(name, one, found.items) for name, one in differences_of(found).items()},
        "methods": dict(found.methods),
        "gates": [gate.to_json() for gate in found.gates],
        "answers": [
            {"instruction": a.instruction, "base": a.base.text, "trained": a.trained.text, "part": part}
            for a in found.answers[:SHOWN_ANSWERS]
        ],
        "tables": [{**table.to_json(), "part": part} for table in found.tables],
        "cases": [_kind_of_case(part, kind, cases) for kind, cases in _by_kind(found.cases).items()],
        "notes": list(found.notes),
        "alarms": list(found.alarms),
    }


def _metric(name: str, result: Result, items: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The metric; its `items` names the file of rows that hold it, where it does not name one itself."""
    row = result.to_json()
    file = next((key for key, rows in items.items() if holds(key, rows, stem(name)[0])), "")
    return row if "items" in row or not file else {**row, "items": items_file(file)}


def _by_kind(cases: Iterable[Case]) -> dict[str, list[Case]]:
    kinds: dict[str, list[Case]] = {}
    for case in cases:
        kinds.setdefault(case.kind, []).append(case)
    return kinds


def _kind_of_case(part: str, kind: str, cases: Sequence[Case]) -> dict[str, Any]:
    """A kind of case with its count, its file and the first of its cases."""
    shown = [{"title": case.title, "texts": dict(case.texts)} for case in cases[:SHOWN_CASES]]
    return {"part": part, "kind": kind, "count": len(cases), "file": items_file(f"cases_{part}"), "shown": shown}


def items_file(name: str) -> str:
    """Where a measurement's rows stand, in the run's folder."""
    return f"{ITEMS_FOLDER}/{file_name(name)}.jsonl"


def write_items(folder: Path, parts: Parts) -> None:
    """Write every measurement's rows, and every part's cases, each file whole or not at all.

    Raises DiskError or BadInputError where the folder cannot be written.
    """
    files: dict[str, Iterable[Mapping[str, Any]]] = {}
    for part, found in parts.found.items():
        files |= {items_file(name): rows for name, rows in found.items.items()}
        if found.cases:
            files[items_file(f"cases_{part}")] = [case.to_json() for case in found.cases]
    if files:
        make_folder(folder / ITEMS_FOLDER)
    for file, rows in files.items():
        write_jsonl(folder / file, rows)
