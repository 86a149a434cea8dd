"""The comparison of runs for people: compare.html, its tables and figures for a paper, and the terminal."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Sequence

from cai_experiment.evaluation.reporting import compare
from cai_experiment.evaluation.reporting.compare import Comparison, Run
from cai_experiment.evaluation.reporting.merging import make_folder
from cai_experiment.evaluation.reporting.naming import file_name
from cai_experiment.evaluation.reporting.page import as_markup, environment
from cai_experiment.evaluation.reporting.plots import Plot, forest_plot, rates_plot
from cai_experiment.evaluation.reporting.screen import MARKS_SAY, effect_table, print_tables
from cai_experiment.evaluation.reporting.summary import Effect, grouped
from cai_experiment.evaluation.reporting.tables import NAME, Table, write_tables
from cai_experiment.evaluation.reporting.words import p_text
from cai_experiment.observe.screen import escaped
from cai_experiment.records.files import write_atomic

if TYPE_CHECKING:
    from rich.console import Console

COMPARE_HTML = "compare.html"
SHOWN = 6  # clear differences named on top


@dataclass(frozen=True, slots=True)
class Compared:
    """Runs and what was found between the first and each of the others."""

    runs: Sequence[Run]
    against: Sequence[Sequence[Comparison]]
    settings: Sequence[tuple[str, list[str]]]

    @property
    def names(self) -> list[str]:
        """The runs' names, the one that the others are held against first."""
        return [run.name for run in self.runs]

    @property
    def pairs(self) -> list[tuple[str, Sequence[Comparison]]]:
        """(other run, its comparisons)."""
        return list(zip(self.names[1:], self.against, strict=True))


def compare_runs(data_dir: Path, names: Sequence[str]) -> Compared:
    """Read and compare the runs. Raises BadInputError as `read_runs` does, and for a bad line of items."""
    runs = compare.read_runs(data_dir, names)
    return Compared(runs, compare.compare(runs), compare.differing_settings(runs))


def write_comparison(data_dir: Path, compared: Compared) -> Path:
    """Write the page, tables/ and figures/ into data_dir/compare-RUN-RUN/; gives the page's path.

    Raises DiskError or BadInputError where the folder cannot be written.
    """
    folder = data_dir / f"compare-{'-'.join(file_name(name) for name in compared.names)}"[:200]
    make_folder(folder)
    plots = {name: _plots(compared.names[0], name, found) for name, found in compared.pairs}
    write_tables(folder / "tables", comparison_tables(compared))
    make_folder(folder / "figures")
    for plot in (plot for own in plots.values() for plot in own):
        write_atomic(folder / "figures" / f"{plot.name}.pdf", [plot.pdf])
    html = render_comparison(compared, plots)
    write_atomic(folder / COMPARE_HTML, [html.encode("utf-8", "backslashreplace")])
    return folder / COMPARE_HTML


def comparison_tables(compared: Compared) -> list[Table]:
    """Settings, standing, and one table for each run against the first."""
    names = compared.names
    return [settings_table(compared), standing_table(compared), *(
        {
            "name": f"against_{name}", "title": f"{name} against {names[0]}", "note": "",
            "columns": ["measure", NAME, names[0], name, "difference", "p (Holm)", "items"],
            "rows": [_row(one) for one in found],
        }
        for name, found in compared.pairs
    )]  # fmt: skip


def _row(one: Comparison) -> list[Any]:
    effect = one.effect
    scale = "rate" if effect.rate else ""
    base, trained = ({"scale": scale, **metric} for metric in (effect.base, effect.trained))
    change = {**effect.change, "scale": "points" if effect.rate else "change"} if effect.change else "–"
    return [effect.named.label, effect.name, base, trained, change, p_text(effect.p_holm), one.note or "paired"]


def settings_table(compared: Compared) -> Table:
    """The settings that are not the same in all runs."""
    rows = [[name, *values] for name, values in compared.settings]
    columns = ["setting", *compared.names]
    return {"name": "settings", "title": "Settings that differ", "columns": columns, "rows": rows, "note": ""}


def standing_table(compared: Compared) -> Table:
    """Each run's verdict, gates, pairs and cost."""
    rows = [list(row) for row in compare.standing(compared.runs)]
    columns = ["run", "verdict", "gates passed", "accepted pairs", "time and cost"]
    return {"name": "runs", "title": "The runs", "columns": columns, "rows": rows, "note": ""}


def render_comparison(compared: Compared, plots: dict[str, list[Plot]]) -> str:
    """The page; `plots` by the other run's name."""
    against = [
        {"name": name, "line": pairing_line(found), "plots": as_markup(plots.get(name, [])),
         "groups": grouped([one.effect for one in found]), "short": short_lines(compared.names[0], name, found),
         "notes": {one.effect.name: one.note for one in found if one.note}}
        for name, found in compared.pairs
    ]  # fmt: skip
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            names=compared.names, settings=settings_table(compared), standing=standing_table(compared), against=against
        )
    )


def pairing_line(found: Sequence[Comparison]) -> str:
    """How many measures stand on the same items."""
    paired = sum(one.paired for one in found)
    text = f"{paired} of {len(found)} measures are paired: both runs were asked the same items"
    return f"{text}; the others are compared as independent figures." if paired < len(found) else f"{text}."


def short_lines(first: str, other: str, found: Sequence[Comparison]) -> list[str]:
    """What a reader must know of one run against the first: how much is clear, and what; safety first."""
    measured = outcomes(found)
    counts = Counter(one.direction for one in measured)
    moved = f", {counts['moved']} moved (neither gain nor loss)" if counts["moved"] else ""
    lines = [
        f"Of {len(measured)} measures of the trained models, {counts['better']} are clearly better in {other} than in "
        f"{first}, {counts['worse']} clearly worse{moved}; {counts['unclear']} cannot be told apart."
    ]
    clear = [one for _, group in grouped(measured) for one in group if one.direction in ("better", "worse")]
    lines += [one.sentence() for one in clear[:SHOWN]]
    if len(clear) > SHOWN:
        lines.append(f"{len(clear) - SHOWN} more in the table.")
    safer = [one for one in measured if one.named.group == "safer"]
    if safer and not any(one.direction in ("better", "worse") for one in safer):
        lines.append("No measure of safety differs clearly.")
    return lines


def outcomes(found: Sequence[Comparison]) -> list[Effect]:
    """What was measured of the trained models, without what the data and the judge were like."""
    return [one.effect for one in found if one.effect.named.group != "other"]


def _plots(first: str, other: str, found: Sequence[Comparison]) -> list[Plot]:
    effects = outcomes(found)
    drawn = [
        rates_plot(effects, (first, other), f"rates_{other}", f"Rates of {first} and {other}"),
        forest_plot(effects, f"points, {other} − {first} (95% interval)", f"differences_{other}",
                    f"Difference: {other} − {first}"),
    ]  # fmt: skip
    return [plot for plot in drawn if plot is not None]


def print_comparison(compared: Compared, console: Console | None = None) -> None:
    """The settings that differ, then each run against the first; no markup of rich is read from its texts."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False)
    if not compared.settings:
        console.print(Text("no setting differs"))
    print_tables([table for table in (settings_table(compared), standing_table(compared)) if table["rows"]], console)
    for name, found in compared.pairs:
        first = compared.names[0]
        title = f"{name} against {first}, rates in % and points"
        for line in short_lines(first, name, found):
            console.print(Text(escaped(line)), soft_wrap=True)
        console.print(effect_table(outcomes(found), (first, name), title, with_p=True))
        console.print(Text(MARKS_SAY), soft_wrap=True)
        for one in found:
            if one.note and one.paired:
                console.print(Text(escaped(f"{one.effect.named.label}: {one.note}")), soft_wrap=True)
        console.print(Text(pairing_line(found)), soft_wrap=True)
