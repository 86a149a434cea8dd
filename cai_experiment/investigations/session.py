"""One investigation: tasks in turn, replies with code that runs, output that comes back; resumes at the next turn.

Every finished turn is a line of the journal: the reply, what its blocks gave, the notes they made. What the model is
given follows from these and from the settings, so a resumed session goes through the same steps, speaking only where
the journal ends. Sampling is keyed by (seed, turn) and not by the condition: sessions under two conditions are the same
to the letter up to the turn in which their documents differ, and what differs afterwards is due to them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines.base import Engine, Prompt, Sampling
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.investigations import prompts
from cai_experiment.investigations.conditions import DocumentSet
from cai_experiment.investigations.notes import Notebook
from cai_experiment.investigations.reply import MOST_BLOCKS, Reply, ends_task, read_reply, shortened_middle
from cai_experiment.investigations.room import OUTPUT_SHARE, UNREAD_SHARE, Room, Shares
from cai_experiment.investigations.tasks import MOST_QUESTIONS, Stage, as_tasks, questions_in
from cai_experiment.records.manifest import FRESH
from cai_experiment.records.store import Journal

IDLE = 2  # replies in a row without code and without an end


class Runs(Protocol):
    """What runs a block of code: the sandbox. Its outcome is an `investigations.sandbox.Outcome`."""

    def run(self, code: str) -> Any:
        """Run in a fresh process; never raises for what the code does."""
        ...


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """What decides a session, its model and documents aside."""

    task_turns: int = 6  # replies a task, at most
    reply_tokens: int = 700  # new ones a reply, at most
    temperature: float = 0.7
    seed: int = 0
    finish_phrase: str = prompts.FINISH


@dataclass(frozen=True, slots=True)
class Said:
    """One turn as it is saved. `documents` are the names of those that arrived in it.

    `unread`: the conversation ended with this turn, since the context had no room for a reply to it.
    """

    role: str
    task: str
    text: str
    tokens: int
    documents: tuple[str, ...] = ()
    finish: str = ""
    blocks: tuple[dict[str, Any], ...] = ()
    notes: tuple[int, ...] = ()
    unread: bool = False


@dataclass(slots=True)
class Session:
    """A session at work. `run()` brings it to its end; then `said`, `ends` and `notebook` tell what happened."""

    settings: SessionSettings
    stages: Sequence[Stage]
    documents: DocumentSet
    engine: Engine
    sandbox: Runs
    notebook: Notebook
    journal: Journal
    watch: Callable[[dict[str, Any]], None] = lambda row: None  # told of each finished turn, its journal row
    reserve: int = 0  # tokens that the documents of any condition take, kept free under all alike
    absent: Sequence[Stage] = ()  # tasks of other conditions, whose room is kept free as well
    said: list[Said] = field(default_factory=list)
    ends: list[tuple[str, str]] = field(default_factory=list)  # (task, why it ended)
    questions: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    _turns: list[Turn] = field(default_factory=list)
    _known: Iterator[dict[str, Any]] = field(default_factory=lambda: iter(()))
    _room: Room = field(init=False)
    _shares: Shares = field(init=False)

    @property
    def finish(self) -> str:
        """Why the session ended: as its last task did, or for want of room."""
        return self.ends[-1][1] if self.ends else ""

    def run(self) -> None:
        """Work through all tasks. Raises BadInputError for a journal of other tasks, EngineError if a reply fails."""
        self._room = Room(self.engine, self.settings.reply_tokens)
        self._shares = Shares(self._room, self.reserve)
        self._known = iter(self.journal.rows())
        queue, unread = deque(self.stages), ""
        while queue:
            stage = queue.popleft()
            why, unread = self._work_on(stage, [*queue, *self.absent], unread)
            self.ends.append((stage.name, why))
            if self.said[-1].role == "user":  # not even one reply to the task
                self.said[-1] = replace(self.said[-1], unread=True)
                if not self.rows:
                    raise self._no_room()
                return
            if stage.names_questions:
                queue.extendleft(reversed(as_tasks(self.questions)))

    def _no_room(self) -> BadInputError:
        kept = f" and {self.reserve} tokens for documents, under every condition" if self.reserve else ""
        return BadInputError(
            f"the first task does not fit in a context of {self._room.context} tokens, beside a reply to each later "
            f"task{kept}", "use a model with a longer context, a larger --max-tokens or shorter documents",
        )  # fmt: skip

    def _work_on(self, stage: Stage, later: Sequence[Stage], unread: str) -> tuple[str, str]:
        """One task, from the turn that gives it: (why it ended, output that the model has not read yet)."""
        self.notebook.stage = stage.name
        self._give_task(stage, _texts_of(stage, later), unread)
        idle = 0
        for left in range(self.settings.task_turns - 1, -1, -1):
            row = self._reply(stage)
            if row is None:
                return self._room.reason, ""
            reply, output = read_reply(row["text"]), _output_of(row)
            if stage.names_questions and (named := questions_in(reply.prose)):
                self.questions = named
                return "questions", output
            ends = ends_task(reply, self.settings.finish_phrase)
            if ends and not (left and _printed(row)):
                return "phrase", output
            idle = 0 if row["blocks"] else idle + 1
            if idle == IDLE or not left:
                return ("idle" if idle == IDLE else "turns"), output
            text = self._feedback(stage, output, left, ends)
            if not self._room.for_reply([*self._turns, Turn("output", text)], self._shares.limit, self._shares.reply):
                return self._room.reason, output
            self._give("output", stage, text)
        raise AssertionError("a task has at least one turn")

    # ------------------------------------------------------------ what the model is given

    def _give_task(self, stage: Stage, later: Sequence[str], unread: str) -> None:
        chosen = self.documents.chosen if stage.documents else ()
        shown = prompts.show_documents([(one.title, one.text) for one in chosen]) if chosen else ""
        first, phrase = not self._turns, self.settings.finish_phrase
        unread = self._room.shortened(unread, int(self._shares.each(self._turns, later, 1) * UNREAD_SHARE))
        bare = prompts.give_task(stage.name, stage.text, phrase, first, "", unread)
        turn = prompts.give_task(stage.name, stage.text, phrase, first, shown, unread)
        self._shares.begin(self._turns, bare, turn, later, self.settings.task_turns)
        self._give(turn.kind, stage, turn.text, tuple(one.name for one in chosen))

    def _feedback(self, stage: Stage, output: str, left: int, ended: bool) -> str:
        room = self._shares.limit - self._room.used(self._turns)
        output = self._room.shortened(output, int(room * OUTPUT_SHARE))
        if ended:  # a model that writes code and its end in one breath has not seen what it concludes from
            return f"{output}\n\n{prompts.read_first(self.settings.finish_phrase)}"
        if stage.names_questions:
            output = "\n\n".join(filter(None, (output, prompts.encourage_questions())))
        output = output or prompts.encourage(self.settings.finish_phrase)
        return output if left > 1 else f"{output}\n\n{prompts.last_reply(self.settings.finish_phrase)}"

    def _give(self, kind: str, stage: Stage, text: str, documents: tuple[str, ...] = ()) -> None:
        self._turns.append(Turn(kind, text))
        self.said.append(Said("user", stage.name, text, self._room.tokens_of(text), documents))

    # ------------------------------------------------------------ what it replies

    def _reply(self, stage: Stage) -> dict[str, Any] | None:
        """The next reply with what its code gave, from the journal or from the model; None if it finds no room."""
        row = next(self._known, None)
        if row is None:
            row = self._speak(stage)
            if row is None:
                return None
            self.journal.append(row)
            self.watch(row)
        else:
            if row.get("turn") != len(self.rows) or row.get("task") != stage.name:
                raise BadInputError(f"{self.journal.path} holds a turn of other tasks", FRESH)
            self.notebook.take_back(row["notes"])
        self.rows.append(row)
        self._turns.append(Turn(prompts.SPEAKS, row["text"]))
        notes = tuple(note["id"] for note in row["notes"])
        self.said.append(Said("assistant", stage.name, row["text"], row["written"], (), row["finish"],
                              tuple(row["blocks"]), notes))  # fmt: skip
        return row

    def _speak(self, stage: Stage) -> dict[str, Any] | None:
        number, began = len(self.rows), time.monotonic()
        room = self._room.for_reply(self._turns, self._shares.limit, self._shares.reply)
        if not room:
            return None
        key = f"investigation/{number}"
        sampling = Sampling(self.settings.temperature, room, self.settings.seed, key)
        prompt = Prompt(key, tuple(self._turns), prompts.SPEAKS, sampling)
        (said,) = list(self.engine.stream([prompt]))  # to its end: an engine tidies up behind the last completion
        if said.finish == "error":
            raise EngineError(f"turn {number}: {said.error}", "the same command goes on at this turn")
        before = len(self.notebook)
        blocks = [self._run(code) for code in _runnable(read_reply(said.text), said.finish)]
        return {
            "turn": number, "task": stage.name, "text": said.text, "finish": said.finish, "blocks": blocks,
            "notes": self.notebook.after(before), "read": said.prompt_tokens, "written": said.completion_tokens,
            "seconds": round(time.monotonic() - began, 3), "sandbox": getattr(self.sandbox, "tier", ""),
        }  # fmt: skip

    def _run(self, code: str | None) -> dict[str, Any]:
        """Run one block; None stands for one that must not run."""
        if code is None:
            return {"code": "", "ran": False, "shown": "(not run: the reply was cut here, or has too many blocks)"}
        done = self.sandbox.run(code)
        most = self._room.shown_characters
        error = done.stopped or ("" if done.ok else _last_line(done.stderr) or f"exit code {done.exit_code}")
        return {
            "code": code, "ran": True, "stdout": done.stdout, "stderr": done.stderr, "exit_code": done.exit_code,
            "stopped": done.stopped, "truncated": done.truncated, "error": error,
            "shown": (shortened_middle(done.stdout, most), shortened_middle(done.stderr, most // 2)),
        }  # fmt: skip


def _runnable(reply: Reply, finish: str) -> list[str | None]:
    """The blocks to run, None for those that must not: one that the token limit cut, and those beyond MOST_BLOCKS.

    A last block that simply lacks its closing fence is run.
    """
    blocks: list[str | None] = list(reply.blocks)
    if reply.cut and finish == "length":
        blocks[-1] = None
    return [*blocks[:MOST_BLOCKS], *([None] if len(blocks) > MOST_BLOCKS else [])]


def _texts_of(stage: Stage, later: Sequence[Stage]) -> list[str]:
    """The texts of the tasks after `stage`; questions that it has yet to name count as long as itself."""
    named = [stage.text] * MOST_QUESTIONS if stage.names_questions else []
    return [*named, *(one.text for one in later)]


def _output_of(row: dict[str, Any]) -> str:
    """What the model reads of its blocks' output; empty if it wrote none."""
    shown = []
    for number, block in enumerate(row["blocks"], 1):
        stdout, stderr = block["shown"] if block["ran"] else (block["shown"], "")
        shown.append(prompts.show_output(number, stdout, stderr, block.get("stopped", "")))
    return "\n\n".join(shown)


def _printed(row: dict[str, Any]) -> bool:
    return any(block["ran"] and (block["stdout"].strip() or block["error"]) for block in row["blocks"])


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
