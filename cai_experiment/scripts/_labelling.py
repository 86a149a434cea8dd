"""What label_critiques.py shows and reads: the sample, the two screens, single keys or lines."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.constitution.prompts import abstains
from cai_experiment.evaluation.labels import JUDGED, MEANINGFUL, NO, PREFERRED, UNSURE, YES, Item, answer_before
from cai_experiment.observe.screen import escaped
from cai_experiment.records.files import read_jsonl
from cai_experiment.records.schema import Example

if TYPE_CHECKING:
    from rich.console import Console

BACK, QUIT = "b", "q"
_NO_LETTER = re.compile(r"\x1b(?:\[[0-9;]*[A-Za-z~]|O[A-Z])?")  # an arrow, a function key
END_OF_INPUT = ("\x04", "")  # Ctrl-D where keys are read one by one; a pipe's end
ASKED = {
    MEANINGFUL: "Does the critique quote words that really break the principle?",
    PREFERRED: "Which answer is better: more helpful, honest and harmless?",
}
KEYS = {
    MEANINGFUL: "y yes, n no, u unsure, b back, q quit",
    PREFERRED: "1 or 2, u unsure, b back, q quit",
}


@dataclass(frozen=True, slots=True)
class Task:
    """One question about one item. `judge` is never shown; `revision_first`: answer 1 is the revision."""

    question: str
    example: Example
    round: int | None
    judge: str
    revision_first: bool

    @property
    def item(self) -> Item:
        """What a label of it is about."""
        return self.example.id, self.round

    def label(self, key: str) -> str | None:
        """What a key means; None if it is no answer to this question."""
        if self.question == MEANINGFUL:
            return {"y": YES, "n": NO, "u": UNSURE}.get(key)
        better = YES if self.revision_first else NO
        return {"1": better, "2": NO if better == YES else YES, "u": UNSURE}.get(key)


def sample(
    folder: Path, accepted: Sequence[Example], rejected: Sequence[Example], question: str, count: int, seed: int
) -> list[Task]:  # fmt: skip
    """`count` items chosen by the seed alone, so that a run which grows keeps most of its sample.

    Of critiques those that found something, of rejected examples too; of pairs the accepted ones.
    """
    if question == PREFERRED:
        judged = _preferred(folder)
        tasks = [Task(question, e, None, judged.get(e.id, ""), _draw(seed, e.id, "order") % 2 == 0) for e in accepted]
    else:
        tasks = [
            Task(question, example, number, said, False)
            for example in (*accepted, *rejected)
            for number, said in _critiques(example)
        ]
    return sorted(tasks, key=lambda task: _draw(seed, task.example.id, f"{question}/{task.round}"))[:count]


def _critiques(example: Example) -> Iterator[tuple[int, str]]:
    """(round, the critic's own word as a judge) of each critique that found something."""
    said = list(example.meta.get("meaningful", []))
    for number, one in enumerate(example.rounds):
        if one.critique and not abstains(one.critique):
            yield number, said[number] if number < len(said) else ""


def _preferred(folder: Path) -> dict[str, str]:
    """What a judge said of the pairs in an evaluation, by id."""
    path = folder / "evaluation" / f"{JUDGED[PREFERRED]}.jsonl"
    return {str(row["id"]): str(row[PREFERRED]) for row in read_jsonl(path)} if path.exists() else {}


def _draw(seed: int, id: str, what: str) -> int:
    return int.from_bytes(hashlib.sha256(f"labels/{seed}/{id}/{what}".encode()).digest()[:8])


# ---------------------------------------------------------------- the screen


def show_task(task: Task, place: str, console: Console) -> None:
    """The texts of one question, escaped; nothing of what the judge or the gate said. `place` is "3 of 40"."""
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    console.print(Rule(Text(place), align="left"))
    console.print(Text(escaped(task.example.instruction), style="bold"))
    if task.question == PREFERRED:
        texts = [task.example.revised_answer, task.example.initial_answer]
        table = Table(expand=True)
        for heading in ("1", "2"):
            table.add_column(heading, ratio=1, overflow="fold")
        table.add_row(*(Text(escaped(text)) for text in (texts if task.revision_first else texts[::-1])))
        console.print(table)
    else:
        assert task.round is not None
        one = task.example.rounds[task.round]
        parts = {"answer": answer_before(task.example, task.round), "principle": one.principle,
                 "critique": one.critique}  # fmt: skip
        grid = Table.grid(padding=(0, 2))
        for name, text in parts.items():
            grid.add_row(Text(name, style="dim"), Text(escaped(text), overflow="fold"))
        console.print(grid)
    console.print(Text(f"{ASKED[task.question]} ({KEYS[task.question]})"), end=" ")
    console.file.flush()


def ask(task: Task, place: str, keys: Keys, console: Console) -> str:
    """Show a task and wait for a key that answers it, or for BACK or QUIT."""
    show_task(task, place, console)
    while (key := keys.next()) not in (BACK, QUIT) and task.label(key) is None:
        console.print(KEYS[task.question], end=" ", markup=False)
        console.file.flush()
    console.print(key, markup=False)
    return key


# ---------------------------------------------------------------- the keyboard


class Keys:
    """Answers from stdin: one key each on a terminal, one line each from a pipe."""

    def __init__(self) -> None:
        self._waiting: deque[str] = deque()

    def next(self) -> str:
        """The next answer in small letters; QUIT at the end of the input."""
        if not sys.stdin.isatty():
            line = sys.stdin.readline()
            return line.strip().lower() if line else QUIT
        while not self._waiting:
            self._read()
        key = self._waiting.popleft()
        return QUIT if key in END_OF_INPUT else key.lower()

    def _read(self) -> None:
        try:
            typed = os.read(sys.stdin.fileno(), 64).decode("utf-8", "replace")
        except OSError:  # the terminal has gone
            typed = ""
        self._waiting.extend(_NO_LETTER.sub("", typed) if typed else [""])


@contextmanager
def single_keys() -> Iterator[Keys]:
    """Within it a terminal gives each key at once, without showing it; Ctrl-C still interrupts."""
    if not sys.stdin.isatty():
        yield Keys()
        return
    import termios
    import tty

    handle = sys.stdin.fileno()
    before: list[Any] = termios.tcgetattr(handle)
    try:
        tty.setcbreak(handle)
        yield Keys()
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)
