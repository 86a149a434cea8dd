"""What a kill costs: which prompts an engine held when its process died, and which of them were asked again."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_experiment.engines.base import Completion, Prompt

SLOTS, WEIGHED = b"slots ", b"weighed "


class Logged:
    """An engine that writes the id of each prompt into a file before it begins with it; a kill -9 loses none."""

    def __init__(self, engine: Any, path: Path) -> None:
        """`engine` says by `slots` how many conversations it holds at most."""
        self.engine, self.name, self.first_line = engine, engine.name, engine.first_line
        self._log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def describe(self) -> dict[str, object]:
        """The engine's own."""
        return self.engine.describe()

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """As the engine does it."""
        self._write(SLOTS + str(self.engine.slots).encode())
        return self.engine.stream(self._noted(prompts))

    def _noted(self, prompts: Iterable[Prompt | None]) -> Iterator[Prompt | None]:
        for prompt in prompts:
            if prompt is not None:
                self._write(WEIGHED * bool(prompt.options) + prompt.id.encode())
            yield prompt

    def _write(self, line: bytes) -> None:
        os.write(self._log, b"\n" + line + b"\n")  # a torn line stays a line of its own


@dataclass(frozen=True, slots=True)
class Session:
    """One process of a run: what its engine was asked, how many conversations it held, what it left in the journal.

    `weighed` are those of `asked` that speak no token. `lines` and `digest` are of the whole lines that stood in the
    journal when it ended.
    """

    asked: tuple[str, ...]
    slots: int
    lines: int
    digest: str
    killed: bool
    weighed: frozenset[str] = frozenset()

    def conversations(self, ids: Iterable[str]) -> int:
        """How many conversations these prompts are of: an example's verdicts share one, and need one slot together."""
        return len({id.partition("/")[0] if id in self.weighed else id for id in ids})


def read_session(log: Path, since: int, journal: Path, killed: bool) -> Session:
    """The session whose log begins at byte `since`; to be called when its process has ended."""
    words = log.read_bytes()[since:].split(b"\n") if log.exists() else []
    slots = [int(word.removeprefix(SLOTS)) for word in words if word.startswith(SLOTS)]
    lines = [word for word in words if word and not word.startswith(SLOTS)]
    asked = tuple(line.removeprefix(WEIGHED).decode() for line in lines)
    weighed = frozenset(line.removeprefix(WEIGHED).decode() for line in lines if line.startswith(WEIGHED))
    whole = journal.read_bytes() if journal.exists() else b""
    whole = whole[: whole.rfind(b"\n") + 1]
    return Session(asked, max(slots, default=0), whole.count(b"\n"), hashlib.sha256(whole).hexdigest(), killed,
                   weighed)  # fmt: skip


@dataclass(slots=True)
class Tally:
    """Over any number of runs: prompts (and their completions' tokens) in flight at kills, and those asked again."""

    kills: int = 0
    in_flight: int = 0
    tokens_in_flight: int = 0
    redone: int = 0
    tokens_redone: int = 0
    most_in_flight: int = 0

    def __str__(self) -> str:
        return (f"{self.redone:,} prompts ({self.tokens_redone:,} tokens) were asked again, of {self.in_flight:,} "
                f"({self.tokens_in_flight:,} tokens) in flight at {self.kills:,} kills; at most {self.most_in_flight} "
                "in flight at one")  # fmt: skip

    def add(self, sessions: Sequence[Session], journal: Sequence[Mapping[str, Any]]) -> list[str]:
        """Count one run: its sessions in order and its whole journal. Gives what is wrong.

        A run that has all its pairs lets go of what is in flight, so its last session counts as holding nothing.
        """
        finished = [row["id"] if row.get("finish") in ("stop", "length") else "" for row in journal]
        tokens = {row["id"]: int(row.get("completion_tokens", 0)) for row in journal if "id" in row}
        wrong: list[str] = []
        before: set[str] = set()  # asked in earlier sessions
        known: set[str] = set()  # finished when this session began
        held: Counter[str] = Counter()
        again: Counter[str] = Counter()
        for number, session in enumerate(sessions, 1):
            asked = set(session.asked)
            wrong += [f"session {number} asked for {id}, which was finished" for id in sorted(asked & known)]
            again.update(asked & before)
            before |= asked
            known = set(finished[: session.lines]) - {""}
            if number < len(sessions):
                flying = asked - known
                held.update(flying)
                self.most_in_flight = max(self.most_in_flight, len(flying))
                if (cost := session.conversations(flying)) > session.slots:
                    wrong.append(f"kill {number} cost prompts of {cost} conversations, and the engine holds "
                                 f"{session.slots}")  # fmt: skip
        wrong += [f"{id} was asked again more often than it was in flight" for id in again if again[id] > held[id]]
        self.kills += sum(session.killed for session in sessions)
        self.in_flight, self.redone = self.in_flight + held.total(), self.redone + again.total()
        self.tokens_in_flight += sum(tokens.get(id, 0) * count for id, count in held.items())
        self.tokens_redone += sum(tokens.get(id, 0) * count for id, count in again.items())
        return wrong


def lost_lines(sessions: Sequence[Session], journal: bytes) -> list[str]:
    """Sessions whose finished lines do not stand, byte for byte, at the beginning of the whole journal."""
    lines = journal.splitlines(keepends=True)
    digest, at, wrong = hashlib.sha256(), 0, []
    for number, session in sorted(enumerate(sessions, 1), key=lambda one: one[1].lines):
        for line in lines[at : session.lines]:
            digest.update(line)
        at = max(at, session.lines)
        if at > len(lines) or digest.hexdigest() != session.digest:
            wrong.append(f"session {number} had finished lines that are not in the journal any more")
    return wrong
