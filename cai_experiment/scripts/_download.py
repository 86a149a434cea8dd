"""What download_models.py fetches: which files, is there room, go on with what broke off, what without a network."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cai_experiment.engines.load import is_installed, revision_of
from cai_experiment.engines.weights import loading_error, unreachable
from cai_experiment.errors import BadInputError, DiskError, EngineError, UserError
from cai_experiment.milestones import SCRIPTS
from cai_experiment.models.choice import ModelChoice, resolve_model
from cai_experiment.models.disk import free_gb, hub_cache
from cai_experiment.models.downloads import WEIGHTS, cache_folder, digest, look, needed
from cai_experiment.models.hardware import detect
from cai_experiment.models.memory import GB
from cai_experiment.models.roles import DOWNLOADED, configuration
from cai_experiment.models.serving import files_for

COMMAND = f"{SCRIPTS}download_models.py"
KEPT_FREE_GB = 0.5  # of the disk, beside a download
MOST_PROBLEMS = 3  # that a line names


@dataclass(frozen=True, slots=True)
class Wanted:
    """One repository to fetch. `weights` False: its tokenizer alone, since the weights come from a sibling."""

    name: str
    hub_id: str  # "" for a model that is at hand
    revision: str
    weights: bool = True

    @property
    def repair(self) -> str:
        """The command that fetches what is missing or damaged."""
        return f"{self.fetch} --repair"

    @property
    def fetch(self) -> str:
        """The command that fetches it all."""
        return f"{COMMAND} {self.hub_id}{'' if self.weights else ' --quantization 4bit'}"


@dataclass(frozen=True, slots=True)
class _Remote:
    """A repository's commit and, for each file that is needed, (size, its blob's name in the cache)."""

    commit: str
    files: dict[str, tuple[int, str]]


def names_of(models: Sequence[str], roles: str | None) -> list[str]:
    """The models that the flags name; empty if they name none."""
    if roles is None:
        return list(models)
    chosen = configuration(roles)
    return list(dict.fromkeys((chosen.evaluation, chosen.generation)))


def chosen(name: str) -> ModelChoice:
    """The model that an argument names; BadInputError for a name that is nothing."""
    return resolve_model(name, detect(), "")


def wanted(name: str, quantization: str | None) -> list[Wanted]:
    """The repositories of one model; BadInputError for a name that is nothing."""
    choice, hardware = chosen(name), detect()
    if Path(choice.path_or_id).is_dir():
        return [Wanted(choice.name, "", "")]
    own = Wanted(choice.name, choice.path_or_id, revision_of(choice))
    if quantization != "4bit":
        return [own]
    engine = "unsloth" if hardware.kind == "cuda" and is_installed("unsloth") else "hf"
    place, _ = files_for(choice, engine, quantization)
    sibling = sibling_of(choice)
    if place == own.hub_id or sibling is None:
        return [own]
    return [sibling, Wanted(choice.name, own.hub_id, own.revision, False)]


def sibling_of(choice: ModelChoice) -> Wanted | None:
    """The repository of a model's weights that were quantised beforehand; None if there is none, or it is at hand."""
    if choice.preset is None or not choice.preset.four_bit:
        return None
    return Wanted(f"{choice.name} in 4 bit", choice.preset.four_bit, "main")


# ---------------------------------------------------------------- fetching


def fetch(one: Wanted, repair: bool = False) -> None:
    """Fetch one repository, saying what and how much first; `repair`: what is here is read and checked before.

    Where the hub cannot be reached, what is whole here will do. Raises UserError, one line.
    """
    if not one.hub_id:
        print(f"{one.name}: at hand, nothing to fetch", flush=True)
        return
    try:
        remote = _ask(one)
        _drop_damaged(one, remote, repair)
        _check_room(one, remote)
        _finish_halves(one, remote)
        from huggingface_hub import snapshot_download

        snapshot_download(one.hub_id, revision=one.revision, allow_patterns=list(remote.files))
    except UserError:
        raise
    except Exception as error:
        if unreachable(error):
            return _without_hub(one, repair, error)
        raise loading_error(one.hub_id, error) from error
    found = look(one.hub_id, one.revision, weights=one.weights)
    missing = [name for name in remote.files if not (_snapshot(one, remote.commit) / name).is_file()]
    if missing:
        raise EngineError(f"{one.hub_id}: {', '.join(missing)} did not arrive", one.repair)
    print(f"{one.hub_id}: whole, {found.gb:.2f} GB at {_snapshot(one, remote.commit)}", flush=True)


def _without_hub(one: Wanted, repair: bool, error: Exception) -> None:
    """Say that all is here; EngineError, with what is missing and what to do, if it is not."""
    found = look(one.hub_id, one.revision, hashes=repair, weights=one.weights)
    if found.whole:
        pinned = "main, as last fetched" if one.revision == "main" else "the pinned revision"
        print(f"{one.hub_id}: whole, {found.gb:.2f} GB ({pinned}, commit {found.commit}); "
              "the hub cannot be reached and was not asked for news", flush=True)  # fmt: skip
        return
    more = len(found.problems) - MOST_PROBLEMS
    lacks = "; ".join(found.problems[:MOST_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
    lacks = lacks or (f"{found.gb:.2f} GB of it are here, not whole" if found.gb else "nothing of it is here")
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    step = "unset HF_HUB_OFFLINE" if offline else "connect to the internet"
    raise EngineError(f"{one.hub_id}: the hub cannot be reached, and {lacks}",
                      f"{step}, then run the same command") from error  # fmt: skip


def _ask(one: Wanted) -> _Remote:
    """What the hub has. BadInputError for a repository without safetensors weights."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(one.hub_id, revision=one.revision, files_metadata=True)
    sizes: dict[str, tuple[int, str]] = {}
    for file in info.siblings or []:
        blob = str(file.lfs["sha256"]) if file.lfs else file.blob_id or ""
        sizes[file.rfilename] = (file.size or 0, blob)
    names = [name for name in needed(sizes) if one.weights or not name.endswith(WEIGHTS)]
    if one.weights and not any(name.endswith(WEIGHTS) for name in names):
        raise BadInputError(f"{one.hub_id} holds no .safetensors file", "pickled weights are not loaded")
    return _Remote(str(info.sha), {name: sizes[name] for name in names})


def _drop_damaged(one: Wanted, remote: _Remote, hashes: bool) -> None:
    """Remove files of another size than the hub's (or another hash), so that they are fetched again."""
    for name, (size, blob) in remote.files.items():
        path = cache_folder(one.hub_id) / "blobs" / blob
        if path.is_file() and (path.stat().st_size != size or (hashes and digest(path, len(blob) == 64) != blob)):
            print(f"{name} is damaged and is fetched again", file=sys.stderr, flush=True)
            path.unlink()


def _check_room(one: Wanted, remote: _Remote) -> None:
    """Print what will come; DiskError, with the figures, before the first byte if the disk does not hold it."""
    blobs = cache_folder(one.hub_id) / "blobs"
    whole = sum(size for size, _ in remote.files.values()) / GB
    missing = sum(size for size, blob in remote.files.values() if not (blobs / blob).is_file()) / GB
    halves = sum(half.stat().st_size for half in _halves(blobs)) / GB
    free, place = free_gb(hub_cache()), hub_cache()
    pinned = "main, not pinned: a run records commit" if one.revision == "main" else "pinned commit"
    print(f"{one.hub_id} ({pinned} {remote.commit}): {len(remote.files)} files, {whole:.2f} GB, "
          f"{missing:.2f} to fetch; {free:.0f} GB free at {place}", flush=True)  # fmt: skip
    need = missing - halves
    if need > 0 and need + KEPT_FREE_GB > free:
        raise DiskError(f"{one.hub_id}: {need:.1f} GB to fetch and {free:.1f} GB free at {place}",
                        "make room, or set HF_HOME to a larger disk; the same command then goes on")  # fmt: skip


def _snapshot(one: Wanted, commit: str) -> Path:
    return cache_folder(one.hub_id) / "snapshots" / commit


# ---------------------------------------------------------------- going on


def _halves(blobs: Path) -> list[Path]:
    """Pieces of downloads that broke off (a kill or Ctrl-C), the largest first."""
    return sorted(blobs.glob("*.incomplete"), key=lambda half: -half.stat().st_size)


def _finish_halves(one: Wanted, remote: _Remote) -> None:
    """Go on with files that broke off, by an HTTP range; huggingface_hub itself begins each file anew.

    A piece is taken only under the hub's own lock (nobody else is fetching it), and the whole only with its hash.
    """
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    blobs = cache_folder(one.hub_id) / "blobs"
    named = {blob: (name, size) for name, (size, blob) in remote.files.items() if len(blob) == 64}
    for half in _halves(blobs):
        blob = half.name.split(".")[0]
        lock = hub_cache() / ".locks" / cache_folder(one.hub_id).name / f"{blob}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(Timeout), WeakFileLock(lock, timeout=0.5):
            if blob in named and not (blobs / blob).exists():
                _go_on(one, remote.commit, half, blobs / blob, *named[blob])
            half.unlink(missing_ok=True)


def _go_on(one: Wanted, commit: str, half: Path, whole: Path, name: str, size: int) -> None:
    from urllib.parse import urlsplit

    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(one.hub_id, name, revision=commit)
    place = get_hf_file_metadata(url).location
    headers = build_hf_headers()
    if urlsplit(place).netloc != urlsplit(url).netloc:  # the hub's store wants no token of the hub
        headers.pop("authorization", None)
    have = half.stat().st_size
    if not 0 < have <= size:
        return
    print(f"{name}: goes on at {have / GB:.2f} of {size / GB:.2f} GB", file=sys.stderr, flush=True)
    with half.open("r+b") as stream:
        stream.seek(0, 2)
        http_get(place, stream, resume_size=have, headers=headers, expected_size=size, displayed_filename=name)
    if digest(half, lfs=True) == whole.name:
        half.rename(whole)


__all__ = ["DOWNLOADED", "Wanted", "chosen", "fetch", "names_of", "sibling_of", "wanted"]
