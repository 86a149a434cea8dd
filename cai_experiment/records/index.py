"""Where the rows of a journal stand, by id: two numbers a row, so that a resume holds no row in memory."""

from __future__ import annotations

from array import array
from typing import Any

from cai_experiment.records.store import Journal


class RowIndex:
    """Ids of journal rows and their offsets. Fill it with `add`, in the order of the file; then `row` finds the last
    row that was added for an id.

    It takes 16 bytes a row. An id is kept as its 64-bit hash and compared in full when its row is read.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._hashes, self._offsets = array("q"), array("q")
        self._sorted: tuple[Any, Any] | None = None

    def __len__(self) -> int:
        return len(self._offsets)

    def add(self, id: str, offset: int) -> None:
        """Note that a row with this id stands at `offset` (see `Journal.located_rows`)."""
        self._hashes.append(hash(id))
        self._offsets.append(offset)
        self._sorted = None

    def row(self, id: str) -> dict[str, Any] | None:
        """The last row with this id, read from the file; None if there is none."""
        if not self._offsets:
            return None
        hashes, offsets = self._sorted or self._sort()
        place = int(hashes.searchsorted(hash(id), side="right")) - 1
        if place < 0 or int(hashes[place]) != hash(id):
            return None
        row = self._journal.row_at(int(offsets[place]))
        return row if row.get("id") == id else None

    def _sort(self) -> tuple[Any, Any]:
        """(hashes, offsets) as numpy arrays in order of the hashes; equal ones stay in the order of the file."""
        import numpy

        hashes = numpy.frombuffer(self._hashes, dtype=numpy.int64)
        order = hashes.argsort(kind="stable")
        self._sorted = hashes[order], numpy.frombuffer(self._offsets, dtype=numpy.int64)[order]
        return self._sorted
