"""Continuous batching over slots: the decode loop of HFEngine, without rendering or loading.

Every slot keeps the tokens of its last conversation and their keys and values. A new prompt goes where its longest
prefix lies (or that prefix is copied), only its rest is computed, in the same pass in which the others speak their
next token, and it leaves its slot as soon as it ends.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Sequence

import numpy as np
import torch

from cai_experiment.engines.base import Completion
from cai_experiment.engines.cache import SlotCache, shared_prefix
from cai_experiment.engines.common import NO_NUMBERS, Request
from cai_experiment.engines.forward import VIEW_STEP, Forward, Part, round_up
from cai_experiment.engines.sampling import NO_TOKEN, draw, uniforms
from cai_experiment.engines.stops import StopRule

PREFILL_TOKENS_CPU, PREFILL_TOKENS_GPU = 2048, 8192  # of one pass (or one longer prompt): bounds its memory


class Loop:
    """The slots of one stream. Not shared between streams, so an adapter that changed meets no stale keys."""

    def __init__(self, model: Any, stops: StopRule, slots: int, context: int, view_step: int) -> None:
        """`model` is switched to `attention.NAME`; `context` is the largest prompt and completion together."""
        self.model, self.stops, self.context, self.view_step = model, stops, context, view_step
        self.device = next(model.parameters()).device
        self.prefill_tokens = PREFILL_TOKENS_CPU if self.device.type == "cpu" else PREFILL_TOKENS_GPU
        self.waiting: deque[Request] = deque()
        self.done: list[Completion] = []  # finished, not yet handed out; outlives an out-of-memory error
        self.passes = self.spoken = 0  # passes, and the tokens spoken in them: their ratio is the slots' occupancy
        self._set_up(slots)

    def _set_up(self, slots: int) -> None:
        self.slots = slots
        self.cache = SlotCache(slots, round_up(self.context, VIEW_STEP))
        self.forward = Forward(self.model, self.cache, self.view_step)
        self.requests: dict[int, Request] = {}  # by slot
        self.tokens = np.full((slots, self.context + 1), NO_TOKEN, dtype=np.int32)  # prompt, then completion
        self.ready = np.zeros(slots, dtype=np.int64)  # first tokens of a slot whose keys and values are there
        self.made = np.zeros(slots, dtype=np.int64)  # completion tokens so far
        self.limits = np.zeros(slots, dtype=np.int64)
        self.active = np.zeros(slots, dtype=bool)
        self.temperatures = np.zeros(slots, dtype=np.float32)
        self.numbers = np.zeros((slots, 1), dtype=np.float64)
        self.used = np.zeros(slots, dtype=np.int64)  # when its keys and values were last of use to anyone
        self.clock = 0

    # ------------------------------------------------------------ what the engine calls

    @property
    def room(self) -> int:
        """Prompts that can be taken now."""
        return self.slots - int(self.active.sum()) - len(self.waiting)

    @property
    def busy(self) -> bool:
        """True while anything is waiting or being spoken."""
        return bool(self.waiting) or bool(self.active.any())

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """One pass: a token for every speaking slot, and the waiting prompts that fit. Gives what ended with it."""
        speaking = np.flatnonzero(self.active)
        admitted = self._admit()
        parts = [self._part(slot) for slot in admitted]
        places = self.ready[speaking]
        logits = self.forward(speaking, self.tokens[speaking, places], places, parts)
        self.ready[speaking] += 1
        self.ready[admitted] = [part.end for part in parts]
        weighed = [slot for slot in admitted if self.requests[slot].option_ids]  # the last of `admitted`
        drawing = np.concatenate([speaking, np.array(admitted[: len(admitted) - len(weighed)], dtype=np.int64)])
        if len(drawing):
            self._take_tokens(drawing, logits[: len(drawing)])
        for slot, row in zip(weighed, logits[len(drawing) :], strict=True):
            self._weigh(slot, row)
        self.passes, self.spoken = self.passes + 1, self.spoken + len(drawing)
        done, self.done = self.done, []
        return done

    def shrink(self, smallest: int) -> bool:
        """Out of memory: halve the slots and start the active prompts anew (keyed sampling makes the same text).

        False if there are already `smallest` slots or fewer.
        """
        if self.slots <= smallest:
            return False
        self.waiting.extendleft(reversed(self.requests.values()))
        self._set_up(max(smallest, self.slots // 2))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    # ------------------------------------------------------------ who gets which slot

    def _admit(self) -> list[int]:
        """Give waiting prompts their slots, as many as one pass takes; those with options come last in the answer.

        What a prompt shares with another that is admitted in the same pass is computed once (`Forward.inherit`).
        """
        admitted: list[int] = []
        later: list[Request] = []
        planned = self.ready.copy()  # as `ready` will be after this pass
        room = self.prefill_tokens
        while self.waiting and room > 0 and not self.active.all():
            request = self.waiting.popleft()
            shared = shared_prefix(self.tokens, planned, request.ids)
            if admitted and len(request.ids) - shared.max() > room:
                later.append(request)
                continue
            slot = self._place(request, shared, admitted)
            planned[slot] = len(request.ids)
            room -= request.computed
            admitted.append(slot)
        self.waiting.extendleft(reversed(later))
        return sorted(admitted, key=lambda slot: bool(self.requests[slot].option_ids))

    def _place(self, request: Request, shared: np.ndarray, fresh: Sequence[int]) -> int:
        """Choose a free slot: the one that this prompt continues, else the longest unused, with the prefix copied.

        `shared` [slots] is what each holds of the prompt when this pass is done; the `fresh` ones get it in this pass.
        """
        usable = np.minimum(shared, len(request.ids) - 1)  # the last token is computed in any case: it gives the logits
        source = int(usable.argmax())
        kept = int(usable[source])
        continues = np.flatnonzero(~self.active & (shared == self.ready) & (usable == kept) & (usable > 0))
        slot = int(continues[0]) if len(continues) else int(np.where(self.active, self.clock + 1, self.used).argmin())
        if usable[slot] < kept:
            if source in fresh:
                self.forward.inherit(source, slot, kept)
            else:
                self.cache.copy(source, slot, kept)
            self._touch(source)
        self._fill(slot, request, kept)
        return slot

    def _fill(self, slot: int, request: Request, kept: int) -> None:
        sampling, size = request.prompt.sampling, len(request.ids)
        request.computed = size - kept
        self.requests[slot], self.active[slot] = request, True
        self.tokens[slot, :size], self.tokens[slot, size:] = request.ids, NO_TOKEN
        self.ready[slot], self.made[slot] = kept, 0
        self.limits[slot], self.temperatures[slot] = sampling.max_tokens, sampling.temperature
        if sampling.max_tokens > self.numbers.shape[1]:
            more = np.zeros((self.slots, sampling.max_tokens - self.numbers.shape[1]))
            self.numbers = np.concatenate([self.numbers, more], axis=1)
        if sampling.temperature > 0 and not request.option_ids:
            key = sampling.key or request.prompt.id
            self.numbers[slot, : sampling.max_tokens] = uniforms(sampling.seed, key, sampling.max_tokens)

    def _touch(self, slot: int) -> None:
        self.clock += 1
        self.used[slot] = self.clock

    def _part(self, slot: int) -> Part:
        """What the slot lacks of its prompt."""
        start = int(self.ready[slot])
        return Part(slot, start, self.requests[slot].ids[start:])

    # ------------------------------------------------------------ what a row has become

    def _take_tokens(self, slots: np.ndarray, logits: torch.Tensor) -> None:
        """Draw the next token of `slots` [n] from logits [n, V], and finish the rows that end with it."""
        numbers = self.numbers[slots, self.made[slots]]
        tokens = draw(logits, self.temperatures[slots], numbers)
        self.tokens[slots, self.ready[slots]] = tokens
        self.made[slots] += 1
        bad = tokens == NO_TOKEN
        ended = self.stops.is_stop_token(tokens) | (self.made[slots] >= self.limits[slots])
        maybe = self.stops.may_end(tokens) & ~ended
        for slot in slots[bad]:
            self._fail(int(slot))
        for slot in slots[(ended | maybe) & ~bad]:
            self._finish(int(slot))

    def _finish(self, slot: int) -> None:
        """End the row if its text has ended or its tokens are spent."""
        start, made = len(self.requests[slot].ids), int(self.made[slot])
        text, stopped = self.stops.text(self.tokens[slot, start : start + made].tolist())
        if stopped or made >= self.limits[slot]:
            self._release(slot, text, "stop" if stopped else "length", made)

    def _weigh(self, slot: int, logits: torch.Tensor) -> None:
        """Answer a prompt with options: natural-log probabilities over the whole vocabulary, logits [V]."""
        wide = logits.float() if self.device.type == "mps" else logits.double()
        chosen = torch.log_softmax(wide, dim=-1)[list(self.requests[slot].option_ids)].tolist()
        if np.isfinite(chosen).all():
            self._release(slot, "", "stop", logprobs=tuple(chosen))
        else:
            self._fail(slot)

    def _fail(self, slot: int) -> None:
        """The row's numbers are not usable: forget its keys too, since a NaN gets through any mask."""
        self.cache.clear(slot)
        self.ready[slot] = 0
        self._release(slot, "", "error", error=NO_NUMBERS)

    def _release(self, slot: int, text: str, finish: str, tokens: int = 0, **more: Any) -> None:
        request = self.requests.pop(slot)
        self.active[slot] = False
        if not request.option_ids:  # what was spoken goes on in the next prompt; behind a verdict nothing follows
            self._touch(slot)
        done = Completion(request.prompt.id, text, finish, len(request.ids), request.computed, tokens, **more)
        self.done.append(done)
