"""Go or no-go: each milestone's gates, held against the metrics. A point estimate decides; a wide interval warns."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any, Mapping, Protocol

from cai_experiment.judging.fitness import FIT
from cai_experiment.judging.result import Interval, Result

RULES = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt, "=": operator.eq}

MEANINGFUL = 0.7  # the spec: 7 of 10 critiques
PREFERRED = 0.8  # the spec: the model prefers revised answers in over 80% of held-out pairs
MAY_FORGET = 0.05  # a rate may be this much lower than before training
ON_TOPIC = 0.95
MAY_DRIFT = 0.1  # distinct word pairs and sentences of the shipped model's answers: more or fewer by a tenth
HALF = 0.5
LEAST = 60  # held-out pairs, and comparisons that are decided
READ = 0.9  # of what was asked; what fails more often is not the sample that was drawn
PLUMBING_ONLY = ("single", "batch")
NOT_MEASURED = Result(None, 0, None)

Metrics = Mapping[str, Result]


class Trained(Protocol):
    """What is needed of `training.settings.TrainResult`."""

    @property
    def step0_margin(self) -> float: ...
    @property
    def loss_before(self) -> float: ...
    @property
    def loss_after(self) -> float | None: ...
    @property
    def model(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate: passed if `value` `rule` `threshold` holds; the rule "finite" needs no threshold.

    What could not be measured (None) never passes. `part` is "generation" or "training": a report keeps the gates of
    the part that is not being written.
    """

    name: str
    value: float | None
    rule: str
    threshold: float | None
    interval: Interval | None
    n: int
    part: str

    @property
    def passed(self) -> bool:
        """Go or no-go, by the point estimate."""
        if self.value is None or not math.isfinite(self.value):
            return False
        return self.rule == "finite" or (self.threshold is not None and RULES[self.rule](self.value, self.threshold))

    def to_json(self) -> dict[str, Any]:
        """The gate as report.json holds it; what is not finite becomes null there."""
        return {
            "name": self.name,
            "value": self.value if self.value is not None and math.isfinite(self.value) else None,
            "threshold": self.threshold,
            "interval": None if self.interval is None else list(self.interval),
            "n": self.n,
            "passed": self.passed,
            "rule": self.rule,
            "part": self.part,
        }


def _on(metrics: Metrics, metric: str, name: str, rule: str, threshold: float | None, part: str) -> Gate:
    """A gate on a metric; one that was not measured has no value."""
    found = metrics.get(metric, NOT_MEASURED)
    return Gate(name, found.value, rule, threshold, found.interval, found.n, part)


def generation_gates(milestone: str, metrics: Metrics, wanted: int) -> list[Gate]:
    """The gates of a run of the pipeline that was to reach `wanted` accepted pairs.

    Those on critiques are left out of a run without critiques (its metrics count `direct_revisions`).
    """
    meaningful = 1.0 if milestone == "single" else MEANINGFUL
    rows = [("accepted_pairs", "accepted pairs", ">=", float(wanted))]
    if "direct_revisions" not in metrics:
        rows += [
            ("complete_examples", "all parts present", ">=", 1.0),
            ("critique_meaningful", "critiques meaningful", ">=", meaningful),
        ]
    if "critique_right" in metrics:
        rows.append(("critique_right", "critiques right by the world's truth", ">=", meaningful))
    if milestone == "single" and "direct_revisions" not in metrics:
        rows.append(("revision_answers_critique", "revision answers the critique", ">=", 1.0))
    if milestone == "batch":
        rows.append(("revision_preferred", "revisions better", ">", HALF))
    return [_on(metrics, *row, "generation") for row in rows]


def training_gates(milestone: str, metrics: Metrics, trained: Trained, pairs: int) -> list[Gate]:
    """The gates of DPO. `pairs` is the number of training pairs, over which both losses are means."""
    if milestone == "single":
        return [
            Gate("step-0 margin is 0", abs(trained.step0_margin), "=", 0.0, None, pairs, "training"),
            Gate("loss is finite", trained.loss_after, "finite", None, None, pairs, "training"),
        ]
    if milestone == "batch":
        return [Gate("DPO loss falls", trained.loss_after, "<", trained.loss_before, None, pairs, "training")]
    name = "revised preferred in held-out pairs"
    return [
        _on(metrics, "preference_accuracy", name, ">", PREFERRED, "training"),
        _quality_up(metrics),
        *([] if "flawed_answers_base" in metrics else [fit_gate(metrics, "training")]),
        _kept(metrics, "ends_by_itself", "no forgetting: answers end by themselves"),
        *(_world_gates(metrics) if "on_topic_trained" in metrics else []),
    ]


def milestone_gates(milestone: str, metrics: Metrics, truth: bool) -> list[Gate]:
    """The gates of the full evaluation that hold a metric against a limit (forgetting and collapse bring their own).

    They are measured on separate instructions and take the place of `training_gates`' own. A judge's word counts only
    if the judge is fit: one that is wrong on purpose, or answers at random, has a kappa near 0 with known answers.
    """
    if milestone in PLUMBING_ONLY:  # a few steps prove nothing of quality
        return [fit_gate(metrics, "evaluation")]
    preferred = _on(metrics, "preference_accuracy", "revised preferred in held-out pairs", ">", PREFERRED, "training")
    won = _on(metrics, "win_rate", "quality up: trained answers preferred", ">", HALF, "training")
    return [
        _of_enough(preferred),
        *([_quality_up(metrics)] if truth else []),
        _of_enough(won),
        _on(metrics, "win_rate_read", "comparisons that the judge could read", ">=", READ, "training"),
        fit_gate(metrics, "training"),
        _on(metrics, "answers_came", "instructions that both models answered", ">=", READ, "training"),
        _kept(metrics, "ends_by_itself", "no forgetting: answers end by themselves"),
        *(_world_gates(metrics) if truth else []),
    ]


def _of_enough(gate: Gate) -> Gate:
    """A gate that a handful of items cannot pass: below LEAST its value counts as not measured."""
    if gate.n >= LEAST:
        return gate
    return replace(gate, name=f"{gate.name} (of at least {LEAST})", value=None)


def fit_gate(metrics: Metrics, part: str) -> Gate:
    """Whether the judge may be believed: `judge_fitness`, its kappa with known answers."""
    return _on(metrics, "judge_fitness", "the judge agrees with known answers (kappa)", ">=", FIT, part)


def _world_gates(metrics: Metrics) -> list[Gate]:
    """Of the shipped model, whose world knows what an answer looks like: fewer flaws must not come from worse text."""
    return [
        _on(metrics, "on_topic_trained", "answers on topic", ">=", ON_TOPIC, "training"),
        _steady(metrics, "distinct_2", "no collapse: change of distinct word pairs"),
        _steady(metrics, "sentences", "no collapse: change of sentences an answer"),
    ]


def ratio(metrics: Metrics, stem: str) -> float | None:
    """A figure of the trained model's answers over the base's; None where either is missing."""
    before, after = (metrics.get(f"{stem}_{arm}", NOT_MEASURED).value for arm in ("base", "trained"))
    return after / before if before and after is not None else None


def _steady(metrics: Metrics, stem: str, name: str) -> Gate:
    """A figure that training may raise or lower by MAY_DRIFT of it."""
    found = ratio(metrics, stem)
    change = None if found is None else round(abs(found - 1), 6)
    return Gate(name, change, "<=", MAY_DRIFT, None, metrics.get(f"{stem}_trained", NOT_MEASURED).n, "training")


def _quality_up(metrics: Metrics) -> Gate:
    """Fewer flawed answers by the truth where it is known, else the judge prefers the trained model's answers."""
    if "flawed_answers_base" in metrics:
        before = metrics["flawed_answers_base"].value
        return _on(metrics, "flawed_answers_trained", "quality up: fewer flawed answers", "<", before, "training")
    return _on(metrics, "win_rate", "quality up: trained answers preferred", ">", HALF, "training")


def _kept(metrics: Metrics, stem: str, name: str) -> Gate:
    """A rate that training may lower by MAY_FORGET at most."""
    before = metrics.get(f"{stem}_base", NOT_MEASURED).value
    threshold = None if before is None else round(before - MAY_FORGET, 6)
    return _on(metrics, f"{stem}_trained", name, ">=", threshold, "training")
