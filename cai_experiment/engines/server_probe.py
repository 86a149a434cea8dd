"""Finds out, once and with a few one-token requests, how a server wants to be spoken to."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines.base import Completion, Prompt, Sampling
from cai_experiment.engines.render import Renderer
from cai_experiment.engines.server_client import Client, Fault, Refused
from cai_experiment.engines.server_forms import TOP, Call, Dialect, listed, make_call, read_answer
from cai_experiment.errors import BadInputError, EngineError

PATIENCE = 20.0  # seconds: at the start a person is waiting
HELLO = Prompt("hello", (Turn("instruction", "Hello."),), "answer", Sampling(0.0, 1))
WEIGH = Prompt("weigh", (Turn("question", "Reply with A or B."),), "verdict", Sampling(0.0, 1), ("A", "B"))
LONG = Prompt("long", (Turn("instruction", "Say what you see and hear. " * 20),), "answer", Sampling(0.0, 1))
SENTENCE = "Tokenizers differ: naïve café, 1234 × 5678 = 7006652;\n\n    ### unforgettably?"
FORMS = {
    "ids": "token ids to /completions",
    "text": "text to /completions",
    "chat": "messages to /chat/completions",
}


@dataclass(frozen=True, slots=True)
class Served:
    """What the probe found. `card` is the model's own entry in /models, empty if the server lists none."""

    dialect: Dialect
    why: str
    card: dict[str, Any]
    tells_cached: bool  # it says how much of a prompt its cache held


def probe(client: Client, model: str | None, renderer: Renderer | None, layout: str) -> Served:
    """Choose the served model, the form of prompts and the log-probabilities.

    Raises EngineError or BadInputError, one line each: not reached, key refused, another model, another tokenizer.
    """
    card = choose_model(client, model)
    name = str(card.pop("id"))
    context = card.get("max_model_len")
    if renderer is not None and isinstance(context, int):
        renderer.max_length = min(renderer.max_length, context)
    dialect, why = _choose_form(client, name, renderer, layout)
    if dialect.kind == "ids":
        _same_tokenizer(client, dialect)
    return Served(_choose_logprobs(client, dialect), why, card, _tells_cached(client, dialect))


# ---------------------------------------------------------------- which model


def choose_model(client: Client, model: str | None) -> dict[str, Any]:
    """The card of the served model that `model` names; without a name, of the only one."""
    cards = _list_models(client)
    names = [str(card["id"]) for card in cards]
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    if model is None:
        if len(cards) != 1:
            what = f"serves {shown}" if cards else "does not list its models"
            raise BadInputError(f"--server {client.url} {what}", "say which with --model")
        return cards[0]
    if not cards:
        return {"id": model}
    for loosely in (False, True):
        found = [card for card in cards if is_named(model, card, loosely)]
        if found:
            return found[0]
    raise EngineError(f"--server {client.url} serves {shown}, not --model {model}", "give --model as it is served")


def is_named(model: str, card: dict[str, Any], loosely: bool = False) -> bool:
    """True if `model` (a name, hub id or folder) means the served model with this card; loosely: by its last part."""
    if loosely:
        return same_name(str(card["id"]), model)
    return model in (card["id"], card.get("root"))


def same_name(one: str, other: str) -> bool:
    """True if two names of models agree in their last parts, quantisation of a llama.cpp file aside."""
    return _base(one) == _base(other)


def _base(name: str) -> str:
    """The last part of a name or path, in lower case, without llama.cpp's file ending and quantisation."""
    last = re.sub(r"\.gguf$", "", name.rstrip("/").rpartition("/")[2].lower())
    return re.sub(r"[-.](i?q\d\w*|b?f16|f32)$", "", last)


def _list_models(client: Client) -> list[dict[str, Any]]:
    """The cards in /models; none where the server keeps no list."""

    def read(answer: Any) -> list[dict[str, Any]]:
        return [{"id": one["id"], **_facts(one)} for one in answer["data"]]

    try:
        return client.submit(client.ask("/models", None, read, patience=0)).result()
    except Refused:
        return []
    except Fault as fault:
        raise EngineError(f"--server {client.url}: {fault}", "start the server, or correct the address") from None


def _facts(card: dict[str, Any]) -> dict[str, Any]:
    names = ("root", "parent", "owned_by", "max_model_len")
    return {name: card[name] for name in names if card.get(name) is not None}


# ---------------------------------------------------------------- which form


def _choose_form(client: Client, name: str, renderer: Renderer | None, layout: str) -> tuple[Dialect, str]:
    """The best form that the server takes, and why it is this one."""
    plain: Literal["text", "chat"] = "text" if layout == "base" else "chat"
    why = "no tokenizer is at hand"
    if renderer is not None:
        found = _accepted(client, Dialect(name, "ids", layout, renderer))
        if isinstance(found, Dialect):
            return found, "our tokenizer keeps data from being read as markup"
        why = f"it refuses token ids: {found}"
    found = _accepted(client, Dialect(name, plain, layout, renderer))
    if isinstance(found, Dialect):
        return found, why
    if found.status == 404 and plain == "text":
        raise EngineError(f"--server {client.url} takes no text for model {name} ({found})", "use --format chat")
    step = "give --model as it is served" if found.status == 404 else "see the server's log"
    raise EngineError(f"--server {client.url} refuses a one-token request to model {name} ({found})", step)


def _accepted(client: Client, dialect: Dialect) -> Dialect | Refused:
    """`dialect`, without values that are not OpenAI's if it must be; or the server's refusal."""
    for tried in (dialect, replace(dialect, neutral=False)):
        call = make_call(tried, HELLO)
        try:
            answer = _ask(client, tried, call)
        except Refused as error:
            refusal = error
            continue
        if tried.kind == "ids" and answer.prompt_tokens != call.known_tokens:
            return Refused(f"it counts {answer.prompt_tokens} tokens where {call.known_tokens} were sent")
        return tried
    return refusal


def _ask(client: Client, dialect: Dialect, call: Call) -> Completion:
    def read(answer: Any) -> Completion:
        return read_answer(call, answer)

    try:
        return client.submit(client.ask(dialect.path, call.barest, read, "probe", PATIENCE)).result()
    except Fault as fault:
        step = "see the server's log; the same command tries again"
        raise EngineError(f"--server {client.url} does not serve a one-token request: {fault}", step) from None


def _same_tokenizer(client: Client, dialect: Dialect) -> None:
    """Raise BadInputError if the server cuts a sentence into another number of tokens than our tokenizer does.

    Ids of another tokenizer would be served without any error, and mean something else. One token of difference
    is allowed for: servers do not agree on a begin token.
    """
    assert dialect.renderer is not None
    ours = len(dialect.renderer.tokenizer(SENTENCE).input_ids)
    body = {"model": dialect.model, "prompt": SENTENCE, "max_tokens": 1}

    def read(answer: Any) -> int | None:
        return (answer.get("usage") or {}).get("prompt_tokens")

    try:
        theirs = client.submit(client.ask(dialect.path, body, read, "tokenizer", PATIENCE)).result()
    except (Refused, Fault):
        return  # a server that takes ids alone cannot be asked
    if theirs is not None and abs(theirs - ours) > 1:
        raise BadInputError(
            f"--server {client.url} cuts a sentence into {theirs} tokens, the tokenizer of --model into {ours}",
            "give the --model that it serves",
        )


# ---------------------------------------------------------------- log-probabilities


def _choose_logprobs(client: Client, dialect: Dialect) -> Dialect:
    """The dialect with as many log-probabilities as the server gives: of the options, of 20 tokens, of 5, or 0."""
    by_id = dialect.neutral and dialect.renderer is not None
    for count, named in [(TOP, True)] * by_id + [(TOP, False), (5, False)]:
        tried = replace(dialect, logprobs=count, by_id=named)
        try:
            given = _count_logprobs(client, tried)
        except Refused:
            continue
        except Fault:
            break
        if given:  # the named ones and the one that was drawn, or the likeliest: then the names were not heeded
            return replace(tried, by_id=named and given <= len(WEIGH.options) + 1)
        break
    return dialect


def _count_logprobs(client: Client, dialect: Dialect) -> int:
    """How many tokens the server weighs when asked for an option."""
    call = make_call(dialect, WEIGH)

    def read(answer: Any) -> int:
        choice = answer["choices"][0]
        return len(listed(choice)) if choice.get("logprobs") else 0

    return client.submit(client.ask(dialect.path, call.barest, read, "logprobs", PATIENCE)).result()


# ---------------------------------------------------------------- what the cache held


def _tells_cached(client: Client, dialect: Dialect) -> bool:
    """Whether usage says what the cache held: asked twice for one prompt, since vLLM is silent of a cache that held
    nothing (and of any, without --enable-prompt-tokens-details)."""
    call = make_call(dialect, LONG)

    def read(answer: Any) -> bool:
        return ((answer.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens") is not None

    try:
        return any([client.submit(client.ask(dialect.path, call.barest, read, "cached", PATIENCE)).result()
                    for _ in range(2)])  # fmt: skip
    except (Refused, Fault):
        return False
