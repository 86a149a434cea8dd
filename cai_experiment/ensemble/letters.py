"""The letter of an option in what a model wrote, or that of the option whose text it wrote; never a guess."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cai_experiment.ensemble.numerals import plain
from cai_experiment.ensemble.said import IS, boxed

LETTERS = "ABCDEFGHIJ"
_WORD = re.compile(r"[^\W_]+")
_MASK = 0xE100  # the first of the signs that stand for options
UNKNOWN_OPTIONS = 5  # letters that count where the options are not at hand

_TOWARDS = re.compile(r"\A(?:[\s:*_\"'`$#=-]|(?:most likely|probably|likely|therefore|thus|definitely|clearly|option|"
                      r"choice|letter|the|indeed)\b)*", re.IGNORECASE)  # fmt: skip
_CHOSEN = re.compile(r"(?:\b(?:answer|option|choice|response|diagnosis|treatment)\b"
                     rf"(?:\s+(?:to|for|of)\b[^.:\n]{{0,80}}?)?{IS}"
                     r"|\b(?:choose|select|pick|go with|went with)\b)", re.IGNORECASE)  # fmt: skip
_CALLED_RIGHT = re.compile(r"(?<![\w-])\(?(?P<letter>[A-J])(?:\)?|[).:]\s+(?:(?!(?:is|not)\b)[^\s.,;:\n]+\s+){0,7}?"
                           r"(?!(?:is|not)\b)[^\s.,;:\n]+)\s+(?:is|seems|would be|must be)\s+(?:the\s+)?"
                           r"(?:most\s+likely\s+)?(?:correct|right|best|answer|most\s+appropriate)\b")  # fmt: skip
_LETTER = re.compile(r"\A(?P<open>[(\[{]?)\s*(?P<letter>[A-Ja-j])(?P<rest>(?![^\W_]).*)\Z", re.DOTALL)
_ENDS = re.compile(r"\A(?:[\s.!?*_\"'`$)\]}]*\Z|\n|[)\]}:;!?]|\*|\.(?=\s+[A-Z(*])|,(?=\s+[a-z])|\.\s*\n|"
                   r"\s+(?:because|since|as|is|which|due)\b|\s+[(–—-])")  # fmt: skip
_SECOND = re.compile(  # "A or B"; at some distance only what cannot be but a letter: "A) Aspirin or D) Metformin"
    r"\A[)\].*\"']*\s*(?:,|/|&|,?\s*\b(?:and|or)\b)\s*(?:(?:maybe|possibly|perhaps|else|option)\s+)*\(?[A-J](?![\w'-])"
    r"|\A[)\]:*\"']+\s*(?:(?!(?:because|since|than|as)\b)[^\s.,;\n]+\s+){0,8}?(?:[^\s.,;\n]+)?,?\s*\b(?:and|or)\s+"
    r"(?:(?:maybe|possibly|perhaps|else|option)\s+)*\(?[A-J][).]"
)
_BRACKETED = re.compile(r"(?<![\w)])(?:\((?P<both>[A-Ja-j])\)|(?P<one>[A-J])\))(?!\w)")
_CLAUSE = re.compile(r"([,;!?\n]|\.(?=\s+[A-Z(]|\s*\Z))")
_DENIAL = re.compile(r"\b(?:not|never|cannot|neither|nor|wrong|incorrect|incorrectly|false|unlikely|excluded|ruled out|"
                     r"rather than|instead of|unlike|except)\b|n['\"]t\b", re.IGNORECASE)  # fmt: skip
_CALLED_WRONG = re.compile(
    r"\A[)\].:*\"']*\s*(?:(?!(?:because|since|as|while|whereas|but)\b)[^\s.,;:\n]+\s+){0,8}?(?:(?:is|are|was|were|would"
    r"|can|could|should|may|must|does|do|seems?|looks?)(?:\s+(?:be|also|clearly|definitely|likely|probably))*\s+"
    r"(?:not|never|wrong|incorrect|false|unlikely|less|excluded|ruled|contraindicated|(?:the|an?)\s+(?:wrong|incorrect))"
    r"|(?:is|are|does|was|would|could|should|ca)n['\"]t|cannot|wrong|incorrect|false)\b", re.IGNORECASE)  # fmt: skip
_NOT_BEFORE = re.compile(r"(?:\b(?:not|never|cannot)|n['\"]t)\s+(?:\w+\s+)?\Z", re.IGNORECASE)
_LISTED = re.compile(r"(?:\A|(?<=\s))\(?([A-J])[).:]\s")


def said_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter said to be the answer, None if none is; "" if what is said leaves it open ("A or B")."""
    for content in boxed(text):
        letter = _letter_at(plain(content), options)
        if letter is not None:
            return letter
    text = plain(text)
    for found in reversed(list(_CHOSEN.finditer(text))):
        letter = None if _NOT_BEFORE.search(text[: found.start()]) else _letter_at(text[found.end() :], options)
        if letter is not None:
            return letter
    masked = _masked(text, options)
    called = [found["letter"] for found in _CALLED_RIGHT.finditer(masked) if found["letter"] in _letters(options)]
    if called:
        return called[-1]
    return None if _restates(masked, options) else _letter_at(text, options, opens=True)


def _letter_at(tail: str, options: Sequence[str], opens: bool = False) -> str | None:
    """The letter, or the option's text, with which a plain text begins. "A patient" and "B cells" begin with none.

    "" for a letter or a text that is one of two. `opens`: nothing before it says that it is the answer, so that one
    which is then called wrong is none.
    """
    lead = _TOWARDS.match(tail)
    whole, tail = tail, tail[lead.end() :] if lead else tail
    named = _option_named(whole, options, at_start=True)
    tail = whole if named else tail  # the option's own "The" leads to nothing
    named = named or _option_named(tail, options, at_start=True)
    if named:
        return _unless_denied(named, tail[_end_of(tail, options[LETTERS.index(named)]) :], options, opens)
    found = _LETTER.match(tail)
    if found is None or found["letter"].upper() not in _letters(options):
        return None
    letter, rest = found["letter"].upper(), found["rest"]
    if _SECOND.match(rest):
        return ""
    own = options[LETTERS.index(letter)] if options else ""
    if own and _begins(words(rest), words(own)):
        return _unless_denied(letter, rest[_end_of(rest, own) :], options, opens)
    if found["letter"].islower() and not (rest[:1] in set(")]}") or not rest.strip(" .*\"'`\n")):
        return None
    return _unless_denied(letter, rest, (), opens) if _ENDS.match(rest) else None


def _unless_denied(letter: str, rest: str, options: Sequence[str], opens: bool) -> str | None:
    """The letter; "" where `rest` goes on with another option, None where it `opens` and `rest` calls it wrong."""
    other = re.match(r",?\s+(?:or|and)\s+", rest)
    if _SECOND.match(rest) or (other and _option_named(rest[other.end() :], options, at_start=True)):
        return ""
    return None if opens and _CALLED_WRONG.match(rest) else letter


def _end_of(text: str, option: str) -> int:
    """Where the option's words, with which the text begins, end in it."""
    ends = [found.end() for found in _WORD.finditer(text)]
    return ends[len(words(option).split()) - 1]


def _restates(text: str, options: Sequence[str]) -> bool:
    """True for a masked text that begins by listing all options, "A) ... B) ..."."""
    listed = "".join(_LISTED.findall(text.lstrip()))
    first = _LISTED.match(text.lstrip())
    return first is not None and listed.startswith(LETTERS[: len(options) or 3])


def implied_letter(text: str, options: Sequence[str]) -> str | None:
    """The only letter in brackets, or that of the only option whose text occurs, where nothing there is denied."""
    text = _affirmed(_masked(plain(text), options))
    for number, option in enumerate(options):
        text = text.replace(chr(_MASK + number), option)
    letters = {(found["both"] or found["one"]).upper() for found in _BRACKETED.finditer(text)}
    letters &= set(_letters(options))
    if len(letters) == 1:
        return letters.pop()
    return None if letters else _option_named(text, options, at_start=False)


def _masked(text: str, options: Sequence[str]) -> str:
    """The text with a sign in place of every option in it, whose own commas, letters and "not" say nothing."""
    for number in sorted(range(len(options)), key=lambda number: -len(options[number])):
        option = plain(options[number]).strip().rstrip(".")
        if len(option) > 1:
            text = re.sub(rf"(?<!\w){re.escape(option)}(?!\w)", chr(_MASK + number), text, flags=re.IGNORECASE)
    return text


def _affirmed(text: str) -> str:
    """The masked text without the clauses that deny something."""
    kept = _CLAUSE.split(text)
    kept[::2] = [" " if _DENIAL.search(clause) else clause for clause in kept[::2]]
    return "".join(kept)


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
    return " ".join(_WORD.findall(text.lower()))


def _begins(said: str, start: str) -> bool:
    return bool(start) and f"{said} ".startswith(f"{start} ")
