"""The guards that this lab knows, and whether one can be had here: asked before the first token is generated.

A run of hours must not end at a gated model, a full disk or a GPU that is too small. So access, disk and memory are
looked at first. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from cai_experiment.engines.weights import check_folder
from cai_experiment.errors import BadInputError, DiskError, EngineError, UserError
from cai_experiment.models.choice import resolve_model
from cai_experiment.models.disk import downloaded_gb, free_gb, hub_cache
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.memory import Architecture, vram_gb, weights_gb
from cai_experiment.models.presets import NANO_DIR
from cai_experiment.models.serving import VLLM_WORK_GB, usable_gb, vllm_rows

AUTO = "auto"
CONTEXT = 4096  # tokens of the longest row that is judged
ROW_TOKENS = 1024  # of a usual one: the guard's own text of about 300, an instruction, an answer of at most 500
SLOTS = {"cuda": (64, 16, 4), "mps": (16, 4), "cpu": (32, 16)}  # rows at once, the most that fits first
QUANTIZATIONS = {"cuda": ("bf16", "4bit"), "mps": ("bf16",), "cpu": ("fp32",)}  # as weights_gb knows them
SMI_SECONDS = 20.0  # it takes a second on some pods
HUB_SECONDS = 15.0  # for one answer of the hub, whose own client would wait for ever


@dataclass(frozen=True, slots=True)
class GuardModel:
    """One known guard. `family` is how it is asked and answers: "llama-guard", "qwen3guard" or "nano"."""

    hub_id: str
    family: str
    numbers: Architecture
    gated: bool = False

    @property
    def download_gb(self) -> float:
        """Its weights on disk, in GB; all are published in bfloat16."""
        return weights_gb(self.numbers, "bf16")


LLAMA_GUARD = GuardModel(
    "meta-llama/Llama-Guard-3-8B",
    "llama-guard",
    Architecture(32, 4096, 32, 8, 128, 14_336, 128_256, tied=False, attention_bias=False),
    gated=True,
)
QWEN_SMALL = GuardModel(
    "Qwen/Qwen3Guard-Gen-0.6B",
    "qwen3guard",
    Architecture(28, 1024, 16, 8, 128, 3072, 151_936, tied=True, attention_bias=False),
)
QWEN_MIDDLE = GuardModel(
    "Qwen/Qwen3Guard-Gen-4B",
    "qwen3guard",
    Architecture(36, 2560, 32, 8, 128, 9728, 151_936, tied=True, attention_bias=False),
)
QWEN_LARGE = GuardModel(
    "Qwen/Qwen3Guard-Gen-8B",
    "qwen3guard",
    Architecture(36, 4096, 32, 8, 128, 12_288, 151_936, tied=False, attention_bias=False),
)
GUARDS = (LLAMA_GUARD, QWEN_SMALL, QWEN_MIDDLE, QWEN_LARGE)
FAMILY_OF = {"llama": "llama-guard", "qwen3": "qwen3guard"}  # by model_type, for a local folder


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """Which guard is wanted. `model`: a hub id of GUARDS, "nano", a folder, or "auto" (also None)."""

    model: str | None = None
    generator: str | None = None  # name or place: the shipped model is guarded by itself; "": a server's, unknown
    reserved_gb: float = 0.0  # what the generator will still take of the same disk
    beside_server: bool = False  # a server on this machine keeps its GPU memory while the guard reads


@dataclass(frozen=True, slots=True)
class GuardChoice:
    """What will be loaded, how, and why. `place` is a hub id or a folder; `slots` the rows judged at a time."""

    name: str
    place: str
    family: str
    quantization: str
    slots: int
    reason: str
    engine: str = "hf"  # or "vllm"

    @property
    def line(self) -> str:
        """What the terminal says before anything is generated."""
        return f"guard {self.name}: {self.reason}"


def check_guard(settings: GuardSettings, hardware: Hardware) -> GuardChoice:
    """Choose the guard and make sure that it can be loaded once the generator has left.

    "auto": the shipped model for the shipped generator; on a GPU Llama Guard 3, and without access to it Qwen3Guard,
    with the reason said; else the smallest Qwen3Guard. Weights that lie in the cache need no hub. Beside a server on
    this machine only the GPU memory that is free now counts. Raises BadInputError (no such guard), EngineError (no
    access, too little memory), DiskError (no room), each naming the next command.
    """
    name = settings.model or AUTO
    if name.lower() == AUTO:
        return _auto(settings, hardware)
    if is_shipped(name):
        return _shipped(f"--guard {name}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _from_folder(folder.resolve(), name, settings, hardware)
    known = next((guard for guard in GUARDS if guard.hub_id.lower() == name.lower()), None)
    if known is None:
        names = ", ".join(guard.hub_id for guard in GUARDS)
        raise BadInputError(f"--guard {name}: no such guard", f"use {names}, nano, a folder that holds one, or auto")
    try:
        return _from_hub(known, settings, hardware, f"--guard {name}")
    except UserError as error:
        raise type(error)(str(error), f"or {_instead(known)}") from None


def is_shipped(name: str) -> bool:
    """True if `name` means the model that ships with the repository."""
    return name.lower() == "nano" or Path(name).expanduser().resolve() == NANO_DIR


def _auto(settings: GuardSettings, hardware: Hardware) -> GuardChoice:
    name = settings.generator
    if name is None:
        name = resolve_model(None, hardware).path_or_id
    if name and is_shipped(name):
        return _shipped("the shipped model guards its own world")
    problems: list[str] = []
    for guard in (LLAMA_GUARD, QWEN_MIDDLE, QWEN_SMALL) if hardware.kind == "cuda" else (QWEN_SMALL,):
        try:
            choice = _from_hub(guard, settings, hardware, "the guard of milestone 3")
        except UserError as error:
            problems.append(str(error))
            continue
        return replace(choice, reason=f"instead of Llama Guard, since {problems[0]}") if problems else choice
    raise EngineError(f"no guard can be had: {problems[0]}", "or use --no-guard")


def _shipped(reason: str) -> GuardChoice:
    return GuardChoice("nano", str(NANO_DIR), "nano", "fp32", SLOTS["cpu"][0], reason)


def _from_hub(guard: GuardModel, settings: GuardSettings, hardware: Hardware, reason: str) -> GuardChoice:
    choice = GuardChoice(guard.hub_id, guard.hub_id, guard.family, "", 0, reason)
    choice = _fitting(choice, guard.numbers, settings, hardware)
    if not is_downloaded(guard.hub_id):
        _check_access(guard)
        _check_disk(guard, settings.reserved_gb)
    return choice


def _from_folder(folder: Path, name: str, settings: GuardSettings, hardware: Hardware) -> GuardChoice:
    check_folder(folder)
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in FAMILY_OF:
        step = "give the folder of a Llama Guard 3 or a Qwen3Guard-Gen"
        raise BadInputError(f"--guard {name}: its config.json has model_type {kind!r}, which is no known guard's", step)
    numbers = Architecture.from_config(folder)
    choice = GuardChoice(name, str(folder), FAMILY_OF[kind], "", 0, "a local folder")
    return _fitting(choice, numbers, settings, hardware)


def _fitting(choice: GuardChoice, numbers: Architecture, settings: GuardSettings, hardware: Hardware) -> GuardChoice:
    """The choice with the engine, the precision and the rows at a time that fit into the memory it will find."""
    beside = settings.beside_server and hardware.kind == "cuda"
    have = free_vram_gb() if beside else (hardware.vram_gb if hardware.kind == "cuda" else hardware.ram_gb) or None
    ways = [(q, slots) for q in QUANTIZATIONS[hardware.kind] for slots in SLOTS[hardware.kind]]
    for quantization, slots in ways:
        if have is None or vram_gb(numbers, quantization, ROW_TOKENS, slots) <= have:  # some GPUs do not say
            fits = replace(choice, quantization=quantization, slots=slots)
            return fits if beside else _on_vllm(fits, numbers, hardware)  # vLLM takes its share of the whole card
    least = vram_gb(numbers, ways[-1][0], ROW_TOKENS, ways[-1][1])
    room = f"the server leaves {have:g} GB of the GPU" if beside else f"this machine has {have:g} GB"
    raise EngineError(f"guard {choice.name} takes {least:.1f} GB of memory, and {room}", "use a smaller one")


def free_vram_gb() -> float | None:
    """GiB of the GPU that CUDA uses first which no process holds now; None where nvidia-smi does not say."""
    place = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"  # an index or a UUID: it takes both
    asked = ["nvidia-smi", "-i", place, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=SMI_SECONDS).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return round(int(said) / 1024, 1) if said.isdigit() else None


def _on_vllm(choice: GuardChoice, numbers: Architecture, hardware: Hardware) -> GuardChoice:
    """The choice on vLLM, where that is installed and holds the 16-bit weights and some rows; else as it was."""
    if hardware.kind != "cuda" or choice.quantization != "bf16" or find_spec("vllm") is None:
        return choice
    weights = weights_gb(numbers, "bf16")
    need = VLLM_WORK_GB + vram_gb(numbers, "bf16", ROW_TOKENS, SLOTS["cuda"][1])
    if need > usable_gb(numbers, hardware):
        return choice
    return replace(choice, engine="vllm", slots=vllm_rows(numbers, hardware, weights))


def _instead(guard: GuardModel) -> str:
    """The way on for somebody who cannot have `guard`: a smaller one that is open to all, or none."""
    smaller = next((q for q in (QWEN_MIDDLE, QWEN_SMALL) if q.download_gb < guard.download_gb), None)
    return f"use --guard {smaller.hub_id} (open to all) or --no-guard" if smaller else "use --no-guard"


# ---------------------------------------------------------------- the hub and the disk


def is_downloaded(hub_id: str) -> bool:
    """True if the download cache holds this model's tokenizer and whole weights."""
    snapshots = hub_cache() / f"models--{hub_id.replace('/', '--')}" / "snapshots"
    return any(_is_whole(folder) for folder in snapshots.glob("*"))


def _is_whole(folder: Path) -> bool:
    try:
        check_folder(folder)
    except BadInputError:
        return False
    return (folder / "tokenizer_config.json").is_file()


def _check_access(guard: GuardModel) -> None:
    """Ask the hub for the head of config.json, as the download will; EngineError says why it is refused."""
    import httpx
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    licence = f"accept its licence at https://huggingface.co/{guard.hub_id}"
    token = get_token()
    try:
        get_hf_file_metadata(hf_hub_url(guard.hub_id, "config.json"), token=token, timeout=HUB_SECONDS)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401 and token is not None and not isinstance(error, RepositoryNotFoundError):
            raise EngineError("the hub refuses the token of this machine", "log in anew: hf auth login") from None
        if not isinstance(error, GatedRepoError) and not (guard.gated and status in (401, 403)):
            raise EngineError(f"the hub answers {status} for {guard.hub_id}", "try again later") from None
        if token is None:
            step = f"{licence}, then: hf auth login (or set HF_TOKEN)"
            raise EngineError(f"{guard.hub_id} is gated and no token is set", step) from None
        step = f"{licence} with the token's account (a fine-grained token must allow gated repositories)"
        raise EngineError(f"{guard.hub_id} is gated and the token has no access to it", step) from None
    except (OSError, httpx.HTTPError) as error:
        message = f"{guard.hub_id} is not in the download cache and the hub cannot be reached"
        step = "connect to the internet once, or give a folder with --guard"
        raise EngineError(f"{message} ({type(error).__name__})", step) from None


def _check_disk(guard: GuardModel, reserved: float) -> None:
    """Raise DiskError if the download cache has no room for the rest of the weights beside `reserved` GB."""
    place, missing = hub_cache(), guard.download_gb - downloaded_gb(guard.hub_id)
    free = free_gb(place)
    if free < missing + reserved:
        also = f" beside {reserved:.0f} GB for the generator" if reserved else ""
        message = f"{place} has {free:.1f} GB free, and guard {guard.hub_id} takes {missing:.1f} GB{also}"
        raise DiskError(message, "make room there")
