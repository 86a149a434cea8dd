"""A judge that weighs two lettered options, in both orders; orders that disagree are "undecided", never a coin flip.

A verdict is two prompts, one for each order of the options, answered by the log-probabilities of "A" and "B" as the
next token. Their log-odds for "yes" are averaged, so that a liking for one letter cancels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Iterable, Literal, Sequence

from cai_experiment.constitution.principles import Principle
from cai_experiment.constitution.prompts import Turn, ask_meaningful, ask_preferred, ask_violated
from cai_experiment.engines.base import Completion, Engine, Prompt, Sampling

LETTERS = ("A", "B")
YES_FIRST, NO_FIRST = "yes_first", "no_first"

PromptPair = tuple[Prompt, Prompt]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What both orders say together. `logit` is the averaged log P(yes) - log P(no) in nats; 0.0 if unparsed."""

    answer: Literal["yes", "no", "undecided", "unparsed"]
    logit: float


def verdict_prompts(id: str, turns: Sequence[Turn], principle: Principle) -> PromptPair:
    """Does the last answer of `turns` break the principle? Yes means that it does."""
    return (
        _prompt(id, (*turns, ask_violated(principle, yes_first=True)), yes_first=True),
        _prompt(id, (*turns, ask_violated(principle, yes_first=False)), yes_first=False),
    )


def meaningful_prompts(id: str, turns: Sequence[Turn]) -> PromptPair:
    """Does the critique that ends `turns` quote words that really break the principle? Yes means that it does."""
    return (
        _prompt(id, (*turns, ask_meaningful(yes_first=True)), yes_first=True),
        _prompt(id, (*turns, ask_meaningful(yes_first=False)), yes_first=False),
    )


def preferred_prompts(id: str, instruction: str, answer_1: str, answer_2: str) -> PromptPair:
    """Which answer is better? Yes means `answer_1`; it is answer A in the first prompt and answer B in the second."""
    return (
        _prompt(id, ask_preferred(instruction, answer_1, answer_2), yes_first=True),
        _prompt(id, ask_preferred(instruction, answer_2, answer_1), yes_first=False),
    )


def _prompt(id: str, turns: Sequence[Turn], yes_first: bool) -> Prompt:
    order = YES_FIRST if yes_first else NO_FIRST
    return Prompt(f"{id}/{order}", tuple(turns), "verdict", Sampling(temperature=0.0, max_tokens=1), options=LETTERS)


def read_verdict(first: Completion, second: Completion) -> Verdict:
    """The verdict of both orders; `first` answers the prompt whose letter A means yes.

    "unparsed" if either has failed or holds no finite log-probability for each letter.
    """
    one, other = log_odds(first), log_odds(second)
    if one is None or other is None:
        return Verdict("unparsed", 0.0)
    yes_first, yes_second = one, -other
    logit = (yes_first + yes_second) / 2
    if yes_first > 0 and yes_second > 0:
        return Verdict("yes", logit)
    if yes_first < 0 and yes_second < 0:
        return Verdict("no", logit)
    return Verdict("undecided", logit)


def log_odds(completion: Completion) -> float | None:
    """log P(A) - log P(B) in nats, or None if the completion does not hold both."""
    if completion.finish == "error" or len(completion.logprobs) != len(LETTERS):
        return None
    a, b = completion.logprobs
    return a - b if math.isfinite(a) and math.isfinite(b) else None


def judge(engine: Engine, questions: Iterable[PromptPair]) -> list[Verdict]:
    """Put every question to the engine in both orders; one verdict for each, in their order.

    An answer that never comes back counts as unparsed.
    """
    pairs = list(questions)
    answers = {completion.id: completion for completion in engine.stream([p for pair in pairs for p in pair])}
    return [read_verdict(*(answers.get(p.id, _missing(p.id)) for p in pair)) for pair in pairs]


def _missing(id: str) -> Completion:
    return Completion(id, "", "error", error="no answer came back")
