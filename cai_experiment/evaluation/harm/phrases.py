"""The small language of the harm rules: phrases, parts, and how parts must stand in a sentence.

A phrase is words: "pick the lock". In it, `word~` stands for the word and its endings -s and -ing (steal~: steal,
steals, stealing; what is irregular is listed: knife, knives). Past forms are left out on purpose, since they
mostly report what happened ("he stole it"). `word*` is any word that begins so. `_` is one word or none. `$name` alone
is a group of phrases of words.yaml. A part is a list of phrases, any of which will do; a rule's parts must stand in
one sentence in their order, at most `within` words between neighbours.

Matching compares whole words: there are no regular expressions to be slow or wrong, and its time is linear.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import permutations
from typing import Iterable, Iterator, Mapping, NamedTuple, Sequence

from cai_experiment.evaluation.harm.text import plain_word

_VOWELS = "aeiou"
_LONGEST_PREFIX = 30
_CACHED_WORDS = 50_000  # what a word begins is looked up once; the cache is emptied at this size

Hit = tuple[int, int]  # first word and the word after the last, within a sentence
Hits = dict[int, list[Hit]]  # by slot


class Match(NamedTuple):
    """Where a rule's parts stand, in words of a sentence: where the first and the last part begin, and the end."""

    first: int
    last: int
    end: int


class PhraseError(ValueError):
    """A phrase that cannot be read; the message says why."""


@dataclass(frozen=True, slots=True)
class _Word:
    """One word of a phrase: its forms, or what it begins with; `optional` for `_`, which is any word."""

    forms: frozenset[str] = frozenset()
    prefix: str = ""
    optional: bool = False

    def fits(self, word: str) -> bool:
        return word in self.forms or bool(self.prefix and word.startswith(self.prefix))


def endings(word: str) -> frozenset[str]:
    """A word with its endings -s and -ing, spelled by the usual rules (both spellings where a letter may double)."""
    if len(word) > 2 and word.endswith("y") and word[-2] not in _VOWELS:
        plural = word[:-1] + "ies"
    else:
        plural = word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")
    if word.endswith("ie"):
        return frozenset({word, plural, word[:-2] + "ying"})
    if word.endswith("e") and not word.endswith(("ee", "oe", "ye")):
        return frozenset({word, plural, word[:-1] + "ing"})
    forms = {word, plural, word + "ing"}
    if len(word) > 2 and word[-1] not in _VOWELS + "wxy" and word[-2] in _VOWELS and word[-3] not in _VOWELS:
        forms.add(word + word[-1] + "ing")
    return frozenset(forms)


def read_phrase(phrase: str) -> tuple[_Word, ...]:
    """The words of a phrase. Raises PhraseError for an empty one, a lone `_`, capitals or a mark out of place."""
    read = [_read_word(word, phrase) for word in phrase.split()]
    words = tuple(word for word in read if word is not None)
    if not words or words[0].optional or words[-1].optional or read[-1] is None:
        raise PhraseError(f"{phrase!r} must begin and end with a word, and not end with an article")
    return words


def _read_word(word: str, phrase: str) -> _Word | None:
    if word == "_":
        return _Word(optional=True)
    stem = word.removesuffix("~").removesuffix("*").removesuffix("'s")
    if not stem.replace("'", "").isalnum() or stem != stem.lower():
        raise PhraseError(f"{phrase!r}: {word!r} is no word of a phrase (lower-case letters, then ~ or *)")
    if word.endswith("*"):
        return _Word(prefix=stem)
    forms = frozenset(plain_word(form) for form in (endings(stem) if word.endswith("~") else {stem}))
    return _Word(forms=forms) if forms != {""} else None  # an article


_Tail = tuple[int, tuple[_Word, ...]]  # a phrase's slot and its words after those that are known to fit


@dataclass(slots=True)
class _Beginning:
    """The phrases that begin with a word: alone (their slots), by their second word, and those whose second varies."""

    alone: list[int] = field(default_factory=list)
    by_second: dict[str, list[_Tail]] = field(default_factory=dict)
    others: list[_Tail] = field(default_factory=list)

    def add(self, slot: int, rest: tuple[_Word, ...]) -> None:
        if not rest:
            self.alone.append(slot)
        elif rest[0].forms:
            for form in rest[0].forms:
                self.by_second.setdefault(form, []).append((slot, rest[1:]))
        else:
            self.others.append((slot, rest))

    def add_all(self, other: _Beginning) -> None:
        self.alone += other.alone
        self.others += other.others
        for form, tails in other.by_second.items():
            self.by_second[form] = [*self.by_second.get(form, ()), *tails]


class Lexicon:
    """Every phrase of the rules, by its first word. A slot is a number for a group or for the own phrases of a part.

    Build it with `slots_of`, then `hits` finds all of them in one pass over a sentence.
    """

    def __init__(self, groups: Mapping[str, Sequence[str]]) -> None:
        """`groups` are those of words.yaml; a group may name groups."""
        self._groups = groups
        self._slots: dict[tuple[str, ...], int] = {}
        self._exact: dict[str, _Beginning] = defaultdict(_Beginning)
        self._prefixes: dict[str, _Beginning] = defaultdict(_Beginning)
        self._cache: dict[str, _Beginning] = {}

    def slots_of(self, phrases: Sequence[str]) -> frozenset[int]:
        """The slots that together hold these phrases. Raises PhraseError for an unknown group or a bad phrase."""
        own = tuple(phrase for phrase in phrases if not phrase.startswith("$"))
        slots = {self._slot(own)} if own else set()
        for phrase in phrases:
            if phrase.startswith("$"):
                slots.add(self._slot(tuple(self._group(phrase, ()))))
        return frozenset(slots)

    def hits(self, words: Sequence[str]) -> Hits:
        """Where each slot's phrases stand in a sentence's words."""
        found: Hits = {}
        for place, word in enumerate(words):
            beginning = self._cache.get(word) or self._beginning(word)
            for slot in beginning.alone:
                found.setdefault(slot, []).append((place, place + 1))
            if beginning.by_second and place + 1 < len(words):
                for slot, rest in beginning.by_second.get(words[place + 1], ()):
                    for end in _ends(words, place + 2, rest):
                        found.setdefault(slot, []).append((place, end))
            for slot, rest in beginning.others:
                for end in _ends(words, place + 1, rest):
                    found.setdefault(slot, []).append((place, end))
        return found

    def _group(self, name: str, within: tuple[str, ...]) -> Iterator[str]:
        if name[1:] not in self._groups or name in within:
            raise PhraseError(f"{name} is no group of words.yaml" if name not in within else f"{name} holds itself")
        for phrase in self._groups[name[1:]]:
            if phrase.startswith("$"):
                yield from self._group(phrase, (*within, name))
            else:
                yield phrase

    def _slot(self, phrases: tuple[str, ...]) -> int:
        if phrases in self._slots:
            return self._slots[phrases]
        slot = self._slots[phrases] = len(self._slots)
        for first, *rest in dict.fromkeys(read_phrase(phrase) for phrase in phrases):
            for form in first.forms:
                self._exact[form].add(slot, tuple(rest))
            if first.prefix:
                self._prefixes[first.prefix].add(slot, tuple(rest))
        return slot

    def _beginning(self, word: str) -> _Beginning:
        """What begins with a word, from its exact form and from every prefix; kept for the next time."""
        if len(self._cache) >= _CACHED_WORDS:
            self._cache.clear()
        found = _Beginning()
        if word in self._exact:
            found.add_all(self._exact[word])
        for length in range(1, min(len(word), _LONGEST_PREFIX) + 1):
            if word[:length] in self._prefixes:
                found.add_all(self._prefixes[word[:length]])
        self._cache[word] = found
        return found


def _ends(words: Sequence[str], place: int, rest: tuple[_Word, ...]) -> Iterable[int]:
    """Where a phrase may end whose remaining words begin at `place`."""
    if not rest:
        return (place,)
    places = {place}
    for word in rest:
        if word.optional:
            places |= {place + 1 for place in places if place < len(words)}
        else:
            places = {place + 1 for place in places if place < len(words) and word.fits(words[place])}
    return places


@dataclass(frozen=True, slots=True)
class Shape:
    """How a rule's parts must stand: each part's slots, the most words between neighbours, what must not begin there.

    `present` must stand somewhere in the sentence (empty: nothing need), `unless` must not.
    """

    parts: tuple[frozenset[int], ...]
    within: int
    any_order: bool = False
    not_between: frozenset[int] = frozenset()
    present: frozenset[int] = frozenset()
    unless: frozenset[int] = frozenset()
    _orders: tuple[tuple[frozenset[int], ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        orders = tuple(permutations(self.parts)) if self.any_order else (self.parts,)
        object.__setattr__(self, "_orders", orders)

    def matches(self, hits: Hits) -> list[Match]:
        """Every match in a sentence; empty if there is none."""
        keys = hits.keys()
        if any(keys.isdisjoint(part) for part in self.parts) or not keys.isdisjoint(self.unless):
            return []
        if self.present and keys.isdisjoint(self.present):
            return []
        barred = _merged(hits, self.not_between) if self.not_between else []
        return [match for order in self._orders for match in self._in_order(hits, order, barred)]

    def _in_order(self, hits: Hits, order: tuple[frozenset[int], ...], barred: list[Hit]) -> list[Match]:
        chains = [Match(start, start, end) for start, end in _merged(hits, order[0])]
        for part in order[1:]:
            chains = self._extended(chains, _merged(hits, part), barred)
        return chains

    def _extended(self, chains: list[Match], following: list[Hit], barred: list[Hit]) -> list[Match]:
        """Each following hit joined to the nearest chain that ends before it, if that is near enough."""
        chains = sorted(chains, key=lambda chain: chain.end)
        joined: list[Match] = []
        nearest = 0
        for start, end in following:  # sorted by start, so the nearest chain only moves forward
            while nearest < len(chains) and chains[nearest].end <= start:
                nearest += 1
            if not nearest:
                continue
            chain = chains[nearest - 1]
            if start - chain.end <= self.within and not _any_begins(barred, chain.end, start):
                joined.append(Match(chain.first, start, end))
        return joined


def _any_begins(hits: list[Hit], start: int, end: int) -> bool:
    """True if one of the hits (sorted) begins from `start` to before `end`."""
    place = bisect_left(hits, (start, 0))
    return place < len(hits) and hits[place][0] < end


def _merged(hits: Hits, slots: frozenset[int]) -> list[Hit]:
    found = [hit for slot in slots for hit in hits.get(slot, ())]
    return sorted(found) if len(found) > 1 else found
