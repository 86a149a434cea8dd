"""The files of a finished session: conversation.json and .md, notes.json, summary.json; no clock times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cai_experiment.investigations.conditions import DocumentSet
from cai_experiment.investigations.measures import measured
from cai_experiment.investigations.session import Said, Session
from cai_experiment.records.files import write_atomic, write_json

CONVERSATION, NOTES, SUMMARY, JOURNAL = "conversation.json", "notes.json", "summary.json", "journal.jsonl"
FILES = (CONVERSATION, "conversation.md", NOTES, SUMMARY)


def save(folder: Path, session: Session, about: dict[str, Any], heritage: DocumentSet, other: DocumentSet) -> None:
    """Write the four files, the summary last: it says that the session is finished. Raises DiskError."""
    write_json(folder / CONVERSATION, {**about, "turns": turns_of(session)})
    write_atomic(folder / "conversation.md", [as_markdown(session, about).encode("utf-8", "backslashreplace")])
    write_json(folder / NOTES, {**about, "notes": session.notebook.all()})
    write_json(folder / SUMMARY, {**about, **summary(session), **measured(session, heritage, other)})


def turns_of(session: Session) -> list[dict[str, Any]]:
    """Every turn in order, the user's and the model's."""
    return [{"turn": number, **_turn(said)} for number, said in enumerate(session.said)]


def _turn(said: Said) -> dict[str, Any]:
    shared = {"role": said.role, "task": said.task, "text": said.text, "tokens": said.tokens}
    if said.role == "user":
        return {**shared, "documents": list(said.documents), "unread": said.unread}
    blocks = [{name: value for name, value in one.items() if name != "shown"} for one in said.blocks]
    return {**shared, "finish": said.finish, "code_blocks": blocks, "notes": list(said.notes)}


def summary(session: Session) -> dict[str, Any]:
    """The session in figures. `turns` counts the model's; `errors` the blocks that failed or were stopped.

    `documents_arrive_in_turn` is null where the model read none: under `none`, and where the context was full before.
    """
    blocks = [one for row in session.rows for one in row["blocks"]]
    arrived = [number for number, said in enumerate(session.said) if said.documents and not said.unread]
    return {
        "finish": session.finish,
        "tasks": [{"task": name, "finish": why} for name, why in session.ends],
        "questions": session.questions,
        "documents": session.documents.to_json(),
        "documents_arrive_in_turn": arrived[0] if arrived else None,
        "turns": len(session.rows),
        "tokens": {
            "read": sum(row["read"] for row in session.rows),
            "written": sum(row["written"] for row in session.rows),
            "conversation": sum(said.tokens for said in session.said),
        },
        "code_blocks": sum(one["ran"] for one in blocks),
        "code_blocks_not_run": sum(not one["ran"] for one in blocks),
        "errors": sum(bool(one.get("error")) for one in blocks),
        "stopped": sum(bool(one.get("stopped")) for one in blocks),
        "notes": session.notebook.by_kind(),
    }


def as_markdown(session: Session, about: dict[str, Any]) -> str:
    """The conversation for people."""
    parts = [f"# {about['model']}, condition {about['condition']}, seed {about['seed']}"]
    for number, said in enumerate(session.said):
        who = "Model" if said.role == "assistant" else "Given"
        arrives = f", documents: {', '.join(said.documents)}" if said.documents else ""
        arrives += ", not read: no room for a reply" if said.unread else ""
        parts.append(f"## {number}. {who} ({said.task}, {said.tokens} tokens{arrives})\n\n{said.text.strip()}")
    parts.append(f"Ended: {session.finish}")
    return "\n\n".join(parts) + "\n"
