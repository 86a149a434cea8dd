"""Files to take away: logs and measured comparisons, each below its session's own folder, which nobody can guess."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cai_experiment.evaluation.impact import Impact
from cai_experiment.observe.content_logger import ContentLogger

if TYPE_CHECKING:
    from cai_experiment.demo.settings import DemoSettings


def new_session_id() -> str:
    """A name that nobody guesses: 192 random bits."""
    raise NotImplementedError


def session_folder(settings: DemoSettings, session_id: str) -> Path:
    """The session's folder (mode 0700), made if need be. Raises BadInputError for an id of another form."""
    raise NotImplementedError


def export_logs(settings: DemoSettings, session_id: str, log: ContentLogger) -> Path:
    """Everything logged as content_logs_TIMESTAMP.json (mode 0600)."""
    raise NotImplementedError


def export_impact(settings: DemoSettings, session_id: str, result: Impact, kind: Literal["json", "csv"]) -> Path:
    """Everything measured as impact_SUITE_TIMESTAMP.json, or one row a prompt as .csv (mode 0600)."""
    raise NotImplementedError


def remove_old(settings: DemoSettings, keep: Collection[str] = (), age: float = 86_400.0) -> list[Path]:
    """Remove session folders nothing was written to for `age` seconds, but those in `keep`; the removed ones."""
    raise NotImplementedError
