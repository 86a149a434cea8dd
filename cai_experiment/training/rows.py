"""Rows of a .jsonl or .json file, checked line by line: what readers of pairs and of helpful answers share.

Every error is a BadInputError (exit code 2) that names file and line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from cai_experiment.constitution.prompts import Turn
from cai_experiment.errors import BadInputError
from cai_experiment.records.files import parse_line, show

LINE_BYTES = 10_000_000  # of one pair: a thousand times the longest that fits a context of 4,096 tokens


def bad(place: str, what: str) -> BadInputError:
    """The error that names a line and what is wrong with it."""
    return BadInputError(f"{place} {what}", "correct or remove that line and run the same command again")


def rows_of(path: Path, next_step: str) -> Iterator[tuple[str, Any]]:
    """(place, row) for every line of a .jsonl file, or for every element of a .json list.

    `next_step` is what to do about a file that cannot be read.
    """
    try:
        if path.suffix == ".json":
            yield from _list_rows(path)
            return
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), 1):
                place = f"{show(path)}:{number}"
                if len(line) > LINE_BYTES:
                    raise bad(place, f"is over {LINE_BYTES / 1e6:.0f} MB long: no pair is")
                if line.strip():
                    yield place, _checked(parse_line, line, place)
    except OSError as error:
        raise BadInputError(f"cannot read {show(path)}: {error.strerror}", next_step) from None


def _list_rows(path: Path) -> Iterator[tuple[str, Any]]:
    rows = _checked(json.loads, path.read_bytes(), show(path))
    if not isinstance(rows, list):
        raise bad(show(path), "holds one JSON value, not a list of pairs")
    yield from ((f"{show(path)}, row {number}", row) for number, row in enumerate(rows, 1))


def _checked(parse: Callable[[bytes], Any], data: bytes, place: str) -> Any:
    try:
        return parse(data)
    except (ValueError, RecursionError) as error:
        raise bad(place, str(error) if parse is parse_line else f"is no JSON ({error})") from None


def id_of(row: Mapping[str, Any], default: str, place: str) -> str:
    """The row's "id", a number or text; `default` where it has none."""
    found = row.get("id")
    if isinstance(found, int):
        return str(found)
    return _encodable(found, "id", place) if isinstance(found, str) else default


def text_of(fields: Mapping[str, Any], name: str, place: str) -> str:
    """The text of a field, which must be there and not blank."""
    if name not in fields:
        raise bad(place, f'has no "{name}"')
    value = fields[name]
    if not isinstance(value, str):
        raise bad(place, f'has a "{name}" that is {type(value).__name__}, not text')
    if not value.strip():
        raise bad(place, f'has an empty "{name}"')
    return _encodable(value, name, place)


def _encodable(value: str, name: str, place: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise bad(place, f'has a "{name}" with half a surrogate pair (character {error.start + 1})') from None
    return value


# ---------------------------------------------------------------- conversations

_SPEAKERS = {"user": "instruction", "assistant": "answer"}
_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")


def from_messages(fields: Mapping[str, Any], place: str) -> tuple[tuple[Turn, ...], str, str]:
    """Turns, chosen and rejected of a conversational row."""
    chosen, rejected = (messages_of(fields, name, place) for name in ("chosen", "rejected"))
    if "prompt" in fields:
        prompt = messages_of(fields, "prompt", place)
    else:
        prompt = []
        for one, other in zip(chosen, rejected, strict=False):
            if one != other:
                break
            prompt.append(one)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return turns_of(prompt, place), answer_of(chosen, "chosen", place), answer_of(rejected, "rejected", place)


def messages_of(fields: Mapping[str, Any], name: str, place: str) -> list[tuple[str, str]]:
    """(role, content) of every message in a field."""
    value = fields[name]
    if not isinstance(value, list):
        raise bad(place, f'has a "{name}" that is {type(value).__name__}, not a list of messages')
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise bad(place, f'has a "{name}" whose message {number} lacks role or content')
        role = message["role"]
        if role not in ("system", *_SPEAKERS):
            raise bad(place, f'has a "{name}" with the role {role!r} (known: system, user, assistant)')
        messages.append((role, text_of(message, "content", place)))
    return messages


def turns_of(messages: Sequence[tuple[str, str]], place: str) -> tuple[Turn, ...]:
    """The prompt's turns. A system message stands before the first user message: base models know no such role."""
    system = "\n\n".join(text for role, text in messages if role == "system")
    spoken = [(role, text) for role, text in messages if role != "system"]
    if not spoken or spoken[-1][0] != "user":
        raise bad(place, "has a prompt that does not end with a user message")
    if any(one == other for (one, _), (other, _) in pairwise(spoken)) or spoken[0][0] != "user":
        raise bad(place, "has a prompt in which user and assistant do not take turns")
    if system:
        spoken[0] = ("user", f"{system}\n\n{spoken[0][1]}")
    return tuple(Turn(_SPEAKERS[role], text) for role, text in spoken)


def answer_of(messages: Sequence[tuple[str, str]], name: str, place: str) -> str:
    """The text of a field that is one assistant message."""
    if len(messages) != 1 or messages[0][0] != "assistant":
        raise bad(place, f'has a "{name}" that is not exactly one assistant message after the prompt')
    return messages[0][1]


def from_transcripts(fields: Mapping[str, Any], place: str) -> tuple[tuple[Turn, ...], str, str]:
    """Turns, chosen and rejected of two "\\n\\nHuman: ...\\n\\nAssistant: ..." texts with one beginning."""
    as_messages: dict[str, list[dict[str, str]]] = {}
    for name in ("chosen", "rejected"):
        text = text_of(fields, name, place)
        parts = _TRANSCRIPT_TURN.split(text)
        if parts[0].strip() or len(parts) < 5:
            raise bad(place, 'has no "prompt", and its "chosen" is no "Human: ... Assistant: ..." transcript')
        if not all(turn.strip() for turn in parts[2::2]):
            raise bad(place, f'has a "{name}" with an empty turn')
        roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[1::2]]
        as_messages[name] = [{"role": r, "content": t.strip()} for r, t in zip(roles, parts[2::2], strict=True)]
    return from_messages(as_messages, place)
