"""What of a model's repository is fetched into the Hugging Face cache, and whether what lies there is whole. No torch.

A cache folder `models--ORG--NAME` holds `blobs/` (named by SHA-256 where the hub keeps a file as LFS, else by git's
SHA-1), `snapshots/COMMIT/` of links to them, `refs/BRANCH` and, by huggingface_hub since 1.0, `trees/COMMIT.json`: the
sizes and hashes of all files of that commit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cai_experiment.models.disk import hub_cache

WEIGHTS = ".safetensors"
LOADED_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")  # no pickled weights, no code
# second copies of the weights: other formats' folders, Mistral's and Meta's own files, half-precision variants
LEFT_OUT = ("*/*", "consolidated*", "pytorch_model*", "tf_model*", "flax_model*", "*.fp16.*", "*.fp32.*")


def needed(names: Iterable[str]) -> list[str]:
    """The files among a repository's `names` that loading takes."""
    kept = (name for name in names if any(fnmatch(name, pattern) for pattern in LOADED_FILES))
    return sorted(name for name in kept if not any(fnmatch(name, pattern) for pattern in LEFT_OUT))


def cache_folder(hub_id: str) -> Path:
    """Where this model's files lie, or would."""
    return hub_cache() / f"models--{hub_id.replace('/', '--')}"


def commit_of(hub_id: str, revision: str) -> str:
    """The commit that `revision` meant when it was last fetched; "" if it never was."""
    folder = cache_folder(hub_id)
    try:
        return (folder / "refs" / revision).read_text().strip()
    except OSError:
        return revision if (folder / "snapshots" / revision).is_dir() else ""


@dataclass(frozen=True, slots=True)
class Found:
    """What lies in the cache of a model at a revision. `problems` are ends of sentences; empty: all is whole."""

    commit: str
    gb: float  # of the files of that commit, and of pieces of such
    problems: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """True if a commit is there and nothing is amiss."""
        return bool(self.commit) and not self.problems


def holds_weights(hub_id: str, commit: str) -> bool:
    """True if weights of that commit are here, or a piece of a download; else it is the tokenizer alone."""
    folder = cache_folder(hub_id)
    pieces = (folder / "blobs").glob("*.incomplete")
    return any(pieces) or any((folder / "snapshots" / commit).glob(f"*{WEIGHTS}"))


def look(hub_id: str, revision: str, hashes: bool = False, weights: bool = True) -> Found:
    """Look at a model in the cache; `hashes`: read every byte and hold it against the name of its blob.

    `weights` False: its tokenizer and config are all that is to be there.
    """
    folder, commit = cache_folder(hub_id), commit_of(hub_id, revision)
    blobs = list((folder / "blobs").glob("*"))
    gb = sum(blob.stat().st_size for blob in blobs) / 1e9
    pieces = [blob for blob in blobs if blob.name.endswith(".incomplete")]
    problems = [f"{piece} is a download that did not finish ({piece.stat().st_size / 1e9:.2f} GB)" for piece in pieces]
    if not commit:
        return Found("", gb, tuple(problems))
    snapshot, listed = folder / "snapshots" / commit, _tree(folder, commit)
    names = needed(listed) if listed else sorted(path.name for path in snapshot.glob("*"))
    names = [name for name in names if weights or not name.endswith(WEIGHTS)]
    for name in names:
        problem = _problem(snapshot / name, listed.get(name, {}), hashes)
        problems += [problem] if problem else []
    problems += _weights_missing(snapshot, names) if weights else []
    return Found(commit, gb, tuple(problems))


def _tree(folder: Path, commit: str) -> dict[str, dict[str, Any]]:
    """{file: {"size", "lfs_sha256", ...}} of a commit, as huggingface_hub noted it; empty if it did not."""
    try:
        files = json.loads((folder / "trees" / f"{commit}.json").read_text(encoding="utf-8"))["files"]
        return files if isinstance(files, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _problem(path: Path, listed: dict[str, Any], hashes: bool) -> str:
    """What is wrong with one file of a snapshot, or ""."""
    if not path.is_file():  # a link to nothing is none
        return f"{path.name} is missing"
    size, wanted = path.stat().st_size, listed.get("size")
    if wanted is not None and size != wanted:
        return f"{path.name} has {size} bytes instead of {wanted}"
    blob = Path(os.path.realpath(path)).name
    if hashes and len(blob) in (40, 64) and digest(path, len(blob) == 64) != blob:
        return f"{path.name} is damaged: its bytes do not have the hash {blob[:12]}... that the hub gave"
    return ""


def _weights_missing(snapshot: Path, names: list[str]) -> list[str]:
    """Shards that the index names and the snapshot lacks (where no listing was kept); or that there are no weights."""
    if "model.safetensors.index.json" in names:
        try:
            index = json.loads((snapshot / "model.safetensors.index.json").read_text(encoding="utf-8"))
            shards = sorted(set(index["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError):
            return ["model.safetensors.index.json cannot be read"]
        return [f"{shard} is missing" for shard in shards if shard not in names and not (snapshot / shard).is_file()]
    return [] if any(name.endswith(WEIGHTS) for name in names) else ["it holds no .safetensors file"]


def digest(path: Path, lfs: bool) -> str:
    """A file's hash as the hub names blobs: SHA-256 of LFS files, else git's SHA-1 with its header."""
    found = hashlib.sha256() if lfs else hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(2**22):
            found.update(block)
    return found.hexdigest()
