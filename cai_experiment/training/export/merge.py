"""Merge LoRA into the base's files, tensor by tensor: `W + scaling * B @ A` in float32, rounded once, written.

The model is never loaded: one file of weights is in memory at a time (about 4 GB for a 32B model, twice that while
it is written), so the merge needs no GPU and little RAM. Tensors without LoRA are copied bit for bit, and names, files
and tied embeddings stay the base's own.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.engines.weights import weight_files
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.records.files import read_json, show, write_json
from cai_experiment.training.export.adapters import Adapter, Factors

if TYPE_CHECKING:
    from torch import Tensor, dtype

INDEX = "model.safetensors.index.json"
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}  # ours to safetensors' names
BYTES = {"BF16": 2, "F16": 2, "F32": 4}
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")  # tokenizer, configs and licence beside the weights


def base_dtype(base: Path) -> str:
    """The precision of a base's files: "bf16", "fp16" or "fp32", that of its most numerous values.

    Raises BadInputError for weights that were quantised beforehand.
    """
    counts: dict[str, int] = {}
    for _, header in headers(base):
        for kind, shape in header.values():
            counts[kind] = counts.get(kind, 0) + math.prod(shape)
    names = {stored: name for name, stored in DTYPES.items()}
    most = max(counts, key=lambda kind: counts[kind])
    quantised = read_json(base / "config.json").get("quantization_config") is not None
    if quantised or set(counts) - set(names):
        message = f"{show(base)} holds weights that were quantised beforehand ({', '.join(sorted(counts))})"
        raise BadInputError(message, "LoRA is merged into 16-bit weights: name them with --model")
    return names[most]


def headers(folder: Path) -> Iterator[tuple[Path, dict[str, tuple[str, list[int]]]]]:
    """For each weights file: its path, and (type, shape) by tensor name."""
    from safetensors import safe_open

    for file in weight_files(folder):
        with safe_open(file, "pt") as source:
            slices = {name: source.get_slice(name) for name in source.keys()}  # noqa: SIM118 (no mapping)
            yield file, {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}


def bytes_needed(base: Path, dtype_name: str) -> int:
    """Bytes of the merged weights."""
    sizes = (math.prod(shape) for _, header in headers(base) for _, shape in header.values())
    return sum(sizes) * BYTES[DTYPES[dtype_name]]


def check_layers(base: Path, adapter: Adapter) -> None:
    """Raise BadInputError, before anything is written, unless every LoRA layer has its weight, of its shape."""
    shapes = {name: shape for _, header in headers(base) for name, (_, shape) in header.items()}
    for name, layer in adapter.layers.items():
        shape, wanted = shapes.get(f"{name}.weight"), [layer.b.shape[0], layer.a.shape[1]]
        if shape is None:
            message = f"{show(base)} holds no tensor {name}.weight, which {show(adapter.folder)} changes"
            raise BadInputError(message, "this base keeps its weights under other names and cannot be merged so")
        if shape != wanted:
            message = f"{show(base)}: {name}.weight is {shape}, and {show(adapter.folder)} changes one of {wanted}"
            raise BadInputError(message, "give the model that it was trained on with --model")


def merge(base: Path, adapter: Adapter, out: Path, dtype_name: str) -> None:
    """Write the merged model into the folder `out`: weights, index, configs, tokenizer.

    Raises EngineError for a sum that `dtype_name` cannot hold, and what the disk raises.
    """
    out.mkdir(parents=True, exist_ok=True)
    copy_beside(base, out, dtype_name)
    weight_map: dict[str, str] = {}
    for file, tensors in merged_files(base, adapter, dtype_name):
        save(tensors, out / file.name)
        weight_map |= dict.fromkeys(tensors, file.name)
        del tensors
    if len(set(weight_map.values())) > 1:
        total = bytes_needed(base, dtype_name)
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def merged_files(base: Path, adapter: Adapter, dtype_name: str) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """The base's weights files, one after the other, with their merged tensors."""
    import torch
    from safetensors import safe_open

    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype_name]
    for file in weight_files(base):
        tensors: dict[str, Tensor] = {}
        with safe_open(file, "pt") as source:
            for name in source.keys():  # noqa: SIM118 (no mapping)
                change = adapter.layers.get(name.removesuffix(".weight"))
                tensors[name] = _merged(name, source.get_tensor(name), change, wanted)
        yield file, tensors
        del tensors  # before the next file's are made


def _merged(name: str, weight: Tensor, change: Factors | None, wanted: dtype) -> Tensor:
    """One tensor of the merged model."""
    exact = weight if change is None else weight.float() + change.delta()
    rounded = exact.to(wanted)
    if not rounded.isfinite().all():
        raise EngineError(f"{name} does not fit into {wanted}", "export with --dtype bf16 or fp32")
    return rounded.contiguous()


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one weights file, as transformers marks them."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata={"format": "pt"})


def verify(base: Path, adapter: Adapter, out: Path, dtype_name: str) -> int:
    """Read every tensor of `out` back and hold it against base + LoRA, bit for bit; gives the number of tensors.

    Raises EngineError that names the first tensor which is not what it should be.
    """
    import torch
    from safetensors import safe_open

    count = 0
    for file, tensors in merged_files(base, adapter, dtype_name):
        with safe_open(out / file.name, "pt") as written:
            if set(written.keys()) != set(tensors):
                raise EngineError(f"{show(out / file.name)} does not hold the base's tensors", "export again")
            for name, right in tensors.items():
                if not torch.equal(written.get_tensor(name), right):
                    raise EngineError(f"{name} in {show(out / file.name)} is not base + LoRA", "export again")
                count += 1
        del tensors, right
    return count


def copy_beside(base: Path, out: Path, dtype_name: str) -> None:
    """Copy what stands beside the weights; config.json says the new precision."""
    for pattern in COPIED:
        for file in base.glob(pattern):
            if file.is_file() and file.name != INDEX:
                shutil.copyfile(file, out / file.name)
    config: dict[str, Any] = read_json(out / "config.json")
    config.pop("torch_dtype", None)  # the older name
    config["dtype"] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype_name]
    write_json(out / "config.json", config)
