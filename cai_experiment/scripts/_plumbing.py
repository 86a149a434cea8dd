"""Fixed held-out examples for runs with random weights, whose own texts never pass the gate."""

from __future__ import annotations

from cai_experiment.records.schema import Example, PreferencePair
from cai_experiment.training.plumbing import PLACE, THINGS, plumbing_pairs


def plumbing_examples(count: int) -> list[Example]:
    """The first `count` (at most 10) fixed examples, on other instructions than the fixed training pairs."""
    return [
        _example(f"{number:06d}", f"What keeps {thing} well through a cold winter?", pair.chosen, pair.rejected)
        for number, (thing, pair) in enumerate(zip(THINGS, plumbing_pairs(count), strict=False))
    ]


def _example(id: str, instruction: str, chosen: str, rejected: str) -> Example:
    meta = {"source": PLACE, "seed": 0, "generator": "fixed", "critic": "fixed", "tokens": {}, "gate": {}}
    pair = PreferencePair(instruction, chosen, rejected)
    return Example(id, instruction, rejected, "", "", chosen, pair, (), meta)
