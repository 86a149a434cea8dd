"""Log-probabilities of answer tokens from hidden states: chunk by chunk, never all logits, no gradient for the head.

d log p(y) / d h = W[y] - sum_v p(v) W[v] does not depend on what the loss makes of log p(y): it is computed while the
chunk's probabilities are at hand and kept, (M, H) instead of (M, V); the backward pass only scales it. That is two
products with the head for a token where a head that recomputes its logits (TRL's) needs three.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_BYTES = 2**26  # of float32 logits at a time
# Four times as much on a GPU: of 152,064 words 441 rows instead of 110. A product of few rows is bound by reading the
# head: 1.6 GB take an A100 0.8 ms, 441 rows' arithmetic 2.2 ms.
CUDA_CHUNK_BYTES = 2**28


class _TargetLogps(torch.autograd.Function):
    """See `target_logps`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
        scale: float, softcap: float | None, chunk: int,
    ) -> torch.Tensor:  # fmt: skip
        wants_gradient = ctx.needs_input_grad[0]
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        slope = torch.empty_like(hidden) if wants_gradient else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logps[rows], found = _chunk(hidden[rows], weight, bias, targets[rows], scale, softcap, wants_gradient)
            if slope is not None and found is not None:
                slope[rows] = found
        if slope is not None:
            ctx.save_for_backward(slope)
        return logps

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * gradients[0].to(slope.dtype)[:, None], *[None] * 6)


def _chunk(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, scale: float,
    softcap: float | None, wants_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(log-probabilities of the targets, d log p / d hidden or None) of some rows."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    columns = targets[:, None]
    found = logits.gather(1, columns)[:, 0]
    capped = 1 - (logits / softcap) ** 2 if softcap is not None and wants_gradient else None
    if not wants_gradient:
        return found - logits.logsumexp(1), None
    top = logits.amax(1, keepdim=True)
    found -= top[:, 0]
    weights = logits.sub_(top).exp_()
    total = weights.sum(1, keepdim=True)
    slope = weights.div_(-total)  # one-hot minus probabilities
    slope.scatter_add_(1, columns, torch.ones_like(columns, dtype=slope.dtype))
    if capped is not None:
        slope *= capped
    return found - total[:, 0].log(), (slope.to(weight.dtype) @ weight).mul_(scale)


def target_logps(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
    scale: float = 1.0, softcap: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """(M,) float32: log-probability of each target. hidden (M, H); weight (V, H), frozen; bias (V,); targets (M,).

    Logits are `scale` times the head's, then softcap * tanh(logits / softcap) where the model caps them. Never more
    than CHUNK_BYTES (CUDA_CHUNK_BYTES) of logits exist at a time, and a gradient as large in the weights' dtype.
    """
    most = CUDA_CHUNK_BYTES if hidden.device.type == "cuda" else CHUNK_BYTES
    chunk = max(1, most // (4 * len(weight)))
    return _TargetLogps.apply(hidden, weight, bias, targets, scale, softcap, chunk)
