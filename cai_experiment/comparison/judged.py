"""An independent judge on the cells: is the principle broken before and after, is the critique meaningful?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cai_experiment.comparison.measures import critique_is_right, is_repaired
from cai_experiment.constitution.principles import Principle
from cai_experiment.constitution.prompts import Turn, ask_for_answer, ask_for_critique, ask_for_revision
from cai_experiment.evaluation.reporting.words import result_text
from cai_experiment.judging.fitness import Fitness, judge_fitness, known_answers, world_comparisons
from cai_experiment.judging.judge import Judge, PromptPair, meaningful_prompts, verdict_prompts
from cai_experiment.judging.result import kappa

Row = dict[str, Any]
KNOWN = 100  # comparisons of the world


def fitness_of(judge: Judge, world: bool, seed: int) -> Fitness:
    """The judge's agreement with comparisons whose answer is known."""
    return judge_fitness(judge, world_comparisons(KNOWN, seed) if world else known_answers())


def judge_rows(judge: Judge, rows: Sequence[Row], principles: Mapping[str, Principle]) -> None:
    """Write the judge's word into every row that has a whole critique (`row["judge"]`)."""
    asked: list[tuple[Row, str, PromptPair]] = []
    for row in rows:
        if row["critique"] and row["fault_in"] != "critique":
            row["judge"] = {"broken_before": None, "meaningful": None, "broken_after": None}
            asked += [(row, name, pair) for name, pair in _questions(row, principles[row["principle"]]).items()]
    verdicts = judge.verdicts([pair for _, _, pair in asked])
    for (row, name, _), verdict in zip(asked, verdicts, strict=True):
        row["judge"][name] = verdict.answer


def _questions(row: Row, principle: Principle) -> dict[str, PromptPair]:
    """The pipeline's own questions, in the conversation as it stood."""
    id = f"judge/{row['id']}"
    turns: tuple[Turn, ...] = (*ask_for_answer(row["instruction"]), Turn("answer", row["answer"]))
    asked = {"broken_before": verdict_prompts(f"{id}/before", turns, principle)}
    if row["abstained"]:
        return asked
    turns += (ask_for_critique(principle), Turn("critique", row["critique"]))
    asked["meaningful"] = meaningful_prompts(f"{id}/meaningful", turns)
    if row["revision"] and row["fault_in"] != "revision":
        turns += (ask_for_revision(principle), Turn("revision", row["revision"]))
        asked["broken_after"] = verdict_prompts(f"{id}/after", turns, principle)
    return asked


def agreement(rows: Sequence[Row]) -> list[str]:
    """How far the judge agrees with the written world's truth, where both have a word: Cohen's kappa, a line each."""
    lines = []
    for what, of in (("which critiques are right", critique_is_right), ("which revisions repair", is_repaired)):
        both = [(of(row, "truth"), of(row, "judge")) for row in rows]
        pairs = [(true, said) for true, said in both if true is not None and said is not None]
        if pairs:
            found = kappa([true for true, _ in pairs], [said for _, said in pairs])
            figure = "cannot be told" if found.value is None else result_text(found.to_json())
            lines.append(f"the judge and the truth on {what}: kappa {figure}; the tables go by the truth")
    return lines
