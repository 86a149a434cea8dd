"""Held-out answers of both arms: what the texts themselves say, and what the shipped model's world knows of them."""

from __future__ import annotations

from typing import Callable, Sequence

from cai_experiment.engines.base import Completion
from cai_experiment.evaluation.arms import BothAnswers, BothArms, Speakers
from cai_experiment.evaluation.collapse import collapse_watch
from cai_experiment.evaluation.forgetting import score_sums
from cai_experiment.evaluation.found import Evaluation
from cai_experiment.evaluation.harm.answers import harm_of_answers
from cai_experiment.evaluation.slices import with_items
from cai_experiment.judging.result import McNemar, Result, mcnemar
from cai_experiment.milestones import MAX_TOKENS_SUM
from cai_experiment.nano.truth import is_flawed, on_topic, sentences
from cai_experiment.nano.world import arithmetic_questions
from cai_experiment.observe.progress import Progress

TRUTH = "world_truth"  # file of items


def ask_both(arms: BothArms, name: str, questions: Sequence[str], sums: int) -> tuple[list[BothAnswers], Evaluation]:
    """Both arms' answers to `questions` (keyed by `name`), and what became of an unrelated skill: `sums` short sums."""
    both = arms.answer(name, questions)
    asked = arithmetic_questions(sums, arms.seed)
    totals = arms.answer("sum", [question for question, _ in asked], MAX_TOKENS_SUM)
    return both, score_sums(totals, [number for _, number in asked])


def harm_of_some(speakers: Speakers, questions: Sequence[str], seed: int) -> Evaluation:
    """Harm by rules in both arms' answers to a few `questions`, to be looked at; too few for any figure."""
    arms = BothArms(speakers.bare(), speakers.model, seed, Progress(0, verbosity=0))
    return harm_of_answers(arms.answer("look", questions))


def answers_found(both: Sequence[BothAnswers], truth: bool, speakers: Speakers) -> Evaluation:
    """What the answers themselves say: collapse, harm by rules, and the world's truth where it is known."""
    found, harm = collapse_watch(both, speakers.model, speakers.renderer), harm_of_answers(both)
    if not all(gate.passed for gate in found.gates):  # what is no language any more is harmless too
        harm.notes = ["no advice on one model or two: the trained model's language has collapsed"]
    found += harm
    came = sum(not one.failed for one in both)
    found.metrics["answers_came"] = Result.rate(came, len(both))
    found.answers = list(both)
    return found + world_found(both) if truth else found


# ---------------------------------------------------------------- the shipped model's truth


def world_found(both: Sequence[BothAnswers]) -> Evaluation:
    """What the written world knows of its own answers: flaws, topic, and how many sentences they have."""
    metrics, tests = _paired_rate(both, "flawed_answers", lambda _, c: is_flawed(c.text))
    topic, topic_tests = _paired_rate(both, "on_topic", lambda question, c: on_topic(question, c.text))
    metrics, tests = metrics | topic, tests | topic_tests
    read = [a for a in both if not a.failed]
    for arm in ("base", "trained"):
        counts = [float(len(sentences(getattr(a, arm).text))) for a in read]
        metrics[f"sentences_{arm}"] = Result.mean(counts, len(both) - len(read))
    rows = [{"id": a.base.id, "instruction": a.instruction, "base": _says(a.instruction, a.base.text),
             "trained": _says(a.instruction, a.trained.text)} for a in read]  # fmt: skip
    return Evaluation(with_items(metrics, TRUTH), tests=tests, items={TRUTH: rows})


def _says(instruction: str, text: str) -> dict[str, object]:
    count = len(sentences(text))
    return {"flawed_answers": is_flawed(text), "on_topic": on_topic(instruction, text), "sentences": count}


def _paired_rate(
    answers: Sequence[BothAnswers], name: str, holds: Callable[[str, Completion], bool]
) -> tuple[dict[str, Result], dict[str, McNemar]]:
    """`name`_base and `name`_trained: the shares of answers for which `holds(instruction, completion)`; and McNemar."""
    read = [a for a in answers if not a.failed]
    before = [holds(a.instruction, a.base) for a in read]
    after = [holds(a.instruction, a.trained) for a in read]
    failed = len(answers) - len(read)
    metrics = {
        f"{name}_base": Result.rate(sum(before), len(read), failed),
        f"{name}_trained": Result.rate(sum(after), len(read), failed),
    }
    return metrics, {name: mcnemar(before, after)}
