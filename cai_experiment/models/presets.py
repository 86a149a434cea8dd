"""The models that this lab knows by a short name, and the choice of one for a machine. Data with reasons; no torch."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from cai_experiment.errors import BadInputError
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.memory import Architecture
from cai_experiment.models.training_memory import training_vram_gb

NANO_DIR = Path(__file__).resolve().parents[1] / "nano" / "weights" / "nano"
BIG_GPU_GB = 70  # from here on the default is the product's target, Qwen2.5-32B


@dataclass(frozen=True, slots=True)
class TrainingOverrides:
    """Training values that a model needs instead of the spec's, and why."""

    learning_rate: float
    reason: str
    sft_learning_rate: float
    sft_epochs: float
    after_sft: float  # DPO's learning rate after SFT
    sft_reason: str


@dataclass(frozen=True, slots=True)
class ModelPreset:
    """One known model. `numbers` None: they stand in the config.json of the folder (the shipped model's)."""

    key: str
    hub_id: str  # hub id, or the folder of a shipped model
    kind: str  # "base" | "chat"
    numbers: Architecture | None
    context: int  # tokens, config.json's max_position_embeddings
    licence: str
    good_at: str
    training: TrainingOverrides | None = None

    @property
    def architecture(self) -> Architecture:
        """The architecture numbers; BadInputError if a shipped model's folder is not there."""
        return self.numbers or Architecture.from_config(Path(self.hub_id))

    @property
    def is_local(self) -> bool:
        """True for a model that ships with the repository."""
        return self.numbers is None


_QWEN_05 = Architecture(24, 896, 14, 2, 64, 4864, 151_936, tied=True)
_QWEN_15 = Architecture(28, 1536, 12, 2, 128, 8960, 151_936, tied=True)
_QWEN_3 = Architecture(36, 2048, 16, 2, 128, 11_008, 151_936, tied=True)
_QWEN_7 = Architecture(28, 3584, 28, 4, 128, 18_944, 152_064, tied=False)
_QWEN_14 = Architecture(48, 5120, 40, 8, 128, 13_824, 152_064, tied=False)
_QWEN_32 = Architecture(64, 5120, 40, 8, 128, 27_648, 152_064, tied=False)

# Short keys up to 14b mean the Instruct models; qwen2.5-32b means the base model, the target of this project.
PRESETS: dict[str, ModelPreset] = {
    p.key: p
    for p in (
        ModelPreset(
            "nano", str(NANO_DIR), "chat", None, 2048, "apache-2.0",
            "rehearsing every script on a CPU; its small world has a known truth",
            TrainingOverrides(
                1.6e-4, "a few million parameters hardly move at 5e-6; at 2e-4 answers repeat",
                # three disjoint sets of 100 pairs: at most 2% of answers flawed, 0.95 of the distinct pairs of words
                sft_learning_rate=7e-4, sft_epochs=3.0, after_sft=1.2e-4,
                sft_reason="six epochs at 1e-3, or DPO at 1.6e-4 after it, lose a seventh of the distinct word pairs",
            ),
        ),
        ModelPreset("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", "chat", _QWEN_05, 32_768, "apache-2.0",
                    "trying the pipeline on the smallest real model"),
        ModelPreset("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct", "chat", _QWEN_15, 32_768, "apache-2.0",
                    "8 GB cards and patient CPUs"),
        ModelPreset("qwen2.5-3b", "Qwen/Qwen2.5-3B-Instruct", "chat", _QWEN_3, 32_768, "qwen-research",
                    "a fast baseline; its licence forbids commercial use"),
        ModelPreset("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", "chat", _QWEN_7, 32_768, "apache-2.0",
                    "useful critiques on a 15 GB card; 131,072 tokens with YaRN"),
        ModelPreset("qwen2.5-14b", "Qwen/Qwen2.5-14B-Instruct", "chat", _QWEN_14, 32_768, "apache-2.0",
                    "the best critic for a 24 GB card; 131,072 tokens with YaRN"),
        ModelPreset("qwen2.5-32b", "Qwen/Qwen2.5-32B", "base", _QWEN_32, 131_072, "apache-2.0",
                    "the target of this project: a base model, few-shot prompts, one A100 80 GB"),
    )
}  # fmt: skip


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
    fitting = [p for p in PRESETS.values() if not p.is_local and qlora_need_gb(p) <= hardware.vram_gb]
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
