"""Which preset a machine should take, for generation or for training: rules as data with reasons. No torch."""

from __future__ import annotations

from typing import NamedTuple

from cai_experiment.errors import BadInputError
from cai_experiment.models.presets import PRESETS, ModelPreset
from cai_experiment.models.profiles import Hardware, get_hardware_profile

ROWS, ROW_TOKENS = 8, 2048  # of a recommendation for generation: fewer rows leave a GPU idle; answer and transcript
LENGTHS = (4096, 3072, 2048, 1536, 1024)  # of a training row: the spec's, else the largest of these that fits
TRAINED_TOKENS = LENGTHS[-1]  # the least, at one pair a pass: 500-token answers leave half of it free
SPARE = 1.1  # times what is reckoned: about the error of the reckoning
SHARED = 0.67  # of a Mac's memory, that its GPU may use: macOS keeps about a third
NAMES = {"4-bit": "4bit", "8-bit": "8bit", "fp16": "bf16", "16bit": "bf16", "bfloat16": "bf16", "float16": "bf16"}
QUANTIZATIONS = ("4bit", "8bit", "bf16", "fp32")
SMALLER = ("bf16", "8bit", "4bit")  # what is tried in turn where a GPU's own precision does not fit


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
    quantization: str  # in which it is recommended
    length: int = 0  # tokens of the longest rows that it is trained on; 0 for generation and for the shipped model


def room_gb(hardware: Hardware) -> float:
    """GB that a model may take there: the nominal GiB as 10^9 bytes (7% in reserve); of a Mac's memory two thirds."""
    return hardware.memory_gb * (SHARED if hardware.kind == "mps" else 1.0)


def need_gb(preset: ModelPreset, quantization: str, for_training: bool = False) -> float:
    """GB that a recommendation asks for: eight rows of 2,048 tokens, or LoRA DPO of a pair of rows of 1,024."""
    if for_training:
        return preset.training_vram_gb(quantization, TRAINED_TOKENS)
    return preset.vram_gb(quantization, ROW_TOKENS, ROWS)


def precisions(hardware: Hardware, for_training: bool = False) -> tuple[str, ...]:
    """What is tried in turn there: the machine's own, then on CUDA the smaller ones; training has its own alone."""
    own = hardware.training_quantization if for_training else hardware.quantization
    if for_training or hardware.kind != "cuda" or own not in SMALLER:
        return (own,)
    return SMALLER[SMALLER.index(own) :]


def training_length(preset: ModelPreset, quantization: str, have_gb: float) -> int | None:
    """The largest of LENGTHS whose rows DPO holds in `have_gb`, one pair a pass; None if none does."""
    return next((length for length in LENGTHS if preset.training_vram_gb(quantization, length) <= have_gb), None)


def recommend(hardware: Hardware, prefer_reasoning: bool = True, for_training: bool = False) -> Recommendation:
    """The strongest of RANKED that fits with a tenth to spare; without `prefer_reasoning` the fastest that is enough.

    Each is tried in the machine's own precision, then in smaller ones: a larger model in 4 bit is better than a smaller
    one in 16. The fastest is the smallest: a step takes as long as reading the weights. Without a GPU, and for training
    on a Mac, it is the shipped model; nowhere is a preset recommended that does not fit.
    """
    tried = precisions(hardware, for_training)
    if hardware.kind == "cpu" or (hardware.kind == "mps" and for_training):
        where = "Apple silicon has no 4-bit training" if hardware.kind == "mps" else "no GPU here"
        return Recommendation(PRESETS["nano"], f"{where}: the shipped model rehearses everything", tried[0])
    has, there = room_gb(hardware), f"{hardware.gpu_name} has {room_gb(hardware):.3g} GB"
    fitting = _fitting(tried, has, for_training)
    if not fitting:
        what = _work(tried[-1], for_training)
        return Recommendation(PRESETS["nano"], f"{there}, too little for {what} of any larger preset", tried[0])
    one, quantization = fitting[0]
    if not prefer_reasoning:
        enough = [pair for pair in fitting if pair[0].is_enough] or fitting[:1]
        one, quantization = min(enough, key=lambda pair: PRESETS[pair[0].key].parameters)
    preset = PRESETS[one.key]
    said = "the strongest" if prefer_reasoning else "the fastest that is good enough"
    length = training_length(preset, quantization, has) or 0 if for_training else 0
    need = preset.training_vram_gb(quantization, length) if length else need_gb(preset, quantization)
    rows = f"rows of up to {length:,} tokens" if length else f"{ROWS} rows of {ROW_TOKENS:,} tokens"
    words = f"{there}; {said} whose {_work(quantization, for_training)} ({need:.0f} GB, {rows}) fits: {one.why}"
    return Recommendation(preset, words, quantization, length)


def _fitting(tried: tuple[str, ...], has: float, for_training: bool) -> list[tuple[Ranked, str]]:
    """(one of RANKED, the first of the precisions `tried` in which it fits `has` GB), strongest first."""
    barred, found = "generation" if for_training else "training", []
    for one in RANKED:
        needs = [(kept, SPARE * need_gb(PRESETS[one.key], kept, for_training)) for kept in tried]
        kept = next((kept for kept, need in needs if need <= has), None)
        if kept is not None and one.use != barred:
            found.append((one, kept))
    return found


def _work(quantization: str, for_training: bool) -> str:
    """In words, as "8-bit generation"."""
    return f"{quantization.replace('bit', '-bit')} {'training' if for_training else 'generation'}"


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
    """Presets that generate a row of 4,096 tokens (or of their context, if it is shorter) in at most `max_vram` GB
    and have a context of `min_context` tokens or more.

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
