"""Which trainer: TRL's, TRL's over a model that Unsloth loaded, or the project's own. One settings object for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from cai_experiment.errors import BadInputError
from cai_experiment.training import processes
from cai_experiment.training.data import TokenPair
from cai_experiment.training.fast.start_check import foreign_kind
from cai_experiment.training.settings import DPOSettings


def backend_of(settings: DPOSettings, model: PreTrainedModel) -> str:
    """ "trl", "unsloth" or "fast": what `settings.backend` names or, by "auto", what fits the model at hand.

    auto: Unsloth's own models train with Unsloth, others on a CPU with `fast` (kinds that it does not train, such as
    GPT-2 or Gemma 2, with TRL), on a GPU with TRL, until docs/BENCHMARKS.md shows `fast` faster there.
    Raises BadInputError where the model was loaded for another backend.
    """
    by_unsloth = hasattr(model, "for_training")  # only models that Unsloth loaded have it
    if by_unsloth and settings.backend in ("auto", "unsloth") and processes.count() > 1:
        raise processes.only_one("--backend unsloth")
    if settings.backend == "auto":
        fast = next(model.parameters()).device.type == "cpu" and not foreign_kind(model)
        return "unsloth" if by_unsloth else "fast" if fast else "trl"
    if (settings.backend == "unsloth") != by_unsloth:
        loaded = "Unsloth" if by_unsloth else "transformers"
        message = f"--backend {settings.backend} cannot train a model that {loaded} loaded"
        raise BadInputError(message, "train with train_dpo.py, which loads it as the backend needs it")
    return settings.backend


def build_trainer(
    backend: str,
    settings: DPOSettings,
    rows: Sequence[TokenPair],
    held_out: Sequence[TokenPair],
    total: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    watch: TrainerCallback,
) -> Any:
    """The trainer of a backend, its adapter in place; `measure`, `check_start` and `train` are the same in all."""
    if backend == "fast":
        from cai_experiment.training.fast_dpo import build_fast_trainer as build
    else:
        from cai_experiment.training.trl_dpo import build_trl_trainer as build
    return build(settings, rows, held_out, total, model, tokenizer, watch)
