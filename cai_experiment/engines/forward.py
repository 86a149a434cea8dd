"""One packed pass of a transformers model: a token for each decoding slot, and the rests of prompts, together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence

import numpy as np
import torch

from cai_experiment.engines.attention import Group
from cai_experiment.engines.cache import SlotCache

ROWS = 16  # linear layers get a multiple of this many rows; on a CPU other numbers may change the last bits
VIEW_STEP = 64  # attention reads a multiple of this many columns
SPARSE = 2  # rows per decoding slot from which gathering their keys costs less than reading the idle ones'
GROUP_TOKENS = 2048  # places, padding included, of one prefill group: bounds the memory of its scores


def round_up(number: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `number`."""
    return -(-number // step) * step


@dataclass(slots=True)
class Part:
    """Consecutive tokens of one slot: ids [n] at positions `start` to `start + n - 1`."""

    slot: int
    start: int
    ids: np.ndarray

    @property
    def end(self) -> int:
        """The slot's length after this part."""
        return self.start + len(self.ids)


class Forward:
    """Runs packed passes over the slots of one cache. The model must be switched to `attention.NAME`."""

    def __init__(self, model: Any, cache: SlotCache, view_step: int = VIEW_STEP) -> None:
        self.model, self.cache, self.view_step = model, cache, view_step
        self.device = next(model.parameters()).device
        self._heirs: list[tuple[int, int, int]] = []

    def inherit(self, source: int, target: int, length: int) -> None:
        """In the next pass `target` gets the first `length` columns of `source`, which that pass itself completes."""
        self._heirs.append((source, target, length))

    @torch.inference_mode()
    def __call__(
        self, slots: np.ndarray, ids: np.ndarray, positions: np.ndarray, parts: Sequence[Part] = ()
    ) -> torch.Tensor:
        """One pass: decoding `slots` [n] (ascending) take tokens `ids` [n] at `positions` [n]; `parts` are prefilled.

        Returns the logits after each decoding slot's token and after each part's last token, [n + parts, V].
        """
        sorted_parts = sorted(parts, key=lambda part: len(part.ids))
        self.cache.reserve(self._view(max([part.end for part in parts] + [int(positions.max(initial=0)) + 1])))
        groups = [self._decode_group(slots, positions)] if len(slots) else []
        groups += [self._prefill_group(chunk) for chunk in _chunks(sorted_parts)]
        all_ids = np.concatenate([ids, *(part.ids for part in sorted_parts)])
        all_positions = np.concatenate([positions, *(np.arange(part.start, part.end) for part in sorted_parts)])
        all_slots = np.concatenate([slots, *(np.full(len(part.ids), part.slot) for part in sorted_parts)])
        fill = round_up(len(all_ids), ROWS) - len(all_ids)
        columns = np.concatenate([all_positions, np.full(fill, self.cache.dump)])
        self.cache.aim(self._tensor(np.pad(all_slots, (0, fill))), self._tensor(columns), self._heirs)
        self._heirs = []
        last = self._last_places(len(slots), sorted_parts, parts)
        out = self.model(
            input_ids=self._tensor(np.pad(all_ids, (0, fill))[None]),
            position_ids=self._tensor(np.pad(all_positions, (0, fill))[None]),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=self._tensor(np.pad(last, (0, round_up(len(last), ROWS) - len(last)))),
            groups=groups,
        )
        return out.logits[0, : len(last)]

    def _last_places(self, decoding: int, sorted_parts: Sequence[Part], parts: Sequence[Part]) -> np.ndarray:
        """Where in the packed tokens the logits are read: every decoding token, every part's last (as given)."""
        ends = decoding - 1 + np.cumsum([len(part.ids) for part in sorted_parts], dtype=np.int64)
        end_of = {id(part): end for part, end in zip(sorted_parts, ends, strict=True)}
        return np.array([*range(decoding), *(end_of[id(part)] for part in parts)], dtype=np.int64)

    def _view(self, length: int) -> int:
        return round_up(length, self.view_step)

    def _decode_group(self, slots: np.ndarray, positions: np.ndarray) -> Group:
        """One row per slot up to the last decoding one: keys are read in place, and idle rows attend to column 0.

        Where most of these rows would be idle the decoding slots' keys are gathered instead.
        """
        rows = int(slots[-1]) + 1
        if rows > SPARSE * len(slots):
            mask = self._mask(positions[:, None], self._view(int(positions.max()) + 1))
            return Group(len(slots), 1, len(slots), None, None, self._tensor(slots), mask)
        full = np.zeros(rows, dtype=np.int64)
        full[slots] = positions
        mask = self._mask(full[:, None], self._view(int(positions.max()) + 1))
        if rows == len(slots):
            return Group(rows, 1, rows, None, None, None, mask)
        take = np.zeros(rows, dtype=np.int64)
        take[slots] = np.arange(len(slots))
        return Group(rows, 1, len(slots), self._tensor(take), self._tensor(slots), None, mask)

    def _prefill_group(self, parts: Sequence[Part]) -> Group:
        """Left-aligned rows, padded to a multiple of ROWS tokens by repeating the first token, which is not put."""
        sizes = np.array([len(part.ids) for part in parts])
        starts = np.array([part.start for part in parts])
        width = round_up(int(sizes.max()), ROWS)
        step = np.arange(width)
        real = step < sizes[:, None]
        first = np.cumsum(sizes) - sizes
        take = np.where(real, first[:, None] + step, first[:, None])
        mask = self._mask(np.where(real, starts[:, None] + step, 0), self._view(int((starts + sizes).max())))
        put = np.flatnonzero(real.ravel())
        rows = np.array([part.slot for part in parts])
        return Group(
            len(parts), width, len(put), self._tensor(take.ravel()), self._tensor(put), self._tensor(rows), mask
        )

    def _mask(self, positions: np.ndarray, view: int) -> torch.Tensor:
        """Additive: 0 up to each token's position [R, T], minus infinity beyond; [R, 1, T, 1, view]."""
        unseen = torch.arange(view, device=self.device) > self._tensor(positions)[:, None, :, None, None]
        mask = torch.zeros(unseen.shape, dtype=self.model.dtype, device=self.device)
        return mask.masked_fill_(unseen, float("-inf"))

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self.device)


def _chunks(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts, shortest first, in groups of at most GROUP_TOKENS places (or of one part)."""
    chunks: list[list[Part]] = []
    for part in parts:
        width = round_up(len(part.ids), ROWS)
        if chunks and width * (len(chunks[-1]) + 1) <= max(GROUP_TOKENS, width):
            chunks[-1].append(part)
        else:
            chunks.append([part])
    return chunks
