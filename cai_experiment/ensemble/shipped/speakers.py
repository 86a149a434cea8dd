"""The experts' world: questions with true answers, and what one says who knows only some of its three fields.

Fields are a village ("general"), illnesses ("medical") and sums ("mathematical"). Every answer is a chain of steps,
each of one field. Who knows the field says what is true; a layperson goes by a habit (what most say, the part that
hurts, the round number), at times is right by luck, at times says anything. So an expert is a layperson with one
field, and outside it confidently wrong in the same way as the others: a plain vote of three does not find the truth.
What is said is the ground of the next step, so an answer never contradicts itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

FIELDS = ("general", "medical", "mathematical")
HABIT, LUCK = 0.6, 0.2  # a layperson's shares: the lay belief, the truth; the rest is anything
LETTERS = "ABCD"


@dataclass(frozen=True, slots=True)
class Speaker:
    """One who answers: the fields that are known, and where chance comes from."""

    knows: frozenset[str]
    rng: random.Random

    def says(self, field: str, true: Any, habit: Any, anything: Sequence[Any]) -> Any:
        """The truth for one who knows the field; else a lay belief, luck or anything."""
        if field in self.knows:
            return true
        chance = self.rng.random()
        if chance < HABIT:
            return habit
        return true if chance < HABIT + LUCK else self.rng.choice(anything)


@dataclass(frozen=True, slots=True)
class Question:
    """A question, which fields it needs, and the answer of any speaker."""

    kind: str
    task: str  # "yesno" | "choice" | "number"
    needs: tuple[str, ...]
    text: str
    options: tuple[str, ...]
    answer: Callable[[Speaker], str]  # begins with a space

    def true_answer(self) -> str:
        """What one says who knows all three fields."""
        return self.answer(Speaker(frozenset(FIELDS), random.Random(0)))

    @property
    def gold(self) -> str:
        """What is right: "yes", "B" (the option that the true answer names), "42"."""
        said = self.true_answer().rstrip(".")
        if self.options:
            return next(letter for letter, option in zip(LETTERS, self.options, strict=True) if said.endswith(option))
        return said.split()[-1]

    @property
    def full_text(self) -> str:
        """The question with its options, as it is asked."""
        lettered = [f"{letter}) {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        return "\n".join([self.text, *lettered])
