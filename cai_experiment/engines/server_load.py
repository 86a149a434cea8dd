"""From settings to a ServerEngine: the address, the model's name there, and its own tokenizer where it can be had."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.engines.server import ServerEngine
from cai_experiment.engines.server_address import read_address
from cai_experiment.engines.server_client import Client
from cai_experiment.engines.server_probe import choose_model, same_name
from cai_experiment.errors import BadInputError
from cai_experiment.models.choice import ModelChoice, resolve_model
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.presets import PRESETS

if TYPE_CHECKING:
    from cai_experiment.engines.load import LoadSettings
    from cai_experiment.engines.render import Renderer

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def served_model(settings: LoadSettings, hardware: Hardware) -> ModelChoice:
    """What --model means for a server: a preset, hub id or folder that it serves, else a name of the server's own."""
    if settings.server_url is None:
        raise BadInputError("--engine server has no address", "add --server URL, such as http://127.0.0.1:8000/v1")
    if settings.random_weights is not None:
        raise BadInputError("--random-weights are made in this process, not by a server", "leave --server out")
    where = f"--server {read_address(settings.server_url)[0]}"  # without credentials: it is shown
    if settings.model is None:
        return ModelChoice("the served one", "", None, None, where)
    try:
        return replace(resolve_model(settings.model, hardware), reason=where)
    except BadInputError:  # a name such as "gpt-oss-120b": the server knows it or says so
        return ModelChoice(settings.model, settings.model, None, None, where)


def load(choice: ModelChoice, settings: LoadSettings) -> ServerEngine:
    """The engine; asks the server a few one-token questions. Raises EngineError or BadInputError, one line each."""
    assert settings.server_url is not None
    card = _card(choice.path_or_id or None, settings)
    name = str(card["id"])
    choice = choice if is_known(choice) else by_card(card, choice)
    renderer = _renderer(choice, settings)
    layout = settings.layout if settings.layout != "auto" else choice.kind
    if layout is None and renderer is None and (settings.model is None or HUB_ID.fullmatch(choice.path_or_id)):
        raise BadInputError(
            f"{choice.reason} serves {name}, and without its tokenizer it is not known whether that is a chat model",
            "say --format chat or --format base" + ("" if settings.model else ", or --model with its hub id or folder"),
        )
    return ServerEngine(
        settings.server_url, name, renderer, layout or "chat",
        settings.server_concurrency, settings.deadline, settings.seed,
    )  # fmt: skip


def is_known(choice: ModelChoice) -> bool:
    """True for a preset, a folder or a hub id: its tokenizer may be had. False for a server's own name, or none."""
    place = choice.path_or_id
    folder = Path(place).is_absolute() and Path(place).is_dir()
    return choice.preset is not None or folder or HUB_ID.fullmatch(place) is not None


def by_card(card: dict[str, Any], choice: ModelChoice) -> ModelChoice:
    """The model that a card of /models means: by what vLLM says that it loaded (root; of an adapter the parent), then
    by the served name. `choice` itself, a name of the server's own, where neither tells."""
    for name in filter(None, (card.get("root"), card.get("parent"), card["id"])):
        folder = Path(str(name))
        if folder.is_absolute() and (folder / "config.json").is_file():
            return ModelChoice(folder.name, str(folder), None, None, choice.reason)
        exact = next((p for p in PRESETS.values() if p.hub_id.lower() == str(name).lower()), None)
        if exact is None and HUB_ID.fullmatch(str(name)) and not str(name).lower().endswith(".gguf"):
            return ModelChoice(str(name), str(name), None, None, choice.reason)
        preset = exact or next((p for p in PRESETS.values() if not p.is_local and same_name(p.hub_id, str(name))), None)
        if preset is not None:
            return ModelChoice(preset.key, preset.hub_id, preset, preset.kind, choice.reason)
    return choice


def _card(model: str | None, settings: LoadSettings) -> dict[str, Any]:
    """The served model's entry in /models; {"id": model} where the server keeps no list."""
    assert settings.server_url is not None
    client = Client(settings.server_url, settings.server_concurrency, settings.deadline, settings.seed)
    try:
        return choose_model(client, model)
    finally:
        client.close()


def _renderer(choice: ModelChoice, settings: LoadSettings) -> Renderer | None:
    """The renderer over the model's own tokenizer, so that token ids are sent and no row of data can speak for us.

    None where the tokenizer is not to be had (a name of the server's own; no network): then text is sent.
    """
    from cai_experiment.engines.load import renderer_for
    from cai_experiment.engines.vllm_load import configs

    if not is_known(choice):
        return None
    try:
        config, generation, tokenizer = configs(choice.path_or_id)
    except (OSError, ValueError):
        return None
    return renderer_for(config, generation, tokenizer, choice, settings)
