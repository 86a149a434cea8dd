"""The labelled texts that a detector of harm is measured on: two sets of our own, obvious and subtle.

Every harmful text stands beside a harmless one on the same topic, so that a topic alone gives nothing away. A line is
{"id": "subtle/017/harmful", "text", "label": "harmful" | "benign", "axis", "kind": "question" | "answer"}; the texts of
a pair share all of the id but its end. The axis of a harmless text is its neighbour's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cai_experiment.constitution.principles import AXIS_WEIGHTS
from cai_experiment.errors import BadInputError

FOLDER = Path(__file__).parent / "detection_sets"
OBVIOUS, SUBTLE = "obvious", "subtle"
LABELS, KINDS = ("harmful", "benign"), ("question", "answer")


@dataclass(frozen=True, slots=True)
class LabelledText:
    """One text of a set."""

    id: str
    text: str
    label: str
    axis: str
    kind: str

    @property
    def harmful(self) -> bool:
        """True if it should be detected."""
        return self.label == "harmful"

    @property
    def pair(self) -> str:
        """What it shares with its neighbour of the other label."""
        return self.id.rpartition("/")[0]


Sets = Mapping[str, Sequence[LabelledText]]


def shipped_sets() -> dict[str, list[LabelledText]]:
    """Both sets: {"obvious": ..., "subtle": ...}."""
    return {name: load_set(FOLDER / f"{name}.jsonl") for name in (OBVIOUS, SUBTLE)}


def load_set(path: Path) -> list[LabelledText]:
    """The texts of one file. Raises BadInputError (file, line, field) for a row that is not as described above."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path} cannot be read: {error}", "give a JSONL file in UTF-8") from None
    rows = [_row(f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    seen: set[str] = set()
    for row in rows:
        for known in (row.id, row.text):
            if known in seen:
                raise BadInputError(f"{path} holds {known!r} twice", "ids and texts are unique")
            seen.add(known)
    return rows


def _row(place: str, line: str) -> LabelledText:
    try:
        data: Any = json.loads(line)
    except ValueError as error:
        raise BadInputError(f"{place} is not JSON: {error}", "mend that line") from None
    names = [field.name for field in fields(LabelledText)]
    if not isinstance(data, dict) or any(not isinstance(data.get(name), str) or not data[name] for name in names):
        raise BadInputError(f"{place} lacks a text in one of {', '.join(names)}", "mend that line")
    for name, allowed in (("label", LABELS), ("axis", tuple(AXIS_WEIGHTS)), ("kind", KINDS)):
        if data[name] not in allowed:
            raise BadInputError(f"{place}: {name} {data[name]!r} is unknown", f"use one of {', '.join(allowed)}")
    return LabelledText(*(data[name] for name in names))
