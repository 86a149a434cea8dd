"""The Data tab: the pairs and the rejected examples of a run, filtered and by pages; one example's whole way.

A run may be looked at while it is being written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_experiment.constitution.principles import Principle, load_constitution
from cai_experiment.constitution.prompts import abstains
from cai_experiment.demo import markup
from cai_experiment.demo.markup import Html
from cai_experiment.demo.rows import Row, RowFile, row_file
from cai_experiment.demo.settings import DemoSettings
from cai_experiment.errors import BadInputError
from cai_experiment.observe.screen import shortened
from cai_experiment.pipeline.gate import REASONS
from cai_experiment.records.schema import Example, Round

PAIRS, REJECTED = KINDS = ("pairs", "rejected")
ANY = ("", "any")
PAGE = 25  # rows
CELL = 140  # characters of a text in the list
NAMED_FAULTS = 3
HEADERS = ("Id", "Instruction", "First answer", "Revised answer", "Principles", "Verdicts")
WHY = "Reasons"  # one more column of what was rejected
BROKEN = {"yes": "yes, it is broken", "no": "no, it is kept", "undecided": "undecided (the two orders disagree)",
          "unparsed": "not readable", "": "not asked"}  # fmt: skip
MEANINGFUL = {"yes": "yes, it quotes words that break the principle", "no": "no", "": "not asked"}


@dataclass(frozen=True, slots=True)
class Filters:
    """What the examples of a run can be filtered by: principle ids, reasons, verdicts as "yes → no"; each sorted."""

    principles: tuple[str, ...]
    reasons: tuple[str, ...]
    verdicts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Browsed:
    """A page of examples: `rows` are plain strings, cut short; `ids` name them in the same order.

    `line` says which of how many these are, and which lines of the file are damaged. `page` counts from 1.
    """

    headers: tuple[str, ...]
    rows: list[list[str]]
    ids: list[str]
    line: str
    page: int
    pages: int


def runs(settings: DemoSettings) -> list[str]:
    """The runs that have examples, the one that was written last first."""
    try:
        folders = [entry for entry in settings.data_dir.iterdir() if entry.is_dir()]
    except OSError:
        return []
    written = {folder.name: _written(folder) for folder in folders}
    return sorted((name for name, when in written.items() if when), key=lambda name: (-written[name], name))


def filters(settings: DemoSettings, run: str) -> Filters:
    """What a run's examples can be filtered by, of both kinds. Raises BadInputError for a run that is not there."""
    rows = [row for kind in KINDS for row in _file(settings, run, kind).rows]
    return Filters(
        principles=tuple(sorted({name for row in rows for name in row.principles})),
        reasons=tuple(sorted({name for row in rows for name in row.reasons})),
        verdicts=tuple(sorted({name for row in rows for name in row.verdicts})),
    )


def browse(
    settings: DemoSettings, run: str, kind: str, principle: str = "", reason: str = "", verdict: str = "", page: int = 1
) -> Browsed:
    """One page of a run's "pairs" or "rejected"; "" or "any" does not filter. A page outside is the nearest one.

    Raises BadInputError for a run or kind that is not there.
    """
    file = _file(settings, run, kind)
    found = [row for row in file.rows if _passes(row, principle, reason, verdict)]
    pages = max(1, -(-len(found) // PAGE))
    page = min(max(1, page), pages)
    shown = found[(page - 1) * PAGE : page * PAGE]
    examples = [file.example(row) for row in shown]
    headers = HEADERS if kind == PAIRS else (*HEADERS, WHY)
    return Browsed(
        headers, [_cells(row, one, kind) for row, one in zip(shown, examples, strict=True)],
        [row.id for row in shown], _line(file, kind, len(found), len(shown), page, pages), page, pages,
    )  # fmt: skip


def example_html(settings: DemoSettings, run: str, id: str) -> Html:
    """One example's whole way: instruction, answer, each round, what the gate said, who spoke.

    Raises BadInputError if the run has no such example.
    """
    for kind in KINDS:
        file = _file(settings, run, kind)
        row = file.row(id)
        if row is not None:
            return _way(file.example(row), _principles(settings))
    raise BadInputError(f"{run} has no example {shortened(id, CELL)!r}", "choose one of the list")


# ---------------------------------------------------------------- the list


def _written(folder: Path) -> int:
    """When a run's examples were last written, in nanoseconds; 0 if it has none."""
    times = []
    for kind in KINDS:
        try:
            times.append((folder / f"{kind}.jsonl").stat().st_mtime_ns)
        except OSError:
            continue
    return max(times, default=0)


def _file(settings: DemoSettings, run: str, kind: str) -> RowFile:
    if kind not in KINDS:
        raise BadInputError(f"{shortened(kind, CELL)!r} is no kind of example", f"use one of {', '.join(KINDS)}")
    if run not in runs(settings):  # whatever the page sends, no other folder is read
        raise BadInputError(f"there is no run {shortened(run, CELL)!r} with examples", "choose one of the list")
    return row_file(settings.data_dir / run / f"{kind}.jsonl")


def _passes(row: Row, principle: str, reason: str, verdict: str) -> bool:
    """True if the row has what is asked for; principle and verdict in one and the same round."""
    rounds = zip(row.principles, row.verdicts, strict=True)
    wanted = principle in ANY and verdict in ANY
    return (reason in ANY or reason in row.reasons) and (
        wanted or any((principle in (*ANY, own)) and (verdict in (*ANY, said)) for own, said in rounds)
    )


def _cells(row: Row, example: Example, kind: str) -> list[str]:
    texts = (example.id, example.instruction, example.initial_answer, example.revised_answer)
    cells = [markup.visible(shortened(" ".join(text.split()), CELL)) for text in texts]
    cells += [", ".join(row.principles), ", ".join(row.verdicts)]
    return cells if kind == PAIRS else [*cells, ", ".join(row.reasons)]


def _line(file: RowFile, kind: str, found: int, shown: int, page: int, pages: int) -> str:
    first = (page - 1) * PAGE
    what = f"{kind} {first + 1:,} to {first + shown:,} of {found:,}" if shown else f"no {kind}"
    parts = [what + (f" that pass the filter, of {len(file.rows):,}" if found < len(file.rows) else "")]
    parts[0] += f" (page {page:,} of {pages:,})" if pages > 1 else ""
    if file.unfinished:
        parts.append("the last line is being written, or was cut off")
    if file.faults:
        more = f" and {len(file.faults) - NAMED_FAULTS:,} more" if len(file.faults) > NAMED_FAULTS else ""
        parts.append(f"damaged, left out: {', '.join(file.faults[:NAMED_FAULTS])}{more}")
    return markup.visible("; ".join(parts))


# ---------------------------------------------------------------- one example


def _principles(settings: DemoSettings) -> dict[str, Principle]:
    """The principles of the constitution by id, for their names; none if it cannot be read."""
    try:
        return {one.id: one for one in load_constitution(settings.constitution).principles}
    except BadInputError:
        return {}


def _way(example: Example, principles: Mapping[str, Principle]) -> Html:
    parts = [
        _outcome(example),
        markup.card("Instruction", markup.block(example.instruction)),
        markup.card("First answer", markup.block(example.initial_answer)),
    ]
    answer = example.initial_answer
    for number, one in enumerate(example.rounds):
        known = principles.get(one.principle_id)
        title = f"Round {number + 1} of {len(example.rounds)}: {known.name if known else one.principle_id}"
        parts.append(markup.card(title, _round(example, number, one, answer, known)))
        answer = one.revised_answer or answer
    if example.revised_answer:
        pair = example.preference_pair
        labels = ("rejected (first answer)", "chosen (revised answer)")
        parts.append(markup.card("The pair", markup.word_diff_html(pair.rejected, pair.chosen, labels)))
    return markup.joined(*parts)


def _outcome(example: Example) -> Html:
    """Pair or not and why, the gate's measures, and who spoke."""
    meta = example.meta
    named = ("generator", "Generator"), ("critic", "Critic"), ("source", "Source of the instruction"), ("seed", "Seed")
    rows = [(title, _plain(meta[key])) for key, title in (*named, ("tokens", "Tokens"), ("gate", "Gate measured"))]
    rows += [(name, _plain(meta[key])) for key, name in (("guard", "The guard"), ("error", "Error")) if key in meta]
    if not example.reject_reasons:
        return markup.card(
            example.id, markup.joined(markup.notice("✓ a pair: it may train a model", "ok"), markup.facts(rows))
        )
    reasons = (markup.notice(f"✗ {name}: {REASONS.get(name, 'unknown')}", "bad") for name in example.reject_reasons)
    return markup.card(example.id, markup.joined(*reasons, markup.facts(rows)))


def _plain(value: object) -> str:
    """A part of meta in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_plain(part)}" for key, part in value.items()) or "-"
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _round(example: Example, number: int, one: Round, before: str, known: Principle | None) -> Html:
    """One round: the principle, each verdict, the critique, what the revision changed."""
    final, meaningful = (_of_round(example.meta, name, number) for name in ("final_verdicts", "meaningful"))
    rows: list[tuple[str, object]] = [("Principle", markup.inline(one.principle, markup.SHOWN))]
    if known:
        rows.append(("Axis and weight", f"{markup.in_words(known.axis)}, {known.weight}"))
    rows.append(("Broken before?", _said(BROKEN, one.verdict_before)))
    direct, abstained = bool(example.meta.get("direct")), abstains(one.critique)
    critique = markup.notice("no critique was asked for", "note") if direct else markup.block(one.critique)
    if abstained:
        critique = markup.joined(critique, markup.notice("the critic abstained: it found nothing", "note"))
    rows += [] if direct else [("Critique to the point?", _said(MEANINGFUL, meaningful))]
    rows.append(("Broken after?", _said(BROKEN, one.verdict_after)))
    rows += [("Broken in the end?", _said(BROKEN, final))] if final != one.verdict_after else []
    revision: str = markup.notice("the answer was not revised", "note")
    if one.revised_answer:
        revision = markup.word_diff_html(before, one.revised_answer, ("before this round", "revision"))
    headed = (Html(f"<h4>{name}</h4>{part}") for name, part in (("Critique", critique), ("Revision", revision)))
    return markup.joined(markup.facts(rows), *headed)


def _of_round(meta: Mapping[str, Any], name: str, number: int) -> str:
    """What `meta` says of one round; "" where an older file does not say it."""
    said = meta.get(name)
    return str(said[number]) if isinstance(said, list) and number < len(said) else ""


def _said(words: Mapping[str, str], verdict: str) -> str:
    return words.get(verdict, verdict)
