"""The report's plots: as SVG inside the page, in the page's own text colour, so that dark and light both work; and as
PDF for a paper, with its fonts embedded (Type 42).

No text of a model enters a plot; names of measures and of a table's rows do, as text and never as markup.
"""

from __future__ import annotations

import html
import io
import re
import threading
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Mapping, Sequence

from cai_experiment.evaluation.reporting.naming import file_name, scaled_rows
from cai_experiment.evaluation.reporting.summary import Direction, Effect
from cai_experiment.observe.screen import escaped

BLUE, ORANGE, GREEN, PURPLE, GREY = "#3b82d0", "#d9822b", "#2f9e6e", "#a066c9", "#8a8f98"  # on white and on near-black
INK = "#010203"  # stands for the page's own text colour until the SVG is finished
FEW_POINTS = 20  # with fewer, each is marked
MOST_ROWS = 40  # a table with more is not drawn
DRAWN_N = 10  # a rate of fewer items has an interval of half the axis: it stands in the table alone
TALL = 6.0  # inches; a plot above it is folded on the page
MOST_SERIES = 4
SHAPES = "oDs^"
_DRAWING = threading.Lock()  # matplotlib's settings belong to the whole process, and the demo draws in several threads
LABEL = 62  # characters of a row's label
WIDTH = 4.6  # inches: about a phone's width at its own size, so that its text can be read there
_ABOVE: Mapping[str, Any] = {  # where a legend covers nothing
    "frameon": False, "labelcolor": INK, "fontsize": 8, "columnspacing": 1.2, "loc": "lower left",
    "bbox_to_anchor": (0, 1), "borderaxespad": 0.3, "handlelength": 1.5,
}  # fmt: skip
LABEL_HEIGHT, LINE_HEIGHT = 0.24, 0.15  # inches
MARKS: dict[Direction, tuple[str, str, str]] = {
    "better": ("better", BLUE, "^"), "worse": ("worse", ORANGE, "v"), "unclear": ("not clear", GREY, "o"),
    "moved": ("moved, neither is better", PURPLE, "D"), "none": ("neither is better", PURPLE, "s"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plot:
    """A finished plot: `svg` is trusted markup of our own, `pdf` the same as a file; `title` says what it shows."""

    name: str  # a file's name
    title: str
    svg: str
    pdf: bytes
    tall: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A point with its interval in a plot of rows; `interval` None draws the point alone."""

    row: int
    series: int  # its place below the row's label
    value: float
    interval: Sequence[float] | None
    colour: str
    marker: str


def training_plots(history: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Loss, margin and log-probabilities over steps; `history` is metrics.jsonl. None for fewer than two steps."""
    if len(history) < 2:
        return []
    return [
        _lines("loss", "Training loss", history, {"loss": ("loss of the batch", BLUE)}),
        _lines("margin", "Reward margin (chosen - rejected)", history, {"margin": ("margin", BLUE)}),
        _lines(
            "log_probability",
            "Log-probability of the answers (nats)",
            history,
            {"chosen_logp": ("chosen", BLUE), "rejected_logp": ("rejected", ORANGE)},
        ),
    ]


def length_plot(chosen: Sequence[int], rejected: Sequence[int]) -> Plot:
    """How many words the revisions (chosen) and the first answers (rejected) have, as two histograms on one axis."""
    figure, axes = new_axes("words", "pairs")
    lengths = [*chosen, *rejected]
    bins = min(20, max(1, len(set(lengths))))
    axes.hist(
        [list(rejected), list(chosen)], bins=bins, range=(min(lengths), max(lengths) + 1),
        color=[ORANGE, BLUE], label=["first answer (rejected)", "revision (chosen)"],
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return finished(figure, axes, "lengths", "Length of both answers in words")


def rates_plot(
    found: Sequence[Effect], arms: tuple[str, str] = ("base", "trained"), name: str = "base_and_trained",
    title: str = "Rates of the base and of the trained model",
) -> Plot | None:  # fmt: skip
    """Every rate before and after training (or of two runs), with its Wilson interval; None if there is none."""
    rates = [one for one in found if one.rate and None not in (one.base["value"], one.trained["value"])]
    if not rates:
        return None
    rows = []
    for place, one in enumerate(rates):
        rows.append(Row(place, 0, 100 * one.base["value"], _percent(one.base), ORANGE, "o"))
        rows.append(Row(place, 1, 100 * one.trained["value"], _percent(one.trained), BLUE, "D"))
    labels = [_counted(one.named.label, one.base["n"], one.trained["n"]) for one in rates]
    figure, axes = _rows_axes(labels, "% (95% Wilson interval)", rows)
    axes.set_xlim(-2, 102)
    _legend(axes, [(arms[0], ORANGE, "o"), (arms[1], BLUE, "D")])
    return finished(figure, axes, name, title)


def forest_plot(
    found: Sequence[Effect], axis: str = "points, trained − base (paired 95% interval)", name: str = "differences",
    title: str = "Difference that training made, on the same items",
) -> Plot | None:  # fmt: skip
    """The paired differences of the rates, trained - base, with a line at no change; None if there is none."""
    paired = [(one, one.change) for one in found if one.rate and one.change and one.change["value"] is not None]
    if not paired:
        return None
    rows = []
    for place, (one, change) in enumerate(paired):
        _, colour, marker = MARKS[one.direction]
        rows.append(Row(place, 0, 100 * change["value"], _percent(change), colour, marker))
    labels = [_counted(one.named.label, change["n"]) for one, change in paired]
    figure, axes = _rows_axes(labels, axis, rows)
    for place in range(len(paired)):  # the labels stay free of it
        top = place * _row_height(1)
        axes.plot([0, 0], [top + LABEL_HEIGHT, top + _row_height(1)], color=INK, linewidth=1, zorder=1)
    used = dict.fromkeys(one.direction for one, _ in paired)
    _legend(axes, [MARKS[way] for way in used])
    return finished(figure, axes, name, title)


def table_plot(table: Mapping[str, Any]) -> Plot | None:
    """The rates of a report's table by row (per principle, per category ...), with their intervals; None for a table
    that has no column of rates, or fewer than 2 rows with enough items, or too many."""
    places = _drawn_columns(table)
    drawn = [row for row in scaled_rows(table) if _enough([row[place] for place in places])]
    if not places or not 2 <= len(drawn) <= MOST_ROWS:
        return None
    colours = _series_colours([table["columns"][place] for place in places])
    rows, labels = [], []
    for line, cells in enumerate(drawn):
        results = [cells[place] for place in places if isinstance(cells[place], Mapping)]
        labels.append(_counted(str(cells[0]), *(one["n"] for one in results)))
        for series, place in enumerate(places):
            cell = cells[place]
            if isinstance(cell, Mapping) and cell["value"] is not None:
                rows.append(Row(line, series, 100 * cell["value"], _percent(cell), colours[series], SHAPES[series]))
    figure, axes = _rows_axes(labels, "% (95% interval)", rows)
    axes.set_xlim(-2, 102)
    if len(places) > 1:
        _legend(axes, [(table["columns"][p], colours[i], SHAPES[i]) for i, p in enumerate(places)])
    left_out = len(table["rows"]) - len(drawn)
    note = f" ({left_out} of fewer than {DRAWN_N} items in the table alone)" if left_out else ""
    return finished(figure, axes, table["name"], f"{table['title']}{note}")


def _enough(cells: Sequence[Any]) -> bool:
    numbers = [cell["n"] for cell in cells if isinstance(cell, Mapping)]
    return bool(numbers) and min(numbers) >= DRAWN_N


def _are_rates(rows: Sequence[Sequence[Any]], place: int) -> bool:
    """True if the column holds rates (and strings here and there)."""
    cells = [row[place] for row in rows if isinstance(row[place], Mapping)]
    measured = [cell for cell in cells if cell.get("value") is not None]
    return bool(measured) and all(cell["scale"] == "rate" for cell in measured)


def _drawn_columns(table: Mapping[str, Any]) -> list[int]:
    """The first columns of rates; of a table with both arms the first pair of them ("evasive, base", ", trained")."""
    rows = scaled_rows(table)
    places = [place for place in range(1, len(table["columns"])) if _are_rates(rows, place)]
    for one, two in pairwise(places):
        names = [str(table["columns"][place]) for place in (one, two)]
        if names[0].endswith("base") and names[0].removesuffix("base") == names[1].removesuffix("trained"):
            return [one, two]
    return places[:MOST_SERIES]


def _series_colours(names: Sequence[str]) -> list[str]:
    """The same colours for base and trained as in the other plots."""
    if len(names) == 2 and names[0].endswith("base") and names[1].endswith("trained"):
        return [ORANGE, BLUE]
    return [BLUE, ORANGE, GREEN, PURPLE][: len(names)]


def _percent(result: Mapping[str, Any]) -> list[float] | None:
    interval = result.get("interval")
    return None if interval is None else [100 * bound for bound in interval]


def _counted(label: str, *numbers: int) -> str:
    """A row's label with its number of items, or numbers where they differ."""
    counts = " / ".join(f"{n:,}" for n in dict.fromkeys(numbers))
    shown = escaped(label)
    return f"{shown if len(shown) <= LABEL else shown[: LABEL - 1] + '…'}, n = {counts}"


# ---------------------------------------------------------------- drawing


def _lines(name: str, title: str, history: Sequence[Mapping[str, Any]], series: Mapping[str, tuple[str, str]]) -> Plot:
    """`series` maps a key of the history's rows to its label and colour; rows without the key are passed over."""
    figure, axes = new_axes("step", "")
    for key, (label, colour) in series.items():
        points = [(row["step"], row[key]) for row in history if row.get(key) is not None]
        marker = "o" if len(points) < FEW_POINTS else None
        steps, values = [x for x, _ in points], [y for _, y in points]
        axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return finished(figure, axes, name, title)


def _row_height(series: int) -> float:
    """Inches of a row: its label, a line for each series, a gap."""
    return LABEL_HEIGHT + LINE_HEIGHT * series + 0.06


def _rows_axes(labels: Sequence[str], x: str, rows: Sequence[Row]) -> tuple[Any, Any]:
    """Axes with a row for each label, which stands above its points; the first row is on top. y is in inches."""
    each = _row_height(1 + max(row.series for row in rows))
    figure, axes = new_axes(x, "", height=0.95 + each * len(labels))
    for place, label in enumerate(labels):
        axes.text(0, place * each + LABEL_HEIGHT / 2, label, transform=axes.get_yaxis_transform(), color=INK,
                  fontsize=8.5, va="center", parse_math=False)  # fmt: skip
    for row in rows:
        y = row.row * each + LABEL_HEIGHT + LINE_HEIGHT * (row.series + 0.5)
        if row.interval is not None:
            axes.plot(row.interval, [y, y], color=row.colour, linewidth=2, solid_capstyle="butt")
        axes.plot([row.value], [y], color=row.colour, marker=row.marker, markersize=5.5, linestyle="none")
    axes.set_ylim(each * len(labels) + 0.05, 0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    return figure, axes


def _legend(axes: Any, entries: Sequence[tuple[str, str, str]]) -> None:
    """A legend above the axes, from (label, colour, marker)."""
    for label, colour, marker in entries:
        axes.plot([], [], color=colour, marker=marker, markersize=5.5, linewidth=2, label=escaped(str(label)))
    legend = axes.legend(**_ABOVE, ncols=min(3, len(entries)))
    for text in legend.get_texts():
        text.set_parse_math(False)


def new_axes(x: str, y: str, height: float = 2.6) -> tuple[Any, Any]:
    """A small transparent figure in the page's ink. It is made without pyplot, which would look for a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_xlabel(escaped(x), color=INK, parse_math=False)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(INK)
    axes.grid(alpha=0.25)
    return figure, axes


def finished(figure: Any, axes: Any, name: str, title: str) -> Plot:
    """The figure as an <svg> element (no prolog, no metadata, its own ids, the page's ink), and as PDF."""
    import matplotlib

    if axes.get_legend() is None and len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(**_ABOVE, ncols=2)
    file, pdf = io.StringIO(), io.BytesIO()
    with _DRAWING, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif",
                                          "pdf.fonttype": 42}), warnings.catch_warnings():  # fmt: skip
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the page's font has it
        figure.savefig(file, format="svg", transparent=True)
        figure.set_layout_engine("none")  # as it was laid out for the page
        figure.savefig(pdf, format="pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})
    name = file_name(name)
    tall = float(figure.get_figheight()) > TALL
    return Plot(name, title, _page_svg(file.getvalue(), name, title), pdf.getvalue(), tall)


def _page_svg(svg: str, name: str, title: str) -> str:
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r'(^<svg [^>]*?)height="[^"]*"', r"\1", svg))
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(escaped(title))}" ', 1).strip()
