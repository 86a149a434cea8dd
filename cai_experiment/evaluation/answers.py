"""What held-out answers of the base model and the trained one say: text, sums, the world's truth."""

from __future__ import annotations

from itertools import pairwise
from typing import Callable, Sequence

from cai_experiment.engines.base import Completion
from cai_experiment.evaluation.arms import BothAnswers
from cai_experiment.judging.result import McNemar, Result, mcnemar, paired_bootstrap
from cai_experiment.nano.truth import arithmetic_right, is_flawed, on_topic, sentences

MAX_TOKENS_SUM = 64  # "27 plus 28 is 55." and room to ramble

Metrics = dict[str, Result]
Tests = dict[str, McNemar]


# ---------------------------------------------------------------- what any model's answers say


def text_metrics(answers: Sequence[BothAnswers]) -> tuple[Metrics, Tests]:
    """Signs of collapse, before and after: answers that end by themselves, distinct word pairs, sentences, words."""
    read = [a for a in answers if not a.failed]
    metrics, tests = paired_rate(answers, "ends_by_itself", lambda _, c: c.finish == "stop")
    for arm in ("base", "trained"):
        texts = [getattr(a, arm).text for a in read]
        metrics[f"distinct_2_{arm}"] = Result(distinct_2(texts), len(texts), None, len(answers) - len(read))
        metrics[f"sentences_{arm}"] = Result.mean([float(len(sentences(text))) for text in texts])
        metrics[f"words_{arm}"] = Result.mean([float(len(text.split())) for text in texts])
    before, after = ([float(len(getattr(a, arm).text.split())) for a in read] for arm in ("base", "trained"))
    metrics["words_change"] = paired_bootstrap(before, after)
    return metrics, tests


def distinct_2(texts: Sequence[str]) -> float | None:
    """Distinct word pairs over all word pairs of `texts` (Li et al. 2016): falls when a model repeats itself.

    None where there is no word pair. It depends on the amount of text: compare equal numbers of like answers.
    """
    pairs: list[tuple[str, str]] = []
    for text in texts:
        words = text.lower().split()
        pairs += pairwise(words)
    return len(set(pairs)) / len(pairs) if pairs else None


def paired_rate(
    answers: Sequence[BothAnswers], name: str, holds: Callable[[str, Completion], bool]
) -> tuple[Metrics, Tests]:
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


# ---------------------------------------------------------------- the shipped model's truth


def truth_metrics(answers: Sequence[BothAnswers]) -> tuple[Metrics, Tests]:
    """What the written world knows of its own answers: how many have a flaw, how many are on topic."""
    flawed, flawed_tests = paired_rate(answers, "flawed_answers", lambda _, c: is_flawed(c.text))
    topic, topic_tests = paired_rate(answers, "on_topic", lambda question, c: on_topic(question, c.text))
    return flawed | topic, flawed_tests | topic_tests


def arithmetic_metrics(answers: Sequence[BothAnswers], numbers: Sequence[str]) -> tuple[Metrics, Tests]:
    """A skill that training never touched: short sums, right if the last number of the answer is `numbers`' own."""
    right = dict(zip((a.instruction for a in answers), numbers, strict=True))
    return paired_rate(answers, "arithmetic", lambda question, c: arithmetic_right(c.text, right[question]))
