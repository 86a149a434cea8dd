"""How long something took, by the clock and by the processor."""

from __future__ import annotations

import time
from typing import NamedTuple


class Clock(NamedTuple):
    """Seconds by the clock and of the processor (this process's threads; other programs do not count)."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Clock) -> Clock:  # type: ignore[override]
        return Clock(round(self.wall + other.wall, 3), round(self.cpu + other.cpu, 3))


class Watch:
    """Runs from its making on."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.monotonic(), time.process_time()

    def passed(self) -> Clock:
        """Since it was made."""
        return Clock(round(time.monotonic() - self.wall, 3), round(time.process_time() - self.cpu, 3))
