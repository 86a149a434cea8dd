"""report.html: one file with everything in it, made by Jinja2 with autoescape; no text of a model is ever markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence

from cai_experiment.evaluation.generation import verdicts_after
from cai_experiment.evaluation.reporting import words
from cai_experiment.evaluation.reporting.differences import Piece, differences
from cai_experiment.evaluation.reporting.naming import file_name, named, scaled, scaled_rows
from cai_experiment.evaluation.reporting.plots import (
    Plot,
    forest_plot,
    length_plot,
    rates_plot,
    table_plot,
    training_plots,
)
from cai_experiment.evaluation.reporting.summary import completed, effects, grouped, headline, in_short
from cai_experiment.observe.screen import escaped
from cai_experiment.records.schema import Example

TEMPLATES = Path(__file__).parent
SHOWN_EXAMPLES = 100
CONTENTS = {
    "gates": "Gates", "effect": "Gained and lost", "tables": "In detail", "answers": "Answers",
    "cases": "Failures and undecided", "curves": "Curves", "metrics": "All metrics", "method": "Method",
    "examples": "Examples", "data": "Data", "settings": "Cost and settings",
}  # fmt: skip
ALWAYS = ("gates", "metrics", "method", "examples", "data", "settings")


def render_page(report: Mapping[str, Any], examples: Sequence[Example], plots: Sequence[Plot] | None = None) -> str:
    """The page for a report and its accepted examples (the first 100 of them); `plots` are `report_plots`'."""
    report = completed(report)
    drawn = {plot.name: plot for plot in (report_plots(report, examples) if plots is None else plots)}
    effect_plots = [drawn.pop(name) for name in ("base_and_trained", "differences") if name in drawn]
    tables = [
        {"table": table, "plots": as_markup([drawn.pop(name)] if (name := file_name(table["name"])) in drawn else [])}
        for table in report["tables"]
    ]
    sections = {
        "groups": grouped(effects(report)), "effect_plots": as_markup(effect_plots), "tables": tables,
        "answers": [_side_by_side(a["instruction"], a["base"], a["trained"]) for a in report["answers"]],
        "cases": report["cases"], "plots": as_markup(list(drawn.values())),
    }  # fmt: skip
    shown = {*ALWAYS, *(name for name in ("tables", "answers", "cases") if sections[name])}
    shown |= {"effect"} if sections["groups"] else set()
    shown |= {"curves"} if sections["plots"] else set()
    dataset = report["dataset"]
    return environment().get_template("report.html.j2").render(
        **sections,
        report={**report, "metrics": _with_files(report["metrics"])},
        gates=[(gate, words.gate_cells(gate, report)) for gate in report["gates"]],
        contents=[(id, title) for id, title in CONTENTS.items() if id in shown],
        headline=headline(report),
        short=in_short(report),
        alarms=words.report_alarms(report),
        warnings=words.report_warnings(report),
        methods=report["methods"],
        cost=words.cost_text(report["cost"]),
        dataset=dataset,
        dataset_lines=words.dataset_lines(dataset) if dataset else [],
        examples=[_example(example) for example in examples[:SHOWN_EXAMPLES]],
        left_out=max(0, len(examples) - SHOWN_EXAMPLES),
    )  # fmt: skip


def report_plots(report: Mapping[str, Any], examples: Sequence[Example]) -> list[Plot]:
    """Every plot of the page: the effect, one for each table of rates, training's curves, the answers' lengths."""
    found = effects(report)
    plots = [rates_plot(found), forest_plot(found), *(table_plot(table) for table in report.get("tables", []))]
    plots += training_plots(report.get("history", []))
    if len(examples) > 1:
        lengths = [[len(text.split()) for text in (e.revised_answer, e.initial_answer)] for e in examples]
        plots.append(length_plot([chosen for chosen, _ in lengths], [rejected for _, rejected in lengths]))
    return [plot for plot in plots if plot is not None]


def environment() -> Any:
    """The Jinja2 environment of our pages."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    made.filters |= {
        "value": words.value_text,
        "between": words.range_text,
        "scaled_value": words.scaled_value,
        "scaled_between": words.scaled_range,
        "p": words.p_text,
        "count": lambda number: f"{number:,}",
        "label": lambda name: named(name).label,
        "scaled_rows": scaled_rows,
        "shown": lambda value: escaped(str(value)),
    }
    return made


def as_markup(plots: Sequence[Plot]) -> list[dict[str, Any]]:
    """The plots as templates take them."""
    from markupsafe import Markup

    return [{"title": plot.title, "svg": Markup(plot.svg), "tall": plot.tall} for plot in plots]


def _with_files(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics with their scale, and their file under a name that Jinja2 does not take for the dict's own method."""
    return {name: {**scaled(name, metric), "items_file": metric.get("items", "")} for name, metric in metrics.items()}


def _example(example: Example) -> dict[str, Any]:
    """What the page shows of one accepted example."""
    return {
        **_side_by_side(example.instruction, example.initial_answer, example.revised_answer),
        "id": example.id,
        "rounds": [
            {"id": r.principle_id, "principle": r.principle, "critique": r.critique,
             "before": r.verdict_before, "after": after}
            for r, after in zip(example.rounds, verdicts_after(example), strict=True)
        ],
    }  # fmt: skip


def _side_by_side(instruction: str, before: str, after: str) -> dict[str, Any]:
    left, right = differences(escaped(before), escaped(after))
    return {"instruction": instruction, "before": _merged(left), "after": _merged(right)}


def _merged(pieces: Sequence[Piece]) -> list[dict[str, str]]:
    """Pieces with the blank before a marked word outside the mark, so that it is not struck through."""
    parts = []
    for piece in pieces:
        text = piece.text.lstrip() if piece.kind != "same" else piece.text
        blank = piece.text[: len(piece.text) - len(text)]
        parts += [{"kind": "same", "text": blank}] * bool(blank) + [{"kind": piece.kind, "text": text}]
    return parts
