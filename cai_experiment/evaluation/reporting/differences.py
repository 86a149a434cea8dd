"""Which words of two texts differ, for showing them side by side."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

_WORD = re.compile(r"\s*\S+")


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
    matcher = SequenceMatcher(None, [w.strip() for w in old], [w.strip() for w in new], autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        same = tag == "equal"
        if a < b:
            left.append(Piece("same" if same else "del", "".join(old[a:b])))
        if c < d:
            right.append(Piece("same" if same else "ins", "".join(new[c:d])))
    return left, right
