"""The transformers engine: continuous batching for any causal LM, base or chat, on CPU, CUDA or MPS.

On a CPU in float32 a completion is the same to the last bit whatever else is in the batch, so a run that was killed and
resumed writes the same bytes as one that was not. A probe at load checks this on the machine at hand.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, Iterable, Iterator, Sequence

import numpy as np
import torch

from cai_experiment.engines import attention
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.engines.forward import ROWS, round_up
from cai_experiment.engines.loop import Loop, Request
from cai_experiment.engines.probe import probe, refuse_unservable
from cai_experiment.engines.render import Renderer
from cai_experiment.errors import EngineError

SLOTS_CPU, SLOTS_GPU = 32, 16


class HFEngine:
    """Speaks with a transformers model that is in memory. Several streams may be open at once; each has its own slots."""

    name = "hf"

    def __init__(
        self, model: Any, tokenizer: Any, renderer: Renderer, batch_size: int | None = None,
        facts: dict[str, object] | None = None,
    ) -> None:
        """`model` may be a PEFT model; adapters act as they are set when a stream runs. `facts` go into `describe`.

        Raises EngineError for an architecture that the batching loop cannot serve.
        """
        self.model, self.tokenizer, self.renderer = model, tokenizer, renderer
        self.facts = facts or {}
        self.first_line = str(self.facts.get("first_line", ""))
        self._core = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._plain_attention = self._core.config._attn_implementation
        self._was_training = model.training
        on_cpu = self._core.device.type == "cpu"
        self.smallest = ROWS if on_cpu else 1
        wanted = batch_size or (SLOTS_CPU if on_cpu else SLOTS_GPU)
        self.slots = round_up(wanted, ROWS) if on_cpu else wanted
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

    def _switch(self) -> None:
        """Row attention and eval mode; done before each step, since what runs between steps may have changed them."""
        if self._core.config._attn_implementation != attention.NAME:
            self._core.set_attn_implementation(attention.NAME)
        if self.model.training:
            self.model.eval()

    def _switch_back(self) -> None:
        self._core.set_attn_implementation(self._plain_attention)
        self.model.train(self._was_training)

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

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """See `base.Engine.stream`. Prompts are taken while slots are free; completions come as soon as they end.

        Raises EngineError if `prompts` gives None while nothing is in work, and if memory runs out with the fewest slots.
        """
        loop = Loop(self._core, self.renderer.stops, self.slots, self.renderer.max_length, self.probe.view_step)
        source, open_ended = iter(prompts), True
        try:
            while open_ended or loop.busy:
                moved = False
                while open_ended and loop.room > 0:
                    prompt = next(source, _END)
                    if prompt is _END:
                        open_ended = False
                    elif prompt is None:
                        break
                    elif isinstance(request := self._request(prompt), Request):
                        loop.waiting.append(request)
                    else:
                        moved = True
                        yield request
                if loop.busy:
                    yield from self._step(loop)
                elif open_ended and not moved:
                    raise EngineError("the engine waits for prompts and the prompts wait for the engine")
        finally:
            self._switch_back()

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[tuple[float, ...]]:
        """See `base.Engine.choose`. Raises EngineError for a prompt that cannot be weighed."""
        return choose_by_stream(self, prompts, options)

    def _step(self, loop: Loop) -> list[Completion]:
        self._switch()
        try:
            return loop.step()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        if not loop.shrink(self.smallest):  # outside the handler, whose traceback keeps tensors alive
            raise EngineError(
                f"out of memory with {loop.slots} prompts at a time",
                "use a smaller --model, --quantization 4bit or a shorter --max-length",
            )
        self.slots, self.halved = loop.slots, self.halved + 1
        return []

    def _request(self, prompt: Prompt) -> Request | Completion:
        """Render a prompt. Whatever is wrong with it comes back as its own completion and stops no other."""
        try:
            options = tuple(self.renderer.option_ids(prompt.options)) if prompt.options else ()
            new = 1 if options else prompt.sampling.max_tokens
            if new < 1:
                raise ValueError(f"max_tokens is {new}, and must be 1 or more")
            ids = self.renderer.prompt_ids(prompt.turns, prompt.speak_as, max_tokens=new)
            return Request(prompt, np.array(ids, dtype=np.int32), options)
        except Exception as error:  # noqa: BLE001 - any fault of one prompt
            return Completion(prompt.id, "", "error", error=f"{error}" or type(error).__name__)

    # ------------------------------------------------------------ giving back

    def release_for_training(self) -> tuple[Any, Any]:
        """(model, tokenizer) as they were before this engine: their own attention, their own mode."""
        self._switch_back()
        return self.model, self.tokenizer

    def close(self) -> None:
        """Forget the model and give its memory back."""
        self.model = self._core = self.tokenizer = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


_END = object()


def choose_by_stream(engine: Any, prompts: Sequence[Prompt], options: Sequence[str]) -> list[tuple[float, ...]]:
    """`choose` by way of `stream`, for any engine: prompts are renamed by place, since ids may repeat."""
    asked = [replace(prompt, id=str(i), options=tuple(options)) for i, prompt in enumerate(prompts)]
    found = {completion.id: completion for completion in engine.stream(asked)}
    for prompt, again in zip(prompts, asked):
        if found[again.id].finish == "error":
            raise EngineError(f"prompt {prompt.id}: {found[again.id].error}")
    return [found[again.id].logprobs for again in asked]


def _is_out_of_memory(error: RuntimeError) -> bool:
    """torch.OutOfMemoryError on a GPU; a plain RuntimeError of the allocator on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
