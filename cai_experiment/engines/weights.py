"""Model files: are they whole, what is their hash, and one line for each way in which loading them can fail."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from cai_experiment.errors import BadInputError, DiskError, EngineError, UserError
from cai_experiment.models.disk import hub_cache

HASHED_WHOLE = 4 * 2**30  # bytes; of larger weights only header, size and both ends of each file are hashed
END = 2**20  # bytes of such an end
UNREACHABLE = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError", "ConnectTimeout",
               "ReadTimeout", "ProxyError"}  # fmt: skip
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def check_folder(folder: Path) -> None:
    """Raise BadInputError if a model folder lacks config.json or weights, or if a weights file is not whole."""
    config = folder / "config.json"
    if not config.is_file():
        raise BadInputError(f"{folder}: the folder holds no config.json", "give a folder that holds a model")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInputError(f"{config} is not JSON: {error}", "copy the model again") from error
    files = weight_files(folder)
    if not files:
        raise BadInputError(f"{folder}: the folder holds no .safetensors file", "pickled weights are not loaded")
    for file in files:
        problem = safetensors_problem(file)
        if problem:
            raise BadInputError(f"{file} {problem}", "download or copy the model again")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, by its index if it has one (they may be missing), sorted by name."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise BadInputError(f"{index} cannot be read: {error}", "copy the model again") from error
        return sorted(folder / name for name in names)
    return sorted(folder.glob("*.safetensors"))


def safetensors_problem(file: Path) -> str:
    """Why a safetensors file is not whole, as the end of a sentence; "" if header and length agree."""
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            return f"is cut off: {size} bytes do not hold its header"
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return "has a damaged header"
    wanted = 8 + length + max(ends, default=0)
    return "" if size == wanted else f"has {size} bytes instead of {wanted}: a download that did not finish"


def weights_hash(folder: Path) -> str:
    """SHA-256 over the weights' names and bytes; over names, sizes and both ends of each file above HASHED_WHOLE."""
    files = weight_files(folder)
    whole = sum(file.stat().st_size for file in files) <= HASHED_WHOLE
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            if whole:
                while block := stream.read(2**22):
                    digest.update(block)
            else:
                digest.update(stream.read(END))
                stream.seek(-END, 2)
                digest.update(stream.read(END))
    return digest.hexdigest()


def keep_trainable(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference, as it does on CPUs with AVX512-BF16.

    Repacked weights have no gradient and rounded scales. It happens in the first forward pass without gradients, so
    whoever generates with a model before training it calls this at load. EngineError if it has happened already.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                message = "bitsandbytes has repacked the 4-bit weights for inference, so they cannot be trained"
                raise EngineError(message, "load the model anew for training")


def compute_in(model: Any, dtype: Any) -> None:
    """Let weights that were quantised beforehand compute in `dtype`; their config.json says bfloat16 for any device.

    A T4 only emulates bfloat16, and a CPU is four to five times slower in it (see `precision.dtype_of`).
    """
    for module in model.modules():
        if hasattr(module, "compute_type_is_set"):  # bitsandbytes' Linear4bit
            module.compute_dtype, module.compute_type_is_set = dtype, True


def unreachable(error: Exception) -> bool:
    """True if the hub could not be reached, or HF_HUB_OFFLINE forbids it: found in the chain of causes."""
    return any(type(cause).__name__ in UNREACHABLE for cause in _chain(error))


def loading_error(name: str, error: Exception) -> UserError:
    """The one line for an error of `from_pretrained`, found in its chain of causes (the hub's own stand below)."""
    kinds = {type(cause).__name__: cause for cause in _chain(error)}
    if any(_is_full_disk(cause) for cause in kinds.values()):
        step = f"make room at {hub_cache()}, or set HF_HOME to a larger disk; the same command then goes on"
        return DiskError(f"--model {name}: the disk is full, and the download is not whole", step)
    if "GatedRepoError" in kinds:
        step = f"accept its licence at huggingface.co/{name}, then set HF_TOKEN"
        return EngineError(f"--model {name} is gated, and this machine has no access to it", step)
    if "RepositoryNotFoundError" in kinds:
        return BadInputError(f"--model {name}: the hub has no such model", "check the name; private ones need HF_TOKEN")
    if "RevisionNotFoundError" in kinds:
        return EngineError(f"--model {name}: the hub does not have the pinned revision", "name another --model")
    if kinds.keys() & UNREACHABLE:
        return not_at_hand(name)
    if "SafetensorError" in kinds:
        return BadInputError(
            f"--model {name}: a weights file is damaged ({_first_line(kinds['SafetensorError'])})",
            "delete it and download the model again",
        )
    if "OutOfMemoryError" in kinds or "DefaultCPUAllocator" in str(error):
        return EngineError(f"--model {name} does not fit into memory", "use --quantization 4bit or a smaller --model")
    step = "python cai_experiment/scripts/doctor.py shows disk, memory, driver and versions; --debug shows where"
    return EngineError(f"--model {name} cannot be loaded: {type(error).__name__}: {_first_line(error)}", step)


def not_at_hand(name: str) -> EngineError:
    """The one line for a model that is not at hand where the hub cannot be reached."""
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0") else ""
    step = f"connect to the internet once, or give a local folder{offline}"
    return EngineError(f"--model {name} is not in the download cache, and the hub cannot be reached", step)


def _is_full_disk(error: BaseException) -> bool:
    """True for the kernel's own error, and for a library's that only repeats its words (safetensors, hf_xet)."""
    return getattr(error, "errno", None) in FULL_DISK or "No space left on device" in str(error)


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and what it came from, outermost first."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]
