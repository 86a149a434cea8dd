"""One packed pass of a transformers model: a token for each decoding slot, rests of prompts, and branches, together."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Sequence

import numpy as np
import torch

from cai_experiment.engines.attention import Group, Own, Packed
from cai_experiment.engines.cache import SlotCache

TokenWise = Callable[[torch.Tensor], torch.Tensor]

ROWS = 16  # linear layers get a multiple of this many rows; on a CPU other numbers may change the last bits
STEPS = 8  # a prefill group is a multiple of this many tokens wide
VIEW_STEP = 64  # attention reads a multiple of this many columns
SPARSE = 2  # rows per decoding slot from which gathering their keys costs less than reading the idle ones'
GROUP_COST_CPU = 5_000  # scores that are computed in the time that one more group takes (measured)
GROUP_COST_GPU = 300_000  # (arithmetic: a dozen launches of 10 us at 100 TFLOP/s, 40 heads of 128)
GROUP_COLUMNS = 50_000  # of keys that a group gathers: 1 GB of a layer where a GPU repeats them for 40 heads
GROUP_PLACES = 1_000_000  # scores of one group for each head, padding included: bounds its memory


def round_up(number: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `number`."""
    return -(-number // step) * step


@dataclass(slots=True)
class Part:
    """Consecutive tokens of one slot: ids [n] from position `start` on. `wanted`: the logits after the last one."""

    slot: int
    start: int
    ids: np.ndarray
    wanted: bool = True

    @property
    def end(self) -> int:
        """The row's length after this part."""
        return self.start + len(self.ids)


@dataclass(slots=True)
class Branch(Part):
    """Tokens that follow the first `start` of a slot and are kept nowhere: only the logits after them are wanted."""


class Forward:
    """Runs packed passes over the slots of one cache. The model must be switched to `attention.NAME`."""

    def __init__(self, model: Any, cache: SlotCache, view_step: int = VIEW_STEP) -> None:
        self.model, self.cache, self.view_step = model, cache, view_step
        self.device = next(model.parameters()).device
        self.last_layer = model.config.get_text_config().num_hidden_layers - 1
        self.last_modules = _last_modules(model)

    @torch.inference_mode()
    def __call__(
        self, slots: np.ndarray, ids: np.ndarray, positions: np.ndarray, parts: Sequence[Part] = (),
        branches: Sequence[Branch] = (), heirs: Sequence[tuple[int, int, int]] = (),
    ) -> torch.Tensor:  # fmt: skip
        """One pass: decoding `slots` [n] (ascending) take tokens `ids` [n] at `positions` [n]; `parts` are prefilled.

        `heirs` are (source, target, length): the target gets first columns that this very pass completes, layer by
        layer. Returns the logits after each decoding slot's token, each wanted part's last token and each branch's.
        """
        rests: list[Part] = [*sorted(parts, key=_end), *sorted(branches, key=_end)]
        firsts = dict(zip(map(id, rests), len(slots) + _starts(rests), strict=True))  # where each begins in the pass
        self.cache.reserve(self._view(max([rest.end for rest in rests] + [int(positions.max(initial=0)) + 1])))
        all_ids = np.concatenate([ids, *(rest.ids for rest in rests)])
        all_positions = np.concatenate([positions, *(np.arange(rest.start, rest.end) for rest in rests)])
        fill = round_up(len(all_ids), ROWS) - len(all_ids)
        self._aim(slots, positions, rests[: len(parts)], len(all_ids) + fill, heirs)
        wanted = [rest for rest in (*parts, *branches) if rest.wanted]
        lasts = [firsts[id(rest)] + len(rest.ids) - 1 for rest in wanted]
        read = np.array([*range(len(slots)), *lasts], dtype=np.int64)
        some = self._tensor(np.pad(read, (0, round_up(len(read), ROWS) - len(read)), mode="edge"))
        with self._last_layer_of(some):
            out = self.model(
                input_ids=self._tensor(np.pad(all_ids, (0, fill))[None]),
                position_ids=self._tensor(np.pad(all_positions, (0, fill))[None]),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=some,
                packed=self._packed(slots, positions, rests, firsts),
            )
        return out.logits[0, : len(read)]

    def _aim(
        self, slots: np.ndarray, positions: np.ndarray, parts: Sequence[Part], count: int,
        heirs: Sequence[tuple[int, int, int]],
    ) -> None:  # fmt: skip
        """Where the pass writes keys and values: decoding slots and parts in place, all else into the dump."""
        rows = np.concatenate([slots, *(np.full(len(part.ids), part.slot) for part in parts)])
        columns = np.concatenate([positions, *(np.arange(part.start, part.end) for part in parts)])
        rest = count - len(rows)
        dumped = np.pad(columns, (0, rest), constant_values=self.cache.dump)
        self.cache.aim(self._tensor(np.pad(rows, (0, rest))), self._tensor(dumped), heirs)

    @contextmanager
    def _last_layer_of(self, read: torch.Tensor) -> Iterator[None]:
        """The last layer computes only the tokens whose logits are read, [n] of the packed ones."""
        patched = [module.__dict__.get("forward") for module in self.last_modules]
        for module in self.last_modules:
            module.forward = _of_some(module.forward, read)
        try:
            yield
        finally:
            for module, before in zip(self.last_modules, patched, strict=True):
                if before is None:
                    del module.forward
                else:
                    module.forward = before

    # ------------------------------------------------------------ who attends to what

    def _packed(
        self, slots: np.ndarray, positions: np.ndarray, rests: Sequence[Part], firsts: dict[int, int]
    ) -> Packed:
        """The groups of a pass: decoding slots, then `rests` in chunks, which lie behind each other in this order."""
        groups = [self._decode_group(slots, positions)] if len(slots) else []
        last_groups, read = list(groups), [np.arange(len(slots))]
        for chunk in self._chunks(rests):
            begins = np.array([firsts[id(rest)] for rest in chunk])
            own = self._own(chunk, begins)
            groups.append(self._prefill_group(chunk, begins, own))
            wanted = [i for i, rest in enumerate(chunk) if rest.wanted]
            if wanted:
                ends = np.array([begins[i] + len(chunk[i].ids) - 1 for i in wanted])
                last_groups.append(self._last_group([chunk[i] for i in wanted], ends, own))
                read.append(ends)
        return Packed(self.cache, groups, self.last_layer, last_groups, self._tensor(np.concatenate(read)))

    def _chunks(self, rests: Sequence[Part]) -> list[list[Part]]:
        """Neighbours that attend together, padded to the longest rest and the farthest end among them.

        A rest joins its neighbours while what they compute in vain costs less than another group, and the group's
        scores and keys stay small.
        """
        chunks: list[list[Part]] = []
        width = view = places = 0
        cost = GROUP_COST_CPU if self.device.type == "cpu" else GROUP_COST_GPU
        for rest in rests:
            own_width, own_view = round_up(len(rest.ids), STEPS), self._view(rest.end)
            joint_width, joint_view = max(width, own_width), max(view, own_view)
            columns = joint_view * (len(chunks[-1]) + 1 if chunks else 1)
            joins = bool(chunks) and isinstance(chunks[-1][0], Branch) == isinstance(rest, Branch)
            small = columns <= GROUP_COLUMNS and columns * joint_width <= GROUP_PLACES
            if joins and small and columns * joint_width <= places + own_width * own_view + cost:
                chunks[-1].append(rest)
                width, view, places = joint_width, joint_view, columns * joint_width
            else:
                chunks.append([rest])
                width, view, places = own_width, own_view, own_width * own_view
        return chunks

    def _own(self, chunk: Sequence[Part], begins: np.ndarray) -> Own | None:
        """Where the keys of a chunk of branches belong; None for parts, which stand in their slots."""
        if not isinstance(chunk[0], Branch):
            return None
        tokens = [np.arange(first, first + len(rest.ids)) for first, rest in zip(begins, chunk, strict=True)]
        rows = [np.full(len(rest.ids), row) for row, rest in enumerate(chunk)]
        columns = [np.arange(rest.start, rest.end) for rest in chunk]
        return Own(*(self._tensor(np.concatenate(one)) for one in (tokens, rows, columns)))

    def _decode_group(self, slots: np.ndarray, positions: np.ndarray) -> Group:
        """One row per slot up to the last decoding one: keys are read in place, and idle rows attend to column 0.

        Where most of these rows would be idle the decoding slots' keys are gathered instead.
        """
        rows = int(slots[-1]) + 1
        if rows > SPARSE * len(slots):
            mask = self._mask(positions[:, None], self._view(int(positions.max()) + 1))
            return Group(len(slots), 1, None, None, self._tensor(slots), mask)
        full = np.zeros(rows, dtype=np.int64)
        full[slots] = positions
        mask = self._mask(full[:, None], self._view(int(positions.max()) + 1))
        if rows == len(slots):
            return Group(rows, 1, None, None, None, mask)
        take = np.zeros(rows, dtype=np.int64)
        take[slots] = np.arange(len(slots))
        return Group(rows, 1, self._tensor(take), self._tensor(slots), None, mask)

    def _prefill_group(self, rests: Sequence[Part], begins: np.ndarray, own: Own | None) -> Group:
        """Left-aligned rows, padded to a multiple of STEPS tokens by repeating the first token, which is not put."""
        sizes = np.array([len(rest.ids) for rest in rests])
        starts = np.array([rest.start for rest in rests])
        width = round_up(int(sizes.max()), STEPS)
        step = np.arange(width)
        real = step < sizes[:, None]
        take = np.where(real, begins[:, None] + step, begins[:, None])
        mask = self._mask(np.where(real, starts[:, None] + step, 0), self._view(int((starts + sizes).max())))
        rows = np.array([rest.slot for rest in rests])
        put = self._tensor(np.flatnonzero(real.ravel()))
        return Group(len(rests), width, self._tensor(take.ravel()), put, self._tensor(rows), mask, own)

    def _last_group(self, rests: Sequence[Part], ends: np.ndarray, own: Own | None) -> Group:
        """The last token of each, as one step. Parts that are not wanted are left out; branches all are."""
        positions = np.array([rest.end - 1 for rest in rests])
        rows = np.array([rest.slot for rest in rests])
        mask = self._mask(positions[:, None], self._view(int(positions.max()) + 1))
        return Group(len(rests), 1, self._tensor(ends), None, self._tensor(rows), mask, own)

    def _view(self, length: int) -> int:
        return round_up(length, self.view_step)

    def _mask(self, positions: np.ndarray, view: int) -> torch.Tensor:
        """Additive: 0 up to each token's position [R, T], minus infinity beyond; [R, 1, T, 1, view]."""
        unseen = torch.arange(view, device=self.device) > self._tensor(positions)[:, None, :, None, None]
        mask = torch.zeros(unseen.shape, dtype=self.model.dtype, device=self.device)
        return mask.masked_fill_(unseen, float("-inf"))

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self.device)


def _end(part: Part) -> int:
    return part.end


def _starts(rests: Sequence[Part]) -> np.ndarray:
    """Where each begins if they lie one behind the other."""
    sizes = np.array([len(rest.ids) for rest in rests], dtype=np.int64)
    return np.cumsum(sizes) - sizes


def _last_modules(model: Any) -> list[Any]:
    """Those of the last layer whose work on a token serves that token alone: keys and values are needed of all.

    What bears another name computes every token.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not layers:
        return []
    attention = getattr(layers[-1], "self_attn", None)
    found = (getattr(layers[-1], "mlp", None), getattr(attention, "q_proj", None), getattr(attention, "o_proj", None))
    return [module for module in found if module is not None]


def _of_some(whole: TokenWise, read: torch.Tensor) -> TokenWise:
    """`whole`, [1, N, a] -> [1, N, b], for the tokens `read` alone; zeros elsewhere."""

    def some(hidden: torch.Tensor) -> torch.Tensor:
        computed = whole(hidden[:, read])
        out = computed.new_zeros(1, hidden.shape[1], computed.shape[-1])
        out[:, read] = computed
        return out

    return some
