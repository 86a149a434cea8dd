"""The models that this lab knows by a short name. Data with reasons; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cai_experiment.models.memory import Architecture

NANO_DIR = Path(__file__).resolve().parents[1] / "nano" / "weights" / "nano"


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
