"""What an evaluation's journal holds: answers by arm and question, and what they took."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cai_experiment.errors import BadInputError
from cai_experiment.records.files import show

if TYPE_CHECKING:
    from cai_experiment.ensemble.arms import Arm
    from cai_experiment.ensemble.layout import Row
    from cai_experiment.records.store import Journal


@dataclass(slots=True)
class Cost:
    """What an arm's answers took, over all sessions. `passes`: forward passes, as if every answer were alone.

    `answers`: whose cost it is. Those of one line of the journal were decoded together, so where the questions hold a
    part of a line the others of that line count too.
    """

    tokens: int = 0
    seconds: float = 0.0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    answers: int = 0

    def add(self, counts: Mapping[str, Any], answers: int) -> None:
        """Add a chunk's counts, as the journal has them, and how many answers it has."""
        self.answers += answers
        for name in ("tokens", "seconds", "passes", "drafted", "accepted"):
            setattr(self, name, getattr(self, name) + counts[name])

    def to_json(self) -> dict[str, Any]:
        """The counts with tokens per second, passes per token and the share of drafted tokens that were accepted."""
        return {
            **asdict(self),
            "seconds": round(self.seconds, 3),
            "tokens_per_second": self.tokens / self.seconds if self.seconds else None,
            "passes_per_token": self.passes / self.tokens if self.tokens else None,
            "acceptance": self.accepted / self.drafted if self.drafted else None,
        }


def short_hash(value: Any) -> str:
    """sha256 of a value as JSON, 16 digits of it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def question_key(row: Row) -> str:
    """What the journal, and the random numbers, know a question by: its dataset, id and words."""
    return f"{row.dataset}/{row.id}/{short_hash(row.prompt)}"


class Known:
    """What the journal holds: answers by arm and question, and what they took."""

    def __init__(self, journal: Journal) -> None:
        """Reads it all. Raises BadInputError for the journal of another kind of run."""
        self.answers: dict[str, dict[str, Any]] = {}
        self._counts: dict[str, list[tuple[frozenset[str], Mapping[str, Any]]]] = {}
        for line in journal.rows():
            if not {"arm", "answers"} <= line.keys():
                message = f"{show(journal.path)} is of another kind of run"
                raise BadInputError(message, "give another --output_dir, or --fresh, which moves that one aside")
            self.take(line)

    def count(self, wanted: Sequence[Arm], rows: Sequence[Row]) -> int:
        """How many of the wanted answers are there."""
        keys = [question_key(row) for row in rows]
        return sum(key in self.of(arm) for arm in wanted for key in keys)

    def of(self, arm: Arm) -> dict[str, Any]:
        """An arm's answers by question."""
        return self.answers.get(arm.key, {})

    def cost(self, arm: Arm, keys: Sequence[str]) -> Cost:
        """What an arm's answers to these questions took."""
        cost, wanted = Cost(), frozenset(keys)
        for answered, counts in self._counts.get(arm.key, ()):
            if answered & wanted:
                cost.add(counts, len(answered))
        return cost

    def take(self, line: Mapping[str, Any]) -> None:
        """Add one line of the journal."""
        self.answers.setdefault(line["arm"], {}).update(line["answers"])
        if "counts" in line:
            self._counts.setdefault(line["arm"], []).append((frozenset(line["answers"]), line["counts"]))
