"""The comparison's plots: every rate with its interval by model, and the matrices as heat maps with their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cai_experiment.comparison.reading import DASH, matrix_table, rates_table
from cai_experiment.evaluation.reporting.plots import MOST_SERIES, Plot, finished, new_axes, table_plot
from cai_experiment.observe.screen import escaped

DARK = 0.75  # shares from here on have a dark cell, and light numbers
CELL = 0.95  # inches
PAPER = "#ffffff"
NAME = 16  # characters of a model's name


def plots(result: Mapping[str, Any]) -> list[Plot]:
    """Rates by model (of at most MOST_SERIES models), and a heat map for each matrix with figures."""
    table = rates_table(result)
    shown = table["columns"][: MOST_SERIES + 2]
    rows = [row[: len(shown)] for row in table["rows"]]
    forest = table_plot({**table, "name": "rates", "title": "Rates with 95% intervals", "columns": shown, "rows": rows})
    forest = forest and replace(forest, tall=False)  # the page's first figure is not folded
    maps = [heat_map(result, name) for name in result["matrix"]] if len(result["models"]) > 1 else []
    return [plot for plot in [forest, *maps] if plot is not None]


def heat_map(result: Mapping[str, Any], name: str) -> Plot | None:
    """Generators from above to below, critics from left to right; the own cells have a frame. None without figures."""
    table = matrix_table(result, name)
    if not table["rows"]:
        return None
    models = result["models"]
    figure, axes = new_axes("critic", "generator", height=1.0 + CELL * 0.8 * len(models))
    axes.grid(False)
    for y, row in enumerate(table["rows"]):
        for x, cell in enumerate(row[1:]):
            _draw(axes, x, y, cell)
    axes.set_xlim(-0.5, len(models) - 0.5)
    axes.set_ylim(len(models) - 0.5, -0.5)
    labels = [escaped(one if len(one) <= NAME else one[: NAME - 1] + "…") for one in models]
    axes.set_xticks(range(len(models)), labels, parse_math=False)
    axes.set_yticks(range(len(models)), labels, parse_math=False)
    for side in ("bottom", "left"):
        axes.spines[side].set_visible(False)
    return finished(figure, axes, table["name"], table["title"])


def _draw(axes: Any, x: int, y: int, cell: Any) -> None:
    """One cell: its colour, its share in percent, its interval and n."""
    from matplotlib.colors import to_hex
    from matplotlib.patches import Rectangle

    share = 0.0 if cell == DASH else float(cell["value"])
    red, green, blue = (1 - share * (1 - channel) for channel in (0.10, 0.32, 0.58))
    colour = to_hex((red, green, blue))
    axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, edgecolor="#8a8f98",
                             linewidth=2.2 if x == y else 0.6))  # fmt: skip
    ink = PAPER if share >= DARK else "#1b1f24"
    if cell == DASH:
        axes.text(x, y, "not asked", color=ink, ha="center", va="center", fontsize=8)
        return
    low, high = cell["interval"]
    axes.text(x, y - 0.12, f"{100 * share:.0f}%", color=ink, ha="center", va="center", fontsize=12)
    axes.text(x, y + 0.22, f"{100 * low:.0f} to {100 * high:.0f}%, n = {cell['n']}", color=ink, ha="center",
              va="center", fontsize=7.5)  # fmt: skip
