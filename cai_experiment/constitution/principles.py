"""The principles of a constitution, loaded and checked: every error names file, principle and field."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_experiment.errors import BadInputError

AXIS_WEIGHTS = {"harm_prevention": 2.0, "truthfulness": 1.5, "fairness": 1.0, "autonomy_respect": 1.0}
CATEGORIES = ("helpfulness", "harmlessness", "honesty")
DEFAULT_CONSTITUTION = Path(__file__).resolve().parents[2] / "constitution.yaml"
TEXT_FIELDS = ("name", "text", "critique_request", "revision_request")


@dataclass(frozen=True, slots=True)
class Principle:
    """One principle: what it asks (`text`), what the critic and the reviser are asked, its axis and weight."""

    id: str
    name: str
    category: str
    text: str
    critique_request: str
    revision_request: str
    axis: str
    weight: float

    @classmethod
    def example(cls, id: str, text: str, critique_request: str, revision_request: str) -> Principle:
        """A principle for a worked example, where only its words matter."""
        return cls(id, id, "helpfulness", text, critique_request, revision_request, "truthfulness", 1.0)


@dataclass(frozen=True, slots=True)
class Constitution:
    """The principles of one file, in its order; `sha256` is that of the file's bytes (the manifest records it)."""

    principles: tuple[Principle, ...]
    path: str
    sha256: str

    def get(self, id: str) -> Principle:
        """The principle with this id. Raises BadInputError, naming the file, if there is none."""
        for principle in self.principles:
            if principle.id == id:
                return principle
        known = ", ".join(principle.id for principle in self.principles)
        raise BadInputError(f"{self.path} has no principle {id!r}", f"it has {known}")


def load_constitution(path: str | Path = DEFAULT_CONSTITUTION) -> Constitution:
    """Load a constitution: this project's YAML (or the same as JSON), or the CAI paper's critique/revision file.

    The paper's file (Bai et al. 2022, CritiqueRevisionInstructions.json) maps a name to {"prompt": ["...
    CritiqueRequest: ... Critique:"], "edit_request": "... RevisionRequest: ... Revision:"}.
    Raises BadInputError (one line: file, principle, field, value) for anything that cannot be used.
    """
    raw = _read(path)
    data = _parse(path, raw)
    if _is_paper_format(data):
        principles = [_from_paper(path, name, entry) for name, entry in data.items()]
    else:
        principles = [_from_entry(path, index, entry) for index, entry in enumerate(_entries(path, data), start=1)]
    _check_unique(path, principles)
    return Constitution(tuple(principles), str(path), hashlib.sha256(raw).hexdigest())


# ---------------------------------------------------------------- reading


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise BadInputError(f"constitution {path} does not exist", "give --constitution an existing file") from None
    except OSError as error:
        raise BadInputError(
            f"constitution {path} cannot be read: {error.strerror}", "give --constitution a readable file"
        ) from None


def _parse(path: str | Path, raw: bytes) -> Any:
    """The file as plain data. JSON is read as JSON, since its escapes (\\ud83d\\ude00) mean something else in YAML."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BadInputError(
            f"{path}:{line} holds byte 0x{raw[error.start]:02x}, which is not UTF-8", "save the file as UTF-8"
        ) from None
    return _parse_json(path, text) if Path(path).suffix.lower() == ".json" else _parse_yaml(path, text)


def _parse_json(path: str | Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise BadInputError(f"{path}:{line} is not JSON: {_one_line(error)}", "mend that line") from None


def _parse_yaml(path: str | Path, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise BadInputError(f"{place} is not YAML: {error.problem or error.context}", "mend that line") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a control character, a date that does not exist
        raise BadInputError(f"{path} is not YAML: {_one_line(error)}", "mend the file") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ---------------------------------------------------------------- this project's format


def _entries(path: str | Path, data: Any) -> list[Any]:
    """The list under "principles"."""
    if not isinstance(data, dict) or "principles" not in data:
        raise BadInputError(f'{path} has no list "principles"', f"{DEFAULT_CONSTITUTION.name} shows the format")
    entries = data["principles"]
    if not isinstance(entries, list):
        raise BadInputError(f'{path}: "principles" is {_show(entries)}, not a list', "write one '- id: ...' for each")
    if not entries:
        raise BadInputError(f'{path}: "principles" is empty', "write at least one principle")
    return entries


def _from_entry(path: str | Path, index: int, entry: Any) -> Principle:
    if not isinstance(entry, dict):
        raise BadInputError(
            f"{path}: principle {index} is {_show(entry)}, not a set of fields",
            f"{DEFAULT_CONSTITUTION.name} shows the format",
        )
    place = f"{path}: principle {index}"
    id = _id(place, _text(place, entry, "id"))
    place = f"{place} ({id})"
    texts = {field: _text(place, entry, field) for field in TEXT_FIELDS}
    return Principle(
        id=id,
        category=_one_of(place, entry, "category", CATEGORIES),
        axis=_one_of(place, entry, "axis", tuple(AXIS_WEIGHTS)),
        weight=_weight(place, entry),
        **texts,
    )


def _text(place: str, entry: dict[str, Any], field: str) -> str:
    """A text that is there, is a text, is not blank and can be written as UTF-8; blanks around it go."""
    if field not in entry:
        raise BadInputError(f'{place} has no field "{field}"', "add it")
    value = entry[field]
    if not isinstance(value, str):
        raise BadInputError(f'{place}, field "{field}" is {_show(value)}, not a text', "put it in quotes")
    if not value.strip():
        raise BadInputError(f'{place}, field "{field}" is empty', "write it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadInputError(f'{place}, field "{field}" holds half a character (a lone surrogate)', "mend it") from None
    return value.strip()


def _id(place: str, id: str) -> str:
    """Ids stand in files, prompt ids and reports, so they are plain."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", id):
        raise BadInputError(f'{place}, field "id" is {_show(id)}', "use letters, digits and _ . - only")
    return id


def _one_of(place: str, entry: dict[str, Any], field: str, known: tuple[str, ...]) -> str:
    value = _text(place, entry, field)
    if value not in known:
        raise BadInputError(f'{place}, field "{field}" is {_show(value)}', f"use one of {', '.join(known)}")
    return value


def _weight(place: str, entry: dict[str, Any]) -> float:
    """Any positive number: the axis's own weight is a habit of the shipped file, not a rule for the user's."""
    if "weight" not in entry:
        raise BadInputError(f'{place} has no field "weight"', "add it")
    value = entry["weight"]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise BadInputError(f'{place}, field "weight" is {_show(value)}', "use a positive number")
    return float(value)


def _check_unique(path: str | Path, principles: list[Principle]) -> None:
    seen: dict[str, int] = {}
    for index, principle in enumerate(principles, start=1):
        if principle.id in seen:
            raise BadInputError(
                f'{path}: principle {index}, field "id" is {principle.id!r}, as in principle {seen[principle.id]}',
                "give each its own id",
            )
        seen[principle.id] = index


def _show(value: Any) -> str:
    """A value in an error: short and on one line."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


# ---------------------------------------------------------------- the CAI paper's format


def _is_paper_format(data: Any) -> bool:
    return (
        isinstance(data, dict)
        and bool(data)
        and "principles" not in data
        and any(isinstance(entry, dict) and ("edit_request" in entry or "prompt" in entry) for entry in data.values())
    )


def _from_paper(path: str | Path, name: Any, entry: Any) -> Principle:
    """One of the paper's requests. It has no text of its own, so the principle is that no such rewrite is needed."""
    place = f"{path}: principle {_show(name)}"
    if not isinstance(entry, dict):
        raise BadInputError(f"{place} is {_show(entry)}", 'give it "prompt" and "edit_request"')
    prompt = entry.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        entry = {**entry, "prompt": prompt[0]}
    critique = _without_markers(place, "prompt", _text(place, entry, "prompt"), "CritiqueRequest:", "Critique:")
    revision = _without_markers(
        place, "edit_request", _text(place, entry, "edit_request"), "RevisionRequest:", "Revision:"
    )
    return Principle(
        id=_id(place, str(name)),
        name=str(name),
        category="harmlessness",
        text=f"The answer must not need this request: {revision}",
        critique_request=critique,
        revision_request=revision,
        axis="harm_prevention",
        weight=AXIS_WEIGHTS["harm_prevention"],
    )


def _without_markers(place: str, field: str, text: str, start: str, end: str) -> str:
    """The request between its markers: "CritiqueRequest: Identify ... Critique:" becomes "Identify ..."."""
    inner = text.removeprefix(start).removesuffix(end).strip()
    if not inner:
        raise BadInputError(f'{place}, field "{field}" is empty', "write it")
    return inner
