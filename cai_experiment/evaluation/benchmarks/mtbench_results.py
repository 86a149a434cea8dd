"""MT-Bench's findings: grades of both arms, their difference by turn and category, and who wins side by side.

A grade counts only beside the other arm's grade of the same turn; what is missing is counted in `unparsed` and averaged
into nothing. The two turns of a question are not independent, so intervals come from resampling questions.

"Kept or better" means two gates: the mean grade falls by no more than MAY_FALL, and the interval of the difference is
not wholly below 0. One judge's scores of the same answers differ by up to 0.2 from run to run, at temperature 0
(FastChat, issues 2969 and 3018): a smaller fall says nothing. With fewer than MIN_GRADED of the turns graded, or a
handful in all, the gates have no value, so that they do not pass; nor have they where all answers got the same grade.
A third gate is on the judge (mtbench_fitness): one that is not fit grades nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cai_experiment.evaluation.benchmarks.mtbench_fitness import fitness
from cai_experiment.evaluation.benchmarks.mtbench_grades import Grade, Graded, TextJudge, judge_answers, ungraded
from cai_experiment.evaluation.benchmarks.mtbench_rows import JudgePrompts
from cai_experiment.evaluation.found import ITEMS_FOLDER, Case, Cell, Evaluation, Table
from cai_experiment.evaluation.gates import LEAST, Gate
from cai_experiment.evaluation.mtbench import Answered, Arm
from cai_experiment.judging.result import RESAMPLES, Result

NAME, PAIRWISE, PART = "mt_bench", "mt_bench_pairwise", "mtbench"
MAY_FALL = 0.2
MIN_GRADED = 0.8
CASES = 20  # of each kind, on the page; all of them are among the items
FALL = 2.0  # a turn that loses as many points is shown
COLUMNS = ("questions", "base", "trained", "change", "trained wins", "won, tied, lost, undecided, unread")
NOT_COMPARABLE = (
    "MT-Bench was graded by {judge}: its scores say how base and trained compare, and nothing beside published "
    "scores, which are GPT-4's (and GPT-4's own version matters); no place on a leaderboard follows from them"
)
NOTE = (
    "Mean grades from 1 to 10 over turns that were graded for both arms, with 95% intervals from 10,000 resamples of "
    "the questions. A win counts if both orders of the two answers name it; if they disagree it is undecided. "
    "13 of the 30 reference answers are reported to be wrong in one of their turns (FastChat, pull request 3158): both "
    "arms are graded by the same."
)


def grade(
    answered: Sequence[Answered], prompts: JudgePrompts, judge: TextJudge, seed: int = 0, gated: bool = True,
    verbosity: int = 1,
) -> Evaluation:  # fmt: skip
    """The second step, after `mtbench.generate`: have `judge` grade the answers, if it is fit, and say what it found.

    `gated`: the milestone asks that MT-Bench is kept.
    """
    fit = fitness(prompts, judge, PART, verbosity)
    fit.gates = fit.gates if gated else []
    if fit.alarms:
        found = evaluate(ungraded(answered, "not asked: the judge is not fit to grade"), judge.name, seed, gated)
        found.cases = []
        found.notes = [f"MT-Bench: the answers were not graded, since {judge.name} is not fit to; name another --judge"]
    else:
        found = evaluate(judge_answers(answered, prompts, judge, verbosity), judge.name, seed, gated)
    found += fit
    found.methods[NAME] = f"{judge.name}, at temperature 0, by judge prompts with sha256 {prompts.sha256[:12]}"
    return found


def evaluate(graded: Sequence[Graded], judge: str, seed: int = 0, gated: bool = True) -> Evaluation:
    """What the grades by the judge of this name say."""
    change = difference(graded, seed)
    found = Evaluation(methods={NAME: judge})
    found.metrics = {f"{NAME}_{arm}": _items(mean_grade(graded, arm, seed), NAME) for arm in ("base", "trained")}
    found.metrics[PAIRWISE] = _items(win_rate(graded), PAIRWISE)
    found.differences[NAME] = change
    found.gates = gates(change, all_alike(graded)) if gated else []
    found.tables = [_table(graded, seed)]
    found.items = {NAME: [_grade_row(g) for g in graded], PAIRWISE: [_pair_row(g) for g in graded]}
    found.cases = _cases(graded)
    found.notes = [NOT_COMPARABLE.format(judge=judge), *_missing(graded, change, judge)]
    if gated and change.n and found.gates[0].value is None:
        few = f"{change.n} of {len(graded)} turns were graded, and it takes {LEAST} and {MIN_GRADED:.0%} of them"
        why = "all answers got the same grade" if all_alike(graded) else few
        found.notes.append(f"MT-Bench: {why}, so its gates have no value")
    return found


def all_alike(graded: Iterable[Graded]) -> bool:
    """True if all answers of both arms that were graded have one and the same grade: such a judge tells nothing."""
    return len({grade.value for g in _both(graded) for _, grade in _arms(g)}) == 1


def gates(change: Result, alike: bool = False) -> list[Gate]:
    """MT-Bench kept or better; see the module. `alike`: see `all_alike`."""
    whole = change.n >= max(LEAST, MIN_GRADED * (change.n + change.unparsed)) and not alike
    value = change.value if whole else None
    upper = change.interval[1] if whole and change.interval is not None else None
    return [
        Gate("MT-Bench kept: change of the grade", value, ">=", -MAY_FALL, change.interval, change.n, PART),
        Gate("MT-Bench not clearly lower: upper end of the change", upper, ">=", 0.0, None, change.n, PART),
    ]


# ---------------------------------------------------------------- figures


def mean_grade(graded: Sequence[Graded], arm: str, seed: int = 0) -> Result:
    """The arm's mean grade over the turns that were graded for both."""
    return _mean([(g.answered.question.id, getattr(g, arm).value) for g in _both(graded)], len(graded), seed)


def difference(graded: Sequence[Graded], seed: int = 0) -> Result:
    """The mean of trained - base over the turns that were graded for both: the paired bootstrap, by question."""
    return _mean([(g.answered.question.id, g.change or 0.0) for g in _both(graded)], len(graded), seed)


def win_rate(graded: Sequence[Graded]) -> Result:
    """How often the trained model's answer wins, of the turns where both orders name the same winner."""
    counts = Counter(g.comparison.winner for g in graded)
    return Result.rate(counts["trained"], counts["trained"] + counts["base"], counts["unparsed"])


def _both(graded: Iterable[Graded]) -> list[Graded]:
    return [g for g in graded if g.change is not None]


def _mean(values: Sequence[tuple[str, float]], asked: int, seed: int) -> Result:
    """The mean of (question, value) with the percentile bootstrap over questions; `asked` values were wanted."""
    import numpy as np
    from scipy.stats import bootstrap

    if not values:
        return Result(None, 0, None, asked)
    questions = list(dict.fromkeys(question for question, _ in values))
    sums, counts = np.zeros(len(questions)), np.zeros(len(questions))
    for question, value in values:
        sums[questions.index(question)] += value
        counts[questions.index(question)] += 1
    mean = Result(float(sums.sum() / counts.sum()), len(values), None, asked - len(values))
    if len(questions) < 2:
        return mean
    if np.ptp(sums / counts) == 0:  # every resample has the same mean, which scipy warns of
        return replace(mean, interval=(mean.value, mean.value))  # type: ignore[arg-type]

    def statistic(some: Any, of: Any, axis: int = -1) -> Any:
        return some.sum(axis=axis) / of.sum(axis=axis)

    interval = bootstrap(
        (sums, counts), statistic, n_resamples=RESAMPLES, batch=1000, paired=True, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return replace(mean, interval=(float(interval.low), float(interval.high)))


def _items(result: Result, name: str) -> Result:
    return replace(result, items=f"{ITEMS_FOLDER}/{name}.jsonl")


# ---------------------------------------------------------------- table, items, cases, notes


def _table(graded: Sequence[Graded], seed: int) -> Table:
    groups = {"all": list(graded)}
    groups |= {f"turn {turn}": [g for g in graded if g.turn == turn] for turn in sorted({g.turn for g in graded})}
    categories = dict.fromkeys(g.answered.question.category for g in graded)
    groups |= {name: [g for g in graded if g.answered.question.category == name] for name in categories}
    rows = tuple(_table_row(name, some, seed) for name, some in groups.items())
    return Table("mtbench_by_category", "MT-Bench by turn and category", COLUMNS, rows, NOTE)


def _table_row(name: str, graded: Sequence[Graded], seed: int) -> tuple[Cell, ...]:
    counts = Counter(g.comparison.winner for g in graded)
    tally = ", ".join(str(counts[winner]) for winner in ("trained", "tie", "base", "undecided", "unparsed"))
    arms = (mean_grade(graded, "base", seed), mean_grade(graded, "trained", seed))
    return (name, *arms, difference(graded, seed), win_rate(graded), tally)


def _row(g: Graded, name: str) -> dict[str, Any]:
    question = g.answered.question
    return {
        "id": f"{name}/{question.id}/{g.turn}",
        "instruction": question.turns[g.turn - 1],
        "question_id": question.id,
        "turn": g.turn,
        "category": question.category,
    }


def _grade_row(g: Graded) -> dict[str, Any]:
    """A turn's grades; a pair with a grade missing counts for neither."""
    both = g.change is not None
    return _row(g, NAME) | {
        "base": g.base.value if both else None,
        "trained": g.trained.value if both else None,
        "grade_base": g.base.value,
        "grade_trained": g.trained.value,
        "base_text": g.answered.base[g.turn - 1].text,
        "trained_text": g.answered.trained[g.turn - 1].text,
        "judgement_base": g.base.text,
        "judgement_trained": g.trained.text,
    }


def _pair_row(g: Graded) -> dict[str, Any]:
    """A turn's comparison: true if the trained model wins, false if the base does, null for anything else."""
    won = {"trained": True, "base": False}.get(g.comparison.winner)
    first, second = g.comparison.texts
    said = {"judgement_base_first": first, "judgement_trained_first": second}
    return _row(g, PAIRWISE) | {"trained": won, "verdict": g.comparison.winner, **said}


def _cases(graded: Sequence[Graded]) -> list[Case]:
    falls = sorted((g for g in _both(graded) if (g.change or 0.0) <= -FALL), key=lambda g: g.change or 0.0)
    kinds = {
        "MT-Bench: largest falls": falls,
        "MT-Bench: no grade": [g for g in graded if g.change is None],
        "MT-Bench: undecided": [g for g in graded if g.comparison.winner == "undecided"],
    }
    return [_case(kind, g) for kind, some in kinds.items() for g in some[:CASES]]


def _case(kind: str, g: Graded) -> Case:
    question = g.answered.question
    texts: Mapping[str, str] = {
        "Question": question.turns[g.turn - 1],
        "Base": g.answered.base[g.turn - 1].text,
        "Trained": g.answered.trained[g.turn - 1].text,
    }
    if kind.endswith("undecided"):
        judged = {"Judge, base first": g.comparison.texts[0], "Judge, trained first": g.comparison.texts[1]}
    else:
        judged = {"Judge of the base": g.base.text, "Judge of the trained": g.trained.text}
    change = "" if g.change is None else f", {g.change:+g}"
    return Case(kind, f"question {question.id}, turn {g.turn}, {question.category}{change}", {**texts, **judged})


def _missing(graded: Sequence[Graded], change: Result, judge: str) -> list[str]:
    """What could not be graded, and what follows from that."""
    if not change.unparsed:
        return []
    grades = [(grade, g.answered.texts(arm, g.turn)) for g in graded for arm, grade in _arms(g)]
    unanswered = sum(texts is None for _, texts in grades)
    silent = [grade.text for grade, texts in grades if texts is not None and not grade.spoken]
    unread = sum(grade.value is None for grade, _ in grades) - unanswered - len(silent)
    said = (
        f"MT-Bench: of {len(grades)} grades {unread} could not be read, {len(silent)} never came, and {unanswered} had "
        "no answer to grade" + (f" ({silent[0]})" if silent else "")
    )
    if change.value is None:
        step = "name another with --judge (a server's URL or a model)"
        return [f"{said}: {judge} graded nothing, so MT-Bench is not measured; {step}"]
    return [f"{said}; the {change.unparsed} turns they belong to are left out of both arms"]


def _arms(g: Graded) -> tuple[tuple[Arm, Grade], tuple[Arm, Grade]]:
    return ("base", g.base), ("trained", g.trained)
