"""What the engines over models in memory share: requests, `choose`, memory errors, giving memory back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Iterable, Sequence

import numpy as np

from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.engines.render import Renderer
from cai_experiment.errors import EngineError

NO_NUMBERS = "the model's logits for this prompt are not finite (NaN)"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
TURN_MARKUP = 10  # tokens around a turn, at most
DEADLOCK = "the engine waits for prompts and the prompts wait for the engine"


@dataclass(slots=True)
class Request:
    """A rendered prompt. `option_ids` not empty: weigh these, do not speak."""

    prompt: Prompt
    ids: np.ndarray  # int32 [prompt tokens]
    option_ids: tuple[int, ...] = ()
    stem: int = 0  # of a prompt with options: tokens of the conversation before its question (nearly: at most so many)
    computed: int = 0  # prompt tokens that no slot held


def request_for(renderer: Renderer, prompt: Prompt) -> Request | Completion:
    """Render a prompt. Whatever is wrong with it comes back as its own completion and stops no other."""
    try:
        options = tuple(renderer.option_ids(prompt.options)) if prompt.options else ()
        new = 1 if options else prompt.sampling.max_tokens
        if new < 1:
            raise ValueError(f"max_tokens is {new}, and must be 1 or more")
        ids = renderer.prompt_ids(prompt.turns, prompt.speak_as, max_tokens=new)
        stem = max(0, len(ids) - len(renderer.encode(prompt.turns[-1].text, False)) - TURN_MARKUP) if options else 0
        return Request(prompt, np.array(ids, dtype=np.int32), options, stem)
    except Exception as error:  # any fault of one prompt is its own
        return Completion(prompt.id, "", "error", error=str(error) or type(error).__name__)


class Intake:
    """The prompts of a stream, rendered as they are taken. `open` is False once they have ended."""

    def __init__(self, renderer: Renderer, prompts: Iterable[Prompt | None]) -> None:
        self.renderer, self.source = renderer, iter(prompts)
        self.open = True

    def take(self) -> Request | Completion | None:
        """The next request, or the error that its prompt came to; None if there is nothing (now, or for good)."""
        try:
            prompt = next(self.source)
        except StopIteration:
            self.open = False
            return None
        return None if prompt is None else request_for(self.renderer, prompt)


def choose_by_stream(engine: Any, prompts: Sequence[Prompt], options: Sequence[str]) -> list[tuple[float, ...]]:
    """`Engine.choose` by way of `stream`: prompts are renamed by place, since ids may repeat.

    Raises EngineError for a prompt that cannot be weighed.
    """
    asked = [replace(prompt, id=str(i), options=tuple(options)) for i, prompt in enumerate(prompts)]
    found = {completion.id: completion for completion in engine.stream(asked)}
    for prompt, again in zip(prompts, asked, strict=True):
        if found[again.id].finish == "error":
            raise EngineError(f"prompt {prompt.id}: {found[again.id].error}")
    return [found[again.id].logprobs for again in asked]


def core_of(model: Any) -> Any:
    """The transformers model itself, without PEFT's wrapper (adapters stay in its layers)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch.OutOfMemoryError on a GPU; a plain RuntimeError of the allocator on a CPU."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def memory_error(prompts: int) -> EngineError:
    """For memory that ran out although the batch cannot be halved any more."""
    return EngineError(
        f"out of memory with {prompts} prompts at a time", "use --quantization 4bit or a smaller --model"
    )


def keep_freed_memory() -> None:
    """Have the C library keep what a pass frees for the next one, instead of giving megabytes back and asking anew.

    On a CPU page faults otherwise take an eighth of the time. glibc only; elsewhere nothing happens. `close_model`
    gives back what was kept.
    """
    mallopt = _of_libc("mallopt")
    if mallopt is not None and any(mallopt(M_MMAP_THRESHOLD, size) for size in (1 << 30, 1 << 25)):  # older: 32 MB
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def _of_libc(name: str) -> Any:
    import ctypes

    return getattr(ctypes.CDLL(None), name, None)


def close_model(engine: Any) -> None:
    """Drop an engine's model and tokenizer and give the GPU's memory back.

    Unsloth hangs functions that hold the model on the model itself: only the collector frees such a ring.
    """
    engine.model = engine.tokenizer = None
    give_memory_back()


def give_memory_back() -> None:
    """Collect what nobody holds any more, and give it back to the system and to other users of the GPU."""
    import gc

    import torch

    gc.collect()
    if (trim := _of_libc("malloc_trim")) is not None:
        trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
