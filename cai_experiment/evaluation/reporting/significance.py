"""p-values of the report: one for every paired difference, all of them in one family for Holm's adjustment.

Rates have McNemar's test; for other figures a part brings its own p-value (`Evaluation.p_values`), or it is computed
here from the rows behind the figure: Fisher's permutation test, `judging.result.paired_p_value`.
"""

from __future__ import annotations

import math
from typing import Any, Hashable, Iterator, Mapping, Sequence

from cai_experiment.evaluation.found import Evaluation
from cai_experiment.evaluation.reporting.naming import pairs_of_arms
from cai_experiment.judging.result import Result, holm, paired_bootstrap, paired_p_value

Rows = Sequence[Mapping[str, Any]]


def part_tests(found: Evaluation) -> dict[str, dict[str, Any]]:
    """The tests of a part as report.json holds them: {"p_value"}, of McNemar's with the two counts."""
    tests: dict[str, dict[str, Any]] = {
        name: {"only_base": one.only_before, "only_trained": one.only_after, "p_value": one.p_value}
        for name, one in found.tests.items()
    }
    for name, change in differences_of(found).items():
        p = found.p_values.get(name)
        p = _from_rows(found, name, change.n) if p is None and name not in tests else p
        if p is not None and name not in tests:
            tests[name] = {"p_value": p}
    return tests


def differences_of(found: Evaluation) -> dict[str, Result]:
    """The paired differences of a part: those that it brings, and of other means what their rows say."""
    made = {}
    for name in pairs_of_arms(found.metrics):
        if name not in found.differences and name not in found.tests:
            both = [values for _, values in _both_values(_rows_of(found, name), name)]
            if both and len(both) == found.metrics[f"{name}_base"].n == found.metrics[f"{name}_trained"].n:
                made[name] = paired_bootstrap([base for base, _ in both], [trained for _, trained in both])
    return found.differences | made


def adjusted(tests: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The tests with "p_holm": Holm's adjustment over all of them."""
    values = holm([test["p_value"] for test in tests.values()])
    return {name: {**test, "p_holm": p} for (name, test), p in zip(tests.items(), values, strict=True)}


def _rows_of(found: Evaluation, name: str) -> Rows:
    return next((rows for key, rows in found.items.items() if holds(key, rows, name)), [])


def _from_rows(found: Evaluation, name: str, n: int) -> float | None:
    """The p-value of a difference of `n` items, by the rows that hold both arms' figures; None if these are others."""
    both = [(group, *values) for group, values in _both_values(_rows_of(found, name), name)]
    if len(both) < 2 or len(both) != n:
        return None
    groups: dict[Hashable, list[float]] = {}
    for group, base, trained in both:  # what belongs together (the turns of a question) is swapped together
        sums = groups.setdefault(group, [0.0, 0.0])
        sums[0], sums[1] = sums[0] + base, sums[1] + trained
    return paired_p_value([base for base, _ in groups.values()], [trained for _, trained in groups.values()])


def _both_values(rows: Rows, name: str) -> Iterator[tuple[Hashable, tuple[float, float]]]:
    """(group, both arms' figures) of the rows that have both."""
    for place, row in enumerate(rows):
        base, trained = _value(row.get("base"), name), _value(row.get("trained"), name)
        if base is not None and trained is not None:
            yield row.get("question_id", ("row", place)), (base, trained)


def _value(said: Any, name: str) -> float | None:
    value = said.get(name) if isinstance(said, Mapping) else said
    return float(value) if isinstance(value, (bool, int, float)) and math.isfinite(value) else None


def holds(key: str, rows: Rows, name: str) -> bool:
    """True if the rows of items `key` say what the measurement `name` (without its arm) is made of."""
    if name == key:
        return True
    first = rows[0].get("trained") if rows else None
    return isinstance(first, Mapping) and name in first
