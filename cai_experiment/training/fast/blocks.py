"""RMSNorm and the gated feed-forward as fast DPO computes them: transformers' results, fewer tensors kept for backward.

transformers' RMSNorm keeps two float32 copies of its input where numbers are shorter, its feed-forward the activated
gate beside the gate. Both are cheap to have again: what is kept is the input and one number a token, and the gate and
the other half. For Qwen2.5-32B that is 96 of 317 KB a token and layer; on a GPU it decides how many layers are computed
twice. Only modules known to compute what stands here are replaced; `start_check.py` holds the sum to the plain model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import silu

NORMS = ("Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm", "MistralRMSNorm", "Phi3RMSNorm")
FEED_FORWARDS = ("Qwen2MLP", "Qwen3MLP", "LlamaMLP", "MistralMLP")


class _RMSNorm(torch.autograd.Function):
    """w x / rms(x) over the last dimension (arXiv 1910.07467), statistics in float32; no gradient for w."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        scale = square.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        scaled = gradients[0] * weight
        dot = (scaled * x).sum(-1, keepdim=True, dtype=torch.float32)
        along = dot.mul_(scale.square()).div_(-x.shape[-1])
        return torch.addcmul(scaled, x, along.to(x.dtype)).mul_(scale.to(x.dtype)), None, None


class _Gated(torch.autograd.Function):
    """silu(gate) * up; keeps the two, not the activated gate (arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        dy = gradients[0]
        d_up = silu(gate).mul_(dy)
        return torch.ops.aten.silu_backward(dy * up, gate), d_up


def _norm(module: Any) -> Any:
    return lambda x: _RMSNorm.apply(x, module.weight, module.variance_epsilon)


def _feed_forward(module: Any) -> Any:
    return lambda x: module.down_proj(_Gated.apply(module.gate_proj(x), module.up_proj(x)))


def known_blocks(model: Any) -> list[tuple[Any, Any]]:
    """(module, its forward here) of all norms and feed-forwards of a transformers model that are known."""
    found = []
    silus, short = ("silu", "swish"), model.dtype != torch.float32  # a CPU computes the gate again more slowly
    for module in model.modules():
        name = type(module).__name__
        if name in NORMS and not module.weight.requires_grad:
            found.append((module, _norm(module)))
        elif name in FEED_FORWARDS and getattr(module.config, "hidden_act", None) in silus and short:
            found.append((module, _feed_forward(module)))
    return found


@contextmanager
def own_blocks(blocks: list[tuple[Any, Any]]) -> Iterator[None]:
    """Within it a model's `known_blocks` compute as described above."""
    for module, forward in blocks:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in blocks:
            del module.forward
