"""A text as words that rules can compare: sentences of normalised words, each with its place in the original text.

Width, case, accents, curly quotes, invisible characters and Cyrillic look-alikes make no difference to the words; the
places always point into the text as it was given.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

# a word ("can't" is one), or the end of a sentence: a full stop inside "u.s" or "3.5" is none
_PIECES = re.compile(r"(?P<word>[^\W_]+(?:'[^\W_]+)*)|(?P<end>[.!?]+(?=[\s\"')\]]|\Z)|;|\n+)")
_QUOTES = dict.fromkeys("‘’‛`´ʼ′＇", "'")
_LOOK_ALIKES = dict(zip("аеорсухіјѕһ", "aeopcyxijsh", strict=True))  # Cyrillic letters drawn like Latin ones


LONGEST = 200  # words; a longer "sentence" (a list, a hostile text) is cut, so that matching stays linear


_SKIPPED = frozenset({"a", "an", "the", "any", "some"})  # they tell no rule anything
_BRITISH = re.compile(r"^(neighb|harb|fav|lab|rum|hon|tum|hum|vap|arm|col|flav|behavi)our")
_SPELLINGS = {"tyre": "tire", "tyres": "tires", "licence": "license", "licences": "licenses", "cheque": "check",
              "cheques": "checks", "defence": "defense", "offence": "offense", "jewellery": "jewelry",
              "programme": "program", "grey": "gray", "mum": "mom", "maths": "math", "centre": "center"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sentence:
    """The words of one sentence as `plain_word` gives them, without articles; word i is text[starts[i]:ends[i]]."""

    words: tuple[str, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]


@lru_cache(maxsize=50_000)
def plain_word(word: str) -> str:
    """A lower-case word without "'s", in American spelling; "" for an article, which no rule looks at."""
    word = word.removesuffix("'s")
    if word in _SKIPPED:
        return ""
    if word.endswith(("ise", "ises", "ised", "ising", "yse", "yses", "ysing")) and len(word) > 5:
        head, tail = word[:-5], word[-5:]  # "exercise" too: rules and texts are spelled alike, whatever is right
        return head + tail.replace("is", "iz").replace("ys", "yz")
    return _SPELLINGS.get(word) or (_BRITISH.sub(r"\1or", word) if "our" in word else word)


def sentences(text: str) -> list[Sentence]:
    """The sentences of a text that hold words, in order. Linear in the text's length."""
    plain, places = _normalised(text)
    found: list[Sentence] = []
    words: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    for piece in _PIECES.finditer(plain):
        if piece.lastgroup == "word":
            word = plain_word(piece.group())
            if word:
                words.append(word)
                starts.append(piece.start())
                ends.append(piece.end())
        if words and (piece.lastgroup == "end" or len(words) == LONGEST):
            found.append(_sentence(words, starts, ends, places))
            words, starts, ends = [], [], []
    if words:
        found.append(_sentence(words, starts, ends, places))
    return found


def _sentence(words: list[str], starts: list[int], ends: list[int], places: list[int] | None) -> Sentence:
    if places is not None:
        ends = [places[end - 1] + 1 for end in ends]
        starts = [places[start] for start in starts]
    return Sentence(tuple(words), tuple(starts), tuple(ends))


def _normalised(text: str) -> tuple[str, list[int] | None]:
    """The text in plain lower-case letters, and each letter's place in the original (None: the same places)."""
    if text.isascii():
        return text.lower(), None
    letters: list[str] = []
    places: list[int] = []
    for place, character in enumerate(text):
        plain = _plain(character)
        letters.append(plain)
        places.extend([place] * len(plain))
    return "".join(letters), places


@lru_cache(maxsize=4096)
def _plain(character: str) -> str:
    """One character as its plain lower-case letters; nothing for an accent or an invisible character."""
    if character in _QUOTES:
        return "'"
    decomposed = unicodedata.normalize("NFKD", character).lower()
    kept = (_LOOK_ALIKES.get(c, _QUOTES.get(c, c)) for c in decomposed)
    return "".join(c for c in kept if unicodedata.category(c) not in ("Mn", "Cf"))
