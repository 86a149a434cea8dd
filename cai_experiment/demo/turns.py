"""A lock that serves its users in the order in which they came, so that no session waits twice for another one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_mine: ContextVar[tuple[object, ...]] = ContextVar("the turns that this context has", default=())


class Turns:
    """`with turns.turn():` waits until all who asked before are done. Within a turn, another one begins at once.

    A turn belongs to its context, not to its thread: a web server runs the steps of one generator in any thread.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()  # the first has the turn

    @property
    def wanted(self) -> bool:
        """True if somebody waits for the turn that another one has."""
        return len(self._queue) > 1

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the turn, and end it with the block."""
        with self._changed:
            nested = bool(self._queue) and self._queue[0] in _mine.get()
            ticket = object()
            if not nested:
                self._wait(ticket)
        if nested:
            yield
            return
        _mine.set((*_mine.get(), ticket))
        try:
            yield
        finally:
            _mine.set(tuple(one for one in _mine.get() if one is not ticket))
            with self._changed:
                self._queue.popleft()
                self._changed.notify_all()

    def _wait(self, ticket: object) -> None:
        self._queue.append(ticket)
        try:
            self._changed.wait_for(lambda: self._queue[0] is ticket)
        except BaseException:
            self._queue.remove(ticket)
            self._changed.notify_all()
            raise
