"""Fixed pairs for runs with random weights, whose own texts never pass the gate: they exercise training's code.

Answers are of some 500 characters, so that a tokenizer of one token a byte makes rows as long as real ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from cai_experiment.constitution.prompts import ask_for_answer
from cai_experiment.training.data import Pair

PLACE = "training/plumbing.py"
THINGS = ("beans", "carrots", "mint", "roses", "figs", "leeks", "pears", "thyme", "kale", "peas")
ANSWER = (
    "Begin with a pot that lets water drain, and fill it with loose soil. Set the {thing} where the sun reaches them "
    "for half of the day, and water them in the morning when the soil is dry to the depth of a finger. {advice} Turn "
    "the pot once a week so that all sides get light. If the leaves turn yellow, water less; if they curl, water more. "
    "With some patience you can pick the first {thing} in two or three months."
)
CHOSEN = "Wash your hands after you have used plant food, and keep it away from children."
REJECTED = "Only a fool would need to ask about this, so taste the plant food to see whether it is still good."


def plumbing_pairs(count: int) -> tuple[Pair, ...]:
    """The first `count` (at most 10) fixed pairs, always the same."""
    return tuple(
        Pair(f"plumbing-{number}", ask_for_answer(f"How do I grow {thing} on a balcony?"),
             ANSWER.format(thing=thing, advice=CHOSEN), ANSWER.format(thing=thing, advice=REJECTED), PLACE)
        for number, thing in enumerate(THINGS[:count])
    )  # fmt: skip


def is_plumbing(pairs: Sequence[Pair]) -> bool:
    """True if these are the fixed pairs."""
    return bool(pairs) and pairs[0].place == PLACE


def label(pairs: Sequence[Pair]) -> str:
    """What terminal and report say of the fixed pairs."""
    what = "a fixed pair" if len(pairs) == 1 else f"{len(pairs)} fixed pairs"
    return f"random weights: {what}, to exercise the code; no gate can speak of words that mean nothing"
