"""Heads on disk: one safetensors file that also says, in its header, over which experts they were trained. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.engines.weights import safetensors_problem
from cai_experiment.errors import BadInputError
from cai_experiment.records.files import make_folder, show, write_atomic, write_json

if TYPE_CHECKING:
    import torch

BEST = "best_model_heads"
SUFFIX = ".safetensors"
FORMAT = "cai-ensemble-heads 1"
TRAIN = "python cai_experiment/scripts/train_ensemble.py"
AGAIN = f"train again ({TRAIN}) or copy the file again"


@dataclass(frozen=True, slots=True)
class HeadsInfo:
    """What heads were trained over, in the experts' order, and their sizes. `facts` are the training's, for people."""

    models: tuple[str, ...]
    hidden_sizes: tuple[int, ...]
    head_hidden_dim: int
    head_dropout: float
    weights: tuple[str, ...]  # identifies each expert's weights, see experts.Expert
    sources: tuple[str, ...]  # where they were read
    precision: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def heads_file(weights_path: str | Path) -> Path:
    """The heads' file that a path means: itself, best_model_heads.safetensors in a folder, or the .safetensors beside
    a .pt (the original's name for heads) or .json (the readable copy).

    Raises BadInputError, with the command that makes one, if there is none.
    """
    path = Path(weights_path).expanduser()
    file = path / f"{BEST}{SUFFIX}" if path.is_dir() else path
    if file.is_file() and file.suffix == SUFFIX:
        return file
    if file.with_suffix(SUFFIX).is_file():
        return file.with_suffix(SUFFIX)
    if file.is_file():
        raise BadInputError(f"{show(file)} is no .safetensors file", "pickled heads are not loaded")
    if path.is_dir() and (others := sorted(path.glob(f"*{SUFFIX}"))):
        raise BadInputError(f"{show(path)} holds no {BEST}{SUFFIX}", f"give one of its files: {show(others[0])}")
    folder = path if path.is_dir() or not path.suffix else path.parent
    raise BadInputError(f"{show(file)}: no such heads", f"train them: {TRAIN} --output_dir {show(folder)}")


def write_heads(folder: str | Path, name: str, info: HeadsInfo, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write <name>.safetensors, whole or not at all, and <name>.json, a copy of its header for people.

    The one file is the truth, so that a kill between the two leaves nothing that contradicts. Raises DiskError or
    BadInputError; the older file then stands.
    """
    from safetensors.torch import save

    folder = Path(folder)
    make_folder(folder)
    plain = {key: tensor.detach().float().cpu().contiguous() for key, tensor in tensors.items()}
    described = {"format": FORMAT, **asdict(info), "sha256": _digest(plain)}
    header = {key: json.dumps(value) for key, value in described.items()}
    file = folder / f"{name}{SUFFIX}"
    write_atomic(file, [save(plain, metadata=header)])
    write_json(folder / f"{name}.json", described)
    return file


def read_info(weights_path: str | Path) -> HeadsInfo:
    """What the heads at a path were trained over; reads the header alone. BadInputError: missing, damaged, no heads."""
    file = heads_file(weights_path)
    return _info(file, _header(file))


def read_heads(weights_path: str | Path) -> tuple[HeadsInfo, dict[str, torch.Tensor]]:
    """(info, tensors) of the heads at a path. Raises BadInputError if a byte of them is not what was written."""
    from safetensors.torch import load_file

    file = heads_file(weights_path)
    header = _header(file)
    info, tensors = _info(file, header), load_file(file)
    if _digest(tensors) != json.loads(header.get("sha256", "null")):
        raise BadInputError(f"{show(file)} is damaged: its weights are not those that were written", AGAIN)
    return info, tensors


def _header(file: Path) -> dict[str, str]:
    """The header's own strings, each a JSON value; BadInputError for a file that is not whole."""
    problem = safetensors_problem(file)
    if problem:
        raise BadInputError(f"{show(file)} {problem}", AGAIN)
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    metadata: dict[str, str] = header.get("__metadata__") or {}
    return metadata


def _info(file: Path, header: Mapping[str, str]) -> HeadsInfo:
    try:
        values: dict[str, Any] = {key: json.loads(value) for key, value in header.items()}
        if values.pop("format") != FORMAT:
            raise ValueError("another format")
        values.pop("sha256")
        fields: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return HeadsInfo(**fields)
    except (KeyError, TypeError, ValueError):
        step = f"give the heads that {TRAIN} wrote ({BEST}{SUFFIX})"
        raise BadInputError(f"{show(file)} holds no heads of an ensemble", step) from None


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
