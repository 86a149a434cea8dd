"""Sessions in their folders: one that is finished is not repeated, one that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cai_experiment.engines.base import Engine
from cai_experiment.errors import BadInputError
from cai_experiment.investigations import prompts
from cai_experiment.investigations.conditions import Document, DocumentSet, fitting, stages_of
from cai_experiment.investigations.introspection import Introspection
from cai_experiment.investigations.notes import Notebook
from cai_experiment.investigations.room import Room
from cai_experiment.investigations.saved import FILES, JOURNAL, SUMMARY, save
from cai_experiment.investigations.session import Runs, Session, SessionSettings
from cai_experiment.investigations.tasks import REVISE, Stage, tasks_of
from cai_experiment.investigations.turn_ends import whole_replies
from cai_experiment.records.files import make_folder, read_json
from cai_experiment.records.store import Journal

Functions = Mapping[str, Callable[..., Any]]
NO_DOCUMENTS = DocumentSet(())
SLACK = 8  # tokens by which a text may grow or shrink behind another one


def _told_nothing(row: dict[str, Any]) -> None:
    """The watcher of a session that nobody watches."""


@dataclass(frozen=True, slots=True)
class Investigation:
    """What all sessions of a run share. `sandbox_for` makes a sandbox that serves the functions it is given.

    `heritage` and `other` are all documents of both sets; each session takes those that fit the model's context.
    """

    model: str
    engine: Engine
    sandbox_for: Callable[[Functions], Runs]
    heritage: Sequence[Document]
    other: Sequence[Document]
    style: str = "guided"
    settings: SessionSettings = field(default_factory=SessionSettings)

    def run(
        self, folder: Path, condition: str, repeat: int = 0, tasks: Sequence[Stage] = (),
        watch: Callable[[dict[str, Any]], None] = _told_nothing,
    ) -> dict[str, Any]:  # fmt: skip
        """Bring one session to its end, or show a finished one; gives its summary.

        `repeat` counts from 0 and is added to the seed. `tasks` default to the style's. Raises BadInputError for
        documents that do not fit, EngineError if the model fails, DiskError.
        """
        if is_finished(folder):
            return read_json(folder / SUMMARY)
        settings = replace(self.settings, seed=self.settings.seed + repeat)
        heritage, other = self.document_sets(condition)
        shown = {"none": NO_DOCUMENTS, "wrong": other}.get(condition, heritage)
        make_folder(folder)
        notebook, journal = Notebook(), Journal(folder / JOURNAL)
        sandbox = self.sandbox_for(Introspection(self.engine, notebook).functions())
        stages = stages_of(condition, tasks or tasks_of(self.style))
        session = Session(settings, stages, shown, self.engine, sandbox, notebook, journal, watch)
        if condition != "none" or not tasks:  # tasks of one's own without documents are compared with no condition
            session.reserve = self.kept_for_documents()
            session.absent = () if condition == "delayed" else (REVISE,)
        try:
            with whole_replies(self.engine):
                session.run()
        finally:
            journal.close()
        about = {"model": self.model, "condition": condition, "style": self.style, **asdict(settings)}
        save(folder, session, about, heritage, other)
        return read_json(folder / SUMMARY)

    def document_sets(self, condition: str) -> tuple[DocumentSet, DocumentSet]:
        """(documents, those of another subject) that fit the model's context.

        A set of which none fits serves as a measure, whole; BadInputError if `condition` is to show it.
        """
        room = Room(self.engine, self.settings.reply_tokens)

        def fit(documents: Sequence[Document], shown: bool) -> DocumentSet:
            try:
                return fitting(documents, room.tokens_of, room.context)
            except BadInputError:
                if shown:
                    raise
                return DocumentSet(tuple(documents))

        return fit(self.heritage, condition not in ("none", "wrong")), fit(self.other, condition == "wrong")

    def kept_for_documents(self) -> int:
        """Tokens that the longer of both sets takes in a turn, of each the documents that fit the model's context."""
        room = Room(self.engine, self.settings.reply_tokens)

        def size(documents: Sequence[Document]) -> int:
            try:
                chosen = fitting(documents, room.tokens_of, room.context).chosen
            except BadInputError:  # no session can show them
                return 0
            shown = prompts.show_documents([(one.title, one.text) for one in chosen])
            with_them, without = (prompts.give_task("", "", "", False, text) for text in (shown, ""))
            return room.used([with_them]) - room.used([without]) + SLACK

        return max(size(self.heritage), size(self.other))


def session_folder(run: Path, condition: str, repeat: int = 0) -> Path:
    """Where a session's files are: the condition's folder, and in it those of further repeats."""
    return run / condition / f"repeat-{repeat + 1:02d}" if repeat else run / condition


def is_finished(folder: Path) -> bool:
    """True if all files of a session are there."""
    return all((folder / name).is_file() for name in FILES)


def turns_done(folder: Path) -> tuple[int, str]:
    """(turns in a session's journal, the sandbox tier of the last one); a torn last line is not mended here."""
    path = folder / JOURNAL
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    try:
        return len(lines), str(json.loads(lines[-1])["sandbox"]) if lines else ""
    except (ValueError, TypeError, KeyError):
        return len(lines), ""
