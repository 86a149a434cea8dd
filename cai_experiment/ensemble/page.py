"""An evaluation's files: results.json, answers.jsonl, report.html (one file, light and dark), plots, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cai_experiment.ensemble.patterns import letter, short_names
from cai_experiment.ensemble.plots import Plot, plots
from cai_experiment.ensemble.results import (
    BARE_PROMPT,
    RIVALS,
    WHY_ABOVE,
    Findings,
    between,
    of_oracle,
    percent,
    points,
    readings,
    verdict,
)
from cai_experiment.ensemble.score import ALL, RATIO, side
from cai_experiment.observe.screen import escaped
from cai_experiment.records.files import make_folder, write_atomic, write_json, write_jsonl, writing_error

RESULTS, ANSWERS, EXAMPLES, PAGE, PLOTS = "results.json", "answers.jsonl", "examples.jsonl", "report.html", "plots"
OURS = ("accuracy_*", "differences", "shares", "places")  # the plots' names
OPEN = 3  # examples that need no click: those with the most changes of speaker
STYLES = 6  # ways to mark an expert's words on the page; letters go on


def write(folder: Path, found: Findings, draw: bool = True, save_examples: bool = False) -> None:
    """Write every file of an evaluation, results.json last. Raises DiskError, or BadInputError for a bad place."""
    drawn = plots(found.results) if draw else []
    write_jsonl(folder / ANSWERS, found.answers)
    if save_examples:
        write_jsonl(folder / EXAMPLES, found.examples)
    if drawn:
        make_folder(folder / PLOTS)
    _remove_others(folder / PLOTS, [plot.name for plot in drawn])
    for plot in drawn:
        write_atomic(folder / PLOTS / f"{plot.name}.pdf", [plot.pdf])
    html = render(found.results, found.examples, drawn)
    write_atomic(folder / PAGE, [html.encode("utf-8", "backslashreplace")])
    write_json(folder / RESULTS, found.results)


def _remove_others(folder: Path, drawn: Sequence[str]) -> None:
    """Remove plots that an earlier evaluation left here and this one did not draw; other files are let be."""
    try:
        for pattern in OURS:
            for file in folder.glob(f"{pattern}.pdf"):
                if file.stem not in drawn:
                    file.unlink()
        if not drawn and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise writing_error(folder, error) from error


def render(results: Mapping[str, Any], examples: Sequence[Mapping[str, Any]], drawn: Sequence[Plot]) -> str:
    """The page; every text of a model or a file is escaped."""
    import jinja2
    from markupsafe import Markup

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {
        "shown": lambda value: escaped(str(value)), "percent": percent, "points": points, "between": between,
        "count": lambda number: f"{number:,}", "letter": letter, "verdict": verdict, "side": side, "figure": _figure,
        "p": lambda value: "p < 0.001" if value < 0.001 else f"p = {value:.3f}",
        "group": lambda name: "all questions" if name == ALL else name,
    }  # fmt: skip
    page: str = made.get_template("report.html.j2").render(
        results=results, short=readings(results), why_above=WHY_ABOVE, bare_prompt=BARE_PROMPT,
        partial=_partial(results), examples=examples, rivals=rival_rows(results), styles=STYLES,
        experts=short_names(results["settings"]["experts"]), groups=list(results["patterns"]),
        plots={plot.name: {"title": plot.title, "svg": Markup(plot.svg)} for plot in drawn},
        open=[one["id"] for one in sorted(examples, key=lambda one: -len(one["pieces"]))[:OPEN]],
        accuracy_plots=[plot.name for plot in drawn if plot.name.startswith("accuracy_")],
    )  # fmt: skip
    return page


def _partial(results: Mapping[str, Any]) -> bool:
    """True if an arm's cost is that of more answers than are shown."""
    costs = [arm["cost"] for arm in results["arms"].values() if "cost" in arm]
    return any(cost["answers"] > results["settings"]["questions"] for cost in costs)


def _figure(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def rival_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The differences for people: name, figures by group, in words (value, interval), and whether they are ratios."""
    rows = []
    for name, groups in results["differences"].items():
        key = name.removeprefix("ensemble_minus_")
        label = "share of the oracle's accuracy" if name == RATIO else f"minus {RIVALS[key]}"
        against = groups[ALL].get("against")
        if against:
            label += f" ({results['arms'][against]['label']})"
        said = {group: of_oracle(results, group) if name == RATIO else (points(found), between(found, ""))
                for group, found in groups.items()}  # fmt: skip
        rows.append({"label": label, "groups": groups, "ratio": name == RATIO, "said": said})
    return rows
