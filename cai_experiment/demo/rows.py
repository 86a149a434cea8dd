"""The rows of a pairs.jsonl or rejected.jsonl for looking through: an index by file, the rows themselves by offset.

A click reads one page of rows and no more, however long the file is. The index knows of each row where it stands and
what it can be filtered by; a file that has grown is read from where the index ends. Nothing is ever repaired: the run
may be writing the file right now. Rows that are damaged are named, by file and line, and the others shown.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cai_experiment.demo.markup import visible
from cai_experiment.errors import BadInputError
from cai_experiment.observe.screen import shortened
from cai_experiment.records.files import parse_line, show
from cai_experiment.records.schema import Example, check_line, from_row

KEPT = 16  # indexes in memory, of the files that were looked at last: some 200 bytes a row
LABEL = 80  # characters of a name to filter by
NOT_REVISED = "not revised"
NAMELESS = "(blank)"


class Row(NamedTuple):
    """Where a row stands, and what it can be filtered by."""

    offset: int
    number: int  # of its line
    id: str
    principles: tuple[str, ...]  # ids, one a round
    verdicts: tuple[str, ...]  # "yes → no", one a round
    reasons: tuple[str, ...]


@dataclass(slots=True)
class RowFile:
    """The index of one file. `unfinished`: its last line is being written, or was cut off."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    unfinished: bool = False
    _stamp: tuple[int, int, int] = (0, 0, 0)
    _end: int = 0  # the byte behind the last whole line
    _last: tuple[int, bytes] = (0, b"")  # where the last whole line begins, and the line
    _lines: int = 0
    _places: dict[str, int] = field(default_factory=dict)

    def refresh(self) -> None:
        """Read what came since the last time: all, if the file is another one now. Raises BadInputError."""
        try:
            with open(self.path, "rb") as file:
                facts = os.fstat(file.fileno())
                stamp = facts.st_size, facts.st_mtime_ns, facts.st_ino
                if stamp == self._stamp:
                    return
                if not self._goes_on(file, facts.st_size):
                    self._forget()
                self._read(file)
                self._stamp = stamp
        except FileNotFoundError:
            self._forget()
        except OSError as error:
            raise BadInputError(f"cannot read {show(self.path)}: {error.strerror}", "check the path") from None

    def example(self, row: Row) -> Example:
        """The row itself. Raises BadInputError if another one stands there by now."""
        try:
            with open(self.path, "rb") as file:
                file.seek(row.offset)
                found = parse_line(file.readline())
            example = from_row(found, f"{show(self.path)}:{row.number}")
        except (OSError, ValueError):
            example = None
        if example is None or example.id != row.id:
            self._stamp = (0, 0, 0)
            raise BadInputError(f"{show(self.path)} has changed since the page was made", "look again")
        return example

    def row(self, id: str) -> Row | None:
        """The row with that id; None if there is none."""
        rows, place = self.rows, self._places.get(id, -1)
        return rows[place] if 0 <= place < len(rows) and rows[place].id == id else None

    def _goes_on(self, file: BinaryIO, size: int) -> bool:
        """True if the lines of the index still stand in the file, as far as its last one tells."""
        start, line = self._last
        file.seek(start)
        return size >= self._end and file.read(len(line)) == line

    def _forget(self) -> None:
        self.rows, self.faults, self._places = [], [], {}
        self._end, self._last, self._lines, self.unfinished, self._stamp = 0, (0, b""), 0, False, (0, 0, 0)

    def _read(self, file: BinaryIO) -> None:
        self.unfinished = False
        file.seek(self._end)
        for raw in file:
            if not raw.endswith(b"\n"):
                self.unfinished = True
                return
            self._lines += 1
            if raw.strip():
                self._take(raw, f"{show(self.path)}:{self._lines}")
            self._last = self._end, raw
            self._end += len(raw)

    def _take(self, raw: bytes, place: str) -> None:
        try:
            row = check_line(parse_line(raw), place)
        except BadInputError as error:
            self.faults.append(str(error).partition(";")[0])
            return
        except ValueError as error:
            self.faults.append(f"{place} {error}")
            return
        self._places[row["id"]] = len(self.rows)
        self.rows.append(_indexed(row, self._end, self._lines))


def _indexed(row: dict[str, Any], offset: int, number: int) -> Row:
    rounds = row["rounds"]
    return Row(
        offset,
        number,
        row["id"],
        tuple(label(one["principle_id"]) for one in rounds),
        tuple(change(one["verdict_before"], one["verdict_after"]) for one in rounds),
        tuple(label(reason) for reason in row.get("reject_reasons", ())),
    )


def change(before: str, after: str) -> str:
    """What the verdict on a principle was before a round and after it, to filter by: "yes → no"."""
    return label(f"{before or 'not asked'} → {after or NOT_REVISED}")


def label(name: str) -> str:
    """A name from a file in one line, as a page lists it; kept once however often it comes."""
    return sys.intern(visible(shortened(" ".join(name.split()), LABEL)) or NAMELESS)


_FILES: OrderedDict[Path, RowFile] = OrderedDict()
_LOCK = threading.Lock()


def row_file(path: Path) -> RowFile:
    """The index of a file, up to date; that of a file which is not there is empty. Raises BadInputError."""
    with _LOCK:
        found = _FILES.pop(path, None) or RowFile(path)
        _FILES[path] = found
        while len(_FILES) > KEPT:
            _FILES.popitem(last=False)
        found.refresh()
        return found
