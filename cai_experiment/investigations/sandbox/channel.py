"""The parent's end of the introspection channel: one line of JSON a call, checked as what a stranger sends."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

MOST_BYTES = 1_000_000  # one message, either way
MOST_CALLS = 1_000  # a run
MOST_ERROR = 2_000  # characters
Functions = Mapping[str, Callable[..., Any]]


class Channel:
    """Takes what the child wrote, calls what it names in a thread of its own, and hands out the answers as bytes.

    One call at a time: what arrives meanwhile waits, unread beyond one message.
    """

    def __init__(self, functions: Functions) -> None:
        self.functions = functions
        self.closed = False  # nothing more is read; the last answer says why
        self.answer = b""  # still to be written
        self._received = bytearray()
        self._calls = 0
        self._thread: ThreadPoolExecutor | None = None
        self._running: Future[tuple[bytes, float]] | None = None
        self._served, self._since = 0.0, 0.0  # seconds of calls that ended; when the one under way began
        self.answered, self._wake = os.pipe()  # readable once a call has ended
        for end in (self.answered, self._wake):
            os.set_blocking(end, False)

    @property
    def served_seconds(self) -> float:
        """How long served functions ran so far, the one under way included."""
        return self._served + (time.monotonic() - self._since if self._running is not None else 0.0)

    @property
    def wants_more(self) -> bool:
        """Whether to read from the child: never while a call or an answer is under way."""
        return not (self.closed or self._running or self.answer)

    def take(self, received: bytes) -> None:
        """Bytes from the child; b"" is the end."""
        if not received:
            self.closed = True
            return
        self._received += received
        self._next()

    def poll(self) -> None:
        """Collect the answer of a call that has ended."""
        with suppress(BlockingIOError):  # the word may come a moment after the answer
            os.read(self.answered, 64)
        if self._running is not None and self._running.done():
            self.answer, ended = self._running.result()
            self._served, self._running = self._served + ended - self._since, None
        if self.wants_more:
            self._next()

    def wait(self) -> None:
        """Until the call under way, if any, has ended: the model's weights serve one caller at a time."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        for end in (self.answered, self._wake):
            os.close(end)

    def _next(self) -> None:
        line, newline, rest = bytes(self._received).partition(b"\n")
        if len(line) > MOST_BYTES:
            self._refuse(f"a message is larger than {MOST_BYTES} bytes")
        elif newline:
            self._received = bytearray(rest)
            self._calls += 1
            if self._calls > MOST_CALLS:
                self._refuse(f"more than {MOST_CALLS} calls")
            else:
                self._start(line)

    def _refuse(self, reason: str) -> None:
        self.closed, self.answer = True, _line({"error": f"{reason}; the channel is closed"})
        self._received.clear()

    def _start(self, line: bytes) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="introspection")
        self._since = time.monotonic()
        self._running = self._thread.submit(lambda: (answer(self.functions, line), time.monotonic()))
        self._running.add_done_callback(lambda _: os.write(self._wake, b"."))


def answer(functions: Functions, line: bytes) -> bytes:
    """The line for the child; whatever the message or the function does, it is an answer and no exception."""
    try:
        name, arguments, named = _read(line)
        if name not in functions:
            raise LookupError(f"no function {name[:100]!r}; there are {', '.join(functions)}")
        reply = _line({"result": functions[name](*arguments, **named)})
    except Exception as error:
        return _line({"error": (str(error) or type(error).__name__)[:MOST_ERROR]})
    if len(reply) > MOST_BYTES:
        return _line({"error": f"{name}: the answer is larger than {MOST_BYTES} bytes; ask for less"})
    return reply


def _read(line: bytes) -> tuple[str, list[Any], dict[str, Any]]:
    """(name, arguments, named arguments) of a message. Raises ValueError for any other line."""
    try:
        message = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a message of JSON: {type(error).__name__}: {str(error)[:100]}") from None
    if isinstance(message, dict):
        name, arguments, named = message.get("call"), message.get("args"), message.get("kwargs")
        if isinstance(name, str) and isinstance(arguments, list) and isinstance(named, dict):
            return name, arguments, named
    raise ValueError('a message is {"call": name, "args": [...], "kwargs": {...}}')


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _line(message: dict[str, Any]) -> bytes:
    # ASCII only: no surrogate from a message can make this fail
    return json.dumps(message).encode("ascii") + b"\n"
