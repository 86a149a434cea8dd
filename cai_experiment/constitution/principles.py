"""The principles of a constitution, loaded and checked: every error names file, principle and field."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_experiment.errors import BadInputError

AXIS_WEIGHTS = {"harm_prevention": 2.0, "truthfulness": 1.5, "fairness": 1.0, "autonomy_respect": 1.0}
CATEGORIES = ("helpfulness", "harmlessness", "honesty")
DEFAULT_CONSTITUTION = Path(__file__).resolve().parents[2] / "constitution.yaml"


@dataclass(frozen=True, slots=True)
class Principle:
    """One principle: what it asks (`text`), what the critic and the reviser are asked, its axis and weight."""

    id: str
    name: str
    category: str
    text: str
    critique_request: str
    revision_request: str
    axis: str
    weight: float

    @classmethod
    def example(cls, id: str, text: str, critique_request: str, revision_request: str) -> Principle:
        """A principle for a worked example, where only its words matter."""
        return cls(id, id, "helpfulness", text, critique_request, revision_request, "truthfulness", 1.0)
