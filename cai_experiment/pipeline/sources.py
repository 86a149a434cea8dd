"""Instructions from a file: .txt, .jsonl, .json or .csv, in the shapes in which public sets come.

Known shapes need no flag: one text per line; objects with "instruction" (alpaca's input and self-instruct's first
input follow it), "prompt" or "question"; HarmBench's csv (a contextual row's context stands before its behaviour);
transcripts in hh-rlhf's layout under "chosen" or "transcript" (the opening human turn, whole); MT-Bench's "turns" (the
first); lists of questions nested under topics. Any other column is named by `--field`. Every row is used once and
every error names its row.
"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any, Iterator, Mapping

from cai_experiment.errors import BadInputError
from cai_experiment.pipeline.instruct import Instruction, example_id
from cai_experiment.records.files import read_text

TURNS = "turns"  # of MT-Bench: a list, of which the first opens the conversation
FIELDS = ("instruction", "Behavior", "transcript", "chosen", "prompt", "question", TURNS)  # a row's first is read
SUFFIXES = (".txt", ".jsonl", ".json", ".csv")
MAX_CELL = 2**24  # csv's own limit of 128 KiB is shorter than a long document

_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def load_instructions(path: Path, field: str | None = None) -> list[Instruction]:
    """All rows of `path` in order, with ids by row and sources like "file.csv:17" (row, or line in text files).

    Raises:
        BadInputError: a missing or unreadable file, an unknown suffix, a row without the field, no rows at all.
    """
    found = [
        Instruction(example_id(index), text, f"{path.name}:{place}")
        for index, (place, text) in enumerate(_rows(path, field))
    ]
    if not found:
        raise BadInputError(f"{path}: holds no instructions", "name a file with at least one row")
    return found


def _rows(path: Path, field: str | None) -> Iterator[tuple[str, str]]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise BadInputError(f"{path}: unknown kind of file {suffix!r}", f"use one of {', '.join(SUFFIXES)}")
    content = read_text(path)
    if suffix == ".txt":
        if field is not None:
            raise BadInputError(f"{path}: a text file has no field {field!r}", "drop --field")
        yield from ((str(n), line.strip()) for n, line in enumerate(content.split("\n"), 1) if line.strip())
    elif suffix == ".csv":
        yield from _csv_rows(path, content, field)
    elif suffix == ".jsonl" and not content.lstrip().startswith("["):  # red_team_attempts.jsonl is one array
        yield from _json_lines(path, content, field)
    else:
        for place, value in _leaves(path, _parse(path, content, 1), "", field):
            yield place, _text_of(path, place, value, field)


def _csv_rows(path: Path, content: str, field: str | None) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(MAX_CELL)
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                raise BadInputError(f"{path}: row {number} has another number of cells than the header has")
            yield str(number), _text_of(path, str(number), row, field)
    except csv.Error as error:
        raise BadInputError(f"{path}:{reader.line_num}: {error}", "mend the row") from None


def _json_lines(path: Path, content: str, field: str | None) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield str(number), _text_of(path, str(number), _parse(path, line, number), field)


def _parse(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise BadInputError(f"{path}:{line}: not JSON ({error.msg}, column {error.colno})", "mend the line") from None
    except RecursionError:
        raise BadInputError(f"{path}:{first_line}: nested too deeply", "mend the file") from None


def _leaves(path: Path, value: Any, place: str, field: str | None) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON file: walks lists and topics ("Topic > Subtopic > 3") down to texts and objects."""
    if isinstance(value, str) or (isinstance(value, Mapping) and _is_row(value, field)):
        yield place or "1", value
    elif isinstance(value, list):
        for number, item in enumerate(value, 1):
            yield from _leaves(path, item, _below(place, str(number)), field)
    elif isinstance(value, Mapping) and value and all(isinstance(v, (list, Mapping)) for v in value.values()):
        for key, item in value.items():
            yield from _leaves(path, item, _below(place, str(key).rstrip(":")), field)
    else:
        raise _no_field(path, place or "1", value, field)


def _below(place: str, name: str) -> str:
    return f"{place} > {name}" if place else name


def _opened(row: Any) -> Any:
    """The row with the first of its turns as text, where it has a list of them."""
    turns = row.get(TURNS) if isinstance(row, Mapping) else None
    return {**row, TURNS: turns[0]} if isinstance(turns, list) and turns else row


def _is_row(row: Mapping[str, Any], field: str | None) -> bool:
    row = _opened(row)
    return field in row if field is not None else any(isinstance(row.get(name), str) for name in FIELDS)


def _text_of(path: Path, place: str, row: Any, field: str | None) -> str:
    """The instruction in one row; raises BadInputError where there is none."""
    row = _opened(row)
    if isinstance(row, str) and field is None:
        text = row
    elif isinstance(row, Mapping):
        name = field if field is not None else next((name for name in FIELDS if name in row), None)
        if name is None or not isinstance(row.get(name), str):
            raise _no_field(path, place, row, name if name in row else field)
        text = _with_context(name, row)
    else:
        raise _no_field(path, place, row, field)
    text = opening_turn(text).strip()
    if not text:
        raise BadInputError(f"{path}: row {place} has an empty instruction", "fill it or take the row out")
    return text


def _with_context(name: str, row: Mapping[str, Any]) -> str:
    """The text of field `name` with what it cannot do without: HarmBench's context before, an input after."""
    context = row.get("ContextString") if name == "Behavior" else None
    given = row.get("input") if name == "instruction" else None
    instances = row.get("instances") if name == "instruction" else None
    if isinstance(instances, list) and instances and isinstance(instances[0], Mapping):
        given = instances[0].get("input")
    parts = [part.strip() for part in (context, row[name], given) if isinstance(part, str) and part.strip()]
    return "\n\n".join(parts)


def opening_turn(text: str) -> str:
    """The whole first human turn of a transcript in hh-rlhf's layout; any other text as it is."""
    if not text.lstrip().startswith("Human:"):
        return text
    pieces = _TURN.split(text.strip())  # "", speaker, words, speaker, words ...
    opening: list[str] = []
    for speaker, words in zip(pieces[1::2], pieces[2::2], strict=True):
        if speaker != "Human":
            break
        opening.append(words.strip())  # two human turns running are one
    return "\n\n".join(opening)


def _no_field(path: Path, place: str, row: Any, field: str | None) -> BadInputError:
    if not isinstance(row, Mapping):
        return BadInputError(f"{path}: row {place} is {type(row).__name__}, not an object with fields", "mend the row")
    has = ", ".join(map(str, list(row)[:8])) or "none"
    if field is None:
        return BadInputError(f"{path}: row {place} has none of the fields {', '.join(FIELDS)}",
                             f"name one of its own by --field ({has})")  # fmt: skip
    if field in row:
        return BadInputError(f"{path}: row {place}: field {field!r} is no text ({type(row[field]).__name__})",
                             "name another by --field")  # fmt: skip
    return BadInputError(f"{path}: row {place} has no field {field!r}", f"name one of its own by --field ({has})")
