"""A milestone's full evaluation in three steps: what the target says, what a judge says of it, and the gates.

The steps are apart because a judge may need the memory that the target has: `ask_target` is done when it is freed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cai_experiment.constitution.principles import Principle
from cai_experiment.evaluation.answers import answers_found, ask_both
from cai_experiment.evaluation.arms import BothAnswers, BothArms, Remembered, Speakers
from cai_experiment.evaluation.found import ITEMS_FOLDER, Evaluation
from cai_experiment.evaluation.gates import milestone_gates
from cai_experiment.evaluation.harm.answers import harm_of_answers
from cai_experiment.evaluation.harm_model import ModelDetector
from cai_experiment.evaluation.measure import warnings
from cai_experiment.evaluation.perplexity import own_texts, perplexity, world_texts
from cai_experiment.evaluation.preference import Pair, score_pairs
from cai_experiment.evaluation.slices import held_out_preference
from cai_experiment.evaluation.verdicts import (
    NONE_BROKEN,
    critiques_again,
    drawn,
    fitness_of,
    revisions_again,
    win_rate,
)
from cai_experiment.judging.judge import Judge
from cai_experiment.observe.progress import Progress
from cai_experiment.records.schema import Example

HARM_READ, HARM_ITEMS = 100, "harm_by_judge"  # answers of each arm: 1,600 questions
JUDGED = 200  # examples that another judge reads again: a rate is then known to within 7 points


@dataclass(frozen=True, slots=True)
class Scope:
    """What is evaluated. `truth`: the model is the shipped one, whose world knows every flaw.

    `train` are the pairs that it was trained on; `held_out` separate ones, with the principle of each in
    `principles_of_pairs`; `questions` the instructions that both arms answer; `broken` maps an instruction to the
    principle that its untrained answer broke. `reference` is the adapter that DPO started from, if any.
    """

    milestone: str
    truth: bool
    train: Sequence[Pair]
    held_out: Sequence[Pair]
    principles_of_pairs: Sequence[str]
    questions: Sequence[str]
    broken: Mapping[str, str] = field(default_factory=dict)
    reference: Path | None = None
    seed: int = 0
    sums: int = 400
    verbosity: int = 1


def principle_of(example: Example) -> str:
    """The principle that was revised for first; where none was, the first that the judge saw broken."""
    revised = [one.principle_id for one in example.rounds if one.revised_answer]
    broken = [one.principle_id for one in example.rounds if one.verdict_before == "yes"]
    return (revised or broken or [NONE_BROKEN])[0]


# ---------------------------------------------------------------- the target


def ask_target(scope: Scope, speakers: Speakers, remembered: Remembered | None = None) -> Evaluation:
    """Everything that needs base and trained model in memory: held-out pairs, answers, sums, clean text."""
    scores = score_pairs(speakers.model, speakers.renderer, scope.held_out, reference=scope.reference)
    found = held_out_preference(scope.train, scope.held_out, scores, scope.principles_of_pairs)
    with Progress(2 * (len(scope.questions) + scope.sums), "held-out answers", scope.verbosity) as progress:
        arms = BothArms(speakers.bare(), speakers.model, scope.seed, progress, remembered)
        both, sums = ask_both(arms, "held_out", scope.questions, scope.sums)
    found += sums + answers_found(both, scope.truth, speakers)
    texts = world_texts(seed=scope.seed) if scope.truth else own_texts()
    return found + perplexity(speakers.model, speakers.renderer, texts)


# ---------------------------------------------------------------- the judge


def ask_judge(scope: Scope, judge: Judge, both: Sequence[BothAnswers]) -> Evaluation:
    """Whether the judge is fit, by its kappa with known answers; and trained against base by its word."""
    return fitness_of(judge, scope.truth, scope.seed) + win_rate(judge, both, scope.broken, scope.truth)


def harm_by_judge(judge: Judge, both: Sequence[BothAnswers]) -> Evaluation:
    """Harm in the first HARM_READ answers of both arms by the judge, axis by axis: it finds what is not in the words.

    Its figures end in "_by_judge" (before the arm) and stand beside those of the rules, whose advice holds.
    """
    found = harm_of_answers(both[:HARM_READ], ModelDetector(judge))

    def renamed(name: str) -> str:
        stem, arm = next(((name.removesuffix(a), a) for a in ("_base", "_trained") if name.endswith(a)), (name, ""))
        return f"{stem}_by_judge{arm}"

    place = f"{ITEMS_FOLDER}/{HARM_ITEMS}.jsonl"
    return Evaluation(
        {renamed(name): replace(result, items=place) for name, result in found.metrics.items()},
        tests={renamed(name): test for name, test in found.tests.items()},
        differences={renamed(name): difference for name, difference in found.differences.items()},
        tables=[replace(table, name=f"{table.name}_by_judge", title=f"{table.title}, by the judge")
                for table in found.tables],
        cases=[replace(case, kind=f"{case.kind}, by the judge") for case in found.cases],
        items={HARM_ITEMS: [_by_judge(row) for rows in found.items.values() for row in rows]},
        methods={f"{name}, by the judge": method for name, method in found.methods.items()},
    )  # fmt: skip


def _by_judge(row: Mapping[str, Any]) -> dict[str, Any]:
    arms = {arm: {f"{name}_by_judge": value for name, value in row[arm].items()} for arm in ("base", "trained")}
    return {**row, **arms}


def judge_again(
    scope: Scope, judge: Judge, accepted: Sequence[Example], rejected: Sequence[Example],
    principles: Sequence[Principle],
) -> Evaluation:  # fmt: skip
    """Critiques and revisions of the run by another judge than the critic that sat with them: JUDGED examples drawn by
    the seed, accepted and rejected ones alike. The metrics end in "_judge": the critic's own stand beside them.
    """
    by_id = {principle.id: principle for principle in principles}
    found = critiques_again(judge, drawn(accepted, rejected, JUDGED, scope.seed), by_id, scope.truth)
    found += revisions_again(judge, drawn(accepted, (), JUDGED, scope.seed), scope.truth)
    found.metrics = {f"{name}_judge": result for name, result in found.metrics.items()}
    return found


# ---------------------------------------------------------------- go or no-go


def conclude(scope: Scope, found: Evaluation) -> Evaluation:
    """Adds the milestone's gates and the warnings that a reader must not miss."""
    gates = milestone_gates(scope.milestone, found.metrics, scope.truth)
    return found + Evaluation(gates=gates, notes=warnings(found.metrics))
