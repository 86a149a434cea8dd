"""What the slots of a stream hold, and where a prompt goes: plans one pass, computes nothing.

Three kinds of prompts wait. A conversation that goes on stays where its keys and values lie. Branches (prompts that
are weighed, such as verdicts) need no slot: what those of one conversation have in common is read once, as its
continuation, and what each adds behind that is kept nowhere. New conversations take slots that nobody who waits has
use for. So what a waiting prompt builds on is never given away, and hardly a token is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Sequence

import numpy as np

from cai_experiment.engines.cache import shared_prefix
from cai_experiment.engines.common import Request
from cai_experiment.engines.forward import Branch, Part
from cai_experiment.engines.sampling import NO_TOKEN

Groups = dict[object, list[Request]]  # branches by the conversation that they follow

LONG_STEM = 64  # tokens of a conversation that no slot holds, from which it gets one before branches of it are read
COMPARED = 256  # branches of a group that are looked at for one pass
SCRATCH_SHARE = 8  # one row beside so many slots, for what branches have in common while their slot goes on speaking


@dataclass(slots=True)
class Plan:
    """What a pass computes. `copies` (source, target, length) happen before it, `heirs` while it runs."""

    parts: list[Part] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    spoken: list[tuple[int, Request]] = field(default_factory=list)  # (slot, who speaks there), as the wanted parts
    weighed: list[Request] = field(default_factory=list)  # as the branches
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    heirs: list[tuple[int, int, int]] = field(default_factory=list)


class Slots:
    """Rows 0 to `count` - 1 are slots; the `scratch` rows behind them hold what lasts for one pass."""

    def __init__(self, count: int, context: int) -> None:
        """`context` is the largest prompt and completion together."""
        self.count, self.scratch = count, max(2, count // SCRATCH_SHARE)
        self.tokens = np.full((count, context + 1), NO_TOKEN, dtype=np.int32)  # prompt, then completion
        self.ready = np.zeros(count, dtype=np.int64)  # first tokens of a slot whose keys and values are there
        self.talk = np.zeros(count, dtype=np.int64)  # those of them that the conversation goes on behind
        self.active = np.zeros(count, dtype=bool)  # speaking
        self.used = np.zeros(count, dtype=np.int64)  # when it was last of use to anyone
        self.clock = 0

    def plan(self, speaking: list[Request], groups: Groups, room: int) -> Plan:
        """Take out of `speaking` and `groups` what one pass reads, at most `room` tokens (or one longer prompt)."""
        return _Planning(self, room).of(speaking, groups)

    def touch(self, slot: int) -> None:
        """It was of use just now."""
        self.clock += 1
        self.used[slot] = self.clock

    def forget(self, row: int) -> None:
        """What the row holds is of no use to anyone."""
        if row < self.count:
            self.ready[row] = self.talk[row] = 0


class _Planning:
    """One plan as far as it came. The slots' state is brought to what it will be when the pass is done."""

    def __init__(self, slots: Slots, room: int) -> None:
        self.slots, self.room, self.plan = slots, room, Plan()
        self.held = slots.active.copy()  # slots that are needed as they are
        self.read: dict[int, int] = {}  # first tokens of a slot that branches of this pass read
        self.written: set[int] = set()  # rows
        self.scratch = list(range(slots.count + slots.scratch - 1, slots.count - 1, -1))

    def of(self, speaking: list[Request], groups: Groups) -> Plan:
        put_off = [request for request in speaking if not self._goes_on(request)]
        for group in groups.values():
            self._hold(group[0])
        for key in list(groups):
            self._branch_off(groups[key])
            if not groups[key]:
                del groups[key]
        speaking[:] = [request for request in put_off if not self._begins(request)]
        return self.plan

    # ------------------------------------------------------------ conversations

    def _goes_on(self, request: Request) -> bool:
        """Continue a conversation in its slot; where the pass is full, keep the slot for it."""
        source, kept = self._source(request.ids)
        if kept == 0 or not self._may_write(source, kept):
            return False
        self.held[source] = True
        return self._speak(request, source, source, kept)

    def _begins(self, request: Request) -> bool:
        """Give a conversation the longest unused slot that nobody needs, with a copy of its prefix."""
        source, kept = self._source(request.ids)
        slot = self._free(source if kept else None)
        return slot is not None and self._speak(request, slot, source, kept)

    def _speak(self, request: Request, slot: int, source: int, kept: int) -> bool:
        request.computed = len(request.ids) - kept
        if not self._fits(request.computed):
            return False
        self._take_prefix(source, slot, kept)
        self._write(slot, request.ids, kept, len(request.ids), wanted=True)
        self.slots.active[slot] = True
        self.plan.spoken.append((slot, request))
        return True

    # ------------------------------------------------------------ branches

    def _hold(self, request: Request) -> None:
        """Keep the slot in which the conversation lies that a branch follows."""
        source, kept = self._source(request.ids)
        if request.stem > 0 and 2 * kept >= request.stem:
            self.held[source] = True

    def _branch_off(self, group: list[Request]) -> None:
        """Take as many branches of one conversation as the pass reads."""
        looked_at = group[:COMPARED]
        first = looked_at[0]
        source, kept = self._source(first.ids)
        stem = min(first.stem, len(first.ids) - 1)
        long_stem = stem - kept > LONG_STEM
        common = _common(looked_at) if len(looked_at) > 1 else stem if long_stem else kept
        if kept > common:
            source, kept = self._source(first.ids[: common + 1])
        taken = self._as_many(looked_at, common, common - kept)
        row = self._row(source, kept, common, long_stem) if taken else None
        if row is None:
            return
        del group[: len(taken)]
        if common > kept:
            self._take_prefix(source, row, kept)
            talk = int(self.slots.talk[row]) if row == source else min(stem, common)
            self._write(row, first.ids[:common], kept, talk, wanted=False)
        self._read_from(row, common, taken)
        first.computed += common - kept

    def _as_many(self, group: Sequence[Request], common: int, before: int) -> list[Request]:
        for number, request in enumerate(group):
            before += len(request.ids) - common
            if before > self.room and (number or not self._empty):
                return list(group[:number])
        return list(group)

    def _row(self, source: int, kept: int, common: int, long_stem: bool) -> int | None:
        """Where the common part is read: where it lies, in its conversation's slot, in a new one, in a scratch row."""
        if common == kept or (kept > 0 and self._may_write(source, kept)):
            return source
        if long_stem and (slot := self._free(source if kept else None)) is not None:
            return slot
        return self.scratch.pop() if self.scratch else None

    def _read_from(self, row: int, common: int, taken: Sequence[Request]) -> None:
        for request in taken:
            self.plan.branches.append(Branch(row, common, request.ids[common:]))
            request.computed = len(request.ids) - common
            self.room -= request.computed
        self.plan.weighed += taken
        if row < self.slots.count and common > 0:
            self.read[row] = max(common, self.read.get(row, 0))
            self.held[row] = True
            self.slots.touch(row)

    # ------------------------------------------------------------ rows

    @property
    def _empty(self) -> bool:
        return not self.plan.parts and not self.plan.branches

    def _fits(self, tokens: int) -> bool:
        return tokens <= self.room or self._empty

    def _source(self, ids: np.ndarray) -> tuple[int, int]:
        """The slot that holds most of a prompt, and how much of it: never its last token, which gives the logits.

        Of several, one that may be written to: what goes on is not to be copied.
        """
        shared = np.minimum(shared_prefix(self.slots.tokens, self.slots.ready, ids), len(ids) - 1)
        kept = int(shared.max())
        best = np.flatnonzero(shared == kept)
        return next((int(slot) for slot in best if self._may_write(int(slot), kept)), int(best[0])), kept

    def _may_write(self, slot: int, kept: int) -> bool:
        """True if nobody needs what the slot holds behind its first `kept` tokens."""
        slots = self.slots
        if slots.active[slot] or kept < slots.talk[slot] or kept < self.read.get(slot, 0):
            return False
        return slot not in self.written or kept == slots.ready[slot]

    def _free(self, source: int | None) -> int | None:
        """The longest unused slot that may be given away, or None; `source`, which is copied from, only if need be."""
        free = ~self.held
        if not free.any():
            return None
        age = np.where(free, self.slots.used, self.slots.clock + 2)
        if source is not None and free[source] and free.sum() > 1:
            age[source] = self.slots.clock + 1
        return int(age.argmin())

    def _take_prefix(self, source: int, row: int, kept: int) -> None:
        if kept == 0 or source == row:
            return
        (self.plan.heirs if source in self.written else self.plan.copies).append((source, row, kept))
        self.held[source] = True
        self.slots.touch(source)

    def _write(self, row: int, ids: np.ndarray, start: int, talk: int, wanted: bool) -> None:
        """Compute `ids` from `start` on in a row; the conversation there goes on behind its first `talk` tokens."""
        self.plan.parts.append(Part(row, start, ids[start:], wanted))
        self.room -= len(ids) - start
        self.written.add(row)
        if row < self.slots.count:
            slots = self.slots
            slots.tokens[row, : len(ids)], slots.tokens[row, len(ids) :] = ids, NO_TOKEN
            slots.ready[row], slots.talk[row] = len(ids), talk
            self.held[row] = True


def _common(group: Sequence[Request]) -> int:
    """How many first tokens all prompts of a group share; each keeps one of its own."""
    first = group[0].ids
    size = min(len(request.ids) for request in group) - 1
    for request in group[1:]:
        differ = first[:size] != request.ids[:size]
        if differ.any():
            size = int(differ.argmax())
    return size
