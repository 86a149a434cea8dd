"""manifest.json: what a run was (settings, seed, code, models, libraries) and what it took (tokens, time, dollars).

It is written when a run starts, so that the same command resumes and another one is stopped, and again as it goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping

from cai_experiment.errors import BadInputError
from cai_experiment.records.files import read_json, show, write_json

ROOT = Path(__file__).resolve().parents[2]
FRESH = "start afresh with --fresh (the old folder is moved, never deleted)"
LIBRARIES = (
    "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers", "safetensors",
    "huggingface-hub", "numpy", "unsloth", "unsloth-zoo", "vllm", "xformers", "triton", "ray", "httpx",
)  # fmt: skip

# Settings that a resumed run may change: each with the reason why the finished rows stay right.
MAY_CHANGE = {
    "verbosity": "rules the screen, never a file",
    "debug": "shows tracebacks, changes nothing else",
    "plan": "only prints",
    "fresh": "was done when the folder was made",
    "price_per_hour": "a figure of the report",
    "max_cost": "where to stop, not what to write",
    "max_hours": "where to stop, not what to write",
    "batch_size": "sampling is keyed by example and position, so a row does not depend on its neighbours",
    "run": "the folder's name, not its content",
    "data_dir": "the folder's place, not its content",
    "checkpoint_dir": "the folder's place, not its content",
    "report_to": "where metrics are shown",
    "guard": "judges finished pairs; what it says stands in the journal, and two guards in one run are refused apart",
    # the user's words for a model; what they were resolved to stands under `models`, and that is compared
    "model": "compared as resolved",
    "generator": "compared as resolved",
    "critic": "compared as resolved",
    "engine": "compared as resolved",
    "quantization": "compared as resolved",
    "format": "compared as resolved",
}
# Settings that may become larger: the examples are drawn in one fixed order, so more of them continue the run.
MAY_GROW = ("count", "pairs", "max_draws")
# What makes two models the same; where a local folder has a hash of its weights, its path does not count.
MODEL_IDENTITY = ("model", "revision", "weights_sha256", "engine", "layout", "dtype", "quantization")


@dataclass(frozen=True, slots=True)
class Session:
    """What this process has done so far: the state of the counts, its own tokens and seconds, dollars per hour."""

    counts: Mapping[str, int]
    tokens: Mapping[str, int]
    wall_seconds: float
    price_per_hour: float = 0.0


@dataclass(slots=True)
class Manifest:
    """One manifest.json. The first four fields decide the rows; the rest tells where and how they were made.

    `extended` holds the targets that the run had before it was given a larger one. `guard` is what judged the pairs.
    `finished` is the last thing that is written of a session that came to its end: the run's files are whole and hold
    nothing else. `models` maps a role ("generator", "critic") to the engine's `describe()`, which holds the probe's
    result too. `constitution` is {"file", "sha256"}. `tokens`, `wall_seconds` and `cost_dollars` are sums over all
    sessions of the run, `counts` is the newest state (accepted, rejected, ...). Lengths of time are in seconds;
    `wall_seconds` is without `loading_seconds`, those of downloading and loading the models, and `cost_dollars` with
    them.
    """

    settings: dict[str, Any]
    seed: int
    models: dict[str, dict[str, Any]]
    constitution: dict[str, str]
    git_revision: str = field(default_factory=lambda: git_revision())
    libraries: dict[str, str] = field(default_factory=lambda: library_versions())
    sessions: int = 1
    extended: list[int] = field(default_factory=list)
    guard: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    wall_seconds: float = 0.0
    loading_seconds: float = 0.0
    cost_dollars: float = 0.0
    finished: bool = False

    @classmethod
    def read(cls, path: str | Path) -> Manifest:
        """The manifest in a file; BadInputError if it is missing, damaged or of another shape."""
        row = read_json(path, FRESH)
        try:
            return cls(**row)
        except TypeError:
            known = {one.name for one in dataclasses.fields(cls)}
            needed = {"settings", "seed", "models", "constitution"}
            wrong = ", ".join(sorted(needed - row.keys()) + sorted(row.keys() - known))
            raise BadInputError(f"{show(path)} lacks, or does not know, these fields: {wrong}", FRESH) from None

    def write(self, path: str | Path) -> None:
        """Write the file whole, or leave the old one. Paths and the like are written as text. Raises DiskError."""
        write_json(path, json.loads(json.dumps(dataclasses.asdict(self), default=str)))

    def after(self, session: Session) -> Manifest:
        """This manifest with one more stretch of work added: call it on the manifest that `open_manifest` gave."""
        seconds = session.wall_seconds
        names = list(dict.fromkeys([*self.tokens, *session.tokens]))
        return dataclasses.replace(
            self,
            counts=dict(session.counts),
            tokens={name: self.tokens.get(name, 0) + session.tokens.get(name, 0) for name in names},
            wall_seconds=round(self.wall_seconds + seconds, 3),
            cost_dollars=round(self.cost_dollars + seconds / 3600 * session.price_per_hour, 6),
        )

    def after_loading(self, seconds: float, price_per_hour: float) -> Manifest:
        """This manifest with one more loading of the models added."""
        cost = round(self.cost_dollars + seconds / 3600 * price_per_hour, 6)
        return dataclasses.replace(self, loading_seconds=round(self.loading_seconds + seconds, 3), cost_dollars=cost)


def open_manifest(path: str | Path, new: Manifest) -> Manifest:
    """Start or resume: write and return `new`, with the sums of the sessions before it.

    It is not finished, whatever the sessions before it came to. Raises BadInputError if an earlier session had other
    settings (see `check_same_settings`).
    """
    if Path(path).exists():
        old = Manifest.read(path)
        check_same_settings(old, new, show(path))
        sums = ("guard", "counts", "tokens", "wall_seconds", "loading_seconds", "cost_dollars")
        kept = {name: getattr(old, name) for name in sums}
        extended = list(old.extended)
        if _grew("pairs", old.settings.get("pairs"), new.settings.get("pairs")):
            extended += [old.settings["pairs"]] * (old.settings["pairs"] != new.settings["pairs"])
        new = dataclasses.replace(new, sessions=old.sessions + 1, extended=extended, **kept)
    new.write(path)
    return new


def reopen_manifest(path: str | Path) -> Manifest:
    """The manifest of a run whose files are to be written anew, and so are not finished until that is done."""
    manifest = dataclasses.replace(Manifest.read(path), finished=False)
    manifest.write(path)
    return manifest


def check_same_settings(old: Manifest, new: Manifest, place: str = "manifest.json") -> None:
    """Raise BadInputError showing every difference that would mix two kinds of rows in one folder.

    Free to change: MAY_CHANGE, MAY_GROW (upwards), the git revision, the library versions and everything of a model
    that is not in MODEL_IDENTITY. An absent setting counts as null.
    """
    before, after = _identity(old), _identity(new)
    names = list(dict.fromkeys([*before, *after]))
    changed = [
        f"{name} was {_short(before.get(name))}, now {_short(after.get(name))}"
        for name in names
        if before.get(name) != after.get(name) and not _grew(name, before.get(name), after.get(name))
    ]
    if changed:
        raise BadInputError(f"{place} has other settings: {'; '.join(changed)}", f"use the old settings, or {FRESH}")


def _identity(manifest: Manifest) -> dict[str, Any]:
    """Everything that decides the rows, flat: {"rounds": 2, "seed": 0, "generator.model": ...}, as JSON values."""
    flat: dict[str, Any] = {name: value for name, value in manifest.settings.items() if name not in MAY_CHANGE}
    flat["seed"] = manifest.seed
    flat["constitution"] = manifest.constitution["sha256"]
    for role, model in manifest.models.items():
        for name in MODEL_IDENTITY:
            if name in model and not (name == "model" and model.get("weights_sha256")):
                flat[f"{role}.{name}"] = model[name]
    return json.loads(json.dumps(flat, default=str))


def _grew(name: str, before: Any, after: Any) -> bool:
    return name in MAY_GROW and None not in (before, after) and after >= before


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:60] + "..."


# ---------------------------------------------------------------- where things came from


def git_revision(folder: Path = ROOT) -> str:
    """The commit of the code, with "-dirty" if tracked files differ from it; "unknown" without git or a repository."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def library_versions() -> dict[str, str]:
    """Python's version and those of LIBRARIES that are installed, from their metadata (nothing is imported)."""
    import importlib.metadata

    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def model_identity(name_or_path: str) -> dict[str, str]:
    """{"model", "weights_sha256"} for a local folder, {"model", "revision"} for a hub id.

    The hash is sha256 over name and content of the folder's *.safetensors, in order of their names (about 1 GB/s);
    the revision is the commit in the local hub cache, "unknown" if there is none. BadInputError: no safetensors.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return {"model": name_or_path, "weights_sha256": weights_sha256(folder)}
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name_or_path, "config.json")
    return {"model": name_or_path, "revision": Path(cached).parent.name if isinstance(cached, str) else "unknown"}


def weights_sha256(folder: Path) -> str:
    """sha256 of a model folder's weights; see `model_identity`."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadInputError(f"{show(folder)} holds no .safetensors weights", "choose another folder with --model")
    whole = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            whole.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
