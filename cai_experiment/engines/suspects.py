"""Which prompt ends its process? One that was in work at two deaths runs alone; a third death is its fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

DEATHS_ALONE = 2  # a prompt in work at this many deaths runs alone from then on
DEATHS_IN_A_ROW = 6  # without an answer between: it is broken (three bad prompts and nothing else in work make 5)


class Suspects:
    """How often each prompt, by id, was in work when its process died."""

    def __init__(self) -> None:
        self._deaths: Counter[str] = Counter()

    def __contains__(self, id: str) -> bool:
        """True if this prompt must run alone."""
        return self._deaths.get(id, 0) >= DEATHS_ALONE

    def clear(self, id: str) -> None:
        """It was answered."""
        self._deaths.pop(id, None)

    def died(self, ids: Collection[str]) -> str:
        """Count a death with these prompts in work. Says why the only one is to blame, or "" if nobody is yet."""
        self._deaths.update(ids)
        if len(ids) != 1:
            return ""
        times = self._deaths[next(iter(ids))]
        return f"its process died {times} times on this prompt" if times > DEATHS_ALONE else ""
