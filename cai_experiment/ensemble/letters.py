"""The letter of an option in what a model wrote, or that of the option whose text it wrote; never a guess."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cai_experiment.ensemble.numerals import plain
from cai_experiment.ensemble.said import IS, boxed

LETTERS = "ABCDEFGHIJ"
UNKNOWN_OPTIONS = 5  # letters that count where the options are not at hand

_TOWARDS = re.compile(r"\A(?:[\s:*_\"'`$#=-]|(?:most likely|probably|likely|therefore|thus|definitely|clearly|option|"
                      r"choice|letter|the|indeed)\b)*", re.IGNORECASE)  # fmt: skip
_CHOSEN = re.compile(r"(?:\b(?:answer|option|choice|response|diagnosis|treatment)\b"
                     rf"(?:\s+(?:to|for|of)\b[^.:\n]{{0,80}}?)?{IS}"
                     r"|\b(?:choose|select|pick|go with|went with)\b)", re.IGNORECASE)  # fmt: skip
_CALLED_RIGHT = re.compile(r"(?<![\w-])\(?(?P<letter>[A-J])\)?\s+(?:is|seems|would be|must be)\s+(?:the\s+)?"
                           r"(?:most\s+likely\s+)?(?:correct|right|best|answer|most\s+appropriate)\b")  # fmt: skip
_LETTER = re.compile(r"\A(?P<open>[(\[{]?)\s*(?P<letter>[A-Ja-j])(?P<rest>(?![^\W_]).*)\Z", re.DOTALL)
_ENDS = re.compile(r"\A(?:[\s.!?*_\"'`$)\]}]*\Z|\n|[)\]}:;!?]|\*|\.(?=\s+[A-Z(*])|,(?=\s+[a-z])|\.\s*\n|"
                   r"\s+(?:because|since|as|is|which|due)\b|\s+[(–—-])")  # fmt: skip
_SECOND = re.compile(r"\A[)\].*\"']*\s*(?:,|/|&|and\b|or\b)\s*(?:option\s+)?\(?[A-J](?![\w'-])")
_BRACKETED = re.compile(r"(?<![\w)])(?:\((?P<both>[A-Ja-j])\)|(?P<one>[A-J])\))(?!\w)")


def said_letter(text: str, options: Sequence[str]) -> str | None:
    for content in boxed(text):
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
    if own and _begins(words(rest), words(own)):
        return letter
    if found["letter"].islower() and not (rest[:1] in set(")]}") or not rest.strip(" .*\"'`\n")):
        return None
    return letter if _ENDS.match(rest) else None


def implied_letter(text: str, options: Sequence[str]) -> str | None:
    """The only letter in brackets, or that of the only option whose text occurs."""
    letters = {(found["both"] or found["one"]).upper() for found in _BRACKETED.finditer(plain(text))}
    letters &= set(_letters(options))
    if len(letters) == 1:
        return letters.pop()
    return None if letters else _option_named(text, options, at_start=False)


def _option_named(text: str, options: Sequence[str], at_start: bool) -> str | None:
    """The letter of the only option whose text occurs, whole words; an option within a longer one gives way to it."""
    said = words(text)
    named = [option for option in options if words(option)]
    named = [one for one in named if (_begins(said, words(one)) if at_start else f" {words(one)} " in f" {said} ")]
    named = [one for one in named if not any(one != other and words(one) in words(other) for other in named)]
    return LETTERS[list(options).index(named[0])] if len(named) == 1 else None


def _letters(options: Sequence[str]) -> str:
    return LETTERS[: len(options) or UNKNOWN_OPTIONS]


def words(text: str) -> str:
    """Letters and digits in lower case, one space between words: how texts are compared."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def _begins(said: str, start: str) -> bool:
    return bool(start) and f"{said} ".startswith(f"{start} ")
