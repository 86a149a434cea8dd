"""The comparison on the terminal: tables within 100 columns, and what they say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cai_experiment.comparison.reading import (
    ITS_OWN_WORD,
    ended_table,
    kinder_table,
    matrix_table,
    missed_more_table,
    rates_table,
    readings,
    work_table,
)
from cai_experiment.evaluation.reporting.words import result_text
from cai_experiment.observe.screen import escaped

if TYPE_CHECKING:
    from rich.console import Console

AT_A_TIME = 3  # models beside each other
WIDTH = 100  # columns


def print_comparison(result: Mapping[str, Any], console: Console) -> None:
    """Rates, failures, work, matrix and own answers, then a line for each thing that they say."""
    _print_wide(console, rates_table(result))
    _print(console, {**ended_table(result), "note": ""})
    _print(console, {**work_table(result), "note": ""})
    if len(result["models"]) > 1:
        for name in ITS_OWN_WORD[:2]:
            _print_wide(console, matrix_table(result, name))
        _print(console, {**(missed_more_table if result["missed_more"] else kinder_table)(result), "note": ""})
    for line in readings(result):
        console.print(f"- {escaped(line)}", markup=False, width=WIDTH)


def _print_wide(console: Console, table: Mapping[str, Any]) -> None:
    """A table of many models in several, each with at most AT_A_TIME of them."""
    columns = table["columns"]
    heads = 2 if "better" in columns else 1
    for start in range(heads, len(columns), AT_A_TIME):
        places = [*range(heads), *range(start, min(start + AT_A_TIME, len(columns)))]
        rows = [[row[place] for place in places] for row in table["rows"]]
        last = start + AT_A_TIME >= len(columns)
        part = {**table, "columns": [columns[p] for p in places], "rows": rows, "note": table["note"] if last else ""}
        _print(console, part)


def _print(console: Console, table: Mapping[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    if not table["rows"]:
        return
    shown = Table(title=Text(escaped(table["title"])), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table["columns"]:
        shown.add_column(Text(escaped(column)), overflow="fold")
    for row in table["rows"]:
        shown.add_row(*(Text(_cell(cell)) for cell in row))
    console.print(shown, width=WIDTH)
    if table["note"]:
        console.print(escaped(table["note"]), markup=False, width=WIDTH)


def _cell(cell: Any) -> str:
    if not isinstance(cell, Mapping):
        return escaped(str(cell))
    return result_text(cell).replace(", n = ", "\nn = ")
