"""An evaluation of the ensemble on the terminal: arms, differences, who spoke."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cai_experiment.ensemble.page import rival_rows
from cai_experiment.ensemble.patterns import letter, short_names
from cai_experiment.ensemble.results import between, percent, points, verdict
from cai_experiment.ensemble.score import ALL
from cai_experiment.observe.screen import escaped

if TYPE_CHECKING:
    from rich.console import Console


def print_results(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Three tables; no markup of rich is read from names."""
    from rich.console import Console

    console = console or Console(highlight=False)
    groups = list(results["patterns"])
    shown = groups if len(groups) > 2 else groups[:1]
    heads = ["all questions" if group == ALL else group for group in shown]
    _print(console, "right answers", ["arm", *heads, "not read", "tokens/s", "passes/token"],
           [_arm(arm, shown) for arm in results["arms"].values()])  # fmt: skip
    if results["differences"]:
        _print(console, "the ensemble, on the same questions", ["", "all questions", "95%", "in words"],
               [_rival(row) for row in rival_rows(results)])  # fmt: skip
    experts = results["settings"]["experts"]
    names = [f"{letter(place)} {name}" for place, name in enumerate(short_names(experts))]
    _print(console, "who spoke (share of tokens)", ["dataset", *names, "changes an answer"],
           [_spoken(group, results["patterns"][group], experts) for group in shown])  # fmt: skip


def _arm(arm: Mapping[str, Any], groups: Sequence[str]) -> list[str]:
    first, *others = (arm["accuracy"][group] for group in groups)
    cost = arm.get("cost", {})
    speed, passes = cost.get("tokens_per_second"), cost.get("passes_per_token")
    return [
        arm["label"], f"{percent(first)} ({between(first)})", *map(percent, others), str(first["unread"]),
        "–" if speed is None else f"{speed:,.0f}", "–" if passes is None else f"{passes:.2f}",
    ]  # fmt: skip


def _rival(row: Mapping[str, Any]) -> list[str]:
    found = row["groups"][ALL]
    value = percent(found) if row["ratio"] else points(found)
    return [row["label"], value, between(found, "%" if row["ratio"] else ""), "" if row["ratio"] else verdict(found)]


def _spoken(group: str, found: Mapping[str, Any], experts: Sequence[str]) -> list[str]:
    changes = found["switches"]["value"]
    shares = [percent(found["share"][name]) for name in experts]
    return ["all questions" if group == ALL else group, *shares, "–" if changes is None else f"{changes:.1f}"]


def _print(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(Text(escaped(column)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(escaped(cell)) for cell in row))
    console.print(table)
    console.print()
