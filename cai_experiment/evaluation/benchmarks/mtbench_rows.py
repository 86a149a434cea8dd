"""MT-Bench's files: questions of two turns, reference answers, and the prompts by which a judge grades.

All three are FastChat's (Zheng et al. 2023, arXiv 2306.05685), fetched at a pinned commit and never shipped. Which
questions are shown with a reference answer, and by which prompt, is as in its llm_judge/common.py and gen_judgment.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from cai_experiment.errors import BadInputError
from cai_experiment.evaluation.benchmarks.fetch import Source
from cai_experiment.records.files import parse_line, show

REVISION = "0e6d3e4beaab66f4d3f93db72541a4abab8af28d"
_URL = f"https://raw.githubusercontent.com/lm-sys/FastChat/{REVISION}/fastchat/llm_judge/data/"
QUESTIONS = Source(
    "mt_bench_question.jsonl", _URL + "mt_bench/question.jsonl",
    "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7", "Apache-2.0", "--questions FILE",
)  # fmt: skip
REFERENCES = Source(
    "mt_bench_reference_gpt-4.jsonl", _URL + "mt_bench/reference_answer/gpt-4.jsonl",
    "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f", "Apache-2.0", "--references FILE",
)  # fmt: skip
JUDGE_PROMPTS = Source(
    "mt_bench_judge_prompts.jsonl", _URL + "judge_prompts.jsonl",
    "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6", "Apache-2.0", "--judge-prompts FILE",
)  # fmt: skip

NEED_REFERENCE = frozenset({"math", "reasoning", "coding"})  # FastChat's NEED_REF_CATS
TURNS = 2

Pair = tuple[str, str]  # the texts of both turns
Kind = Literal["single", "pair"]


@dataclass(frozen=True, slots=True)
class Question:
    """One question. `reference` holds the reference answers that a judge is shown; None where the category has none."""

    id: str
    category: str
    turns: Pair
    reference: Pair | None = None


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """One prompt of a judge: what it is told as the system, and a str.format template of what it is shown."""

    system: str
    template: str


@dataclass(frozen=True, slots=True)
class JudgePrompts:
    """The eight prompts by name, and the SHA-256 of their file, so that a report says which they were."""

    by_name: Mapping[str, JudgePrompt]
    sha256: str


# ---------------------------------------------------------------- questions


def read_questions(questions: Path, references: Path) -> list[Question]:
    """The questions in the file's order, each with its reference answers if its category needs them.

    Those are of `references`, else the row's own `reference`. Raises BadInputError, naming file and line.
    """
    answers = read_references(references)
    found: dict[str, Question] = {}
    for place, row in _rows(questions):
        question = Question(_id(place, row), _text(place, row, "category"), _both(place, row.get("turns"), "turns"))
        if question.id in found:
            raise _bad(place, f"question_id {question.id} stands there twice")
        reference = None
        if question.category in NEED_REFERENCE:
            reference = answers.get(question.id) or _own(row)
            if reference is None:
                what = f"question {question.id} ({question.category}) has no reference answer"
                raise BadInputError(f"{place} {what} in {show(references)}", "give one with --references FILE")
        found[question.id] = Question(question.id, question.category, question.turns, reference)
    if not found:
        raise BadInputError(f"{show(questions)} holds no question", "give another with --questions FILE")
    return list(found.values())


def read_references(path: Path) -> dict[str, Pair]:
    """Reference answers by question id: `choices[0].turns` of each row. Raises BadInputError."""
    found = {}
    for place, row in _rows(path):
        choices = row.get("choices")
        turns = choices[0].get("turns") if isinstance(choices, list) and choices and isinstance(choices[0], dict) else 0
        found[_id(place, row)] = _both(place, turns, "choices[0].turns")
    return found


def _own(row: Mapping[str, Any]) -> Pair | None:
    """The row's own reference, if it has one for both turns (eight rows have one for a single turn)."""
    given = row.get("reference")
    whole = isinstance(given, list) and len(given) == TURNS and all(isinstance(text, str) and text for text in given)
    return (given[0], given[1]) if whole and given is not None else None


# ---------------------------------------------------------------- judge prompts


def prompt_name(kind: Kind, with_reference: bool, turn: int) -> str:
    """FastChat's name of the prompt for turn 1 or 2: "single-v1", "pair-math-v1-multi-turn" ..."""
    base = {"single": "single-v1", "pair": "pair-v2"}[kind] if not with_reference else f"{kind}-math-v1"
    return base if turn == 1 else f"{base}-multi-turn"


def fields_of(kind: Kind, with_reference: bool, turn: int) -> frozenset[str]:
    """The fields that this prompt's template is filled with; what follows the first turn shows both turns."""
    answers = ("answer",) if kind == "single" else ("answer_a", "answer_b")
    turns = range(1, turn + 1)
    names = {"question", *answers} if turn == 1 else {f"{name}_{i}" for name in ("question", *answers) for i in turns}
    return frozenset(names | ({f"ref_answer_{i}" for i in turns} if with_reference else set()))


def read_judge_prompts(path: Path) -> JudgePrompts:
    """The eight prompts of a judge_prompts.jsonl. Raises BadInputError if one is missing or has other fields."""
    rows = {str(row.get("name")): (place, row) for place, row in _rows(path)}
    found: dict[str, JudgePrompt] = {}
    for kind in ("single", "pair"):
        for with_reference in (False, True):
            for turn in range(1, TURNS + 1):
                name = prompt_name(kind, with_reference, turn)
                if name not in rows:
                    step = "give FastChat's file with --judge-prompts FILE"
                    raise BadInputError(f"{show(path)} has no prompt {name}", step)
                wanted = fields_of(kind, with_reference, turn)
                found[name] = _judge_prompt(*rows[name], wanted)
    return JudgePrompts(found, hashlib.sha256(path.read_bytes()).hexdigest())


def _judge_prompt(place: str, row: Mapping[str, Any], wanted: frozenset[str]) -> JudgePrompt:
    template = _text(place, row, "prompt_template")
    try:
        fields = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise _bad(place, f"prompt_template is no template: {error}") from None
    if fields != wanted:
        raise _bad(place, f"prompt_template has the fields {sorted(fields)}, not {sorted(wanted)}")
    return JudgePrompt(_text(place, row, "system_prompt"), template)


# ---------------------------------------------------------------- rows


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each line that is not blank; the place is the file with its line, for messages."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise BadInputError(f"cannot read {show(path)}: {error.strerror}", "check the path") from None
    for number, line in enumerate(lines, 1):
        place = f"{show(path)}:{number}"
        try:
            if line.strip():
                yield place, parse_line(line)
        except ValueError as error:
            raise _bad(place, str(error)) from None


def _bad(place: str, why: str) -> BadInputError:
    return BadInputError(f"{place} {why}", "correct or remove that line")


def _id(place: str, row: Mapping[str, Any]) -> str:
    given = row.get("question_id")
    if isinstance(given, bool) or not isinstance(given, int | str) or given == "":
        raise _bad(place, "has no question_id")
    return str(given)


def _text(place: str, row: Mapping[str, Any], name: str) -> str:
    given = row.get(name)
    if not isinstance(given, str) or not given:
        raise _bad(place, f"has no {name}")
    return given


def _both(place: str, given: Any, name: str) -> Pair:
    if not isinstance(given, list) or len(given) != TURNS or not all(isinstance(t, str) and t.strip() for t in given):
        raise _bad(place, f"{name} are not two texts")
    return given[0], given[1]
