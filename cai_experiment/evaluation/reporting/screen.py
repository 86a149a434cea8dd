"""The terminal: a report (gates, warnings, time and cost, the next command), and examples to be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping, Sequence

from cai_experiment.evaluation.generation import verdicts_after
from cai_experiment.evaluation.reporting.differences import Piece, differences
from cai_experiment.evaluation.reporting.naming import scaled_rows
from cai_experiment.evaluation.reporting.summary import (
    Direction,
    Effect,
    completed,
    effects,
    grouped,
    headline,
    preference_lines,
)
from cai_experiment.evaluation.reporting.words import (
    ALARM,
    cost_text,
    dataset_lines,
    gate_cells,
    report_alarms,
    report_warnings,
    result_text,
    value_text,
)
from cai_experiment.observe.screen import escaped
from cai_experiment.records.schema import Example, Round

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

MARKS: Mapping[Direction, tuple[str, str]] = {  # one character, so that no width cuts it
    "better": ("✓", "green"), "worse": ("✗", "red"), "moved": ("~", ""), "unclear": ("–", "dim"), "none": ("", ""),
}  # fmt: skip
MARKS_SAY = "✓ clearly better, ✗ clearly worse, ~ moved (neither gain nor loss), – no clear change"


def print_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a report (as `write_report` or `read_report` give it); no markup of rich is read from its texts."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False)
    report = completed(report)
    console.print(_gates_table(report))
    found = effects(report)
    if found:
        console.print(effect_table(found))
        console.print(Text(MARKS_SAY), soft_wrap=True)
    for line in preference_lines(report):
        console.print(Text(escaped(line)), soft_wrap=True)
    for alarm in report_alarms(report):
        console.print(Text(f"{ALARM}: {escaped(alarm)}", style="bold red"), soft_wrap=True)
    for warning in report_warnings(report):
        console.print(Text(f"note: {escaped(warning)}"), soft_wrap=True)
    console.print(Text(_counts_line(report["counts"])), soft_wrap=True)
    for line in dataset_lines(report["dataset"]) if report["dataset"] else ():
        console.print(Text(escaped(line)), soft_wrap=True)
    console.print(Text(cost_text(report["cost"])), soft_wrap=True)
    console.print(Text(escaped(headline(report))), soft_wrap=True)
    go = report["verdict"] == "go"
    console.print(Text("GO" if go else "NO-GO", style="bold green" if go else "bold red"), end=" ")
    console.print(Text(f"next: {escaped(report['next'])}"), soft_wrap=True)


def effect_table(
    found: Sequence[Effect], arms: tuple[str, str] = ("base", "trained"), title: str = "", with_p: bool = False
) -> Any:
    """Both arms and what lies between them, with its interval, for the terminal; differences of rates are in points."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(escaped(title or "base and trained on the same items, rates in % and points")),
                  title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # fmt: skip
    table.add_column(Text("measure"), overflow="fold", min_width=12)
    for arm in arms:
        table.add_column(Text(escaped(arm)), overflow="fold", min_width=6)
    table.add_column(Text("change"), no_wrap=True)
    table.add_column(Text("95% interval"), min_width=12)  # a long one breaks at a blank
    for heading in ("n", *(["p"] if with_p else []), " "):
        table.add_column(Text(heading), no_wrap=True)
    for question, members in grouped(found):
        table.add_row(Text(question, style="bold"))
        for one in members:
            change = one.change or {}
            cells = [one.named.label, value_text(one.base, one.rate), value_text(one.trained, one.rate)]
            cells += [one.signed_text, one.between_text if change else "–"]
            cells += [f"{change.get('n', one.trained['n']):,}", *([one.p_text] if with_p else [])]
            mark, colour = MARKS[one.direction]
            table.add_row(*(Text(escaped(cell)) for cell in cells), Text(mark, style=colour))
    return table


def print_tables(tables: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print tables as report.json holds them; results as "0.93 [0.88, 0.96], n = 153"."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    for table in tables:
        made = Table(title=Text(escaped(table["title"])), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for column in table["columns"]:
            made.add_column(Text(escaped(column)), overflow="fold")
        for row in scaled_rows(table):
            made.add_row(*(Text(escaped(cell if isinstance(cell, str) else result_text(cell))) for cell in row))
        console.print(made)
        if table.get("note"):
            console.print(Text(escaped(table["note"])), soft_wrap=True)


def _gates_table(report: Mapping[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"gates of milestone {report['milestone']}"), title_justify="left")
    for heading in ("gate", "value", "asked", "95% interval", "n"):
        table.add_column(heading, overflow="fold")
    table.add_column("", no_wrap=True, min_width=5)
    for gate in report["gates"]:
        result = Text("go", style="green") if gate["passed"] else Text("no-go", style="red")
        said = gate_cells(gate, report)
        cells = (gate["name"], said.value, said.asked, said.interval, f"{gate['n']:,}")
        table.add_row(*(Text(escaped(cell)) for cell in cells), result)
    return table


def _counts_line(counts: Mapping[str, Any]) -> str:
    reasons = ", ".join(f"{escaped(reason)} {count}" for reason, count in counts["reasons"].items())
    shown = f" ({reasons})" if reasons else ""
    pairs = f"{counts['accepted']} pair{'' if counts['accepted'] == 1 else 's'}"
    return f"{pairs} accepted, {counts['rejected']} rejected{shown}"


# ---------------------------------------------------------------- examples


def print_list(examples: Sequence[tuple[int, Example]], console: Console) -> None:
    """One line for each (place in the file, example): what it is about, its principles, why it was rejected."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("#", "id", "principles", "instruction"):
        table.add_column(heading, overflow="fold")
    for place, example in examples:
        what = ", ".join(one.principle_id for one in example.rounds)
        cells = [str(place), example.id, what, example.instruction]
        if example.reject_reasons:
            cells[3] += f" [{', '.join(example.reject_reasons)}]"
        table.add_row(*(Text(escaped(cell)) for cell in cells))
    console.print(table)


def print_example(example: Example, console: Console) -> None:
    """One example in full: both answers side by side with their differences, then every round."""
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    state = f"rejected: {', '.join(example.reject_reasons)}" if example.reject_reasons else "accepted"
    console.print(Rule(Text(escaped(f"{example.id} ({state})")), align="left"))
    console.print(Text(escaped(example.instruction), style="bold"))
    left, right = differences(escaped(example.initial_answer), escaped(example.revised_answer))
    sides = Table(expand=True)
    for heading in ("first answer (rejected)", "revision (chosen)"):
        sides.add_column(heading, ratio=1, overflow="fold")
    plain = console.color_system is None  # without colours the differences are bracketed
    sides.add_row(_marked(left, plain), _marked(right, plain))
    console.print(sides)
    meaningful, after = example.meta.get("meaningful", []), verdicts_after(example)
    for number, one in enumerate(example.rounds):
        said = meaningful[number] if number < len(meaningful) else ""
        console.print(_round_text(number, one, after[number], said))
    facts = ", ".join(f"{name} {example.meta[name]}" for name in ("source", "generator", "critic", "gate"))
    console.print(Text(escaped(facts), style="dim"))


def _marked(pieces: Sequence[Piece], plain: bool) -> Text:
    from rich.text import Text

    text = Text()
    for piece in pieces:
        words = piece.text.lstrip() if piece.kind != "same" else piece.text
        text.append(piece.text[: len(piece.text) - len(words)])
        if piece.kind == "del":
            text.append(f"[-{words}-]" if plain else words, style="red strike")
        elif piece.kind == "ins":
            text.append(f"{{+{words}+}}" if plain else words, style="green underline")
        else:
            text.append(words)
    return text


def _round_text(number: int, one: Round, after: str, meaningful: str) -> Text:
    from rich.text import Text

    text = Text()
    text.append(escaped(f"round {number + 1}, {one.principle_id}: "), style="bold")
    text.append(escaped(one.principle))
    text.append(
        escaped(f"\n  broken before: {one.verdict_before}; after: {after}; meaningful: {meaningful or 'not asked'}")
    )
    text.append(f"\n  critique: {escaped(one.critique)}")
    return text
