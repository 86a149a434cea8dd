"""From a model's name to an engine: which model, which engine, which quantisation, and why."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.engines.weights import check_folder, keep_trainable, loading_error, weights_hash
from cai_experiment.errors import BadInputError, EngineError, UserError
from cai_experiment.models.hardware import Hardware, detect
from cai_experiment.models.presets import PRESETS, ModelChoice, resolve_model

if TYPE_CHECKING:
    from cai_experiment.engines.base import Engine
    from cai_experiment.engines.render import Renderer

ENGINES = ("auto", "hf", "generate", "unsloth")
MAX_LENGTH = 4096  # the spec's; a model with a shorter context gives its own
NAMES = {"4bit": "4-bit NF4", "8bit": "8-bit", "bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """What to load and how. None means: what the hardware and the model ask for."""

    model: str | None = None  # preset, hub id or folder
    layout: str = "auto"  # "chat" | "base"
    quantization: str | None = None  # "4bit" | "8bit" | "bf16" | "fp32"
    batch_size: int | None = None  # slots
    engine: str = "auto"
    device: str | None = None  # "cuda" | "mps" | "cpu"
    seed: int = 0  # of random weights
    random_weights: str | None = None  # a preset
    max_length: int | None = None  # tokens, at most the model's own context
    tokenizer: str | None = None  # folder of a tokenizer for random weights


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings after all choices. `engine` is "hf", "generate" or "unsloth"; `why` explains it, or is empty."""

    choice: ModelChoice
    engine: str
    why: str
    quantization: str
    device: str

    @property
    def first_line(self) -> str:
        """The first line that a script prints: model, engine, quantisation and why."""
        kind = f" ({self.choice.kind})" if self.choice.kind else ""
        engine = f"{self.engine} ({self.why})" if self.why else self.engine
        precision = f"{NAMES[self.quantization]} on {self.device}"
        return f"model {self.choice.name}{kind} | engine {engine} | {precision} | {self.choice.reason}"


def load_engine(settings: LoadSettings) -> Engine:
    """Load a model into an engine; prints nothing (`engine.first_line` is for the caller to print).

    Raises BadInputError (unknown model, damaged files, settings that do not go together) and EngineError (it cannot be
    loaded or served here).
    """
    plan = make_plan(settings, detect())
    model, tokenizer, facts = load_model(plan, settings)
    renderer = make_renderer(model, tokenizer, plan.choice, settings)
    engine = _engine_class(plan.engine)(model, tokenizer, renderer, settings.batch_size, facts)
    engine.first_line = plan.first_line
    return engine


def make_plan(settings: LoadSettings, hardware: Hardware) -> Plan:
    """Choose model, engine, quantisation and device; no torch yet. Raises BadInputError, EngineError."""
    if settings.engine not in ENGINES:
        raise BadInputError(f"--engine {settings.engine} is unknown", f"use one of {', '.join(ENGINES)}")
    device = settings.device or hardware.kind
    quantization = settings.quantization or (hardware.quantization if device == hardware.kind else "fp32")
    if quantization not in NAMES:
        raise BadInputError(f"--quantization {quantization} is unknown", f"use one of {', '.join(NAMES)}")
    if device == "mps" and quantization in ("4bit", "8bit"):
        raise BadInputError(f"--quantization {quantization} does not run on Apple silicon", "use bf16 or fp32")
    engine, why = _choose_engine(settings, device, quantization)
    return Plan(_choose_model(settings, hardware), engine, why, quantization, device)


def _choose_model(settings: LoadSettings, hardware: Hardware) -> ModelChoice:
    if settings.random_weights is None:
        return resolve_model(settings.model, hardware)
    preset = PRESETS.get(settings.random_weights)
    if preset is None:
        raise BadInputError(f"--random-weights {settings.random_weights} is no preset", f"known: {', '.join(PRESETS)}")
    reason = "random weights of the true architecture: a test of the code, its words mean nothing"
    return ModelChoice(f"random:{preset.key}", preset.hub_id, preset, preset.kind, reason)


def _choose_engine(settings: LoadSettings, device: str, quantization: str) -> tuple[str, str]:
    """(engine, why). Unsloth on CUDA in 4 bit where it is installed; its loader cannot make random weights."""
    fits = device == "cuda" and quantization == "4bit" and settings.random_weights is None
    installed = find_spec("unsloth") is not None
    if settings.engine == "auto":
        if fits and installed:
            return "unsloth", "4-bit on CUDA"
        return "hf", "unsloth is not installed" if fits else ""
    if settings.engine == "unsloth" and not (fits and installed):
        if not installed:
            raise EngineError("--engine unsloth: unsloth is not installed", "bash setup_runpod.sh, or --engine hf")
        raise BadInputError("--engine unsloth loads real weights in 4 bit on CUDA only", "use --engine hf")
    return settings.engine, "--engine"


def _engine_class(name: str) -> Any:
    if name == "hf":
        from cai_experiment.engines.hf import HFEngine

        return HFEngine
    if name == "unsloth":
        from cai_experiment.engines.unsloth import UnslothEngine

        return UnslothEngine
    from cai_experiment.engines.generate import GenerateEngine

    return GenerateEngine


# ---------------------------------------------------------------- weights


def load_model(plan: Plan, settings: LoadSettings) -> tuple[Any, Any, dict[str, object]]:
    """(model in eval mode, tokenizer, facts for the manifest). Raises BadInputError, EngineError, one line each."""
    place = plan.choice.path_or_id
    if settings.random_weights is None and Path(place).is_dir():
        check_folder(Path(place))
    try:
        if settings.random_weights is not None:
            model, tokenizer = _random(plan, settings)
        elif plan.engine == "unsloth":
            from cai_experiment.engines import unsloth

            model, tokenizer = unsloth.load(place, settings.max_length or MAX_LENGTH)
        else:
            model, tokenizer = _pretrained(place, plan)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise loading_error(plan.choice.name, error) from error
    return model, tokenizer, _facts(plan, settings, model)


def _pretrained(place: str, plan: Plan) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if Path(place).is_dir():
        logging.disable_progress_bar()  # a bar is for downloads
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(
        place,
        dtype=_dtype(plan),
        device_map={"": _device(plan.device)},
        quantization_config=_quantization_config(plan),
        use_safetensors=True,
        trust_remote_code=False,
    )
    if plan.quantization == "4bit":
        keep_trainable(model)  # one load serves generation and DPO
    return model.eval(), tokenizer


def _random(plan: Plan, settings: LoadSettings) -> tuple[Any, Any]:
    from cai_experiment.engines.random_weights import random_model, tokenizer_for

    preset = plan.choice.preset
    assert preset is not None
    if plan.quantization == "8bit":
        raise BadInputError("--random-weights in 8bit is not made", "use --quantization 4bit, bf16 or fp32")
    tokenizer = tokenizer_for(preset, settings.tokenizer)
    config = _quantization_config(plan)
    return random_model(preset, _dtype(plan), _device(plan.device), settings.seed, config), tokenizer


def _device(kind: str) -> str:
    import torch

    if kind == "cuda" and not torch.cuda.is_available():
        raise EngineError("this machine has a GPU, but this torch cannot use it", "bash setup_runpod.sh")
    return "cuda:0" if kind == "cuda" else kind


def _dtype(plan: Plan) -> Any:
    """bfloat16 for compute, but float32 in fp32 and on a CPU, where bfloat16 is four to five times slower."""
    import torch

    return (
        torch.float32
        if plan.quantization == "fp32" or (plan.device == "cpu" and plan.quantization != "bf16")
        else (torch.bfloat16)
    )


def _quantization_config(plan: Plan) -> Any:
    """QLoRA's NF4 with double quantisation (arXiv 2305.14314), LLM.int8, or None."""
    if plan.quantization not in ("4bit", "8bit"):
        return None
    from transformers import BitsAndBytesConfig

    if plan.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_dtype(plan),
    )


def _facts(plan: Plan, settings: LoadSettings, model: Any) -> dict[str, object]:
    """What the manifest records of the weights: a hub revision, a hash of local files, or the seed of random ones."""
    facts: dict[str, object] = {"model": plan.choice.name, "quantization": plan.quantization}
    if settings.random_weights is not None:
        return {**facts, "random_seed": settings.seed}
    if Path(plan.choice.path_or_id).is_dir():
        return {**facts, "weights_sha256": weights_hash(Path(plan.choice.path_or_id))}
    loaded = getattr(model.config, "_name_or_path", "") or plan.choice.path_or_id  # Unsloth may take a sibling
    return {**facts, "weights_from": loaded, "revision": getattr(model.config, "_commit_hash", None)}


# ---------------------------------------------------------------- layout


def make_renderer(model: Any, tokenizer: Any, choice: ModelChoice, settings: LoadSettings) -> Renderer:
    """The renderer for a loaded model: its layout, its context (at most `settings.max_length`) and its ends."""
    from cai_experiment.engines.render import Renderer, is_tuned_to_chat

    ends = getattr(model.generation_config, "eos_token_id", None)
    eos = [ends] if isinstance(ends, int) else list(ends or ())
    layout = settings.layout
    if layout == "auto":
        layout = choice.kind or ("chat" if is_tuned_to_chat(tokenizer, eos) else "base")
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None) or MAX_LENGTH
    return Renderer(tokenizer, layout, min(own, settings.max_length or MAX_LENGTH), eos)
