"""The transformers engine: continuous batching for any causal LM, base or chat, on CPU, CUDA or MPS.

On a CPU in float32 a completion is the same to the last bit whatever else is in the batch, so a run that was killed and
resumed writes the same bytes as one that was not. A probe at load checks this on the machine at hand.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Iterable, Iterator, Sequence

import torch

from cai_experiment.engines import attention, culprits
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.engines.cache import bucket
from cai_experiment.engines.common import (
    DEADLOCK,
    Intake,
    Request,
    choose_by_stream,
    close_model,
    core_of,
    is_out_of_memory,
    keep_freed_memory,
    request_for,
)
from cai_experiment.engines.forward import ROWS, VIEW_STEP, round_up
from cai_experiment.engines.loop import Loop
from cai_experiment.engines.probe import probe, refuse_unservable
from cai_experiment.engines.render import Renderer
from cai_experiment.engines.slots import SCRATCH_SHARE
from cai_experiment.errors import EngineError
from cai_experiment.models.hardware import detect
from cai_experiment.models.serving import LIVE_ROW_TOKENS

LEAST_SLOTS = 16  # between these bounds as many as free memory holds
MOST_SLOTS_CPU, MOST_SLOTS_CUDA = 192, 256
WORK_BYTES = 4e9  # of a pass beside weights and cache: activations of 8,192 tokens, logits, one layer's keys copied


class HFEngine:
    """Speaks with a transformers model in memory. Several streams may be open at once; each has its own slots."""

    name = "hf"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        renderer: Renderer,
        batch_size: int | None = None,
        facts: dict[str, object] | None = None,
    ) -> None:
        """`model` may be a PEFT model; adapters act as they are set when a stream runs. `facts` go into `describe`.

        Raises EngineError for an architecture that the batching loop cannot serve.
        """
        self.model, self.tokenizer, self.renderer = model, tokenizer, renderer
        self.facts = facts or {}
        self.first_line = ""
        self._core = core_of(model)
        self._plain_attention = self._core.config._attn_implementation
        self._was_training = model.training
        on_cpu = self._core.device.type == "cpu"
        if on_cpu:
            keep_freed_memory()
        self.smallest = ROWS if on_cpu else 1
        wanted = batch_size or self._slots_by_memory()
        self.slots = self._wanted = round_up(wanted, ROWS) if on_cpu else wanted
        self.halved = 0  # how often memory ran out
        refuse_unservable(self._core, renderer.max_length)
        attention.register()
        self._switch()
        try:
            self.probe = probe(self._core, renderer.max_length, self._plain_attention)
        finally:
            self._switch_back()

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any, renderer: Renderer, batch_size: int | None = None) -> HFEngine:
        """An engine over weights that are loaded already, e.g. those that DPO has just trained."""
        return cls(model, tokenizer, renderer, batch_size)

    def _slots_by_memory(self) -> int:
        """As many as fit into what the weights leave free; LEAST_SLOTS on Apple silicon, which shares its memory."""
        device, most = self._core.device, MOST_SLOTS_CPU
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what loading left behind is free as well
            free, most = torch.cuda.mem_get_info(device)[0] - WORK_BYTES, MOST_SLOTS_CUDA
        elif device.type == "cpu":
            free = detect().ram_gb * 2**30 / 4  # beside weights, training and the rest of the machine
        else:
            return LEAST_SLOTS
        limit = round_up(self.renderer.max_length, VIEW_STEP)
        return slots_that_fit(free, self._core.config.get_text_config(), self._core.dtype.itemsize, limit, most)

    def _switch(self) -> None:
        """Row attention and eval mode; done before each step, since what runs between steps may have changed them."""
        if self._core.config._attn_implementation != attention.NAME:
            self._core.set_attn_implementation(attention.NAME)
        if self.model.training:
            self.model.eval()

    def _switch_back(self) -> None:
        self._core.set_attn_implementation(self._plain_attention)
        self.model.train(self._was_training)

    @property
    def width(self) -> int:
        """How many prompts it wants at a time."""
        return self.slots

    def describe(self) -> dict[str, object]:
        """What the manifest records."""
        return {
            **self.facts,
            "engine": self.name,
            "architecture": type(self._core).__name__,
            "layout": self.renderer.layout,
            "dtype": str(self._core.dtype).removeprefix("torch."),
            "device": str(self._core.device),
            "threads": torch.get_num_threads(),
            "max_length": self.renderer.max_length,
            "slots": self.slots,
            "probe": asdict(self.probe),
        }

    # ------------------------------------------------------------ speaking

    def _loop(self, slots: int) -> Loop:
        return Loop(self._core, self.renderer.stops, slots, self.renderer.max_length, self.probe.view_step)

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """See `base.Engine.stream`. Prompts are taken while slots are free; completions come as soon as they end.

        A prompt that makes its pass fail comes back as its own error. Raises EngineError if `prompts` gives None while
        nothing is in work, or if even a harmless prompt fails.
        """
        loop = self._loop(self.slots)
        intake = Intake(self.renderer, prompts)
        try:
            while intake.open or loop.busy:
                moved = False
                while intake.open and loop.takes_more and (item := intake.take()) is not None:
                    if isinstance(item, Request):
                        loop.take(item)
                    else:
                        moved = True
                        yield item
                if loop.busy:
                    yield from self._step(loop)
                elif intake.open and not moved:
                    raise EngineError(DEADLOCK)
        finally:
            self._switch_back()

    def grow(self, prompt: Prompt) -> Iterator[Completion]:
        """One prompt's completion as it grows: after each pass what is said so far (`finish` is ""), then what `stream`
        would give, token for token. Closing the iterator stops at once.
        """
        request = request_for(self.renderer, prompt)
        if isinstance(request, Completion):
            yield request
            return
        loop = self._loop(self.smallest)
        loop.take(request)
        try:
            while loop.busy:
                yield from list(self._step(loop)) or loop.so_far()
        finally:
            self._switch_back()

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[tuple[float, ...]]:
        """See `base.Engine.choose`. Raises EngineError for a prompt that cannot be weighed."""
        return choose_by_stream(self, prompts, options)

    def _step(self, loop: Loop) -> Iterator[Completion]:
        """One pass. Out of memory, the slots are halved; where that is no way out, the rows at fault are found."""
        self._switch()
        try:
            done = loop.step()
        except Exception as error:  # of whatever library
            memory = isinstance(error, RuntimeError) and is_out_of_memory(error)
            broken = culprits.failure(error, loop.slots.count)
        else:
            yield from done
            return
        if memory and loop.shrink(self.smallest):  # outside the handler, whose traceback keeps tensors alive
            self.slots, self.halved = loop.slots.count, self.halved + 1
            return
        self.slots = self._wanted if memory else loop.slots.count
        done, rows = loop.take_apart(self.slots)
        yield from done
        yield from culprits.apart(rows, self._speak, broken)

    def _speak(self, rows: list[Request]) -> list[Completion]:
        """Speak to these alone, in slots of their own."""
        speaking = sum(not request.option_ids for request in rows)
        slots = min(self._wanted, max(1, round_up(speaking, self.smallest)))
        loop, done = self._loop(max(self.smallest, slots)), list[Completion]()
        for request in rows:
            loop.take(request)
        while loop.busy:
            self._switch()
            done += loop.step()
        return done

    # ------------------------------------------------------------ giving back

    def release_for_training(self) -> tuple[Any, Any]:
        """(model, tokenizer) as they were before this engine: their own attention, their own mode."""
        self._switch_back()
        return self.model, self.tokenizer

    def close(self) -> None:
        """Forget the model and give its memory back."""
        self._core = None
        close_model(self)


def slots_that_fit(free: float, config: Any, item_bytes: int, limit: int, most: int) -> int:
    """How many slots' keys and values `free` bytes hold: LEAST_SLOTS to `most`.

    All slots are as long as the longest row (in the cache's buckets, at most `limit` columns), so each is counted with
    twice the tokens of an average row. Longer rows than that are no fault: out of memory, the slots are halved.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    columns = bucket(2 * LIVE_ROW_TOKENS, limit) + 1
    row = 2 * config.num_hidden_layers * heads * size * item_bytes * columns * (1 + 1 / SCRATCH_SHARE)
    return max(LEAST_SLOTS, min(most, int(free / row)))
