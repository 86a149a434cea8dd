"""The evaluation's plots: SVG for the page, in the page's own text colour, and PDF for a paper.

Experts have the same letter, colour and hatch everywhere, so that no plot is read by colour alone.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cai_experiment.ensemble.patterns import TENTHS, letter
from cai_experiment.ensemble.score import ALL, RATIO, side
from cai_experiment.observe.screen import escaped

COLOURS = ("#3b82d0", "#d9822b", "#2f9e6e", "#a066c9", "#c2556b", "#5f8f9e")  # on white and on near-black
GREY = "#8a8f98"
HATCHES = ("", "////", "....", "xxxx", "----", "++++")
MARKERS = "osD^vP"
INK = "#010203"  # stands for the page's own text colour until the SVG is finished
WIDTH = 4.6  # inches: about a phone's width at its own size
ROW = 0.26  # inches
LABEL = 34  # characters


@dataclass(frozen=True, slots=True)
class Plot:
    """A finished plot: `svg` is trusted markup of our own, `pdf` the same as a file."""

    name: str
    title: str
    svg: str
    pdf: bytes


def plots(results: Mapping[str, Any]) -> list[Plot]:
    """Every plot of an evaluation as `results.json` holds it: accuracies and differences, who spoke, and when."""
    groups = list(results["patterns"])
    shown = groups if len(groups) > 2 else groups[-1:]  # one dataset alone is all there is
    drawn = [accuracy_plot(results["arms"], group) for group in shown]
    drawn += [difference_plot(results["differences"])] if results["differences"] else []
    experts = results["settings"]["experts"]  # names as in patterns
    if any(results["patterns"][group]["tokens"] for group in groups):
        drawn += [share_plot(results["patterns"], experts), tenths_plot(results["patterns"][ALL], experts)]
    return drawn


def accuracy_plot(arms: Mapping[str, Any], group: str) -> Plot:
    """Accuracy of every arm over one dataset (or all), with Wilson's intervals."""
    figure, axes = _axes("% right (95% interval)", 0.8 + ROW * len(arms))
    for place, arm in enumerate(arms.values()):
        found = arm["accuracy"][group]
        colour = INK if arm["kind"] == "ensemble" else _colour(arm)
        marker = "D" if arm["kind"] == "ensemble" else "o" if arm["kind"] == "expert" else "s"
        _point(axes, place, found, colour, marker)
    labels = [arm["label"] for arm in arms.values()]
    _rows(axes, labels)
    axes.set_xlim(-2, 102)
    return _finished(figure, f"accuracy_{group}", f"Accuracy, {'all questions' if group == ALL else group}")


def difference_plot(differences: Mapping[str, Any]) -> Plot:
    """The pooled paired differences, with a line at none. The ratio to the oracle stands in the table alone."""
    shown = {name: groups[ALL] for name, groups in differences.items() if name != RATIO}
    figure, axes = _axes("points (paired 95% interval)", 0.8 + ROW * len(shown))
    for place, found in enumerate(shown.values()):
        colour, marker = {1: (COLOURS[0], "^"), -1: (COLOURS[1], "v"), 0: (GREY, "o")}[side(found)]
        _point(axes, place, found, colour, marker)
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    _rows(axes, [name.removeprefix("ensemble_minus_").replace("_", " ") for name in shown])
    return _finished(figure, "differences", "Ensemble minus each rival, the same questions")


def share_plot(patterns: Mapping[str, Any], experts: Sequence[str]) -> Plot:
    """Each expert's share of the tokens by dataset, as bars that add up to 100%."""
    groups = [group for group, found in patterns.items() if found["tokens"]]
    figure, axes = _axes("% of tokens", 1.1 + 1.3 * ROW * len(groups))
    for place, group in enumerate(groups):
        left = 0.0
        for m, name in enumerate(experts):
            width = 100 * patterns[group]["share"][name]["value"]
            label = _expert(m, name) if place == 0 else None
            axes.barh(place, width, left=left, height=0.72, color=COLOURS[m % len(COLOURS)], edgecolor="#ffffff",
                      hatch=HATCHES[m % len(HATCHES)], linewidth=0.6, label=label)  # fmt: skip
            if width >= 7:
                axes.text(left + width / 2, place, letter(m), ha="center", va="center", color="#ffffff", fontsize=9,
                          weight="bold", bbox={"facecolor": "#2b2f36", "edgecolor": "none", "pad": 1.5})  # fmt: skip
            left += width
    _rows(axes, groups)
    axes.set_xlim(0, 100)
    _legend(axes)
    return _finished(figure, "shares", "Who spoke, by dataset")


def tenths_plot(pattern: Mapping[str, Any], experts: Sequence[str]) -> Plot:
    """Each expert's share of the tokens along the answers, in tenths of their length."""
    figure, axes = _axes("place in the answer (%)", 2.7)
    middle = [100 * (tenth + 0.5) / TENTHS for tenth in range(TENTHS)]
    for m, name in enumerate(experts):
        values = [100 * share for share in pattern["tenths"][name]]
        axes.plot(middle, values, color=COLOURS[m % len(COLOURS)], marker=MARKERS[m % len(MARKERS)], markersize=4.5,
                  label=_expert(m, name))  # fmt: skip
    axes.set_ylabel("% of tokens", color=INK)
    axes.set_ylim(-3, 103)
    axes.set_xlim(0, 100)
    _legend(axes)
    return _finished(figure, "places", "Who spoke when, all questions")


# ---------------------------------------------------------------- drawing


def _expert(place: int, name: str) -> str:
    return _short(f"{letter(place)} {name.rsplit('/', 1)[-1]}")


def _short(text: str) -> str:
    shown = escaped(text)
    return shown if len(shown) <= LABEL else f"{shown[: LABEL - 1]}…"


def _colour(arm: Mapping[str, Any]) -> str:
    return COLOURS[arm["expert"] % len(COLOURS)] if arm["kind"] == "expert" else GREY


def _point(axes: Any, place: int, found: Mapping[str, Any], colour: str, marker: str) -> None:
    """A share or a difference in percent with its interval, on one line."""
    if found["value"] is None:
        return
    if found["interval"] is not None:
        axes.plot([100 * end for end in found["interval"]], [place, place], color=colour, linewidth=2,
                  solid_capstyle="butt")  # fmt: skip
    axes.plot([100 * found["value"]], [place], color=colour, marker=marker, markersize=6, linestyle="none")


def _axes(x: str, height: float) -> tuple[Any, Any]:
    """A small transparent figure in the page's ink; made without pyplot, which would look for a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_xlabel(x, color=INK)
    axes.tick_params(colors=INK, labelsize=8.5)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    for edge in ("bottom", "left"):
        axes.spines[edge].set_color(INK)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _rows(axes: Any, labels: Sequence[str]) -> None:
    """The first row on top."""
    axes.set_yticks(range(len(labels)), [_short(label) for label in labels], parse_math=False)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(False, axis="y")


def _legend(axes: Any) -> None:
    """Above the axes, where it covers nothing."""
    legend = axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=1,
                         borderaxespad=0.3, handlelength=2.0)  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def _finished(figure: Any, name: str, title: str) -> Plot:
    """The figure as an <svg> element (no prolog, no metadata, its own ids, the page's ink), and as PDF."""
    import matplotlib

    name = re.sub(r"[^\w.-]+", "_", name)
    file, pdf = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "pdf.fonttype": 42}):
        figure.savefig(file, format="svg", transparent=True)
        figure.savefig(pdf, format="pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})
    return Plot(name, title, _page_svg(file.getvalue(), name, title), pdf.getvalue())


def _page_svg(svg: str, name: str, title: str) -> str:
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r'(^<svg [^>]*?)height="[^"]*"', r"\1", svg))
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(escaped(title))}" ', 1).strip()
