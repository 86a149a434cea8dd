"""Attention in a packed pass, behind transformers' attention interface: every pair's two rows share their trunk.

On a CPU pairs of similar length are spread out to (pairs, longest),
attend under a mask for each, and the result is gathered again. On CUDA FlexAttention reads the packed pass as it lies,
under one block mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from cai_experiment.training.fast.packing import TRUNK, Group, Packed

NAME, FLEX = "cai_pair_tree", "cai_flex_tree"
EXPLICIT_LENGTH = 256  # tokens of a row up to which keeping all weights of attention costs little memory
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


class _Explicit(torch.autograd.Function):
    """Attention by explicit products over (n, heads, L, size), float32: on a CPU faster than SDPA for short rows.

    `unseen` (n, 1, L, L) is true where a query must not look; grouped heads share keys and values (arXiv 2305.13245).
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, unseen: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        pairs, heads, longest, size = query.shape
        groups = key.shape[1]
        q = (query * scaling).reshape(pairs * groups, -1, size)
        k, v = (x.reshape(pairs * groups, longest, size) for x in (key, value))
        scores = torch.bmm(q, k.transpose(1, 2)).view(pairs, heads, longest, longest)
        weights = scores.masked_fill_(unseen, float("-inf")).softmax(-1).view(pairs * groups, -1, longest)
        out = torch.bmm(weights, v)
        ctx.save_for_backward(q, k, v, weights, out)
        ctx.scaling, ctx.shapes = scaling, (query.shape, key.shape)
        return out.view(query.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, weights, out = ctx.saved_tensors
        of_query, of_key = ctx.shapes
        d_out = gradients[0].reshape(out.shape)
        d_value = torch.bmm(weights.transpose(1, 2), d_out)
        d_scores = torch.bmm(d_out, v.transpose(1, 2)).sub_((d_out * out).sum(-1, keepdim=True)).mul_(weights)
        d_query = torch.bmm(d_scores, k).mul_(ctx.scaling)
        d_key = torch.bmm(d_scores.transpose(1, 2), q)
        return d_query.view(of_query), d_key.view(of_key), d_value.view(of_key), None, None


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, packed: Packed | None = None, sliding_window: int | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' attention function for (1, heads, T, size); the pass comes through the model's keywords."""
    assert packed is not None
    of_groups = []
    for group in packed.groups:
        q, k, v = (_spread(x[:, :, group.start : group.stop], group) for x in (query, key, value))
        mask = group.mask if sliding_window is None else group.mask & _near(packed, group, sliding_window)
        out = _of_rows(q, k, v, mask, scaling or q.shape[-1] ** -0.5).transpose(1, 2)
        of_groups.append(_Collect.apply(out.reshape(-1, q.shape[1] * q.shape[3]), group.place))
    return torch.cat(of_groups).view(1, -1, query.shape[1], query.shape[3]), None


def _spread(x: torch.Tensor, group: Group) -> torch.Tensor:
    """(1, heads, tokens of the group, size) to (pairs, heads, longest, size)."""
    rows = _Spread.apply(x[0].transpose(0, 1).flatten(1), group.spread.flatten(), group.place)
    return rows.view(*group.spread.shape, x.shape[1], x.shape[3]).transpose(1, 2)


def _of_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scaling: float) -> torch.Tensor:
    if q.dtype == torch.float32 and q.device.type == "cpu" and q.shape[2] <= EXPLICIT_LENGTH:
        return _Explicit.apply(q, k, v, ~mask, scaling)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])


def _near(packed: Packed, group: Group, window: int) -> torch.Tensor:
    """(pairs, 1, longest, longest): true where a key is less than `window` positions before the query."""
    positions = packed.positions[group.start + group.spread]
    return ((positions[:, :, None] - positions[:, None, :]) < window)[:, None]


def _flex(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """FlexAttention under a BlockMask, grouped heads as they are.

    transformers' own function repeats keys and values where the number of query heads is no power of two, as for
    Qwen2.5-32B's 40 over 8: five times as much to keep. Only FlexAttention's decoding kernel, for few queries, asks for
    that.
    """
    from transformers.integrations.flex_attention import compile_friendly_flex_attention

    out = compile_friendly_flex_attention(
        query, key, value, block_mask=attention_mask, enable_gqa=query.shape[1] != key.shape[1], scale=scaling,
        training=module.training,
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)  # nothing else was asked for
    return out.transpose(1, 2).contiguous(), None


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
    if window is not None and not kinds:  # every layer has it: Mistral, Phi-3
        return block_mask(packed, window)
    if window is None or "sliding_attention" not in kinds:
        return block_mask(packed)
    return {"full_attention": block_mask(packed), "sliding_attention": block_mask(packed, window)}


@contextmanager
def by_name(model: Any, name: str) -> Iterator[None]:
    """Within it, `model` (a transformers causal LM) computes attention by `name`: NAME or FLEX."""
    config = model.config
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


def register() -> None:
    """Make NAME and FLEX known to transformers, once."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    AttentionInterface.register(FLEX, _flex)
