"""Preference pairs as packed passes: what both answers begin with is computed once, and nothing is padded.

A pair is a tree: prompt and common beginning of the answers (the trunk), then two branches. Its tokens lie one after
the other,

    trunk ... | rest of chosen ... | rest of rejected ...

and each rest has the positions that it would have behind the trunk alone. The last token of an answer is never an
input: nothing is predicted from it. Passes are filled up to a budget of tokens with whole pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from cai_experiment.training.data import TokenPair

TRUNK, CHOSEN, REJECTED = 0, 1, 2  # branches
SIMILAR = 1.25  # within a group a pair may be so many times as long as another: attention pads it to the longest


@dataclass(frozen=True, slots=True)
class Tree:
    """A pair's tokens: `trunk` of both rows, then the rest of each row, its last token included (a target only)."""

    prompt: int  # tokens of the trunk that are prompt
    trunk: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        """Tokens that a pass computes."""
        return len(self.trunk) + len(self.chosen) + len(self.rejected) - 2


def tree_of(pair: TokenPair) -> Tree:
    """A pair as a tree. Each branch keeps at least its end token, so that both have a target of their own."""
    most = min(len(pair.chosen_ids), len(pair.rejected_ids)) - 1
    shared = 0
    while shared < most and pair.chosen_ids[shared] == pair.rejected_ids[shared]:
        shared += 1
    trunk = [*pair.prompt_ids, *pair.chosen_ids[:shared]]
    return Tree(len(pair.prompt_ids), trunk, pair.chosen_ids[shared:], pair.rejected_ids[shared:])


@dataclass(frozen=True, slots=True)
class Group:
    """Pairs of similar length, m of them, the longest of L tokens; they are the tokens `start` to `stop` of a pass.

    `spread` (m, L) holds each pair's token numbers from `start` on, 0 where a pair is shorter; `place` (stop - start,)
    is its inverse: where in m * L a token stands. `mask` (m, 1, L, L), bool, says who attends to whom within a pair.
    """

    start: int
    stop: int
    spread: torch.Tensor
    place: torch.Tensor
    mask: torch.Tensor

    def to(self, device: torch.device | str) -> Group:
        """The same on a device."""
        spread, place, mask = (x.to(device, non_blocking=True) for x in (self.spread, self.place, self.mask))
        return Group(self.start, self.stop, spread, place, mask)


@dataclass(frozen=True, slots=True)
class Packed:
    """One pass over n pairs of T tokens in all with M targets. Long tensors unless said otherwise."""

    input_ids: torch.Tensor  # (T,)
    positions: torch.Tensor  # (T,)
    pair: torch.Tensor  # (T,) number of the pair, n for filling
    branch: torch.Tensor  # (T,)
    groups: tuple[Group, ...]  # pairs next to one another, which attention takes together
    sources: torch.Tensor  # (M,) the token from which a target is predicted
    targets: torch.Tensor  # (M,)
    target_pair: torch.Tensor  # (M,)
    target_branch: torch.Tensor  # (M,)
    chosen_tokens: torch.Tensor  # (n,) of the answer, end token included
    rejected_tokens: torch.Tensor  # (n,)

    @property
    def pairs(self) -> int:
        """n"""
        return len(self.chosen_tokens)

    def to(self, device: torch.device | str) -> Packed:
        """The same on a device."""
        tensors = [f.name for f in fields(self) if f.name != "groups"]
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in tensors}
        return Packed(groups=tuple(group.to(device) for group in self.groups), **moved)


def pack(trees: Sequence[Tree], multiple: int = 1) -> Packed:
    """One pass over whole pairs; filled up to a multiple of so many tokens with some that belong to no pair.

    A filled pass is FlexAttention's, which reads no groups: their masks would take time and memory for nothing.
    """
    ids: list[int] = []
    positions: list[int] = []
    pair: list[int] = []
    branch: list[int] = []
    targets: list[tuple[int, int, int, int]] = []  # source, target, pair, branch
    sizes: list[tuple[int, int, int]] = []
    for number, tree in enumerate(trees):
        start, trunk = len(ids), len(tree.trunk)
        rest = {CHOSEN: tree.chosen, REJECTED: tree.rejected}
        ids += [*tree.trunk, *tree.chosen[:-1], *tree.rejected[:-1]]
        positions += range(trunk)
        branch += [TRUNK] * trunk
        first = start + trunk
        targets += [(start + i - 1, tree.trunk[i], number, TRUNK) for i in range(tree.prompt, trunk)]
        for name, tokens in rest.items():
            positions += range(trunk, trunk + len(tokens) - 1)
            branch += [name] * (len(tokens) - 1)
            before = [start + trunk - 1, *range(first, first + len(tokens) - 1)]
            targets += [(source, token, number, name) for source, token in zip(before, tokens, strict=True)]
            first += len(tokens) - 1
        sizes.append((trunk, len(tree.chosen) - 1, len(tree.rejected) - 1))
        pair += [number] * (len(ids) - start)
    filling = -len(ids) % multiple
    answers = [(len(t.trunk) - t.prompt + len(t.chosen), len(t.trunk) - t.prompt + len(t.rejected)) for t in trees]
    return Packed(
        _long(ids + [ids[0]] * filling), _long(positions + [0] * filling),
        _long(pair + [len(trees)] * filling), _long(branch + [TRUNK] * filling),
        _groups(sizes) if multiple == 1 else (), *_long(targets).T.contiguous(), *_long(answers).T.contiguous(),
    )  # fmt: skip


def _long(values: Sequence[object]) -> torch.Tensor:
    """By way of numpy, which reads a list three times as fast."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def _groups(sizes: Sequence[tuple[int, int, int]]) -> tuple[Group, ...]:
    """Groups of neighbours, none over SIMILAR times as long as another; sizes are (trunk, chosen, rejected)."""
    groups: list[Group] = []
    first = start = 0
    lengths = [sum(size) for size in sizes]
    for end in range(1, len(sizes) + 1):
        if end < len(sizes) and max(lengths[first : end + 1]) <= SIMILAR * min(lengths[first : end + 1]):
            continue
        stop = start + sum(lengths[first:end])
        groups.append(Group(start, stop, *_attended(sizes[first:end])))
        first, start = end, stop
    return tuple(groups)


def _attended(sizes: Sequence[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(spread, place, mask) of a group."""
    whole = torch.tensor(sizes).sum(1)
    longest = int(whole.max())
    column = torch.arange(longest)
    inside = column < whole[:, None]
    starts = whole.cumsum(0) - whole
    spread = (starts[:, None] + column).where(inside, torch.tensor(0))
    place = inside.flatten().nonzero()[:, 0]
    trunk, chosen, _ = torch.tensor(sizes).T[:, :, None]
    in_chosen, in_rejected = (column >= trunk) & (column < trunk + chosen), column >= trunk + chosen
    causal = column[:, None] >= column
    mask = causal & ~(in_rejected[:, :, None] & in_chosen[:, None, :])
    return spread, place, mask[:, None]


def into_passes(costs: Sequence[int], budget: int, least: int = 1) -> list[list[int]]:
    """Numbers 0..n-1 in passes of at most `budget` (one alone may be larger), the fewest that longest-first finds.

    Longest first, each into the fullest pass that still holds it (best-fit decreasing); then each pass in the order of
    its numbers. At least `least` passes (at most n): the largest are split until there are enough.
    """
    passes: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        fitting = [p for p, left in enumerate(room) if left >= costs[number]]
        if fitting:
            fullest = min(fitting, key=lambda p: room[p])
            passes[fullest].append(number)
            room[fullest] -= costs[number]
        else:
            passes.append([number])
            room.append(budget - costs[number])
    while len(passes) < min(least, len(costs)):
        largest = max((p for p in passes if len(p) > 1), key=lambda p: sum(costs[i] for i in p))
        passes.remove(largest)
        passes += [largest[::2], largest[1::2]]
    return sorted(sorted(numbers) for numbers in passes)
