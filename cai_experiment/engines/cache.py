"""The key-value memory of the slots: one right-padded row per slot, written in place, grown in buckets.

Each layer holds keys and values together, [2, rows, key-value heads, length + 1, head width]. The last column is a
dump: what only fills up a pass, or is of use in one pass only (`fresh`), writes there, and attention never reads it.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch

LENGTH_BUCKETS = (256, 512, 1024, 2048)  # then doubling; a buffer grows at most a few times in a run


def bucket(length: int, limit: int) -> int:
    """The buffer length that holds `length` columns: the smallest bucket, but never above `limit`."""
    size = next((b for b in LENGTH_BUCKETS if b >= length), LENGTH_BUCKETS[-1])
    while size < length:
        size *= 2
    return min(size, limit)


class SlotCache:
    """What a transformers model gets as `past_key_values`. `aim` says where the next pass writes."""

    is_compileable = False

    def __init__(self, slots: int, limit: int) -> None:
        """`slots` are the rows, `limit` the largest length in columns. Nothing is allocated before the first pass."""
        self.slots, self.limit = slots, limit
        self.length = 0
        self.layers: list[torch.Tensor] = []  # keys and values of each, [2, rows, Hkv, length + 1, D]
        self.fresh = torch.empty(0), torch.empty(0)  # of this pass's tokens in the layer at work, each [N, Hkv, D]

    def reserve(self, length: int) -> None:
        """Make room for `length` columns in every slot, keeping what is there."""
        if length <= self.length:
            return
        self.length = bucket(length, self.limit)
        for layer, old in enumerate(self.layers):
            new = old.new_zeros(*old.shape[:3], self.length + 1, old.shape[4])
            new[:, :, :, : old.shape[3] - 1] = old[:, :, :, :-1]
            self.layers[layer] = new

    @property
    def dump(self) -> int:
        """The column for tokens that only fill up a pass."""
        return self.length

    def aim(self, slots: torch.Tensor, columns: torch.Tensor, heirs: Sequence[tuple[int, int, int]] = ()) -> None:
        """The next pass writes its N packed tokens to these slots [N] and columns [N].

        Then, layer by layer and in this order, each of the `heirs` (source, target, length) takes the first columns of
        a slot that was written to: a prefix that two prompts of one pass share is computed once.
        """
        self.where, self.heirs = (slots, slice(None), columns), heirs

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values [1, Hkv, N, D]; give the layer's whole buffers [S, Hkv, columns, D]."""
        if layer_idx == len(self.layers):
            self.layers.append(key.new_zeros(2, self.slots, key.shape[1], self.length + 1, key.shape[3]))
        layer = self.layers[layer_idx]
        self.fresh = key[0].transpose(0, 1), value[0].transpose(0, 1)
        layer[0][self.where], layer[1][self.where] = self.fresh
        for source, target, length in self.heirs:
            layer[:, target, :, :length] = layer[:, source, :, :length]
        return layer[0], layer[1]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of one slot into another."""
        for layer in self.layers:
            layer[:, target, :, :length] = layer[:, source, :, :length]

    def clear(self, slot: int) -> None:
        """Put zeros into one slot."""
        for layer in self.layers:
            layer[:, slot] = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions and masks are given explicitly, so no model may derive them from here."""
        return 0


def shared_prefix(tokens: np.ndarray, ready: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """How many first tokens of `prompt` [n] each slot holds: tokens [slots, context], ready [slots] -> [slots]."""
    equal = tokens[:, : len(prompt)] == prompt
    first_difference = np.where(equal.all(axis=1), len(prompt), equal.argmin(axis=1))
    return np.minimum(first_difference, ready)
