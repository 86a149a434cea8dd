"""How many tokens a pass of fast DPO takes, and in how many layers activations are computed again.

The formula and the decision stand in `models.training_memory`, where `--plan` takes them from too: what is planned is
what is done. Here the model that was loaded, and the memory that is free, are read.
"""

from __future__ import annotations

from typing import Any

import torch

from cai_experiment.models.memory import LORA_RANK, Architecture
from cai_experiment.models.training_memory import (
    CPU_SHARE,
    GPU_SHARE,
    Arithmetic,
    Budget,
    TrainingMemory,
    decide,
)


def memory_of(model: Any) -> TrainingMemory:
    """The formula for a transformers causal LM as it lies there, LoRA adapters and all."""
    numbers = Architecture.of(model.config.get_text_config().to_dict())
    embedding = model.get_input_embeddings().weight
    method = "4bit" if getattr(model, "is_loaded_in_4bit", False) else ""
    method = method or ("8bit" if getattr(model, "is_loaded_in_8bit", False) else "")
    item = embedding.element_size()
    quantization = method or ("fp32" if item == 4 else "bf16")
    ranks = [module.r.get("default", 0) for module in model.modules() if isinstance(getattr(module, "r", None), dict)]
    form = Arithmetic.of("fast", quantization, embedding.device.type, numbers, item)
    return TrainingMemory(numbers, "fast", form, max(ranks, default=LORA_RANK))


def budget_for(model: Any, longest: int, asked: int | None = None, free: int | None = None) -> Budget:
    """The budget for `model` and a longest pair of `longest` tokens; `asked` fixes the tokens, `free` the bytes."""
    device = next(model.parameters()).device
    return decide(memory_of(model), _free_bytes(device) if free is None else free, longest, device.type, asked)


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return GPU_SHARE * (free + held)
    from cai_experiment.models.hardware import detect

    return CPU_SHARE * detect().ram_gb * 2**30


def recompute(model: Any, layers: int) -> None:
    """Switch recomputation on in the first `layers` layers of a transformers model, off in the rest."""
    if layers == 0:
        model.gradient_checkpointing_disable()
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    for module in [module for module in found if not hasattr(module, "layers")][layers:]:
        module.gradient_checkpointing = False
