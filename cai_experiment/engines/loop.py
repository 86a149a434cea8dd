"""Continuous batching over slots: the decode loop of HFEngine, without rendering or loading.

Every slot keeps the tokens of its last conversation and their keys and values. `slots.Slots` says what a pass reads
and where; it is read in the same pass in which the others speak their next token, and a prompt leaves its slot as soon
as it ends.
"""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np
import torch

from cai_experiment.engines.base import Completion
from cai_experiment.engines.cache import SlotCache
from cai_experiment.engines.common import NO_NUMBERS, Request
from cai_experiment.engines.forward import VIEW_STEP, Branch, Forward, round_up
from cai_experiment.engines.sampling import NO_TOKEN, draw, uniforms
from cai_experiment.engines.slots import Groups, Slots
from cai_experiment.engines.stops import StopRule

PREFILL_TOKENS_CPU, PREFILL_TOKENS_GPU = 4096, 8192  # of one pass (or one longer prompt): bounds its memory
BRANCHES_AHEAD = 64  # branches for each slot that may wait


class Loop:
    """The slots of one stream. Not shared between streams, so an adapter that changed meets no stale keys."""

    def __init__(self, model: Any, stops: StopRule, slots: int, context: int, view_step: int) -> None:
        """`model` is switched to `attention.NAME`; `context` is the largest prompt and completion together."""
        self.model, self.stops, self.context, self.view_step = model, stops, context, view_step
        self.device = next(model.parameters()).device
        self.prefill_tokens = PREFILL_TOKENS_CPU if self.device.type == "cpu" else PREFILL_TOKENS_GPU
        self.speaking: list[Request] = []  # wait to speak
        self.groups: Groups = {}  # wait to be weighed
        self.took_branch = False  # last
        self.done: list[Completion] = []  # finished, not yet handed out; outlives an out-of-memory error
        self.weighing: list[Request] = []  # in the pass that runs
        self.at_work = 0  # slots that spoke in the last pass, or whose conversation was weighed
        self._set_up(slots)

    def _set_up(self, count: int) -> None:
        self.slots = Slots(count, self.context)
        self.cache = SlotCache(count + self.slots.scratch, round_up(self.context, VIEW_STEP))
        self.forward = Forward(self.model, self.cache, self.view_step)
        self.requests: dict[int, Request] = {}  # by slot
        self.made = np.zeros(count, dtype=np.int64)  # completion tokens so far
        self.limits = np.zeros(count, dtype=np.int64)
        self.temperatures = np.zeros(count, dtype=np.float32)
        self.numbers = np.zeros((count, 1), dtype=np.float64)

    # ------------------------------------------------------------ what the engine calls

    @property
    def room(self) -> int:
        """Slots that are free, and that no waiting prompt will want."""
        parked = sum(1 for conversation in self.groups if conversation)
        return self.slots.count - int(self.slots.active.sum()) - len(self.speaking) - parked

    @property
    def takes_more(self) -> bool:
        """True while there is room; and behind a branch, since others of its conversation may follow."""
        if sum(map(len, self.groups.values())) >= BRANCHES_AHEAD * self.slots.count:
            return False
        return self.room > 0 or self.took_branch

    @property
    def busy(self) -> bool:
        """True while anything is waiting or being spoken."""
        return bool(self.speaking or self.groups or self.requests)

    def take(self, request: Request) -> None:
        """Queue a prompt. Those with options wait together with the others that branch off the same conversation."""
        self.took_branch = bool(request.option_ids)
        if self.took_branch:
            self.groups.setdefault(request.prompt.turns[:-1], []).append(request)
        else:
            self.speaking.append(request)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """One pass: a token for every speaking slot, and the waiting prompts that fit. Gives what ended with it."""
        slots, self.took_branch = self.slots, False
        speaking = np.flatnonzero(slots.active)
        places = slots.ready[speaking]
        tokens = slots.tokens[speaking, places]
        plan = slots.plan(self.speaking, self.groups, self.prefill_tokens)
        self.weighing = plan.weighed
        for slot, request in plan.spoken:
            self._begin(slot, request)
        for source, target, length in plan.copies:
            self.cache.copy(source, target, length)
        logits = self.forward(speaking, tokens, places, plan.parts, plan.branches, plan.heirs)
        slots.ready[speaking] += 1
        drawing = np.concatenate([speaking, np.array([slot for slot, _ in plan.spoken], dtype=np.int64)])
        if len(drawing):
            self._take_tokens(drawing, logits[: len(drawing)])
        self._weigh(plan.weighed, plan.branches, logits[len(drawing) :])
        self.weighing = []
        weighed = {branch.slot for branch in plan.branches if branch.slot < slots.count}
        self.at_work = len(weighed.union(drawing.tolist()))
        done, self.done = self.done, []
        return done

    def so_far(self) -> list[Completion]:
        """What every speaking slot has said that no later token takes back; `finish` is ""."""
        found = []
        for slot, request in self.requests.items():
            size, made = len(request.ids), int(self.made[slot])
            text = self.stops.settled(self.slots.tokens[slot, size : size + made].tolist())
            found.append(Completion(request.prompt.id, text, "", size, request.computed, made))
        return found

    def shrink(self, smallest: int) -> bool:
        """Out of memory: halve the slots and start the active prompts anew (keyed sampling makes the same text).

        False if there are already `smallest` slots or fewer.
        """
        if self.slots.count <= smallest:
            return False
        self.speaking[:0] = self.requests.values()
        for request in self.weighing:
            self.take(request)
        self.weighing = []
        self._set_up(max(smallest, self.slots.count // 2))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def take_apart(self, slots: int) -> tuple[list[Completion], list[Request]]:
        """A pass failed: what had ended in it, and its other rows, to begin anew elsewhere. The rest still waits."""
        done, self.done = self.done, []
        ended = {completion.id for completion in done}
        rows = [row for row in (*self.requests.values(), *self.weighing) if row.prompt.id not in ended]
        self.weighing = []
        self._set_up(slots)
        return done, rows

    def _begin(self, slot: int, request: Request) -> None:
        """Make ready for the tokens that the slot will speak."""
        sampling = request.prompt.sampling
        self.requests[slot] = request
        self.made[slot], self.limits[slot] = 0, sampling.max_tokens
        self.temperatures[slot] = sampling.temperature
        if sampling.max_tokens > self.numbers.shape[1]:
            more = np.zeros((self.slots.count, sampling.max_tokens - self.numbers.shape[1]))
            self.numbers = np.concatenate([self.numbers, more], axis=1)
        if sampling.temperature > 0:
            key = sampling.key or request.prompt.id
            self.numbers[slot, : sampling.max_tokens] = uniforms(sampling.seed, key, sampling.max_tokens)

    # ------------------------------------------------------------ what a row has become

    def _take_tokens(self, rows: np.ndarray, logits: torch.Tensor) -> None:
        """Draw the next token of slots `rows` [n] from logits [n, V], and finish those that end with it."""
        numbers = self.numbers[rows, self.made[rows]]
        tokens = draw(logits, self.temperatures[rows], numbers)
        self.slots.tokens[rows, self.slots.ready[rows]] = tokens
        self.made[rows] += 1
        bad = tokens == NO_TOKEN
        ended = self.stops.is_stop_token(tokens) | (self.made[rows] >= self.limits[rows])
        maybe = self.stops.may_end(tokens) & ~ended
        for slot in rows[bad]:
            self._release(int(slot), "", "error", error=NO_NUMBERS)
            self._forget(int(slot))
        for slot in rows[(ended | maybe) & ~bad]:
            self._finish(int(slot))

    def _finish(self, slot: int) -> None:
        """End the row if its text has ended or its tokens are spent."""
        start, made = len(self.requests[slot].ids), int(self.made[slot])
        text, stopped = self.stops.text(self.slots.tokens[slot, start : start + made].tolist())
        if stopped or made >= self.limits[slot]:
            self._release(slot, text, "stop" if stopped else "length", made)

    def _release(self, slot: int, text: str, finish: str, tokens: int = 0, error: str = "") -> None:
        self.slots.active[slot] = False
        self.slots.touch(slot)
        self._answer(self.requests.pop(slot), text, finish, tokens, error)

    def _weigh(self, requests: Sequence[Request], branches: Sequence[Branch], logits: torch.Tensor) -> None:
        """Answer prompts with options: natural-log probabilities over the whole vocabulary, logits [n, V]."""
        if not requests:
            return
        wide = logits.float() if self.device.type == "mps" else logits.double()
        most = max(len(request.option_ids) for request in requests)
        ids = [[*request.option_ids, *[0] * (most - len(request.option_ids))] for request in requests]
        weights = torch.log_softmax(wide, dim=-1).gather(1, torch.tensor(ids, device=self.device)).tolist()
        for request, branch, row in zip(requests, branches, weights, strict=True):
            chosen = row[: len(request.option_ids)]
            if np.isfinite(chosen).all():
                self._answer(request, "", "stop", logprobs=tuple(chosen))
            else:
                self._forget(branch.slot)
                self._answer(request, "", "error", error=NO_NUMBERS)

    def _forget(self, row: int) -> None:
        """A prompt's numbers are not usable: forget its keys too, since a NaN gets through any mask."""
        if row >= self.slots.count or not self.slots.active[row]:
            self.cache.clear(row)
            self.slots.forget(row)

    def _answer(
        self, request: Request, text: str, finish: str, tokens: int = 0, error: str = "",
        logprobs: tuple[float, ...] = (),
    ) -> None:  # fmt: skip
        size = len(request.ids)
        self.done.append(
            Completion(request.prompt.id, text, finish, size, request.computed, tokens, error, logprobs=logprobs)
        )
