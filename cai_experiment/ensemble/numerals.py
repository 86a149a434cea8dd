"""Numbers as models write them: "$1,234.00", "-5", "1{,}234", "\\\\frac{1}{2}", "2 1/2", "1.2 million"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
LONGEST = 60  # digits; what is longer is a model that has lost itself

_PLAIN = (  # LaTeX's marks and other signs, and what they are in plain text; in this order
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r" \1/\2"),
    (re.compile(r"(?<=\d)(?:\{,\}|\\[,!;: ]\s*|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\[()\[\],!; ]|\*\*|\\(?=[$%])"), ""),
    (re.compile("[\u201c\u201d\u2018\u2019]"), '"'),
    (re.compile("[\u2212\u2013](?=[$£€]?[.\\d])"), "-"),
)
_NUMBER = re.compile(
    r"(?P<sign>-)?(?P<money>[$£€]\s?)?(?P<inner>-)?(?<![\w.])"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d+|(?=\.\d))(?P<decimals>\.\d+)?"
    r"(?P<part>(?:(?<!\.)\s(?P<above>\d+))?/(?P<below>\d+)(?![\d/]))?"
    r"(?:\s?(?P<scale>hundred|thousand|million|billion)\b)?",
    re.IGNORECASE,
)

OPEN, DENIED = "\ue000", "\ue001"  # stand for "5 or 6" and "not 18" in a `decided` text
_WRITTEN = r"-?[$£€]?\s?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?%?"
_OR = re.compile(rf"(?<![\w.])(?P<one>{_WRITTEN})\s*(?P<unit>(?:[a-z]+\s+){{0,2}}?),?\s*\bor\s+"
                 rf"(?:(?:maybe|possibly|perhaps|about)\s+|(?P<name>\w)\s*=\s*)?(?P<two>{_WRITTEN})(?![\w/]|\s*=)"
                 r"(?:\s+(?P<other>[a-z]+))?")  # fmt: skip
_BETWEEN = re.compile(rf"\bbetween\s+{_WRITTEN}\s+(?:[a-z]+\s+)?and\s+{_WRITTEN}(?![\w/])", re.IGNORECASE)
_NOT = re.compile(rf"(?:\b(?:not|never|rather than|instead of)|n['\"]t)\s+(?:equal to\s+|exactly\s+|the\s+)?{_WRITTEN}",
                  re.IGNORECASE)  # fmt: skip


class Numeral(NamedTuple):
    """A number in a text: its value, and where it is written."""

    value: Fraction
    start: int
    end: int


def plain(text: str) -> str:
    """The text without LaTeX around its numbers, without bold marks, and with one kind of minus sign."""
    for pattern, instead in _PLAIN:
        text = pattern.sub(instead, text)
    return text


def numerals(text: str) -> Iterator[Numeral]:
    """The numbers of a `plain` text in order; the 2 of "x2" is none, and "16 - 3" holds 16 and 3."""
    for found in _NUMBER.finditer(text):
        value = _value(found)
        if value is not None:
            yield Numeral(-value if _is_negative(text, found) else value, found.start(), found.end())


def decided(text: str) -> str:
    """A `plain` text without the numbers that it denies or leaves open; `DENIED` and `OPEN` are in their places."""
    return _NOT.sub(DENIED, _BETWEEN.sub(OPEN, _OR.sub(_open, text)))


def _open(found: re.Match[str]) -> str:
    """`OPEN` for "5 or 6"; "2 hours or 120 minutes", "0.5 or 50%" and "5A = 100 or A = 20" say one thing twice."""
    name = found["name"]
    if name and not re.search(rf"(?<!\w){name}\s*=\s*\Z", found.string[: found.start()]):
        return found[0]
    one, two = (next(numerals(found[side]), None) for side in ("one", "two"))
    units = [(found[side] or "").split()[-1:] for side in ("unit", "other")]
    differ = all(units) and units[0][0].rstrip("s") != units[1][0].rstrip("s")
    same = one and two and (one.value == two.value or ("%" in found["two"] and one.value * 100 == two.value))
    return found[0] if differ or same else OPEN


def canonical(value: Fraction) -> str:
    """ "1234", "12.5" or, where no decimal is exact, "1/3": equal numbers in one spelling."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if value.denominator == 1 or rest != 1:
        return str(value)
    return format(Decimal(value.numerator) / Decimal(value.denominator), "f")


def _value(found: re.Match[str]) -> Fraction | None:
    written = found["digits"].replace(",", "") + (found["decimals"] or "")
    if len(found[0]) > LONGEST or (found["below"] and int(found["below"]) == 0):
        return None
    value = Fraction(written if written[0] != "." else f"0{written}")
    if found["part"]:
        below = int(found["below"])
        value = value / below if found["above"] is None else value + Fraction(int(found["above"]), below)
    return value * SCALES[found["scale"].lower()] if found["scale"] else value


def _is_negative(text: str, found: re.Match[str]) -> bool:
    """True for a minus sign that belongs to the number: not one between two numbers, nor a hyphen in a word."""
    if found["inner"] and found["money"]:
        return True
    before = text[: found.start()]
    if not (found["sign"] or found["inner"]) or (before and (before[-1].isalnum() or before[-1] in ")%.")):
        return False
    return before.rstrip()[-1:] not in set("0123456789)%")
