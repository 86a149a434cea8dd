"""Where an answer is in what a model wrote: up to its next question, in a box, after "the answer is"."""

from __future__ import annotations

import re
from collections.abc import Iterator

# How a base model goes on that should have ended; "\n### " is not within "\n#### 18", GSM8K's mark of the answer.
NEXT_QUESTION = (
    "\nQuestion:", "\nProblem:", "\nExample", "\nExercise", "\nInstruction", "\n### ", "\nHuman:", "\nUser:",
    "\nAssistant:",
)  # fmt: skip

IS = r"\s*(?:is|was|would be|must be|should be|has to be|equals|:|=)[\s:=]*"

_GOES_ON = re.compile(  # the same in more spellings; headings within an answer ("### Step 2") end nothing
    r"\bQuestion(?:\s*\d+)?\s*:|<\|(?:endoftext|im_end|im_start)\|>"
    r"|\n[ \t*_>]*(?:(?:Q|Human|User|Assistant)\s*:|Problem(?:\s*\d+)?\s*:|(?:Example|Exercise|Instruction)s?\b"
    r"|###[ \t]+(?!\W*(?i:\$?\d|step|final|answer|the answer|solution|conclusion|result|total)))"
)
_SAID = re.compile(rf"\banswer\b(?:\s+(?:to|for|of)\b[^.:\n]{{0,80}}?)?{IS}", re.IGNORECASE)
_COLON = re.compile(r"\banswer\s*:\s*\Z", re.IGNORECASE)


def until_next_question(text: str) -> str:
    """The text up to where a base model begins to write the next question, or the turn of the other."""
    found = _GOES_ON.search(text)
    return text[: found.start()] if found else text


def boxed(text: str) -> Iterator[str]:
    r"""The contents of every \boxed{...}, the last one first; braces within are matched."""
    for found in reversed(list(re.finditer(r"\\f?boxed\s*\{", text))):
        depth, at = 1, found.end()
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        yield text[found.end() : at - 1 if not depth else at]


def tails(text: str) -> Iterator[tuple[str, bool]]:
    """(what follows "the answer is", True if that was "Answer:"), the last one first."""
    for found in reversed(list(_SAID.finditer(text))):
        yield text[found.end() :], _COLON.search(found[0]) is not None
