"""The report's plots, as SVG that stands inside the page: it takes the page's text colour, so dark and light both work.

No text of a model or of data enters a plot.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any, Mapping, Sequence

BLUE, ORANGE = "#3b82d0", "#d9822b"  # readable on white and on near-black
INK = "#010203"  # stands for the page's own text colour until the SVG is finished
FEW_POINTS = 20  # with fewer, each is marked


@dataclass(frozen=True, slots=True)
class Plot:
    """A finished plot: `svg` is trusted markup of our own, `title` says what it shows."""

    title: str
    svg: str


def training_plots(history: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Loss, margin and log-probabilities over steps; `history` is metrics.jsonl. None for fewer than two steps."""
    if len(history) < 2:
        return []
    return [
        _lines("training loss", history, {"loss": ("loss of the batch", BLUE)}),
        _lines("Reward margin (chosen - rejected)", history, {"margin": ("margin", BLUE)}),
        _lines(
            "Log-probability of the answers (nats)",
            history,
            {"chosen_logp": ("chosen", BLUE), "rejected_logp": ("rejected", ORANGE)},
        ),
    ]


def length_plot(chosen: Sequence[int], rejected: Sequence[int]) -> Plot:
    """How many words the revisions (chosen) and the first answers (rejected) have, as two histograms on one axis."""
    figure, axes = _new_axes("words", "pairs")
    lengths = [*chosen, *rejected]
    bins = min(20, max(1, len(set(lengths))))
    axes.hist(
        [list(rejected), list(chosen)], bins=bins, range=(min(lengths), max(lengths) + 1),
        color=[ORANGE, BLUE], label=["first answer (rejected)", "revision (chosen)"],
    )  # fmt: skip
    return _finish(figure, axes, "Length of both answers in words")


def _lines(title: str, history: Sequence[Mapping[str, Any]], series: Mapping[str, tuple[str, str]]) -> Plot:
    """`series` maps a key of the history's rows to its label and colour; rows without the key are passed over."""
    figure, axes = _new_axes("step", "")
    for key, (label, colour) in series.items():
        points = [(row["step"], row[key]) for row in history if row.get(key) is not None]
        marker = "o" if len(points) < FEW_POINTS else None
        steps, values = [x for x, _ in points], [y for _, y in points]
        axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _finish(figure, axes, title)


def _new_axes(x: str, y: str) -> tuple[Any, Any]:
    """A small transparent figure in the page's ink. It is made without pyplot, which would look for a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2.8), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(INK)
    axes.grid(alpha=0.25)
    return figure, axes


def _finish(figure: Any, axes: Any, title: str) -> Plot:
    """The figure as an <svg> element: no prolog, no metadata, its own ids, the page's ink."""
    import matplotlib

    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, labelcolor=INK, fontsize="small")
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = "".join(word[0] for word in re.findall(r"\w+", title)).lower()
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r'(^<svg [^>]*?)height="[^"]*"', r"\1", svg))
    return Plot(title, svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1).strip())
