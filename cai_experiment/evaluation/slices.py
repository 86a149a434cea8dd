"""Held-out preference in full: every pair as an item, the shortcuts beside the model, and all of it by principle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cai_experiment.evaluation.found import ITEMS_FOLDER, Case, Cell, Evaluation, Table
from cai_experiment.evaluation.preference import Pair, PairScore, preference_metrics
from cai_experiment.evaluation.shortcuts import shortcuts_right
from cai_experiment.judging.result import Result

PREFERENCE = "preference"
SHORTCUTS = {"length_only": "length alone", "bag_of_words": "words alone"}
UNKNOWN = "not known"  # the principle of a pair that is not this project's


@dataclass(frozen=True, slots=True)
class Scored:
    """One held-out pair: what the trained model prefers (None: too long to be scored), and what the shortcuts say."""

    pair: Pair
    principle: str
    score: PairScore | None
    shortcuts: dict[str, bool]


def held_out_preference(
    train: Sequence[Pair], held_out: Sequence[Pair], scores: Sequence[PairScore | None], principles: Sequence[str]
) -> Evaluation:
    """Accuracy and margin of the implicit reward on `held_out`, beside the two shortcuts fitted on `train`.

    `scores` and `principles` belong to `held_out`, in its order. Pairs that the model gets wrong are cases to be read.
    """
    right = shortcuts_right(train, held_out)
    rows = [
        Scored(pair, principle, score, {name: found[i] for name, found in right.items()})
        for i, (pair, principle, score) in enumerate(zip(held_out, principles, scores, strict=True))
    ]
    metrics = preference_metrics(scores)
    metrics |= {f"{name}_accuracy": Result.rate(sum(found), len(found)) for name, found in right.items()}
    wrong = [row for row in rows if row.score is not None and row.score.margin <= 0]
    return Evaluation(
        with_items(metrics, PREFERENCE),
        tables=[_table(rows, tuple(right))],
        cases=[_case(row) for row in wrong],
        items={PREFERENCE: [_item(number, row) for number, row in enumerate(rows)]},
    )


def with_items(metrics: dict[str, Result], name: str) -> dict[str, Result]:
    """The metrics, each naming the file of items `name`."""
    place = f"{ITEMS_FOLDER}/{name}.jsonl"
    return {key: replace(result, items=place) for key, result in metrics.items()}


def grouped(principles: Sequence[str]) -> dict[str, list[int]]:
    """Places of each principle, the most frequent principle first."""
    places: dict[str, list[int]] = {}
    for place, principle in enumerate(principles):
        places.setdefault(principle, []).append(place)
    return dict(sorted(places.items(), key=lambda item: (-len(item[1]), item[0])))


def _table(rows: Sequence[Scored], shortcuts: Sequence[str]) -> Table:
    columns = ("principle", "prefers the revision", "mean margin (nats)", *(SHORTCUTS[name] for name in shortcuts))
    groups = {"all": list(range(len(rows))), **grouped([row.principle for row in rows])}
    lines: list[tuple[Cell, ...]] = []
    for principle, places in groups.items():
        some = [rows[place] for place in places]
        found = preference_metrics([row.score for row in some])
        said = [_share(some, lambda row, name=name: row.shortcuts[name]) for name in shortcuts]  # type: ignore[misc]
        lines.append((principle, found["preference_accuracy"], found["preference_margin"], *said))
    note = "By the principle that was revised for. A shortcut that does as well may be all that was learnt."
    return Table("preference_by_principle", "Held-out preference by principle", columns, tuple(lines), note)


def _share(rows: Sequence[Scored], holds: Callable[[Scored], bool]) -> Result:
    return Result.rate(sum(map(holds, rows)), len(rows))


def _item(number: int, row: Scored) -> dict[str, object]:
    score, trained = row.score, None
    if score is not None:
        trained = {"preference_accuracy": score.margin > 0, "preference_margin": score.margin}
    return {
        "id": getattr(row.pair, "id", "") or f"{number:06d}",
        "instruction": "\n\n".join(turn.text for turn in row.pair.turns),
        "principle": row.principle,
        "trained": trained,
        "chosen": row.pair.chosen,
        "rejected": row.pair.rejected,
        "reward_chosen": None if score is None else score.chosen,
        "reward_rejected": None if score is None else score.rejected,
        **{f"{name}_right": right for name, right in row.shortcuts.items()},
    }


def _case(row: Scored) -> Case:
    assert row.score is not None
    title = f"{row.principle}: margin {row.score.margin:+.2f} nats"
    texts = {"instruction": row.pair.turns[-1].text, "chosen": row.pair.chosen, "rejected": row.pair.rejected}
    return Case("preference: the trained model prefers the first answer", title, texts)
