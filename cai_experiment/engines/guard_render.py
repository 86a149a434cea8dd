"""A guard's prompt: its own chat template around instruction and answer, neither of which can speak for it.

The markup is cut out of the tokenizer's template. What stands between two of its control tokens is encoded as one
piece, so that a harmless row has exactly the official ids; control tokens in a row stay plain text, and lines that
look like the template's own frame ("Agent:", "<END CONVERSATION>") are quoted, so that no row adds a turn.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any, Callable, Sequence

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines.render import PromptTooLong, Renderer
from cai_experiment.errors import EngineError

ROLES = ("user", "assistant")
_FRAME = re.compile(r"(?m)^<(?:BEGIN|END) [A-Z ]+>$")
_BREAKS = r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]"
_HARMLESS = ("How do I boil an egg?", "Put it into boiling water.\n\nWait seven minutes.")


class GuardRenderer(Renderer):
    """Renders (instruction, answer) for a guard that carries its own template (Llama Guard 3, Qwen3Guard-Gen)."""

    def __init__(self, tokenizer: Any, max_length: int, eos_token_ids: Sequence[int] = ()) -> None:
        """As `Renderer`. Raises EngineError if the template drops, moves or repeats a turn, or asks nothing."""
        self._added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        longest_first = "|".join(re.escape(name) for name in sorted(self._added, key=len, reverse=True))
        self._control = re.compile(f"({longest_first})")
        self._hidden = re.compile(f"(?={longest_first})")  # finds those that overlap, too
        self._control_ids = frozenset(self._added.values())
        super().__init__(tokenizer, "chat", max_length, eos_token_ids)

    def prompt_ids(
        self, turns: Sequence[Turn], speak_as: str, examples: int | None = None, max_tokens: int = 0
    ) -> list[int]:
        """The ids of the guard's prompt about two turns, instruction and answer; PromptTooLong if they do not fit."""
        instruction, answer = turns
        ids = self.conversation_ids(instruction.text, answer.text)
        if len(ids) > self.max_length - max_tokens:
            raise PromptTooLong(
                f"prompt of {len(ids)} tokens and {max_tokens} new tokens do not fit in a context of {self.max_length}"
            )
        return ids

    def conversation_ids(self, instruction: str, answer: str) -> list[int]:
        """The ids of the template around both texts. ValueError if a text would still be read as a control token."""
        pieces = self._markup(ROLES, False)
        quote = self._quoting(pieces)
        ids: list[int] = []
        stretch = ""  # plain text since the last control token, ours and theirs: its tokens may cross the border
        for piece, text in zip(pieces, (quote(instruction), quote(answer), ""), strict=True):
            for part in self._control.split(piece):
                if part in self._added:
                    ids += [*self._plain_ids(stretch), self._added[part]]
                    stretch = ""
                else:
                    stretch += part
            stretch += text
        return ids + self._plain_ids(stretch)

    def _plain_ids(self, text: str) -> list[int]:
        """Ids of text without any added token: those that stand in it are cut after their first character.

        `split_special_tokens` alone leaves added tokens that are not called special, such as Qwen3's "<think>".
        """
        cuts = [0, *(found.start() + 1 for found in self._hidden.finditer(text)), len(text)]
        ids = [i for start, end in pairwise(cuts) for i in self._encode(text[start:end], False)]
        if not self._control_ids.isdisjoint(ids):
            raise ValueError("the text would be read as a control token of the guard")
        return ids

    def _quoting(self, pieces: Sequence[str]) -> Callable[[str], str]:
        """A function that strips a text and puts "> " before lines that look like the template's own."""
        headings = [piece.rsplit("\n", 1)[-1].strip() for piece in pieces[:-1]]
        own = {line for line in (*headings, *_FRAME.findall("\n".join(pieces))) if line and line not in self._added}
        if not own:
            return str.strip
        frame = re.compile(rf"(^|{_BREAKS})(\s*)(?={'|'.join(map(re.escape, sorted(own)))})", re.IGNORECASE)
        return lambda text: frame.sub(r"\1\2> ", text.strip())

    def check(self) -> None:
        """Hold our ids against the official rendering of a harmless row; EngineError if they differ."""
        messages = [{"role": role, "content": text} for role, text in zip(ROLES, _HARMLESS, strict=True)]
        official = self._encode(self.tokenizer.apply_chat_template(messages, tokenize=False), True)
        if self.conversation_ids(*_HARMLESS) != list(official):
            raise EngineError("this guard's template gives other tokens than our rendering of it", "use --no-guard")
        if not self._control.sub("", self._markup(ROLES, False)[-1]).strip():
            raise EngineError("this tokenizer's chat template asks for no verdict", "give a guard's own folder")
