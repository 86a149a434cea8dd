"""The guard's pass over accepted pairs: one journal line for each verdict, so a killed pass asks for the rest alone.

A line is {"kind": "guard", "id", "text", "safe", "categories", "raw"}, with "error" where the engine failed. "text" is
a digest of what was judged: a verdict holds for its text, not for its id, so that an answer which had to be made anew
(a damaged journal line, on a GPU) is judged anew.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable, Iterator, Mapping

from cai_experiment.engines.guard import CATEGORY_WORDS, Guard, GuardVerdict, Row
from cai_experiment.errors import EngineError
from cai_experiment.pipeline.stages import PROMPT_TOO_LONG
from cai_experiment.records.store import Journal

KIND = "guard"
ATTEMPTS = 3  # the first and at most two more for a row on which the engine failed
EXPECTED = (1, 33)  # turned down of so many: 3% more of 5,000 pairs take no longer than loading 32B once more does
MAX_FAILURES = 30  # in a row, over all rows: then it is the engine that is broken

Verdicts = dict[tuple[str, str], GuardVerdict]  # by (id, digest)


@dataclass(slots=True)
class GuardCounts:
    """What a pass came to, verdicts of earlier sessions included. One unsafe answer may have several categories."""

    safe: int = 0
    unsafe: int = 0
    unparsed: int = 0  # replies that are no verdict, and rows on which the engine failed
    failed: int = 0  # of those unparsed: the engine failed, or the row is too long for the guard
    asked: int = 0  # in this session
    categories: Counter[str] = field(default_factory=Counter)  # of the unsafe

    def add(self, verdict: GuardVerdict) -> None:
        """Count one verdict."""
        self.safe += verdict.safe is True
        self.unsafe += verdict.safe is False
        self.unparsed += verdict.safe is None
        self.failed += bool(verdict.error)
        self.categories.update(verdict.categories)

    @property
    def judged(self) -> int:
        """All answers that were put to the guard."""
        return self.safe + self.unsafe + self.unparsed


@dataclass(frozen=True, slots=True)
class Standing:
    """What a journal says of some pairs of a run: `counts` of those that were read, and `unread` others.

    Of all that the guard ever read in the run `safe` are safe; `share` is the one that it turns down, those of EXPECTED
    counted with them.
    """

    counts: GuardCounts
    unread: int
    safe: int
    share: float


def standing(pairs: Iterable[Row], journal: Journal) -> Standing:
    """How far the guard has come with `pairs`, without asking it."""
    known = read_verdicts(row for _, row in journal.located_rows())
    counts = GuardCounts()
    unread = sum(1 for _ in _unknown(pairs, known, counts))
    safe = sum(verdict.safe is True for verdict in known.values())
    return Standing(counts, unread, safe, (len(known) - safe + EXPECTED[0]) / (len(known) + EXPECTED[1]))


def spare_for(pairs: int, share: float) -> int:
    """How many more than `pairs` to make, of which the guard turns `share` down, so that `pairs` will be left.

    Two standard deviations above the mean, so that they are too few in about one case of forty.
    """
    return math.ceil((pairs + 2 * math.sqrt(pairs * share)) / (1 - share)) - pairs


def guard_pass(
    pairs: Iterable[Row], guard: Guard, journal: Journal, seen: Callable[[GuardVerdict], None] = lambda verdict: None
) -> GuardCounts:
    """Put every (id, instruction, chosen) that the journal holds no verdict of to the guard, in any order.

    Each verdict is appended as it comes, then handed to `seen` (a bar, a log). A row on which the engine failed is
    asked again, at most twice here, and anew in the next session. Raises EngineError if the engine fails many times
    running, DiskError if the journal cannot be written; what was appended before is kept.
    """
    known = read_verdicts(row for _, row in journal.located_rows())
    work = _Pass(guard, journal, seen)
    todo: Iterable[Row] = _unknown(pairs, known, work.counts)
    for attempt in range(1, ATTEMPTS + 1):
        todo = work.run(todo, attempt)
    return work.counts


class _Pass:
    """One session's state: what is in flight, what came back."""

    def __init__(self, guard: Guard, journal: Journal, seen: Callable[[GuardVerdict], None]) -> None:
        self.guard, self.journal, self.seen = guard, journal, seen
        self.counts = GuardCounts()
        self.in_flight: dict[str, Row] = {}
        self.failed_in_a_row = 0

    def run(self, rows: Iterable[Row], attempt: int) -> list[Row]:
        """Judge `rows`; gives those to be asked again, none after the last attempt."""
        failed: list[Row] = []
        for verdict in self.guard.judge(self._feed(rows)):
            row = self.in_flight.pop(verdict.id)
            if attempt == 1:  # among all the others; the rows of later attempts have failed before
                self._note_failure(verdict)
            if is_failure(verdict.error) and attempt < ATTEMPTS:
                failed.append(row)
                continue
            self.journal.append(to_line(row, verdict))
            self.counts.asked += 1
            self.counts.add(verdict)
            self.seen(verdict)
        if self.in_flight:
            ids = ", ".join(list(self.in_flight)[:3])
            message = f"the guard gave no verdict of {len(self.in_flight)} rows ({ids})"
            raise EngineError(message, "run the same command again")
        return failed

    def _feed(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            self.in_flight[row[0]] = row
            yield row

    def _note_failure(self, verdict: GuardVerdict) -> None:
        self.failed_in_a_row = self.failed_in_a_row + 1 if is_failure(verdict.error) else 0
        if self.failed_in_a_row >= MAX_FAILURES:
            message = f"the guard failed {MAX_FAILURES} times running, last on {verdict.id}: {verdict.error}"
            raise EngineError(message, "mend it and run the same command again, or use --no-guard")


def is_failure(error: str) -> bool:
    """True for an engine's error that another try may mend; a row too long for the guard stays so."""
    return bool(error) and PROMPT_TOO_LONG not in error


def _unknown(pairs: Iterable[Row], known: Verdicts, counts: GuardCounts) -> Iterator[Row]:
    """The rows without a verdict; the verdicts of the others are counted as their rows come by."""
    for row in pairs:
        verdict = known.get(verdict_key(*row))
        if verdict is None:
            yield row
        else:
            counts.add(verdict)


# ---------------------------------------------------------------- the journal's lines


def verdict_key(id: str, instruction: str, answer: str) -> tuple[str, str]:
    """What a verdict is found by: the example's id and a digest of the judged texts."""
    texts = f"{len(instruction)} {instruction}{answer}".encode("utf-8", "surrogatepass")
    return id, hashlib.sha256(texts).hexdigest()[:16]


def to_line(row: Row, verdict: GuardVerdict) -> dict[str, Any]:
    """The journal's line of a verdict."""
    id, digest = verdict_key(*row)
    line = {"kind": KIND, "id": id, "text": digest, "safe": verdict.safe, "categories": list(verdict.categories)}
    return {**line, "raw": verdict.raw, **({"error": verdict.error} if verdict.error else {})}


def read_verdicts(rows: Iterable[Mapping[str, Any]], failures: bool = False) -> Verdicts:
    """The verdicts among a journal's rows, by `verdict_key`; engine failures, to be asked again, if `failures`."""
    return {
        (row["id"], row["text"]): GuardVerdict(
            row["id"], row["safe"], tuple(row["categories"]), row["raw"], row.get("error", "")
        )
        for row in rows
        if row.get("kind") == KIND and (failures or not is_failure(row.get("error", "")))
    }


# ---------------------------------------------------------------- the report


def category_table(categories: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """(category, words, count) for the report, the most frequent first. Qwen3Guard's categories are words already."""
    ordered = sorted(categories.items(), key=lambda item: (-item[1], item[0]))
    return [(code, CATEGORY_WORDS.get(code, code), count) for code, count in ordered]
