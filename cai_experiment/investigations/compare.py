"""Conditions beside each other, and two models on one task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.investigations.conditions import CONDITIONS
from cai_experiment.investigations.measures import DEFINED
from cai_experiment.investigations.notes import KINDS
from cai_experiment.investigations.run import Investigation, is_finished, session_folder
from cai_experiment.investigations.saved import CONVERSATION, SUMMARY
from cai_experiment.investigations.tasks import ARCHITECTURE
from cai_experiment.judging.result import Result, paired_bootstrap
from cai_experiment.observe.screen import escaped
from cai_experiment.records.files import read_json, write_json

if TYPE_CHECKING:
    from rich.console import Console

COMPARISON, MODEL_COMPARISON, MODELS = "comparison.json", "model_comparison.json", "model_comparison"
COMPARED_TURNS = 5
ONE = "one session a condition: differences are of these sessions alone, and nothing is tested (--repeats N)"
FEW = "means over seeds with bootstrap intervals at 95%; of few seeds these are too narrow"
AGAINST = ("similarity_to_documents", "similarity_to_other_subject")  # also given less that of `none`, seed by seed
MOST_REPEATS = 99
CLOSER = (
    "closer: the similarity after the documents of delayed less that before them; other words for the same thing "
    "change it too, so a change no larger than that to the others, which the model never read, says nothing (rev.: "
    "the notes that the model itself calls revisions, their texts in summary.json)"
)
Figures = Mapping[str, float | None]


# ---------------------------------------------------------------- conditions


def compare_conditions(run: Path) -> dict[str, Any]:
    """All finished sessions of a run, by condition; writes comparison.json. Raises DiskError."""
    found = {one: _sessions(run, one) for one in CONDITIONS}
    found = {one: sessions for one, sessions in found.items() if sessions}
    without = {s["seed"]: _figures(s) for s in found.get("none", [])}
    conditions = {one: _condition(sessions, without if one != "none" else {}) for one, sessions in found.items()}
    most = max((len(sessions) for sessions in found.values()), default=0)
    first = next(iter(found.values()))[0] if found else {}
    compared = {
        "model": first.get("model"), "style": first.get("style"), "conditions": conditions,
        "similarity_is": DEFINED, "closer_is": CLOSER, "note": FEW if most > 1 else ONE,
    }  # fmt: skip
    write_json(run / COMPARISON, compared)
    return compared


def _sessions(run: Path, condition: str) -> list[dict[str, Any]]:
    folders = (session_folder(run, condition, repeat) for repeat in range(MOST_REPEATS))
    return [read_json(folder / SUMMARY) for folder in folders if is_finished(folder)]


def _figures(session: Mapping[str, Any]) -> dict[str, float | None]:
    """A session's figures by name; None where it has none."""
    notes, revisions = session["notes"], session["revisions"]
    return {
        "turns": session["turns"],
        "tokens_written": session["tokens"]["written"],
        "code_blocks": session["code_blocks"],
        "errors": session["errors"],
        **{f"notes_{kind}": count for kind, count in notes.items()},
        "conclusion_words": session["conclusion_words"],
        "similarity_to_documents": session["similarity_to_documents"],
        "similarity_to_other_subject": session["similarity_to_other_subject"],
        "closer_to_documents": revisions["closer_to_documents"],
        "closer_to_other_subject": revisions["closer_to_other_subject"],
    }


def _condition(sessions: Sequence[Mapping[str, Any]], without: Mapping[int, Figures]) -> dict[str, Any]:
    rows = [_figures(one) for one in sessions]
    seeds = [one["seed"] for one in sessions]
    missed = [_missed(one) for one in sessions]
    kept = [(seed, row) for seed, row, without_any in zip(seeds, rows, missed, strict=True) if not without_any]
    return {
        "sessions": len(sessions),
        "seeds": seeds,
        "finish": dict(Counter(one["finish"] for one in sessions)),
        "documents": sessions[0]["documents"],
        "documents_arrive_in_turn": [one["documents_arrive_in_turn"] for one in sessions],
        "documents_never_arrived": sum(missed),
        "figures": {name: _mean([row[name] for row in rows]).to_json() for name in rows[0]},
        "less_none": {name: _less(name, kept, without).to_json() for name in AGAINST} if without else {},
    }


def _mean(values: Sequence[float | None]) -> Result:
    known = [float(one) for one in values if one is not None]
    return Result.mean(known, unparsed=len(values) - len(known))


def _missed(session: Mapping[str, Any]) -> bool:
    """True for a session that was to show documents and ended before."""
    return session["condition"] != "none" and session["documents_arrive_in_turn"] is None


def _less(name: str, rows: Sequence[tuple[int, Figures]], without: Mapping[int, Figures]) -> Result:
    """The figure less that of `none` with the same seed, which is the same to the letter until documents arrive.

    `rows` are (seed, figures) of the sessions whose documents arrived: the others are sessions without documents.
    """
    pairs = [(without[seed][name], row[name]) for seed, row in rows if seed in without]
    known = [(float(a), float(b)) for a, b in pairs if a is not None and b is not None]
    return paired_bootstrap([a for a, _ in known], [b for _, b in known])


WORK = ("turns", "tokens_written", "code_blocks", "errors", *(f"notes_{kind}" for kind in KINDS))
KIND_HEADINGS = ("obs.", "concl.", "quest.", "rev.")  # as KINDS
CONCLUSIONS = {
    "conclusion_words": "words", "similarity_to_documents": "to documents", "similarity_to_other_subject": "to others",
    "closer_to_documents": "closer to documents", "closer_to_other_subject": "closer to others",
}  # fmt: skip


def print_conditions(compared: Mapping[str, Any], console: Console) -> None:
    """comparison.json as two tables: what was done, and what was concluded."""
    conditions = compared["conditions"]
    if not conditions:
        return
    rows = []
    for name, one in conditions.items():
        ended = ", ".join(f"{why} {count}" for why, count in one["finish"].items())
        rows.append((name, str(one["sessions"]), ended, *(_cell(one["figures"][figure]) for figure in WORK)))
    short = ("n", "ended", "turns", "tokens", "blocks", "errors", *KIND_HEADINGS)
    _print_table(console, f"{compared['model']}, {compared['style']}: sessions, notes by kind", short, rows)
    rows = []
    for name, one in conditions.items():
        less = _cell(one["less_none"].get(AGAINST[0], {"value": None}))
        rows.append((name, *(_cell(one["figures"][figure]) for figure in CONCLUSIONS), less))
    headings = (*CONCLUSIONS.values(), "to documents, less none's")
    _print_table(console, "conclusions: words, similarity (0 to 1), its change in delayed", headings, rows)
    for note in _notes(compared):
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _notes(compared: Mapping[str, Any]) -> list[str]:
    """What to know of the tables, a line each."""
    conditions = compared["conditions"]
    notes = [
        f"{name}: the documents never arrived in {one['documents_never_arrived']} of {one['sessions']} sessions, for "
        "want of room; these are sessions without documents, and none's figure is not taken from theirs"
        for name, one in conditions.items() if one["documents_never_arrived"]
    ]  # fmt: skip
    idle = [name for name, one in conditions.items() if not one["figures"]["code_blocks"]["value"]]
    notes += [f"no code ran under {', '.join(idle)}: conclusions there rest on nothing that was looked at"] * bool(idle)
    notes += [compared["closer_is"]] * ("delayed" in conditions)
    return [*notes, compared["note"]]


# ---------------------------------------------------------------- models


def compare_models(
    run: Path, names: Sequence[str], investigate: Callable[[str], Investigation],
    watch: Callable[[str], Callable[[dict[str, Any]], None]],
) -> dict[str, Any]:  # fmt: skip
    """The architecture task, without documents, with each model after the other; writes model_comparison.json.

    `investigate` loads a model; its engine is closed before the next one loads. A finished model is not loaded again.
    """
    for name in names:
        folder = model_folder(run, name)
        if is_finished(folder):
            continue
        one = investigate(name)
        try:
            one.run(folder, "none", tasks=[ARCHITECTURE], watch=watch(name))
        finally:
            one.engine.close()
            del one
    compared = {
        "task": ARCHITECTURE.name,
        "turns_at_most": read_json(model_folder(run, names[0]) / SUMMARY)["task_turns"],
        "note": "one session a model and seed: nothing is tested",
        "models": {name: _model(run, name) for name in names},
    }
    write_json(run / MODEL_COMPARISON, compared)
    return compared


def model_folder(run: Path, name: str) -> Path:
    """Where a compared model's session is."""
    safe = "".join(c if c.isalnum() or c in "-._" else "-" for c in name).strip("-.")
    return run / MODELS / (safe or "model")


def _model(run: Path, name: str) -> dict[str, Any]:
    folder = model_folder(run, name)
    found, conversation = read_json(folder / SUMMARY), read_json(folder / CONVERSATION)
    kept = ("finish", "turns", "code_blocks", "errors", "stopped", "tokens", "notes")
    return {**{key: found[key] for key in kept}, "conversation": conversation["turns"]}


def print_models(compared: Mapping[str, Any], console: Console) -> None:
    """model_comparison.json as a table, one column a model."""
    models = compared["models"]
    rows = [(key.replace("_", " "), *(str(one[key]) for one in models.values()))
            for key in ("finish", "turns", "code_blocks", "errors")]  # fmt: skip
    rows.append(("tokens written", *(f"{one['tokens']['written']:,}" for one in models.values())))
    rows.append(("notes", *(str(sum(one["notes"].values())) for one in models.values())))
    _print_table(console, f"the {compared['task']} task", list(models), rows)
    console.print(f"note: {compared['note']}", markup=False, soft_wrap=True)


def _cell(result: Mapping[str, Any]) -> str:
    value = result["value"]
    if value is None:
        return "–"
    shown = f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 2 else f"{value:.3g}"
    interval = result.get("interval")
    return f"{shown} [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else shown


def _print_table(console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(escaped(title)), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(Text(escaped(heading)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(escaped(cell)) for cell in row))
    console.print(table)
