"""LoRA layers as fast DPO computes them: the same result as PEFT's with fewer products and fewer passes over memory.

PEFT computes W x + s B A x product by product; in mixed precision it casts x up and autocast casts it down again, once
for every adapted layer. Two ways here:

- **merged**, where the weights are float32 (a CPU): W + s B A, once an optimizer step. It rounds at 1e-7 of W and costs
  rank products for each weight instead of for each token. A layer is then one product forward; backward needs
  A x and B' dy beside W' dy. Not for bfloat16 or 4-bit weights, where an update of 5e-6 vanishes in the rounding of W.
- **beside**, everywhere else: the adapter's own products, in the dtype of x, written into the base layer's output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cai_experiment.training.trainer import ADAPTER

MOST_BYTES = 2 * 2**30  # of merged copies; the layers of a larger model are computed beside their base


class _MergedLinear(torch.autograd.Function):
    """x (T, in) by `merged` = W + s B A (out, in); gradients for x, A (rank, in) and B (out, rank), not for W."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, merged: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(x, merged, a, b)
        ctx.scaling = scaling
        return torch.nn.functional.linear(x, merged, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, merged, a, b = ctx.saved_tensors
        dy = gradients[0]
        grad_b = ((x @ a.T).T @ dy).mul_(ctx.scaling).T
        grad_a = ((dy @ b).T @ x).mul_(ctx.scaling)
        return (dy @ merged if ctx.needs_input_grad[0] else None), None, None, grad_a, grad_b, None


class _Beside(torch.autograd.Function):
    """base (T, out) + s B A x; gradients for base, x, A, B. Products in the dtype of x, gradients of A, B in theirs."""

    @staticmethod
    def forward(
        ctx: Any, base: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        down = x @ a.to(x.dtype).T
        ctx.save_for_backward(x, a, b, down)
        ctx.scaling = scaling
        return torch.addmm(base, down, b.to(x.dtype).T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, down = ctx.saved_tensors
        dy = gradients[0]
        d_down = (dy @ b.to(dy.dtype)).mul_(ctx.scaling)
        grad_b = (down.T @ dy).to(b.dtype).mul_(ctx.scaling).T
        grad_a = (d_down.T @ x).to(a.dtype)
        return dy, (d_down @ a.to(dy.dtype) if ctx.needs_input_grad[1] else None), grad_a, grad_b, None


class _Layer:
    """The forward of one PEFT LoRA layer with one plain adapter."""

    def __init__(self, layer: Any, merge: bool) -> None:
        self.layer, self.merge = layer, merge
        self.base, self.scaling = layer.base_layer, layer.scaling[ADAPTER]
        self.a, self.b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        self.merged: torch.Tensor | None = None
        self.version = (-1, -1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self.layer.disable_adapters:
            out = self.base(flat)
        elif self.merge:
            out = _MergedLinear.apply(flat, self._merged(), self.base.bias, self.a, self.b, self.scaling)
        else:
            base = self.base(flat)
            out = _Beside.apply(base, flat.to(base.dtype), self.a, self.b, self.scaling)
        return out.view(*x.shape[:-1], -1)

    def _merged(self) -> torch.Tensor:
        """W + s B A, anew after the optimizer has changed A or B in place."""
        version = (self.a._version, self.b._version)
        if self.merged is None or version != self.version:
            with torch.no_grad():
                self.merged = torch.addmm(self.base.weight, self.b, self.a, alpha=self.scaling)
            self.version = version
        return self.merged


def plain_layers(model: Any) -> list[Any]:
    """The LoRA layers of a PEFT model if each is plain: one active adapter, no dropout, no bias, no variant."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    plain = all(
        list(layer.active_adapters) == [ADAPTER] and ADAPTER not in layer.lora_variant and not layer.lora_bias[ADAPTER]
        and isinstance(layer.lora_dropout[ADAPTER], torch.nn.Identity) and not getattr(layer, "fan_in_fan_out", False)
        for layer in layers
    )  # fmt: skip
    return layers if plain else []


def _can_merge(layers: list[Any]) -> bool:
    bases = [layer.base_layer for layer in layers]
    same = all(type(base) is torch.nn.Linear and base.weight.dtype == torch.float32 for base in bases)
    size = sum(base.weight.numel() * 4 for base in bases)
    return same and size <= MOST_BYTES and bases[0].weight.device.type == "cpu"


@contextmanager
def own_layers(layers: list[Any]) -> Iterator[None]:
    """Within it a model's `plain_layers` compute as described above; merged weights are made anew each time."""
    merge = bool(layers) and _can_merge(layers)
    for layer in layers:
        layer.forward = _Layer(layer, merge)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
