"""Checkpoints that survive: written aside, flushed, hashed, renamed; verified before use; the newest whole one wins.

A folder `checkpoint-12` is whole, or it is not there: everything is first written under `checkpoint-12.tmp`, then
`files.json` (sha256 and size of every file) is added, then one rename publishes it. `kill -9` at any moment leaves
the older checkpoints as they were. Damage that comes later (a flipped byte, a missing file) is found by `verify`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cai_experiment.errors import BadInputError, DiskError
from cai_experiment.records.files import show

MANIFEST = "files.json"
ASIDE = ".tmp"
KEEP = 2  # the newest, and one to fall back on
# Hugging Face's Trainer resumes without the optimizer or RNG file too, and then silently ends at other weights.
TRAINING_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
)
RNG, RNG_OF_FIRST = "rng_state.pth", "rng_state_0.pth"  # with several processes each writes its own
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_NAME = re.compile(r"checkpoint-(\d+)")


class Damaged(Exception):
    """A checkpoint that does not verify; the text says which file and how."""


# ---------------------------------------------------------------- writing


def publish(aside: Path, final: Path) -> None:
    """Make the folder `aside` appear as `final`, whole or not at all. Raises DiskError if the disk refuses."""
    with disk_errors(final):
        files = {file.relative_to(aside).as_posix(): _flushed(file) for file in _files(aside)}
        manifest = aside / MANIFEST
        manifest.write_text(_manifest_text(files), encoding="utf-8")
        _fsync(manifest)
        _fsync(aside)
        os.rename(aside, final)
        _fsync(final.parent)


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn what libraries raise while they write into one DiskError that names the place."""
    from safetensors import SafetensorError

    try:
        yield
    except DiskError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        next_step = "free space and run the same command again (older checkpoints are whole)"
        raise DiskError(f"{place} could not be written: {reason}", next_step) from error


def check_space(folder: Path, needed: int) -> None:
    """Raise DiskError before anything is written if `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        message = f"{folder}: a checkpoint needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        raise DiskError(message, "free space and run the same command again (older checkpoints are whole)")


def keep_newest(folder: Path, keep: int = KEEP, best: int | None = None) -> None:
    """Delete all checkpoints but the `keep` newest and that of step `best`.

    Each is renamed first, so a kill leaves no half checkpoint.
    """
    for path in _numbered(folder)[keep:]:
        if step_of(path) == best:
            continue
        aside = path.with_name(path.name + ASIDE)
        os.rename(path, aside)
        shutil.rmtree(aside)


def set_aside_newer(folder: Path, step: int, say: Callable[[str], None]) -> None:
    """Rename checkpoints of later steps, damaged or not resumed from: those steps are done, and written, again."""
    for path in _numbered(folder):
        if step_of(path) > step:
            aside = path.with_name(f"{path.name}.unused")
            while aside.exists():
                aside = aside.with_name(aside.name + "-")
            os.rename(path, aside)
            say(f"moved {path.name} to {aside.name}")


def sweep(folder: Path) -> None:
    """Remove what a killed write or a killed deletion left behind: `checkpoint-N.tmp`, `final.tmp`, nothing else."""
    for path in folder.glob(f"*{ASIDE}"):
        if path.is_dir() and (path.stem == "final" or _NAME.fullmatch(path.stem)):
            shutil.rmtree(path)


# ---------------------------------------------------------------- reading


def verify(folder: Path, required: Iterable[str] = TRAINING_FILES) -> None:
    """Raise Damaged unless every listed file is there with its hash, and every required file is listed."""
    files = _read_manifest(folder)
    for name in required:
        if name not in files and not (name == RNG and RNG_OF_FIRST in files):
            raise Damaged(f"{name} is missing")
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise Damaged(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        if _sha256(path) != entry["sha256"]:
            raise Damaged(f"{name} was changed (its sha256 differs)")


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `folder` that verifies (or None), and a line for every newer one that does not."""
    skipped: list[str] = []
    for path in _numbered(folder):
        try:
            verify(path)
        except Damaged as reason:
            skipped.append(f"skipped {show(path)}: {reason}")
        else:
            return path, skipped
    return None, skipped


def any_in(folder: Path) -> bool:
    """True if `folder` holds a checkpoint, whole or damaged."""
    return bool(_numbered(folder))


def named(path: Path, required: Iterable[str] = TRAINING_FILES) -> Path:
    """A checkpoint that the user named: itself if it verifies, else BadInputError (exit code 2)."""
    next_step = "leave --resume out to use the newest whole one"
    if not path.is_dir():
        raise BadInputError(f"{show(path)}: no such checkpoint folder", next_step)
    try:
        verify(path, required)
    except Damaged as reason:
        raise BadInputError(f"{show(path)} is damaged: {reason}", next_step) from reason
    return path


def step_of(path: Path) -> int:
    """The step that a checkpoint folder was written at, from its name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise BadInputError(f"{show(path)}: not a folder named checkpoint-<step>", "name one of these with --resume")
    return int(match.group(1))


# ---------------------------------------------------------------- helpers


def _numbered(folder: Path) -> list[Path]:
    """The checkpoint folders, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)), key=step_of, reverse=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _flushed(path: Path) -> dict[str, object]:
    """Flush a file to the disk and describe it."""
    _fsync(path)
    return {"sha256": _sha256(path), "bytes": path.stat().st_size}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_text(files: dict[str, dict[str, object]]) -> str:
    """The manifest as text. It carries its own hash, so that a changed manifest shows as well."""
    body = json.dumps(files, indent=1, sort_keys=True)
    return json.dumps({"files": files, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1, sort_keys=True)


def _read_manifest(folder: Path) -> dict[str, dict]:
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        files = json.loads(text)["files"]
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{MANIFEST} is unreadable ({error})") from error
    if _manifest_text(files) != text:
        raise Damaged(f"{MANIFEST} was changed")
    return files
