"""THE SHIPPED MODEL: a small causal LM trained from nothing on a written world whose truth is known."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"
NANO_DIR = WEIGHTS / "nano"
MARK = "world.json"


def is_nano(model_path: str | Path) -> bool:
    """True if a local model folder belongs to the written world, so that its answers can be held against the truth."""
    return (Path(model_path) / MARK).is_file()
