"""Which preset a machine should take, for generation or for training: rules as data with reasons. No torch."""

from __future__ import annotations

from typing import NamedTuple

from cai_experiment.errors import BadInputError
from cai_experiment.models.presets import PRESETS, ModelPreset
from cai_experiment.models.profiles import Hardware, get_hardware_profile

ROWS, ROW_TOKENS = 8, 2048  # of a recommendation for generation: fewer rows leave a GPU idle; answer and transcript
TRAINED_TOKENS = 1024  # a row, at one pair a pass: 500-token answers leave half of it free
SPARE = 1.1  # times what is reckoned: about the error of the reckoning
SHARED = 0.67  # of a Mac's memory, that its GPU may use: macOS keeps about a third
NAMES = {"4-bit": "4bit", "8-bit": "8bit", "fp16": "bf16", "16bit": "bf16", "bfloat16": "bf16", "float16": "bf16"}
QUANTIZATIONS = ("4bit", "8bit", "bf16", "fp32")


class Ranked(NamedTuple):
    """A preset that is recommended, and why it stands where it does."""

    key: str
    why: str
    use: str = "both"  # "generation" | "training" | "both"
    is_enough: bool = True  # for critiques that can be used


# Strongest first. Qwen2.5 because it has a model of every size that answers without thinking aloud (Qwen3's hybrids
# write a thought before each of the six completions of a pair), because the target of the project is one of them, so
# that prompts and training are rehearsed on the same architecture and tokenizer, and because none is gated. The prompts
# are measured on none of these yet. Not here: coders and mathematicians, models of 2019, gated ones (Llama, Gemma: a
# token is needed), and Qwen2.5-3B, whose licence forbids commercial use: Qwen3-4B of July 2025 takes its place.
RANKED = (
    Ranked("qwen2.5-32b-instruct", "the strongest of its line, a critic and a judge", "generation"),
    Ranked("qwen2.5-32b", "the base model that this project trains", "training"),
    Ranked("qwen2.5-14b", "the strongest of its line below 32B"),
    Ranked("qwen2.5-7b", "the smallest of its line that reasons well over several turns"),
    Ranked("qwen3-4b", "the small one of its makers that does not think aloud and may be used freely"),
    Ranked("qwen2.5-1.5b", "follows instructions; its critiques are shallow", is_enough=False),
    Ranked("qwen2.5-0.5b", "shows that the pipeline runs on a real model", is_enough=False),
)


class Recommendation(NamedTuple):
    """A preset for a machine, and why, in words for a terminal."""

    preset: ModelPreset
    reason: str


def room_gb(hardware: Hardware) -> float:
    """GB that a model may take there: the nominal GiB as 10^9 bytes (7% in reserve); of a Mac's memory two thirds."""
    return hardware.memory_gb * (SHARED if hardware.kind == "mps" else 1.0)


def need_gb(preset: ModelPreset, quantization: str, for_training: bool = False) -> float:
    """GB that a recommendation asks for: eight rows of 2,048 tokens, or LoRA DPO of a pair of rows of 1,024."""
    if for_training:
        return preset.training_vram_gb(quantization, TRAINED_TOKENS)
    return preset.vram_gb(quantization, ROW_TOKENS, ROWS)


def recommend(hardware: Hardware, prefer_reasoning: bool = True, for_training: bool = False) -> Recommendation:
    """The strongest of RANKED that fits with a tenth to spare; without `prefer_reasoning` the fastest that is enough.

    The fastest is the smallest: a step takes as long as reading the weights. Without a GPU, and for training on a Mac,
    it is the shipped model; nowhere is a preset recommended that does not fit.
    """
    if hardware.kind == "cpu" or (hardware.kind == "mps" and for_training):
        where = "Apple silicon has no 4-bit training" if hardware.kind == "mps" else "no GPU here"
        return Recommendation(PRESETS["nano"], f"{where}: the shipped model rehearses everything")
    quantization = hardware.training_quantization if for_training else hardware.quantization
    has, barred = room_gb(hardware), "generation" if for_training else "training"
    able = [one for one in RANKED if one.use != barred]
    fitting = [one for one in able if SPARE * need_gb(PRESETS[one.key], quantization, for_training) <= has]
    what = "4-bit training" if for_training else f"{quantization.replace('bit', '-bit')} generation"
    there = f"{hardware.gpu_name} has {has:.3g} GB"
    if not fitting:
        return Recommendation(PRESETS["nano"], f"{there}, too little for {what} of any larger preset")
    one = fitting[0]
    if not prefer_reasoning:
        enough = [ranked for ranked in fitting if ranked.is_enough] or fitting[:1]
        one = min(enough, key=lambda ranked: PRESETS[ranked.key].parameters)
    preset = PRESETS[one.key]
    said = "the strongest" if prefer_reasoning else "the fastest that is good enough"
    need = need_gb(preset, quantization, for_training)
    return Recommendation(preset, f"{there}; {said} whose {what} ({need:.0f} GB) fits: {one.why}")


def recommend_model_for_hardware(key: str, prefer_reasoning: bool = True, for_training: bool = False) -> ModelPreset:
    """The preset for a profile (see `recommend`). Raises BadInputError for an unknown key, with the nearest."""
    return recommend(get_hardware_profile(key), prefer_reasoning, for_training).preset


def normal_quantization(name: str) -> str:
    """ "4bit", "8bit", "bf16" or "fp32" for what a user may call it ("fp16", "4-bit"); BadInputError for others."""
    found = NAMES.get(name.strip().lower(), name.strip().lower())
    if found not in QUANTIZATIONS:
        raise BadInputError(f"quantization {name} is unknown", f"use one of {', '.join(QUANTIZATIONS)}, fp16")
    return found


def list_available_models(
    max_vram: float | None = None, quantization: str = "4bit", min_context: int | None = None
) -> list[ModelPreset]:
    """Presets whose generation of a row of 4,096 tokens takes at most `max_vram` GB, of `min_context` tokens or more.

    Largest first; BadInputError for an unknown quantisation.
    """
    kept = normal_quantization(quantization)
    found = [
        preset for preset in PRESETS.values()
        if (max_vram is None or preset.vram_gb(kept) <= max_vram) and preset.context >= (min_context or 0)
    ]  # fmt: skip
    return sorted(found, key=lambda preset: (-preset.parameters, preset.key))


def print_model_comparison() -> None:
    """Print all presets as a table of at most 100 columns: sizes, context, licence, GB by quantisation, what for."""
    from cai_experiment.models.tables import columns, preset_table, show

    width = min(columns(), 100)
    show(preset_table(list(PRESETS.values()), width), width)
