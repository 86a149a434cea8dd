"""From a model's name to a VLLMEngine: its files are fetched here, so that their progress and their faults are seen."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.engines.vllm import VLLMEngine, VLLMSettings
from cai_experiment.engines.weights import check_folder, loading_error, weights_hash
from cai_experiment.errors import BadInputError, UserError
from cai_experiment.models.choice import ModelChoice
from cai_experiment.models.disk import folder_gb
from cai_experiment.models.downloads import LEFT_OUT, LOADED_FILES
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.memory import Architecture, weights_gb
from cai_experiment.models.serving import VLLM_SHARE, tensor_parallel, vllm_rows

if TYPE_CHECKING:
    from cai_experiment.engines.load import LoadSettings

DTYPES = {"bf16": "auto", "fp32": "float32"}  # auto: as the checkpoint says, bfloat16 for one in 32 bit


def load(choice: ModelChoice, quantization: str, settings: LoadSettings, hardware: Hardware) -> VLLMEngine:
    """Fetch the model's files, then start the engine over them. Raises BadInputError and EngineError, one line each."""
    try:
        folder = _random_folder(choice, settings) if settings.random_weights is not None else fetch(choice)
        config, generation, tokenizer = configs(str(folder))
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise loading_error(choice.name, error) from error
    from cai_experiment.engines.load import renderer_for

    renderer = renderer_for(config, generation, tokenizer, choice, settings)
    started = _settings(choice, folder, quantization, settings, hardware)
    return VLLMEngine(started, tokenizer, renderer, _facts(choice, folder, config, quantization, settings))


def fetch(choice: ModelChoice) -> Path:
    """The model's folder, downloaded where it is not there yet; BadInputError if its files are not whole."""
    folder = Path(choice.path_or_id)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        from cai_experiment.engines.at_hand import whole_in_cache
        from cai_experiment.engines.load import revision_of

        revision = revision_of(choice)
        folder = Path(
            snapshot_download(
                choice.path_or_id,
                revision=revision,
                local_files_only=whole_in_cache(choice.path_or_id, revision),
                allow_patterns=list(LOADED_FILES),
                ignore_patterns=list(LEFT_OUT),
            )
        )
    check_folder(folder)
    return folder


def _random_folder(choice: ModelChoice, settings: LoadSettings) -> Path:
    """A folder with a preset's config and a tokenizer, and no weights: vLLM makes its own random ones."""
    from cai_experiment.engines.random_weights import config_of, tokenizer_for

    assert choice.preset is not None
    folder = Path(tempfile.mkdtemp(prefix=f"random-{choice.preset.key}-"))
    config = config_of(choice.preset)
    config.save_pretrained(folder)
    tokenizer_for(choice.preset, settings.tokenizer).save_pretrained(folder)
    return folder


def configs(place: str) -> tuple[Any, Any, Any]:
    """(model config, generation config, tokenizer) of a folder or hub id; OSError where it is not to be had."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    try:
        generation = GenerationConfig.from_pretrained(place)
    except OSError:  # a model without one
        generation = GenerationConfig.from_model_config(config)
    return config, generation, AutoTokenizer.from_pretrained(place)


def _settings(
    choice: ModelChoice, folder: Path, quantization: str, settings: LoadSettings, hardware: Hardware
) -> VLLMSettings:
    random = settings.random_weights is not None
    numbers: Architecture | None
    try:
        numbers = choice.preset.architecture if choice.preset is not None else Architecture.from_config(folder)
    except BadInputError:  # not Llama's shape: vLLM may serve it all the same
        numbers = None
    weights = folder_gb(folder) if numbers is None or not random else weights_gb(numbers, quantization)
    share = settings.memory_share or VLLM_SHARE
    room = replace(hardware, vram_gb=hardware.vram_gb * share / VLLM_SHARE)  # the other role's vLLM has the rest
    return VLLMSettings(
        folder=str(folder),
        dtype="bfloat16" if random and quantization == "bf16" else DTYPES[quantization],
        slots=settings.batch_size or vllm_rows(numbers, room, weights),
        tensor_parallel=tensor_parallel(numbers, hardware.gpus),
        seed=settings.seed,
        random_weights=random,
        memory_share=share,
        deadline=settings.deadline,
    )


def _facts(
    choice: ModelChoice, folder: Path, config: Any, quantization: str, settings: LoadSettings
) -> dict[str, object]:
    """What the manifest records of the weights; `quantization` is the checkpoint's own where it has one (AWQ, FP8)."""
    made = getattr(config, "quantization_config", None)
    method = made.get("quant_method") if isinstance(made, dict) else getattr(made, "quant_method", None)
    facts: dict[str, object] = {"model": choice.name, "quantization": str(method) if method else quantization}
    facts["architecture"] = (config.architectures or [""])[0]
    if settings.random_weights is not None:
        return {**facts, "random_seed": settings.seed}
    if Path(choice.path_or_id).is_dir():
        return {**facts, "weights_sha256": weights_hash(folder)}
    return {**facts, "weights_from": choice.path_or_id, "revision": folder.name}  # the cache names a snapshot by it
