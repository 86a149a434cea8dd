"""What each model took: tokens, verdicts, seconds, loading, memory; a row for each stretch of work."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.records.store import Journal

EVERY = 5.0  # seconds between two rows: so much of a killed call is not counted
PEAK, TENSORS, SHARE = "peak on the GPU", "bytes of its weights", "vLLM's share of the GPU, whatever the model"
SPOKEN, WEIGHED, LOADED, HELD = "spoken", "weighed", "loaded", "held"


class Usage:
    """The rows of usage.jsonl; append-only, so that the sums are over all calls."""

    def __init__(self, path: Path) -> None:
        self.journal = Journal(path)
        self.rows: list[dict[str, Any]] = self.journal.rows() if path.exists() else []

    def add(self, model: str, kind: str, **figures: Any) -> None:
        """Write one row."""
        row = {"model": model, "kind": kind, **figures}
        self.journal.append(row)
        self.rows.append(row)

    def total(self, model: str, kind: str, figure: str) -> float:
        """The sum of a figure over a model's rows of that kind."""
        return float(sum(row[figure] for row in self.rows if (row["model"], row["kind"]) == (model, kind)))

    def seconds(self, model: str) -> float:
        """All its time, loading included."""
        return float(sum(row.get("seconds", 0.0) for row in self.rows if row["model"] == model))

    def memory(self, model: str) -> tuple[float, str] | None:
        """(GB at most, how it was measured); None if that is not known."""
        found = [row for row in self.rows if (row["model"], row["kind"]) == (model, HELD)]
        return (max(row["bytes"] for row in found) / 1e9, str(found[-1]["how"])) if found else None


class Metered:
    """An engine whose work is counted. A list of prompts is spoken or weighed by its first prompt."""

    def __init__(self, engine: Any, model: str, usage: Usage) -> None:
        self.engine, self.model, self.usage = engine, model, usage

    def __getattr__(self, name: str) -> Any:
        """Everything else is the engine's own."""
        return getattr(self.engine, name)

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """See `base.Engine.stream`."""
        asked = [prompt for prompt in prompts if prompt is not None]
        if not asked:
            return
        kind = WEIGHED if asked[0].options else SPOKEN
        began, done, tokens, read = time.monotonic(), 0, 0, 0
        try:
            for completion in self.engine.stream(asked):
                done, tokens = done + 1, tokens + completion.completion_tokens
                read += completion.prompt_tokens
                if time.monotonic() - began > EVERY:
                    self._note(kind, began, done, tokens, read)
                    began, done, tokens, read = time.monotonic(), 0, 0, 0
                yield completion
        finally:
            if done:
                self._note(kind, began, done, tokens, read)

    def close(self) -> None:
        """Note what memory it held, and give it back."""
        if (held := memory_of(self.engine)) is not None:
            self.usage.add(self.model, HELD, bytes=held[0], how=held[1])
        self.engine.close()

    def _note(self, kind: str, began: float, prompts: int, tokens: int, read: int) -> None:
        seconds = round(time.monotonic() - began, 4)
        self.usage.add(self.model, kind, seconds=seconds, prompts=prompts, tokens=tokens, read=read)


def start_of_memory() -> None:
    """Count the GPU's peak from here on."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def memory_of(engine: Any) -> tuple[int, str] | None:
    """(bytes, how): the CUDA allocator's peak since `start_of_memory`; on a CPU the bytes of the model's tensors; of
    vLLM, in a process of its own, the share of the GPUs that it takes for itself.

    None for other engines without weights here. A CPU's resident memory tells little of one model: what an earlier
    one freed stays with the process.
    """
    if (facts := engine.describe()).get("engine") == "vllm":
        from cai_experiment.models.hardware import detect
        from cai_experiment.models.serving import usable_gb

        return int(usable_gb(None, detect()) * int(facts.get("tensor_parallel") or 1) * 1e9), SHARE
    model = getattr(engine, "model", None)
    if model is None or not hasattr(model, "parameters"):
        return None
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated()), PEAK
    tensors: Sequence[Any] = [*model.parameters(), *model.buffers()]
    stores = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(stores.values()), TENSORS


def usage_of(
    usage: Usage, model: str, price_per_hour: float, facts: Mapping[str, Any], weights_gb: float | None = None
) -> dict[str, Any]:
    """A model's work as comparison.json holds it: tokens a second of what it spoke, memory, seconds, dollars.

    `weights_gb` are its weights by arithmetic, which stand beside a GPU's memory. No dollars without a price.
    """
    spoken, speaking = usage.total(model, SPOKEN, "tokens"), usage.total(model, SPOKEN, "seconds")
    weighed, weighing = usage.total(model, WEIGHED, "prompts"), usage.total(model, WEIGHED, "seconds")
    held, seconds = usage.memory(model), usage.seconds(model)
    return {
        "tokens": int(spoken), "tokens_per_second": spoken / speaking if speaking else None,
        "speaking_seconds": round(speaking, 2),
        "weighed": int(weighed), "weighed_per_second": weighed / weighing if weighing else None,
        "weighing_seconds": round(weighing, 2),
        "loads": sum((r["model"], r["kind"]) == (model, LOADED) for r in usage.rows),
        "loading_seconds": round(usage.total(model, LOADED, "seconds"), 2),
        "memory_gb": None if held is None else held[0], "memory_is": None if held is None else held[1],
        "weights_gb": None if held is None or held[1] == TENSORS else weights_gb,
        "dollars": seconds / 3600 * price_per_hour if price_per_hour else None,
        "engine": facts.get("engine"), "quantization": facts.get("quantization"), "slots": facts.get("slots"),
    }  # fmt: skip
