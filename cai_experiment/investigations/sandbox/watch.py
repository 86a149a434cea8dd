"""What a run's processes use together: rlimits bound each of them, this bounds all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cai_experiment.investigations.sandbox.accounts import status_of, threads_of

MOST_FILES = 20_000  # each costs the file system an inode, and the watch a look


def memory_mb(processes: Iterable[int]) -> float:
    """Memory that is not backed by files, MB, swapped too; pages shared after a fork count for each process."""
    return sum(_own_kb(process) for process in processes) / 1000


def _own_kb(process: int) -> int:
    """Of the first thread that still has memory: where the process's first has ended, its status shows none."""
    for thread in threads_of(process):
        status = status_of(thread)
        if "VmRSS" in status:
            return sum(int(status.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssShmem", "VmSwap"))
    return 0


def files_mb(folder: Path, processes: Iterable[int], most_mb: float) -> float:
    """What a run's files take on disk, MB: those in its folder, and deleted ones that a process still holds.

    `most_mb` is the limit of one file. Infinite where there are too many files or too deep folders to look at.
    """
    seen: dict[tuple[int, int], int] = {}
    try:
        _look_into(folder, seen)
        for process in processes:
            for thread in threads_of(process):  # each may have files of its own (clone without CLONE_FILES)
                _look_at_open(thread, seen)
                _look_at_mapped(thread, folder, seen, int(most_mb * 1_000_000))
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


def _look_at_open(process: int, seen: dict[tuple[int, int], int]) -> None:
    with suppress(OSError):
        for name in os.listdir(f"/proc/{process}/fd"):
            _look_at(f"/proc/{process}/fd/{name}", seen)


def _look_at(path: str, seen: dict[tuple[int, int], int]) -> None:
    with suppress(FileNotFoundError):  # closed meanwhile
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode) and not found.st_nlink:
            seen[found.st_dev, found.st_ino] = found.st_blocks * 512


def _look_at_mapped(process: int, folder: Path, seen: dict[tuple[int, int], int], most: int) -> None:
    """Deleted files that are mapped: one page in memory holds all of a file on disk.

    Where this process may not look through the map (CAP_SYS_ADMIN), a file counts as the largest that it can be.
    """
    try:
        # bytes: a path holds whatever ends a line elsewhere, but for the line feed, which the kernel writes as \012
        lines = Path(f"/proc/{process}/maps").read_bytes().split(b"\n")
    except OSError:
        return
    inside = os.fsencode(folder) + b"/"
    for fields in (line.split(maxsplit=5) for line in lines):
        if len(fields) == 6 and fields[5].startswith(inside) and fields[5].endswith(b" (deleted)"):
            device = os.makedev(*(int(part, 16) for part in fields[3].split(b":")))
            key = device, int(fields[4])
            if key not in seen:
                try:
                    seen[key] = os.stat(f"/proc/{process}/map_files/{_span(fields[0])}").st_blocks * 512
                except FileNotFoundError:
                    continue  # unmapped meanwhile
                except OSError:
                    seen[key] = most


def _span(addresses: bytes) -> str:
    """A map's addresses as map_files names them: without leading zeros."""
    return "-".join(f"{int(part, 16):x}" for part in addresses.split(b"-"))
