"""The file of the content log: append-only JSONL, whole lines only."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, Iterator, Mapping

from cai_experiment.errors import BadInputError, DiskError, UserError

BLOCK = 1 << 16
TAIL_BYTES = 4 << 20  # what is read for a page's log view, unless one entry alone is larger
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def cannot_write(path: str | Path, error: OSError) -> UserError:
    """The user's error for a failed write: DiskError for the disk's own faults, else BadInputError for the path."""
    message = f"cannot write the content log {path}: {error.strerror}"
    if error.errno in DISK_FAULTS:
        return DiskError(message, "make room and run the same command again (everything finished is kept)")
    return BadInputError(message, "choose a place that you may write to")


class LogFile:
    """Every entry is handed to the kernel by one write: a kill can tear the line being written and nothing else.

    It stands beside the journal of `records` because observe is on the same floor, and it may do less: nothing is
    redone from a log, so there is no fsync and no repair but cutting a torn last line.
    """

    def __init__(self, path: str | Path) -> None:
        """Open or make the file and cut a torn last line. Raises BadInputError or DiskError."""
        self.path = Path(path)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._cut_torn_line()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    @property
    def size(self) -> int:
        """Bytes in the file now."""
        return self.path.stat().st_size

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one entry (values unknown to JSON become text). After a DiskError the file ends before it."""
        line = json.dumps(entry, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n"
        end = os.lseek(self._file, 0, os.SEEK_END)
        try:
            written = os.write(self._file, line)
            while written < len(line):
                written += os.write(self._file, line[written:])
        except BaseException as error:
            if os.fstat(self._file).st_size > end:
                os.ftruncate(self._file, end)
            if isinstance(error, OSError):
                raise cannot_write(self.path, error) from error
            raise

    def entries(self, start: int = 0) -> Iterator[dict[str, Any]]:
        """The entries from byte `start` (the beginning of a line) on."""
        with open(self.path, "rb") as file:
            file.seek(start)
            for line in file:
                yield json.loads(line)

    def read(self, start: int, skip: int = 0) -> tuple[list[dict[str, Any]], int]:
        """The entries from byte `start` (the beginning of a line) on but for the first `skip`, and the byte after."""
        with open(self.path, "rb") as file:
            file.seek(start)
            lines = file.read().split(b"\n")[:-1]  # a line that another process is writing is not there yet
        end = start + sum(map(len, lines)) + len(lines)
        return [json.loads(line) for line in lines[skip:]], end

    def tail(self, count: int, start: int = 0) -> list[dict[str, Any]]:
        """The last `count` entries of those from byte `start` on, read from the end backwards; fewer, but at least one,
        where these are more than TAIL_BYTES.
        """
        end = begin = self.size
        blocks: list[bytes] = []
        newlines = 0
        with open(self.path, "rb") as file:
            while begin > start and newlines <= (count if end - begin < TAIL_BYTES else 1):
                stop, begin = begin, max(start, begin - BLOCK)
                file.seek(begin)
                blocks.append(file.read(stop - begin))
                newlines += blocks[-1].count(b"\n")
        lines = b"".join(reversed(blocks)).split(b"\n")
        whole = lines[:-1] if begin == start else lines[1:-1]
        return [json.loads(line) for line in whole[-count:]]

    def close(self) -> None:
        """Give the handle back; reading goes on working."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _cut_torn_line(self) -> None:
        """Truncate to the end of the last newline, looking from the end backwards."""
        end = os.lseek(self._file, 0, os.SEEK_END)
        while end > 0:
            start = max(0, end - BLOCK)
            newline = os.pread(self._file, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < os.fstat(self._file).st_size:
            os.ftruncate(self._file, end)
