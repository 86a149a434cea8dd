"""A trained LoRA adapter as numbers: read, refused where it is more than plain LoRA, scaled as PEFT itself scales it.

A LoRA layer adds `scaling * B @ A` to a frozen weight (arXiv 2106.09685). What else PEFT can put into an adapter
(DoRA's magnitudes, whole modules saved, embeddings, a changed base as in PiSSA) has no place in that sum, so an adapter
with any setting that this file does not know is refused by the setting's name, not merged almost rightly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.errors import BadInputError
from cai_experiment.records.files import read_json, show
from cai_experiment.training import checkpoints

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = checkpoints.ADAPTER_FILES
# Settings that the sum respects, or that say nothing about the weights; all others must have PEFT's default.
UNDERSTOOD = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "megatron_core", "runtime_config",
    "qalora_group_size",
}  # fmt: skip
STARTS = (True, False, "gaussian", "orthogonal", "eva")  # of A and B; other ones (PiSSA, OLoRA ...) change the base
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choices for --max-lora-rank (vllm/config/lora.py)


@dataclass(frozen=True, slots=True)
class Factors:
    """One layer's change: `scaling * b @ a`, a of shape (rank, in), b of shape (out, rank)."""

    a: Tensor
    b: Tensor
    scaling: float

    def delta(self) -> Tensor:
        """The change of the weight, in float32, in PEFT's order of operations."""
        return (self.b.float() @ self.a.float()) * self.scaling


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter whose files verified. `layers` is keyed by the module's name: "model.layers.0.self_attn.q_proj"."""

    folder: Path
    config: Any  # peft.LoraConfig
    layers: Mapping[str, Factors]
    sha256: str  # of adapter_model.safetensors

    @property
    def rank(self) -> int:
        """The largest rank of any layer."""
        return max(layer.a.shape[0] for layer in self.layers.values())


def read_adapter(folder: Path, model_config: Any) -> Adapter:
    """The adapter in a final/ or checkpoint-N/ folder, for a base of this transformers config.

    Raises BadInputError: no such folder, a damaged file, a setting or a tensor that plain LoRA does not have, a layer
    that the base does not have.
    """
    from safetensors.torch import load_file

    if not folder.is_dir():
        raise BadInputError(f"{show(folder)}: no adapter there", "train first: train_dpo.py; or name a --checkpoint")
    try:
        checkpoints.verify(folder, checkpoints.ADAPTER_FILES)
    except checkpoints.Damaged as reason:
        raise BadInputError(f"{show(folder)} is damaged: {reason}", "name another one with --checkpoint") from reason
    config = read_config(folder)
    pairs = _pairs(load_file(folder / WEIGHTS), folder)
    scalings = scalings_of(config, model_config, folder)
    for name in pairs:
        if name not in scalings:
            raise BadInputError(f"{show(folder)}: it changes {name}, which this base does not have", "check --model")
    layers = {name: Factors(a, b, scalings[name]) for name, (a, b) in sorted(pairs.items())}
    listed = json.loads((folder / checkpoints.MANIFEST).read_text(encoding="utf-8"))["files"]
    return Adapter(folder, config, layers, str(listed[WEIGHTS]["sha256"]))


def read_config(folder: Path) -> Any:
    """adapter_config.json as PEFT's LoraConfig. BadInputError names any setting beyond plain LoRA."""
    from peft import LoraConfig, PeftConfig

    kind = read_json(folder / CONFIG).get("peft_type")
    if kind != "LORA":
        raise BadInputError(f"{show(folder / CONFIG)}: peft_type {kind!r} is not LORA", "only LoRA can be exported")
    config, plain = PeftConfig.from_pretrained(str(folder)), LoraConfig()
    for field in fields(LoraConfig):
        value = getattr(config, field.name)
        if field.name not in UNDERSTOOD and value != getattr(plain, field.name):
            raise _not_plain(folder, f"{field.name}={value!r}")
    if config.init_lora_weights not in STARTS:
        raise _not_plain(folder, f"init_lora_weights={config.init_lora_weights!r} (it changes the base's weights)")
    return config


def _not_plain(folder: Path, what: str) -> BadInputError:
    return BadInputError(f"{show(folder)}: {what} cannot be exported", "train plain LoRA, as train_dpo.py does")


def _pairs(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by module; BadInputError for a tensor of any other kind."""
    for name in tensors:
        if not name.startswith(PREFIX) or not name.endswith((A, B)):
            raise _not_plain(folder, f"the tensor {name}")
    modules = {name.removeprefix(PREFIX).removesuffix(A).removesuffix(B) for name in tensors}
    try:
        return {name: (tensors[PREFIX + name + A], tensors[PREFIX + name + B]) for name in modules}
    except KeyError as missing:
        raise BadInputError(f"{show(folder)}: the tensor {missing} is missing", "name another --checkpoint") from None


def scalings_of(config: Any, model_config: Any, folder: Path) -> dict[str, float]:
    """PEFT's own scaling of every adapted layer: it is built around a model without memory and asked.

    So rank-stabilised scaling (alpha / sqrt(r)) and patterns of ranks and alphas are PEFT's, not a copy of its rules.
    BadInputError for an adapted layer that is no linear one, and for the head of a model with tied embeddings.
    """
    import torch
    from peft import inject_adapter_in_model
    from peft.tuners.lora import Linear, LoraLayer
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(model_config)
    inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if not isinstance(module, Linear) or not isinstance(module.get_base_layer(), torch.nn.Linear):
            raise _not_plain(folder, f"LoRA on {name}, a {type(module.get_base_layer()).__name__},")
        if module is model.get_output_embeddings() and model.config.tie_word_embeddings:
            raise _not_plain(folder, f"LoRA on {name}, whose weight is also the embedding's,")
        found[name] = float(module.scaling["default"])
    return found


# ---------------------------------------------------------------- for vLLM


def uniform(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, config) of the same adapter with one rank and one scaling for all layers, as vLLM reads it.

    vLLM takes r and lora_alpha from the config and knows no patterns: layers of a lower rank are filled up with zeros,
    and a layer's own scaling goes into its B. An adapter without patterns keeps its tensors bit for bit.
    """
    rank, config = adapter.rank, adapter.config
    shared = config.lora_alpha / (rank**0.5 if config.use_rslora else rank)
    tensors: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        a, b = _filled(layer.a, rank, 0), _filled(layer.b, rank, 1)
        tensors[PREFIX + name + A] = a
        tensors[PREFIX + name + B] = b if layer.scaling == shared else b * (layer.scaling / shared)
    kept = {key: value for key, value in config.to_dict().items() if value is not None and key != "runtime_config"}
    kept |= {
        "r": rank, "rank_pattern": {}, "alpha_pattern": {}, "inference_mode": True, "auto_mapping": None,
        "target_modules": sorted({name.rpartition(".")[2] for name in adapter.layers}),
    }  # fmt: skip
    return tensors, {key: value for key, value in kept.items() if value is not None}


def _filled(factor: Tensor, rank: int, dim: int) -> Tensor:
    """`factor` with zeros up to `rank` along `dim`."""
    import torch

    missing = rank - factor.shape[dim]
    if not missing:
        return factor.contiguous()
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, torch.zeros(shape, dtype=factor.dtype)], dim)


def vllm_command(base: str, name: str, folder: str, rank: int) -> str:
    """The command that serves the adapter in `folder` beside its base. BadInputError for a rank that vLLM does not."""
    import shlex

    fitting = [size for size in VLLM_RANKS if size >= rank]
    if not fitting:
        raise BadInputError(f"vLLM serves no LoRA of rank {rank}, {VLLM_RANKS[-1]} at most", "export it --to merged")
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(fitting[0]),
             "--lora-modules", f"{name}={folder}"]  # fmt: skip
    return shlex.join(words)
