"""What download_models.py does: which files, is there room, fetch, finish what broke off, list, verify."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_experiment.engines.load import is_installed, revision_of
from cai_experiment.engines.weights import loading_error
from cai_experiment.errors import BadInputError, DiskError, EngineError, UserError
from cai_experiment.milestones import SCRIPTS
from cai_experiment.models.choice import resolve_model
from cai_experiment.models.disk import free_gb, hub_cache
from cai_experiment.models.downloads import cache_folder, digest, look, needed
from cai_experiment.models.hardware import detect
from cai_experiment.models.memory import GB, weights_gb
from cai_experiment.models.presets import PRESETS
from cai_experiment.models.roles import DOWNLOADED, configuration
from cai_experiment.models.serving import files_for

COMMAND = f"{SCRIPTS}download_models.py"
KEPT_FREE_GB = 0.5  # of the disk, beside a download
WEIGHTS = ".safetensors"


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
        return f"{COMMAND} {self.hub_id} --repair"


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


def wanted(name: str, quantization: str | None) -> list[Wanted]:
    """The repositories of one model; BadInputError for a name that is nothing."""
    choice, hardware = resolve_model(name, detect()), detect()
    if Path(choice.path_or_id).is_dir():
        return [Wanted(choice.name, "", "")]
    own = Wanted(choice.name, choice.path_or_id, revision_of(choice))
    if quantization != "4bit":
        return [own]
    engine = "unsloth" if hardware.kind == "cuda" and is_installed("unsloth") else "hf"
    place, _ = files_for(choice, engine, quantization)
    if place == own.hub_id:
        return [own]
    return [Wanted(f"{choice.name} in 4 bit", place, "main"), Wanted(choice.name, own.hub_id, own.revision, False)]


# ---------------------------------------------------------------- fetching


def fetch(one: Wanted, repair: bool = False) -> None:
    """Fetch one repository, saying what and how much first; `repair`: what is here is read and checked before.

    Raises UserError, one line.
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
        raise loading_error(one.hub_id, error) from error
    found = look(one.hub_id, one.revision)
    missing = [name for name in remote.files if not (_snapshot(one, remote.commit) / name).is_file()]
    if missing:
        raise EngineError(f"{one.hub_id}: {', '.join(missing)} did not arrive", one.repair)
    print(f"{one.hub_id}: whole, {found.gb:.2f} GB at {_snapshot(one, remote.commit)}", flush=True)


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
    print(f"{one.hub_id} ({one.revision}, commit {remote.commit}): {len(remote.files)} files, {whole:.2f} GB, "
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


# ---------------------------------------------------------------- looking


def print_list(names: Sequence[str]) -> None:
    """A table of presets (or of the models named): size on the hub in 16 bit, and what lies in the cache."""
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "hub id", "GB", "here")
    for name in names or PRESETS:
        choice = resolve_model(name, detect())
        if Path(choice.path_or_id).is_dir():
            table.add_row(choice.name, "", "", "at hand")
            continue
        size = f"{weights_gb(choice.preset.architecture, 'bf16'):.1f}" if choice.preset else "?"
        found = look(choice.path_or_id, revision_of(choice))
        here = f"whole, {found.gb:.1f} GB" if found.whole else f"NOT whole, {found.gb:.2f} GB" if found.gb else "-"
        table.add_row(choice.name, choice.path_or_id, size, here)
    Console().print(table)
    print(f"cache: {hub_cache()}, {free_gb(hub_cache()):.0f} GB free")


def verify(names: Sequence[str], quantization: str | None) -> bool:
    """Check each model (without names: each known one of which something is here); one line each, problems on stderr.

    True if all is whole.
    """
    known = names or [key for key, preset in PRESETS.items() if not preset.is_local]
    every = [one for name in known for one in wanted(name, quantization) if one.hub_id]
    if not names:
        every = [one for one in every if cache_folder(one.hub_id).is_dir()]
        print(f"{len(every)} known models in {hub_cache()}", flush=True)
    return all([_verified(one) for one in every])


def _verified(one: Wanted) -> bool:
    found: Any = look(one.hub_id, one.revision, hashes=True)
    if found.whole:
        print(f"{one.hub_id}: whole, {found.gb:.2f} GB, commit {found.commit}", flush=True)
        return True
    for problem in found.problems or ("not downloaded",):
        print(f"{one.hub_id}: {problem}; {one.repair}", file=sys.stderr, flush=True)
    return False


__all__ = ["DOWNLOADED", "Wanted", "fetch", "names_of", "print_list", "verify", "wanted"]
