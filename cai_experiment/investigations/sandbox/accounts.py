"""A uid of its own for each run: what it may touch is exact, and so is the end of all that it started."""

from __future__ import annotations

import os
import pwd
import secrets
import subprocess
import time
from pathlib import Path

KILL_ALL = ["/bin/sh", "-c", "kill -s KILL -- -1"]  # every process of the caller's uid but itself, in one step
NOBODY = 65534
PATIENCE = 5.0  # seconds until killed processes are gone; a disk that hangs holds one longer


def is_root() -> bool:
    """Whether this process may change its uid."""
    return os.geteuid() == 0


def fresh_uid() -> int:
    """A uid that no account and no process has, from the upper quarter of those that this user namespace maps.

    Raises OSError where the namespace maps too few.
    """
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    start, _, count = max(ranges, key=lambda fields: fields[2])
    low, high = start + count * 3 // 4, min(start + count, 2**31)
    low = min(low, high - high // 4)
    for _ in range(100 if count >= 4096 else 0):
        uid = low + secrets.randbelow(high - low)
        if uid != NOBODY and not _has_account(uid) and not processes_of(uid):
            return uid
    raise OSError(f"this container maps {count} uids, none free")


def _has_account(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def processes_of(uid: int) -> list[int]:
    """The processes of a uid that are not yet dead."""
    return [process for process in _all() if _uid_of(process) == uid and not _is_dead(process)]


def descendants_of(root: int) -> list[int]:
    """The living descendants of a process. Where it is a subreaper (keeper.py) none gets out of its tree."""
    children: dict[int, list[int]] = {}
    for process in _all():
        children.setdefault(_parent_of(process), []).append(process)
    found: list[int] = []
    todo = [root]
    while todo:
        mine = children.get(todo.pop(), [])
        found += mine
        todo += mine
    return [process for process in found if not _is_dead(process)]


def kill_all_of(uid: int) -> None:
    """Kill every process of a run's uid and wait until none is left. Raises OSError after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while processes_of(uid):
        subprocess.run(KILL_ALL, user=uid, group=uid, extra_groups=[], env={}, cwd="/", stderr=subprocess.DEVNULL)
        if time.monotonic() > deadline:
            raise OSError(f"processes {processes_of(uid)} of uid {uid} do not end")


def _all() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _uid_of(process: int) -> int:
    """The real uid of a process; not the owner of its folder, which a process can make root (PR_SET_DUMPABLE)."""
    _, found, rest = _read(f"/proc/{process}/status").partition(b"\nUid:\t")  # a name's line feed is escaped there
    return int(rest.split(None, 1)[0]) if found else -1


def status_of(process: int) -> dict[str, str]:
    """The fields of /proc/N/status; none where the process is gone."""
    lines = _read(f"/proc/{process}/status").decode("ascii", "replace").split("\n")
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _read(path: str) -> bytes:
    """A file of /proc; empty where its process is gone. As bytes: names in it are any that a process chose."""
    try:
        with open(path, "rb", buffering=0) as stream:
            return stream.read()
    except OSError:
        return b""


def _stat(process: int) -> list[str]:
    """State, parent, ... of a process (fields 3 and on of /proc/N/stat); [] where it is gone.

    The name before them is any bytes that the process chose: it is cut off before anything is decoded.
    """
    return _read(f"/proc/{process}/stat").rpartition(b")")[2].decode("ascii", "replace").split()


def _parent_of(process: int) -> int:
    fields = _stat(process)
    return int(fields[1]) if fields else -1


def _is_dead(process: int) -> bool:
    """Whether nothing of a process runs: a first thread that ended leaves a zombie while the others go on."""
    fields = _stat(process)
    return not fields or (fields[0] in "ZX" and int(fields[17]) < 2)


def wait_for(processes: list[int]) -> None:
    """Until processes that were killed are gone, PATIENCE seconds at most."""
    deadline = time.monotonic() + PATIENCE
    while any(not _is_dead(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.005)


def threads_of(process: int) -> list[int]:
    """The threads of a process, by the ids under which /proc shows each; [] where it is gone."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{process}/task")]
    except OSError:
        return []


def count_threads(uid: int) -> int:
    """How many threads a uid has now, as RLIMIT_NPROC counts them: the dead until they are reaped too."""
    return sum(int(status_of(process).get("Threads", "1")) for process in _all() if _uid_of(process) == uid)
