"""Rates over items that come in groups (the answers of several models to one instruction), and their differences.

Items of one instruction are alike, so intervals and tests take the instruction as the unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cai_experiment.judging.result import RESAMPLES, Result, mcnemar, paired_rate_difference

Items = Sequence[tuple[str, bool]]  # (group, does it hold)


class Difference(NamedTuple):
    """second - first over the same groups, with the p-value of no difference; `paired`: the very same items."""

    result: Result
    p_value: float
    paired: bool


def rate(items: Items, unparsed: int = 0) -> Result:
    """The share of items that hold, with Wilson's interval at the effective sample size: n over the design effect of
    the groups (Rao and Scott 1992; the ratio estimator's variance by linearisation), never more than n. `n` counts
    items. Where all or none hold the groups tell nothing, and each of them counts once.
    """
    from statsmodels.stats.proportion import proportion_confint

    n = len(items)
    if n == 0:
        return Result(None, 0, None, unparsed)
    sums = _sums(items)
    share = sum(x for x, _ in sums.values()) / n
    if len(sums) == n:
        return Result.rate(round(share * n), n, unparsed)
    groups = len(sums)
    if share in (0.0, 1.0) or groups == 1:
        size = float(groups)
    else:
        variance = groups / (groups - 1) * sum((x - share * m) ** 2 for x, m in sums.values()) / n**2
        size = min(float(n), share * (1 - share) / variance) if variance else float(n)
    low, high = proportion_confint(share * size, size, alpha=0.05, method="wilson")
    return Result(share, n, (float(low), float(high)), unparsed, scale="rate")


def _sums(items: Items) -> dict[str, tuple[int, int]]:
    """group -> (how many hold, how many items)."""
    found: dict[str, tuple[int, int]] = {}
    for group, holds in items:
        x, m = found.get(group, (0, 0))
        found[group] = x + holds, m + 1
    return found


def difference(first: Items, second: Items, seed: int = 0) -> Difference | None:
    """Of two models over the same groups; None if either has no item.

    Where both have one item in each of the same groups: Bonett and Price's interval and McNemar's test. Elsewhere the
    shares have denominators of their own: a percentile bootstrap over groups, and a permutation test that swaps the
    models within groups (10,000 draws each, seeded). `n` counts the groups.
    """
    if not first or not second:
        return None
    one, two = _sums(first), _sums(second)
    if one.keys() == two.keys() and len(one) == len(first) and len(two) == len(second):
        before, after = [bool(one[g][0]) for g in one], [bool(two[g][0]) for g in one]
        return Difference(paired_rate_difference(before, after), mcnemar(before, after).p_value, True)
    return _resampled(one, two, seed)


def _resampled(one: Mapping[str, tuple[int, int]], two: Mapping[str, tuple[int, int]], seed: int) -> Difference:
    import numpy as np

    rng = np.random.default_rng(seed)
    groups = sorted({*one, *two})
    table = np.array([[*one.get(group, (0, 0)), *two.get(group, (0, 0))] for group in groups], dtype=float)
    observed = float(_shares(table.sum(axis=0)))
    drawn = rng.multinomial(len(groups), [1 / len(groups)] * len(groups), size=RESAMPLES) @ table
    spread = _shares(drawn)
    low, high = np.nanpercentile(spread, [2.5, 97.5])
    swap = rng.integers(0, 2, size=(RESAMPLES, len(groups)))
    swapped = (1 - swap) @ table + swap @ table[:, [2, 3, 0, 1]]
    beyond = np.abs(_shares(swapped)) >= abs(observed) - 1e-12
    p_value = (1 + int(np.nansum(beyond))) / (1 + RESAMPLES)
    interval = (float(low), float(high)) if high > low else _of_rates(one, two)
    result = Result(observed, len(groups), interval, scale="points")
    return Difference(result, p_value, False)


def _of_rates(one: Mapping[str, tuple[int, int]], two: Mapping[str, tuple[int, int]]) -> tuple[float, float]:
    """Where every resample is the same (all or none hold), the bootstrap has no width: Newcombe's interval (1998,
    method 10) from the two rates' own, which takes them for independent.
    """
    rates = [rate([(g, place < x) for g, (x, m) in sums.items() for place in range(m)]) for sums in (one, two)]
    (v1, (l1, u1)), (v2, (l2, u2)) = ((r.value or 0.0, r.interval or (0.0, 1.0)) for r in rates)
    return v2 - v1 - math.hypot(v2 - l2, u1 - v1), v2 - v1 + math.hypot(u2 - v2, v1 - l1)


def _shares(sums: Any) -> Any:
    """second share - first share of (..., 4) sums; nan where one has no items."""
    import numpy as np

    array = np.asarray(sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        return array[..., 2] / array[..., 3] - array[..., 0] / array[..., 1]
