"""The statistics against scipy and statsmodels, published examples, and simulated experiments whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from cai_experiment.judging import result
from cai_experiment.judging.result import (
    Interval,
    Result,
    bootstrap_mean,
    holm,
    kappa,
    mcnemar,
    paired_bootstrap,
    paired_difference,
    paired_p_value,
    paired_rate_difference,
    wilson,
)

EXPERIMENTS = 1000
Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


# ---------------------------------------------------------------- equal to the libraries, to published figures


def test_equal_to_scipy_and_statsmodels() -> None:
    from scipy.stats import bootstrap
    from statsmodels.stats.contingency_tables import mcnemar as reference
    from statsmodels.stats.inter_rater import cohens_kappa
    from statsmodels.stats.multitest import multipletests
    from statsmodels.stats.proportion import proportion_confint

    rng = np.random.default_rng(0)
    for n in (1, 7, 60, 400):
        for successes in {0, n // 3, n}:
            assert wilson(successes, n) == pytest.approx(proportion_confint(successes, n, method="wilson"), abs=1e-6)
        before, after = rng.random(n) < 0.6, rng.random(n) < 0.7
        table = [[sum(before & after), sum(before & ~after)], [sum(~before & after), sum(~before & ~after)]]
        assert mcnemar(before.tolist(), after.tolist()).p_value == pytest.approx(reference(table).pvalue, abs=1e-6)
        p_values = rng.random(n).tolist()
        assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1], abs=1e-6)
    scores = rng.normal(0.3, 1.0, 60)
    other = bootstrap(
        (scores,), np.mean, n_resamples=10_000, batch=1000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    assert bootstrap_mean(scores.tolist(), seed=3) == pytest.approx((other.low, other.high), abs=1e-6)
    table = np.array([[30, 4, 2], [5, 21, 3], [1, 6, 28]])  # two raters, three labels
    cells = [(one, other) for (one, other), count in np.ndenumerate(table) for _ in range(int(count))]
    ours, theirs = kappa([a for a, _ in cells], [b for _, b in cells]), cohens_kappa(table)
    assert ours.value == pytest.approx(theirs.kappa, abs=1e-6)
    assert ours.interval == pytest.approx((theirs.kappa_low, theirs.kappa_upp), abs=1e-6)


def pairs_of(both: int, only_before: int, only_after: int, neither: int) -> tuple[list[bool], list[bool]]:
    before = [True] * (both + only_before) + [False] * (only_after + neither)
    return before, [True] * both + [False] * only_before + [True] * only_after + [False] * neither


def test_bonett_and_prices_interval_of_a_paired_difference() -> None:
    """The example of R's statpsych, ci.prop.ps(.05, 12, 4, 26, 6): 0.2548067 to 0.6251933."""
    found = paired_rate_difference(*pairs_of(6, 4, 26, 12), unparsed=2)
    assert found.value == pytest.approx(22 / 48) and (found.n, found.unparsed) == (48, 2)
    assert found.interval == pytest.approx((0.2548067, 0.6251933), abs=1e-6)


def test_a_paired_difference_without_any_change_is_not_certain() -> None:
    unchanged = paired_rate_difference([True] * 400, [True] * 400)
    assert unchanged.value == 0.0 and unchanged.interval == pytest.approx((-0.006895, 0.006895), abs=1e-6)
    assert paired_rate_difference([], []).value is None
    assert paired_difference([1.0] * 400, [1.0] * 400) == unchanged
    assert paired_difference([1.0, 0.0, 2.0], [1.0, 1.0, 0.0]) == paired_bootstrap([1.0, 0.0, 2.0], [1.0, 1.0, 0.0])
    low, high = paired_rate_difference([False] * 3, [True] * 3).interval or (0.0, 0.0)
    assert low < 1.0 == high
    with pytest.raises(ValueError):
        paired_rate_difference([True], [True, False])


def test_permutation_test_of_darwins_maize() -> None:
    """Fisher, The Design of Experiments (1935), section 21: of 32,768 arrangements of Darwin's 15 pairs, 1,726 differ
    as much as what was observed: p = 0.0527. And exact by hand: of 2^3 signs of 1, 2, 3 two have a sum of 6."""
    differences = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]  # eighths of an inch
    assert paired_p_value([0.0] * 15, differences, resamples=2**15) == pytest.approx(1726 / 32768, abs=1e-6)
    assert paired_p_value([0.0] * 3, [1.0, 2.0, 3.0]) == pytest.approx(2 / 8)
    assert paired_p_value([1.0, 2.0], [1.0, 2.0]) == paired_p_value([], []) == paired_p_value([1.0], [2.0]) == 1.0
    many = np.random.default_rng(0).normal(0.1, 1.0, 300).tolist()
    assert paired_p_value([0.0] * 300, many, seed=5) == paired_p_value([0.0] * 300, many, seed=5)
    with pytest.raises(ValueError):
        paired_p_value([1.0], [1.0, 2.0])


def test_kappa_of_perfect_agreement_does_not_claim_certainty() -> None:
    """Wilson's interval for 10 of 10 begins at 0.7225; with agreement by chance of one half, kappa at 0.4449."""
    labels = ["yes", "no"] * 5
    swapped = ["no", "yes"] * 5
    assert kappa(labels, labels).interval == pytest.approx((2 * wilson(10, 10)[0] - 1, 1.0))
    assert kappa(labels, labels).interval == pytest.approx((0.4449, 1.0), abs=1e-4)
    assert kappa(labels, swapped).value == -1.0 and kappa(labels, swapped).interval == pytest.approx(
        (-1.0, -0.4449), abs=1e-4
    )
    widths = [np.diff(kappa(labels * k, labels * k).interval or (0, 0))[0] for k in (1, 4, 40)]
    assert widths == sorted(widths, reverse=True) and widths[-1] > 0
    nearly = kappa(labels * 10, [*labels * 9, *labels[:-1], "yes"])
    assert nearly.interval is not None and nearly.value is not None and nearly.interval[1] <= 1.0
    constant = kappa(labels, ["yes"] * 10)
    assert constant.value == 0.0 and constant.interval is not None and constant.interval[0] < 0 < constant.interval[1]


# ---------------------------------------------------------------- experiments without an effect


def share(hits: int) -> float:
    return hits / EXPERIMENTS


@pytest.mark.parametrize("n", [60, 200, 400])
@pytest.mark.parametrize("discordant", [0.02, 0.1, 0.4])
def test_mcnemar_without_an_effect_is_rarely_significant(n: int, discordant: float) -> None:
    rng = np.random.default_rng([n, round(100 * discordant)])
    hits, cache = 0, {}
    for changed in rng.binomial(n, discordant, EXPERIMENTS):
        up = int(rng.binomial(changed, 0.5))
        if (up, changed) not in cache:
            cache[up, changed] = mcnemar(*pairs_of(n - changed, int(changed) - up, up, 0)).p_value
        hits += cache[up, changed] < 0.05
    assert share(hits) <= 0.07


@pytest.mark.parametrize("resamples", [199, pytest.param(9_999, marks=pytest.mark.slow)])
@pytest.mark.parametrize("n", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_scores_without_an_effect_are_rarely_significant(n: int, resamples: int) -> None:
    """Grades of 1 to 10 by a judge, and answers' lengths, which are skewed: in every second experiment."""
    rng, hits = np.random.default_rng(n), 0
    for number in range(EXPERIMENTS):
        draw = grades if number % 2 else lengths
        before, after = draw(rng, n)
        swap = rng.random(n) < 0.5
        one, other = np.where(swap, after, before), np.where(swap, before, after)
        hits += paired_p_value(one.tolist(), other.tolist(), seed=number, resamples=resamples) < 0.05
    assert 0.03 <= share(hits) <= 0.07


def test_several_metrics_without_an_effect_rarely_give_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six metrics, by McNemar and Holm: an experiment errs if any is below 0.05. Without Holm it errs far more often.

    statsmodels collects garbage at every call, a fifth of a second in a process that holds much.
    """
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    rng, any_raw, any_adjusted = np.random.default_rng(0), 0, 0
    by_counts = {(up, n): mcnemar(*pairs_of(0, n - up, up, 0)).p_value for n in range(70) for up in range(n + 1)}
    for _ in range(EXPERIMENTS):
        changed = rng.binomial(200, 0.2, 6)
        p_values = [by_counts[int(rng.binomial(n, 0.5)), int(n)] for n in changed]
        any_raw += min(p_values) < 0.05
        any_adjusted += min(holm(p_values)) < 0.05
    assert share(any_adjusted) <= 0.07 < share(any_raw)


# ---------------------------------------------------------------- intervals and the truth


def grades(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Grades of 1 to 10 before and after, which share the question's difficulty; no effect."""
    level = rng.normal(6.5, 1.5, n)
    before, after = (np.clip(np.round(level + rng.normal(0, 1.2, n)), 1, 10) for _ in range(2))
    return before, after


def lengths(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Words of an answer before and after: skewed, no effect."""
    level = rng.normal(4, 0.4, n)
    before, after = (np.round(np.exp(level + rng.normal(0, 0.4, n))) for _ in range(2))
    return before, after


def covered(draw: Draw, truth: float, n: int, interval: Callable[[np.ndarray, np.ndarray], Interval]) -> float:
    """The share of experiments whose interval holds the truth."""
    rng, hits = np.random.default_rng(n), 0
    for _ in range(EXPERIMENTS):
        low, high = interval(*draw(rng, n))
        hits += low <= truth <= high
    return share(hits)


def by_bootstrap(before: np.ndarray, after: np.ndarray) -> Interval:
    interval = paired_bootstrap(before.tolist(), after.tolist()).interval
    assert interval is not None
    return interval


def by_rates(before: np.ndarray, after: np.ndarray) -> Interval:
    interval = paired_rate_difference(before.tolist(), after.tolist()).interval
    assert interval is not None
    return interval


def rates(up: float, down: float) -> Draw:
    """A rate that `up` of the items gain and `down` lose."""

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        chance, before = rng.random(n), rng.random(n) < 0.5
        before = np.where(chance < up, False, np.where(chance < up + down, True, before))
        after = np.where(chance < up, True, np.where(chance < up + down, False, before))
        return before, after

    return draw


@pytest.mark.parametrize("draw", [grades, lengths], ids=["grades", "lengths"])
@pytest.mark.parametrize(
    ("n", "resamples"),
    [(100, 999), *(pytest.param(n, 10_000, marks=pytest.mark.slow) for n in (100, 200, 400))],
)
def test_bootstrap_covers_the_difference_of_scores(
    draw: Draw, n: int, resamples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result, "RESAMPLES", resamples)
    assert 0.93 <= covered(draw, 0.0, n, by_bootstrap) <= 0.97


@pytest.mark.parametrize("changes", [(0.15, 0.05), (0.1, 0.1), (0.3, 0.1)], ids=str)
@pytest.mark.parametrize("n", [100, 200, 400])
def test_intervals_cover_the_difference_of_rates(n: int, changes: tuple[float, float]) -> None:
    assert 0.93 <= covered(rates(*changes), changes[0] - changes[1], n, by_rates) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("changes", [(0.15, 0.05), (0.1, 0.1), (0.3, 0.1)], ids=str)
@pytest.mark.parametrize("n", [100, 200, 400])
def test_bootstrap_covers_the_difference_of_rates(n: int, changes: tuple[float, float]) -> None:
    assert 0.93 <= covered(rates(*changes), changes[0] - changes[1], n, by_bootstrap) <= 0.97


def test_intervals_of_rare_changes_miss_rarely_where_a_bootstrap_misses_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """One item in 400 is lost, as in the arithmetic that training never touched: why rates have their own interval."""
    monkeypatch.setattr(result, "RESAMPLES", 200)
    assert covered(rates(0.0, 0.0025), -0.0025, 400, by_rates) >= 0.95
    assert covered(rates(0.0, 0.0025), -0.0025, 400, by_bootstrap) < 0.75


@pytest.mark.parametrize("n", [100, 200, 400])
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.8])
def test_wilson_covers_the_rate(n: int, rate: float) -> None:
    rng = np.random.default_rng([n, round(100 * rate)])
    by_count = {k: wilson(k, n) for k in range(n + 1)}
    hits = sum(by_count[k][0] <= rate <= by_count[k][1] for k in rng.binomial(n, rate, EXPERIMENTS))
    assert 0.93 <= share(hits) <= 0.97


def test_every_figure_has_n_and_an_interval() -> None:
    for figure in (
        Result.rate(3, 9), Result.mean([1.0, 2.0, 4.0]), paired_bootstrap([1.0, 2.0], [2.0, 4.0]),
        paired_rate_difference([True, False], [True, True]), kappa(["a", "b", "a"], ["a", "b", "b"]),
    ):  # fmt: skip
        assert figure.value is not None and figure.n > 0 and figure.interval is not None
        assert figure.interval[0] <= figure.value <= figure.interval[1] and math.isfinite(figure.value)
