"""Who gets which slot: plans are carried out on a cache of token ids, so every prefix that is read can be checked."""

from __future__ import annotations

import random

import numpy as np
import pytest

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines.base import Prompt, Sampling
from cai_experiment.engines.common import Request
from cai_experiment.engines.forward import Part
from cai_experiment.engines.slots import Groups, Plan, Slots

EMPTY = -7


class Cache:
    """What `SlotCache` holds, as token ids: a plan is carried out on it and must find what it counts on."""

    def __init__(self, count: int, context: int) -> None:
        self.slots = Slots(count, context)
        self.rows = np.full((count + self.slots.scratch, context + 1), EMPTY)

    def carry_out(self, speaking: list[Request], groups: Groups, room: int) -> Plan:
        before = {id(request): request for request in (*speaking, *(r for group in groups.values() for r in group))}
        plan = self.slots.plan(speaking, groups, room)
        for source, target, length in plan.copies:
            self.rows[target, :length] = self.rows[source, :length]
        written: set[tuple[int, int]] = set()
        for part in plan.parts:
            places = {(part.slot, column) for column in range(part.start, part.end)}
            assert not places & written
            written |= places
            self.rows[part.slot, part.start : part.end] = part.ids
        for source, target, length in plan.heirs:
            assert not {(target, column) for column in range(length)} & written
            self.rows[target, :length] = self.rows[source, :length]
        for slot, request in plan.spoken:
            assert self.rows[slot, : len(request.ids)].tolist() == request.ids.tolist()
            del before[id(request)]
        for branch, request in zip(plan.branches, plan.weighed, strict=True):
            seen = [*self.rows[branch.slot, : branch.start], *branch.ids]
            assert seen == request.ids.tolist()
            del before[id(request)]
        left = [*speaking, *(request for group in groups.values() for request in group)]
        assert {id(request) for request in left} == set(before)  # taken or still waiting: none is lost
        read = sum(len(part.ids) for part in plan.parts) + sum(len(branch.ids) for branch in plan.branches)
        assert read == sum(r.computed for r in plan.weighed) + sum(r.computed for _, r in plan.spoken)
        first = len(plan.parts[0].ids) if plan.parts else 0
        assert read <= room or len(plan.spoken) + len(plan.weighed) == 1 or read - first <= room
        return plan

    def say(self, slot: int, said: list[int]) -> None:
        """The slot speaks and falls silent; keys and values of the last token are not there, as in the loop."""
        slots, start = self.slots, int(self.slots.ready[slot])
        slots.tokens[slot, start : start + len(said)] = said
        self.rows[slot, start : start + len(said) - 1] = said[:-1]
        slots.ready[slot] += len(said) - 1
        slots.active[slot] = False
        slots.touch(slot)


def request(ids: list[int], stem: int = 0) -> Request:
    """A prompt of these tokens; with a `stem` one that is weighed."""
    prompt = Prompt("x", (Turn("instruction", "x"),), "answer", Sampling(0.7, 5, 0))
    return Request(prompt, np.array(ids, dtype=np.int32), (1, 2) if stem else (), stem)


TALK = list(range(100, 140))
QUESTION = list(range(500, 520))


def branches(talk: list[int], count: int) -> list[Request]:
    return [request([*talk, *QUESTION, 900 + i, 7, 8], len(talk)) for i in range(count)]


def spoken(cache: Cache, ids: list[int]) -> tuple[int, Request]:
    """Begin or continue a conversation; gives its slot."""
    (found,) = cache.carry_out([request(ids)], {}, 4096).spoken
    return found


def test_branches_take_no_slot_and_read_what_they_share_once() -> None:
    cache = Cache(4, 400)
    slot, _ = spoken(cache, TALK)
    cache.say(slot, [1, 2, 3])
    talk = [*TALK, 1, 2, 3]
    groups: Groups = {"a": branches(talk, 15)}
    plan = cache.carry_out([], groups, 4096)
    assert len(plan.weighed) == 15 and not groups and not cache.slots.active.any()
    assert [(part.slot, part.wanted) for part in plan.parts] == [(slot, False)]
    assert sum(r.computed for r in plan.weighed) == 1 + len(QUESTION) + 15 * 3
    again, one = spoken(cache, [*talk, 60, 61])  # the conversation goes on where it was
    assert again == slot and one.computed == 2  # the branches left the last token of what was said behind


def test_while_its_slot_speaks_branches_use_a_scratch_row() -> None:
    cache = Cache(4, 400)
    slot, _ = spoken(cache, TALK)
    plan = cache.carry_out([], {"a": branches(TALK, 2)}, 4096)
    (part,) = plan.parts
    assert part.slot >= 4 and plan.copies == [(slot, part.slot, len(TALK))]
    plan = cache.carry_out([], {"a": branches(TALK, 1)}, 4096)  # one alone shares nothing and is read as it is
    assert not plan.parts and plan.branches[0].slot == slot


def test_what_waits_keeps_its_slot() -> None:
    cache = Cache(2, 400)
    ends = []
    for i in range(2):
        slot, _ = spoken(cache, [i, *TALK])
        cache.say(slot, [1, 2])
        ends.append([i, *TALK, 1, 2])
    new = [request([50 + i, *TALK]) for i in range(2)]
    groups: Groups = {i: branches(talk, 9) for i, talk in enumerate(ends)}
    plan = cache.carry_out(new, groups, 40)  # room for some of the first conversation's branches
    assert plan.weighed and not plan.spoken and len(groups) == 2
    while groups:
        assert not cache.carry_out(new, groups, 60).spoken
    plan = cache.carry_out([*new, request([*ends[1], 5])], groups, 4096)
    assert [one.computed for _, one in plan.spoken] == [1, len(TALK) + 1]  # the one that goes on, then one new


def test_with_one_slot_each_takes_its_turn() -> None:
    cache = Cache(1, 400)
    slot, _ = spoken(cache, TALK)
    cache.say(slot, [1, 2])
    other = request([9, *TALK])
    assert cache.carry_out([other], {"a": branches([*TALK, 1, 2], 2)}, 1).weighed
    assert cache.carry_out([other], {}, 1).spoken  # nothing needs the slot any more


def test_of_two_that_continue_one_conversation_one_takes_a_copy() -> None:
    cache = Cache(3, 400)
    slot, _ = spoken(cache, TALK)
    cache.say(slot, [1, 2])
    plan = cache.carry_out([request([*TALK, 1, 2, 5]), request([*TALK, 1, 2, 6])], {}, 4096)
    (first, _), (second, one) = plan.spoken
    assert first == slot != second and one.computed <= 2


@pytest.mark.parametrize("seed", range(30))
def test_whatever_comes_reads_its_own_prefix(seed: int) -> None:
    """Random conversations of few words, so that prefixes are shared everywhere, with branches in between."""
    rng = random.Random(seed)
    cache = Cache(rng.choice((1, 2, 5, 16)), 400)
    talks: list[list[int]] = [[rng.randrange(2) for _ in range(rng.randint(1, 90))] for _ in range(12)]
    speaking: list[Request] = []
    groups: Groups = {}
    done = asked = 0
    for _ in range(60):
        for number in rng.sample(range(12), rng.randint(0, 4)):
            talk = talks[number][: rng.randint(1, len(talks[number]))] if rng.random() < 0.3 else talks[number]
            if rng.random() < 0.5:
                groups.setdefault((number, len(talk)), []).extend(branches(talk, size := rng.randint(1, 20)))
                asked += size
            else:
                speaking.append(request(list(talk)))
                asked += 1
        plan = cache.carry_out(speaking, groups, rng.choice((1, 40, 300, 4096)))
        done += len(plan.spoken) + len(plan.weighed)
        for slot in np.flatnonzero(cache.slots.active):
            if rng.random() < 0.6:
                cache.say(int(slot), [rng.randrange(3) for _ in range(rng.randint(1, 9))])
        if rng.random() < 0.5:
            number = rng.randrange(12)
            talks[number] = [*talks[number], *(rng.randrange(3) for _ in range(5))][:300]
    for _ in range(600):
        if not speaking and not groups:
            break
        for slot in np.flatnonzero(cache.slots.active):
            cache.say(int(slot), [0, 1])
        plan = cache.carry_out(speaking, groups, 40)
        done += len(plan.spoken) + len(plan.weighed)
        assert plan.spoken or plan.weighed  # with every slot silent something is always taken
    assert done == asked
    assert isinstance(plan, Plan) and all(isinstance(part, Part) for part in plan.parts)
