"""The files that follow from the journal: instructions.jsonl, pairs.jsonl and rejected.jsonl, in instruction order.

A run that is resumed writes them again from their first line; as the same journal gives the same lines, what stands
there already is read and kept, and only from the first difference on is anything written. So memory does not grow
with the run, and a reader of pairs.jsonl never sees it become shorter while the same run goes on.
"""

from __future__ import annotations

import math
import os
from array import array
from collections import Counter
from pathlib import Path
from typing import Any, Mapping

from cai_experiment.pipeline.instruct import Instruction
from cai_experiment.pipeline.length_matching import BLOCK, LengthMatcher
from cai_experiment.records.files import encode_line, writing_error
from cai_experiment.records.schema import Example, to_row


class DerivedFile:
    """A JSONL file written from its first line, which keeps an equal beginning.

    Raises DiskError or BadInputError where the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise writing_error(path, error) from error
        self._keeping = True
        self._ends = array("q", [0])  # byte offset behind each row

    def write(self, row: Mapping[str, Any]) -> None:
        """Write the next row; the line is in the kernel's hands when this returns."""
        line = encode_line(row, strict=True)
        try:
            if self._keeping and self._file.read(len(line)) != line:
                self._file.seek(self._ends[-1])
                self._file.truncate()
                self._keeping = False
            if not self._keeping:
                self._file.write(line)
                self._file.flush()
            self._ends.append(self._ends[-1] + len(line))
        except OSError as error:
            raise writing_error(self.path, error) from error

    def end_after(self, rows: int) -> None:
        """Cut off what stands behind the first `rows` rows, be it from this run or from an earlier, longer one."""
        try:
            self._file.truncate(self._ends[rows])
            os.fsync(self._file.fileno())
        except OSError as error:
            raise writing_error(self.path, error) from error

    def close(self) -> None:
        """Close the file as it stands."""
        self._file.close()


class Outputs:
    """Takes finished examples in any order and writes them in instruction order, until `target` were accepted.

    Examples behind the last accepted one are not written: which of them were begun depends on timing. With a `matcher`
    the examples of a block are written once it is full, some of the accepted ones as surplus; with `whole_blocks` the
    last block is written to its end, beyond `target`.
    """

    def __init__(
        self, folder: Path, target: int | None, matcher: LengthMatcher | None = None, whole_blocks: bool = False
    ) -> None:
        self.target, self._whole_blocks = target, whole_blocks
        self.accepted = 0
        self.rejected = 0
        self.reasons: Counter[str] = Counter()
        self._matcher = matcher
        self.taken = 0  # examples that were taken in order
        self._blocks = 0  # of the matcher that were decided on
        self._waiting: dict[int, Example] = {}
        self._instructions = DerivedFile(folder / "instructions.jsonl")
        self._pairs = DerivedFile(folder / "pairs.jsonl")
        self._rejected = DerivedFile(folder / "rejected.jsonl")

    @property
    def written(self) -> int:
        """How many examples stand in the files; also the index of the next one."""
        return self.accepted + self.rejected

    @property
    def complete(self) -> bool:
        """True when `target` pairs stand in pairs.jsonl."""
        return self.target is not None and self.accepted >= self.target

    @property
    def wanted(self) -> int | None:
        """How many examples must pass the gate in all, as far as is known: `target`, or whole blocks of the matcher."""
        if self.target is None or self._matcher is None:
            return self.target
        return BLOCK * (self._blocks + math.ceil((self.target - self.accepted) / BLOCK))

    def list_instruction(self, instruction: Instruction) -> None:
        """Write the next row of the work list."""
        self._instructions.write({"id": instruction.id, "instruction": instruction.text, "source": instruction.source})

    def take(self, index: int, example: Example) -> list[tuple[int, Example]]:
        """One finished example; writes what can be written now, and gives back (index, line as written) of each."""
        self._waiting[index] = example
        written: list[tuple[int, Example]] = []
        while not self.complete and self.taken in self._waiting:
            one = self._waiting.pop(self.taken)
            self.taken += 1
            written += self._write_all([one] if self._matcher is None else self._match(self._matcher, one))
        return written

    def rest(self) -> list[tuple[int, Example]]:
        """Write what waits for its block to be full: no more will come. Gives back what `take` does."""
        return [] if self._matcher is None else self._write_all(self._matcher.rest())

    def finish(self) -> None:
        """The run is over: cut off whatever does not belong to it."""
        self._instructions.end_after(self.written)
        self._pairs.end_after(self.accepted)
        self._rejected.end_after(self.rejected)

    def close(self) -> None:
        """Close the files as they stand."""
        for file in (self._instructions, self._pairs, self._rejected):
            file.close()

    def _match(self, matcher: LengthMatcher, example: Example) -> list[Example]:
        block = matcher.take(example)
        self._blocks += bool(block)
        return block

    def _write_all(self, examples: list[Example]) -> list[tuple[int, Example]]:
        """Write `examples`, in general up to the last pair that is wanted."""
        written: list[tuple[int, Example]] = []
        for example in examples:
            if self.complete and not self._whole_blocks:
                break
            written.append((self.written, example))
            self._write(example)
        return written

    def _write(self, example: Example) -> None:
        if example.reject_reasons:
            self._rejected.write(to_row(example))
            self.reasons.update(example.reject_reasons)
            self.rejected += 1
        else:
            self._pairs.write(to_row(example))
            self.accepted += 1
