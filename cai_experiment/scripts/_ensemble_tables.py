"""An evaluation of the ensemble on the terminal: arms, differences, who spoke."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cai_experiment.ensemble.page import rival_rows
from cai_experiment.ensemble.patterns import letter
from cai_experiment.ensemble.results import between, percent, points, verdict
from cai_experiment.ensemble.score import ALL
from cai_experiment.observe.screen import escaped

if TYPE_CHECKING:
    from rich.console import Console


def print_results(results: Mapping[str, Any], console: Console | None = None) -> None:
    """The tables, for a terminal of 80 columns; no markup of rich is read from names."""
    from rich.console import Console

    console = console or Console(highlight=False)
    arms, groups = results["arms"].values(), list(results["patterns"])
    _print(console, "right answers", ["arm", "right", "95%", "not read", "tokens/s", "passes/token"], map(_arm, arms))
    if len(groups) > 2:
        cells = ([percent(arm["accuracy"][group]) for group in groups[1:]] for arm in arms)
        _print(console, "right answers by dataset", ["arm", *groups[1:]],
               ([arm["label"], *own] for arm, own in zip(arms, cells, strict=True)))  # fmt: skip
    if results["differences"]:
        _print(console, "the ensemble on the same questions", ["", "points", "95%", "in words"],
               map(_rival, rival_rows(results)))  # fmt: skip
    experts = results["settings"]["experts"]
    shown = groups if len(groups) > 2 else groups[:1]
    _print(console, "share of tokens by expert", ["dataset", *map(letter, range(len(experts))), "changes an answer"],
           (_spoken(group, results["patterns"][group], experts) for group in shown))  # fmt: skip


def _arm(arm: Mapping[str, Any]) -> list[str]:
    own, cost = arm["accuracy"][ALL], arm.get("cost", {})
    speed, passes = cost.get("tokens_per_second"), cost.get("passes_per_token")
    return [
        arm["label"], percent(own), between(own), str(own["unread"]),
        "–" if speed is None else f"{speed:,.0f}", "–" if passes is None else f"{passes:.2f}",
    ]  # fmt: skip


def _rival(row: Mapping[str, Any]) -> list[str]:
    found = row["groups"][ALL]
    if row["ratio"]:
        return [row["label"], percent(found), *row["said"][ALL][1:], "" if row["said"][ALL][1] else row["said"][ALL][0]]
    return [row["label"], points(found).removesuffix(" points"), between(found, ""), verdict(found)]


def _spoken(group: str, found: Mapping[str, Any], experts: Sequence[str]) -> list[str]:
    changes = found["switches"]["value"]
    shares = [percent(found["share"][name]) for name in experts]
    return ["all questions" if group == ALL else group, *shares, "–" if changes is None else f"{changes:.1f}"]


def _print(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for place, column in enumerate(columns):
        words = place == 0 or column == "in words"
        table.add_column(Text(escaped(column)), overflow="fold", no_wrap=not words)
    for row in rows:
        table.add_row(*(Text(escaped(cell)) for cell in row))
    console.print(table)
    console.print()
