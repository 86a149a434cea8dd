"""The engine of milestones 2 and 3: vLLM with 16-bit weights (or an AWQ or FP8 checkpoint), in a process of its own.

Its own process, because vLLM does not give GPU memory back while its process lives, and training needs it. Here prompts
are rendered to token ids, so no row of data can speak for us, and completions are cut by every engine's rule. vLLM
keeps keys and values by content, so an example's growing conversation is computed once; a request starts as soon as it
is sent and ends when it ends. Each request has a seed from (run seed, key); the draw is vLLM's own, so texts are not
those of other engines, and the last bits may depend on the batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import queue
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Iterable, Iterator, Sequence

from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.engines.process import Child, Gone
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

    def __init__(
        self, settings: VLLMSettings, tokenizer: Any, renderer: Renderer, facts: dict[str, object] | None = None
    ) -> None:
        """Start the child and wait until it has loaded. EngineError: it could not; one line says why."""
        self.settings, self.tokenizer, self.renderer = settings, tokenizer, renderer
        self.facts = facts or {}
        self.first_line = ""
        self._numbers = itertools.count()
        self._routes: dict[int, queue.Queue[dict[str, Any] | None]] = {}
        self._start: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._fatal, self._ended, self._failed = "", False, False
        self._child = Child(WORKER, _environment(), self._hear)
        print(f"vLLM loads {self.facts.get('model', settings.folder)} in a process of its own; that takes minutes, "
              f"and its log is {self._child.log}", file=sys.stderr, flush=True)  # fmt: skip
        try:
            self._child.say({"engine": settings.arguments(renderer.max_length), "parent": os.getpid()})
            message = self._start.get()
        except Gone:
            message = None
        except BaseException:
            self.close()
            raise
        if message is None or "ready" not in message:
            fault = self._fault("did not load")
            self.close()
            raise fault
        self.ready: dict[str, object] = message["ready"]

    def describe(self) -> dict[str, object]:
        """What the manifest records. There is no probe: a batch's shape may change the last bits here."""
        return {
            **self.facts,
            "engine": self.name,
            **self.ready,
            "layout": self.renderer.layout,
            "device": "cuda",
            "slots": self.settings.slots,
            "tensor_parallel": self.settings.tensor_parallel,
            "probe": None,
        }

    # ------------------------------------------------------------ speaking

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """See `base.Engine.stream`. Raises EngineError if vLLM dies, or `prompts` gives None with nothing in work."""
        from cai_experiment.engines.common import DEADLOCK, Intake, Request

        intake = Intake(self.renderer, prompts)
        answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        asked: dict[int, Request] = {}
        try:
            while intake.open or asked:
                moved = False
                while intake.open and len(asked) < AHEAD * self.settings.slots and (item := intake.take()) is not None:
                    if isinstance(item, Request):
                        self._ask(item, asked, answers)
                    else:
                        moved = True
                        yield item
                if asked:
                    message = answers.get()
                    if message is None:
                        raise self._fault("died")
                    yield self._completion(asked.pop(message["n"]), message)
                elif intake.open and not moved:
                    raise EngineError(DEADLOCK)
        finally:
            self._drop(asked)

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[tuple[float, ...]]:
        """See `base.Engine.choose`. Raises EngineError for a prompt that cannot be weighed."""
        from cai_experiment.engines.common import choose_by_stream

        return choose_by_stream(self, prompts, options)

    def close(self) -> None:
        """End the child and wait until it is gone, its GPU memory with it."""
        self._child.close(keep_log=self._failed)  # a message has named it

    def _ask(self, request: Request, asked: dict[int, Request], answers: queue.Queue[dict[str, Any] | None]) -> None:
        number = next(self._numbers)
        asked[number], self._routes[number] = request, answers
        try:
            self._child.say({"n": number, "ids": request.ids.tolist(), "params": self._params(request)})
        except Gone:
            raise self._fault("died") from None
        if self._ended:  # after our entry into the routes, so nobody would tell us
            raise self._fault("died")

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
            return Completion(name, "", "error", size, error=message.get("error", f"vLLM ended it with {finish!r}"))
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

    # ------------------------------------------------------------ the child

    def _hear(self, message: dict[str, Any] | None) -> None:
        """Called by the listening thread: an answer goes to the stream that asked; the end goes to all of them."""
        if message is not None and "n" in message:
            if (route := self._routes.pop(message["n"], None)) is not None:
                route.put(message)
        elif message is not None and "fatal" in message:
            self._fatal = message["fatal"]
        elif message is not None:
            self._start.put(message)
        else:
            self._ended = True
            for waiting in {id(route): route for route in list(self._routes.values())}.values():
                waiting.put(None)
            self._start.put(None)

    def _drop(self, asked: dict[int, Request]) -> None:
        """Forget the requests of a stream that is given up."""
        for number in asked:
            self._routes.pop(number, None)
        if asked and not self._ended:
            with contextlib.suppress(Gone):
                self._child.say({"drop": list(asked)})

    def _fault(self, what: str) -> EngineError:
        """One line on why the child is not there, with what mends it."""
        self._failed = True
        why = " ".join(self._fatal.split())[:300] or f"its process {self._child.how_it_ended()}"
        step = f"its log is {self._child.log}"
        if "Free memory on device" in why:
            step = "another process holds the GPU (see nvidia-smi; a second vLLM of this run, for --critic, counts too)"
        elif re.search("|".join(NO_MEMORY), why):
            step = f"use a --batch-size below {self.settings.slots}, --engine unsloth (4-bit), or a quantised --model"
        return EngineError(f"vLLM {what}: {why}", step)


def seed_of(seed: int, key: str) -> int:
    """A request's seed for vLLM: 63 bits of the BLAKE2b hash of run seed and key."""
    digest = hashlib.blake2b(f"{seed}\x00{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _environment() -> dict[str, str]:
    """What the child's environment has beside ours; on a pod what vLLM compiles outlives the container."""
    keep = {"VLLM_CACHE_ROOT": str(POD_WORKSPACE / "vllm")} if on_pod() and "VLLM_CACHE_ROOT" not in os.environ else {}
    return {**ENVIRONMENT, **keep}
