"""Attention of packed tokens over the slots' keys and values: a function that transformers models are switched to.

A pass packs the tokens of all rows one behind the other, [1, N], so that linear layers see no padding; only here are
they sorted back into rows. On a CPU a row's attention is explicit batched matrix products and a float32 softmax, with
the query heads that share a key-value head as rows of one product. Such a row has the same bits whatever else is in
the batch, on two conditions, both measured with MKL: products have at least four rows (the kernels for one to three
add in another order), and the values are added up in pieces of PIECE columns (a sum over all columns is split
differently for 256 columns than for 192 or 512). On other devices a prefill uses torch's scaled_dot_product_attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence

import torch
from torch.nn import functional

from cai_experiment.engines.cache import SlotCache

NAME = "cai_rows"  # the name under which transformers knows this attention
MIN_QUERY_ROWS = 4
PIECE = 128


@dataclass(slots=True)
class Own:
    """Where a branch's own keys belong: packed tokens `token` [n] at rows `row` [n] and columns `column` [n]."""

    token: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor


@dataclass(slots=True)
class Group:
    """Tokens that attend together, as R rows of T tokens.

    `take` [R * T] says which packed token stands at each place (None: the first R, in order), `put` at which places
    the tokens stand that are asked for (None: all), in the order of the pass; `slots` [R] are the rows' slots (None:
    slots 0 to R - 1); `mask` is additive, [R, 1, T, 1, L], where L is how many columns of the keys are read. `own`:
    keys and values that stand in no slot, since nobody needs them after this pass.
    """

    rows: int
    steps: int
    take: torch.Tensor | None
    put: torch.Tensor | None
    slots: torch.Tensor | None
    mask: torch.Tensor
    own: Own | None = None

    def read(self, buffer: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        """The rows' keys or values, [R, Hkv, L, D], of all slots' [S, Hkv, columns, D] and this pass's [N, Hkv, D]."""
        length = self.mask.shape[-1]
        if self.slots is None:
            return buffer[: self.rows, :, :length]
        rows = buffer[:, :, :length].index_select(0, self.slots)
        if self.own is not None:
            rows[self.own.row, :, self.own.column] = fresh.index_select(0, self.own.token)
        return rows


@dataclass(slots=True)
class Packed:
    """How the N tokens of a pass attend: in all layers `groups`, one behind the other.

    In the last one (`last_layer`) only those whose logits are read do: `last_groups`, which stand at `read` [n].
    """

    cache: SlotCache
    groups: Sequence[Group]
    last_layer: int
    last_groups: Sequence[Group]
    read: torch.Tensor


def register() -> None:
    """Make the attention known to transformers (idempotent); switch with `model.set_attn_implementation(NAME)`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    packed: Packed | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, N, D]; key and value: the slots' whole buffers [S, Hkv, columns, D] -> ([1, N, H, D], None).

    `packed` is handed through the model by the caller; `softcap` is Gemma 2's c * tanh(scores / c). Raises
    NotImplementedError where the model does not hand it through, or has attention sinks.
    """
    if packed is None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with sinks, or without what a packed pass hands through")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    tokens = query[0].transpose(0, 1) * scale  # [N, H, D]
    fresh_keys, fresh_values = packed.cache.fresh
    last = module.layer_idx == packed.last_layer
    parts = []
    for group in packed.last_groups if last else packed.groups:
        placed = tokens[: group.rows] if group.take is None else tokens.index_select(0, group.take)
        rows = placed.reshape(group.rows, group.steps, *placed.shape[1:])
        keys, values = group.read(key, fresh_keys), group.read(value, fresh_values)
        out = attend(rows, keys, values, group.mask, softcap).flatten(0, 1)
        parts.append(out if group.put is None else out.index_select(0, group.put))
    out = torch.cat(parts)
    if len(out) < len(tokens):  # the tail that fills up the rows of linear layers; in the last layer what nobody reads
        places = packed.read if last else slice(len(out))
        whole = out.new_zeros(tokens.shape)
        whole[places] = out
        out = whole
    return out.unsqueeze(0), None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """query [R, T, H, D] (scaled), key and value [R, Hkv, L, D], mask [R, 1, T, 1, L] -> [R, T, H, D]."""
    rows, steps, heads, width = query.shape
    shared = key.shape[1]
    group = heads // shared
    if query.device.type != "cpu" and steps > 1 and softcap is None:
        # Keys are repeated by hand: with a mask, enable_gqa falls to the slow math kernel.
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        out = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key, value, attn_mask=mask.squeeze(3), scale=1.0
        )
        return out.transpose(1, 2)
    grouped = query.view(rows, steps, shared, group, width).permute(0, 2, 1, 3, 4)
    grouped = grouped.reshape(rows, shared, steps * group, width)
    padding = max(0, MIN_QUERY_ROWS - group * steps)
    if padding:
        grouped = functional.pad(grouped, (0, 0, 0, padding))
    scores = torch.matmul(grouped, key.transpose(2, 3))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if steps == 1:
        scores += mask.squeeze(3)  # one mask for all query rows
    else:
        scores.view(rows, shared, steps, group, -1).add_(mask)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    out = _weighted_sum(weights.flatten(0, 1), value.flatten(0, 1)).view(rows, shared, -1, value.shape[-1])
    out = out[:, :, : steps * group]
    return out.reshape(rows, shared, steps, group, -1).transpose(1, 2).reshape(rows, steps, heads, -1)


def _weighted_sum(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """weights [B, M, L] times value [B, L, D] -> [B, M, D], on a CPU in pieces of PIECE columns."""
    if weights.device.type != "cpu":
        return torch.bmm(weights, value)
    out = torch.bmm(weights[:, :, :PIECE], value[:, :PIECE])
    for start in range(PIECE, weights.shape[2], PIECE):
        out.baddbmm_(weights[:, :, start : start + PIECE], value[:, start : start + PIECE])
    return out
