"""The answer in what a model wrote: a number, a letter, yes or no; None where none can be read, never a guess.

What is plainly said to be the answer counts first ("#### 18", a boxed 18, "The answer is 18", a letter or a yes at the
beginning); else a number is the last one, a letter the only one in brackets or that of the only option whose text
occurs, a yes or no the whole last sentence. A base model goes on to write the next "Question:": reading stops there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cai_experiment.ensemble.numerals import Numeral, canonical, numerals, plain
from cai_experiment.errors import BadInputError

if TYPE_CHECKING:
    from cai_experiment.ensemble.layout import Row

TASKS = ("number", "choice", "yesno", "text")
LETTERS = "ABCDEFGHIJ"
UNKNOWN_OPTIONS = 5  # letters that count where the options are not at hand

_GOES_ON = re.compile(r"\bQuestion(?:\s*\d+)?\s*:|\n\s*(?:Q|Human|User)\s*:|<\|(?:endoftext|im_end|im_start)\|>")
_IS = r"\s*(?:is|was|would be|must be|should be|has to be|equals|:|=)[\s:=]*"
_SAID = re.compile(rf"\banswer\b(?:\s+(?:to|for|of)\b[^.:\n]{{0,80}}?)?{_IS}", re.IGNORECASE)
_COLON = re.compile(r"\banswer\s*:\s*\Z", re.IGNORECASE)


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
        return _said_letter(text, options) or _implied_letter(text, options)
    if task == "yesno":
        return _said_truth(text) or _implied_truth(text)
    return text.strip() or None


def right(row: Row, text: str) -> bool | None:
    """Whether `text` gives the row's gold answer; None if no answer can be read from it."""
    answer = read_answer(text, row.task, row.options)
    if answer is None:
        return None
    return answer == row.gold if row.task != "text" else _words(answer) == _words(row.gold)


def stated_task(answer: str, options: Sequence[str] = ()) -> str:
    """The task that a reference answer belongs to, by what it plainly says; "text" if that is none of the others."""
    if options and _said_letter(answer, options):
        return "choice"
    whole = list(numerals(plain(answer.strip())))
    if _said_number(answer) or (len(whole) == 1 and whole[0].end - whole[0].start >= len(plain(answer.strip())) - 1):
        return "number"
    return "yesno" if _said_truth(answer) else "text"


def until_next_question(text: str) -> str:
    """The text up to where a base model begins to write the next question, or the turn of the other."""
    found = _GOES_ON.search(text)
    return text[: found.start()] if found else text


# ---------------------------------------------------------------- what is said to be the answer


def _boxed(text: str) -> Iterator[str]:
    r"""The contents of every \boxed{...}, the last one first; braces within are matched."""
    for found in reversed(list(re.finditer(r"\\f?boxed\s*\{", text))):
        depth, at = 1, found.end()
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        yield text[found.end() : at - 1 if not depth else at]


def _tails(text: str) -> Iterator[tuple[str, bool]]:
    """(what follows "the answer is", True if that was "Answer:"), the last one first."""
    for found in reversed(list(_SAID.finditer(text))):
        yield text[found.end() :], _COLON.search(found[0]) is not None


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
    for content in _boxed(text):
        number = _of_equation(plain(content))
        if number:
            return canonical(number.value)
    tails = [(plain(tail), colon) for tail, colon in _tails(text)]
    for tail, _ in tails:
        number = _direct(tail)
        if number:
            return canonical(number.value)
    for tail, colon in tails:  # "The answer is that she makes 18 dollars"; but "Answer:" may begin a whole derivation
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


# ---------------------------------------------------------------- letters

_TOWARDS = re.compile(r"\A(?:[\s:*_\"'`$#=-]|(?:most likely|probably|likely|therefore|thus|definitely|clearly|option|"
                      r"choice|letter|the|indeed)\b)*", re.IGNORECASE)  # fmt: skip
_CHOSEN = re.compile(r"(?:\b(?:answer|option|choice|response|diagnosis|treatment)\b"
                     rf"(?:\s+(?:to|for|of)\b[^.:\n]{{0,80}}?)?{_IS}"
                     r"|\b(?:choose|select|pick|go with|went with)\b)", re.IGNORECASE)  # fmt: skip
_CALLED_RIGHT = re.compile(r"(?<![\w-])\(?(?P<letter>[A-J])\)?\s+(?:is|seems|would be|must be)\s+(?:the\s+)?"
                           r"(?:most\s+likely\s+)?(?:correct|right|best|answer|most\s+appropriate)\b")  # fmt: skip
_LETTER = re.compile(r"\A(?P<open>[(\[{]?)\s*(?P<letter>[A-Ja-j])(?P<rest>(?![^\W_]).*)\Z", re.DOTALL)
_ENDS = re.compile(r"\A(?:[\s.!?*_\"'`$)\]}]*\Z|\n|[)\]}:;!?]|\*|\.(?=\s+[A-Z(*])|,(?=\s+[a-z])|\.\s*\n|"
                   r"\s+(?:because|since|as|is|which|due)\b|\s+[(–—-])")  # fmt: skip
_SECOND = re.compile(r"\A[)\].*\"']*\s*(?:,|/|&|and\b|or\b)\s*(?:option\s+)?\(?[A-J](?![\w'-])")
_BRACKETED = re.compile(r"(?<![\w)])(?:\((?P<both>[A-Ja-j])\)|(?P<one>[A-J])\))(?!\w)")


def _said_letter(text: str, options: Sequence[str]) -> str | None:
    for content in _boxed(text):
        letter = _letter_at(plain(content), options)
        if letter:
            return letter
    text = plain(text)
    for found in reversed(list(_CHOSEN.finditer(text))):
        letter = _letter_at(text[found.end() :], options)
        if letter:
            return letter
    called = [found["letter"] for found in _CALLED_RIGHT.finditer(text) if found["letter"] in _letters(options)]
    return called[-1] if called else _letter_at(text, options)


def _letter_at(tail: str, options: Sequence[str]) -> str | None:
    """The letter, or the option's text, with which a plain text begins. "A patient" and "B cells" begin with none."""
    lead = _TOWARDS.match(tail)
    tail = tail[lead.end() :] if lead else tail
    named = _option_named(tail, options, at_start=True)
    if named:
        return named
    found = _LETTER.match(tail)
    if found is None or found["letter"].upper() not in _letters(options) or _SECOND.match(found["rest"]):
        return None
    letter, rest = found["letter"].upper(), found["rest"]
    own = options[LETTERS.index(letter)] if options else ""
    if own and _begins(_words(rest), _words(own)):
        return letter
    if found["letter"].islower() and not (rest[:1] in set(")]}") or not rest.strip(" .*\"'`\n")):
        return None
    return letter if _ENDS.match(rest) else None


def _implied_letter(text: str, options: Sequence[str]) -> str | None:
    """The only letter in brackets, or that of the only option whose text occurs."""
    letters = {(found["both"] or found["one"]).upper() for found in _BRACKETED.finditer(plain(text))}
    letters &= set(_letters(options))
    if len(letters) == 1:
        return letters.pop()
    return None if letters else _option_named(text, options, at_start=False)


def _option_named(text: str, options: Sequence[str], at_start: bool) -> str | None:
    """The letter of the only option whose text occurs, whole words; an option within a longer one gives way to it."""
    said = _words(text)
    named = [option for option in options if _words(option)]
    named = [one for one in named if (_begins(said, _words(one)) if at_start else f" {_words(one)} " in f" {said} ")]
    named = [one for one in named if not any(one != other and _words(one) in _words(other) for other in named)]
    return LETTERS[list(options).index(named[0])] if len(named) == 1 else None


def _letters(options: Sequence[str]) -> str:
    return LETTERS[: len(options) or UNKNOWN_OPTIONS]


def _words(text: str) -> str:
    """Letters and digits in lower case, one space between words: how texts are compared."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def _begins(said: str, start: str) -> bool:
    return bool(start) and f"{said} ".startswith(f"{start} ")


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
    contents = [plain(content) for content in _boxed(text)]
    for tail in [*contents, *(plain(tail) for tail, _ in _tails(text)), plain(text)]:
        found = _TRUTH.match(tail)
        if found and not (found["said"].lower() == "no" and _DETERMINES.match(found["rest"])):
            return "yes" if found["said"].lower() in _YES else "no"
    return None


def _implied_truth(text: str) -> str | None:
    """A bare yes or no at the end; else a yes where no other word contradicts it."""
    found = _BARE.search(plain(text))
    if found:
        return "yes" if found["said"].lower() in _YES else "no"
    words = set(_words(text).split())
    return "yes" if "yes" in words and not words & {"no", "not", "false"} else None
