"""A trained ensemble, named as a model: `ensemble:FOLDER`, the folder of its heads. Names and arithmetic, no torch.

What it is stands in `cai_experiment/ensemble`; scripts hand its engine in (scripts/_ensemble.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cai_experiment.errors import BadInputError
from cai_experiment.models.memory import Architecture

ENSEMBLE = "ensemble:"
RANDOM = "random:"  # before a preset's name: its architecture with random weights
HEADS = "best_model_heads.safetensors"  # as training names its best heads
# The project's own experts, each in a folder.
SHIPPED_DIR = Path(__file__).resolve().parents[1] / "ensemble" / "shipped" / "weights"
SHIPPED = "nano-"  # before the name of such a folder
TRAIN = "train one: python cai_experiment/scripts/train_ensemble.py"
HEADER_BYTES = 2**20  # at most: heads have a few dozen tensors


class Heads(NamedTuple):
    """What trained heads say of their experts: names, and the size of the states that they read."""

    models: tuple[str, ...]
    hidden_sizes: tuple[int, ...]


def folder_of(name: str, said: str) -> Path:
    """The folder (or the .safetensors file) that `ensemble:FOLDER` names. BadInputError if no heads lie there.

    `said` is what an error begins with: the flag and its value.
    """
    place = Path(name.removeprefix(ENSEMBLE)).expanduser()
    if name == ENSEMBLE:
        raise BadInputError(f"{said}: names no folder", "e.g. ensemble:model_outputs")
    if not place.exists():
        raise BadInputError(f"{said}: no such folder", TRAIN)
    if place.is_dir() and not (place / HEADS).is_file():
        raise BadInputError(f"{said}: the folder holds no trained heads ({HEADS})", TRAIN)
    return place


def read_heads(place: Path) -> Heads:
    """Over which experts the heads at `place` (a folder, or the file) were trained, from the file's own header.

    BadInputError names the file.
    """
    file = place / HEADS if place.is_dir() else place
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            told = json.loads(stream.read(min(length, HEADER_BYTES)))["__metadata__"]
        models, sizes = (tuple(json.loads(told[name])) for name in ("models", "hidden_sizes"))
        if not models or len(models) != len(sizes):
            raise ValueError("no models")
        return Heads(tuple(map(str, models)), tuple(map(int, sizes)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInputError(f"{file} holds no heads of an ensemble", TRAIN) from error


def place_of(name: str) -> str:
    """An expert's name as a model is named elsewhere: a shipped one's folder, the preset of random weights."""
    shipped = SHIPPED_DIR / name.removeprefix(SHIPPED)
    if name.startswith(SHIPPED) and (shipped / "config.json").is_file():
        return str(shipped)
    return name.removeprefix(RANDOM)


def refused(said: str, expert: str) -> BadInputError:
    """The line where one model is needed; `expert` is one that could be named."""
    return BadInputError(f"{said}: an ensemble is several frozen models, and this takes one",
                         f"name one, e.g. its first expert: {expert}")  # fmt: skip


def all_known(found: Sequence[Architecture | None], hidden_sizes: Sequence[int]) -> list[Architecture | None]:
    """An expert that nothing is known of (a fine-tune on the hub) has the shape of one with the same hidden size."""
    shapes = {one.hidden: one for one in found if one is not None}
    return [one or shapes.get(size) for one, size in zip(found, hidden_sizes, strict=True)]


def together(experts: Sequence[Architecture]) -> Architecture:
    """One architecture that takes as many weights, keys and operations a token as all experts, each token read by all.

    Exact for experts of one shape but for their last norms. Of several shapes it is the largest one's, with as many
    layers and tokens as hold all weights.
    """
    largest = max(experts, key=lambda one: one.parameters)
    layers = sum(one.linear_parameters for one in experts) / (largest.linear_parameters / largest.layers)
    embeddings = sum(one.vocab * one.hidden * (1 if one.tied else 2) for one in experts)
    each = largest.hidden * (1 if largest.tied else 2)
    return replace(largest, layers=round(layers), vocab=round(embeddings / each))
