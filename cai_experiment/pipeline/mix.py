"""`--mix self:0.5,red_team.csv:0.3,helpful.jsonl:0.2`: where a run's instructions come from, and in what shares.

Red-team questions alone make a model evasive, so helpful ones go in beside them (Bai et al. 2022, arXiv 2212.08073,
train on both).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

from cai_experiment.errors import BadInputError
from cai_experiment.pipeline.instruct import SELF, Instruction


@dataclass(frozen=True, slots=True)
class Part:
    """One source and its share of the instructions drawn, 0 to 1; `rows` are a file's, none for "self"."""

    name: str
    share: float
    rows: tuple[Instruction, ...] = ()


def parse_mix(text: str) -> list[tuple[str, float]]:
    """(name, share) of each part of a --mix; BadInputError where it cannot be read or the shares do not sum to 1."""
    parts: list[tuple[str, float]] = []
    for piece in text.split(","):
        name, _, share = piece.strip().rpartition(":")
        try:
            parts.append((name, float(share)))
        except ValueError:
            name = ""
        if not name or not 0 < parts[-1][1] <= 1:
            raise BadInputError(f"--mix {text}: {piece.strip()!r} is not NAME:SHARE with a share above 0, up to 1",
                                f"write for example {SELF}:0.5,red_team.csv:0.3,helpful.jsonl:0.2")  # fmt: skip
    total = sum(share for _, share in parts)
    if abs(total - 1) > 1e-6:
        raise BadInputError(f"--mix {text}: the shares sum to {total:g}", "let them sum to 1")
    names = [name for name, _ in parts]
    if len(set(names)) < len(names):
        raise BadInputError(f"--mix {text}: a source stands there twice", "name each once")
    return parts


class Turns:
    """Whose turn it is at each draw: always the source that is furthest behind its share, so counts stay within one.

    A source that has run out leaves; the others share what is to come by their own shares.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._shares = {part.name: part.share for part in parts}
        self._counts = dict.fromkeys(self._shares, 0)

    def share(self, name: str) -> float:
        """The share of `name` in the draws to come."""
        return self._shares.get(name, 0.0) / sum(self._shares.values()) if self._shares else 0.0

    def next(self) -> str | None:
        """Whose turn it is (ties: the first named); None if every source has run out."""
        if not self._shares:
            return None
        drawn = sum(self._counts.values()) + 1
        return max(self._shares, key=lambda name: self.share(name) * drawn - self._counts[name])

    def took(self, name: str) -> None:
        """Count a draw from `name`."""
        self._counts[name] += 1

    def leave(self, name: str) -> None:
        """`name` has run out."""
        del self._shares[name]
        self._counts = dict.fromkeys(self._shares, 0)


def shuffled(part: Part, seed: int) -> list[Instruction]:
    """A file's rows in an order fixed by the seed and its name, so that a part of a file is a fair sample of it."""
    rows = list(part.rows)
    random.Random(f"mix/{seed}/{Path(part.name).name}").shuffle(rows)
    return rows
