"""Stands between this project's process and a run: starts it, ends all that it started, and outlives both.

It is the subreaper of the run: whatever loses its parent becomes its child, so "no child left" means that nothing of
the run lives, and no zombie is left to a PID 1 that does not reap. Where the parent is killed (the lifeline ends
without a word), it ends the run all the same and removes its folder.

Passed to the interpreter as text (-c), so it may import only the library. argv: the order (JSON), see run.py.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
from contextlib import suppress
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
CANNOT_START = 125
REMOVE = 'chmod -R u+rwX -- "$1" 2>/dev/null; rm -rf -- "$1"'  # without root, the run may have closed its own folders


def start(order: dict[str, Any]) -> int:
    """Start the run in a process group of its own; its first process."""
    first = os.fork()
    if first:
        return first
    try:
        os.setpgid(0, 0)
        if order["user"] is not None:
            become(order["user"])
        os.chdir(order["cwd"])
        os.execve(order["command"][0], order["command"], order["environment"])
    except OSError as error:
        print(error, file=sys.stderr, flush=True)
    os._exit(CANNOT_START)


def become(uid: int) -> None:
    """Take a uid and a group of that number, and no other groups."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def kill(first: int | None, uid: int | None) -> None:
    """Kill what lives of the run. Group and uid each die in one step, which no fork outruns.

    `first` is None once it is reaped: its number may be another's by then.
    """
    if first is not None:
        for end in (os.kill, os.killpg):  # the process too: it may not have made its group yet
            with suppress(OSError):
                end(first, signal.SIGKILL)
    if uid is None:
        for process in descendants():
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        return
    killer = os.fork()
    if killer == 0:
        try:
            become(uid)
            os.kill(-1, signal.SIGKILL)  # all of the uid but the caller
        finally:
            os._exit(0)
    os.waitpid(killer, 0)


def descendants() -> list[int]:
    """This process's children and theirs. The name in /proc/N/stat is any bytes: it is cut off."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError, IndexError), open(f"/proc/{name}/stat", "rb") as stream:
                children.setdefault(int(stream.read().rpartition(b")")[2].split()[1]), []).append(int(name))
    found, todo = [], [os.getpid()]
    while todo:
        mine = children.get(todo.pop(), [])
        found += mine
        todo += mine
    return found


def end_all(first: int, uid: int | None) -> int:
    """Kill and reap until no child is left; the exit code of the first process, 128 + signal as in a shell.

    Each round kills what lives before it waits: a process that a round has missed is a child once its parent is reaped.
    """
    code, reaped = CANNOT_START, False
    while True:
        kill(None if reaped else first, uid)
        try:
            process, status = os.waitpid(-1, 0)
            while process:
                if process == first:
                    code, reaped = os.waitstatus_to_exitcode(status), True
                process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return 128 - code if code < 0 else code


def main() -> int:
    """Start, wait for the run's end or the parent's, end all; the first process's exit code."""
    order = json.loads(sys.argv[1])
    lifeline, parent = order["lifeline"], order["parent"]
    os.set_inheritable(lifeline, False)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    gone = os.pidfd_open(parent)  # a lifeline copied by a fork of the parent's would not end with it
    if os.getppid() != parent:
        return CANNOT_START
    first = start(order)
    for descriptor in order["descriptors"]:
        os.close(descriptor)
    poll = select.poll()
    for descriptor in (lifeline, gone, os.pidfd_open(first)):
        poll.register(descriptor, select.POLLIN)
    poll.poll()
    code = end_all(first, order["uid"])
    last = {descriptor for descriptor, _ in poll.poll(0)}
    if order["folder"] and (gone in last or (lifeline in last and os.read(lifeline, 1) == b"")):
        os.execv("/bin/sh", ["sh", "-c", REMOVE, "sh", order["folder"]])
    return code


if __name__ == "__main__":
    code = CANNOT_START
    try:
        code = main()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(code)
