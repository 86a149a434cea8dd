"""The engine of milestones 2 and 3: vLLM with 16-bit weights (or an AWQ or FP8 checkpoint), in a process of its own.

Its own process, because vLLM does not give GPU memory back while its process lives, and training needs it. Here prompts
are rendered to token ids, so no row of data can speak for us, and completions are cut by every engine's rule. vLLM
keeps keys and values by content, so an example's growing conversation is computed once; a request starts as soon as it
is sent and ends when it ends. Each request has a seed from (run seed, key); the draw is vLLM's own, so texts are not
those of other engines, and the last bits may depend on the batch. A child that dies or hangs is started again
(revived.py).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Iterable, Iterator, Sequence

from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.engines.revived import Answers, Revived
from cai_experiment.errors import EngineError
from cai_experiment.models.hardware import POD_WORKSPACE, on_pod
from cai_experiment.models.serving import VLLM_SHARE

if TYPE_CHECKING:
    from cai_experiment.engines.common import Request
    from cai_experiment.engines.render import Renderer

WORKER = "cai_experiment.engines.vllm_worker"
AHEAD = 1.25  # prompts sent for each slot: the next one lies ready when a row ends
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # the files are there before it starts
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # see vllm_worker
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # of several GPUs: a fork of a process that uses CUDA fails
}
NO_MEMORY = ("out of memory", "OutOfMemory", "No available memory", "larger than the available KV cache")


@dataclass(frozen=True, slots=True)
class VLLMSettings:
    """What vLLM is started with. `folder` holds config.json, and weights unless `random_weights`."""

    folder: str
    dtype: str = "auto"
    slots: int = 64  # rows at work at once, at most
    tensor_parallel: int = 1
    seed: int = 0
    random_weights: bool = False
    memory_share: float = VLLM_SHARE
    deadline: float = 600.0  # seconds without any answer, after which the child is started again

    def arguments(self, max_length: int) -> dict[str, object]:
        """The arguments of vLLM's EngineArgs."""
        return {
            "model": self.folder,
            "skip_tokenizer_init": self.random_weights,
            "dtype": self.dtype,
            "load_format": "dummy" if self.random_weights else "safetensors",
            "trust_remote_code": False,
            "max_model_len": max_length,
            "max_num_seqs": self.slots,
            "gpu_memory_utilization": self.memory_share,
            "tensor_parallel_size": self.tensor_parallel,
            "enable_prefix_caching": True,
            "generation_config": "vllm",  # no defaults of the model's own: each request says everything
            "seed": self.seed,
            "disable_log_stats": True,
        }


class VLLMEngine:
    """Speaks through a child process that holds vLLM. Several streams may be open at once."""

    name = "vllm"
    elsewhere = True  # in its own process

    def __init__(
        self, settings: VLLMSettings, tokenizer: Any, renderer: Renderer, facts: dict[str, object] | None = None
    ) -> None:
        """Start the child and wait until it has loaded. EngineError: it could not; one line says why."""
        self.settings, self.tokenizer, self.renderer = settings, tokenizer, renderer
        self.facts = facts or {}
        self.first_line = ""
        opening = {"engine": settings.arguments(renderer.max_length), "parent": os.getpid()}
        self._child = Revived(WORKER, _environment(), opening, settings.deadline, self._remedy)
        print(f"vLLM loads {self.facts.get('model', settings.folder)} in a process of its own; that takes minutes, "
              f"and its log is {self._child.log}", file=sys.stderr, flush=True)  # fmt: skip
        self._child.wait_until_loaded()

    @property
    def width(self) -> int:
        """How many prompts it wants at a time."""
        return int(AHEAD * self.settings.slots)

    @property
    def loading(self) -> bool:
        """True while a child loads: it answers nothing, and is not hanging."""
        return self._child.loading

    def describe(self) -> dict[str, object]:
        """What the manifest records. There is no probe: a batch's shape may change the last bits here."""
        return {
            **self.facts,
            "engine": self.name,
            **self._child.ready,
            "layout": self.renderer.layout,
            "device": "cuda",
            "slots": self.settings.slots,
            "tensor_parallel": self.settings.tensor_parallel,
            "probe": None,
        }

    # ------------------------------------------------------------ speaking

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """See `base.Engine.stream`. A prompt that kills vLLM even alone comes back with finish="error".

        Raises EngineError if vLLM dies again and again, or `prompts` gives None with nothing in work.
        """
        from cai_experiment.engines.common import DEADLOCK, Intake, Request

        intake, answers = Intake(self.renderer, prompts), Answers()
        asked: dict[int, Request] = {}
        try:
            while intake.open or asked:
                moved = False
                while intake.open and len(asked) < self.width and (item := intake.take()) is not None:
                    if isinstance(item, Request):
                        message = {"ids": item.ids.tolist(), "params": self._params(item)}
                        asked[self._child.ask(item.prompt.id, message, answers)] = item
                    else:
                        moved = True
                        yield item
                if asked:
                    message = self._child.answer(answers)
                    yield self._completion(asked.pop(message["n"]), message)
                elif intake.open and not moved:
                    raise EngineError(DEADLOCK)
        finally:
            self._child.drop(list(asked))

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[tuple[float, ...]]:
        """See `base.Engine.choose`. Raises EngineError for a prompt that cannot be weighed."""
        from cai_experiment.engines.common import choose_by_stream

        return choose_by_stream(self, prompts, options)

    def close(self) -> None:
        """End the child and wait until it is gone, its GPU memory with it."""
        self._child.close()

    def _params(self, request: Request) -> dict[str, object]:
        """The arguments of vLLM's SamplingParams. Options: one greedy token, and their raw log-probabilities."""
        sampling = request.prompt.sampling
        if request.option_ids:
            return {"max_tokens": 1, "temperature": 0.0, "logprob_token_ids": list(request.option_ids),
                    "detokenize": False}  # fmt: skip
        # vLLM stops at our stop strings; where exactly the text ends is decided by StopRule, as everywhere
        strings = [] if self.settings.random_weights else list(self.renderer.stop_strings)
        return {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "seed": seed_of(sampling.seed, sampling.key or request.prompt.id),
            "stop": strings,
            "stop_token_ids": list(self.renderer.stop_token_ids),
            "detokenize": bool(strings),
        }

    def _completion(self, request: Request, message: dict[str, Any]) -> Completion:
        name, size = request.prompt.id, len(request.ids)
        finish = message.get("finish", "error")
        if "error" in message or finish not in ("stop", "length"):
            error = message.get("error", f"vLLM ended it with {finish!r}")
            return Completion(name, "", "error", size, error=error, final=message.get("final", ""))
        computed, tokens = size - message["cached"], message["tokens"]
        if request.option_ids:
            found = message.get("logprobs", {})
            weights = tuple(float(found.get(str(token), math.nan)) for token in request.option_ids)
            if not all(map(math.isfinite, weights)):
                from cai_experiment.engines.common import NO_NUMBERS

                return Completion(name, "", "error", size, computed, error=NO_NUMBERS)
            return Completion(name, "", "stop", size, computed, logprobs=weights)
        text, stopped = self.renderer.stops.text(tokens)
        return Completion(name, text, "stop" if stopped else finish, size, computed, len(tokens))

    def _remedy(self, why: str) -> str:
        """What mends a child that has ended for this reason; "" if nothing is known."""
        if "Free memory on device" in why:
            return "another process holds the GPU (see nvidia-smi; a second vLLM of this run, for --critic, counts too)"
        if re.search("|".join(NO_MEMORY), why):
            return f"use a --batch-size below {self.settings.slots}, --engine unsloth (4-bit), or a quantised --model"
        return ""


def seed_of(seed: int, key: str) -> int:
    """A request's seed for vLLM: 63 bits of the BLAKE2b hash of run seed and key."""
    digest = hashlib.blake2b(f"{seed}\x00{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _environment() -> dict[str, str]:
    """What the child's environment has beside ours; on a pod what vLLM compiles outlives the container."""
    keep = {"VLLM_CACHE_ROOT": str(POD_WORKSPACE / "vllm")} if on_pod() and "VLLM_CACHE_ROOT" not in os.environ else {}
    return {**ENVIRONMENT, **keep}
