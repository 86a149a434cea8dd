"""Raw rows of local files: .jsonl, .json, .csv and .parquet, each row with its place for messages ("file.jsonl:17")."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cai_experiment.errors import BadInputError
from cai_experiment.records.files import parse_line, read_text, show

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
MAX_CELL = 2**24  # csv's own limit of 128 KiB is shorter than a long passage


def raw_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, row) of every row, in order.

    Raises:
        BadInputError: a file that is missing, unreadable or of another kind, or a malformed line (file and line).
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path)
    if suffix not in SUFFIXES:
        raise BadInputError(f"{show(path)}: unknown kind of file {suffix!r}", f"use one of {', '.join(SUFFIXES)}")
    content = read_text(path)
    if suffix == ".csv":
        return _csv(path, content)
    lines = suffix == ".jsonl" or not _is_whole_json(content)
    return _lines(path, content) if lines else _json(path, content)


def file_of(folder: Path, split: str) -> Path:
    """The one file of a folder whose name tells the split ("test.jsonl", "medqa_us_4options_test.jsonl").

    Raises BadInputError where there is none, or more than one.
    """
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
    words = (split, "dev") if split == "validation" else (split,)
    found = [path for path in files if any(word in path.stem.lower() for word in words)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in found or files) or f"no {', '.join(SUFFIXES)} file"
    many = "several files" if found else "no file"
    raise BadInputError(f"{show(folder)}: {many} for {split!r} (there: {names})", "name one of its files")


def _is_whole_json(content: str) -> bool:
    """False for JSON lines that are saved as .json."""
    try:
        json.loads(content)
    except (json.JSONDecodeError, RecursionError):
        first = content.lstrip().split("\n", 1)[0].strip()
        return not (first.startswith("{") and first.endswith("}"))
    return True


def _lines(path: Path, content: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(content.split("\n"), 1):  # not splitlines(): U+2028 is no line end in JSON
        if line.strip():
            try:
                yield f"{show(path)}:{number}", parse_line(line.encode())
            except ValueError as error:
                raise BadInputError(f"{show(path)}:{number} {error}", "correct or remove that line") from None


def _json(path: Path, content: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A list of rows, or one list of rows under any key ({"data": [...]})."""
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        why = f"is no JSON ({error.msg}, column {error.colno})"
        raise BadInputError(f"{show(path)}:{error.lineno} {why}", "correct that line") from None
    except RecursionError:
        raise BadInputError(f"{show(path)} is nested too deeply", "correct the file") from None
    if isinstance(value, Mapping):
        value = next((item for item in value.values() if isinstance(item, list)), None)
    if not isinstance(value, list):
        raise BadInputError(f"{show(path)} holds no list of rows", "save them as a JSON list, or one a line as .jsonl")
    for number, row in enumerate(value, 1):
        if not isinstance(row, Mapping):
            raise BadInputError(f"{show(path)}: row {number} is no JSON object", "correct or remove that row")
        yield f"{show(path)}: row {number}", row


def _csv(path: Path, content: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(MAX_CELL)
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise BadInputError(f"{show(path)}:{reader.line_num} has another number of cells than the header has",
                                    "correct that row")  # fmt: skip
            yield f"{show(path)}:{reader.line_num}", row
    except csv.Error as error:
        raise BadInputError(f"{show(path)}:{reader.line_num}: {error}", "correct that row") from None


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except OSError as error:
        raise BadInputError(f"cannot read {show(path)}: {error.strerror or error}", "check the path") from None
    except pyarrow.ArrowInvalid as error:
        raise BadInputError(f"{show(path)} is no parquet file that can be read ({error})", "save it anew") from None
    for number, row in enumerate(rows, 1):
        yield f"{show(path)}: row {number}", row
