"""Attention in a packed pass, behind transformers' attention interface: every pair's two rows share their trunk.

On a CPU (and wherever FlexAttention is not to be had) tokens are spread out to (pairs, longest), torch's SDPA runs under
a mask for each pair, and the result is gathered again. On CUDA FlexAttention reads the packed pass as it lies, under one
block mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from cai_experiment.training.packing import TRUNK, Packed

NAME = "cai_pair_tree"
FLEX_BLOCK = 128  # packed passes are filled up to a multiple of it


class _Spread(torch.autograd.Function):
    """(T, F) to (n * L, F). `index` reaches every token once, and token 0 for filling, which nothing attends to."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """(n * L, F) back to (T, F)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        ctx.rows = len(x)
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        whole = gradients[0].new_zeros(ctx.rows, gradients[0].shape[1])
        return whole.index_copy_(0, place, gradients[0]), None


def _spread_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, packed: Packed | None = None, sliding_window: int | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' attention function for (1, heads, T, size); the pass comes through the model's keywords."""
    assert packed is not None
    pairs, longest = packed.spread.shape
    flat = packed.spread.flatten()

    def spread(x: torch.Tensor) -> torch.Tensor:
        rows = _Spread.apply(x[0].transpose(0, 1).flatten(1), flat, packed.place)
        return rows.view(pairs, longest, x.shape[1], x.shape[3]).transpose(1, 2)

    mask = packed.mask
    if sliding_window is not None:
        positions = packed.positions[packed.spread]
        mask = mask & ((positions[:, :, None] - positions[:, None, :]) < sliding_window)[:, None]
    grouped = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(
        spread(query), spread(key), spread(value), attn_mask=mask, scale=scaling, enable_gqa=grouped
    )
    rows = _Collect.apply(out.transpose(1, 2).reshape(pairs * longest, -1), packed.place)
    return rows.view(1, -1, query.shape[1], query.shape[3]), None


def block_mask(packed: Packed, sliding_window: int | None = None) -> Any:
    """FlexAttention's mask of a pass: within a pair, causal, and a branch sees the trunk and itself."""
    from torch.nn.attention.flex_attention import create_block_mask

    pair, branch, positions = packed.pair, packed.branch, packed.positions

    def attends(batch: Any, head: Any, query: Any, key: Any) -> Any:
        same = (pair[query] == pair[key]) & ((branch[key] == TRUNK) | (branch[key] == branch[query]))
        seen = same & (query >= key)
        return seen if sliding_window is None else seen & (positions[query] - positions[key] < sliding_window)

    tokens = len(packed.input_ids)
    return create_block_mask(attends, None, None, tokens, tokens, device=str(packed.pair.device))


def block_masks(packed: Packed, config: Any) -> Any:
    """The mask of a pass, or one for each kind of layer where a model mixes windows, as transformers takes them."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if window is None or "sliding_attention" not in kinds:
        return block_mask(packed)
    return {"full_attention": block_mask(packed), "sliding_attention": block_mask(packed, window)}


@contextmanager
def by_name(model: Any, name: str) -> Iterator[None]:
    """Within it, `model` (a transformers causal LM) computes attention by `name`: NAME or "flex_attention"."""
    config = model.config
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


def register() -> None:
    """Make NAME known to transformers, once."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _spread_attention)
