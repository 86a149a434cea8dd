"""comparison.json: the figures of all models, their differences, the matrix generator x critic, and the bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cai_experiment.comparison.bias import Bias, kinder, missed, missed_more
from cai_experiment.comparison.clustered import rate
from cai_experiment.comparison.measures import (
    BY,
    OF_WORK,
    By,
    Compared,
    adjust,
    compare,
    critique_is_right,
    is_repaired,
    items_of_detection,
    items_of_work,
    of_detection,
)
from cai_experiment.evaluation.detection import Measured
from cai_experiment.evaluation.harm.labelled import Sets
from cai_experiment.judging.result import Result

Row = Mapping[str, Any]
RULES = "rules"


@dataclass(frozen=True, slots=True)
class Found:
    """Everything that the models said. `measured` holds the rules too, where they take part."""

    models: Sequence[str]
    rows: Sequence[Row]
    measured: Mapping[str, Measured]
    sets: Sets
    by: By
    usage: Mapping[str, Mapping[str, Any]]
    seed: int = 0
    notes: Sequence[str] = field(default_factory=list)


# ---------------------------------------------------------------- the matrix


def _flaw_seen(row: Row, by: By) -> bool | None:
    return None if row["flaw_seen"] is None else bool(row["flaw_seen"])


def _called_better(row: Row, by: By) -> bool | None:
    return None if row["preferred"] in (None, "unparsed", "undecided") else row["preferred"] == "yes"


def _said_mended(row: Row, by: By) -> bool | None:
    if row["broken_before"] != "yes" or row["broken_after"] in (None, "unparsed"):
        return None
    return bool(row["broken_after"] == "no")


MATRICES: dict[str, tuple[str, Callable[[Row, By], bool | None]]] = {
    "flaw_seen": ("the critic sees a flaw in the generator's answer", _flaw_seen),
    "called_better": ("the critic calls the revision better than the answer", _called_better),
    "said_mended": ("the critic says that the revision no longer breaks the principle", _said_mended),
    "critique_right": ("critiques that are right", critique_is_right),
    "repaired": ("revisions that repair", is_repaired),
}
ITS_OWN_WORD = ("flaw_seen", "called_better", "said_mended")


def matrix(name: str, found: Found) -> dict[str, dict[str, dict[str, Any]]]:
    """generator -> critic -> rate. One item an instruction, so the intervals are Wilson's."""
    of = MATRICES[name][1]

    def cell(generator: str, critic: str) -> Result:
        own = [row for row in found.rows if (row["generator"], row["critic"]) == (generator, critic)]
        said = [(row["instruction_id"], of(row, found.by)) for row in own]
        return rate([(group, holds) for group, holds in said if holds is not None])

    return {g: {c: cell(g, c).to_json() for c in found.models} for g in found.models}


# ---------------------------------------------------------------- all of it


def compared_measures(found: Found) -> list[Compared]:
    """Every measure of every model, adjusted by Holm over the work and, apart from it, over detection."""
    work = [
        compare(one, {m: items_of_work(one, found.rows, m, found.by) for m in found.models}, found.seed)
        for one in OF_WORK
    ]
    detection = [
        compare(one, {m: items_of_detection(one, said, found.sets) for m, said in found.measured.items()}, found.seed)
        for one in of_detection(found.sets)
    ]
    families = [[one for one in some if one is not None] for some in (work, detection)]
    for family in families:
        adjust(family)
    return [one for family in families for one in family]


def result_of(found: Found) -> dict[str, Any]:
    """comparison.json. Of a measure every model has its rate; `against_first` is each model less the first that has it.

    `by` says on whose word rightness and repair rest.
    """
    measures, known = compared_measures(found), found.by == "truth"
    return {
        "models": list(found.models), "detectors": list(found.measured), "by": found.by, "by_words": BY[found.by],
        "instructions": len({row["instruction_id"] for row in found.rows}),
        "measures": {one.measure.name: _measure(one) for one in measures},
        "usage": {model: dict(figures) for model, figures in found.usage.items()},
        "matrix": {name: {"label": label, "rates": matrix(name, found)} for name, (label, _) in MATRICES.items()},
        "kinder": _biases(kinder(found.rows, found.models, found.seed)),
        "missed_more": _biases(missed_more(found.rows, found.models, found.seed)) if known else [],
        "missed": _missed(found) if known and len(found.models) > 1 else {},
        "ended_early": ended_early(found.rows), "notes": list(found.notes),
    }  # fmt: skip


def _measure(one: Compared) -> dict[str, Any]:
    return {
        "label": one.measure.label, "role": one.measure.role, "better": one.measure.better, "first": one.first,
        "rates": {model: result.to_json() for model, result in one.rates.items() if result.n},
        "against_first": {
            model: {
                **found.result.to_json(), "p_value": found.p_value, "p_holm": one.p_holm[model],
                "same_items": found.paired,
            }
            for model, found in one.against.items()
        },
    }  # fmt: skip


def _biases(some: Sequence[Bias]) -> list[dict[str, Any]]:
    return [{**asdict(one), "result": one.result.to_json()} for one in some]


def _missed(found: Found) -> dict[str, Any]:
    """By the truth: the flaws of its own answers and of others' that each critic misses."""
    both = {critic: missed(found.rows, critic) for critic in found.models}
    return {
        critic: {"own": rate(own).to_json(), "others": rate(others).to_json()} for critic, (own, others) in both.items()
    }


SPEAKERS = {"answer": "generator", "revision": "generator", "critique": "critic", "verdict": "critic"}


def ended_early(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Cells that ended early, by whose turn it was, and why; an answer's fault counts once, whoever would criticise it.

    Such a cell counts as far as it came.
    """
    seen: dict[tuple[str, str, str], set[tuple[str, str]]] = {}
    for row in rows:
        if turn := row["fault_in"]:
            who = row[SPEAKERS[turn]]
            other = "" if turn == "answer" else row["critic" if who == row["generator"] else "generator"]
            seen.setdefault((who, turn, row["fault"]), set()).add((row["instruction_id"], other))
    return [
        {"model": who, "turn": turn, "reason": reason, "times": len(places)}
        for (who, turn, reason), places in seen.items()
    ]
