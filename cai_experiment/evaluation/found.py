"""What a part of the evaluation found: figures, gates, tests, tables, and the items behind them.

Rows of `Evaluation.items` (one JSONL a measurement), so that a figure can be checked by hand and two runs can be
compared item by item (`eval_model.py --compare`):

- `id`: a string, unique in its file and the same in every run that asks the same item;
- `instruction` (or `text`): what was asked or judged. Two runs' rows are one item if id and this text agree;
- `base` and `trained`: what the measurement says of each arm's answer, a boolean (its mean is a rate) or a number; null
  if it could not be judged (then it counts for neither). A row that measures several things holds an object in each,
  {"words": 45, "ends_by_itself": true}, whose names are metrics' names without _base and _trained. What has one
  value only (preference accuracy and its margin, win rate) stands in `trained` alone;
- `question_id`: rows that share one (the turns of a question) belong together, and are tested together;
- anything else, for people: `base_text`, `trained_text`, `verdict`, `category`, `principle` ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Mapping, Sequence

from cai_experiment.evaluation.gates import Gate
from cai_experiment.judging.result import McNemar, Result

if TYPE_CHECKING:
    from cai_experiment.evaluation.arms import BothAnswers

ITEMS_FOLDER = "evaluation"  # in a run's data folder: one JSONL a measurement, NAME.jsonl

Cell = str | Result  # a Result is shown as value, interval and n, never as a bare rate


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the report (also written as CSV and LaTeX under `name`). Every row has as many cells as `columns`."""

    name: str  # a file's name: "detection", "preference_by_principle"
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The table as report.json holds it: a cell is a string or a result's fields, of which `scale` always."""
        rows = [
            [cell if isinstance(cell, str) else cell.to_json() | {"scale": cell.scale} for cell in row]
            for row in self.rows
        ]
        return {"name": self.name, "title": self.title, "columns": list(self.columns), "rows": rows, "note": self.note}


@dataclass(frozen=True, slots=True)
class Case:
    """One item that a person should look at: a failure, an undecided or unparsed judgement.

    `kind` groups the cases on the page ("win rate: undecided"); `texts` are its labelled texts, shown in full.
    """

    kind: str
    title: str
    texts: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The case as report.json holds it."""
        return {"kind": self.kind, "title": self.title, "texts": dict(self.texts)}


@dataclass(slots=True)
class Evaluation:
    """What was found. `tests` compares base and trained on the same items; `differences` are trained - base over the
    same items, and `p_values` their p-values, unadjusted, where `tests` has none (of a mean the report computes both
    from the rows that hold it); `answers` are there to be read; `methods` says how each thing was judged.

    `items` maps a measurement's name to its rows, which are written to ITEMS_FOLDER/NAME.jsonl; a metric names that
    file in `Result.items`.
    """

    metrics: dict[str, Result] = field(default_factory=dict)
    gates: list[Gate] = field(default_factory=list)
    tests: dict[str, McNemar] = field(default_factory=dict)
    differences: dict[str, Result] = field(default_factory=dict)
    p_values: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    answers: list[BothAnswers] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    items: dict[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)

    def __add__(self, other: Evaluation) -> Evaluation:
        """Both parts in one report; of what both name, the later one's stays."""
        merged = Evaluation()
        for name in self.__slots__:
            one, two = getattr(self, name), getattr(other, name)
            setattr(merged, name, one | two if isinstance(one, dict) else one + two)
        return merged
