"""What `impact.measure` finds, as data: figures of both arms, every prompt with both answers, and what may be said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cai_experiment.evaluation.harm_rules import Detection
from cai_experiment.evaluation.reporting.naming import Named
from cai_experiment.evaluation.reporting.summary import Effect
from cai_experiment.judging.result import McNemar, Result


@dataclass(frozen=True, slots=True)
class Figure:
    """One measure of both arms over the same answers. `difference` is trained - base with its paired interval.

    `p_value` is its test's, `p_holm` that adjusted over all tested figures; both None for what is not tested. `test`
    holds McNemar's counts where the measure is a share.
    """

    name: str
    named: Named
    base: Result
    trained: Result
    difference: Result
    p_value: float | None
    p_holm: float | None
    test: McNemar | None = None

    @property
    def effect(self) -> Effect:
        """The same as the report's tables and plots take it; its `direction` says whether the change is certain."""
        arms = (self.base.to_json(), self.trained.to_json(), self.difference.to_json())
        return Effect(self.name, self.named, self.named.rate, *arms, self.p_holm)

    @property
    def values(self) -> str:
        """From what to what: "41.7% → 11.1%"."""
        return " → ".join(_value(arm, self.named.rate) for arm in (self.base, self.trained))

    @property
    def change(self) -> str:
        """The difference with interval, n and p-value: "−30.6 points (−45.0 to −9.8, n = 36, p = 0.012 by Holm)"."""
        effect = self.effect
        p_value = "" if self.p_holm is None else f", p = {effect.p_text} by Holm".replace("= <", "<")
        return f"{effect.change_text} ({effect.range_text}{p_value})".replace("\u00a0", " ")

    def to_json(self) -> dict[str, Any]:
        """The figure as plain data."""
        arms = {"base": self.base, "trained": self.trained, "difference": self.difference}
        test = None if self.test is None else {"only_base": self.test.only_before, "only_trained": self.test.only_after}
        return {
            "name": self.name, "label": self.named.label, "better": self.named.better, "rate": self.named.rate,
            **{name: result.to_json() for name, result in arms.items()},
            "p_value": self.p_value, "p_holm": self.p_holm, "mcnemar": test, "direction": self.effect.direction,
        }  # fmt: skip


def _value(result: Result, rate: bool) -> str:
    if result.value is None:
        return "not measured"
    return f"{100 * result.value:.1f}%" if rate else f"{result.value:.2f}"


@dataclass(frozen=True, slots=True)
class Said:
    """One arm's answer and what was found in it: harm, and the principles of its flaws by the world's truth."""

    text: str
    finish: str
    empty: bool
    refused: bool
    found: Detection
    flaws: tuple[str, ...] = ()
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """The answer as plain data."""
        own = {"text": self.text, "finish": self.finish, "empty": self.empty, "refused": self.refused}
        return {**own, "error": self.error, "flaws": list(self.flaws), **self.found.to_json()}


@dataclass(frozen=True, slots=True)
class ImpactRow:
    """One prompt with both answers."""

    id: str
    suite: str
    kind: str
    prompt: str
    base: Said
    trained: Said

    @property
    def came(self) -> bool:
        """True if neither answer failed."""
        return "error" not in (self.base.finish, self.trained.finish)

    @property
    def compared(self) -> bool:
        """True if it counts: both models said something."""
        return self.came and not (self.base.empty or self.trained.empty)

    @property
    def change(self) -> float:
        """Trained minus base, of the weighted score."""
        return self.trained.found.score - self.base.found.score

    def to_json(self) -> dict[str, Any]:
        """The prompt and both answers as plain data."""
        own = {"id": self.id, "suite": self.suite, "kind": self.kind, "prompt": self.prompt, "compared": self.compared}
        return {**own, "base": self.base.to_json(), "trained": self.trained.to_json()}


def arms_of(rows: Sequence[ImpactRow]) -> list[tuple[str, list[Said]]]:
    """[("base", its answers), ("trained", its answers)] of some rows."""
    return [("base", [row.base for row in rows]), ("trained", [row.trained for row in rows])]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What may be said of one figure: `confirmed` only where the gain is certain and nothing was lost for it."""

    name: str
    confirmed: bool
    line: str


@dataclass(frozen=True, slots=True)
class Impact:
    """Everything that was measured on a suite. `guards` are what must not be lost; `counts` what became of the prompts.

    `verdicts` begin with that on the weighted score; the shipped model has a second one, by its world's truth.
    """

    suite: str
    collection: str
    method: str
    figures: tuple[Figure, ...]
    guards: tuple[Figure, ...]
    rows: tuple[ImpactRow, ...]
    verdicts: tuple[Verdict, ...]
    by_suite: Mapping[str, Mapping[str, Result]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data, the answers in full."""
        verdicts = [{"name": one.name, "confirmed": one.confirmed, "line": one.line} for one in self.verdicts]
        parts = {part: {name: one.to_json() for name, one in found.items()} for part, found in self.by_suite.items()}
        return {
            "suite": self.suite, "collection": self.collection, "method": self.method, **self.facts,
            "verdicts": verdicts, "notes": list(self.notes), "counts": dict(self.counts),
            "figures": [one.to_json() for one in self.figures], "guards": [one.to_json() for one in self.guards],
            "by_suite": parts, "examples": [row.to_json() for row in self.rows],
        }  # fmt: skip
