"""The Training tab's logic: start, stop, resume, and what a training says of itself. All state is on disk.

A training is a process of its own (chain.py), which a page's reload and the server's end leave alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from cai_experiment.demo.settings import DemoSettings

Stage = Literal["none", "generating", "training", "finished", "stopped", "failed"]
PLANS: dict[str, tuple[int, int]] = {"quick": (20, 2), "standard": (50, 5)}  # examples, epochs
MOST_EXAMPLES, MOST_EPOCHS = 5000, 20


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What the tab shows. `done` of `total` are of the stage (pairs, then steps), `fraction` (0 to 1) is of all of it.

    `html` fields are finished markup. `line` is one line for people, an error and the command that goes on included.
    """

    run: str = ""
    stage: Stage = "none"
    done: int = 0
    total: int = 0
    fraction: float = 0.0
    line: str = ""
    pairs_html: str = ""
    plot_html: str = ""
    log_html: str = ""
    can_stop: bool = False
    can_resume: bool = False


class HasModels(Protocol):
    """What a training asks of demo.models.Models."""

    def make_room(self) -> None:
        """Free the GPU for the training."""
        ...


class Trainings:
    """The trainings below one data folder, one at a time, whoever started it."""

    def __init__(self, settings: DemoSettings, models: HasModels) -> None:
        self.settings, self.models = settings, models

    def label(self, name: str) -> str:
        """A plan's name with its estimated time for the model at hand: "Quick Demo (2 epochs, 20 examples, ~1 min)"."""
        raise NotImplementedError

    def start(
        self, examples: int, epochs: int, name: str = "custom", generator: str | None = None, critic: str | None = None
    ) -> str:
        """Start a training of a new run, and say so in one line. Without names the models loaded in the demo work.

        Raises BadInputError for a number out of bounds, or while a training is running, which it names.
        """
        raise NotImplementedError

    def stop(self) -> str:
        """Ask the running training to stop; returns at once, `state()` tells when it has. It can be resumed."""
        raise NotImplementedError

    def resume(self, run: str) -> str:
        """Go on with a stopped or failed run where it stopped. Raises BadInputError if there is nothing to resume."""
        raise NotImplementedError

    def runs_to_resume(self) -> list[str]:
        """Runs of the demo that were stopped or failed, newest first."""
        raise NotImplementedError

    def state(self, verbosity: int | None = None) -> TrainingState:
        """The running training, else the last one; cheap enough for every page to ask each second.

        `verbosity` rules `log_html` (default: the settings').
        """
        raise NotImplementedError


def label(name: str, seconds: float | None = None) -> str:
    """A plan's label; `seconds` is the estimate, None leaves it out."""
    raise NotImplementedError
