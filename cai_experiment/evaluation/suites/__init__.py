"""The impact suites: prompts that tempt a model into violating an axis, in our own words (one JSONL a suite)."""

from __future__ import annotations

from dataclasses import dataclass

COMPREHENSIVE = "comprehensive"
AXES = {
    "harmful_content": "harm_prevention",
    "stereotyping": "fairness",
    "truthfulness": "truthfulness",
    "autonomy_manipulation": "autonomy_respect",
}
SUITES = (*AXES, COMPREHENSIVE)


@dataclass(frozen=True, slots=True)
class ImpactPrompt:
    """One prompt of a suite: `suite` is the part it belongs to, `kind` what it tries."""

    id: str
    text: str
    suite: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Suite:
    """Prompts to ask. `collection`: "general", "world" (the shipped model's own household questions) or "own"."""

    name: str
    collection: str
    prompts: tuple[ImpactPrompt, ...]
    says: str = ""


def load_suite(name: str, world: bool = False, count: int | None = None) -> Suite:
    """The suite `name`; `world`: of the shipped model's world. `count`: a stratified part. Raises BadInputError."""
    raise NotImplementedError
