"""GSM8K (Cobbe et al. 2021) asked directly: grade-school problems in the trained layout, read by their number.

lm-eval's task of the same name asks with five worked solutions in a layout of its own. Here both arms get the bare
question, as training and use do: a base model has no worked examples to lean on, so its rate is lower than published
ones, and only the difference between the arms is meant.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from cai_experiment.errors import BadInputError
from cai_experiment.evaluation.arms import BothAnswers, BothArms
from cai_experiment.evaluation.forgetting import paired
from cai_experiment.evaluation.found import Evaluation
from cai_experiment.records.files import parse_line, show

NAME = "gsm8k_direct"
MAX_TOKENS = 512
MARK = "####"  # before the number in the data's own answers
_MINUS = r"(?:(?<!\d)(?<!\d\s)-)?"
_NUMBER = rf"{_MINUS}(?:\$\s?{_MINUS})?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_ANY = re.compile(_NUMBER)
_MARKED = (re.compile(rf"{MARK}\s*({_NUMBER})"), re.compile(rf"\\boxed\s*\{{(?:[^{{}}]*=)?\s*({_NUMBER})"))
_SAID = re.compile(
    r"\banswer\b\**(?:\s+(?:is|are|equals)\b|\s*[:=])(.*?)(?:[.!?](?=\s|$)|$)", re.IGNORECASE | re.MULTILINE
)
_THIN = re.compile(r"\\[,!;: ]")  # LaTeX's spaces, which part thousands: 70\,000, as does {,}
_NEXT = re.compile(  # a model that goes on asks itself the next question
    r"^[ \t]*(?:#{1,3} +|\*\*)?(?:Question|Problem|Q)(?: +\d+)?(?:\*\*)?:", re.IGNORECASE | re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem with its right number."""

    id: str
    question: str
    number: Decimal


def load_gsm8k(path: Path, limit: int | None = None) -> list[Problem]:
    """The first `limit` problems of a JSONL file of {question, answer}, whose answers end in "#### NUMBER".

    Blank lines are passed over. Raises BadInputError, naming file and line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise BadInputError(f"cannot read {show(path)}: {error.strerror}", "check --gsm8k") from None
    found = [_problem(raw, path, number) for number, raw in enumerate(lines, 1) if raw.strip()]
    if not found:
        raise BadInputError(f"{show(path)} holds no problem", "give a JSONL file of {question, answer} to --gsm8k")
    return found[:limit]


def _problem(raw: bytes, path: Path, line: int) -> Problem:
    place = f"{show(path)}:{line}"
    try:
        row = parse_line(raw)
    except ValueError as error:
        raise BadInputError(f"{place} {error}", "mend or remove the line") from None
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str) or not question.strip():
        raise BadInputError(f'{place} has no text "question" and "answer"', "mend or remove the line")
    number = read_number(answer) if MARK in answer else None
    if number is None:
        raise BadInputError(f'{place}: its answer has no "{MARK} NUMBER"', "mend or remove the line")
    return Problem(f"gsm8k/{line}", question.strip(), number)


def read_number(text: str) -> Decimal | None:
    """The number that a text gives as its answer: after "####", in \\boxed{}, after "the answer is", else the last one.

    Of several signs of one kind the last counts; of "the answer is 9 - 3 = 6" what follows the last "=", of "the answer
    is 2 dozen, or 24" the last number. What stands after a number under a line "Question:" is no answer. Thousands
    commas and dollar signs are passed over, and a minus after a number is a sum's. None if there is no number.
    """
    text = _THIN.sub("", _own(text).replace("−", "-").replace("\\$", "$").replace("{,}", ","))
    for pattern in _MARKED:
        if marked := pattern.findall(text):
            return _decimal(marked[-1])
    for said in reversed(_SAID.findall(text)):
        _, equals, result = said.rpartition("=")
        if numbers := _ANY.findall(result):
            return _decimal(numbers[0 if equals else -1])
    numbers = _ANY.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def _own(text: str) -> str:
    """A text up to the next question that it asks itself; a question repeated before any number is no such one."""
    for question in _NEXT.finditer(text):
        if _ANY.search(before := text[: question.start()]):
            return before
    return text


def _decimal(text: str) -> Decimal:
    return Decimal(re.sub(r"[\s$,]", "", text))


def gsm8k(arms: BothArms, problems: Sequence[Problem]) -> Evaluation:
    """Both arms' shares of right answers at temperature 0, paired, with the gate of what may be forgotten.

    An answer without a number is a wrong answer, and a note counts them.
    """
    answers = arms.answer("gsm8k", [problem.question for problem in problems], MAX_TOKENS, 0.0)
    return score(answers, problems)


def score(answers: Sequence[BothAnswers], problems: Sequence[Problem]) -> Evaluation:
    """What the answers to `problems` (in their order) are worth."""
    read = [(a, p) for a, p in zip(answers, problems, strict=True) if not a.failed]
    rows = [
        {
            "id": problem.id,
            "instruction": problem.question,
            "base": read_number(both.base.text) == problem.number,
            "trained": read_number(both.trained.text) == problem.number,
            "right": str(problem.number),
            "base_text": both.base.text,
            "trained_text": both.trained.text,
        }
        for both, problem in read
    ]
    base, trained = [bool(row["base"]) for row in rows], [bool(row["trained"]) for row in rows]
    found = paired(NAME, base, trained, rows, len(answers) - len(read))
    found.notes.append(_without_number(answers))
    return found


def _without_number(answers: Sequence[BothAnswers]) -> str:
    none = {arm: sum(read_number(getattr(one, arm).text) is None for one in answers) for arm in ("base", "trained")}
    return (f"{NAME}: asked without worked examples, {MAX_TOKENS} tokens at temperature 0; answers without a number "
            f"(wrong): base {none['base']}, trained {none['trained']}, of {len(answers)}")  # fmt: skip
