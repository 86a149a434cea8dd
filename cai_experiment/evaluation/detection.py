"""Which detector sees harm at all: models, the rules, and both together, on the labelled sets (labelled.py).

    measured = [measure(RulesDetector(), sets), measure(ModelDetector(judge), sets)]
    evaluation = compare([*measured, together(*measured)], sets)

Beside what is measured stands what seed 001 expected of GPT-2, Qwen2-1.5B and Phi-2: guesses of a plan, kept in words.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cai_experiment.constitution.principles import AXIS_WEIGHTS
from cai_experiment.evaluation.found import Case, Cell, Evaluation, Table
from cai_experiment.evaluation.harm.labelled import LabelledText, Sets
from cai_experiment.evaluation.harm_model import BothDetector, Detector, ModelDetection, both, both_name
from cai_experiment.evaluation.harm_rules import Detection
from cai_experiment.evaluation.reporting.naming import file_name
from cai_experiment.evaluation.slices import with_items
from cai_experiment.judging.result import Result
from cai_experiment.observe.progress import Progress

EXPECTED = (
    "Seed 001 expected, of obvious / subtle harm: GPT-2 40% / 10%, Qwen2-1.5B 80-85% / 40-50%, with Phi-2 85-90% / "
    "50-60%; expectations that nobody measured."
)
EXPECTATIONS = {"gpt2": "40% / 10%", "qwen2-1.5b-instruct": "80-85% / 40-50%"}  # of models alone, by a hub id's end
NOT_MEASURED = "not measured: "
SHIPPED = "nano"
SHIPPED_NOTE = "nano, the shipped model, knows its small household world and little else: these sets are outside of it."
MOST_CASES = 20  # of one kind; all rows stand in the items' file


@dataclass(frozen=True, slots=True)
class Measured:
    """What one detector said of the texts of all sets, in order. `failure` not empty: it said nothing, and why.

    `seconds` 0: not known, where an earlier call has had some of the answers.
    `with_rules`: where the model could not be read the rules have spoken, and that counts as this detector's word.
    """

    name: str
    method: str
    found: tuple[Detection, ...] = ()
    seconds: float = 0.0
    failure: str = ""
    with_rules: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """What a detector said of one text. `unread`: it is the rules' word, and stands outside the model's own rates."""

    text: LabelledText
    set_name: str
    found: Detection
    unread: bool

    @property
    def undecided(self) -> bool:
        """True if a model that could be read was undecided on some axis."""
        return isinstance(self.found, ModelDetection) and bool(self.found.undecided) and not self.found.unreadable


Rows = Sequence[Row]


# ---------------------------------------------------------------- measuring


def measure(detector: Detector, sets: Sets, progress: Progress | None = None) -> Measured:
    """What a detector says of every text; `progress` counts texts."""
    start = time.monotonic()
    found = tuple(detector.detect_all([text.text for _, text in _texts(sets)], progress))
    seconds = time.monotonic() - start
    return Measured(detector.name, detector.method, found, seconds, with_rules=isinstance(detector, BothDetector))


def together(model: Measured, rules: Measured) -> Measured:
    """A model with the rules, from what each said: an axis is flagged if either flags it."""
    name, method = both_name(model.name), f"{model.method} and rules"
    said = [one for one in model.found if isinstance(one, ModelDetection)]
    found = tuple(both(one, other) for one, other in zip(said, rules.found, strict=True))
    seconds = model.seconds + rules.seconds if model.seconds else 0.0
    return Measured(name, method, found, seconds, with_rules=True)


def _texts(sets: Sets) -> list[tuple[str, LabelledText]]:
    return [(name, text) for name, texts in sets.items() for text in texts]


def _rows(one: Measured, sets: Sets) -> list[Row]:
    return [
        Row(text, name, found, isinstance(found, ModelDetection) and found.unreadable and not one.with_rules)
        for (name, text), found in zip(_texts(sets), one.found, strict=True)
    ]


# ---------------------------------------------------------------- comparing


def compare(measured: Sequence[Measured], sets: Sets) -> Evaluation:
    """Detection rates, false alarms and pairs told apart, a row a detector; the same by axis; every text as an item.

    Metrics: `detection_SET_NAME` for each set, `false_alarm_NAME` over the harmless texts of all. A text that a model
    could not be read on stands outside its own rates (`unparsed`); in those of the model with the rules it counts.
    """
    spoke = {one.name: _rows(one, sets) for one in measured if not one.failure}
    evaluation = Evaluation(
        tables=[_table(measured, spoke, sets), _by_axis(spoke, sets)],
        methods={one.name: one.method for one in measured},
        notes=[f"{one.name}: {NOT_MEASURED}{one.failure}" for one in measured if one.failure],
    )
    for name, rows in spoke.items():
        key = f"detection_{file_name(name)}"
        metrics = {_metric(name, set_name): _share(_of_set(rows, set_name), True) for set_name in sets}
        evaluation.metrics |= with_items(metrics | {_metric(name, ""): _share(rows, False)}, key)
        evaluation.items[key] = [_item(name, row) for row in rows]
        evaluation.cases += _cases(name, rows)
    return evaluation


def _metric(name: str, set_name: str) -> str:
    """What a rate is called: of a set's harmful texts, or (no set) of all harmless ones."""
    return f"detection_{set_name}_{file_name(name)}" if set_name else f"false_alarm_{file_name(name)}"


def _of_set(rows: Rows, name: str) -> list[Row]:
    return [row for row in rows if row.set_name == name]


def _share(rows: Rows, harmful: bool, holds: Callable[[Detection], bool] = lambda found: found.flagged) -> Result:
    """The share of harmful (or harmless) texts of which the detection `holds`."""
    asked = [row for row in rows if row.text.harmful is harmful]
    read = [row for row in asked if not row.unread]
    return Result.rate(sum(holds(row.found) for row in read), len(read), len(asked) - len(read))


def _told_apart(rows: Rows) -> Result:
    """The share of pairs of which the harmful text is flagged and the harmless one is not."""
    pairs: dict[str, dict[bool, Row]] = {}
    for row in rows:
        pairs.setdefault(row.text.pair, {})[row.text.harmful] = row
    whole = [pair for pair in pairs.values() if len(pair) == 2]
    read = [pair for pair in whole if not (pair[True].unread or pair[False].unread)]
    apart = sum(pair[True].found.flagged and not pair[False].found.flagged for pair in read)
    return Result.rate(apart, len(read), len(whole) - len(read))


# ---------------------------------------------------------------- tables


def _table(measured: Sequence[Measured], spoke: Mapping[str, Rows], sets: Sets) -> Table:
    columns = (
        "detector", *(f"{name} harm detected" for name in sets), "false alarms", "pairs told apart",
        "undecided on an axis", "unparsed", "texts a second", "seed 001 expected",
    )  # fmt: skip
    lines = [_line(one, spoke[one.name], sets) if one.name in spoke else _gap(one, len(columns)) for one in measured]
    notes = [
        "A pair is a harmful text and a harmless one on its topic; flagging everything tells none apart.",
        *((SHIPPED_NOTE,) if any(one.name == SHIPPED for one in measured) else ()),
        EXPECTED,
    ]
    return Table("detection", "Detection of harm", columns, tuple(lines), " ".join(notes))


def _line(one: Measured, rows: Rows, sets: Sets) -> tuple[Cell, ...]:
    by_model = [row for row in rows if isinstance(row.found, ModelDetection)]
    unread = sum(isinstance(row.found, ModelDetection) and row.found.unreadable for row in rows)
    hesitant = sum(row.undecided for row in rows)
    return (
        one.name,
        *(_share(_of_set(rows, name), True) for name in sets),
        _share(rows, False),
        _told_apart(rows),
        Result.rate(hesitant, len(by_model) - unread, unread) if by_model else "-",
        f"{unread} of {len(by_model)}" if by_model else "-",
        f"{len(rows) / one.seconds:.3g}" if one.seconds else "-",
        _expected(one.name),
    )


def _gap(one: Measured, columns: int) -> tuple[Cell, ...]:
    return (one.name, f"{NOT_MEASURED}{one.failure}", *["-"] * (columns - 3), _expected(one.name))


def _expected(name: str) -> str:
    return EXPECTATIONS.get(name.lower().rpartition("/")[2], "-")


def _by_axis(spoke: Mapping[str, Rows], sets: Sets) -> Table:
    """Of the texts that stand under an axis, how many are flagged on that very axis."""
    lines: list[tuple[Cell, ...]] = []
    for name, rows in spoke.items():
        parts = [(f"{set_name}, harmful", _of_set(rows, set_name), True) for set_name in sets]
        for label, part, harmful in [*parts, ("harmless", list(rows), False)]:
            lines.append((name, label, *(_on_axis(part, harmful, axis) for axis in AXIS_WEIGHTS)))
    note = "Flagged on that very axis, of the texts that stand under it; a text may also be flagged on another."
    return Table("detection_by_axis", "Detection by axis", ("detector", "texts", *AXIS_WEIGHTS), tuple(lines), note)


def _on_axis(rows: Rows, harmful: bool, axis: str) -> Result:
    return _share([row for row in rows if row.text.axis == axis], harmful, lambda found: axis in found.axes)


# ---------------------------------------------------------------- items and cases


def _item(name: str, row: Row) -> dict[str, Any]:
    text = row.text
    metric = _metric(name, row.set_name if text.harmful else "")
    labels = {"set": row.set_name, "label": text.label, "axis": text.axis, "kind": text.kind}
    said = None if row.unread else {metric: row.found.flagged}
    return {"id": text.id, "text": text.text, **labels, "trained": said, **row.found.to_json()}


def _cases(name: str, rows: Rows) -> Iterator[Case]:
    """Texts to be looked at: missed, flagged though harmless, undecided, unread; at most MOST_CASES of each."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        for kind in _kinds(row):
            kinds.setdefault(kind, []).append(row)
    for kind, some in kinds.items():
        title = f"{name}: {kind}" + (f" ({MOST_CASES} of {len(some)})" if len(some) > MOST_CASES else "")
        for row in some[:MOST_CASES]:
            reasons = getattr(row.found, "reasons", {})
            said = {"flagged": ", ".join(row.found.axes) or "nothing", **reasons}
            yield Case(title, row.text.id, {row.text.kind: row.text.text, **said})


def _kinds(row: Row) -> Iterator[str]:
    if isinstance(row.found, ModelDetection) and row.found.unreadable:
        yield "unparsed, the rules have spoken"
        return
    if row.text.harmful is not row.found.flagged:
        yield "missed" if row.text.harmful else "false alarm"
    if row.undecided:
        yield "undecided"
