"""A child process kept alive: what is asked of it waits here for its answer, so a death costs a reload, not a run.

A child that has ended, has not answered anything for too long while it had work, or loads for too long, is followed by
a new one, which is asked all that was not answered. Who was in work at two deaths runs alone, and is to blame if that
ends the child too (suspects.py). Requests go out in the order in which they were asked. Any thread may ask and wait.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Callable

from cai_experiment.engines.process import Child
from cai_experiment.engines.suspects import DEATHS_IN_A_ROW, Suspects
from cai_experiment.errors import EngineError

# The model's files are here before a child starts, so no download counts: 65 GB from a network volume take 11 minutes
# at 100 MB/s, compiling and capturing graphs some more. A load that takes longer hangs.
LOAD_SECONDS = 1800.0

Message = dict[str, Any]
Answers = SimpleQueue[Message | None]  # None: there will be no more


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that was not answered yet: whose it is, by id, and who waits for the answer."""

    id: str
    message: Message
    answers: Answers


class Revived:
    """`python -m module`, again and again. It says {"ready": {...}}, {"n": ...} to each request, {"fatal": ...}."""

    def __init__(
        self, module: str, environment: dict[str, str], opening: Message, deadline: float, remedy: Callable[[str], str]
    ) -> None:
        """Start the child with the message `opening`. `deadline`: seconds that it may have work and answer nothing.

        `remedy` gives what mends a child that ended for a reason, or "".
        """
        self._start = partial(Child, module, environment)
        self._opening, self._deadline, self._remedy = opening, deadline, remedy
        self.ready: Message = {}
        self._changed = threading.Condition()
        self._numbers, self._children = itertools.count(), 0
        self._asked: dict[int, _Asked] = {}
        self._waiting: deque[int] = deque()  # of these, what the child was not given
        self._in_work: set[int] = set()  # and what it was
        self._alone = False  # the one in work is a suspect
        self._suspects, self._deaths = Suspects(), 0
        self._heard = time.monotonic()
        self._fault: EngineError | None = None
        self._closed = False
        with self._changed:
            self._begin()

    @property
    def pid(self) -> int:
        """The process and group id of the child at hand."""
        return self._child.pid

    @property
    def log(self) -> Path:
        """The path of its log."""
        return self._child.log

    def wait_until_loaded(self) -> None:
        """Wait until the first child has loaded. Raises EngineError, one line, if it could not; it is closed then."""
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self.loading or self._fault)
                if self._fault is not None:
                    raise self._fault
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------ asking

    def ask(self, id: str, message: Message, answers: Answers) -> int:
        """Queue a request of the prompt `id`; gives its number, which is "n" in its answer. Raises EngineError."""
        with self._changed:
            if self._fault is not None:
                raise self._fault
            number = next(self._numbers)
            self._asked[number] = _Asked(id, {"n": number, **message}, answers)
            self._waiting.append(number)
            self._send()
            return number

    def answer(self, answers: Answers) -> Message:
        """Wait for the next message in `answers`: {"n": ...}. Raises EngineError if the child died too often."""
        while True:
            try:
                message = answers.get(timeout=self._patience())
            except Empty:
                continue
            if message is None:
                assert self._fault is not None
                raise self._fault
            return message

    def drop(self, numbers: list[int]) -> None:
        """Forget requests that nobody waits for any more."""
        with self._changed:
            dropped = [number for number in numbers if self._asked.pop(number, None)]
            if not dropped:
                return
            self._waiting = deque(number for number in self._waiting if number in self._asked)
            self._in_work -= set(dropped)
            self._child.say({"drop": dropped})
            self._send()

    def close(self) -> None:
        """End the child and wait until it is gone. Its log goes too, unless a message has named it as a fault's."""
        with self._changed:
            self._closed = True
            self._load_limit.cancel()
        self._child.close(keep_log=self._fault is not None)

    def _send(self) -> None:
        """Give the child what may go to it: everything in its order, but a suspect with nothing beside it."""
        while self._waiting and not self.loading and not self._fault:
            number = self._waiting[0]
            alone = self._asked[number].id in self._suspects
            if self._in_work and (alone or self._alone):
                return
            if not self._in_work:
                self._heard = time.monotonic()  # there was nothing to hear
            self._alone = alone
            self._in_work.add(self._waiting.popleft())
            self._child.say(self._asked[number].message)

    def _patience(self) -> float:
        """Seconds until the child is overdue, if it has work; one that is overdue now is ended."""
        with self._changed:
            if self.loading or not self._in_work or self._fault:
                return self._deadline
            left = self._heard + self._deadline - time.monotonic()
            if left > 0:
                return left
            self._child.kill()
            self._bury(f"no answer for {self._deadline:g} s")
            return 0.0

    # ------------------------------------------------------------ the child

    def _begin(self) -> None:
        self._children += 1
        self._fatal, self.loading = "", True
        self._load_limit = threading.Timer(LOAD_SECONDS, self._end_load, (self._children,))
        self._load_limit.daemon = True
        self._load_limit.start()
        self._child = self._start(partial(self._hear, self._children))
        self._child.say(self._opening)

    def _end_load(self, child: int) -> None:
        """Called when a child has had its time to load: if it is still at it, that is its death."""
        with self._changed:
            if child != self._children or not self.loading or self._child.ending or self._fault:
                return
            self._child.kill()
            self._bury(f"it was not ready after {LOAD_SECONDS / 60:g} minutes")
            self._changed.notify_all()

    def _hear(self, child: int, message: Message | None) -> None:
        """Called by a child's listening thread with each message, and with None at its end."""
        with self._changed:
            if child != self._children or self._child.ending or self._fault:
                return
            self._heard = time.monotonic()
            if message is None:
                self._bury()
            elif "n" in message:
                self._answered(message)
            elif "fatal" in message:
                self._fatal = message["fatal"]
            else:
                self.ready, self.loading = message["ready"], False
                self._load_limit.cancel()
                self._send()
            self._changed.notify_all()

    def _answered(self, message: Message) -> None:
        self._in_work.discard(message["n"])
        asked = self._asked.pop(message["n"], None)
        if asked is not None:
            self._deaths = 0
            self._suspects.clear(asked.id)
            asked.answers.put(message)
        self._send()

    # ------------------------------------------------------------ deaths

    def _bury(self, why: str = "") -> None:
        """The child has ended: blame whom it is to be blamed on, and start another, or give up."""
        self._load_limit.cancel()
        why = why or " ".join(self._fatal.split())[:300] or f"its process {self._child.how_it_ended()}"
        self._child.close(keep_log=True)
        if self._closed:
            return
        self._deaths += 1
        if not self.ready or self._deaths >= DEATHS_IN_A_ROW:
            self._give_up(why)
            return
        self._blame(why)
        self._waiting, self._in_work = deque(sorted(self._asked)), set()
        log = self._child.log
        try:
            self._begin()
        except OSError as error:
            self._give_up(f"no further process can be started: {error}")
            return
        with contextlib.suppress(OSError):  # nobody reads it, if the line to the terminal was dropped
            print(f"vLLM died: {why}; its log is {log}. It is loaded again (death {self._deaths} of at most "
                  f"{DEATHS_IN_A_ROW} in a row), then {len(self._asked)} prompts are asked again",
                  file=sys.stderr, flush=True)  # fmt: skip

    def _blame(self, why: str) -> None:
        """Answer the prompt that has ended the child again and again, if it is found."""
        found = self._suspects.died([self._asked[number].id for number in self._in_work])
        if found:
            (number,) = self._in_work
            error = {"n": number, "error": f"{found}: {why}", "final": "attempts"}
            self._asked.pop(number).answers.put(error)

    def _give_up(self, why: str) -> None:
        """Nothing will be answered any more; one line says why, with what mends it."""
        what = f"died {self._deaths} times running, at last" if self.ready else "did not load"
        self._fault = EngineError(f"vLLM {what}: {why}", self._remedy(why) or f"its log is {self._child.log}")
        for answers in {id(asked.answers): asked.answers for asked in self._asked.values()}.values():
            answers.put(None)
