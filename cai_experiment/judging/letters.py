"""One letter per order, in words: how a judge answers whose server gives no log-probabilities.

A letter is read where a reply plainly begins with one ("A", "**B**", "(a)", "Answer: A."), after a thought in
<think> marks. A reply that names both letters, or begins otherwise, is unread: it is never guessed at.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Iterable

from cai_experiment.engines.base import Completion, Engine, Prompt, Sampling

LETTER_TOKENS = 16  # room for "The better answer is **B**."
THOUGHT_TOKENS = 2048  # for a model that thinks first, asked again

_THOUGHT = re.compile(r"\A.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)  # some templates open it in the prompt
_OPEN = re.compile(r"\A\s*<think(?:ing)?>", re.IGNORECASE)
_LEAD = r"(?:(?:my|the|final|better|best|correct|preferred|answer|option|choice|verdict|reply|response|is)\b[\W_]*)*"
_LETTER = re.compile(rf"\A[\W_]*{_LEAD}(?P<letter>[AB])(?P<rest>(?![^\W_]).*)\Z", re.DOTALL | re.IGNORECASE)
_ENDS = re.compile(r"\A(?:[\s*_\"'`)\]}.!]*\Z|[*_\"'`]*[)\]}.:;,!*_\n]|\s+[-–—(]|\s+(?i:is|answer)\b)")


def read_letter(text: str) -> str | None:
    """ "A" or "B" as a reply names it; None if it names neither, both, or none plainly."""
    said = _THOUGHT.sub("", text)
    found = None if _OPEN.match(said) else _LETTER.match(said)
    if found is None:
        return None
    letter, rest = found["letter"], found["rest"]
    if not _ENDS.match(rest) or (letter.islower() and rest.strip("*_\"'`)]}.!\n ")):  # "a good answer would ..."
        return None
    other = "B" if letter.upper() == "A" else "A"
    return None if re.search(rf"\b{other}\b", rest) else letter.upper()


def ask_letters(engine: Engine, prompts: Iterable[Prompt]) -> dict[str, Completion]:
    """Replies to lettered prompts, at temperature 0, by id. A model that was cut while it thought is asked again, with
    room for the thought."""
    asked = [spoken(prompt, LETTER_TOKENS) for prompt in prompts]
    replies = {reply.id: reply for reply in engine.stream(asked)}
    again = [spoken(p, THOUGHT_TOKENS) for p in asked if p.id in replies and was_thinking(replies[p.id])]
    return replies | {reply.id: reply for reply in engine.stream(again)} if again else replies


def spoken(prompt: Prompt, max_tokens: int) -> Prompt:
    """The prompt without its options, to be answered in words."""
    return replace(prompt, options=(), sampling=Sampling(0.0, max_tokens))


def was_thinking(reply: Completion) -> bool:
    """True if the reply was cut in a thought, or in one that the server keeps to itself."""
    text = reply.text.strip()
    return reply.finish == "length" and (not text or (_OPEN.match(text) is not None and not _THOUGHT.match(text)))
