"""From settings to a ServerEngine: the address, the model's name there, and its own tokenizer where it can be had."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cai_experiment.engines.server import ServerEngine
from cai_experiment.engines.server_address import read_address
from cai_experiment.errors import BadInputError
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.presets import ModelChoice, resolve_model

if TYPE_CHECKING:
    from cai_experiment.engines.load import LoadSettings
    from cai_experiment.engines.render import Renderer


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
    layout = settings.layout if settings.layout != "auto" else choice.kind or "chat"
    return ServerEngine(
        settings.server_url, choice.path_or_id or None, _renderer(choice, settings), layout,
        settings.server_concurrency, settings.deadline, settings.seed,
    )  # fmt: skip


def _renderer(choice: ModelChoice, settings: LoadSettings) -> Renderer | None:
    """The renderer over the model's own tokenizer, so that token ids are sent and no row of data can speak for us.

    None where the tokenizer is not to be had (a name of the server's own; no network): then text is sent.
    """
    from cai_experiment.engines.load import renderer_for
    from cai_experiment.engines.vllm_load import configs

    if not choice.path_or_id or (choice.preset is None and "/" not in choice.path_or_id):
        return None
    try:
        config, generation, tokenizer = configs(choice.path_or_id)
    except (OSError, ValueError):
        return None
    return renderer_for(config, generation, tokenizer, choice, settings)
