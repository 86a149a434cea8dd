"""Every figure with its sample size, its 95% interval and the judgements that could not be read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Hashable, Literal, Sequence

Interval = tuple[float, float]
Scale = Literal["", "rate", "points", "change"]  # a share from 0 to 1; a difference of shares; of other figures

RESAMPLES = 10_000
WIDE = 0.2  # an interval wider than this says little: a rate needs about 100 items to be narrower


@dataclass(frozen=True, slots=True)
class Result:
    """One metric. `value` is None if nothing could be measured (n = 0); `interval` is at 95%, None if it has none.

    `n` counts what was measured; `unparsed` counts judgements that came back unreadable and stand outside `n`. `items`
    names the file, in the run's folder, that holds every item behind the figure; empty if there is none. `scale` says
    how people should read the figure (a "rate" in percent, "points" and "change" with their sign) and is no part of it.
    """

    value: float | None
    n: int
    interval: Interval | None
    unparsed: int = 0
    items: str = ""
    scale: Scale = field(default="", compare=False)

    @classmethod
    def rate(cls, successes: int, n: int, unparsed: int = 0) -> Result:
        """A share of n items, with its Wilson interval."""
        if n == 0:
            return cls(None, 0, None, unparsed)
        return cls(successes / n, n, wilson(successes, n), unparsed, scale="rate")

    @classmethod
    def mean(cls, values: Sequence[float], unparsed: int = 0, seed: int = 0) -> Result:
        """A mean over items, with its bootstrap interval."""
        if not values:
            return cls(None, 0, None, unparsed)
        return cls(sum(values) / len(values), len(values), bootstrap_mean(values, seed), unparsed)

    def to_json(self) -> dict[str, Any]:
        """The metric as report.json holds it."""
        interval = None if self.interval is None else list(self.interval)
        known = {name: value for name, value in (("items", self.items), ("scale", self.scale)) if value}
        return {"value": self.value, "n": self.n, "interval": interval, "unparsed": self.unparsed, **known}


@dataclass(frozen=True, slots=True)
class McNemar:
    """The two discordant counts of a paired comparison, and the exact two-sided p-value."""

    only_before: int
    only_after: int
    p_value: float


def wilson(successes: int, n: int) -> Interval:
    """Wilson's score interval at 95% for `successes` of `n` (E. B. Wilson 1927). Raises ValueError if n < 1."""
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> McNemar:
    """McNemar's exact test on the same items before and after: a binomial test of the discordant pairs.

    Raises ValueError if the two lists differ in length.
    """
    from scipy.stats import binomtest

    pairs = list(zip(before, after, strict=True))
    only_before = sum(b and not a for b, a in pairs)
    only_after = sum(a and not b for b, a in pairs)
    discordant = only_before + only_after
    p_value = float(binomtest(only_before, discordant, 0.5).pvalue) if discordant else 1.0
    return McNemar(only_before, only_after, p_value)


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Interval | None:
    """The percentile bootstrap interval (95%, 10,000 resamples) of a mean; None for fewer than two values.

    Percentile, not BCa: for means of 100 to 400 items it covered the truth as often or more (tests/test_statistics.py).
    """
    import numpy as np
    from scipy.stats import bootstrap

    if len(values) < 2:
        return None
    data = np.asarray(values, dtype=float)
    if (data == data[0]).all():  # every resample has the same mean
        return float(data[0]), float(data[0])
    interval = bootstrap(
        (data,), np.mean, n_resamples=RESAMPLES, batch=1000, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(interval.low), float(interval.high)


def paired_bootstrap(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Result:
    """The mean of after - before over the same items, with its bootstrap interval (Efron 1979), seeded.

    For scores; `paired_difference` takes rates as well. Raises ValueError if the two lists differ in length.
    """
    return replace(Result.mean([a - b for b, a in zip(before, after, strict=True)], seed=seed), scale="change")


def paired_difference(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Result:
    """The mean of after - before over the same items: `paired_rate_difference` if all values are 0 or 1 (True and
    False), else `paired_bootstrap`. Raises ValueError if the two lists differ in length.
    """
    if {*before, *after} <= {0, 1}:
        return paired_rate_difference([bool(b) for b in before], [bool(a) for a in after])
    return paired_bootstrap(before, after, seed)


def paired_rate_difference(before: Sequence[bool], after: Sequence[bool], unparsed: int = 0) -> Result:
    """The rate after minus the rate before over the same items, with the adjusted Wald interval of Bonett and Price
    (2012): one is added to each discordant count.

    Where few items change, a bootstrap sees too little: at a true difference of a quarter point it missed it in four
    of ten experiments of 400 items, and without any change its interval is a point. Raises ValueError if the two lists
    differ in length.
    """
    from scipy.stats import norm

    pairs = list(zip(before, after, strict=True))
    n = len(pairs)
    if n == 0:
        return Result(None, 0, None, unparsed)
    lost, won = sum(b and not a for b, a in pairs), sum(a and not b for b, a in pairs)
    up, down = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half = float(norm.ppf(0.975)) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    interval = (max(-1.0, up - down - half), min(1.0, up - down + half))
    return Result((won - lost) / n, n, interval, unparsed, scale="points")


def paired_p_value(before: Sequence[float], after: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> float:
    """The two-sided p-value of a mean difference over the same items: Fisher's permutation test, which swaps before and
    after item by item (exact for few items, else over `resamples` seeded draws). It is the test to `paired_bootstrap`,
    as `mcnemar` is to `paired_rate_difference`; `holm` takes both. 1.0 if nothing differs.

    Raises ValueError if the two lists differ in length.
    """
    import numpy as np
    from scipy.stats import permutation_test

    difference = np.array([a - b for b, a in zip(before, after, strict=True)], dtype=float)
    if len(difference) < 2 or not difference.any():
        return 1.0
    result = permutation_test(
        (difference, np.zeros_like(difference)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples", vectorized=True, n_resamples=resamples, batch=1000, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979) for several comparisons: adjusted p-values in the given order."""
    if not p_values:
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(list(p_values), method="holm")[1]]


def kappa(first: Sequence[Hashable], second: Sequence[Hashable], unparsed: int = 0) -> Result:
    """Cohen's kappa (1960) of two raters over the same items, with its asymptotic interval (Fleiss et al. 1969).

    That formula has no width where agreement is perfect, which would claim certainty: there the interval is Wilson's of
    the observed agreement, carried through kappa with the agreement by chance as it is. The value is None if agreement
    by chance is already complete (both raters used one and the same label). Raises ValueError if the two lists differ
    in length.
    """
    import numpy as np
    from statsmodels.stats.inter_rater import cohens_kappa

    pairs = list(zip(first, second, strict=True))
    labels = sorted({label for pair in pairs for label in pair}, key=str)
    if len(labels) < 2:
        return Result(None, len(pairs), None, unparsed)
    table = np.zeros((len(labels), len(labels)))
    for one, other in pairs:
        table[labels.index(one), labels.index(other)] += 1
    with np.errstate(divide="ignore", invalid="ignore"):  # its z value, which is not used here
        result = cohens_kappa(table)
    value, low, high = float(result.kappa), float(result.kappa_low), float(result.kappa_upp)
    if not high - low > 1e-6:
        shares = table / len(pairs)
        chance = float(shares.sum(axis=0) @ shares.sum(axis=1))
        low, high = ((p - chance) / (1 - chance) for p in wilson(round(table.trace()), len(pairs)))
    return Result(value, len(pairs), (max(-1.0, low), min(1.0, high)), unparsed)
