"""What runs in one Ray actor: an engine in a thread of its own, which calls feed and empty. Imports no ray.

The engine never waits for the driver: it takes its next prompts from an inbox that is kept filled, and calls come and
go in other threads. Work belongs to a session (one stream of the driver); a newer session drops the older one's.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import getpid

from cai_experiment.engines.base import Completion, Engine, Prompt
from cai_experiment.errors import EngineError

BEAT_SECONDS = 5.0  # how often an actor whose engine loads again (vLLM does, after a death) says that it lives


@dataclass(frozen=True, slots=True)
class Loaded:
    """What an actor says once its engine is there. `facts` is the engine's `describe()`."""

    first_line: str
    facts: dict[str, object]
    host: str
    pid: int


class Speaker:
    """The actor. Its methods may be called in several threads at once; `loaded` and `take` wait."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        """`make` loads the engine, in the thread that will run it (torch's threads are set per thread)."""
        self._changed = threading.Condition()
        self._session = 0
        self._inbox: deque[Prompt] = deque()
        self._outbox: list[Completion] = []
        self._in_work = 0
        self._engine: Engine | None = None
        self._failure: Exception | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, args=(make,), daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ what the driver calls

    def loaded(self) -> Loaded:
        """Wait until the engine is loaded; raises what its loading raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._engine or self._failure)
            if self._engine is None:
                raise self._failure or EngineError("the engine is closed")
            return Loaded(self._engine.first_line, self._engine.describe(), socket.gethostname(), getpid())

    def put(self, session: int, prompts: list[Prompt]) -> None:
        """Queue prompts of `session`."""
        with self._changed:
            if self._enter(session):
                self._inbox.extend(prompts)
                self._changed.notify_all()

    def take(self, session: int) -> list[Completion]:
        """Wait for completions of `session`, at least one. None of them: it is over, or the engine is loading again.

        Raises what the engine raised.
        """
        with self._changed:
            self._enter(session)
            while not self._changed.wait_for(
                lambda: self._outbox or self._failure or session != self._session, BEAT_SECONDS
            ):
                if getattr(self._engine, "loading", False):
                    return []
            if session != self._session:
                return []
            if not self._outbox and self._failure is not None:
                raise self._failure
            done, self._outbox = self._outbox, []
            return done

    def close(self) -> None:
        """Drop all work and close the engine; returns when its memory is back."""
        with self._changed:
            self._closing = True
            self._session += 1
            self._changed.notify_all()
        self._thread.join()

    # ------------------------------------------------------------ the engine's thread

    def _enter(self, session: int) -> bool:
        """Begin a newer session, dropping the older one's work; False if `session` is the older one."""
        if session > self._session:
            self._session = session
            self._inbox.clear()
            self._outbox, self._in_work = [], 0
            self._changed.notify_all()
        return session == self._session

    def _run(self, make: Callable[[], Engine]) -> None:
        engine = None
        try:
            engine = make()
            with self._changed:
                self._engine = engine
                self._changed.notify_all()
            while not self._closing:
                self._speak(engine, self._session)
        except Exception as error:  # told by `loaded` or `take`; the driver then starts another actor
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        finally:
            if engine is not None:
                engine.close()

    def _speak(self, engine: Engine, session: int) -> None:
        """Run one stream of the engine, until a newer session begins."""
        stream = engine.stream(self._feed(session))
        try:
            for completion in stream:
                with self._changed:
                    if session != self._session:
                        return
                    self._outbox.append(completion)
                    self._in_work -= 1
                    self._changed.notify_all()
        finally:
            getattr(stream, "close", lambda: None)()
        if session == self._session:
            raise EngineError("the engine ended its stream while prompts were waiting")

    def _feed(self, session: int) -> Iterator[Prompt | None]:
        """Prompts of `session`; None while others are in work, but a wait where nothing is: no engine may see that."""
        while True:
            with self._changed:
                if self._in_work == 0:
                    self._changed.wait_for(lambda: self._inbox or session != self._session)
                if session != self._session:
                    return
                prompt = self._inbox.popleft() if self._inbox else None
                self._in_work += prompt is not None
            yield prompt
