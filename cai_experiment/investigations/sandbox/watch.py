"""What a run's processes use together: rlimits bound each of them, this bounds all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from cai_experiment.investigations.sandbox.accounts import status_of

MOST_FILES = 20_000  # each costs the file system an inode, and the watch a look


def memory_mb(processes: Iterable[int]) -> float:
    """Resident memory that is not backed by files, MB; pages shared after a fork count for each process."""
    return sum(_own_kb(process) for process in processes) / 1000


def _own_kb(process: int) -> int:
    status = status_of(process)
    return sum(int(status.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssShmem"))


def files_mb(folder: Path, processes: Iterable[int]) -> float:
    """What a run's files take on disk, MB: those in its folder, and deleted ones that a process still holds.

    Infinite where there are too many files or too deep folders to look at.
    """
    seen: dict[tuple[int, int], int] = {}
    try:
        _look_into(folder, seen)
        for process in processes:
            _look_at_deleted(process, folder, seen)
    except OverflowError:
        return float("inf")
    return sum(seen.values()) / 1_000_000


def _look_into(folder: Path, seen: dict[tuple[int, int], int]) -> None:
    todo = [str(folder)]
    while todo:
        try:
            for entry in os.scandir(todo.pop()):
                found = entry.stat(follow_symlinks=False)
                seen[found.st_dev, found.st_ino] = found.st_blocks * 512
                if stat.S_ISDIR(found.st_mode):
                    todo.append(entry.path)
                if len(seen) > MOST_FILES or len(entry.path) > 3500:  # PATH_MAX is 4096
                    raise OverflowError
        except PermissionError:
            raise OverflowError from None  # a folder closed to this process may hold anything
        except OSError:
            continue  # removed meanwhile


def files_in_memory(folder: str, processes: Iterable[int]) -> int:
    """How many files the sandbox's file system in memory holds, where this process may look; its bytes have a limit."""
    for process in processes:
        try:
            state = os.statvfs(f"/proc/{process}/root{folder}")
        except OSError:
            continue
        return state.f_files - state.f_ffree
    return 0


def _look_at_deleted(process: int, folder: Path, seen: dict[tuple[int, int], int]) -> None:
    try:
        for name in os.listdir(f"/proc/{process}/fd"):
            found = os.stat(f"/proc/{process}/fd/{name}")
            if stat.S_ISREG(found.st_mode) and not found.st_nlink:
                seen[found.st_dev, found.st_ino] = found.st_blocks * 512
        for line in Path(f"/proc/{process}/maps").read_text(errors="replace").splitlines():
            span, _, _, device, inode, path = (*line.split(maxsplit=5), "")[:6]
            if path.startswith(f"{folder}/") and path.endswith(" (deleted)"):
                low, high = (int(part, 16) for part in span.split("-"))
                major, minor = (int(part, 16) for part in device.split(":"))
                seen.setdefault((os.makedev(major, minor), int(inode)), high - low)
    except OSError:
        return
