"""In which form a prompt goes to an OpenAI-compatible server, and what its answer means.

Token ids are the best form: our tokenizer keeps markup and data apart, so no row of data can become a control token.
As text or as chat messages the server encodes all of it, so what could be a control token or one of our headings is
quoted first.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, Sequence

from cai_experiment.constitution.prompts import (
    BASE_STOP,
    SPOKEN_BY_MODEL,
    Turn,
    render_base,
)
from cai_experiment.constitution.worked_examples import examples_for
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.engines.render import Renderer, stage_turns
from cai_experiment.engines.server_client import Fault, Refused

TOP = 20  # log-probabilities that servers give at most
# vLLM and SGLang take missing values from the model's generation config, llama.cpp from its own defaults.
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": True}
CONTROL = re.compile(r"<(?=[|｜][^<>\n]{1,40}[|｜]>|/?s>|(?:start|end)_of_turn>)|\[(?=/?INST\])")
TOO_LONG = re.compile(r"context.?(?:length|size|window)|longer than the model|prompt is too long", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Option:
    """The first token of an option: its text, and its id where a tokenizer is at hand."""

    text: str
    id: int | None


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one server is spoken to; found once, by `server_probe.probe`."""

    model: str
    kind: Literal["ids", "text", "chat"]
    layout: str  # "chat" | "base"
    renderer: Renderer | None
    neutral: bool = True  # it takes NEUTRAL
    logprobs: int = 0  # how many it gives at most; 0: none, and prompts with options cannot be weighed
    by_id: bool = False  # it weighs tokens that are named by their ids (vLLM's logprob_token_ids)

    @property
    def path(self) -> str:
        """Where prompts are posted."""
        return "/chat/completions" if self.kind == "chat" else "/completions"


@dataclass(frozen=True, slots=True)
class Call:
    """One prompt, ready to be sent: its bodies, from the fullest to the barest, and its options."""

    prompt: Prompt
    bodies: tuple[dict[str, Any], ...]
    options: tuple[Option, ...]
    known_tokens: int  # of the prompt; 0 where the server encodes it

    @property
    def barest(self) -> dict[str, Any]:
        """The shortest body."""
        return self.bodies[-1]

    @property
    def key(self) -> str:
        """What seed and jitter depend on."""
        return self.prompt.sampling.key or self.prompt.id


# ---------------------------------------------------------------- what is sent


def make_call(dialect: Dialect, prompt: Prompt) -> Call:
    """Render a prompt. Raises ValueError for one that cannot be rendered (PromptTooLong where ids are sent)."""
    if not prompt.options and prompt.sampling.max_tokens < 1:
        raise ValueError(f"max_tokens is {prompt.sampling.max_tokens}, and must be 1 or more")
    options = _options(dialect.renderer, prompt.options)
    contents = _contents(dialect, prompt)
    common = _common(dialect, prompt, options)
    ids = contents[0]["prompt"] if dialect.kind == "ids" else ()
    return Call(prompt, tuple({**common, **content} for content in contents), options, len(ids))


def _contents(dialect: Dialect, prompt: Prompt) -> list[dict[str, Any]]:
    if dialect.kind == "ids":
        assert dialect.renderer is not None
        new = 1 if prompt.options else prompt.sampling.max_tokens
        return [{"prompt": dialect.renderer.prompt_ids(prompt.turns, prompt.speak_as, max_tokens=new)}]
    kept = [quoted(turns) for turns in dict.fromkeys((prompt.turns, stage_turns(prompt.turns)))]
    if dialect.kind == "chat":
        return [{"messages": messages(turns, prompt.speak_as)} for turns in kept]
    return [{"prompt": text} for turns in kept for text in base_texts(turns, prompt.speak_as)]


def messages(turns: Sequence[Turn], speak_as: str) -> list[dict[str, str]]:
    """The turns as chat messages. ValueError if two of one role follow each other, or if the model does not speak."""
    if speak_as not in SPOKEN_BY_MODEL:
        raise ValueError(f"the model does not speak turns of kind {speak_as!r}")
    roles = [turn.role for turn in turns]
    if any(a == b for a, b in zip(roles, (*roles[1:], "assistant"), strict=True)):
        raise ValueError("two turns of one chat role follow each other: " + ", ".join(t.kind for t in turns))
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def base_texts(turns: Sequence[Turn], speak_as: str) -> list[str]:
    """The base layout as text: with all worked examples, then with the later ones dropped, as Renderer does it."""
    known = examples_for(speak_as, turns)
    counts = range(len(known), -1, -1)
    return ["".join(part.text for part in render_base(turns, speak_as, known[:count])) for count in counts]


def quoted(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns with a blank behind the "<" or "[" of what a tokenizer may take for a control token."""
    return tuple(Turn(turn.kind, CONTROL.sub(r"\g<0> ", turn.text)) for turn in turns)


def _common(dialect: Dialect, prompt: Prompt, options: Sequence[Option]) -> dict[str, Any]:
    sampling = prompt.sampling
    body: dict[str, Any] = {
        "model": dialect.model,
        "max_tokens": 1 if options else sampling.max_tokens,
        "temperature": 0.0 if options else sampling.temperature,
        "top_p": 1.0,
        "n": 1,
        "seed": request_seed(sampling.seed, sampling.key or prompt.id),
    }
    if dialect.layout == "base":
        body["stop"] = [BASE_STOP]
    if dialect.neutral:
        body |= NEUTRAL
        if dialect.renderer is not None:
            body["stop_token_ids"] = list(dialect.renderer.stop_token_ids)
            body["return_tokens_as_token_ids"] = True  # vLLM: two tokens may have one text
    if options and dialect.logprobs:
        chat = dialect.kind == "chat"
        body |= {"logprobs": True, "top_logprobs": dialect.logprobs} if chat else {"logprobs": dialect.logprobs}
        if dialect.by_id:
            body["logprob_token_ids"] = [option.id for option in options]
    return body


def request_seed(seed: int, key: str) -> int:
    """The seed of one request, 0 to 2^31 - 1: BLAKE2b of the run's seed and the prompt's key."""
    digest = hashlib.blake2b(f"{seed}\x00{key}".encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


def _options(renderer: Renderer | None, options: Sequence[str]) -> tuple[Option, ...]:
    if renderer is None:
        return tuple(Option(option, None) for option in options)
    ids = renderer.option_ids(options) if options else []
    return tuple(Option(renderer.tokenizer.decode([i]), i) for i in ids)


# ---------------------------------------------------------------- what comes back


def read_answer(call: Call, answer: Any) -> Completion:
    """The completion in a server's answer. Where it does not tell what its cache held, all of the prompt counts as
    computed; whether it tells is found beforehand (`server_probe`), and stands in the manifest.

    Raises server_client.NOT_WHOLE for an answer of another shape, Fault for a generation that the server gave up, and
    Refused for one that its filter stopped.
    """
    choice, usage = answer["choices"][0], answer.get("usage") or {}
    size = int(usage.get("prompt_tokens") or 0) or call.known_tokens
    cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    computed, spoken = max(0, size - cached), int(usage.get("completion_tokens") or 0)
    if call.options:
        return Completion(call.prompt.id, "", "stop", size, computed, logprobs=weigh(call.options, listed(choice)))
    text = choice["text"] if "text" in choice else choice["message"]["content"] or ""
    text, finish = _end(text, _finish(choice["finish_reason"]), call.bodies[0].get("stop", ()))
    return Completion(call.prompt.id, text, finish, size, computed, spoken)


def _finish(reason: Any) -> str:
    if reason == "abort":
        raise Fault("the server gave the request up")
    if reason == "content_filter":
        raise Refused("the server's content filter stopped the answer")
    if reason not in ("stop", "length"):
        raise ValueError(f"finish_reason is {json.dumps(reason)}")
    return str(reason)


def _end(text: str, finish: str, stops: Sequence[str]) -> tuple[str, str]:
    """Cut what a server may leave: a stop string, and the part of a last character whose bytes did not all come."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    if places:
        return text[: min(places)], "stop"
    return (text.rstrip("\ufffd") if finish == "length" else text), finish


def listed(choice: Any) -> list[tuple[str, int | None, float]]:
    """(token, its id where given, natural-log probability) of the likeliest first tokens, in either of two formats.

    Completions: {"top_logprobs": [{token: value}]}. Chat, and llama.cpp always: {"content": [{"top_logprobs": [{}]}]}.
    """
    found = choice["logprobs"]
    if found.get("content") is not None:
        return [(one["token"], one.get("id"), float(one["logprob"])) for one in found["content"][0]["top_logprobs"]]
    return [(token, None, float(value)) for token, value in found["top_logprobs"][0].items()]


def weigh(options: Sequence[Option], tokens: Sequence[tuple[str, int | None, float]]) -> tuple[float, ...]:
    """A log-probability for each option from the likeliest tokens; () if none of the options is among them.

    An option that is not listed gets the lowest listed value. Its own is at most that, so the sign of the log-odds
    against a listed option is right, and their size is a lower bound: a minus infinity would make the surest verdicts
    unreadable.
    """
    places = [_find(option, tokens) for option in options]
    seen = [place for place in places if place is not None]
    if len(set(seen)) < len(seen):
        raise Refused("two options begin with the same token")
    if not seen:
        return ()
    lowest = min(value for *_, value in tokens)
    values = tuple(lowest if place is None else tokens[place][2] for place in places)
    if not all(map(math.isfinite, values)):
        raise ValueError("a log-probability is not finite")
    return values


def _find(option: Option, tokens: Sequence[tuple[str, int | None, float]]) -> int | None:
    """The option's place among `tokens`: by id where both know it, else the longest token that it begins with."""
    for place, (token, id, _) in enumerate(tokens):
        if option.id is not None and (id == option.id or token in (f"token_id:{option.id}", option.text)):
            return place
    if option.id is not None:
        return None
    begins = [place for place, (token, *_) in enumerate(tokens) if token and option.text.startswith(token)]
    return max(begins, key=lambda place: len(tokens[place][0]), default=None)
