"""What a run's data is made of: shares by source, kind and length, refusals, answer lengths, the guard, speed.

One pass over each file; nothing of an example is kept but counts, so it serves 100 pairs and 50,000.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Iterable, Mapping

from cai_experiment.constitution.broad_grid import tempts
from cai_experiment.engines.guard import CATEGORY_WORDS
from cai_experiment.records.manifest import Manifest
from cai_experiment.records.schema import Example

SELF = "self"
NAMES = ("topic", "kind", "length")  # in the source of an instruction that the model wrote: "self:garden/fix/short"
SURPLUS, UNSAFE, UNPARSED = "length_surplus", "guard_unsafe", "guard_unparsed"  # the gate's names


class _Tally:
    """Counts over the examples of a run."""

    def __init__(self) -> None:
        self.drawn: dict[str, Counter[str]] = {}
        self.accepted: dict[str, Counter[str]] = {}
        self.words = Counter[str]()
        self.ratios: list[float] = []  # of accepted pairs: log of chosen over rejected, in characters
        self.left_out: list[float] = []  # of pairs that --match-lengths left out
        self.categories = Counter[str]()
        self.unsafe = self.unparsed = 0

    def add(self, example: Example) -> None:
        """Count one example."""
        for name, value in categories_of(example).items():
            self.drawn.setdefault(name, Counter())[value] += 1
            if not example.reject_reasons:
                self.accepted.setdefault(name, Counter())[value] += 1
        self.unparsed += UNPARSED in example.reject_reasons
        if UNSAFE in example.reject_reasons:
            self.unsafe += 1
            self.categories.update(example.meta.get("guard", {}).get("categories", []))
        if example.reject_reasons in ((), (SURPLUS,)):
            pair = example.preference_pair
            (self.left_out if example.reject_reasons else self.ratios).append(
                math.log(max(1, len(pair.chosen)) / max(1, len(pair.rejected)))
            )
        if not example.reject_reasons:
            self.words["chosen"] += len(example.revised_answer.split())
            self.words["rejected"] += len(example.initial_answer.split())


def describe_pairs(
    accepted: Iterable[Example], rejected: Iterable[Example], manifest: Manifest, guard: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The report's part on the data. `guard`: {"name", "safe"} of the last pass, None without a guard.

    "shares" maps source, topic, kind, length and principle to {value: {"drawn", "accepted", "share"}}, the share being
    that of the accepted pairs; "tempting" is the share of kinds that tempt among the pairs on the broad grid, None
    without such pairs; "evaluation_sets" names what the instructions were held against, which is without the shipped
    sets where "allow_evaluation_sets"; "log_ratio" is the mean log length ratio of chosen over rejected, 0 where they
    match.
    """
    tally = _Tally()
    for examples in (accepted, rejected):
        for example in examples:
            tally.add(example)
    counts, written = manifest.counts, manifest.tokens.get("completion", 0)
    return {
        "shares": {name: _shares(drawn, tally.accepted.get(name, Counter())) for name, drawn in tally.drawn.items()},
        "tempting": _tempting(tally.accepted.get("kind", Counter())),
        "evaluation_sets": [name.partition(" sha256:")[0] for name in manifest.settings.get("exclude", [])],
        "allow_evaluation_sets": bool(manifest.settings.get("allow_evaluation_sets")),
        "refused": _after(counts, "refused/"),
        "ran_out": _after(counts, "ran_out/"),
        "lengths": _lengths(tally),
        "guard": None if guard is None else _guard(guard, tally),
        "tokens": dict(manifest.tokens),
        "tokens_per_second": written / manifest.wall_seconds if manifest.wall_seconds else None,
    }


def categories_of(example: Example) -> dict[str, str]:
    """Where an example belongs: its source, what its prompt asked for, and the principle it was revised for."""
    name, _, place = str(example.meta["source"]).partition(":")
    found = {"source": name}
    if name == SELF:
        found |= dict(zip(NAMES, place.split("/"), strict=False))
    revised = [one.principle_id for one in example.rounds if one.revised_answer]
    return found | ({"principle": revised[0]} if revised else {})


def _shares(drawn: Counter[str], accepted: Counter[str]) -> dict[str, dict[str, float]]:
    total = accepted.total()
    return {
        value: {"drawn": count, "accepted": accepted[value], "share": accepted[value] / total if total else 0.0}
        for value, count in sorted(drawn.items(), key=lambda item: (-accepted[item[0]], -item[1], item[0]))
    }


def _tempting(kinds: Counter[str]) -> float | None:
    tempting = sum(count for kind, count in kinds.items() if tempts(kind))
    return tempting / kinds.total() if tempting else None


def _after(counts: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): count for name, count in counts.items() if name.startswith(prefix)}


def _lengths(tally: _Tally) -> dict[str, Any]:
    """Mean words of chosen and rejected, and the mean log length ratio with and without what was left out."""
    pairs, pool = len(tally.ratios), [*tally.ratios, *tally.left_out]
    return {
        "chosen_words": tally.words["chosen"] / pairs if pairs else None,
        "rejected_words": tally.words["rejected"] / pairs if pairs else None,
        "log_ratio": math.fsum(tally.ratios) / pairs if pairs else None,
        "log_ratio_unmatched": math.fsum(pool) / len(pool) if pool else None,
        "left_out": len(tally.left_out),
    }


def _guard(guard: Mapping[str, Any], tally: _Tally) -> dict[str, Any]:
    ordered = sorted(tally.categories.items(), key=lambda item: (-item[1], item[0]))
    table = [{"category": code, "words": CATEGORY_WORDS.get(code, code), "count": count} for code, count in ordered]
    return {**guard, "unsafe": tally.unsafe, "unparsed": tally.unparsed, "categories": table}
