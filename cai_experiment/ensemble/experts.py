"""The experts: frozen causal language models, each with its tokenizer; which ones by default, and why."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.engines.load import NAMES, LoadSettings, Plan, load_model, make_plan
from cai_experiment.engines.weights import weight_files
from cai_experiment.ensemble.adapters import Adapter, adapter_of, put_on
from cai_experiment.errors import BadInputError, EngineError, UserError
from cai_experiment.models.choice import numbers_of, resolve_model
from cai_experiment.models.downloads import cache_folder
from cai_experiment.models.hardware import Hardware, detect
from cai_experiment.models.memory import Architecture, weights_gb
from cai_experiment.models.presets import get_model_preset

if TYPE_CHECKING:
    import torch

MODELS = ("Qwen/Qwen2.5-1.5B", "Arthur-77/QWEN2.5-1.5B-medical-finetuned", "Qwen/Qwen2.5-Math-1.5B")
WEIGHTS = Path(__file__).resolve().parent / "shipped" / "weights"
SHIPPED: dict[str, Path] = {f"nano-{kind}": WEIGHTS / kind for kind in ("general", "medical", "mathematical")}
VARIABLE = "CAI_ENSEMBLE_MODELS"  # names with commas or spaces between, where --models is not given
RANDOM = "random:"  # before a preset's key: its true architecture with random weights
DEVICES = ("cuda", "mps", "cpu")
SHARE = 0.75  # of a GPU's memory that bf16 weights may take; the rest is for keys, values and logits


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """One frozen model: `model` is a transformers causal LM in eval mode, no parameter of it takes a gradient."""

    name: str  # hub id, shipped name, absolute folder or "random:<preset>"
    model: Any
    tokenizer: Any
    hidden_size: int  # of what its output layer reads
    precision: str  # "bf16" | "fp32" | "8bit" | "4bit"
    weights: str  # what identifies them: "sha256:...", "commit:..." or "seed:..."
    source: str  # where they were read: hub id (in 4 bit perhaps a quantised sibling's), folder or "random"
    eos_ids: frozenset[int]  # tokens that end a text: the model's own and its tokenizer's
    context: int  # tokens that it can read

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The states [B, T, H] that the output layer would read for ids [B, T]: the last hidden states, normalised.

        `attention_mask` [B, T] is 1 on tokens and 0 on padding, on either side. No gradient is recorded.
        """
        import torch

        given: dict[str, Any] = {}
        if attention_mask is not None:
            given["attention_mask"] = attention_mask
            if not bool(attention_mask[:, 0].all()):  # transformers counts positions from the padding on
                given["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            states: torch.Tensor = self.model.base_model(input_ids=input_ids, use_cache=False, **given)[0]
        return states

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's logits [..., rows of its output layer] for states [..., H], without a gradient."""
        import torch

        config = self.model.config.get_text_config()
        with torch.no_grad():
            logits: torch.Tensor = self.model.get_output_embeddings()(hidden)
            if cap := getattr(config, "final_logit_softcapping", None):
                logits = torch.tanh(logits / cap) * cap
        return logits


# ---------------------------------------------------------------- which


def default_models(device: str | None = None) -> tuple[tuple[str, ...], str]:
    """(names, why): those of CAI_ENSEMBLE_MODELS; with a GPU MODELS; else the three that ship with the project.

    `device` "cpu" on a machine with a GPU counts as no GPU. No torch.
    """
    if named := os.environ.get(VARIABLE, "").replace(",", " ").split():
        return tuple(named), f"{VARIABLE}={os.environ[VARIABLE]}"
    hardware = detect()
    kind = _kind(device, hardware)
    if kind == "cuda" or (kind == "mps" and hardware.ram_gb >= 16):
        return MODELS, f"{hardware.gpu_name or kind}: three experts of 1.5B parameters, the original's"
    why = "--device cpu" if hardware.kind != "cpu" and kind == "cpu" else "no GPU" if kind == "cpu" else "little memory"
    return tuple(SHIPPED), f"{why}: the three small experts that ship with the project"


def canonical(name: str) -> str:
    """The one name of a model that several name: a preset's hub id, a shipped name, a folder's absolute path."""
    if name in SHIPPED or name.startswith(RANDOM):
        return name
    if Path(name).expanduser().is_dir() and adapter_of(name) is not None:
        return str(Path(name).expanduser().resolve())
    choice = resolve_model(name, detect(), "--models")
    if choice.preset is not None:
        return choice.preset.key if choice.preset.is_local else choice.preset.hub_id
    if (folder := Path(choice.path_or_id)).is_dir():
        return next((key for key, own in SHIPPED.items() if own.resolve() == folder.resolve()), str(folder.resolve()))
    return choice.path_or_id


def default_precision(names: Sequence[str], device: str | None = None) -> str:
    """fp32 on a CPU (bf16 is 4 to 5 times slower there); bf16 on a GPU that holds all of them so, else 4bit."""
    hardware = detect()
    kind = _kind(device, hardware)
    if kind == "cpu":
        return "fp32"
    memory = hardware.vram_gb if kind == "cuda" else 0.0
    if kind == "mps" or not memory:
        return "bf16"
    need = sum(weights_gb(architecture(name), "bf16") for name in names)
    return "bf16" if need <= SHARE * memory else "4bit"


def architecture(name: str) -> Architecture:
    """The numbers of an expert by its name (an adapter's: of its model), of a hub id from config files alone."""
    with _own_words(name):
        return numbers_of(resolve_model(whole_model(name), detect(), "--models"))


def whole_model(name: str) -> str:
    """The preset, folder or hub id of the model that an expert's name means, an adapter's: of the model it is put on.

    Of a hub id adapter_config.json alone is downloaded.
    """
    adapter = _adapter(name, weights=False)
    return adapter.base if adapter else _plain(name)


def _adapter(name: str, weights: bool = True) -> Adapter | None:
    """The adapter that a name means, if it does."""
    if name in SHIPPED or name.startswith(RANDOM):
        return None
    with suppress(BadInputError):
        get_model_preset(name)
        return None
    return adapter_of(name, weights)


def _plain(name: str) -> str:
    """What `resolve_model` understands: a shipped expert's folder, the preset of random weights."""
    return str(SHIPPED[name]) if name in SHIPPED else name.removeprefix(RANDOM)


def _kind(device: str | None, hardware: Hardware) -> str:
    if device in (None, "", "auto"):
        return hardware.kind
    if device not in DEVICES:
        raise BadInputError(f"--device {device} is unknown", f"use one of {', '.join(DEVICES)}")
    return str(device)


# ---------------------------------------------------------------- loading


def load_experts(
    names: Sequence[str], *, precision: str | None = None, device: str | None = None, tokenizer: str | None = None
) -> list[Expert]:
    """Load every model of `names`, in order, through the same code as the engines; each is frozen.

    A name is a hub id, a preset, a folder, a shipped name or "random:<preset>" (the true architecture, weights drawn by
    the place in the list). `precision` None: `default_precision`; `device` None or "auto": the best there is.
    `tokenizer`: the folder of one for random weights. A name given twice is loaded twice.
    Raises BadInputError, EngineError, DiskError, one line each.
    """
    if not names:
        raise BadInputError("--models names no model", f"for example --models {' '.join(SHIPPED)}")
    if precision is not None and precision not in NAMES:
        raise BadInputError(f"--precision {precision} is unknown", f"use one of {', '.join(NAMES)}")
    hardware = detect()
    kind = _kind(device, hardware)
    chosen = precision or default_precision(names, device)
    return [_load(name, seed, chosen, kind, tokenizer, hardware) for seed, name in enumerate(names)]


def _load(name: str, seed: int, precision: str, device: str, tokenizer: str | None, hardware: Hardware) -> Expert:
    with _own_words(name):
        adapter = _adapter(name)
        settings = LoadSettings(
            model=adapter.base if adapter else _plain(name),
            quantization=precision, engine="hf", device=device, trains_after=False, said="--models",
        )  # fmt: skip
        if name.startswith(RANDOM):
            key = get_model_preset(_plain(name)).key
            settings = replace(settings, model=None, random_weights=key, seed=seed, tokenizer=tokenizer)
        plan = make_plan(settings, hardware)
        if precision == "8bit":  # bitsandbytes says at every call of a layer that it casts to float16
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        model, words, facts = load_model(plan, settings)
        weights, source = _identity(plan, facts)
        if adapter is not None:
            model = put_on(model, adapter, precision, name)
            weights, source = f"{weights}+{adapter.weights}", f"{source}+{name}"
        return _expert(canonical(name), precision, model, words, weights, source)


def _expert(name: str, precision: str, model: Any, tokenizer: Any, weights: str, source: str) -> Expert:
    """Freeze the model and gather what is to be known of it; EngineError if its output layer cannot be read."""
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    if head is None:
        raise EngineError(f"{name} has no output layer that can be read", "name another of --models")
    ends = getattr(model.generation_config, "eos_token_id", None)
    own = [ends] if isinstance(ends, int) else list(ends or ())
    eos = frozenset(own) | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    expert = Expert(name, model, tokenizer, int(head.weight.shape[1]), precision, weights, source, eos, context)
    _check_output(expert)
    return expert


def _check_output(expert: Expert) -> None:
    """Some architectures do more after their output layer than `Expert.logits` knows: told by two tokens."""
    import torch

    ids = torch.tensor([[0, 1]], device=expert.model.get_output_embeddings().weight.device)
    with torch.no_grad():
        theirs = expert.model(input_ids=ids, use_cache=False).logits
    ours = expert.logits(expert.hidden(ids))
    if not torch.allclose(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2, equal_nan=True):
        kind = expert.model.config.model_type
        raise EngineError(
            f"{expert.name}: the ensemble cannot read the logits of {kind!r} models", "name another model"
        )


def _identity(plan: Plan, facts: dict[str, object]) -> tuple[str, str]:
    """(what identifies the weights, where they were read)."""
    if "random_seed" in facts:
        return f"seed:{facts['random_seed']}", "random"
    if "weights_sha256" in facts:
        return f"sha256:{facts['weights_sha256']}", plan.choice.path_or_id
    source, commit = str(facts["weights_from"]), str(facts["revision"] or "")
    # the cache links to blobs that the hub names by their SHA-256: two commits of the same weights are one
    blobs = [file.resolve().name for file in weight_files(cache_folder(source) / "snapshots" / commit)]
    if blobs and all(len(blob) == 64 for blob in blobs):
        return "sha256:" + ",".join(blobs), source
    return f"commit:{commit}", source


@contextmanager
def _own_words(name: str) -> Iterator[None]:
    """Errors from within name the model as it was named here, and the flags of the ensemble's scripts."""
    try:
        yield
    except UserError as error:
        line = str(error).replace("--quantization", "--precision").replace("--model ", "--models ")
        error.args = (line if name in line else f"--models {name}: {line}", *error.args[1:])
        raise
