"""How many tokens a pass of fast DPO takes, and in how many layers activations are computed again, by the memory at hand.

Recomputing costs a second forward pass (6 instead of 4 FLOPs a parameter and token), so it is asked for only where a pass
of LEAST_TOKENS, or the longest pair, does not fit without; then in as few layers as make it fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

CPU_SHARE, GPU_SHARE = 0.25, 0.9  # of the free memory
CPU_TOKENS = 4096  # more in one pass does not make a CPU faster
GPU_TOKENS = 8192  # nor a GPU, with weights that are read once a pass
LEAST_TOKENS = 2048  # on a GPU: smaller passes pay for unpacking 4-bit weights again and again


@dataclass(frozen=True, slots=True)
class Budget:
    """Tokens of a pass (a longer pair goes alone), and layers, the first ones, that are computed again in backward."""

    tokens: int
    recomputed_layers: int


def token_bytes(config: Any, item: int) -> int:
    """Bytes that one layer keeps for the backward pass for each token, without recomputation; `item` bytes a number.

    Inputs of the projections (attention, output, feed-forward: 3 H), queries, keys, values and attention's output, the
    gate, its activation, the other half and their product (4 I), and two float32 copies in the norms where numbers are
    shorter.
    """
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv = (getattr(config, "num_key_value_heads", None) or heads) * size
    kept = 3 * config.hidden_size + 2 * heads * size + 2 * kv + 4 * config.intermediate_size
    norms = 0 if item == 4 else 2 * 4 * config.hidden_size
    return item * kept + norms


def budget_for(model: Any, longest: int, asked: int | None = None, free: int | None = None) -> Budget:
    """The budget for `model` and a longest pair of `longest` tokens; `asked` fixes the tokens, `free` the bytes."""
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    item = 4 if model.dtype == torch.float32 else 2
    each = token_bytes(config, item)
    layers = config.num_hidden_layers
    if free is None:
        free = _free_bytes(device)
    most = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    whole = int(free // (each * layers))  # tokens that fit without recomputation
    least = max(longest, asked or (LEAST_TOKENS if device.type == "cuda" else 0))
    if whole >= least:
        return Budget(asked or min(most, whole), 0)
    tokens = max(longest, asked or most)
    each_again = item * config.hidden_size  # a recomputed layer keeps its input; one at a time is there whole
    kept_layers = int((free - tokens * (each + layers * each_again)) // (tokens * (each - each_again)))
    return Budget(tokens, layers - min(max(0, kept_layers), layers))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(GPU_SHARE * (free + held))
    from cai_experiment.models.hardware import detect

    return int(CPU_SHARE * detect().ram_gb * 1e9)


def recompute(model: Any, layers: int) -> None:
    """Switch recomputation on in the first `layers` layers of a transformers model, off in the rest."""
    if layers == 0:
        model.gradient_checkpointing_disable()
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    for module in [module for module in found if not hasattr(module, "layers")][layers:]:
        module.gradient_checkpointing = False
