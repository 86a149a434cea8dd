"""The demo's two models: loaded in the background, shared by all tabs and sessions, one user at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cai_experiment.demo.checkpoints import Checkpoint
from cai_experiment.demo.settings import DemoSettings

if TYPE_CHECKING:
    from cai_experiment.engines.base import Engine
    from cai_experiment.evaluation.arms import BothArms


@dataclass(frozen=True, slots=True)
class Speaker:
    """A loaded model of one role, and its name for the page."""

    engine: Engine
    name: str


@dataclass(frozen=True, slots=True)
class Arms:
    """A checkpoint's base and the same with its adapter, both without worked examples (the prompt of training).

    `both` asks both with the same random numbers.
    """

    base: Engine
    trained: Engine
    both: BothArms
    name: str


class Models:
    """The evaluation model and the generation model, by role "evaluation" and "generation"."""

    def __init__(self, settings: DemoSettings, say: Callable[[str], None] = print) -> None:
        """`say` is told each model's first line before it is loaded. Nothing is loaded yet."""
        self.settings, self.say = settings, say

    def start(self) -> None:
        """Load the startup model for both roles, in a thread; returns at once."""
        raise NotImplementedError

    @property
    def ready(self) -> bool:
        """True once a model can be used."""
        raise NotImplementedError

    @property
    def state_line(self) -> str:
        """What goes on: "loading nano ...", "fetching ...: 0.4 of 3.1 GB", "nano is ready", "cannot load ...: why"."""
        raise NotImplementedError

    def load_evaluation(self, key: str) -> str:
        """Load (and fetch, if it is not at hand): "✓ Evaluation model loaded: NAME", details below; or "✗ reason"."""
        raise NotImplementedError

    def load_generation(self, key: str) -> str:
        """As `load_evaluation`."""
        raise NotImplementedError

    def unload_evaluation(self) -> str:
        """Let go of it; gives the status line."""
        raise NotImplementedError

    def unload_generation(self) -> str:
        """As `unload_evaluation`."""
        raise NotImplementedError

    def status_html(self) -> str:
        """The box Dual Model System Status: each role's model, its memory and device, and the total memory."""
        raise NotImplementedError

    def choices(self, role: str) -> list[str]:
        """The names to offer for a role: those that need no download first."""
        raise NotImplementedError

    def default(self, role: str) -> str:
        """What a role's field names at first: qwen2-1.5b-instruct and phi-2, or the shipped pair without a network."""
        raise NotImplementedError

    @contextmanager
    def use(self, role: str) -> Iterator[Speaker]:
        """The model of that role, for this user alone until the block ends. Long work takes it in small portions.

        Raises EngineError, one line, where none is loaded.
        """
        raise NotImplementedError
        yield

    @contextmanager
    def arms(self, checkpoint: Checkpoint) -> Iterator[Arms]:
        """The checkpoint's base and the trained model, for this user alone until the block ends.

        Raises UserError, one line: a damaged adapter, a base that is not at hand or does not fit.
        """
        raise NotImplementedError
        yield

    def make_room(self) -> None:
        """Before another process takes the GPU: unload all. On a CPU nothing."""
        raise NotImplementedError

    def close(self) -> None:
        """Unload all, and end a download."""
        raise NotImplementedError
