"""A child process that answers in JSON lines: started, asked, listened to, and ended with everything it started.

The child leads a process group of its own, so Ctrl-C in the terminal does not reach it and ending it ends its workers.
It ends itself when our end of its pipe closes, so `kill -9` of this process leaves nothing behind that holds a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, Callable

ROOT = Path(__file__).resolve().parents[2]
GRACE = 6.0  # seconds to end by itself; a stopped run must be over within 10
LAST_WAIT = 10.0  # seconds for the system to end what was killed


Outbox = SimpleQueue[bytes | None]  # lines for the child; None closes its pipe


class Child:
    """A running `python -m module`. `hear` is called with each message, and with None when the child has ended."""

    def __init__(self, module: str, environment: dict[str, str], hear: Callable[[dict[str, Any] | None], None]) -> None:
        """Start it; what it and its workers print goes to `log`, a file of its own."""
        handle, name = tempfile.mkstemp(prefix=f"{module.rsplit('.', 1)[-1]}-", suffix=".log")
        self.log = Path(name)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with open(handle, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module],  # -P: no module of the current folder can stand in for a library
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env={**os.environ, "PYTHONPATH": path, **environment}, start_new_session=True,
            )  # fmt: skip
        self._outbox = Outbox()
        self._end = weakref.finalize(self, end_group, self._process, self._outbox)
        threading.Thread(target=_write, args=(self._process.stdin, self._outbox), daemon=True).start()
        threading.Thread(target=_listen, args=(self._process.stdout, hear), daemon=True).start()

    @property
    def pid(self) -> int:
        """The child's process id, which is its group's id too."""
        return self._process.pid

    @property
    def ending(self) -> bool:
        """True once `close` was called, or this process is ending."""
        return not self._end.alive

    def say(self, message: dict[str, Any]) -> None:
        """Send a message, without waiting; to a child that has ended it is lost, and `hear` tells of its end."""
        self._outbox.put(json.dumps(message).encode() + b"\n")

    def kill(self) -> None:
        """End the child and all that it started at once."""
        _signal(self.pid, signal.SIGKILL)

    def how_it_ended(self) -> str:
        """In words, for a child that is ending or has ended: its exit code or the signal that killed it."""
        try:
            code = self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        if code == -signal.SIGKILL:
            return "was killed (signal 9; the system does that when RAM runs out)"
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def close(self, keep_log: bool = False) -> None:
        """End the child and all that it started, and wait until they are gone; its log goes too."""
        self._end()
        if not keep_log:
            self.log.unlink(missing_ok=True)


def _listen(stream: Any, hear: Callable[[dict[str, Any] | None], None]) -> None:
    for line in stream:
        try:
            hear(json.loads(line))
        except ValueError:
            break  # a line torn by the child's death
    hear(None)


def _write(stream: IO[bytes], outbox: Outbox) -> None:
    """In a thread of its own: a child that hangs reads nothing, and the pipe fills up."""
    with contextlib.suppress(OSError):  # a broken pipe: the child has ended
        while (line := outbox.get()) is not None:
            stream.write(line)
            stream.flush()
    with contextlib.suppress(OSError):
        stream.close()


def end_group(process: subprocess.Popen[bytes], outbox: Outbox) -> None:
    """Close the child's pipe and give it GRACE to end; then kill its group, and wait until no member is alive."""
    outbox.put(None)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        _signal(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
    _signal(process.pid, signal.SIGKILL)  # workers that outlived it, too
    deadline = time.monotonic() + LAST_WAIT
    while time.monotonic() < deadline and (process.poll() is None or living_members(process.pid)):
        time.sleep(0.02)


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody left (macOS says the second of zombies)
        os.killpg(group, number)


def living_members(group: int) -> list[int]:
    """Process ids of a group that still hold memory: a zombie has given its memory back, and may stay for ever where
    process 1 of a container does not reap. Empty where there is no /proc."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = file.read_text().rsplit(")", 1)[1].split()[:3]
        except (OSError, IndexError):
            continue  # it ended while we looked
        if its_group == str(group) and state not in "ZX":
            found.append(int(file.parent.name))
    return found
