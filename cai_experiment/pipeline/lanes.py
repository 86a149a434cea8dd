"""Lanes: an engine, the prompts that wait for it, and the stream between them.

Engines that compute in this process are pulled by the runner's own thread, one completion at a time: two models on one
GPU gain nothing from threads, and Unsloth's would share a buffer. Of two engines that compute elsewhere each has a
thread that waits for it, so what one has finished never waits for the other. Each stream is pulled and closed by one
thread alone.
"""

from __future__ import annotations

import heapq
import time
from queue import SimpleQueue
from threading import Condition, Thread
from typing import Iterator, Mapping

from cai_experiment.engines.base import Completion, Engine, Prompt
from cai_experiment.errors import EngineError

Result = tuple["ThreadLane", Completion | BaseException]


class Lanes:
    """The lanes of a run's roles; roles of one engine share one."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        """`engines` by role."""
        self._results: SimpleQueue[Result] = SimpleQueue()
        distinct = {id(engine): engine for engine in engines.values()}
        lanes = {key: self._lane(engine, alone=len(distinct) == 1) for key, engine in distinct.items()}
        self._of = {role: lanes[id(engine)] for role, engine in engines.items()}
        self._lanes = list(lanes.values())

    def _lane(self, engine: Engine, alone: bool) -> Lane:
        threaded = not alone and getattr(engine, "elsewhere", False)
        return ThreadLane(engine, self._results) if threaded else Lane(engine)

    @property
    def busy(self) -> bool:
        """True if an engine owes a completion, or will once it is asked."""
        return any(lane.owed for lane in self._lanes)

    def put(self, role: str, rank: int, prompt: Prompt) -> None:
        """Queue a prompt for `role`; the lowest rank goes first, so that examples which were begun are finished."""
        self._of[role].put(rank, prompt)

    def next(self) -> Completion:
        """A completion that a thread has ready; else the next one of the engine here that owes most; else a wait.

        Raises what an engine raised, and EngineError if one ended its stream.
        """
        here = [lane for lane in self._lanes if lane.owed and not isinstance(lane, ThreadLane)]
        if here and self._results.empty():
            return max(here, key=lambda lane: lane.owed).next()
        lane, result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        lane.owed -= 1
        return result

    def close(self, seconds: float) -> None:
        """Let the engines drop what they are at; waits so long for their threads."""
        until = time.monotonic() + seconds
        for lane in self._lanes:
            lane.stop()
        for lane in self._lanes:
            lane.close(until)


class Lane:
    """One engine with its queue. The engine pulls prompts through `_feed`; None means "nothing right now"."""

    def __init__(self, engine: Engine) -> None:
        self.queue: list[tuple[int, int, Prompt]] = []
        self.owed = 0  # prompts that were put and whose completions `Lanes.next` has not given
        self._count = 0
        self._stream = engine.stream(self._feed())

    def put(self, rank: int, prompt: Prompt) -> None:
        """See `Lanes.put`."""
        self._count += 1
        self.owed += 1
        heapq.heappush(self.queue, (rank, self._count, prompt))

    def _feed(self) -> Iterator[Prompt | None]:
        while True:
            yield heapq.heappop(self.queue)[2] if self.queue else None

    def next(self) -> Completion:
        """The engine's next completion, whichever it is."""
        completion = self._pull()
        self.owed -= 1
        return completion

    def _pull(self) -> Completion:
        completion = next(self._stream, None)
        if completion is None:
            raise EngineError("the engine ended its stream while prompts were waiting", "the same command resumes")
        return completion

    def stop(self) -> None:
        """Nothing runs but in `next`."""

    def close(self, until: float) -> None:
        """Let the engine drop what it is at."""
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()


class _Stopped(Exception):
    """Goes from `_feed` through the engine's stream, which so ends where it stands."""


class ThreadLane(Lane):
    """A lane whose stream runs in a thread of its own; completions, or what the engine raised, go into `results`.

    An engine with nothing in work would take "nothing right now" for a deadlock: it waits in `_feed` instead.
    """

    def __init__(self, engine: Engine, results: SimpleQueue[Result]) -> None:
        self._results = results
        self._changed = Condition()
        self._in_work = 0
        self._stopping = False
        super().__init__(engine)
        self._thread = Thread(target=self._run, name=f"lane-{engine.name}", daemon=True)
        self._thread.start()

    def put(self, rank: int, prompt: Prompt) -> None:
        """See `Lanes.put`."""
        with self._changed:
            super().put(rank, prompt)
            self._changed.notify()

    def _feed(self) -> Iterator[Prompt | None]:
        prompts = super()._feed()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self.queue or self._in_work)
                if self._stopping:
                    raise _Stopped
                prompt = next(prompts)
                self._in_work += prompt is not None
            yield prompt

    def _run(self) -> None:
        """Pull the stream until it ends or is stopped."""
        try:
            while not self._stopping:
                completion = self._pull()
                with self._changed:
                    self._in_work -= 1
                self._results.put((self, completion))
        except _Stopped:
            pass
        except BaseException as error:  # the runner's thread raises it
            self._results.put((self, error))
        finally:
            super().close(0.0)

    def stop(self) -> None:
        """Ask the thread to end at the next prompt that its engine takes or completion that it gives."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def close(self, until: float) -> None:
        """Wait for the thread until `until` (monotonic seconds); it is a daemon, and holds nothing up."""
        self._thread.join(max(0.0, until - time.monotonic()))
