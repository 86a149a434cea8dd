"""Is a critic kinder to its own answers than to others'? From the matrix generator x critic.

S(j, i) is how often critic j sees a flaw in generator i's answers, over the same instructions. That j sees fewer flaws
in its own answers than in others' proves nothing: they may be better. So the same answers are held against what the
other critics see in them (difference in differences):

    bias(j) = [ mean over k != j of S(k, j) - S(j, j) ]
              - mean over i != j of [ mean over k != i, j of S(k, i) - S(j, i) ]

the first bracket is how much kinder j is than the others to its own answers, the second how much kinder it is to
answers that are neither its own nor the other critic's. Above 0: it favours its own. With two models there is no such
third critic, and only the mean of both biases can be told: [S(2,1) - S(1,1) + S(1,2) - S(2,2)] / 2.

That models prefer their own text: A. Panickssery, S. Bowman and S. Feng 2024, "LLM Evaluators Recognize and Favor Their
Own Generations" (arXiv 2404.13076); L. Zheng et al. 2023, "Judging LLM-as-a-Judge" (arXiv 2306.05685), section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from cai_experiment.comparison.clustered import Difference, Items, difference
from cai_experiment.judging.result import Result, paired_p_value

Row = Mapping[str, Any]
Seen = Mapping[tuple[str, str], bool]  # (critic, generator) -> a flaw was seen, in the answers to one instruction


@dataclass(frozen=True, slots=True)
class Bias:
    """`who` favours its own by `result` (points); `p_value` by sign flips over instructions."""

    who: str
    result: Result
    p_value: float


def self_bias(rows: Sequence[Row], models: Sequence[str], seed: int = 0) -> list[Bias]:
    """Every critic's bias, or of two models their mean. Instructions where any critic's word on any answer is missing
    are left out (`unparsed`). The interval is a bootstrap over instructions. Nothing for one model.
    """
    if len(models) < 2:
        return []
    seen: dict[str, dict[tuple[str, str], bool]] = {}
    for row in rows:
        own = seen.setdefault(row["instruction_id"], {})
        if row["flaw_seen"] is not None:
            own[row["critic"], row["generator"]] = row["flaw_seen"]
    whole = [one for one in seen.values() if len(one) == len(models) ** 2]
    left_out = len(seen) - len(whole)
    if len(models) == 2:
        first, second = models
        values = {f"{first} and {second}, mean": [_of_two(one, first, second) for one in whole]}
    else:
        values = {who: [_of_many(one, who, models) for one in whole] for who in models}
    return [_bias(who, found, left_out, seed) for who, found in values.items()]


def _bias(who: str, values: Sequence[float], left_out: int, seed: int) -> Bias:
    result = replace(Result.mean(values, left_out, seed), scale="points")
    return Bias(who, result, paired_p_value([0.0] * len(values), values, seed))


def _of_two(seen: Seen, one: str, two: str) -> float:
    return (seen[two, one] - seen[one, one] + seen[one, two] - seen[two, two]) / 2


def _of_many(seen: Seen, who: str, models: Sequence[str]) -> float:
    others = [one for one in models if one != who]
    own = fmean(seen[k, who] for k in others) - seen[who, who]
    foreign = [fmean(seen[k, i] for k in others if k != i) - seen[who, i] for i in others]
    return own - fmean(foreign)


def missed_own(rows: Sequence[Row], critic: str, seed: int = 0) -> tuple[Items, Items, Difference | None]:
    """(flaws of its own answers that it misses, of others' answers, own - others) by the world's truth.

    Of answers that have a flaw. The interval takes instructions as the unit; own flaws may be harder to see than
    others', which `self_bias` allows for and this does not.
    """

    def missed(own: bool) -> Items:
        return [
            (row["instruction_id"], not row["flaw_seen"])
            for row in rows
            if row["critic"] == critic and (row["generator"] == critic) is own and row["flaw_seen"] is not None
            and row["truth"] and row["truth"]["flawed"]
        ]  # fmt: skip

    mine, others = missed(True), missed(False)
    return mine, others, difference(others, mine, seed)
