"""The Impact tab: base against trained on a suite or on the user's own prompts, in small portions, with its markup."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cai_experiment.evaluation.impact import METHODS, Impact
from cai_experiment.evaluation.impact_words import AI
from cai_experiment.evaluation.suites import SUITES, Suite
from cai_experiment.milestones import MAX_TOKENS_ANSWER
from cai_experiment.observe.content_logger import ContentLogger

if TYPE_CHECKING:
    from cai_experiment.demo.checkpoints import Checkpoint
    from cai_experiment.demo.models import Models

__all__ = ["METHODS", "SUITES", "ImpactState", "compare", "load_own"]


@dataclass(frozen=True, slots=True)
class ImpactState:
    """How far a comparison is: `fraction` from 0 to 1, a line, and markup; `result` comes with the last one."""

    fraction: float
    line: str
    summary_html: str = ""
    plots_html: str = ""
    examples_html: str = ""
    result: Impact | None = None


def load_own(path: Path, field: str | None = None) -> Suite:
    """The user's own prompts: .txt, .jsonl, .json or .csv. Raises BadInputError, naming file and line."""
    raise NotImplementedError


def compare(
    models: Models, log: ContentLogger, suite: str, own_file: Path | None, checkpoint: Checkpoint, method: str = AI,
    *, field: str | None = None, count: int | None = None, max_tokens: int = MAX_TOKENS_ANSWER, seed: int = 0,
) -> Iterator[ImpactState]:  # fmt: skip
    """Compare on `suite`, or on `own_file` if given (`field`: its column). Closing the generator stops it."""
    raise NotImplementedError
    yield
