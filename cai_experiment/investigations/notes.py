"""What a model records while it investigates: kept by the parent, so that notes outlive a block's process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

KINDS = ("observation", "conclusion", "question", "revision")
MOST_NOTES, MOST_CHARACTERS = 200, 2000


class Notebook:
    """The notes of one session, in the order of writing."""

    def __init__(self) -> None:
        self.stage = ""  # the task at work
        self._notes: list[dict[str, Any]] = []

    def add(self, text: str, kind: str = "observation") -> dict[str, Any]:
        """Record one note and give it back. Raises ValueError for a kind, length or number that is not allowed."""
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is unknown: use one of {', '.join(KINDS)}")
        if not isinstance(text, str) or not text.strip():
            raise ValueError("a note is a text that is not empty")
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"a note has at most {MOST_CHARACTERS} characters, and this one has {len(text)}")
        if len(self._notes) >= MOST_NOTES:
            raise ValueError(f"there are {MOST_NOTES} notes already, and no more are kept")
        note = {"id": len(self._notes) + 1, "kind": kind, "text": text.strip(), "task": self.stage}
        self._notes.append(note)
        return dict(note)

    def take_back(self, notes: Iterable[dict[str, Any]]) -> None:
        """Add the notes of a turn that was done before the run was stopped."""
        self._notes.extend(notes)

    def after(self, count: int) -> list[dict[str, Any]]:
        """The notes but the first `count`."""
        return [dict(note) for note in self._notes[count:]]

    def all(self) -> list[dict[str, Any]]:
        """All notes."""
        return self.after(0)

    def by_kind(self) -> dict[str, int]:
        """How many there are of each kind."""
        counts = Counter(note["kind"] for note in self._notes)
        return {kind: counts[kind] for kind in KINDS}

    def __len__(self) -> int:
        return len(self._notes)
