"""The architecture of any model by its folder or hub id: from config.json, which alone is downloaded. No torch.

`python -c "from cai_experiment.models.configs import architecture_of as a; print(a('Qwen/Qwen3-0.6B').parameters)"`
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from cai_experiment.errors import BadInputError, EngineError, UserError
from cai_experiment.models.disk import hub_cache
from cai_experiment.models.families import normal_fields
from cai_experiment.models.memory import Architecture

TIMEOUT = 10.0  # seconds for the hub to answer
TOKEN_STEP = "export HF_TOKEN=hf_... (made at https://huggingface.co/settings/tokens)"


def architecture_of(place: str, revision: str = "main") -> Architecture:
    """The numbers of the model in a folder or of a hub id `org/name` at `revision`.

    Looks in the folder, then in the hub's cache, then asks the hub for config.json alone, once and without writing it
    anywhere. Raises BadInputError (no such model or revision, gated without a token, a config that cannot be read or
    counted) and EngineError (the hub cannot be reached, or HF_HUB_OFFLINE is set and the file is not in the cache).
    """
    return Architecture.read(lambda: config_of(place, revision), name_of(place))


def context_of(place: str, revision: str = "main") -> int | None:
    """The context in tokens by config.json's max_position_embeddings, None where it names none. Raises as above."""
    found: Any = normal_fields(config_of(place, revision)).get("max_position_embeddings")
    return found if isinstance(found, int) else None


def name_of(place: str) -> str:
    """How an error names a config.json: by its path, or by its model's hub id."""
    folder = Path(place).expanduser()
    return str(folder / "config.json") if folder.is_dir() else f"{place}: its config.json"


def config_of(place: str, revision: str = "main") -> dict[str, Any]:
    """The config.json of a folder or hub id. Raises as `architecture_of`; ValueError and OSError for a broken file."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        return _object((folder / "config.json").read_text(encoding="utf-8"))
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(place, "config.json", cache_dir=hub_cache(), revision=revision)
    except errors.HFValidationError as error:
        raise BadInputError(f"{place} is no hub id", "a hub id has the form org/name") from error
    if isinstance(cached, str):
        return _object(Path(cached).read_text(encoding="utf-8"))
    return _object(_fetched(place, revision))


def ask(hub_id: str, revision: str = "main") -> None:
    """Ask the hub for a model's config.json in one request, whether or not the cache has it. Raises as `config_of`."""
    _fetched(hub_id, revision)


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    return found


@lru_cache(maxsize=64)
def _fetched(place: str, revision: str) -> str:
    """The file's text from the hub, in one request."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    if constants.HF_HUB_OFFLINE:
        message = f"{place}: its config.json is not in {hub_cache()}, and HF_HUB_OFFLINE is set"
        raise EngineError(message, "unset it, or name a folder or a preset")
    url = hf_hub_url(place, "config.json", revision=revision, endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        response = get_session().get(url, headers=build_hf_headers(), timeout=TIMEOUT, follow_redirects=True)
        hf_raise_for_status(response)
    except Exception as error:  # of huggingface_hub, httpx and the network: each becomes one line
        raise _refusal(place, revision, error) from error
    return str(response.text)


def _refusal(place: str, revision: str, error: Exception) -> UserError:
    """What keeps a config.json from being fetched, in one line."""
    from huggingface_hub import errors, get_token

    page = f"https://huggingface.co/{place}"
    if isinstance(error, errors.GatedRepoError):
        if get_token() is None:
            message = f"{place} is gated, and there is no token"
            return BadInputError(message, f"accept its licence at {page}, then {TOKEN_STEP}")
        return BadInputError(f"{place} is gated, and this token's account may not read it",
                             f"accept its licence at {page} with that account")  # fmt: skip
    if isinstance(error, errors.RepositoryNotFoundError):
        private = "check the name" if get_token() is not None else f"check the name; private ones need {TOKEN_STEP}"
        return BadInputError(f"{place}: the hub has no such model", private)
    if isinstance(error, errors.RevisionNotFoundError):
        return BadInputError(f"{place}: the hub has no revision {revision!r} of it", f"see {page}/commits/main")
    if isinstance(error, errors.EntryNotFoundError):
        return BadInputError(f"{place}: its repository holds no config.json",
                             "name a model in Hugging Face's format")  # fmt: skip
    why = (str(error.__cause__ or error).splitlines() or [""])[0] or type(error).__name__
    message = f"{place}: its config.json is not in {hub_cache()}, and the hub cannot be asked for it ({why})"
    return EngineError(message, "check the network, or name a folder or a preset")
