"""The terminal: a report (gates, warnings, time and cost, the next command), and examples to be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping, Sequence

from cai_experiment.evaluation.differences import Piece, differences
from cai_experiment.evaluation.generation import verdicts_after
from cai_experiment.evaluation.words import cost_text, dataset_lines, gate_figures, interval_text, report_warnings
from cai_experiment.observe.screen import escaped
from cai_experiment.records.schema import Example, Round

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def print_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a report (as `write_report` or `read_report` give it); no markup of rich is read from its texts."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False)
    console.print(_gates_table(report))
    for warning in report_warnings(report):
        console.print(Text(f"note: {escaped(warning)}"), soft_wrap=True)
    console.print(Text(_counts_line(report["counts"])), soft_wrap=True)
    for line in dataset_lines(report["dataset"]) if report.get("dataset") else ():
        console.print(Text(escaped(line)), soft_wrap=True)
    console.print(Text(cost_text(report["cost"])), soft_wrap=True)
    go = report["verdict"] == "go"
    console.print(Text("GO" if go else "NO-GO", style="bold green" if go else "bold red"), end=" ")
    console.print(Text(f"next: {escaped(report['next'])}"), soft_wrap=True)


def _gates_table(report: Mapping[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"gates of milestone {report['milestone']}"), title_justify="left")
    for heading in ("gate", "value", "asked", "95% interval", "n", ""):
        table.add_column(heading, overflow="fold")
    for gate in report["gates"]:
        result = Text("go", style="green") if gate["passed"] else Text("no-go", style="red")
        cells = (gate["name"], *gate_figures(gate), interval_text(gate["interval"]), str(gate["n"]))
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
