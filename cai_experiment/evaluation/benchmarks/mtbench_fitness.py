"""Is a judge fit to grade? It is asked for grades of answers whose order is known.

A judge that gives everything the same grade, or grades at random, would pass both gates of "kept or better": no
difference that it finds says anything. So each of known_answers.jsonl's better and worse answers is graded on its own,
by the prompt that MT-Bench's answers are graded by, and the better one must have the higher grade.
"""

from __future__ import annotations

from collections.abc import Sequence

from cai_experiment.engines.base import Completion
from cai_experiment.evaluation.benchmarks.mtbench_grades import Grade, TextJudge, grade_firsts
from cai_experiment.evaluation.benchmarks.mtbench_rows import JudgePrompts, Question
from cai_experiment.evaluation.found import Evaluation
from cai_experiment.evaluation.gates import Gate
from cai_experiment.evaluation.mtbench import Answered
from cai_experiment.judging.fitness import KNOWN_ANSWERS
from cai_experiment.judging.result import Result
from cai_experiment.records.files import read_jsonl

METRIC = "mt_bench_known_answers"
RIGHT = 0.8  # of the pairs whose two grades differ
CHANCE = 0.5  # the interval must lie above it, and so must the share of the pairs that have two grades that differ


def fitness(prompts: JudgePrompts, judge: TextJudge, part: str, verbosity: int = 1) -> Evaluation:
    """How often the better answer has the higher grade, a gate on it, and an alarm if the judge is not fit."""
    graded = grade_firsts(known(), prompts, judge, verbosity)
    right = agreement(graded)
    fit = is_fit(right, len(graded))
    value = right.value if fit or (right.value or 0.0) < RIGHT else None
    gate = Gate("MT-Bench: the judge grades better answers higher", value, ">=", RIGHT, right.interval, right.n, part)
    found = Evaluation({METRIC: right}, [gate])
    if not fit:
        found.alarms = [f"MT-Bench: the judge {judge.name} is not fit to grade: {said(right, graded)}"]
    return found


def known() -> list[Answered]:
    """The known answers as MT-Bench's: the worse one is the base's, the better one the trained model's."""
    rows = read_jsonl(KNOWN_ANSWERS, repair=False)
    return [
        Answered(Question(f"known/{n}", "known", (row["question"],) * 2), (_said(row["worse"]),) * 2,
                 (_said(row["better"]),) * 2)
        for n, row in enumerate(rows)
    ]  # fmt: skip


def _said(text: str) -> Completion:
    return Completion("", text, "stop")


def agreement(graded: Sequence[tuple[Grade, Grade]]) -> Result:
    """The share of pairs in which the better answer has the higher grade, of those whose grades differ; `unparsed`
    counts pairs with a grade that could not be read.
    """
    both = [(worse.value, better.value) for worse, better in graded if None not in (worse.value, better.value)]
    higher = sum(better > worse for worse, better in both)  # type: ignore[operator]
    lower = sum(better < worse for worse, better in both)  # type: ignore[operator]
    return Result.rate(higher, higher + lower, len(graded) - len(both))


def is_fit(right: Result, asked: int) -> bool:
    """True if `agreement` over `asked` pairs is RIGHT or more, surely above chance, and of more than half of them."""
    if right.value is None or right.interval is None:
        return False
    return right.value >= RIGHT and right.interval[0] > CHANCE and right.n > CHANCE * asked


def said(right: Result, graded: Sequence[tuple[Grade, Grade]]) -> str:
    """In one line what it made of the known answers."""
    alike = len(graded) - right.n - right.unparsed
    higher = round((right.value or 0.0) * right.n)
    return (
        f"of {len(graded)} better answers it graded {higher} higher than the worse one, {right.n - higher} lower, "
        f"{alike} alike, and {right.unparsed} could not be read (fit from {RIGHT:.0%} on, of more than half)"
    )
