"""A stand-in for vLLM 0.32.0, as far as engines/vllm_worker.py calls it; put on the child's PYTHONPATH by test_vllm.py.

Names and arguments are those of vLLM's source (test_vllm.py compares them with an installed one); what it says is made
up: token `seed % 90 + 300`, `seed % 7 + 1` times, then the first stop token. Faults come from the variable STAND_IN;
"once:FILE:fault" is a fault of the first process alone, which makes FILE.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from vllm.sampling_params import RequestOutputKind

__version__ = "0.32.0"
FAULT = os.environ.get("STAND_IN", "")
if FAULT.startswith("once:"):
    _, made, FAULT = FAULT.split(":")
    if os.path.exists(made):
        FAULT = ""
    else:
        open(made, "x").close()
VOCABULARY = 1000
POISON = 1.75  # a temperature: such a request ends this process
LOAD_FAULTS = {
    "oom": "CUDA out of memory. Tried to allocate 540.00 MiB.\nGPU 0 has a total capacity of 79.25 GiB",
    "kv": "To serve at least one request with the model's max seq len (4096), 1.00 GiB KV cache is needed, which is "
    "larger than the available KV cache memory (0.35 GiB).",
    "busy": "Free memory on device cuda:0 (3.1/79.25 GiB) on startup is less than desired GPU memory utilization",
    "odd": "Model architectures ['OddForCausalLM'] are not supported for now.",
}


@dataclass
class EngineArgs:
    model: str
    skip_tokenizer_init: bool = False
    dtype: str = "auto"
    load_format: str = "auto"
    trust_remote_code: bool = False
    max_model_len: int = 0
    max_num_seqs: int | None = None
    gpu_memory_utilization: float = 0.92
    tensor_parallel_size: int = 1
    enable_prefix_caching: bool | None = None
    generation_config: str = "auto"
    seed: int = 0
    disable_log_stats: bool = False


@dataclass
class SamplingParams:
    temperature: float = 1.0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    max_tokens: int = 16
    detokenize: bool = True
    logprob_token_ids: list[int] | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        if self.temperature > 2:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings are only supported when detokenize is True.")


class Running:
    """A request at work: its tokens so far."""

    def __init__(self, ids: list[int], params: SamplingParams, cached: int) -> None:
        self.params, self.cached, self.tokens = params, cached, []
        seed = params.seed or 0
        self.script = [seed % 90 + 300] * (seed % 7 + 1) + params.stop_token_ids[:1]
        if params.max_tokens > 400:  # a long answer
            self.script = [301] * params.max_tokens

    def step(self) -> str | None:
        self.tokens.append(self.script[len(self.tokens)])
        if self.tokens[-1] in self.params.stop_token_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.params.max_tokens else None

    def logprobs(self) -> list[dict[int, Any]] | None:
        wanted = self.params.logprob_token_ids
        if wanted is None:
            return None
        first = {self.tokens[0]: SimpleNamespace(logprob=-9.0)}
        return [first | {t: SimpleNamespace(logprob=math.log((i + 1) / 10)) for i, t in enumerate(wanted)}]


class LLMEngine:
    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, usage_context: Any = None) -> LLMEngine:
        print("INFO a line on stdout that is no message")
        assert os.environ["VLLM_NO_USAGE_STATS"] == os.environ["DO_NOT_TRACK"] == "1"
        if FAULT in LOAD_FAULTS:
            raise RuntimeError(LOAD_FAULTS[FAULT])
        if FAULT in ("worker", "deaf", "slow_load"):
            subprocess.Popen(["sleep", "300"])
        if FAULT == "slow_load":
            time.sleep(300)
        return cls(engine_args)

    def __init__(self, args: EngineArgs) -> None:
        self.running: dict[str, Running] = {}
        self.waiting: dict[str, Running] = {}
        self.seen: set[tuple[int, ...]] = set()
        self.added = self.finished = 0
        self.slots = args.max_num_seqs or 256
        self.model_config = SimpleNamespace(dtype="torch.bfloat16", max_model_len=args.max_model_len)
        cache = SimpleNamespace(num_gpu_blocks=100, block_size=16, enable_prefix_caching=args.enable_prefix_caching)
        self.vllm_config = SimpleNamespace(cache_config=cache)
        self.engine_core = SimpleNamespace(shutdown=self._shutdown)

    def _shutdown(self) -> None:
        if FAULT == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(300)

    def has_unfinished_requests(self) -> bool:
        return bool(self.running or self.waiting)

    def add_request(self, request_id: str, prompt: Any, params: SamplingParams) -> str:
        ids = prompt["prompt_token_ids"]
        if max(ids) >= VOCABULARY:
            raise ValueError(f"Token id {max(ids)} is out of vocabulary")
        self.added += 1
        if (FAULT == "die" and self.added == 2) or params.temperature == POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        blocks = [tuple(ids[: end + 16]) for end in range(0, len(ids) - 16, 16)]
        cached = 16 * sum(block in self.seen for block in blocks)
        self.seen.update(blocks)
        self.waiting[request_id] = Running(ids, params, cached)
        return request_id

    def abort_request(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.running.pop(request_id, None)
            self.waiting.pop(request_id, None)

    def step(self) -> list[Any]:
        if FAULT == "step" and self.added >= 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if FAULT == "hang" and self.added >= 2:
            time.sleep(300)
        while self.waiting and len(self.running) < self.slots:
            request_id = next(iter(self.waiting))
            self.running[request_id] = self.waiting.pop(request_id)
        done: list[Any] = []
        for request_id, request in list(self.running.items()):
            if FAULT.startswith("last:") and len(request.script) > 400 and self.finished < int(FAULT[5:]):
                time.sleep(0.001)  # a long answer that ends after so many others
                continue
            finish = request.step()
            if finish is not None:
                self.finished += 1
                del self.running[request_id]
                spoken = SimpleNamespace(token_ids=request.tokens, finish_reason=finish, logprobs=request.logprobs())
                done.append(SimpleNamespace(
                    request_id=request_id, finished=True, outputs=[spoken], num_cached_tokens=request.cached,
                ))  # fmt: skip
        return done
