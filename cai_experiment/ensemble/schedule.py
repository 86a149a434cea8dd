"""What decides the course of a training: its settings, the learning rate of each step, the order of each epoch."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from cai_experiment.ensemble.loss import ENTROPY_WEIGHT

WARMUP_SHARE = 0.5  # of all steps, at most: a short training too is to see its full rate


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """The seed's values."""

    num_epochs: int = 5
    batch_size: int = 4  # rows a step
    learning_rate: float = 1e-4
    warmup_steps: int = 50
    entropy_weight: float = ENTROPY_WEIGHT
    seed: int = 42
    # the rest changes no weight
    log_every_n_steps: int = 5
    report_to: str = "none"
    checkpoint_seconds: float = 20.0  # so much of a training a kill costs, at most; each epoch's end writes one too

    def identity(self) -> dict[str, Any]:
        """What must not change between an interrupted call and the one that resumes it."""
        names = ("num_epochs", "batch_size", "learning_rate", "warmup_steps", "entropy_weight", "seed")
        return {name: getattr(self, name) for name in names}


def settings_named(**values: Any) -> TrainSettings:
    """TrainSettings of those `values` that it knows."""
    known = {one.name for one in dataclasses.fields(TrainSettings)}
    return TrainSettings(**{name: value for name, value in values.items() if name in known})


def warmup_of(total: int, settings: TrainSettings) -> int:
    """Steps of the warm-up: warmup_steps, and never more than WARMUP_SHARE of all `total` steps."""
    return min(settings.warmup_steps, int(WARMUP_SHARE * total))


def learning_rate_at(step: int, total: int, settings: TrainSettings) -> float:
    """That of step `step` (from 0) of `total`: up to the full rate by the end of the warm-up, then down to 0."""
    warmup = warmup_of(total, settings)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * (total - step) / max(total - warmup, 1)


def order_of(epoch: int, rows: int, seed: int) -> list[int]:
    """The order of the training rows in an epoch (from 1), by seed and epoch alone."""
    generator = torch.Generator().manual_seed(keyed(seed, "order", epoch))
    found: list[int] = torch.randperm(rows, generator=generator).tolist()
    return found


def keyed(seed: int, what: str, number: int) -> int:
    """A seed for one thing, by the training's seed, its kind and its number."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{what}/{number}".encode()).digest()[:7], "big")
