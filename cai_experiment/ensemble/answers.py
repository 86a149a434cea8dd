"""The answer in what a model wrote: a number, a letter, yes or no; None where none can be read, never a guess.

What is plainly said to be the answer counts first ("#### 18", a boxed 18, "The answer is 18", a letter or a yes at the
beginning); else a number is the one that the text begins with, as a line or sentence of its own, or the last one; a
letter the only one in brackets, or that of the only option whose text occurs; a yes or no the whole last sentence. What
is denied ("not 18") or left open ("A or D") is none. A base model goes on to write the next "Question:": reading stops
there (`NEXT_QUESTION`).

The table that this reader is tested on (tests/test_ensemble_data.py) was written by those who wrote the reader, and
extended by a reviewer's cases: being right on all of it is no measure of how often it is right on others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cai_experiment.ensemble.letters import implied_letter, said_letter, words
from cai_experiment.ensemble.numerals import DENIED, OPEN, Numeral, canonical, decided, numerals, plain
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
        return _read_number(text)
    if task == "choice":
        letter = said_letter(text, options)
        return letter or None if letter is not None else implied_letter(text, options)
    if task == "yesno":
        truth = _said_truth(text)
        return truth or None if truth is not None else _implied_truth(text)
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
    written = plain(answer.strip())
    whole = list(numerals(written))
    if _said_number(decided(written)) or (len(whole) == 1 and whole[0].end - whole[0].start >= len(written) - 1):
        return "number"
    return "yesno" if _said_truth(answer) else "text"


# ---------------------------------------------------------------- numbers

_HASHES = re.compile(r"(?m)(?:####[ \t]*|^[ \t]*#{1,3}[ \t]+(?=\S+[ \t]*$))(?P<line>[^\n#]*)")
_HEADING = re.compile(r"\s*\d{1,2}[.)]\s+\S")
_PER_CENT, _ORDINAL = r"(?:\s*(?:%|percent\b|°\w?|[$£€]))?", r"(?!(?:st|nd|rd|th)\b)"
_LINE_ENDS = re.compile(rf"\A{_PER_CENT}(?:\s*{_ORDINAL}[a-z/][\w/'.-]*(?:\s+[a-z/][\w/'.-]*){{0,3}}|\s+[A-Z]{{2,4}})?"
                        r"(?:[\s.!*$)\]\"'`]*\Z|\s*=|\s*\(\W*\d|,\s+(?:because|since|as)\b)")  # fmt: skip
_SENTENCE_ENDS = re.compile(rf"\A{_PER_CENT}(?:\s*{_ORDINAL}[a-z][\w/'-]*"
                            r"(?:\s+(?:per|an?|each|every|of|square|cubic)\s+[a-z][\w'-]*)*)?"
                            r"[*$)\]\"'`]*[ \t]*(?:\Z|\n|[.!;][*\"'`]*(?=\s|\Z))")  # fmt: skip
_LEAD = re.compile(r"\A(?:[\s:=$£€#~≈(\[\"'`]|(?:approximately|about|exactly|equal to|is|the|final|answer)\b|"
                   r"\w\s*=(?!=))*", re.IGNORECASE)  # fmt: skip
_OPERATOR = re.compile(r"\s*(?:[+*/×÷^]|-\s*[\d(]|x\s*\d|(?:times|plus|minus|divided by)\b)")
_SENTENCE = re.compile(r"\n|(?<!\d)\.(?=\s|\Z)|\.(?=\s+[A-Z])|[;!?]")


def _read_number(text: str) -> str | None:
    text = decided(plain(text))
    said = _said_number(text)
    return said or None if said is not None else _leading_number(text) or _last_number(text)


def _said_number(text: str) -> str | None:
    """The number said to be the answer of a plain, `decided` text; "" if what is said leaves it open."""
    hashed = _hashed_number(text)
    if hashed:
        return canonical(hashed.value)
    for content in boxed(text):
        number = _of_equation(content)
        if number:
            return canonical(number.value)
    after = [(tail.strip(), colon) for tail, colon in tails(text)]
    sentences = [_SENTENCE.split(tail, maxsplit=1) for tail, _ in after]
    for (tail, _), sentence in zip(after, sentences, strict=True):
        number = _direct(tail)
        if number:
            return canonical(number.value)
        if OPEN in sentence[0] and not any(numerals(sentence[0])):
            return ""
    for (_, colon), sentence in zip(after, sentences, strict=True):
        # "The answer is that she makes 18 dollars"; but "Answer:" may begin a whole derivation
        number = None if colon and sentence[1:] and sentence[1].strip() else _of_equation(sentence[0])
        if number:
            return canonical(number.value)
    return "" if any(DENIED in sentence[0] for sentence in sentences) else None


def _hashed_number(text: str) -> Numeral | None:
    """The number of the last "#### 18" before a question is asked; a heading ("#### 1. Add") holds none."""
    found, lines = [], list(_HASHES.finditer(text))
    headed = any(_HEADING.match(match["line"]) for match in lines)
    for match in lines:
        number = None if headed and match["line"].rstrip()[-1:] in (".", ")") else _direct(match["line"])
        if number and _LINE_ENDS.match(match["line"][number.end :]):
            found.append((number, match))
    if not found:
        return None
    first, last = found[0][1], found[-1][1]
    counted = [number.value for number, _ in found] == list(range(1, len(found) + 1))
    listed = len(found) > 1 or first["line"].rstrip()[-1:] in (".", ")") or not text[: first.start()].strip()
    if counted and listed and text[last.end() :].strip():
        return None  # steps that are numbered
    kept = [number for number, match in found if "?" not in text[first.end() : match.start()]]
    return kept[-1] if kept else found[0][0]


def _direct(tail: str) -> Numeral | None:
    """The number with which a plain text begins, but for words and marks before it; none that is calculated with."""
    lead = _LEAD.match(tail)
    start = lead.end() if lead else 0
    rest = re.sub(r"\A-\s+(?=[$\d])", "-", tail[start:])
    first = next(numerals(rest), None)
    if first is None or first.start > 0:
        return None
    if _OPERATOR.match(rest[first.end :]):
        first = _of_equation(rest.split("\n")[0]) if "=" in rest else None
    shift = len(tail) - len(rest)
    return first and first._replace(start=first.start + shift, end=first.end + shift)


def _of_equation(sentence: str) -> Numeral | None:
    """Of a plain sentence that calculates the first number after its last "=", or its last; else the first number."""
    found = list(numerals(sentence))
    if found and "=" in sentence:
        after = [number for number in found if number.start > sentence.rindex("=")]
        return after[0] if after else found[-1]
    if not found:
        return None
    return found[-1] if _OPERATOR.match(sentence[found[0].end :]) else found[0]


def _leading_number(text: str) -> str | None:
    """The number with which a text begins, where its line or sentence ends: "18 eggs." and then an explanation."""
    text = text.lstrip(" \t\n*\"'`([$")
    first = next(numerals(text), None)
    if first is None or first.start > 0 or not _SENTENCE_ENDS.match(text[first.end :]):
        return None
    listed = first.value == 1 and text[first.end : first.end + 1] == "." and text[first.end + 1 :].strip()
    return None if listed else canonical(first.value)


def _last_number(text: str) -> str | None:
    """The number that the last line with one ends on; the result, where that line is an equation."""
    for line in reversed(text.split("\n")):
        found = list(numerals(line))
        if OPEN in line and (not found or line.rindex(OPEN) > found[-1].start):
            return None
        if found:
            number = _of_equation(line[line.rindex("=") :]) if "=" in line else found[-1]
            return canonical((number or found[-1]).value)
        if DENIED in line:
            return None
    return None


# ---------------------------------------------------------------- yes and no

_TRUTH = re.compile(r"\A(?:[\s:*_\"'`(\[{$-]|(?:therefore|thus|so|hence|clearly|probably|definitely)\b,?)*"
                    r"(?P<said>yes|no|true|false)\b(?P<rest>.*)", re.IGNORECASE | re.DOTALL)  # fmt: skip
_DETERMINES = re.compile(  # "No evidence": the no of a noun, unless it is a sentence of its own or begins an answer
    r"\A[ \t]+(?!(?:it|they|he|she|there|that|this|these|those|the|a|an|you|we|i|because|since|not|as|in|at|only)\b)\w",
    re.IGNORECASE,
)
_OR_NOT = re.compile(r"\A[\"'*]*\s*(?:,?\s*\b(?:or|and)\b|/)\s*[\"'*]*(?:yes|no|true|false|maybe)\b", re.IGNORECASE)
_BARE = re.compile(r"(?:\A|[.!?\n,:;]|\b(?:so|therefore|thus|hence|is|are)\b)[\s*\"'(]*"
                   r"(?P<said>yes|no|not true|true|false)[\s.!*\"')]*\Z", re.IGNORECASE)  # fmt: skip
_YES = ("yes", "true")


def _said_truth(text: str) -> str | None:
    """Yes or no where it is said to be the answer, or begins the text; "" for "yes or no"."""
    contents = [plain(content) for content in boxed(text)]
    for tail in [*contents, *(plain(tail) for tail, _ in tails(text)), plain(text)]:
        found = _TRUTH.match(tail)
        if found and _OR_NOT.match(found["rest"]):
            return ""
        if found and not (found["said"].lower() == "no" and _DETERMINES.match(found["rest"])):
            return "yes" if found["said"].lower() in _YES else "no"
    return None


def _implied_truth(text: str) -> str | None:
    """A bare yes or no at the end; else a yes where no other word contradicts it."""
    found = _BARE.search(plain(text))
    if found:
        return "yes" if found["said"].lower() in _YES else "no"
    said = set(words(text).split())
    denied = said & {"no", "not", "false", "neither", "nor", "never", "cannot"} or re.search(r"n['\"]t\b", plain(text))
    return "yes" if "yes" in said and not denied else None
