"""How much of a model's context a conversation leaves, and how it is shared among the tasks.

What a model said is never cut to make it fit; of a block's output the middle is left out, and that is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cai_experiment.constitution.prompts import Turn
from cai_experiment.investigations.prompts import SPEAKS
from cai_experiment.investigations.reply import shortened_middle

LEAST_REPLY = 48  # tokens; less says nothing
CHARACTERS_A_TOKEN = 3  # or a little more: of code and figures, in vocabularies of today
SHOWN_SHARE = 1 / 12  # of the context, for the output of one block
LEAST_SHOWN, MOST_SHOWN = 400, 4000  # characters
TURN_TOKENS = 16  # of a turn's markup and a task's heading, at most
OUTPUT_SHARE, UNREAD_SHARE = 1 / 2, 1 / 4  # of what a task has left, for output that comes back; of the next task's
NO_ROOM = "(output left out: no room)"
UNKNOWN_CONTEXT = 16_384  # of an engine that shows no renderer (a scripted one)


class Room:
    """The context of an engine. `reason` says what a conversation that does not fit has run out of."""

    def __init__(self, engine: Any, reply_tokens: int) -> None:
        self.renderer = getattr(engine, "renderer", None)
        self.reply_tokens = reply_tokens
        self.context = int(self.renderer.max_length) if self.renderer is not None else UNKNOWN_CONTEXT
        config = getattr(getattr(engine, "model", None), "config", None)
        own = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
        self.reason = "tokens" if own is not None and self.context < own else "context"

    @property
    def shown_characters(self) -> int:
        """How much of a block's output comes back."""
        return max(LEAST_SHOWN, min(MOST_SHOWN, int(self.context * SHOWN_SHARE * CHARACTERS_A_TOKEN)))

    def tokens_of(self, text: str) -> int:
        """Tokens of a text alone; words where there is no vocabulary."""
        return len(text.split()) if self.renderer is None else len(self.renderer.encode(text, False))

    def used(self, turns: Sequence[Turn]) -> int:
        """Tokens of a prompt that ends in `turns`, without worked examples; the whole context if it does not fit."""
        if self.renderer is None:
            return sum(self.tokens_of(turn.text) for turn in turns)
        from cai_experiment.engines.render import PromptTooLong

        if turns and turns[-1].kind == SPEAKS:  # a chat's roles take turns
            turns = [*turns, Turn("output", "")]
        try:
            return len(self.renderer.prompt_ids(turns, SPEAKS, examples=0))
        except PromptTooLong:
            return self.context

    def for_reply(self, turns: Sequence[Turn], most: int, reply: int) -> int:
        """New tokens that fit behind `turns` in `most`: at most `reply`, 0 if fewer than LEAST_REPLY are left.

        A base model's worked example gives way first.
        """
        left = min(most, self.context) - self.used(turns)
        return min(reply, left) if left >= min(LEAST_REPLY, self.reply_tokens) else 0

    def shortened(self, text: str, most: int) -> str:
        """`text` with its middle left out until it has at most `most` tokens."""
        kept, characters = text, len(text)
        while kept and (tokens := self.tokens_of(kept)) > most:
            characters = min(int(characters * most / tokens), characters * 9 // 10)
            if characters < LEAST_REPLY:
                return NO_ROOM
            kept = shortened_middle(text, characters)
        return kept


@dataclass(slots=True)
class Shares:
    """Each task's share of the context. What documents need is kept free, whether or not they ever arrive.

    What is left beside `documents` (their tokens, at most) and the later tasks' own texts is divided equally among the
    tasks to come; what one does not use, later ones have. So conditions differ in documents alone, not in room.
    """

    room: Room
    documents: int = 0
    given: int = 0  # tokens of documents that are in the conversation
    limit: int = 0  # the present task's: tokens of the conversation with its last reply
    reply: int = 0  # new tokens of one of its replies, at most

    def each(self, turns: Sequence[Turn], later: Sequence[str], now: int) -> int:
        """Tokens for each of `now` tasks at work and those with the texts `later`."""
        kept = self.documents + sum(self.room.tokens_of(text) + TURN_TOKENS for text in later)
        used = self.room.used(turns) if turns else 0
        return max(0, (self.room.context - kept - (used - self.given)) // (now + len(later)))

    def begin(self, turns: Sequence[Turn], bare: Turn, whole: Turn, later: Sequence[str], replies: int) -> None:
        """The task that `whole` gives; `bare` is the same turn without documents.

        Of several replies none takes more than half of the share, so that a model reads what its code gave.
        """
        share = self.each([*turns, bare], later, 1)
        used = self.room.used([*turns, whole])
        self.given += used - self.room.used([*turns, bare])
        self.limit = used + share
        self.reply = min(self.room.reply_tokens, share if replies == 1 else max(LEAST_REPLY, share // 2))
