"""report.html: one file with everything in it, made by Jinja2 with autoescape; no text of a model is ever markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence

from cai_experiment.evaluation import words
from cai_experiment.evaluation.differences import Piece, differences
from cai_experiment.evaluation.generation import verdicts_after
from cai_experiment.evaluation.plots import length_plot, training_plots
from cai_experiment.observe.screen import escaped
from cai_experiment.records.schema import Example

TEMPLATE = Path(__file__).with_name("report.html.j2")
SHOWN_EXAMPLES = 100


def render_page(report: Mapping[str, Any], examples: Sequence[Example]) -> str:
    """The page for a report and its accepted examples (the first 100 of them)."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "figure": words.figure,
        "interval": words.interval_text,
        "figures": words.gate_figures,
        "shown": lambda value: escaped(str(value)),
    }
    plots = training_plots(report["history"])
    if len(examples) > 1:
        lengths = [[len(text.split()) for text in (e.revised_answer, e.initial_answer)] for e in examples]
        plots.append(length_plot([chosen for chosen, _ in lengths], [rejected for _, rejected in lengths]))
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        warnings=words.report_warnings(report),
        cost=words.cost_text(report["cost"]),
        dataset_lines=words.dataset_lines(report["dataset"]) if report["dataset"] else [],
        plots=[{"title": plot.title, "svg": Markup(plot.svg)} for plot in plots],
        examples=[_example(example) for example in examples[:SHOWN_EXAMPLES]],
        left_out=max(0, len(examples) - SHOWN_EXAMPLES),
        answers=[_side_by_side(a["instruction"], a["base"], a["trained"]) for a in report["answers"]],
    )


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
