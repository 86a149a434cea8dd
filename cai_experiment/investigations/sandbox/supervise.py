"""Looks after one run from outside: reads what it prints, answers what it asks, stops it at a limit, ends all of it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from cai_experiment.investigations.sandbox.channel import Channel
from cai_experiment.investigations.sandbox.limits import READ_FACTOR, Limits

LOOK_SECONDS = 0.1  # between looks at memory and files
SERVED_FACTOR = 5  # served functions may take this many times `seconds` in all; beyond, they count as the run's time
PIECE = 65536


@dataclass
class Printed:
    """The start of what a run printed on one stream. The rest is counted and dropped."""

    most: int  # bytes kept
    kept: bytearray = field(default_factory=bytearray)
    total: int = 0

    def add(self, piece: bytes) -> None:
        self.total += len(piece)
        self.kept += piece[: max(0, self.most - len(self.kept))]

    def text(self, most_characters: int) -> str:
        return bytes(self.kept).decode("utf-8", errors="replace")[:most_characters]


class Supervisor:
    """One run. `look()` says which limit its memory or files exceed ("" for none)."""

    def __init__(
        self, process: subprocess.Popen[bytes], ask: int, hear: int, channel: Channel, limits: Limits,
        look: Callable[[], str],
    ) -> None:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        self.process, self.limits, self.channel = process, limits, channel
        self.look = look
        self.ask, self.hear = ask, hear  # descriptors of the parent's ends; closed here
        self.streams = {
            stream.fileno(): Printed(4 * limits.output_chars + 4)  # a character takes at most four bytes
            for stream in (process.stdout, process.stderr)
        }
        self.out, self.err = self.streams.values()
        self.open = set(self.streams)
        self.started = False  # the code's interpreter has reported
        self.stopped = ""
        for descriptor in (*self.streams, ask, hear):
            os.set_blocking(descriptor, False)

    def run(self) -> None:
        """Until the first process has ended or a limit stops it. What it leaves behind is the caller's to kill."""
        began = looked = time.monotonic()
        ended = os.pidfd_open(self.process.pid)
        try:
            while not self.stopped:
                ready = self._wait(ended)
                self._serve(ready)
                now = time.monotonic()
                served = min(self.channel.served_seconds, SERVED_FACTOR * self.limits.seconds)
                if ended not in ready and now - began - served > self.limits.seconds:
                    self.stopped = "time"
                elif ended in ready or now - looked > LOOK_SECONDS:  # at the end too: for what lies on disk
                    self.stopped = self.stopped or self._look()
                    looked = time.monotonic()
                if ended in ready:
                    break
            self._drain()
        finally:
            os.close(ended)

    def _look(self) -> str:
        """What `look` says; a run at which it cannot look is not one to go on."""
        try:
            return self.look()
        except Exception:
            return "unknown"

    def close(self) -> None:
        """Close the channel, and wait for the served function under way."""
        self._hang_up()
        self.channel.wait()

    def _wait(self, ended: int) -> set[int]:
        """The descriptors that are ready, after LOOK_SECONDS at most."""
        poll = select.poll()
        for descriptor in (ended, self.channel.answered, *self.open):
            poll.register(descriptor, select.POLLIN)
        if self.ask >= 0 and self.channel.wants_more:
            poll.register(self.ask, select.POLLIN)
        if self.hear >= 0 and self.channel.answer:
            poll.register(self.hear, select.POLLOUT)
        return {ready for ready, _ in poll.poll(1000 * LOOK_SECONDS)}

    def _serve(self, ready: set[int]) -> None:
        for descriptor in ready & self.open:
            self._print(descriptor)
        if self.ask in ready:
            self._take()
        self.channel.poll()
        if self.hear >= 0 and self.channel.answer:
            self._answer()
        if self.channel.closed and not self.channel.answer:
            self._hang_up()

    def _print(self, descriptor: int) -> bool:
        """Read one piece of a stream; whether there may be more."""
        try:
            piece = os.read(descriptor, PIECE)
        except BlockingIOError:
            return False
        printed = self.streams[descriptor]
        printed.add(piece)
        if not piece:
            self.open.discard(descriptor)
        if printed.total > READ_FACTOR * self.limits.output_chars:
            self.stopped = self.stopped or "output"
        return bool(piece) and not self.stopped

    def _drain(self) -> None:
        """What lies in the pipes now; a process left behind may hold them open and write on."""
        for descriptor in tuple(self.open):
            while self._print(descriptor):
                pass

    def _take(self) -> None:
        with suppress(BlockingIOError):
            received = os.read(self.ask, PIECE)
            if not self.started and received[:1] == b"+":
                self.started, received = True, received[1:]
                if not received:
                    return
            self.channel.take(received)

    def _answer(self) -> None:
        try:
            self.channel.answer = self.channel.answer[os.write(self.hear, self.channel.answer) :]
        except BlockingIOError:
            return
        except OSError:  # the child closed its end
            self.channel.closed, self.channel.answer = True, b""

    def _hang_up(self) -> None:
        for descriptor in (self.ask, self.hear):
            if descriptor >= 0:
                os.close(descriptor)
        self.ask = self.hear = -1


def reason_of(stopped: str, exit_code: int, errors: str, seconds: float, limits: Limits) -> str:
    """The limit that ended a run: the supervisor's, or one that the kernel held, as far as its end shows it."""
    if stopped:
        return stopped
    if exit_code == 128 + signal.SIGXCPU or (exit_code == 128 + signal.SIGKILL and seconds >= limits.cpu_seconds):
        return "cpu"
    last = errors.rstrip().rpartition("\n")[2]
    return "memory" if exit_code and last.partition(":")[0].endswith("MemoryError") else ""
