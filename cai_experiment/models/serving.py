"""Which engine `--engine auto` takes on a machine, and why; which files; how many GPUs. Arithmetic: nothing is loaded.

On CUDA, where one load serves generation and DPO (milestones 0 and 1): Unsloth in 4 bit. For generation alone
(milestones 2 and 3): vLLM with 16-bit weights where memory and disk allow, else Unsloth in 4 bit. Elsewhere: hf.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Callable, NamedTuple

from cai_experiment.models.choice import ModelChoice, experts_numbers, is_ensemble, members_of
from cai_experiment.models.disk import downloaded_gb, folder_gb, free_gb, hub_cache
from cai_experiment.models.ensembles import together
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.memory import GB, Architecture, kv_bytes_per_token, weights_gb

VLLM_SHARE = 0.92  # of the GPU's memory: vLLM's own default
VLLM_WORK_GB = 4.0  # activations of 8,192 tokens a step, logits, CUDA graphs (an estimate; vLLM measures its own)
LIVE_ROW_TOKENS = 768  # keys and values that a row holds on average; the worked examples are shared by all rows
LEAST_ROWS, MOST_ROWS = 8, 256  # fewer waste the GPU; more is what vLLM itself takes at most on an A100
EXPERTS_SHARE = 0.75  # of a GPU's memory that an ensemble's weights may take; the rest is for keys, values, logits
DISK_RESERVE = 1.05  # of a download: the cache's own files, and room to write while it comes in
DOWNLOADED = 0.95  # of the size that we reckon: the rest is the error of the reckoning

Installed = Callable[[str], bool]


class EngineChoice(NamedTuple):
    """The engine, the precision of its weights, and why, for the first line that a script prints."""

    engine: str
    quantization: str
    why: str


def auto_engine(
    choice: ModelChoice, hardware: Hardware, quantization: str | None, trains_after: bool, random_weights: bool,
    installed: Installed, here: bool = True,
) -> EngineChoice:  # fmt: skip
    """What `--engine auto` means here, or (`here` False) on a machine whose disk nobody has seen yet.

    `quantization` None leaves it to the engine; every refusal has its figure.
    """
    if is_ensemble(choice):
        names = ", ".join(member.name.split("/")[-1] for member in members_of(choice))
        return EngineChoice("ensemble", quantization or _experts_precision(choice, hardware), f"experts {names}")
    own = quantization or hardware.training_quantization
    if hardware.kind != "cuda":
        return EngineChoice("hf", own, "")
    refused = ""
    if not trains_after:
        refused = vllm_refusal(choice, hardware, quantization, random_weights, installed, here)
        if not refused:
            served = quantization or "bf16"
            return EngineChoice("vllm", served, _why_vllm(choice, hardware, served))
        refused = f"vllm no: {refused}"
    four_bit = own == "4bit" and not random_weights
    known = choice.preset is None or choice.preset.unsloth
    if four_bit and known and installed("unsloth"):
        return EngineChoice("unsloth", own, "; ".join(filter(None, ("4-bit on CUDA", refused))))
    missing = "" if not four_bit else "unsloth is not installed" if known else "Unsloth has no path for its family"
    return EngineChoice("hf", own, "; ".join(filter(None, (missing, refused))))


def _experts_precision(choice: ModelChoice, hardware: Hardware) -> str:
    """fp32 on a CPU; bf16 on a GPU whose EXPERTS_SHARE holds all experts so, else 4bit."""
    if hardware.kind == "cpu":
        return "fp32"
    numbers = known_numbers(choice)
    large = numbers is not None and weights_gb(numbers, "bf16") > EXPERTS_SHARE * hardware.vram_gb
    return "4bit" if hardware.kind == "cuda" and large else "bf16"


def vllm_refusal(
    choice: ModelChoice, hardware: Hardware, quantization: str | None, random_weights: bool, installed: Installed,
    here: bool = True,
) -> str:  # fmt: skip
    """Why `auto` does not take vLLM, with the figures; "" if it does. GB are 10^9 bytes. `here`: look at the disk."""
    if not installed("vllm"):
        return "not installed"
    if quantization in ("4bit", "8bit"):
        return f"it serves 16-bit weights and quantised checkpoints, not {quantization} made while loading"
    numbers = known_numbers(choice)
    if numbers is None:
        return f"the size of {choice.name} is not known before it is downloaded (--engine vllm tries it)"
    weights = _weights(choice, numbers, quantization or "bf16", random_weights)
    need = weights + VLLM_WORK_GB + LEAST_ROWS * LIVE_ROW_TOKENS * kv_bytes_per_token(numbers) / GB
    have = usable_gb(numbers, hardware)
    if need > have:
        return f"{need:.0f} GB of GPU memory needed ({weights:.0f} of weights), {have:.0f} GB usable"
    return "" if random_weights or not here else disk_refusal(choice, quantization or "bf16")


def files_for(choice: ModelChoice, engine: str, quantization: str, here: bool = True) -> tuple[str, str]:
    """(folder or hub id, "bf16" or "4bit"): the files that an engine loads for these weights. `here`: look at the disk.

    In 4 bit it is the preset's sibling that was quantised beforehand, a third of the download; the model's own files,
    quantised while loading, where it has none or where FSDP is to shard them. transformers takes the model's own also
    where they are whole here and the sibling is not: nothing is fetched, and a run which resumes finds the weights that
    it had.
    """
    own = choice.path_or_id, "bf16"
    if quantization != "4bit" or choice.preset is None or not choice.preset.four_bit or engine == "vllm":
        return own
    if engine == "unsloth":
        return choice.preset.four_bit, "4bit"
    if sharded() or (here and _whole(choice, "bf16") and not _whole(choice, "4bit")):
        return own
    return choice.preset.four_bit, "4bit"


def sharded() -> bool:
    """True in a process of `accelerate launch` with FSDP: it shards float types, the siblings' weights are bytes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def here_gb(choice: ModelChoice, precision: str) -> float:
    """GB in the cache of a model's own files ("bf16"), or of its preset's 4-bit sibling ("4bit"), halves included."""
    if precision != "4bit":
        return downloaded_gb(choice.path_or_id)
    sibling = choice.preset.four_bit if choice.preset is not None else ""
    return downloaded_gb(sibling) if sibling else 0.0


def missing_gb(choice: ModelChoice, precision: str) -> float:
    """GB of these weights that are still to be fetched, 0 of a model whose size is not known."""
    numbers = known_numbers(choice)
    return 0.0 if numbers is None else max(0.0, weights_gb(numbers, precision) - here_gb(choice, precision))


def _whole(choice: ModelChoice, precision: str) -> bool:
    numbers = known_numbers(choice)
    return numbers is not None and here_gb(choice, precision) >= DOWNLOADED * weights_gb(numbers, precision)


def disk_refusal(choice: ModelChoice, quantization: str) -> str:
    """Why the disk does not hold the weights that are still to be downloaded, with the figures; "" if it does.

    `quantization` is that of the files on the hub (see `files_for`).
    """
    numbers = known_numbers(choice)
    if numbers is None or Path(choice.path_or_id).is_dir():
        return ""
    weights, place = weights_gb(numbers, quantization), hub_cache()
    have = here_gb(choice, quantization)
    missing, free = DISK_RESERVE * weights - have, free_gb(place)
    if have >= DOWNLOADED * weights or missing <= free:
        return ""
    return f"{free:.0f} GB free disk at {place}, {missing:.0f} GB needed for {weights:.0f} GB of weights"


def _why_vllm(choice: ModelChoice, hardware: Hardware, quantization: str) -> str:
    numbers = known_numbers(choice)
    assert numbers is not None
    parallel = tensor_parallel(numbers, hardware.gpus)
    where = f"{usable_gb(numbers, hardware):.0f} GB usable" + (f" on {parallel} GPUs" if parallel > 1 else "")
    return f"own process; {weights_gb(numbers, quantization):.0f} GB of weights, {where}"


def _weights(choice: ModelChoice, numbers: Architecture, quantization: str, random_weights: bool) -> float:
    """GB of weights: the files' own size where they are at hand (a quantised checkpoint is smaller)."""
    folder = Path(choice.path_or_id)
    own = folder_gb(folder) if folder.is_dir() and not random_weights else 0.0
    return own or weights_gb(numbers, quantization)


def known_numbers(choice: ModelChoice) -> Architecture | None:
    """The model's architecture, or None for a hub id that no preset describes; an ensemble's as `numbers_of` has it."""
    if is_ensemble(choice):
        experts = experts_numbers(choice, fetch=False)
        known = [numbers for numbers in experts if numbers is not None]
        return together(known) if len(known) == len(experts) else None
    if choice.preset is not None:
        return choice.preset.architecture
    folder = Path(choice.path_or_id)
    return Architecture.from_config(folder) if folder.is_dir() else None


def tensor_parallel(numbers: Architecture | None, gpus: int) -> int:
    """Over how many of `gpus` alike vLLM splits the layers: the most that divide its heads; 1 if these are unknown."""
    if numbers is None:
        return 1
    return max(n for n in range(1, gpus + 1) if numbers.heads % n == 0 and numbers.kv_heads % n == 0)


def actor_gpus(
    engine: str, choice: ModelChoice, hardware: Hardware, quantization: str | None, random_weights: bool,
    installed: Installed, most: int, here: bool = True,
) -> tuple[int, str]:  # fmt: skip
    """(GPUs of one Ray actor, ""): the fewest of a machine's `most` over which vLLM holds the model; else one.

    With `engine` "vllm" and too few of them the second says why, with the figures. `hardware` gives the card.
    """
    if hardware.kind != "cuda" or engine not in ("auto", "vllm") or known_numbers(choice) is None:
        return 1, ""
    refused = ""
    for gpus in range(1, most + 1):
        machine = replace(hardware, gpus=gpus)
        if engine == "vllm":  # asked for: whether it is installed, and the disk, its loading says
            refused = vllm_refusal(choice, machine, quantization, random_weights, lambda package: True, here=False)
            taken = not refused
        else:
            taken = auto_engine(choice, machine, quantization, False, random_weights, installed, here).engine == "vllm"
        if taken:
            return gpus, ""
    return 1, refused


def usable_gb(numbers: Architecture | None, hardware: Hardware) -> float:
    """GB that vLLM may use over all GPUs that it splits the model over (`vram_gb` is in GiB)."""
    return VLLM_SHARE * hardware.vram_gb * 2**30 / GB * tensor_parallel(numbers, hardware.gpus)


def vllm_rows(numbers: Architecture | None, hardware: Hardware, weights: float) -> int:
    """How many rows vLLM keeps at work: what its memory holds beside `weights` GB; LEAST_ROWS..MOST_ROWS."""
    if numbers is None:
        return MOST_ROWS // 4
    room = usable_gb(numbers, hardware) - weights - VLLM_WORK_GB
    rows = int(room * GB / (LIVE_ROW_TOKENS * kv_bytes_per_token(numbers)))
    return max(LEAST_ROWS, min(MOST_ROWS, rows))
