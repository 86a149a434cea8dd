"""A lane: one engine, the prompts that wait for it, and the stream between them."""

from __future__ import annotations

import heapq
from typing import Iterator

from cai_experiment.engines.base import Completion, Engine, Prompt
from cai_experiment.errors import EngineError


class Lane:
    """One engine with its queue. The engine pulls prompts through `_feed`; None means "nothing right now"."""

    def __init__(self, engine: Engine) -> None:
        self.queue: list[tuple[int, int, Prompt]] = []
        self.in_flight = 0
        self._count = 0
        self._stream = engine.stream(self._feed())

    @property
    def busy(self) -> bool:
        """True if the engine owes a completion, or will once it is asked."""
        return bool(self.queue) or self.in_flight > 0

    def put(self, rank: int, prompt: Prompt) -> None:
        """Queue a prompt; the lowest rank goes first, so that examples which were begun are finished."""
        self._count += 1
        heapq.heappush(self.queue, (rank, self._count, prompt))

    def _feed(self) -> Iterator[Prompt | None]:
        while True:
            if self.queue:
                self.in_flight += 1
                yield heapq.heappop(self.queue)[2]
            else:
                yield None

    def next(self) -> Completion:
        """The engine's next completion, whichever it is."""
        completion = next(self._stream, None)
        if completion is None:
            raise EngineError("the engine ended its stream while prompts were waiting", "the same command resumes")
        self.in_flight -= 1
        return completion

    def close(self) -> None:
        """Let the engine drop what it is at."""
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()
