"""Turns to token ids. Markup is ours and may hold special tokens; text is anybody's and never becomes one.

Chat layout: the markup is cut out of the tokenizer's own chat template by rendering it once per pattern of roles with
sentinels for contents. Base layout: headings and worked examples of `constitution.prompts`. Markup and text
are encoded apart from each other, so the ids of a conversation are a prefix of the ids of the longer conversation.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Iterator, Sequence

from cai_experiment.constitution.prompts import (
    BASE_END,
    BASE_STOP,
    SPOKEN_BY_MODEL,
    Segment,
    Turn,
    render_base,
)
from cai_experiment.constitution.worked_examples import examples_for
from cai_experiment.engines.stops import StopRule
from cai_experiment.errors import EngineError

LAYOUTS = ("chat", "base")
# For every template; others ignore them. Qwen3 and SmolLM3 think first unless told otherwise, and an answer of 500
# tokens would be thoughts alone. Llama 3 and SmolLM3 write today's date into the prompt: a run that resumes tomorrow
# would mix two prompts, so it is always the day that Llama's own template falls back to.
_TEMPLATE: dict[str, Any] = {
    "enable_thinking": False, "date_string": "26 Jul 2024", "strftime_now": lambda form: "26 July 2024",
}  # fmt: skip
# Contents for a template that we cut at: private-use characters, which no template tests, trims or translates.
_SENTINEL = "\ue0c0{}\ue0c1"


class PromptTooLong(ValueError):
    """A prompt that cannot fit into the model's context, however it is shortened."""


class Renderer:
    """Renders prompts and completions for one tokenizer in one layout ("chat" or "base")."""

    def __init__(self, tokenizer: Any, layout: str, max_length: int, eos_token_ids: Sequence[int] = ()) -> None:
        """`max_length` is the context in tokens; `eos_token_ids` are further ends, from the generation config.

        Raises EngineError if the layout cannot be used with this tokenizer (see `check`).
        """
        if layout not in LAYOUTS:
            raise EngineError(f"layout {layout!r} is unknown", f"use one of {', '.join(LAYOUTS)}")
        if layout == "chat" and not tokenizer.chat_template:
            raise EngineError("this tokenizer has no chat template", "use --format base")
        self.tokenizer, self.layout, self.max_length = tokenizer, layout, max_length
        self.encode = lru_cache(maxsize=8192)(self._encode)
        self._markup = lru_cache(maxsize=512)(self._cut_template)
        # SentencePiece puts a blank before every text that is encoded apart: one of the template's is enough
        self._adds_blank = tokenizer.convert_ids_to_tokens(self.encode("a", False)[0]).startswith("▁")
        begins = layout == "base" and tokenizer.bos_token_id in tokenizer("").input_ids
        self._start = (tokenizer.bos_token_id,) if begins else ()  # a chat template writes its own begin token
        self.end_token_id = self._find_end()
        known = {self.end_token_id, tokenizer.eos_token_id, *eos_token_ids} - {None}
        self.stop_token_ids: tuple[int, ...] = tuple(sorted(known))
        self.stop_strings: tuple[str, ...] = (BASE_STOP,) if layout == "base" else ()
        self.stops = StopRule(tokenizer, self.stop_token_ids, self.stop_strings)
        self.check()

    # ------------------------------------------------------------ what others call

    def prompt_ids(
        self, turns: Sequence[Turn], speak_as: str, examples: int | None = None, max_tokens: int = 0
    ) -> list[int]:
        """The ids of a conversation up to where the model speaks a turn of kind `speak_as`.

        `examples` is the number of worked examples (base layout only); None takes as many as fit beside `max_tokens`
        new tokens. If the whole conversation does not fit, a separate stage prompt is rendered (`stage_turns`);
        if that does not fit either, PromptTooLong is raised: nothing is ever cut in silence.
        """
        room = self.max_length - max_tokens
        sizes: list[int] = []
        for kept in dict.fromkeys((tuple(turns), stage_turns(turns))):
            for ids in self._renderings(kept, speak_as, examples):
                if len(ids) <= room:
                    return ids
                sizes.append(len(ids))
        raise PromptTooLong(
            f"prompt of {min(sizes)} tokens and {max_tokens} new tokens do not fit in a context of {self.max_length}"
        )

    def bare_prompt_ids(self, instruction: str) -> list[int]:
        """The bare prompt of training, evaluation, demo and export: one instruction, no worked examples."""
        return self._render((Turn("instruction", instruction),), "answer", ())

    def completion_ids(self, text: str) -> list[int]:
        """The ids of what the model says, ending in the layout's end token."""
        return [*self.encode(text, False), self.end_token_id]

    def option_ids(self, options: Sequence[str]) -> list[int]:
        """The first token of each option, as the next turn would begin; ValueError if two begin alike."""
        firsts = [self.encode(option, False)[0] for option in options]
        if len(set(firsts)) != len(firsts):
            raise ValueError(f"options {', '.join(options)} begin with the same token")
        return firsts

    def check(self) -> None:
        """Hold the layout against this tokenizer once: no chat token in a base prompt, and the stop really stops.

        Raises EngineError naming what is wrong.
        """
        turns = (Turn("instruction", "Why?"), Turn("answer", "So."), Turn("critique_request", "Look."))
        ids = self._render(turns, "critique", examples_for("critique", turns)[:1])
        marks = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        found = [self.tokenizer.decode([i]) for i in ids if i in marks - set(self._start)]
        if self.layout == "base" and found:
            raise EngineError(f"the base prompt holds the token {found[0]}", "use --format chat")
        end = "\n\n### Human:\n" if self.layout == "base" else self.tokenizer.decode([self.end_token_id])
        text, stopped = self.stops.text([*self.encode("An answer.", False), *self.encode(end, True)])
        if not stopped or text.strip() != "An answer.":
            raise EngineError(f"the end {end!r} does not stop this tokenizer's text: {text!r}", "use another --format")

    # ------------------------------------------------------------ how

    def _renderings(self, turns: Sequence[Turn], speak_as: str, examples: int | None) -> Iterator[list[int]]:
        """From the fullest rendering to the barest: with all worked examples, then with the later ones dropped."""
        known = examples_for(speak_as, turns) if self.layout == "base" else ()
        counts = range(len(known), -1, -1) if examples is None else (min(examples, len(known)),)
        return (self._render(turns, speak_as, known[:count]) for count in counts)

    def _render(self, turns: Sequence[Turn], speak_as: str, examples: Sequence[Sequence[Turn]]) -> list[int]:
        if self.layout == "chat":
            segments = self._chat_segments(turns, speak_as)
        else:
            segments = render_base(turns, speak_as, examples)
        ids = list(self._start)
        for segment in segments:
            ids += self.encode(segment.text, segment.markup)
        return ids

    def _chat_segments(self, turns: Sequence[Turn], speak_as: str) -> list[Segment]:
        if speak_as not in SPOKEN_BY_MODEL:
            raise ValueError(f"the model does not speak turns of kind {speak_as!r}")
        roles = tuple(turn.role for turn in turns)
        if any(a == b for a, b in zip(roles, (*roles[1:], "assistant"), strict=True)):
            raise ValueError("two turns of one chat role follow each other: " + ", ".join(t.kind for t in turns))
        markup = self._markup(roles, True)
        segments = [Segment(markup[0], True)]
        for turn, after in zip(turns, markup[1:], strict=True):
            segments += [Segment(turn.text, False), Segment(after, True)]
        return segments

    def _cut_template(self, roles: tuple[str, ...], generate: bool) -> tuple[str, ...]:
        """The chat template's own pieces before, between and after the contents of a conversation with these roles."""
        names = [_SENTINEL.format(i) for i in range(len(roles))]
        messages = [{"role": role, "content": name} for role, name in zip(roles, names, strict=True)]
        whole = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate, **_TEMPLATE
        )
        pieces: list[str] = []
        for name in names:
            before, found, whole = whole.partition(name)
            if not found or name in whole:
                raise EngineError("the chat template drops, moves or repeats a turn", "use --format base")
            pieces.append(before.removesuffix(" ") if self._adds_blank else before)
        return (*pieces, whole)

    def _encode(self, text: str, markup: bool) -> tuple[int, ...]:
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not markup, verbose=False)
        return tuple(encoded.input_ids)

    def _find_end(self) -> int:
        """Chat: the special token that the template puts behind an assistant's turn. Base: <|endoftext|>."""
        if self.layout == "base":
            end = self.tokenizer.get_vocab().get(BASE_END, self.tokenizer.eos_token_id)
        else:
            after = self.encode(self._markup(("user", "assistant"), False)[-1], True)
            end = after[0] if after and after[0] in self.tokenizer.all_special_ids else self.tokenizer.eos_token_id
        if end is None:
            raise EngineError("this tokenizer has no end token", "use a model that has an eos token")
        return int(end)


def stage_turns(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """A separate stage prompt: the instruction, the latest version of the answer, and what was said since."""
    latest = max((i for i, turn in enumerate(turns) if turn.kind in ("answer", "revision")), default=0)
    if latest <= 1:
        return tuple(turns)
    return (turns[0], Turn("answer", turns[latest].text), *turns[latest + 1 :])


def is_tuned_to_chat(tokenizer: Any, eos_token_ids: Sequence[int]) -> bool:
    """True if the chat template's end of turn is also the end that the model was tuned to give.

    Qwen2.5's base models carry the chat template of their tuned siblings, but end in <|endoftext|>, not in <|im_end|>.
    """
    if not tokenizer.chat_template:
        return False
    renderer = Renderer(tokenizer, "chat", 0, eos_token_ids)
    return renderer.end_token_id in {tokenizer.eos_token_id, *eos_token_ids}
