"""The answer in what a model wrote: a number, a letter, yes or no; None where none can be read, never a guess.

What is plainly said to be the answer counts first ("#### 18", a boxed 18, "The answer is 18", a letter or a yes at the
beginning); else a number is the last one, a letter the only one in brackets or that of the only option whose text
occurs, a yes or no the whole last sentence. A base model goes on to write the next "Question:": reading stops there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cai_experiment.ensemble.letters import implied_letter, said_letter, words
from cai_experiment.ensemble.numerals import Numeral, canonical, numerals, plain
from cai_experiment.ensemble.said import NEXT_QUESTION, boxed, tails, until_next_question
from cai_experiment.errors import BadInputError

if TYPE_CHECKING:
    from cai_experiment.ensemble.layout import Row

__all__ = ["NEXT_QUESTION", "TASKS", "read_answer", "right", "stated_task", "until_next_question"]

TASKS = ("number", "choice", "yesno", "text")


def read_answer(text: str, task: str, options: Sequence[str] = ()) -> str | None:
    """The answer of `text` to a question of a task; None if it is unparsed.

    A number comes in one spelling ("1234", "-5", "0.5"), a choice as its letter, yes and no in lower case, a text as it
    is. `options` are the texts of a choice. Raises BadInputError for an unknown task.
    """
    if task not in TASKS:
        raise BadInputError(f"unknown task {task!r}", f"use one of {', '.join(TASKS)}")
    text = until_next_question(text)
    if task == "number":
        return _said_number(text) or _last_number(text)
    if task == "choice":
        return said_letter(text, options) or implied_letter(text, options)
    if task == "yesno":
        return _said_truth(text) or _implied_truth(text)
    return text.strip() or None


def right(row: Row, text: str) -> bool | None:
    """Whether `text` gives the row's gold answer; None if no answer can be read from it."""
    answer = read_answer(text, row.task, row.options)
    if answer is None:
        return None
    return answer == row.gold if row.task != "text" else words(answer) == words(row.gold)


def stated_task(answer: str, options: Sequence[str] = ()) -> str:
    """The task that a reference answer belongs to, by what it plainly says; "text" if that is none of the others."""
    if options and said_letter(answer, options):
        return "choice"
    whole = list(numerals(plain(answer.strip())))
    if _said_number(answer) or (len(whole) == 1 and whole[0].end - whole[0].start >= len(plain(answer.strip())) - 1):
        return "number"
    return "yesno" if _said_truth(answer) else "text"


# ---------------------------------------------------------------- numbers

_HASHES = re.compile(r"(?m)(?:####[ \t]*|^[ \t]*#{1,3}[ \t]+(?=\S+[ \t]*$))(?P<line>[^\n]*)")
_LEAD = re.compile(r"\A(?:[\s:=$£€#~≈(\[\"'`]|(?:approximately|about|exactly|equal to|is|the|final|answer)\b|"
                   r"\w\s*=(?!=))*", re.IGNORECASE)  # fmt: skip
_OPERATOR = re.compile(r"\s*(?:[+*/×÷^]|-\s*[\d(]|x\s*\d|(?:times|plus|minus|divided by)\b)")
_SENTENCE = re.compile(r"\n|(?<!\d)\.(?=\s|\Z)|\.(?=\s+[A-Z])|[;!?]")


def _said_number(text: str) -> str | None:
    for found in _HASHES.finditer(text):
        number = _direct(plain(found["line"]))
        if number:
            return canonical(number.value)
    for content in boxed(text):
        number = _of_equation(plain(content))
        if number:
            return canonical(number.value)
    after = [(plain(tail), colon) for tail, colon in tails(text)]
    for tail, _ in after:
        number = _direct(tail)
        if number:
            return canonical(number.value)
    for tail, colon in after:  # "The answer is that she makes 18 dollars"; but "Answer:" may begin a whole derivation
        sentence = _SENTENCE.split(tail.strip(), maxsplit=1)
        number = None if colon and sentence[1:] and sentence[1].strip() else _of_equation(sentence[0])
        if number:
            return canonical(number.value)
    return None


def _direct(tail: str) -> Numeral | None:
    """The number with which a plain text begins, but for words and marks before it; none that is calculated with."""
    lead = _LEAD.match(tail)
    start = lead.end() if lead else 0
    rest = re.sub(r"\A-\s+(?=[$\d])", "-", tail[start:])
    first = next(numerals(rest), None)
    if first is None or first.start > 0:
        return None
    return _of_equation(rest.split("\n")[0]) if _OPERATOR.match(rest[first.end :]) and "=" in rest else (
        None if _OPERATOR.match(rest[first.end :]) else first)  # fmt: skip


def _of_equation(sentence: str) -> Numeral | None:
    """Of a plain sentence that calculates the first number after its last "=", or its last; else the first number."""
    found = list(numerals(sentence))
    if found and "=" in sentence:
        after = [number for number in found if number.start > sentence.rindex("=")]
        return after[0] if after else found[-1]
    if not found:
        return None
    return found[-1] if _OPERATOR.match(sentence[found[0].end :]) else found[0]


def _last_number(text: str) -> str | None:
    """The number that the last line with one ends on; the result, where that line is an equation."""
    for line in reversed(plain(text).split("\n")):
        found = list(numerals(line))
        if found:
            number = _of_equation(line[line.rindex("=") :]) if "=" in line else found[-1]
            return canonical((number or found[-1]).value)
    return None


# ---------------------------------------------------------------- yes and no

_TRUTH = re.compile(r"\A(?:[\s:*_\"'`(\[{$-]|(?:therefore|thus|so|hence|clearly|probably|definitely)\b,?)*"
                    r"(?P<said>yes|no|true|false)\b(?P<rest>.*)", re.IGNORECASE | re.DOTALL)  # fmt: skip
_DETERMINES = re.compile(  # "No evidence": the no of a noun, unless it is a sentence of its own or begins an answer
    r"\A[ \t]+(?!(?:it|they|he|she|there|that|this|these|those|the|a|an|you|we|i|because|since|not|as|in|at|only)\b)\w",
    re.IGNORECASE,
)
_BARE = re.compile(r"(?:\A|[.!?\n,:;]|\b(?:so|therefore|thus|hence|is|are)\b)[\s*\"'(]*"
                   r"(?P<said>yes|no|not true|true|false)[\s.!*\"')]*\Z", re.IGNORECASE)  # fmt: skip
_YES = ("yes", "true")


def _said_truth(text: str) -> str | None:
    contents = [plain(content) for content in boxed(text)]
    for tail in [*contents, *(plain(tail) for tail, _ in tails(text)), plain(text)]:
        found = _TRUTH.match(tail)
        if found and not (found["said"].lower() == "no" and _DETERMINES.match(found["rest"])):
            return "yes" if found["said"].lower() in _YES else "no"
    return None


def _implied_truth(text: str) -> str | None:
    """A bare yes or no at the end; else a yes where no other word contradicts it."""
    found = _BARE.search(plain(text))
    if found:
        return "yes" if found["said"].lower() in _YES else "no"
    said = set(words(text).split())
    return "yes" if "yes" in said and not said & {"no", "not", "false"} else None
