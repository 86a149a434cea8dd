"""What the demo is started with: where runs lie, which model speaks first, where exports go. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cai_experiment.constitution.principles import DEFAULT_CONSTITUTION
from cai_experiment.milestones import CHECKPOINT_DIR, DATA_DIR, PACKAGE

EXPORTS = PACKAGE / "data" / "demo_exports"


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """The demo's folders and defaults. `model` None: the shipped model; else a preset, hub id or folder."""

    data_dir: Path = DATA_DIR
    checkpoint_dir: Path = CHECKPOINT_DIR
    constitution: Path = DEFAULT_CONSTITUTION
    model: str | None = None
    seed: int = 0
    verbosity: int = 2  # of a new browser session, and of what the server prints
    exports: Path = field(default=EXPORTS)  # the only folder from which the server gives out files
