"""Sets of questions from the experts' world, in splits that share none."""

from __future__ import annotations

import hashlib
import random
from typing import Any

from cai_experiment.ensemble.shipped.questions import KINDS
from cai_experiment.ensemble.shipped.speakers import Question

SPLITS = {"test": (0,), "validation": (1,), "train": (2, 3), "experts": (4, 5, 6, 7, 8, 9)}  # last digits of a hash
VAIN = 5000
SETS: dict[str, tuple[str, ...]] = {
    "general": ("yesno",),
    "medical": ("illness", "medicine"),
    "mathematical": ("word",),
    "two": ("dose", "age", "work"),
}


def is_of(question: Question, split: str) -> bool:
    """True if a question belongs to a split, by a hash of its text: no question is in two."""
    return _digest(question) % 10 in SPLITS[split]


def _digest(question: Question) -> int:
    return int.from_bytes(hashlib.blake2b(question.full_text.encode(), digest_size=8).digest(), "little")


def draw(kind: str, split: str, rng: random.Random) -> Question:
    """A question of a kind and a split."""
    while True:
        question = KINDS[kind](rng)
        if is_of(question, split):
            return question


def rows(name: str, split: str, count: int, seed: int = 42) -> list[dict[str, Any]]:
    """`count` different questions of a set, its kinds in turn, with true answers: fields as in ensemble/data.py's Row.

    Fewer where the world holds no more ("general": some 530 for training). Raises KeyError for an unknown set or split.
    """
    rng, kinds = random.Random(f"{name}/{split}/{seed}"), SETS[name]
    found: dict[str, dict[str, Any]] = {}
    vain = 0  # draws in a row that were there before
    while len(found) < count and vain < VAIN:
        question = draw(kinds[len(found) % len(kinds)], split, rng)
        vain = vain + 1 if question.full_text in found else 0
        found.setdefault(
            question.full_text,
            {
                "id": f"{name}-{split}-{_digest(question):016x}", "dataset": name, "task": question.task,
                "question": question.full_text, "answer": question.true_answer(), "gold": question.gold,
                "options": list(question.options), "needs": list(question.needs), "kind": question.kind,
            },
        )  # fmt: skip
    return list(found.values())
