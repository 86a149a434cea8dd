"""The impact suites: requests that tempt a model into violating an axis, in our own words, one JSONL a suite.

A line is {"id": "stereotyping/07", "kind": "gender", "text": ...}; a suite has 36 of them, 6 of each of its 6 kinds, in
turn. The shipped model knows nothing but its household world, so it is asked questions of that world instead:
another 36 for each suite, in combinations that its training text does not hold.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cai_experiment.errors import BadInputError
from cai_experiment.nano import world

Collection = Literal["general", "world", "own"]

AXES = {
    "harmful_content": "harm_prevention",
    "stereotyping": "fairness",
    "truthfulness": "truthfulness",
    "autonomy_manipulation": "autonomy_respect",
}
COMPREHENSIVE = "comprehensive"  # the four together
SUITES = (*AXES, COMPREHENSIVE)
FOLDER = Path(__file__).parent
OF_WORLD = 36  # household questions a suite: as many as it has prompts
SAYS: dict[Collection, str] = {
    "general": "Prompts in this project's own words that tempt a model; none stands in HarmBench or MT-Bench.",
    "world": "A rehearsal: the shipped model speaks of its household world alone, so it is asked held-out questions of "
    "that world. They do not tempt it to what the suite's name says; its flaws come by themselves.",
    "own": "The prompts of your own file.",
}


@dataclass(frozen=True, slots=True)
class ImpactPrompt:
    """One prompt: `suite` is the part that it belongs to (an own file's name), `kind` what it tries."""

    id: str
    text: str
    suite: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Suite:
    """Prompts to ask; `notes` say what else a reader should know of them."""

    name: str
    collection: Collection
    prompts: tuple[ImpactPrompt, ...]
    notes: tuple[str, ...] = ()

    @property
    def says(self) -> str:
        """Where the prompts are from, for the page."""
        return SAYS[self.collection]

    def part(self, count: int | None) -> Suite:
        """The first `count` of each of its parts' prompts in turn (None: all), so that every part has its share.

        Raises BadInputError for a count below 1.
        """
        if count is None or count >= len(self.prompts):
            return self
        if count < 1:
            raise BadInputError(f"{count} prompts are none", "ask for 1 or more")
        places: dict[str, int] = {}
        ranked: list[tuple[int, int, ImpactPrompt]] = []
        for prompt in self.prompts:
            place = places[prompt.suite] = places.get(prompt.suite, 0) + 1
            ranked.append((place, len(ranked), prompt))
        kept = sorted(sorted(ranked, key=lambda one: one[:2])[:count], key=lambda one: one[1])
        note = f"{count} of its {len(self.prompts)} prompts were asked, as many of each part as can be."
        return Suite(self.name, self.collection, tuple(prompt for *_, prompt in kept), (*self.notes, note))


def load_suite(name: str, of_world: bool = False, count: int | None = None) -> Suite:
    """The suite of that name; `of_world`: the shipped model's household questions. `count`: see `Suite.part`.

    Raises BadInputError for an unknown name.
    """
    if name not in SUITES:
        raise BadInputError(f"suite {name!r} is unknown", f"use one of {', '.join(SUITES)}")
    parts = tuple(AXES) if name == COMPREHENSIVE else (name,)
    read = _of_world if of_world else _general
    prompts = tuple(prompt for part in parts for prompt in read(part))
    return Suite(name, "world" if of_world else "general", prompts).part(count)


def _general(name: str) -> list[ImpactPrompt]:
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [ImpactPrompt(row["id"], row["text"], name, row["kind"]) for row in map(json.loads, lines)]


def _of_world(name: str) -> list[ImpactPrompt]:
    """Questions of every kind in turn, of which "tempt" asks for a shortcut; the same at every call."""
    rng = random.Random(f"impact/{name}")
    kinds = tuple(world.QUESTIONS)
    found: dict[str, str] = {}
    while len(found) < OF_WORLD:
        kind = kinds[len(found) % len(kinds)]
        found.setdefault(world.compose_question(rng, held_out=True, kind=kind).text, kind)
    return [
        ImpactPrompt(f"world/{name}/{number:02d}", text, name, kind)
        for number, (text, kind) in enumerate(found.items(), 1)
    ]
