"""Memory that runs out in training: said in one line with what was tried and what needs less, for each backend."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cai_experiment.engines.common import is_out_of_memory
from cai_experiment.errors import EngineError
from cai_experiment.training import checkpoints
from cai_experiment.training.data import TokenPair
from cai_experiment.training.settings import DPOSettings, pairs_at_once

if TYPE_CHECKING:
    from cai_experiment.training.run import Training


@dataclass
class Tried:
    """What a training did when memory ran out: its backend, and fast's budget of tokens a pass once it is known."""

    backend: str = ""
    tokens: int | None = None
    recomputed_layers: int = 0

    def note(self, training: Training) -> None:
        """Take what the trainer has decided."""
        self.backend = training.backend
        budget = getattr(training.trainer, "budget", None)
        if budget is not None:
            self.tokens, self.recomputed_layers = budget.tokens, budget.recomputed_layers


@contextmanager
def memory_errors(settings: DPOSettings, rows: Sequence[TokenPair], backend: str = "trl") -> Iterator[Tried]:
    """Within it, memory that ran out becomes an EngineError that names what was tried and what helps."""
    tried = Tried(backend, settings.token_budget)
    try:
        yield tried
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    longest = max(row.length for row in rows)  # outside the handler, whose traceback keeps tensors alive
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    fresh = " --fresh" if checkpoints.any_in(settings.output_dir) else ""
    step = f"train_dpo.py --max-length {longest // 2}{fresh} drops the longer pairs; or take a smaller --model"
    words, smaller = (_of_fast if tried.backend == "fast" else _of_trl)(settings, tried, longest)
    if smaller:
        step = f"{smaller} needs less (the same command resumes); then {step}"
    raise EngineError(f"out of memory in training, with {words}", step)


def _of_fast(settings: DPOSettings, tried: Tried, longest: int) -> tuple[str, str]:
    """(what was tried, the flag that needs less memory or "") for packed passes. A pair's prompt lies there once."""
    most = f"{tried.tokens} tokens" if tried.tokens else "as many tokens as memory seemed to hold"
    again = f", {tried.recomputed_layers} layers recomputed" if tried.recomputed_layers else ""
    less = max(longest, (tried.tokens or 4 * longest) // 2)
    smaller = f"--token-budget {less}" if tried.tokens is None or tried.tokens > less else ""
    return f"passes of {most}, the longest answer with its prompt of {longest}{again}", smaller


def _of_trl(settings: DPOSettings, tried: Tried, longest: int) -> tuple[str, str]:
    size = pairs_at_once(settings, "cuda" if torch.cuda.is_available() else "cpu")
    words = f"{size} {'pair' if size == 1 else 'pairs'} a pass, the longest of {longest} tokens"
    words += ", gradient checkpointing" if torch.cuda.is_available() else ""
    return words, "--batch-size 1" if size > 1 else ""
