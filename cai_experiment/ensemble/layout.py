"""One layout for every question and answer of the ensemble, and the shapes in which public sets are laid out.

A prompt is "Question: ...\\nAnswer:", an answer begins with a space and ends before the tokenizer's end of text. Known
shapes: our own fields; GSM8K (question, answer with "####"); MedQA (question, options, answer_idx); BoolQ (question,
passage, a true or false answer); else a question and an answer under one of `PAIRS`, in one text with a marker between
them, or as turns of a conversation. What kind of answer such a row has is read from its text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cai_experiment.ensemble.answers import TASKS, read_answer, stated_task
from cai_experiment.ensemble.letters import LETTERS
from cai_experiment.errors import BadInputError

PAIRS = (  # columns of a question and its answer, the first pair that a row has
    ("question", "answer"), ("input", "target"), ("instruction", "output"), ("instruction", "response"),
    ("prompt", "completion"), ("prompt", "response"), ("prompt", "answer"), ("question", "response"),
    ("query", "response"), ("problem", "solution"), ("input", "output"), ("text", "label"),
)  # fmt: skip
TURNS = ("messages", "conversations")
MARKERS = ("\n### Response:", "\nAnswer:", "\nA:", "\n\nAssistant:", "Answer:")  # between question and answer in a text
FLAGS = "name them by --prompt_column and --answer_column"

_OPENING = re.compile(r"\A\s*(?:Question|Q|### Instruction|Human)\s*:\s*", re.IGNORECASE)
_CLOSING = re.compile(r"\s*(?:Answer|A|### Response|Assistant)\s*:\s*\Z", re.IGNORECASE)
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's notes for a calculator, which no model is to write
_LETTERED = re.compile(r"(?:(?<=\n)|(?<=\s))\(?([A-J])[).:]\s+")


@dataclass(frozen=True, slots=True)
class Row:
    """A question, laid out, and its answer. `options` are texts in the order of their letters."""

    id: str
    dataset: str
    task: str  # one of TASKS
    prompt: str  # ends in "Answer:"
    answer: str  # what follows, with its leading space
    gold: str  # as read_answer gives it: "72", "B", "yes"; of a text the whole answer
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # fields of knowledge, where they are known


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that flags name; None: recognised."""

    prompt: str | None = None
    answer: str | None = None

    def __bool__(self) -> bool:
        return self.prompt is not None or self.answer is not None


def prompt_of(question: str) -> str:
    """The prompt of a question (with its options below it, where it has any); a layout it brought along is dropped."""
    return f"Question: {_CLOSING.sub('', _OPENING.sub('', question)).strip()}\nAnswer:"


def with_options(question: str, options: Sequence[str]) -> str:
    """The question with lettered options below it, as lines "A) ..."."""
    lines = [f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question.strip(), *lines])


def row_of(raw: Mapping[str, Any], place: str, dataset: str, part: str, columns: Columns | None = None) -> Row:
    """The Row that a raw row of any known shape means.

    `dataset` names the row where it brings no name itself; `part` ("test-00017") ends the id of a row that brings none.

    Raises:
        BadInputError: beginning with `place`, for a row of no known shape or with an empty question or answer.
    """
    if columns:
        return _pair(raw, place, dataset, part, _named_column(raw, place, columns.prompt, 0),
                     _named_column(raw, place, columns.answer, 1))  # fmt: skip
    if "task" in raw and "gold" in raw:
        return _own(raw, place, dataset, part)
    if _is_given(raw.get("options")) and ("answer_idx" in raw or "answer" in raw):
        return _choice(raw, place, dataset, part)
    if "passage" in raw and "question" in raw:
        return _yes_no(raw, place, dataset, part)
    question, answer = _recognised(raw, place)
    return _pair(raw, place, dataset, part, question, answer)


# ---------------------------------------------------------------- known sets


def _own(raw: Mapping[str, Any], place: str, dataset: str, part: str) -> Row:
    task, question = raw["task"], raw.get("prompt") or raw.get("question")
    if task not in TASKS:
        raise BadInputError(f"{place} has the task {task!r}", f"use one of {', '.join(TASKS)}")
    answer = _text(raw, "answer", place)
    if not isinstance(question, str) or not question.strip():
        raise BadInputError(f"{place} has no question", 'fill its "prompt" or "question"')
    options = tuple(str(option) for option in raw.get("options") or ())
    return Row(str(raw.get("id") or _id(dataset, part)), str(raw.get("dataset") or dataset), task, prompt_of(question),
               _answer(answer), str(raw["gold"]), options, tuple(raw.get("needs") or ()))  # fmt: skip


def _is_given(options: Any) -> bool:
    """False for null, an empty list, and a mapping that Arrow filled with nulls."""
    return any(value is not None for value in options.values()) if isinstance(options, Mapping) else bool(options)


def _choice(raw: Mapping[str, Any], place: str, dataset: str, part: str) -> Row:
    """MedQA: options by letter, as texts, or as {"key", "value"}; the gold letter, its index, or the gold text."""
    question, options = _text(raw, "question", place), _option_texts(raw["options"], place)
    indexed = raw.get("answer_idx") is not None
    given = raw["answer_idx"] if indexed else raw.get("answer")
    chosen = _option_meant(given, raw["options"], options, is_index=indexed)
    if chosen is None:
        raise BadInputError(f"{place} has the answer {str(given).strip()!r}, which is none of its options",
                            "correct that row")  # fmt: skip
    if indexed and raw.get("answer") is not None:
        other = _option_meant(raw["answer"], raw["options"], options, is_index=False)
        if other is not None and options[other] != options[chosen]:
            raise BadInputError(f'{place} has the answer {str(raw["answer"]).strip()!r}, but the "answer_idx" '
                                f"{str(given).strip()!r} is another option (an integer counts from 0)",
                                "correct that row")  # fmt: skip
    text = f" The answer is {LETTERS[chosen]}) {options[chosen].rstrip('.')}."
    prompt = prompt_of(with_options(question, options))
    return Row(_id(dataset, part), dataset, "choice", prompt, text, LETTERS[chosen], options)


def _option_meant(given: Any, raw: Any, options: Sequence[str], is_index: bool) -> int | None:
    """The place of the option that is meant by its key, its letter, its index (from 0) or its text; None: none."""
    said = str(given).strip()
    keys = [str(key).strip() for key in sorted(raw) if raw[key] is not None] if isinstance(raw, Mapping) else []
    texts, indices = list(options), [str(place) for place in range(len(options))]
    is_index = is_index or (isinstance(given, int) and not isinstance(given, bool))
    for names in (keys, indices, texts) if is_index else (texts, keys, indices):
        if said in names:
            return names.index(said)
    letters = LETTERS[: len(options)]
    return letters.index(said.upper()) if len(said) == 1 and said.upper() in letters else None


def _option_texts(options: Any, place: str) -> tuple[str, ...]:
    if isinstance(options, Mapping):
        texts = [options[key] for key in sorted(options) if options[key] is not None]  # Arrow fills gaps with None
    elif isinstance(options, (list, tuple)):
        texts = [item["value"] if isinstance(item, Mapping) and "value" in item else item for item in options]
    else:
        texts = []
    if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise BadInputError(f'{place} has "options" that are not two texts or more', "correct that row")
    return tuple(text.strip() for text in texts)


def _yes_no(raw: Mapping[str, Any], place: str, dataset: str, part: str) -> Row:
    """BoolQ: the passage, then the question, which has no question mark there."""
    gold = _truth(raw.get("answer", raw.get("label")))
    if gold is None:
        raise BadInputError(f'{place} has an "answer" that is neither true nor false', "correct that row")
    question = _text(raw, "question", place).strip()
    question = question[:1].upper() + question[1:] + ("" if question.endswith("?") else "?")
    prompt = prompt_of(f"{_text(raw, 'passage', place).strip()}\n{question}")
    return Row(_id(dataset, part), dataset, "yesno", prompt, f" The answer is {gold}.", gold)


def _truth(value: Any) -> str | None:
    """ "yes" or "no" of true, 1, "Yes", "false"...; None of anything else (the hub marks hidden labels by -1)."""
    said = str(value).strip().lower()
    return "yes" if said in ("true", "yes", "1") else "no" if said in ("false", "no", "0") else None


# ---------------------------------------------------------------- questions with answers of any kind


def _recognised(raw: Mapping[str, Any], place: str) -> tuple[str, str]:
    """Question and answer of a row, by its columns."""
    for prompt, answer in PAIRS:
        if prompt in raw and answer in raw:
            given = raw.get("input") if prompt == "instruction" else None
            more = f"\n{given}" if isinstance(given, str) and given.strip() else ""
            return _text(raw, prompt, place) + more, _text(raw, answer, place)
    for name in TURNS:
        if isinstance(raw.get(name), (list, tuple)):
            return _turns(raw[name], place, name)
    if isinstance(raw.get("text"), str):
        return _divided(raw["text"], place)
    raise BadInputError(f"{place} has the columns {_columns(raw)}, and which are question and answer is not known",
                        FLAGS)  # fmt: skip


def _turns(turns: Sequence[Any], place: str, name: str) -> tuple[str, str]:
    """What was said before the last answer, and that answer. Both layouts: role/content and from/value."""
    said = [(str(t.get("role", t.get("from"))), t.get("content", t.get("value"))) for t in turns
            if isinstance(t, Mapping)]  # fmt: skip
    texts = all(isinstance(content, str) for _, content in said)
    if len(said) < 2 or said[-1][0] not in ("assistant", "gpt", "model") or not texts:
        raise BadInputError(f'{place} has "{name}" that do not end in an answer', "correct that row")
    return "\n".join(content for _, content in said[:-1]), said[-1][1]


def _divided(text: str, place: str) -> tuple[str, str]:
    """A text at its last marker."""
    for marker in MARKERS:
        question, found, answer = text.rpartition(marker)
        if found and question.strip() and answer.strip():
            return question, answer
    marks = ", ".join(repr(marker.strip()) for marker in MARKERS[:3])
    raise BadInputError(f'{place} has a "text" without a marker between question and answer ({marks})', FLAGS)


def _pair(raw: Mapping[str, Any], place: str, dataset: str, part: str, question: str, answer: str) -> Row:
    """A question and an answer of any kind: which kind is read from the answer, options from the question."""
    for what, text in (("question", question), ("answer", answer)):
        if not text.strip():
            raise BadInputError(f"{place} has an empty {what}", "fill it or take the row out")
    answer = _CALCULATOR.sub("", answer)
    options = options_in(question)
    task = stated_task(answer, options)
    gold = read_answer(answer, task, options) or answer.strip()
    return Row(_id(dataset, part), dataset, task, prompt_of(question), _answer(answer), gold,
               options if task == "choice" else ())  # fmt: skip


def options_in(question: str) -> tuple[str, ...]:
    """The texts of lettered options "A) ..., B) ..." at the end of a question; none where there are fewer than two."""
    found = list(_LETTERED.finditer(question))
    starts = [number for number, match in enumerate(found) if match[1] == "A"]
    if not starts:
        return ()
    run = [m for letter, m in zip(LETTERS, found[starts[-1] :], strict=False) if m[1] == letter]
    ends = [match.start() for match in run[1:]] + [len(question)]
    texts = [question[match.end() : end].strip() for match, end in zip(run, ends, strict=True)]
    texts[-1] = _CLOSING.sub("", texts[-1]).split("\n")[0].strip()
    return tuple(texts) if len(texts) > 1 and all(texts) else ()


# ---------------------------------------------------------------- fields


def _id(dataset: str, part: str) -> str:
    return part if dataset in part else f"{dataset}-{part}"


def _answer(text: str) -> str:
    return f" {text.strip()}"


def _named_column(raw: Mapping[str, Any], place: str, name: str | None, which: int) -> str:
    """The text of a column named by a flag, or where only the other was named, of one that is known."""
    flag = ("--prompt_column", "--answer_column")[which]
    if name is None:
        name = next((pair[which] for pair in PAIRS if pair[which] in raw), None)
    if name is None or name not in raw:
        raise BadInputError(f"{place} has no column {name!r}" if name else f"{place}: one column alone is named",
                            f"name one of {_columns(raw)} by {flag}")  # fmt: skip
    return _text(raw, name, place)


def _text(raw: Mapping[str, Any], name: str, place: str) -> str:
    """A field as text; truth values, numbers and labels are written out."""
    value = raw.get(name)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadInputError(f"{place} has no text under {name!r}", "fill it or take the row out")
    return value


def _columns(raw: Mapping[str, Any]) -> str:
    return ", ".join(map(str, list(raw)[:12])) or "none"
