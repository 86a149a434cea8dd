"""Is the ensemble better than its members? Accuracy of every arm, and paired differences, each with its interval.

All arms answer the same questions, so differences are taken question by question. An answer that cannot be read is
counted, and counts as wrong: a reader would have got nothing from it. The best single expert is the one with the
highest accuracy over all questions of this very evaluation; that choice favours the expert, never the ensemble.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cai_experiment.judging.result import RESAMPLES, Result, holm, mcnemar, paired_rate_difference

ENSEMBLE, UNIFORM, ROUTER, BY_DATASET, ORACLE = "ensemble", "uniform", "router", "by_dataset", "oracle"
RESERVED = (ENSEMBLE, UNIFORM, ROUTER, BY_DATASET, ORACLE, "select", "mixture")
BEST_SINGLE = "best_single"
ALL = "all"  # every dataset together
RATIO = "ensemble_over_oracle"
LEVEL = 0.05  # of the adjusted p-values
Z95 = 1.959964  # two-sided 95% of the normal distribution


@dataclass(frozen=True, slots=True)
class Marks:
    """What each arm got right: a value per question, in the questions' order. Unread answers are not right."""

    datasets: tuple[str, ...]  # of each question
    experts: tuple[str, ...]  # arms that are one expert alone
    right: Mapping[str, tuple[bool, ...]]
    unread: Mapping[str, tuple[bool, ...]]

    @classmethod
    def of(
        cls, datasets: Sequence[str], experts: Sequence[str], found: Mapping[str, Sequence[bool | None]]
    ) -> Marks:  # fmt: skip
        """From what the reader found of each arm's answers: right, wrong, or None (could not be read)."""
        return cls(
            tuple(datasets),
            tuple(experts),
            {arm: tuple(mark is True for mark in marks) for arm, marks in found.items()},
            {arm: tuple(mark is None for mark in marks) for arm, marks in found.items()},
        )

    @property
    def groups(self) -> dict[str, list[int]]:
        """Places of the questions of "all", then of each dataset."""
        places = {name: [i for i, one in enumerate(self.datasets) if one == name] for name in self.datasets}
        return {ALL: list(range(len(self.datasets))), **places}

    def best_single(self) -> str:
        """The expert with the most right answers over all questions, the first of equals."""
        return max(self.experts, key=lambda name: sum(self.right[name]))


def with_picked(marks: Marks, picks: Sequence[int] | None) -> Marks:
    """The marks with the arms that pick one expert for a whole answer; none without experts' own answers.

    `picks` is the router's expert of each question (None: no router). The oracle is right where any expert is; where
    answers are sampled or guessed it profits from luck. "by_dataset" takes the dataset's best expert, as found here.
    """
    if not marks.experts:
        return marks
    chosen: dict[str, list[int]] = {} if picks is None else {ROUTER: list(picks)}
    columns = [marks.right[name] for name in marks.experts]
    best = {
        name: max(range(len(columns)), key=lambda expert: sum(columns[expert][i] for i in places))
        for name, places in marks.groups.items()
    }
    chosen[BY_DATASET] = [best[name] for name in marks.datasets]
    chosen[ORACLE] = [max(range(len(columns)), key=lambda e: columns[e][i]) for i in range(len(marks.datasets))]
    right, unread = dict(marks.right), dict(marks.unread)
    for arm, experts in chosen.items():
        right[arm] = tuple(marks.right[marks.experts[expert]][i] for i, expert in enumerate(experts))
        unread[arm] = tuple(marks.unread[marks.experts[expert]][i] for i, expert in enumerate(experts))
    return replace(marks, right=right, unread=unread)


def accuracies(marks: Marks) -> dict[str, dict[str, dict[str, Any]]]:
    """{arm: {"all" or dataset: {"value", "n", "interval", "unread", ...}}}, with Wilson's intervals.

    `unread` is how many of the n answers could not be read; they count as wrong.
    """
    return {
        arm: {
            group: {
                **Result.rate(sum(right[i] for i in places), len(places)).to_json(),
                "unread": sum(marks.unread[arm][i] for i in places),
            }
            for group, places in marks.groups.items()
        }
        for arm, right in marks.right.items()
    }


def differences(marks: Marks, ensemble: str = ENSEMBLE, seed: int = 0) -> dict[str, dict[str, dict[str, Any]]]:
    """{"ensemble_minus_...": {"all" or dataset: difference of accuracies with its paired interval}} against every rival
    that was asked, and {"ensemble_over_oracle": ...}: the ratio of accuracies, by bootstrap over questions.

    The pooled differences have McNemar's p-value, adjusted by Holm over them ("p_holm"; the oracle stands apart: no
    arm made of these experts' whole answers can be above it). "needed" is about how many questions such a difference
    would take to be told from 0, where these were too few.
    """
    rivals = _rivals(marks, ensemble)
    found = {
        f"{ENSEMBLE}_minus_{name}": {
            group: _difference(marks, arm, ensemble, places) for group, places in marks.groups.items()
        }
        for name, arm in rivals.items()
    }
    tested = [name for name in rivals if name != ORACLE]
    p_values = [mcnemar(marks.right[rivals[name]], marks.right[ensemble]).p_value for name in tested]
    for name, p in zip(tested, holm(p_values), strict=True):
        found[f"{ENSEMBLE}_minus_{name}"][ALL]["p_holm"] = p
    if ORACLE in marks.right:
        found[RATIO] = {
            group: ratio([float(marks.right[ensemble][i]) for i in places],
                         [float(marks.right[ORACLE][i]) for i in places], seed).to_json()
            for group, places in marks.groups.items()
        }  # fmt: skip
    return found


def _rivals(marks: Marks, ensemble: str) -> dict[str, str]:
    """What the ensemble is held against: name of the difference -> arm."""
    rivals = {BEST_SINGLE: marks.best_single()} if marks.experts else {}
    others = (UNIFORM, ROUTER, BY_DATASET, "select", "mixture", ORACLE)
    return rivals | {name: name for name in others if name in marks.right and name != ensemble}


def _difference(marks: Marks, arm: str, ensemble: str, places: Sequence[int]) -> dict[str, Any]:
    before, after = ([marks.right[one][i] for i in places] for one in (arm, ensemble))
    result = paired_rate_difference(before, after)
    known = {"against": arm} if arm in marks.experts else {}
    return {**result.to_json(), **known, "needed": questions_needed(before, after)}


def side(found: Mapping[str, Any]) -> int:
    """1 or -1 where a difference is clearly above or below 0, else 0: its interval leaves 0 out, and so does its test
    once it is adjusted for the number of rivals ("p_holm", where it has one).
    """
    if found["interval"] is None or found.get("p_holm", 0.0) >= LEVEL:
        return 0
    low, high = found["interval"]
    return 1 if low > 0 else -1 if high < 0 else 0


def questions_needed(before: Sequence[bool], after: Sequence[bool]) -> int | None:
    """About how many questions would tell the observed difference from 0 at 95%; None if these did, or if it is 0.

    n = z^2 (d - delta^2) / delta^2 with d the share of questions on which the two differ (the normal interval of a
    paired difference of rates).
    """
    n = len(before)
    delta = (sum(after) - sum(before)) / max(n, 1)
    interval = paired_rate_difference(before, after).interval
    if not delta or interval is None or interval[0] > 0 or interval[1] < 0:
        return None
    differ = sum(b != a for b, a in zip(before, after, strict=True)) / n
    return max(n + 1, math.ceil(Z95**2 * (differ - delta**2) / delta**2))


def ratio(over: Sequence[float], under: Sequence[float], seed: int = 0) -> Result:
    """sum(over) / sum(under) of paired values, with the percentile bootstrap over the pairs (10,000 draws, seeded).

    None if the sum below is 0; no interval for fewer than two pairs, or if a draw in forty has nothing below.
    """
    import warnings

    import numpy as np
    from scipy.stats import bootstrap

    top, bottom = np.asarray(over, dtype=float), np.asarray(under, dtype=float)
    if len(top) == 0 or not bottom.sum():
        return Result(None, len(top), None)
    value = float(top.sum() / bottom.sum())
    if len(top) < 2:
        return Result(value, len(top), None, scale="rate")
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of draws with nothing below, which are left out here
        drawn = bootstrap(
            (top, bottom), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, n_resamples=RESAMPLES, batch=500,
            method="percentile", rng=np.random.default_rng(seed),
        ).bootstrap_distribution  # fmt: skip
    defined = drawn[np.isfinite(drawn)]
    if len(defined) < 0.975 * RESAMPLES:
        return Result(value, len(top), None, scale="rate")
    low, high = np.percentile(defined, [2.5, 97.5])
    return Result(value, len(top), (float(low), float(high)), scale="rate")
