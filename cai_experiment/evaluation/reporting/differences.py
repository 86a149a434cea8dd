"""Which words of two texts differ, for showing them side by side."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import takewhile
from typing import Iterable, Iterator, Literal

_WORD = re.compile(r"\s*\S+")
MOST_ALIKE = 20_000  # pairs of places with the same word; two human texts of 1,500 words have about 12,000


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a text: in both ("same"), gone from the first ("del") or new in the second ("ins")."""

    kind: Literal["same", "del", "ins"]
    text: str


def differences(before: str, after: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces, word by word; joined again, the pieces are the texts, but for blanks at the very end."""
    old, new = _WORD.findall(before), _WORD.findall(after)
    left: list[Piece] = []
    right: list[Piece] = []
    for same, a, b, c, d in _stretches([w.strip() for w in old], [w.strip() for w in new]):
        if a < b:
            left.append(Piece("same" if same else "del", "".join(old[a:b])))
        if c < d:
            right.append(Piece("same" if same else "ins", "".join(new[c:d])))
    return left, right


def _stretches(old: list[str], new: list[str]) -> Iterator[tuple[bool, int, int, int, int]]:
    """(same, from and to in `old`, from and to in `new`), in order. Where words repeat so often that a comparison word
    by word would take minutes (a model that loops), all between the common ends is one difference."""
    counts, others = Counter(old), Counter(new)
    if sum(count * others[word] for word, count in counts.items()) <= MOST_ALIKE:
        for tag, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            yield tag == "equal", a, b, c, d
        return
    head = _common(zip(old, new, strict=False))
    most = min(len(old), len(new)) - head
    tail = min(most, _common(zip(reversed(old), reversed(new), strict=False)))
    yield True, 0, head, 0, head
    yield False, head, len(old) - tail, head, len(new) - tail
    yield True, len(old) - tail, len(old), len(new) - tail, len(new)


def _common(pairs: Iterable[tuple[str, str]]) -> int:
    """How many pairs at the beginning are alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
