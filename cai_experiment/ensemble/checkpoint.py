"""Where a training of heads stands, in one file that is whole or absent; the one before it is kept to fall back on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cai_experiment.engines.weights import safetensors_problem
from cai_experiment.records.files import show, write_atomic, writing_error

NEWEST, BEFORE = "checkpoint.safetensors", "checkpoint-before.safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`tensors`: heads, moments of the optimizer, sums of the running epoch; `facts`: step and what is known so far."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Write it beside, make the newest one the one before, rename. Raises DiskError; then the older ones stand."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    facts = json.dumps(checkpoint.facts)
    data = save(tensors, {"facts": facts, "sha256": _digest(tensors, facts)})
    aside, newest = folder / f"{NEWEST}.new", folder / NEWEST
    write_atomic(aside, [data])
    try:
        if newest.exists():
            os.replace(newest, folder / BEFORE)
        os.replace(aside, newest)
    except OSError as error:
        raise writing_error(newest, error) from error


def newest(folder: Path, say: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest whole checkpoint, or None; `say` hears of a damaged one.

    A kill between two renames leaves the newest one under its name for writing: it is looked at first.
    """
    for name in (f"{NEWEST}.new", NEWEST, BEFORE):
        path = folder / name
        if path.exists():
            found = _read(path)
            if isinstance(found, Checkpoint):
                return found
            say(f"{show(path)} {found}: the one before it is taken")
    return None


def _read(path: Path) -> Checkpoint | str:
    """The checkpoint in a file, or why it is none."""
    from safetensors import safe_open

    if problem := safetensors_problem(path):
        return problem
    with safe_open(path, "pt") as file:
        header: Mapping[str, str] = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no dict
    facts = header.get("facts", "")
    if header.get("sha256") != _digest(tensors, facts):
        return "was changed (its sha256 differs)"
    return Checkpoint(tensors, json.loads(facts))


def _digest(tensors: Mapping[str, torch.Tensor], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()
