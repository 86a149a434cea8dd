"""comparison.html, tables/ and figures/: the report page's look, one file, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cai_experiment.comparison.plots import plots
from cai_experiment.comparison.reading import readings, tables
from cai_experiment.evaluation.report import write_figures
from cai_experiment.evaluation.reporting.page import as_markup, environment
from cai_experiment.evaluation.reporting.tables import write_tables
from cai_experiment.records.files import write_atomic, write_json

HTML, JSON = "comparison.html", "comparison.json"
SHOWN = 6  # instructions shown with everything that was said


def write_comparison(folder: Path, result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the page, every table as CSV and LaTeX, every figure as PDF, and last comparison.json.

    Raises DiskError or BadInputError where the folder cannot be written.
    """
    drawn = plots(result)
    write_tables(folder / "tables", tables(result))
    write_figures(folder / "figures", drawn)
    html = render(result, rows, as_markup(drawn))
    write_atomic(folder / HTML, [html.encode("utf-8", "backslashreplace")])
    write_json(folder / JSON, result)


def render(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], drawn: Sequence[Mapping[str, Any]]) -> str:
    """The page; all texts of models are escaped."""
    import jinja2

    made = environment()
    own = jinja2.FileSystemLoader(Path(__file__).parent)
    made.loader = jinja2.ChoiceLoader([made.loader, own])
    page: str = made.get_template("comparison.html.j2").render(
        result=result, readings=readings(result), tables=tables(result), plots=drawn, examples=_examples(rows)
    )
    return page


def _examples(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first instructions with every cell's texts."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        one = found.setdefault(row["instruction_id"], {"instruction": row["instruction"], "cells": []})
        one["cells"].append(dict(row))
    return list(found.values())[:SHOWN]
