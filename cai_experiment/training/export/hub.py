"""Upload an export to the Hugging Face hub: private unless asked otherwise, whole or continued by the same command."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.records.files import show

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_name(repo: str) -> None:
    """Raise BadInputError unless `repo` has the form owner/name."""
    if not NAME.fullmatch(repo):
        raise BadInputError(f"--push {repo}: not of the form owner/name", "e.g. --push me/qwen2.5-32b-cai")


def listing(folder: Path) -> list[str]:
    """What an upload would send: a line for each file, and the sum."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    lines = [f"{size / 1e6:12,.1f} MB  {path.relative_to(folder)}" for path, size in zip(files, sizes, strict=True)]
    return [*lines, f"{sum(sizes) / 1e6:12,.1f} MB  in {len(files)} files"]


def push(folder: Path, repo: str, public: bool, say: Callable[[str], None] = print) -> str:
    """Upload a whole export as the model repository `repo`; gives its address.

    Raises BadInputError (no token, a name that is not yours, a public repository without `public`) and EngineError
    (the hub cannot be reached). An upload that broke off goes on with the same command: what arrived is not sent again.
    """
    from httpx import TransportError
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise BadInputError(f"--push {repo}: no token", "make one that may write at huggingface.co, then set HF_TOKEN")
    if constants.HF_HUB_OFFLINE:
        raise BadInputError(f"--push {repo}: HF_HUB_OFFLINE is set", "unset it")
    api = HfApi()
    try:
        api.create_repo(repo, private=not public, repo_type="model", exist_ok=True)
        if not public and not api.repo_info(repo, repo_type="model").private:
            message = f"--push {repo}: the repository is there already, and public"
            raise BadInputError(message, "add --public if that is meant, or name another one")
        say(f"uploading {show(folder)} to {constants.ENDPOINT}/{repo} ({'public' if public else 'private'})")
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, repo_type="model", commit_message=f"Export of {folder.parent.name}"
        )
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        message = f"--push {repo}: the hub refused ({status}: {_first_line(error)})"
        if status in (401, 403, 404):
            raise BadInputError(message, "check the name, and that HF_TOKEN may write there") from error
        raise EngineError(message, "the same command goes on where it stopped") from error
    except (OSError, TransportError) as error:  # no connection; httpx's own errors are no OSError
        message = f"--push {repo}: the hub cannot be reached ({_first_line(error)})"
        raise EngineError(message, "the same command goes on where it stopped") from error
    return str(getattr(done, "commit_url", f"{constants.ENDPOINT}/{repo}"))


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
