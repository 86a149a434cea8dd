"""From a name, or from none, to a model: preset, folder or hub id, else what the machine allows. No torch."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from cai_experiment.errors import BadInputError
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.memory import Architecture
from cai_experiment.models.presets import LADDER, NANO_DIR, PRESETS, ModelPreset
from cai_experiment.models.training_memory import training_vram_gb

BIG_GPU_GB = 70  # from here on the default is the product's target, Qwen2.5-32B


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """What will be loaded and why. `kind` None: the engine looks for a chat template."""

    name: str
    path_or_id: str
    preset: ModelPreset | None
    kind: str | None
    reason: str


def resolve_model(name: str | None, hardware: Hardware) -> ModelChoice:
    """The model that `name` (preset, folder or hub id) means; without a name, the one that the hardware allows.

    Raises BadInputError for a folder without config.json and for a name that is nothing of these.
    """
    if name is None:
        return _default_choice(hardware)
    preset = PRESETS.get(name.lower())
    if preset is not None:
        return _from_preset(preset, f"--model {name}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _from_folder(folder, name)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        known = next((p for p in PRESETS.values() if p.hub_id.lower() == name.lower()), None)
        return _from_preset(known, f"--model {name}") if known else ModelChoice(name, name, None, None, "--model")
    if "/" in name or folder.is_file():
        raise BadInputError(f"--model {name}: no such folder", "give a model's folder, a hub id org/name or a preset")
    raise BadInputError(f"--model {name}: unknown preset; {_nearest(name)}", "a hub id has the form org/name")


def _from_preset(preset: ModelPreset, reason: str) -> ModelChoice:
    return ModelChoice(preset.key, preset.hub_id, preset, preset.kind, reason)


def _from_folder(folder: Path, name: str) -> ModelChoice:
    """A local model; the shipped model's own folder is its preset."""
    if folder.resolve() == NANO_DIR:
        return _from_preset(PRESETS["nano"], f"--model {name}")
    if (folder / "config.json").is_file():
        return ModelChoice(folder.resolve().name, str(folder.resolve()), None, None, f"--model {name}")
    if (folder / "adapter_config.json").is_file():
        raise BadInputError(f"--model {name}: holds a LoRA adapter, not a model", "give the model it was trained on")
    raise BadInputError(f"--model {name}: the folder holds no config.json", "give a folder that holds a model")


def _nearest(name: str) -> str:
    """The preset keys that look like `name`, or all of them if none does."""
    near = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.5)
    return f"nearest: {', '.join(near)}" if near else f"known: {', '.join(PRESETS)}"


def _default_choice(hardware: Hardware) -> ModelChoice:
    """The house rule: 70 GB of CUDA memory or more, the 32B base; less, the biggest that trains; no GPU, nano."""
    if hardware.kind != "cuda":
        where = "Apple silicon has no 4-bit training" if hardware.kind == "mps" else "no GPU here"
        return _from_preset(PRESETS["nano"], f"{where}: the shipped model rehearses everything")
    has = f"{hardware.gpu_name} has {hardware.vram_gb:g} GB"
    if hardware.vram_gb >= BIG_GPU_GB:
        return _from_preset(PRESETS["qwen2.5-32b"], f"{has}, and 70 GB or more runs the project's target")
    fitting = [PRESETS[key] for key in LADDER if qlora_need_gb(PRESETS[key]) <= hardware.vram_gb]
    if not fitting:
        return _from_preset(PRESETS["nano"], f"{has}, too little for 4-bit training of any larger preset")
    best = max(fitting, key=lambda preset: preset.architecture.parameters)
    return _from_preset(best, f"{has}; the biggest preset whose 4-bit training ({qlora_need_gb(best):.0f} GB) fits")


def qlora_need_gb(preset: ModelPreset) -> float:
    """GB for 4-bit LoRA DPO of one pair at a time, rows of 1,024 tokens (500-token answers leave half of it free)."""
    return training_vram_gb(preset.architecture, "4bit")


def numbers_of(choice: ModelChoice) -> Architecture:
    """The chosen model's architecture; BadInputError for a hub id whose config.json is not at hand."""
    if choice.preset is not None:
        return choice.preset.architecture
    if not Path(choice.path_or_id).is_dir():
        raise BadInputError(f"--model {choice.name}: its size is not known before it is downloaded",
                            "give a preset or a local folder to plan with")  # fmt: skip
    return Architecture.from_config(Path(choice.path_or_id))
