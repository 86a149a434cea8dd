"""A run's folder and its journal: one run at a time, and nothing finished is lost to a crash.

What survives what. `append` hands a whole line to the kernel with one write, nothing waits in this process: a
`kill -9` loses no line whose `append` returned, and can tear only the line being written, which is cut at the next
start and redone. A power cut also loses what the kernel had not yet put on disk; therefore fsync, but batched (an
fsync costs milliseconds, a line microseconds): such a cut costs at most the lines since the last one.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Iterator, Mapping

from cai_experiment.errors import BadInputError
from cai_experiment.records.files import (
    encode_line,
    ends_whole,
    mended_rows,
    parse_line,
    read_examples,
    read_json,
    read_jsonl,
    show,
    sync_folder,
    write_atomic,
    write_json,
    write_jsonl,
    writing_error,
)

__all__ = [
    "Journal", "RunFolder", "read_examples", "read_json", "read_jsonl", "show", "write_atomic", "write_json",
    "write_jsonl",
]  # fmt: skip

LOCK_NAME = "run.lock"
SYNC_SECONDS = 1.0
SYNC_LINES = 1000


class Journal:
    """Append-only JSONL, written by one thread of the process that holds the folder's lock."""

    def __init__(self, path: str | Path) -> None:
        """Nothing is opened yet: `rows()` reads (and repairs), the first `append` opens."""
        self.path = Path(path)
        self._file: int | None = None
        self._reader: BinaryIO | None = None
        self._unsynced = 0
        self._synced_at = 0.0

    def rows(self) -> list[dict[str, Any]]:
        """All rows in the order of writing; none if there is no file yet.

        A torn last line is cut, a bad line is moved to `<file>.bad`; both are named on stderr, and the caller,
        who does not find their rows, does their work again.
        """
        return [row for _, row in self.located_rows()]

    def located_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """As `rows`, one at a time, each with the byte offset at which `row_at` finds it."""
        self.close()  # a repair may put a new file in the old one's place
        if self.path.exists():
            yield from mended_rows(self.path)

    def row_at(self, offset: int) -> dict[str, Any]:
        """The row that `located_rows` found at `offset`."""
        if self._reader is None:
            self._reader = open(self.path, "rb")  # noqa: SIM115 - closed by close()
        self._reader.seek(offset)
        return parse_line(self._reader.readline())

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row as one line. Raises DiskError when there is no room; the file then ends before this line."""
        line = encode_line(row)
        try:
            file = self._open()
            end = os.lseek(file, 0, os.SEEK_END)
            try:
                written = os.write(file, line)
                while written < len(line):  # a disk that is nearly full takes a part first, then says so
                    written += os.write(file, line[written:])
            except BaseException:
                if os.fstat(file).st_size > end:
                    os.ftruncate(file, end)
                raise
            self._unsynced += 1
            if self._unsynced >= SYNC_LINES or time.monotonic() - self._synced_at >= SYNC_SECONDS:
                self._sync(file)
        except OSError as error:
            raise writing_error(self.path, error) from error

    def close(self) -> None:
        """fsync and close; a later `append` or `row_at` opens again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            if self._unsynced:
                self._sync(file)
        except OSError as error:
            raise writing_error(self.path, error) from error
        finally:
            os.close(file)

    def _open(self) -> int:
        if self._file is None:
            if self.path.exists() and not ends_whole(self.path):
                read_jsonl(self.path, repair=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._synced_at = time.monotonic()
            sync_folder(self.path.parent)
        return self._file

    def _sync(self, file: int) -> None:
        os.fsync(file)
        self._unsynced = 0
        self._synced_at = time.monotonic()


class RunFolder:
    """The folder of one run, locked while the `with` block lasts.

    with RunFolder("cai_experiment/data/batch") as folder:
        done = folder.journal.rows()
        folder.journal.append({...})

    Entering raises BadInputError if the folder cannot be made or written, or if another process is in it; DiskError
    if there is no room. `fresh=True` moves what is there to `NAME.<time>` (see `moved_to`); nothing is deleted.
    The lock is the kernel's (flock) and ends with its process, however that dies: no stale lock stands in the way.
    """

    def __init__(self, path: str | Path, fresh: bool = False) -> None:
        self.path = Path(path)
        self.fresh = fresh
        self.moved_to: Path | None = None
        self.journal = Journal(self.path / "journal.jsonl")
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        try:
            self._acquire()
            if self.fresh and any(entry.name != LOCK_NAME for entry in self.path.iterdir()):
                self._move_aside()
                self._acquire()
        except OSError as error:
            self._release()
            raise writing_error(self.path, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.journal.close()
        finally:
            self._release()

    def _acquire(self) -> None:
        """Make the folder and lock it, or raise BadInputError naming the process that holds it."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(lock, 200, 0)
                os.close(lock)
                raise self._not_ours(error, holder) from None
            if self._is_in_place(lock):
                break
            os.close(lock)  # another run moved the folder away between our open and our lock
        self._lock = lock
        os.ftruncate(lock, 0)
        note = {"pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.pwrite(lock, json.dumps(note).encode() + b"\n", 0)

    def _is_in_place(self, lock: int) -> bool:
        try:
            return os.path.samestat(os.fstat(lock), os.stat(self.path / LOCK_NAME))
        except FileNotFoundError:
            return False

    def _not_ours(self, error: OSError, holder: bytes) -> BadInputError:
        if not isinstance(error, BlockingIOError):  # some network file systems know no locks
            message = f"cannot lock {show(self.path)}: {error.strerror}"
            return BadInputError(message, "choose a folder on another file system")
        try:
            note = json.loads(holder)
            who, how = f"process {note['pid']} (started {note['started']})", f"stop it with: kill {note['pid']}"
        except ValueError:  # it has the lock and is about to write its name
            who, how = "a process that has just started", "try again"
        return BadInputError(f"{show(self.path)} is in use by {who}", f"wait until it ends, or {how}")

    def _move_aside(self) -> None:
        """Rename the folder to NAME.<time>, with a counter if that name is taken; the lock moves along and ends."""
        stem = f"{self.path.name}.{time.strftime('%Y%m%d-%H%M%S')}"
        target, count = self.path.with_name(stem), 1
        while target.exists():
            count += 1
            target = self.path.with_name(f"{stem}-{count}")
        self.path.rename(target)
        self.moved_to = target
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
