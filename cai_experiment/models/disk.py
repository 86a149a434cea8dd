"""Where Hugging Face keeps what it downloads, how much of a model lies there, how much room is left. No torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from cai_experiment.models.memory import GB, Architecture, adapter_parameters

KEPT_CHECKPOINTS = 3  # two (training.checkpoints.KEEP) and the one that is being written


def hf_home() -> Path:
    """Where Hugging Face keeps downloads and the token (its own rule, without importing it)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(os.environ.get("HF_HOME", cache / "huggingface")).expanduser()


def hub_cache() -> Path:
    """The folder of downloaded models: one `models--ORG--NAME` each."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(named).expanduser() if named else hf_home() / "hub"


def downloaded_gb(hub_id: str) -> float:
    """GB (10^9 bytes) of this model's files in the cache, half-finished downloads included: they are continued."""
    blobs = hub_cache() / f"models--{hub_id.replace('/', '--')}" / "blobs"
    return sum(file.stat().st_size for file in blobs.glob("*")) / GB


def checkpoints_gb(numbers: Architecture) -> float:
    """GB that one training keeps: checkpoints of float32 adapter weights and Adam's two moments, the final adapter."""
    return adapter_parameters(numbers) * 4 * (3 * KEPT_CHECKPOINTS + 1) / GB


def folder_gb(folder: Path) -> float:
    """GB of the safetensors weights in a local model's folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / GB


def free_gb(place: Path) -> float:
    """GB free where `place` is, or would be made."""
    return shutil.disk_usage(_existing(place)).free / GB


def room(needs: Sequence[tuple[Path, float]]) -> list[tuple[Path, float, float]]:
    """(place, GB needed, GB free) for each disk: needs at places on the same disk are added up under the first."""
    disks: dict[int, tuple[Path, float]] = {}
    for place, need in needs:
        device = _existing(place).stat().st_dev
        first, before = disks.get(device, (place, 0.0))
        disks[device] = (first, before + need)
    return [(place, need, free_gb(place)) for place, need in disks.values()]


def _existing(place: Path) -> Path:
    """`place`, or the nearest folder above it that exists."""
    place = place.expanduser().resolve()
    return next(path for path in (place, *place.parents) if path.exists())
