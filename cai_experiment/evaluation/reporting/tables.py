"""The report's tables for a paper: each as CSV, with full digits, and as LaTeX for booktabs.

A table here is what report.json holds: {"name", "title", "columns", "rows", "note"}; a cell is a string, or a result's
value, n, interval and unparsed.
"""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

from cai_experiment.evaluation.reporting.merging import make_folder
from cai_experiment.evaluation.reporting.naming import file_name, named, pairs_of_arms, scaled, scaled_rows
from cai_experiment.evaluation.reporting.words import gate_cells, gate_scale, p_text, result_text, sentence_case
from cai_experiment.observe.screen import escaped
from cai_experiment.records.files import write_atomic

LATIN = 0x180  # above Latin-1 and Latin Extended-A
Cell = str | Mapping[str, Any]
Table = dict[str, Any]
NAME = "name"  # the column of a metric's own name, which a paper needs not
WIDE_FROM = 5  # columns; a wider LaTeX table is fitted to the page
RESULT_COLUMNS = ("", "_low", "_high", "_n", "_unparsed")

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "–": "--", "−": "$-$", "→": r"$\rightarrow$", "≥": r"$\geq$",
    "≤": r"$\leq$", "×": r"$\times$", "…": r"\ldots{}",
}  # fmt: skip


def report_tables(report: Mapping[str, Any]) -> list[Table]:
    """Every table of the page: gates, base against trained, all metrics, tests, and those that the parts brought."""
    own = [gates_table(report), effect_table(report), metrics_table(report), tests_table(report)]
    return [table for table in own if table["rows"]] + list(report.get("tables", []))


def _table(name: str, title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Table:
    return {"name": name, "title": title, "columns": list(columns), "rows": [list(row) for row in rows], "note": ""}


def gates_table(report: Mapping[str, Any]) -> Table:
    """The gates with what was asked and found."""
    rows = [
        (gate["name"], gate_cells(gate, report).asked, _found(gate, report), "go" if gate["passed"] else "no-go")
        for gate in report["gates"]
    ]
    return _table("gates", f"Gates of milestone {report['milestone']}", ("gate", "asked", "found", "result"), rows)


def _found(gate: Mapping[str, Any], report: Mapping[str, Any]) -> Cell:
    kept = {name: gate[name] for name in ("value", "n", "interval")}
    return {**kept, "unparsed": 0, "scale": gate_scale(gate, report)[0]}


def effect_table(report: Mapping[str, Any]) -> Table:
    """Base, trained and their paired difference, of everything that was measured for both."""
    metrics, differences, tests = report["metrics"], report.get("differences", {}), report.get("tests", {})
    rows = []
    for name in pairs_of_arms(metrics):
        p = tests[name]["p_holm"] if name in tests else None
        base, trained = (scaled(f"{name}_{arm}", metrics[f"{name}_{arm}"]) for arm in ("base", "trained"))
        change = differences.get(name, "–")
        if name in differences:
            change = {**change, "scale": "points" if base["scale"] == "rate" else "change"}
        rows.append((named(name).label, name, base, trained, change, p_text(p)))
    columns = ("measure", NAME, "base", "trained", "difference", "p (Holm)")
    return _table("base_and_trained", "Base and trained model on the same items", columns, rows)


def metrics_table(report: Mapping[str, Any]) -> Table:
    """Every metric by its own name."""
    rows = [(named(name).label, name, scaled(name, metric)) for name, metric in report["metrics"].items()]
    return _table("metrics", "All metrics", ("measure", NAME, "value"), rows)


def tests_table(report: Mapping[str, Any]) -> Table:
    """Every test; the counts are McNemar's, of a rate."""
    rows = [
        (named(name).label, name, str(t.get("only_base", "–")), str(t.get("only_trained", "–")),
         f"{t['p_value']:.3g}", f"{t.get('p_holm', math.nan):.3g}")
        for name, t in report.get("tests", {}).items()
    ]  # fmt: skip
    columns = ("measure", NAME, "only base", "only trained", "p", "p (Holm)")
    return _table("tests", "Tests on the same items (with counts: McNemar's)", columns, rows)


# ---------------------------------------------------------------- writing


def write_tables(folder: Path, tables: Iterable[Mapping[str, Any]]) -> None:
    """Write NAME.csv and NAME.tex of each. Raises DiskError or BadInputError where the folder cannot be written."""
    make_folder(folder)
    for table in tables:
        name = file_name(table["name"])
        write_atomic(folder / f"{name}.csv", [csv_text(table).encode("utf-8", "backslashreplace")])
        write_atomic(folder / f"{name}.tex", [latex_text(table).encode("utf-8", "backslashreplace")])


def csv_text(table: Mapping[str, Any]) -> str:
    """The table as CSV (RFC 4180): a column of results becomes value, _low, _high, _n and _unparsed in full digits."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\r\n")
    results = result_columns(table)
    header: list[str] = []
    for place, column in enumerate(table["columns"]):
        header += [f"{column}{end}" for end in RESULT_COLUMNS] if place in results else [column]
    writer.writerow(map(escaped, header))
    for row in table["rows"]:
        cells: list[str] = []
        for place, cell in enumerate(row):
            cells += _five(cell) if place in results else [escaped(str(cell))]
        writer.writerow(cells)
    return file.getvalue()


def result_columns(table: Mapping[str, Any]) -> set[int]:
    """The places of the columns that hold results (beside a dash here and there)."""
    return {place for row in table["rows"] for place, cell in enumerate(row) if isinstance(cell, Mapping)}


def _five(cell: Cell) -> list[str]:
    """value, low, high, n, unparsed; empty where there is none."""
    if isinstance(cell, str):
        return ["" if cell in ("–", "-") else escaped(cell), "", "", "", ""]
    low, high = cell.get("interval") or ("", "")
    value = cell.get("value")
    return [str(one) for one in ("" if value is None else value, low, high, cell.get("n", ""), cell.get("unparsed", 0))]


def latex_text(table: Mapping[str, Any]) -> str:
    """The table as a LaTeX float (\\usepackage{booktabs,graphicx} and T1 fonts); every text is escaped. Metrics' own
    names are left out, and what has many columns is fitted to the line's width."""
    results = result_columns(table)
    places = [place for place, column in enumerate(table["columns"]) if column != NAME]
    columns = "".join("r" if place in results else "l" for place in places)
    wide = len(places) >= WIDE_FROM
    lines = [
        r"\begin{table}", r"\centering", rf"\caption{{{_caption(table)}}}",
        rf"\label{{tab:{file_name(table['name']).replace('_', '-')}}}", *([r"\resizebox{\linewidth}{!}{%"] * wide),
        rf"\begin{{tabular}}{{{columns}}}", r"\toprule",
        _latex_row(latex_escaped(table["columns"][place]) for place in places), r"\midrule",
        *(_latex_row(_latex_cell(row[place]) for place in places) for row in scaled_rows(table)),
        r"\bottomrule", r"\end{tabular}" + "}" * wide, r"\end{table}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _caption(table: Mapping[str, Any]) -> str:
    """Title, note and what the brackets mean, each a sentence."""
    said = [table["title"], table.get("note") or "", "95% intervals in brackets"]
    return " ".join(f"{latex_escaped(sentence_case(text.rstrip('.')))}." for text in said if text)


def _latex_row(cells: Iterable[str]) -> str:
    row = " & ".join(cells) + r" \\"
    return "{}" + row if row.startswith(("[", "*")) else row  # the line break before would take it for its own


def _latex_cell(cell: Cell) -> str:
    """A string, or "0.93 [0.88, 0.96], $n$ = 153"."""
    if isinstance(cell, str):
        return latex_escaped(cell)
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", latex_escaped(result_text(cell))).replace("n = ", "$n$ = ")


def latex_escaped(text: str) -> str:
    """Text that LaTeX prints as it stands: its special characters are escaped, line breaks become blanks. What pdfLaTeX
    has no letter for in T1 fonts stands as its code point, "[U+4E2D]"; the CSV has the character."""
    flat = re.sub(r"\s+", " ", escaped(text))
    return "".join(_LATEX.get(one) or (one if ord(one) < LATIN else f"[U+{ord(one):04X}]") for one in flat)
