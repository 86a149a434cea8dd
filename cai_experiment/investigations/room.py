"""How much of a model's context a conversation leaves: nothing is ever cut to make it fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cai_experiment.constitution.prompts import Turn
from cai_experiment.investigations.prompts import SPEAKS

LEAST_REPLY = 48  # tokens; less says nothing
CHARACTERS_A_TOKEN = 3  # or a little more: of code and figures, in vocabularies of today
SHOWN_SHARE = 1 / 12  # of the context, for the output of one block
LEAST_SHOWN, MOST_SHOWN = 400, 4000  # characters
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

    def for_reply(self, turns: Sequence[Turn]) -> int:
        """New tokens that fit behind `turns`: at most `reply_tokens`, 0 if fewer than LEAST_REPLY are left.

        A base model's worked example gives way first.
        """
        if self.renderer is None:
            left = self.context - sum(self.tokens_of(turn.text) for turn in turns)
            return min(self.reply_tokens, left) if left >= LEAST_REPLY else 0
        from cai_experiment.engines.render import PromptTooLong

        try:
            self.renderer.prompt_ids(turns, SPEAKS, max_tokens=self.reply_tokens)
            return self.reply_tokens
        except PromptTooLong:
            pass
        try:
            used = len(self.renderer.prompt_ids(turns, SPEAKS, examples=0, max_tokens=LEAST_REPLY))
        except PromptTooLong:
            return 0
        return min(self.reply_tokens, self.context - used)
