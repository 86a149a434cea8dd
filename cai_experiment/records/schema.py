"""One example as one line of pairs.jsonl or rejected.jsonl: the dataclasses, and a check that names what is wrong."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from cai_experiment.errors import BadInputError

RERUN = "rerun the command that wrote it (finished examples are kept)"
META_FIELDS = ("source", "seed", "generator", "critic", "tokens", "gate")


@dataclass(frozen=True, slots=True)
class Round:
    """One critique and revision. The verdicts answer "is the principle broken?": "yes", "no" or "undecided"."""

    principle_id: str
    principle: str
    critique: str
    revised_answer: str
    verdict_before: str
    verdict_after: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """What DPO trains on: plain strings, prompt = instruction, chosen = revised answer, rejected = first answer."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Example:
    """One line. The fields stand in the file's order.

    `principle` (its text) and `critique` are those of the first round that changed the answer. `meta` holds
    META_FIELDS and may hold more. `reject_reasons` is empty, and not written, for an accepted example.
    """

    id: str
    instruction: str
    initial_answer: str
    principle: str
    critique: str
    revised_answer: str
    preference_pair: PreferencePair
    rounds: tuple[Round, ...]
    meta: dict[str, Any]
    reject_reasons: tuple[str, ...] = field(default=())


TEXT_FIELDS = ("id", "instruction", "initial_answer", "principle", "critique", "revised_answer")
ROUND_FIELDS = tuple(f.name for f in dataclasses.fields(Round))
PAIR_FIELDS = tuple(f.name for f in dataclasses.fields(PreferencePair))
KIND_NAMES = {str: "text", dict: "an object", list: "a list", bool: "true or false", int: "a number",
              float: "a number", type(None): "null"}  # fmt: skip


def to_row(example: Example) -> dict[str, Any]:
    """The example as a dict in the file's order, ready for `write_jsonl`."""
    row = dataclasses.asdict(example)
    row["rounds"] = list(row["rounds"])
    row["reject_reasons"] = list(row["reject_reasons"])
    if not example.reject_reasons:
        del row["reject_reasons"]
    return row


def to_line(example: Example) -> str:
    """The example as one line of JSON, without the newline."""
    return json.dumps(to_row(example), ensure_ascii=False)


def from_row(row: object, place: str, next_step: str = RERUN) -> Example:
    """The example in a parsed line; fields that this version does not know are left out, except in `meta`.

    `place` ("pairs.jsonl:7") and `next_step` go into the message of the BadInputError that a bad row raises.
    """
    checked = check_line(row, place, next_step)
    return Example(
        **{name: checked[name] for name in TEXT_FIELDS},
        preference_pair=PreferencePair(*(checked["preference_pair"][name] for name in PAIR_FIELDS)),
        rounds=tuple(Round(*(one[name] for name in ROUND_FIELDS)) for one in checked["rounds"]),
        meta=checked["meta"],
        reject_reasons=tuple(checked.get("reject_reasons", ())),
    )


def from_line(line: str, place: str, next_step: str = RERUN) -> Example:
    """The example in one line of text; a bad line raises BadInputError naming place and field."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{place} is no JSON ({error})", next_step) from None
    return from_row(row, place, next_step)


def check_line(row: object, place: str, next_step: str = RERUN) -> dict[str, Any]:
    """Give the row back if it has every field with its kind, else raise BadInputError.

    For example: `pairs.jsonl:7 has no "chosen" in preference_pair; rerun test_batch.py (finished examples are kept)`.
    """
    if not isinstance(row, dict):
        raise BadInputError(f"{place} is {_kind(row)}, not an object", next_step)
    _need(row, TEXT_FIELDS, str, "", place, next_step)
    _need(row, ("preference_pair", "meta"), dict, "", place, next_step)
    _need(row, ("rounds",), list, "", place, next_step)
    _need(row["preference_pair"], PAIR_FIELDS, str, "preference_pair", place, next_step)
    for index, one in enumerate(row["rounds"]):
        if not isinstance(one, dict):
            raise BadInputError(f"{place}: rounds[{index}] is {_kind(one)}, not an object", next_step)
        _need(one, ROUND_FIELDS, str, f"rounds[{index}]", place, next_step)
    _need(row["meta"], META_FIELDS, object, "meta", place, next_step)
    reasons = row.get("reject_reasons", [])
    if not isinstance(reasons, list) or not all(isinstance(reason, str) for reason in reasons):
        raise BadInputError(f'{place}: "reject_reasons" is not a list of texts', next_step)
    return row


def _need(part: dict[str, Any], names: tuple[str, ...], kind: type, inside: str, place: str, next_step: str) -> None:
    """Raise BadInputError for the first of `names` that `part` lacks or that is not of `kind`."""
    where = f" in {inside}" if inside else ""
    for name in names:
        if name not in part:
            raise BadInputError(f'{place} has no "{name}"{where}', next_step)
        if not isinstance(part[name], kind):
            raise BadInputError(f'{place}: "{name}"{where} is {_kind(part[name])}, not {KIND_NAMES[kind]}', next_step)


def _kind(value: object) -> str:
    return KIND_NAMES[type(value)]
