"""Is a critic kinder to its own answers than to others'? From the matrix generator x critic.

That a critic sees fewer flaws in its own answers than in others' proves nothing: they may be better. So every answer
is held against what the other critics see in it. For critic j and an answer of generator i,

    d(j, i) = [mean over the critics k other than j and i: does k see a flaw?] - [does j see one?]

and the figure is mean d(j, j) less the mean over i != j of mean d(j, i): how much kinder j is than the others to its
own answers, beyond how much kinder it is to answers that are neither its own nor the other critics'. Of two models
there is no such third critic, and only the mean of both can be told: half of mean d(1, 1) + mean d(2, 2).

By the truth (`missed_more`) the means are over answers that have a flaw: a better generator and a keener critic then
add 0. Without the truth (`kinder`) they are over all answers, and add something: a critic that sees more, and whose
answers have fewer flaws, comes out as kinder to its own without sparing it. So that figure is no proof of a bias.
Neither tells favour from blindness: a critic may miss just the kinds of flaws that it makes.

That models prefer their own text: A. Panickssery, S. Bowman and S. Feng 2024, "LLM Evaluators Recognize and Favor Their
Own Generations" (arXiv 2404.13076); L. Zheng et al. 2023, "Judging LLM-as-a-Judge" (arXiv 2306.05685), section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from cai_experiment.comparison.clustered import LEAST_GROUPS, Items, Sums, contrast, sums_of
from cai_experiment.judging.result import Result, holm

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Bias:
    """`who` is kinder to its own by `result` (points; its n counts instructions, `unparsed` answers that a critic's
    word is missing for); the test flips signs over instructions, `p_holm` is adjusted over the critics.
    """

    who: str
    result: Result
    p_value: float
    p_holm: float
    why: str = ""  # there is no interval


@dataclass(frozen=True, slots=True)
class _Answer:
    """One answer, and which critics see a flaw in it."""

    instruction: str
    generator: str
    seen: Mapping[str, bool]
    flawed: bool | None  # by the truth, where it is known


def kinder(rows: Sequence[Row], models: Sequence[str], seed: int = 0) -> list[Bias]:
    """Over all answers: each critic's figure, or of two models their mean. Nothing for one model."""
    answers, left_out = _answers(rows, models)
    return _biases(answers, left_out, models, seed)


def missed_more(rows: Sequence[Row], models: Sequence[str], seed: int = 0) -> list[Bias]:
    """Over the answers that have a flaw by the truth: how much more of its own a critic misses."""
    answers, left_out = _answers([row for row in rows if row["truth"] and row["truth"]["flawed"]], models)
    return _biases(answers, left_out, models, seed)


def _answers(rows: Sequence[Row], models: Sequence[str]) -> tuple[list[_Answer], int]:
    """(answers on which every critic's word is there, how many others)."""
    seen: dict[tuple[str, str], dict[str, bool]] = {}
    flawed: dict[tuple[str, str], bool | None] = {}
    for row in rows:
        place = row["instruction_id"], row["generator"]
        words = seen.setdefault(place, {})
        flawed[place] = row["truth"]["flawed"] if row["truth"] else None
        if row["flaw_seen"] is not None:
            words[row["critic"]] = row["flaw_seen"]
    whole = [_Answer(*place, words, flawed[place]) for place, words in seen.items() if len(words) == len(models)]
    return whole, len(seen) - len(whole)


def _biases(answers: Sequence[_Answer], left_out: int, models: Sequence[str], seed: int) -> list[Bias]:
    if len(models) < 2:
        return []
    if len(models) == 2:
        first, second = models
        parts = {f"{first} and {second}, mean": [(0.5, _less(answers, one, one, models)) for one in models]}
    else:
        parts = {
            who: [(1.0 if one == who else -1.0 / (len(models) - 1), _less(answers, who, one, models)) for one in models]
            for who in models
        }
    found = [(who, *_contrasted(some, left_out, seed)) for who, some in parts.items()]
    p_values = [p_value for _, _, p_value in found]
    adjusted = holm(p_values) if len(p_values) > 1 else p_values
    return [
        Bias(who, result, p, p_holm, _why(result, parts[who]))
        for (who, result, p), p_holm in zip(found, adjusted, strict=True)
    ]


def _why(result: Result, parts: Sequence[tuple[float, Sums]]) -> str:
    """Why there is no interval; "" if there is one."""
    if result.interval is not None:
        return ""
    least = min(len(sums) for _, sums in parts)
    if least < LEAST_GROUPS:
        return f"a model has {least} such answers, too few to say"
    return f"no variation among {result.n} instructions"


def _less(answers: Sequence[_Answer], critic: str, generator: str, models: Sequence[str]) -> Sums:
    """d(critic, generator) of every answer, as sums by instruction."""
    others = [one for one in models if one not in (critic, generator)]
    return sums_of([
        (one.instruction, fmean(one.seen[k] for k in others) - one.seen[critic])
        for one in answers if one.generator == generator
    ])  # fmt: skip


def _contrasted(parts: Sequence[tuple[float, Sums]], left_out: int, seed: int) -> tuple[Result, float]:
    instructions = len({group for _, sums in parts for group in sums})
    if not all(sums for _, sums in parts):
        return Result(None, instructions, None, left_out, scale="points"), 1.0
    value, interval, p_value = contrast(parts, seed)
    return Result(value, instructions, interval, left_out, scale="points"), p_value


def missed(rows: Sequence[Row], critic: str) -> tuple[Items, Items]:
    """(flaws of its own answers that a critic misses, of others' answers) by the truth, of answers that have one."""

    def of(own: bool) -> Items:
        return [
            (row["instruction_id"], not row["flaw_seen"])
            for row in rows
            if row["critic"] == critic and (row["generator"] == critic) is own and row["flaw_seen"] is not None
            and row["truth"] and row["truth"]["flawed"]
        ]  # fmt: skip

    return of(True), of(False)
