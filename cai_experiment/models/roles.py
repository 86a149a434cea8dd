"""Two models by role: named configurations, what each needs, and how two vLLMs share a GPU. Arithmetic, no torch.

The generation model answers and revises (and is trained); the evaluation model criticises and judges. Two models, since
one that judges itself overlooks its own faults.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from pathlib import Path

from cai_experiment.errors import BadInputError
from cai_experiment.models.choice import ModelChoice
from cai_experiment.models.disk import folder_gb
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.memory import (
    CONTEXT_GB,
    GB,
    Architecture,
    allowance_gb,
    kv_bytes_per_token,
    vram_gb,
    weights_gb,
)
from cai_experiment.models.presets import PRESETS, ModelPreset
from cai_experiment.models.recommend import RANKED
from cai_experiment.models.serving import (
    LEAST_ROWS,
    LIVE_ROW_TOKENS,
    VLLM_SHARE,
    VLLM_WORK_GB,
    known_numbers,
    tensor_parallel,
)
from cai_experiment.models.workload import (
    ANSWER_TOKENS,
    CRITIQUE_REQUEST,
    CRITIQUE_TOKENS,
    INSTRUCTION_PROMPT,
    REVISION_REQUEST,
    Tokens,
    Workload,
    answer_tokens,
)

ROLES = ("evaluation", "generation")
SHIPPED = "nano"
ON_CPU = ("qwen2.5-0.5b", SHIPPED)  # what is offered to a CPU: a larger one takes days there


@dataclass(frozen=True, slots=True)
class Configuration:
    """A pair of preset keys, and when to take it."""

    name: str
    evaluation: str  # criticises and judges
    generation: str  # answers, revises and is trained
    why: str


CONFIGURATIONS: dict[str, Configuration] = {
    c.name: c
    for c in (
        Configuration("single", "qwen2-1.5b-instruct", "qwen2-1.5b-instruct", "one model in both roles, loaded once"),
        Configuration("dual", "qwen2-1.5b-instruct", "phi-2", "a judge that is not the generator; Phi-2 learns well"),
        Configuration(
            "conservative", "qwen2-1.5b-instruct", "gpt2-xl", "as dual with less memory, and a context of 1,024 tokens"
        ),
    )
}
DEFAULT = "single"
DOWNLOADED = ("qwen2-1.5b-instruct", "phi-2")  # what download_models.py fetches without arguments


def configuration(name: str) -> Configuration:
    """The configuration of that name; BadInputError with the nearest names."""
    found = CONFIGURATIONS.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), CONFIGURATIONS, n=1, cutoff=0.5)
        told = f"nearest: {near[0]}" if near else f"known: {', '.join(CONFIGURATIONS)}"
        raise BadInputError(f"configuration {name} is unknown; {told}", "or name --generator and --critic")
    return found


# ---------------------------------------------------------------- what one model needs


def need_gb(numbers: Architecture, quantization: str, device: str) -> float:
    """GB to load a model and generate with LEAST_ROWS rows of average length; more rows are for what is left over."""
    need = vram_gb(numbers, quantization, LIVE_ROW_TOKENS, LEAST_ROWS)
    need += allowance_gb(numbers, quantization, LIVE_ROW_TOKENS, LEAST_ROWS)
    return need if device == "cuda" else need - CONTEXT_GB  # which is CUDA's own


def smaller_preset(than: Architecture, fits: dict[str, tuple[str, float]], trains: bool) -> ModelPreset | None:
    """The strongest preset below `than` that fits one of the places, of those that `recommend` takes, else nano.

    `fits` maps a device to (quantisation, GB free there). None of them is gated; a CPU is offered those alone with
    which it ends in hours (ON_CPU), and `trains` leaves out what is for generation only.
    """
    barred = "generation" if trains else "training"
    for key in (*(one.key for one in RANKED if one.use != barred), SHIPPED):
        numbers = PRESETS[key].architecture
        places = [device for device in fits if device != "cpu" or key in ON_CPU]
        if numbers.parameters < than.parameters and any(
            need_gb(numbers, fits[device][0], device) <= fits[device][1] for device in places
        ):
            return PRESETS[key]
    return None


# ---------------------------------------------------------------- two models on one GPU

# Tokens that each writes of a chain with two critiques.
WRITTEN = (3 * ANSWER_TOKENS, 2 * CRITIQUE_TOKENS)


def generators_share(generator: Architecture | None, critic: Architecture | None) -> float:
    """The generator's share of the memory that both models' weights leave on a GPU; half where a size is not known.

    A step takes about as long as reading the weights, so T tokens in r rows take T * W / r. The sum over both is least,
    with k bytes of keys and values a row, where the memories r * k are to each other as the roots of T * W * k.
    """
    if generator is None or critic is None:
        return 0.5
    roots = [
        math.sqrt(tokens * known.parameters * kv_bytes_per_token(known))
        for tokens, known in zip(WRITTEN, (generator, critic), strict=True)
    ]
    return roots[0] / sum(roots)


@dataclass(frozen=True, slots=True)
class Shares:
    """The shares of the GPU's memory that two vLLM processes take, or (`refused` not empty) why they do not fit."""

    generator: float
    critic: float
    refused: str = ""


def vllm_shares(generator: ModelChoice, critic: ModelChoice, hardware: Hardware, quantization: str) -> Shares:
    """Each what it needs at least, and of the rest as `generators_share` says.

    vLLM takes a fixed share of each GPU when it starts and never more, so two fit where their shares add up to
    VLLM_SHARE. Each needs its weights, VLLM_WORK_GB and the keys and values of LEAST_ROWS rows.
    """
    numbers = known_numbers(generator), known_numbers(critic)
    if numbers[0] is None or numbers[1] is None:
        name = generator.name if numbers[0] is None else critic.name
        return Shares(0.0, 0.0, f"the size of {name} is not known before it is downloaded")
    pairs = [(numbers[0], generator), (numbers[1], critic)]
    weights = [_files_gb(choice) or weights_gb(known, quantization) for known, choice in pairs]
    row = [LIVE_ROW_TOKENS * kv_bytes_per_token(known) / GB for known, _ in pairs]
    over = [tensor_parallel(known, hardware.gpus) for known, _ in pairs]  # GPUs that each is split over
    least = [w / n + VLLM_WORK_GB + LEAST_ROWS * r / n for w, r, n in zip(weights, row, over, strict=True)]
    gpu = hardware.vram_gb * 2**30 / GB
    spare = VLLM_SHARE * gpu - sum(least)
    if spare < 0:
        return Shares(0.0, 0.0, f"two vLLMs need {sum(least):.0f} GB of GPU memory ({generator.name} {least[0]:.0f}, "
                      f"{critic.name} {least[1]:.0f}), {VLLM_SHARE * gpu:.0f} GB usable")  # fmt: skip
    most = generators_share(*numbers)
    return Shares(round((least[0] + spare * most) / gpu, 4), round((least[1] + spare * (1 - most)) / gpu, 4))


def _files_gb(choice: ModelChoice) -> float:
    """GB of a local model's weights, which may be quantised; 0 for one of the hub."""
    folder = Path(choice.path_or_id)
    return folder_gb(folder) if folder.is_dir() else 0.0


# ---------------------------------------------------------------- tokens


def tokens_by_role(choice: ModelChoice, work: Workload) -> tuple[tuple[int, int], tuple[int, int]]:
    """((written, read) by the generator, the same by the critic) of a generation by two models that keep prefixes.

    Each reads what the other wrote, so together they read more than one model would; `choice` sets the lengths.
    """
    whole, rows = Tokens.of(choice, work), work.rows
    critiques = work.rounds if work.critique else 0
    criticised = whole.written - rows * answer_tokens(choice) * (1 + work.rounds)
    answered = whole.written - criticised
    spoken_requests = INSTRUCTION_PROMPT + work.rounds * REVISION_REQUEST + critiques * CRITIQUE_REQUEST
    return (answered, rows * spoken_requests + criticised), (criticised, whole.read + answered)
