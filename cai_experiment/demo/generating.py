"""The Generation tab: base and trained answers to one prompt, token by token, with the same random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cai_experiment.demo.checkpoints import Checkpoint
from cai_experiment.demo.models import Models
from cai_experiment.observe.content_logger import ContentLogger


@dataclass(frozen=True, slots=True)
class Generated:
    """Both answers as far as they are spoken. `line` says how far, and at the end how they ended."""

    base: str
    trained: str
    base_html: str
    trained_html: str
    line: str


def generate(
    models: Models, log: ContentLogger, prompt: str, checkpoint: Checkpoint | None, temperature: float,
    max_tokens: int, seed: int,
) -> Iterator[Generated]:  # fmt: skip
    """Speak with the base and, with a checkpoint, with the trained model; one item a token. Closing it stops at once.

    Raises BadInputError (an empty or overlong prompt, a temperature or length that cannot be used) and EngineError.
    """
    raise NotImplementedError
    yield
