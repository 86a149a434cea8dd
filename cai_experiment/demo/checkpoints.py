"""The trained adapters that lie in the checkpoint folder: which can be spoken with, and what is wrong with the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cai_experiment.demo.settings import DemoSettings


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An adapter. `base` is what loads the model that it was trained on; `step` None: the end of the training."""

    run: str
    path: Path
    label: str  # as the page lists it; one of its kind
    base: str
    step: int | None
    milestone: str


def list_checkpoints(settings: DemoSettings) -> list[Checkpoint]:
    """Every adapter that verifies, the newest run first; in a run the end of the training, then later steps first."""
    raise NotImplementedError


def problems(settings: DemoSettings) -> list[str]:
    """A line for each adapter that `list_checkpoints` leaves out: which, and what is wrong with it."""
    raise NotImplementedError


def find_checkpoint(settings: DemoSettings, label: str) -> Checkpoint:
    """The adapter of that label. Raises BadInputError if it is not (or no longer) there, or damaged."""
    raise NotImplementedError
