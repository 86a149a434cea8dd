"""The last layer works for the tokens from which something is predicted; of others only keys and values are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _OfSome(torch.autograd.Function):
    """(1, T, F) to (1, S, F): the tokens `some`, each once."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, some: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(some)
        ctx.tokens = x.shape[1]
        return x.index_select(1, some)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _put(gradients[0], ctx.saved_tensors[0], ctx.tokens), None


class _BackToAll(torch.autograd.Function):
    """(1, S, F) to (1, T, F): `quiet`, without a gradient, at the tokens `silent`, zeros elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, some: torch.Tensor, tokens: int, quiet: torch.Tensor, silent: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(some)
        return _put(x, some, tokens).index_copy_(1, silent, quiet)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradients[0].index_select(1, ctx.saved_tensors[0]), None, None, None, None


def _put(x: torch.Tensor, some: torch.Tensor, tokens: int) -> torch.Tensor:
    return x.new_zeros(x.shape[0], tokens, x.shape[2]).index_copy_(1, some, x)


@contextmanager
def only_sources(backbone: Any, sources: torch.Tensor, silent: torch.Tensor | None = None) -> Iterator[None]:
    """Within it the last layer's queries, attention output and feed-forward are computed for `sources` (M,) alone.

    Those among `silent` are wanted for their values only: no gradient goes through their work here. Layers that name
    these modules otherwise compute every token, and so does a layer that is recomputed in the backward pass, which
    happens outside.
    """
    layers = getattr(backbone, "layers", None)
    last = layers[-1] if layers else None
    attention = getattr(last, "self_attn", None)
    found = (getattr(last, "mlp", None), getattr(attention, "q_proj", None), getattr(attention, "o_proj", None))
    modules: list[Any] = [module for module in found if module is not None]
    if getattr(last, "gradient_checkpointing", False) and torch.is_grad_enabled():
        modules = []
    some = sources.unique()
    silent = some[:0] if silent is None else silent
    some = some[~torch.isin(some, silent)]
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = _limited(module.forward, some, silent)
    try:
        yield
    finally:
        for module, patched in zip(modules, before, strict=True):
            if patched is None:
                del module.forward
            else:
                module.forward = patched


def _limited(whole: Any, some: torch.Tensor, silent: torch.Tensor) -> Any:
    def limited(x: torch.Tensor) -> torch.Tensor:
        spoken = whole(_OfSome.apply(x, some))
        with torch.no_grad():
            quiet = whole(x.index_select(1, silent)) if len(silent) else spoken[:, :0]
        return _BackToAll.apply(spoken, some, x.shape[1], quiet, silent)

    return limited
