"""From a model's name to an engine: which model, which engine, which quantisation, and why."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.engines.at_hand import check_files, in_words_of, quiet_retries
from cai_experiment.engines.at_hand import revision_of as revision_of  # for those who load elsewhere
from cai_experiment.engines.precision import attention_of, device_of, dtype_of, quantization_config
from cai_experiment.engines.weights import compute_in, keep_trainable, loading_error, weights_hash
from cai_experiment.errors import BadInputError, EngineError, UserError
from cai_experiment.models.choice import ModelChoice, is_ensemble, resolve_model
from cai_experiment.models.hardware import Hardware, detect
from cai_experiment.models.plan import of_both
from cai_experiment.models.presets import PRESETS
from cai_experiment.models.serving import auto_engine, disk_refusal, files_for

if TYPE_CHECKING:
    from cai_experiment.engines.base import Engine
    from cai_experiment.engines.render import Renderer

ENGINES = ("auto", "hf", "vllm", "unsloth", "server", "generate")
ELSEWHERE = ("vllm", "server")  # their weights are in another process, so this one cannot train them
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
    trains_after: bool = True  # the load serves DPO as well (milestones 0 and 1, training), not generation alone
    server_url: str | None = None  # with "auto": the server it is
    server_concurrency: int = 64  # requests at a time, at most
    deadline: float = 600.0  # seconds for one request to the server
    memory_share: float | None = None  # of each GPU, for vLLM; None: all that it takes by itself
    said: str = "--model"  # what named the model, for messages: a flag, "--roles dual:", or "" for a call
    # Makes the engine of "ensemble:FOLDER"; scripts hand it in (_ensemble.py). None: an ensemble is refused.
    ensemble: Callable[[Plan, LoadSettings], Engine] | None = None

    def naming(self) -> AbstractContextManager[None]:
        """Errors from within speak of what named the model."""
        return in_words_of(self.said, self.model is not None)


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings after all choices. `engine` is one of ENGINES but "auto", or "ensemble"; `why` explains it."""

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
        precision = f"{NAMES.get(self.quantization, self.quantization)} on {self.device}"
        return f"model {self.choice.name}{kind} | engine {engine} | {precision} | {self.choice.reason}"


def load_engine(settings: LoadSettings) -> Engine:
    """Load a model into an engine; prints nothing on stdout (`engine.first_line` is for the caller to print).

    Raises BadInputError (unknown model, damaged files, settings that do not go together) and EngineError (it cannot be
    loaded or served here).
    """
    with settings.naming():
        return _load_engine(settings)


def _load_engine(settings: LoadSettings) -> Engine:
    hardware = detect()
    plan = make_plan(settings, hardware)
    if plan.engine == "server":
        from cai_experiment.engines import server_load

        return server_load.load(plan.choice, settings)
    engine: Engine
    if settings.ensemble is not None and is_ensemble(plan.choice):
        engine = settings.ensemble(plan, settings)
    elif plan.engine == "vllm":
        from cai_experiment.engines import vllm_load

        check_files(plan, settings)
        vllm = vllm_load.load(plan.choice, plan.quantization, settings, hardware)
        engine, plan = vllm, replace(plan, quantization=str(vllm.facts["quantization"]))
    else:
        return engine_over(plan, settings, *load_model(plan, settings))
    engine.first_line = plan.first_line
    return engine


def engine_over(plan: Plan, settings: LoadSettings, model: Any, tokenizer: Any, facts: dict[str, object]) -> Engine:
    """The plan's engine over loaded weights; with "auto" `generate` where hf's packed passes do not serve the model.

    Raises EngineError for an engine that was asked for by name and cannot serve it.
    """
    renderer = make_renderer(model, tokenizer, plan.choice, settings)
    try:
        engine: Engine = _engine_class(plan.engine)(model, tokenizer, renderer, settings.batch_size, facts)
    except EngineError as error:
        reason = getattr(error, "reason", "")  # of probe.Unservable, whose import would bring torch
        if settings.engine != "auto" or not reason:
            raise
        plan = replace(plan, engine="generate", why="; ".join(filter(None, (f"hf: {reason}", plan.why))))
        engine = _engine_class("generate")(model, tokenizer, renderer, settings.batch_size, facts)
    engine.first_line = plan.first_line
    return engine


def make_plan(settings: LoadSettings, hardware: Hardware) -> Plan:
    """Choose model, engine, quantisation and device; no torch yet. Raises BadInputError, EngineError."""
    with settings.naming():
        return _make_plan(settings, hardware)


def _make_plan(settings: LoadSettings, hardware: Hardware) -> Plan:
    if settings.engine not in ENGINES:
        raise BadInputError(f"--engine {settings.engine} is unknown", f"use one of {', '.join(ENGINES)}")
    device = settings.device or hardware.kind
    quantization = settings.quantization or (hardware.training_quantization if device == hardware.kind else "fp32")
    if quantization not in NAMES:
        raise BadInputError(f"--quantization {quantization} is unknown", f"use one of {', '.join(NAMES)}")
    if device == "mps" and quantization in ("4bit", "8bit"):
        raise BadInputError(f"--quantization {quantization} does not run on Apple silicon", "use bf16 or fp32")
    choice = _choose_model(settings, hardware)
    engine, quantization, why = _choose_engine(settings, choice, hardware, device, quantization)
    return Plan(choice, engine, why, quantization, device)


def _choose_model(settings: LoadSettings, hardware: Hardware) -> ModelChoice:
    if settings.engine == "server" or settings.server_url is not None:
        from cai_experiment.engines.server_load import served_model

        return served_model(settings, hardware)
    if settings.random_weights is None:
        served = settings.ensemble is not None and not settings.trains_after
        return resolve_model(settings.model, hardware, settings.said, served)
    preset = PRESETS.get(settings.random_weights)
    if preset is None:
        raise BadInputError(f"--random-weights {settings.random_weights} is no preset", f"known: {', '.join(PRESETS)}")
    reason = "random weights of the true architecture: a test of the code, its words mean nothing"
    return ModelChoice(f"random:{preset.key}", preset.hub_id, preset, preset.kind, reason)


def _choose_engine(
    settings: LoadSettings, choice: ModelChoice, hardware: Hardware, device: str, quantization: str
) -> tuple[str, str, str]:
    """(engine, quantization, why). Unsloth's loader cannot make random weights; it and vLLM need CUDA."""
    random = settings.random_weights is not None
    if is_ensemble(choice) and settings.engine != "auto":
        raise BadInputError(f"--engine {settings.engine} serves no ensemble, which has an engine of its own",
                            "leave --engine out")  # fmt: skip
    asked = "server" if settings.engine == "auto" and settings.server_url is not None else settings.engine
    if asked == "auto":
        here = hardware if device == hardware.kind else replace(hardware, kind=device, quantization=quantization)
        engine, precision, why = auto_engine(
            choice, here, settings.quantization, settings.trains_after, random, is_installed
        )
        slower = of_both(choice, here) if engine == "unsloth" and not settings.trains_after else ""
        return engine, precision, "; ".join(filter(None, (why, slower)))
    if asked in ELSEWHERE and settings.trains_after:
        raise BadInputError(f"--engine {asked} keeps the weights in another process, and this one is to train them",
                            "use --engine auto")  # fmt: skip
    if asked == "vllm":
        return "vllm", _vllm_quantization(settings, choice, device), "--engine"
    if asked == "unsloth" and not is_installed("unsloth"):
        raise EngineError("--engine unsloth: unsloth is not installed", "bash setup_runpod.sh, or --engine hf")
    if asked == "unsloth" and (device != "cuda" or quantization != "4bit" or random):
        raise BadInputError("--engine unsloth loads real weights in 4 bit on CUDA only", "use --engine hf")
    return asked, quantization, "--engine"


def is_installed(package: str) -> bool:
    """True if a package can be imported here."""
    return find_spec(package) is not None


def _vllm_quantization(settings: LoadSettings, choice: ModelChoice, device: str) -> str:
    """The precision that vLLM serves; raises what keeps it from serving here. Memory it measures itself."""
    if not is_installed("vllm"):
        raise EngineError("--engine vllm: vllm is not installed", "bash setup_runpod.sh, or --engine hf")
    if device != "cuda":
        raise BadInputError(f"--engine vllm needs an NVIDIA GPU, and this is {device}", "use --engine hf")
    if settings.quantization in ("4bit", "8bit"):
        raise BadInputError(
            f"--engine vllm serves no {settings.quantization} weights made while loading",
            "name an AWQ or FP8 checkpoint with --model, leave --quantization out, or use --engine unsloth",
        )
    served = settings.quantization or "bf16"
    refusal = "" if settings.random_weights is not None else disk_refusal(choice, served)
    if refusal:
        raise EngineError(f"--engine vllm: {refusal}", "make room, or use --engine unsloth (4-bit weights)")
    return served


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
    """(model in eval mode, tokenizer, facts for the manifest).

    Raises BadInputError, EngineError and, before a download that the disk does not hold, DiskError, one line each.
    """
    local = check_files(plan, settings)
    with settings.naming():
        model, tokenizer = _weights(plan, settings, local)
    if plan.quantization == "4bit" and plan.engine != "unsloth":
        keep_trainable(model)  # one load serves generation and DPO; and a CPU would repack the weights
    return model, tokenizer, _facts(plan, settings, model)


def _weights(plan: Plan, settings: LoadSettings, local: bool) -> tuple[Any, Any]:
    """(model, tokenizer); `local`: the hub is asked nothing."""
    place = plan.choice.path_or_id
    try:
        if settings.random_weights is not None:
            model, tokenizer = _random(plan, settings)
        elif plan.engine == "unsloth":
            from cai_experiment.engines import unsloth

            files, _ = files_for(plan.choice, plan.engine, plan.quantization)
            revision = revision_of(plan.choice) if files == place else "main"
            model, tokenizer = unsloth.load(files, settings.max_length or MAX_LENGTH, revision)
        else:
            with quiet_retries():
                model, tokenizer = _pretrained(place, plan, settings, local)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise loading_error(plan.choice.name, error) from error
    return model, tokenizer


def _pretrained(place: str, plan: Plan, settings: LoadSettings, local: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if Path(place).is_dir():
        logging.disable_progress_bar()  # a bar is for downloads
    revision = revision_of(plan.choice)
    # the model's own: a sibling's may have other special tokens
    tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, local_files_only=local)
    files, precision = files_for(plan.choice, plan.engine, plan.quantization)
    # of weights quantised beforehand config.json says how, unless anything is passed, were it None
    dtype = _dtype(plan, settings)
    own: dict[str, Any] = {"quantization_config": quantization_config(plan.quantization, dtype)}
    model = AutoModelForCausalLM.from_pretrained(
        files,
        revision=revision if files == place else "main",
        dtype=dtype,
        device_map={"": device_of(plan.device)},
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=local,
        adapter_kwargs={"local_files_only": local},  # else it asks the hub whether the model has an adapter
        **attention_of(place, revision, local),
        **({} if precision == "4bit" else own),
    )
    if precision == "4bit":
        compute_in(model, dtype)
    return model.eval(), tokenizer


def _random(plan: Plan, settings: LoadSettings) -> tuple[Any, Any]:
    from cai_experiment.engines.random_weights import random_model, tokenizer_for

    preset = plan.choice.preset
    assert preset is not None
    if plan.quantization == "8bit":
        raise BadInputError("--random-weights in 8bit is not made", "use --quantization 4bit, bf16 or fp32")
    tokenizer = tokenizer_for(preset, settings.tokenizer)
    dtype = _dtype(plan, settings)
    config = quantization_config(plan.quantization, dtype)
    return random_model(preset, dtype, device_of(plan.device), settings.seed, config), tokenizer


def _dtype(plan: Plan, settings: LoadSettings) -> Any:
    return dtype_of(plan.quantization, plan.device, settings.trains_after)


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
    return renderer_for(model.config, model.generation_config, tokenizer, choice, settings)


def renderer_for(
    config: Any, generation_config: Any, tokenizer: Any, choice: ModelChoice, settings: LoadSettings
) -> Renderer:
    """As `make_renderer`, from the model's configs alone: its weights may be in another process."""
    from cai_experiment.engines.render import Renderer, is_tuned_to_chat

    ends = getattr(generation_config, "eos_token_id", None)
    eos = [ends] if isinstance(ends, int) else list(ends or ())
    layout = settings.layout
    if layout == "auto":
        layout = choice.kind or ("chat" if is_tuned_to_chat(tokenizer, eos) else "base")
    own = getattr(config.get_text_config(), "max_position_embeddings", None) or MAX_LENGTH
    return Renderer(tokenizer, layout, min(own, settings.max_length or MAX_LENGTH), eos)
