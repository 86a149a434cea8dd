"""What earlier sessions of a run left in its journal: completions by prompt id, failures, the guard's verdicts.

A resumed run starts every example anew and asks here before it asks a model. Completions stay in the file until they
are asked for, so a resume needs 16 bytes of memory a line.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Mapping

from cai_experiment.engines.base import Completion
from cai_experiment.engines.guard import GuardVerdict
from cai_experiment.pipeline.guarding import Verdicts, read_verdicts, verdict_key
from cai_experiment.pipeline.stages import exceeds_context
from cai_experiment.records.index import RowIndex
from cai_experiment.records.schema import Example
from cai_experiment.records.store import Journal

ATTEMPTS = 3  # the first and at most two more for a prompt on which the engine failed
# Kinds of lines that follow failures without a completion in between: the run came to its end all the same, so they
# count; or it stopped there, and a later session goes on.
END, RESUMED = "end", "resumed"


class Replies:
    """Reads the journal once, mending it; then answers by prompt id.

    A prompt that the engine refused, or on which it failed ATTEMPTS times, keeps its error, so that a later session
    cannot change what was rejected for it. A failure counts only if something was completed after it: those of a
    broken engine do not. `failures` holds how often the others failed.
    """

    def __init__(self, journal: Journal) -> None:
        self.failures: Counter[str] = Counter()
        self._index = RowIndex(journal)
        self._turned_down: Verdicts = {}  # unsafe, or no verdict that can be read
        uncounted: list[tuple[Completion, int]] = []  # failures that nothing has followed yet
        for offset, row in journal.located_rows():
            completion = _completion(row) if row.get("finish") == "error" else None
            if completion is not None and is_prompts_fault(completion):
                self._index.add(completion.id, offset)
                continue
            if completion is not None:
                uncounted.append((completion, offset))
                continue
            for failed, place in uncounted if row.get("kind") != RESUMED else ():
                self._failed(failed, place)
            uncounted.clear()
            if "finish" in row:
                self._index.add(row["id"], offset)
            else:
                self._take_verdict(row)

        self.ends_in_failures = bool(uncounted)

    def _take_verdict(self, row: Mapping[str, Any]) -> None:
        for key, verdict in read_verdicts([row], failures=True).items():
            if verdict.safe:
                self._turned_down.pop(key, None)  # an earlier session's guard had failed on it
            else:
                self._turned_down[key] = verdict

    def _failed(self, completion: Completion, offset: int) -> None:
        self.failures[completion.id] += 1
        if is_given_up(completion, self.failures[completion.id]):
            self._index.add(completion.id, offset)

    def __len__(self) -> int:
        return len(self._index)

    def get(self, id: str) -> Completion | None:
        """The completion of this prompt, or its last failure; None if it is to be asked."""
        row = self._index.row(id)
        return None if row is None else _completion(row)

    def turned_down(self, example: Example) -> GuardVerdict | None:
        """The guard's verdict on the example's pair if it is not "safe", else None (also where it was not asked)."""
        return self._turned_down.get(verdict_key(example.id, example.instruction, example.revised_answer))


def is_prompts_fault(completion: Completion) -> bool:
    """True for an error that is the prompt's own: it is never asked again, and says nothing of the engine."""
    return completion.final == "prompt" or exceeds_context(completion)


def is_given_up(completion: Completion, failures: int) -> bool:
    """True if a prompt on which the engine failed so often is asked no more."""
    return failures >= ATTEMPTS or completion.final == "attempts"


def _completion(row: Mapping[str, Any]) -> Completion:
    """The completion in a journal row; fields that this version does not know are left out."""
    known = {name: row[name] for name in Completion.__slots__ if name in row}
    return Completion(**known | {"logprobs": tuple(row.get("logprobs", ()))})
