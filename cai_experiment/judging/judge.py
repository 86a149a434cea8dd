"""A judge that weighs two lettered options, in both orders; orders that disagree are "undecided", never a coin flip.

A verdict is two prompts, one for each order of the options, answered by the log-probabilities of "A" and "B" as the
next token. Their log-odds for "yes" are averaged, so that a liking for one letter cancels. A server that gives no
log-probabilities is asked for one letter per order instead (letters.py).

    judge = Judge(engine, "qwen2.5-32b")
    verdicts = judge.verdicts(preferred_prompts(id, question, one, other) for ...)
    print(judge.method, tally(verdicts))
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Iterable, Literal, Sequence

from cai_experiment.constitution.principles import Principle
from cai_experiment.constitution.prompts import Turn, ask_meaningful, ask_preferred, ask_violated
from cai_experiment.engines.base import Completion, Engine, Prompt, Sampling
from cai_experiment.judging.letters import ask_letters, read_letter

LETTERS = ("A", "B")
YES_FIRST, NO_FIRST = "yes_first", "no_first"
ANSWERS = ("yes", "no", "undecided", "unparsed")
BY_LOG_PROBABILITY = "log-probabilities of A and B as the next token, both orders, averaged"
BY_LETTER = "one letter per order at temperature 0"

PromptPair = tuple[Prompt, Prompt]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What both orders say together. `logit` is the averaged log P(yes) - log P(no) in nats; 0.0 if unparsed, and
    always where the judge gives letters only. `why` says of an unparsed one what came instead.
    """

    answer: Literal["yes", "no", "undecided", "unparsed"]
    logit: float
    why: str = field(default="", compare=False)


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
        return Verdict("unparsed", 0.0, _instead(first if one is None else second))
    return _both_orders(one, -other, (one - other) / 2)


def read_letters(first: Completion, second: Completion) -> Verdict:
    """The verdict of two replies in words; likewise. "unparsed" if either has failed or names no single letter."""
    one, other = (None if c.finish == "error" else read_letter(c.text) for c in (first, second))
    if one is None or other is None:
        return Verdict("unparsed", 0.0, _instead(first if one is None else second))
    return _both_orders(1.0 if one == "A" else -1.0, 1.0 if other == "B" else -1.0, 0.0)


def _both_orders(yes_first: float, yes_second: float, logit: float) -> Verdict:
    """Above 0 an order says yes, below 0 no."""
    if yes_first > 0 and yes_second > 0:
        return Verdict("yes", logit)
    if yes_first < 0 and yes_second < 0:
        return Verdict("no", logit)
    return Verdict("undecided", logit)


def _instead(completion: Completion) -> str:
    """What came instead of an answer, in one short line."""
    said = " ".join(completion.text.split())[:80]
    return completion.error or (f"no single letter in {said!r}" if said else "neither A nor B among the likeliest")


def log_odds(completion: Completion) -> float | None:
    """log P(A) - log P(B) in nats, or None if the completion does not hold both."""
    if completion.finish == "error" or len(completion.logprobs) != len(LETTERS):
        return None
    a, b = completion.logprobs
    return a - b if math.isfinite(a) and math.isfinite(b) else None


class Judge:
    """A model that gives verdicts: `engine` speaks for it, `name` is shown beside what it says.

    It answers by letters where its server gives no log-probabilities, or where neither letter is ever among the
    likeliest next tokens, as of a model that thinks first; `method`, read after the verdicts, says which it was.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        """`engine` may be any engine."""
        self.engine, self.name = engine, name
        self.speaks_first = False  # found when asked

    @property
    def weighs(self) -> bool:
        """True if its verdicts come from log-probabilities."""
        return bool(getattr(self.engine, "can_weigh", True)) and not self.speaks_first

    @property
    def method(self) -> str:
        """How its verdicts come about, for the report."""
        if self.weighs:
            return BY_LOG_PROBABILITY
        where = getattr(getattr(self.engine, "client", None), "url", self.name)
        reason = (
            "never has A or B among its likeliest next tokens" if self.speaks_first else "gives no log-probabilities"
        )
        return f"{BY_LETTER}: {where} {reason}"

    def verdicts(self, pairs: Iterable[PromptPair]) -> list[Verdict]:
        """Put every question in both orders; one verdict for each, in their order.

        An answer that never comes back counts as unparsed. Raises EngineError for what no question gets past, such as
        a refused key.
        """
        asked = list(pairs)
        prompts = [prompt for pair in asked for prompt in pair]
        if self.weighs:
            answers = {done.id: done for done in self.engine.stream(prompts)}
            came = [done for done in answers.values() if done.finish != "error"]
            self.speaks_first = bool(came) and not any(done.logprobs for done in came)
        if not self.weighs:
            answers = ask_letters(self.engine, prompts)
        read = read_verdict if self.weighs else read_letters
        return [read(*(answers.get(p.id, _missing(p.id)) for p in pair)) for pair in asked]


def judge(engine: Engine, questions: Iterable[PromptPair]) -> list[Verdict]:
    """The verdicts of a judge that needs no name; see `Judge.verdicts`."""
    return Judge(engine, engine.name).verdicts(questions)


def tally(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many verdicts are "yes", "no", "undecided" and "unparsed"; every one of the four is there."""
    counts: Counter[str] = Counter(verdict.answer for verdict in verdicts)
    return {answer: counts[answer] for answer in ANSWERS}


def _missing(id: str) -> Completion:
    return Completion(id, "", "error", error="no answer came back")
