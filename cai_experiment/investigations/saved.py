"""The files of a finished session: conversation.json and .md, notes.json, summary.json; no clock times."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cai_experiment.investigations.conditions import DocumentSet
from cai_experiment.investigations.measures import measured
from cai_experiment.investigations.session import Said, Session
from cai_experiment.observe.screen import escaped
from cai_experiment.records.files import write_atomic, write_json

CONVERSATION, NOTES, SUMMARY, JOURNAL = "conversation.json", "notes.json", "summary.json", "journal.jsonl"
FILES = (CONVERSATION, "conversation.md", NOTES, SUMMARY)
_OWN_LINE = re.compile(r"(?m)^([ \t]*(?:#{1,2}[ \t]|Ended:))")  # what a text must not forge in conversation.md


def save(folder: Path, session: Session, about: dict[str, Any], heritage: DocumentSet, other: DocumentSet) -> None:
    """Write the four files, the summary last: it says that the session is finished. Raises DiskError."""
    write_json(folder / CONVERSATION, {**about, "turns": turns_of(session)})
    write_atomic(folder / "conversation.md", [as_markdown(session, about).encode("utf-8", "backslashreplace")])
    write_json(folder / NOTES, {**about, "notes": session.notebook.all()})
    write_json(folder / SUMMARY, {**about, **summary(session), **measured(session, heritage, other)})


def turns_of(session: Session) -> list[dict[str, Any]]:
    """Every message in order, the user's and the model's.

    `turn` counts the model's from 1, as the terminal and the summary do; what it is given has the number of its reply.
    """
    numbers = _numbers(session)
    messages = enumerate(zip(numbers, session.said, strict=True))
    return [{"message": message, "turn": turn, **_turn(said)} for message, (turn, said) in messages]


def _numbers(session: Session) -> list[int]:
    """The turn of each message."""
    replies, numbers = 0, []
    for said in session.said:
        numbers.append(replies + 1)
        replies += said.role == "assistant"
    return numbers


def _turn(said: Said) -> dict[str, Any]:
    shared = {"role": said.role, "task": said.task, "text": said.text, "tokens": said.tokens}
    if said.role == "user":
        return {**shared, "documents": list(said.documents), "unread": said.unread}
    blocks = [{name: value for name, value in one.items() if name != "shown"} for one in said.blocks]
    return {**shared, "finish": said.finish, "code_blocks": blocks, "notes": list(said.notes)}


def summary(session: Session) -> dict[str, Any]:
    """The session in figures. `turns` counts the model's; `errors` the blocks that failed or were stopped.

    `documents_arrive_in_turn` is that of the first reply that could mind them, counted as `turns`; it is null where the
    model read none: under `none`, and where the context was full before. `sandbox`: the tiers that code ran in.
    """
    blocks = [one for row in session.rows for one in row["blocks"]]
    numbered = zip(_numbers(session), session.said, strict=True)
    arrived = [turn for turn, said in numbered if said.documents and not said.unread]
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
        "sandbox": list(dict.fromkeys(str(row.get("sandbox", "")) for row in session.rows)),
    }


def as_markdown(session: Session, about: dict[str, Any]) -> str:
    """The conversation for people: control codes are shown, and no text can pass for a heading of ours."""
    parts = [f"# {escaped(about['model'])}, condition {about['condition']}, seed {about['seed']}"]
    for turn, said in zip(_numbers(session), session.said, strict=True):
        who = f"Turn {turn}: the model" if said.role == "assistant" else f"Before turn {turn}"
        arrives = f", documents: {escaped(', '.join(said.documents))}" if said.documents else ""
        arrives += ", not read: no room for a reply" if said.unread else ""
        text = _OWN_LINE.sub(r"> \1", escaped(said.text.replace("\r\n", "\n").strip()))
        parts.append(f"## {who} ({said.task}, {said.tokens} tokens{arrives})\n\n{text}")
    parts.append(f"Ended: {session.finish}")
    return "\n\n".join(parts) + "\n"
