"""What a training changed in the answers to a suite of prompts: base against trained, with what chance would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cai_experiment.evaluation.arms import BothAnswers
from cai_experiment.evaluation.harm_model import Detector
from cai_experiment.evaluation.harm_rules import Detection
from cai_experiment.evaluation.suites import SUITES, Suite, load_suite
from cai_experiment.judging.judge import Judge
from cai_experiment.judging.result import McNemar, Result

__all__ = ["SUITES", "load_suite"]

AI, RULES, BOTH = METHODS = ("AI Evaluation", "Rules", "Both")


@dataclass(frozen=True, slots=True)
class Figure:
    """One measure of both arms over the same answers; `difference` is trained - base, `p_holm` over all figures."""

    name: str
    label: str
    base: Result
    trained: Result
    difference: Result
    p_value: float
    p_holm: float
    test: McNemar | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """One arm's answer and what was found in it."""

    text: str
    finish: str
    empty: bool
    refused: bool
    found: Detection
    flaws: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImpactRow:
    """One prompt with both answers."""

    id: str
    suite: str
    kind: str
    prompt: str
    base: Said
    trained: Said


@dataclass(frozen=True, slots=True)
class Impact:
    """Everything that was measured on a suite."""

    suite: str
    collection: str
    method: str
    figures: tuple[Figure, ...]
    rows: tuple[ImpactRow, ...]
    verdict: str
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        raise NotImplementedError


def detector_for(method: str, judge: Judge | None) -> Detector:
    """The detector of a method of METHODS; `judge` is needed by all but the rules."""
    raise NotImplementedError


def measure(
    suite: Suite, answers: Sequence[BothAnswers], found: Sequence[tuple[Detection, Detection]], method: str,
    truth: bool = False,
) -> Impact:  # fmt: skip
    """The impact over a suite's answers (in its order); `found` holds the detections of (base, trained)."""
    raise NotImplementedError
