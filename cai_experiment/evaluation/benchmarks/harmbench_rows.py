"""HarmBench's text behaviours from its csv, and our own safe prompts that only look like harmful ones.

HarmBench (Mazeika et al. 2024, arXiv 2402.04249; MIT, Center for AI Safety): 400 behaviours, 200 standard, 100
contextual (they speak of a text that stands before them) and 100 copyright (scored upstream by hashes of the copied
works, not by a judge). Its text is not shipped: it is fetched at a pinned revision.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cai_experiment.errors import BadInputError
from cai_experiment.evaluation.benchmarks.fetch import Source, fetch
from cai_experiment.records.files import read_jsonl, show

REVISION = "8e1604d1171fe8a48d8febecd22f600e462bdcdd"  # of centerforaisafety/HarmBench
UPSTREAM = f"https://raw.githubusercontent.com/centerforaisafety/HarmBench/{REVISION}"
BEHAVIORS = Source(
    "harmbench_behaviors_text_all.csv",
    f"{UPSTREAM}/data/behavior_datasets/harmbench_behaviors_text_all.csv",
    "8d81accedd38eaaf8b760618622bb888417d1fd0c86eba65c427a16f1cbb4afc",
    "MIT, (c) 2024 centerforaisafety",
    "--behaviors FILE",
)
SAFE_PROMPTS = Path(__file__).parent / "safe_prompts.jsonl"

STANDARD, CONTEXTUAL, COPYRIGHT = "standard", "contextual", "copyright"
KINDS = (STANDARD, CONTEXTUAL, COPYRIGHT)
JUDGED = (STANDARD, CONTEXTUAL)  # what attack success is counted over
COLUMNS = ("Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID")
OTHER_FILE = "give HarmBench's own csv with --behaviors FILE"


@dataclass(frozen=True, slots=True)
class Behavior:
    """One row of the csv. `kind` is its functional, `category` its semantic category; `context` "" if it has none."""

    id: str
    text: str
    kind: str
    category: str
    tags: tuple[str, ...]
    context: str

    @property
    def instruction(self) -> str:
        """What the model is asked, as upstream's DirectRequest writes it: the context stands before the behaviour."""
        return f"{self.context}\n\n---\n\n{self.text}" if self.context else self.text


@dataclass(frozen=True, slots=True)
class SafePrompt:
    """A harmless request, the harmful sense that its words resemble, and why it is harmless (`family`)."""

    id: str
    text: str
    resembles: str
    family: str


def behaviors(path: Path | None = None) -> tuple[Behavior, ...]:
    """The behaviours of a csv file; without one, of HarmBench's own, which is fetched. Raises as `fetch` and
    `read_behaviors` do.
    """
    return read_behaviors(fetch(BEHAVIORS) if path is None else path)


def read_behaviors(path: Path) -> tuple[Behavior, ...]:
    """Every row of a HarmBench csv (mixed line ends, newlines within cells). BadInputError names file, row and line."""
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BadInputError(f"cannot read {show(path)}: {error.strerror}", "check the path") from None
    except UnicodeDecodeError as error:
        raise BadInputError(f"{show(path)} is not UTF-8 (byte {error.start + 1})", OTHER_FILE) from None
    found: dict[str, Behavior] = {}
    for place, row in _rows(path, content):
        one = _behavior(place, row)
        if one.id in found:
            raise BadInputError(f"{place}: BehaviorID {one.id} stands there for the second time", OTHER_FILE)
        found[one.id] = one
    if not found:
        raise BadInputError(f"{show(path)} holds no behaviour", OTHER_FILE)
    return tuple(found.values())


def _rows(path: Path, content: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, cells by column) of every row. Line ends become newlines, in cells too, as upstream reads its file."""
    reader = csv.reader(io.StringIO(content, newline=None), strict=True)
    try:
        names = next(reader, [])
        missing = [name for name in COLUMNS if name not in names]
        if missing:
            raise BadInputError(f"{show(path)} has no column {missing[0]}", OTHER_FILE)
        for number, cells in enumerate(reader, 1):
            place = f"{show(path)}: row {number} (to line {reader.line_num})"
            if len(cells) != len(names):
                raise BadInputError(f"{place} has {len(cells)} cells, and there are {len(names)} columns", OTHER_FILE)
            yield place, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise BadInputError(f"{show(path)}: line {reader.line_num} is no csv ({error})", OTHER_FILE) from None


def _behavior(place: str, row: dict[str, str]) -> Behavior:
    """The row as it stands: blanks at the ends of a text (a shell's prompt, for one) are part of what is asked."""
    text, context, kind = row["Behavior"], row["ContextString"], row["FunctionalCategory"].strip()
    tags = tuple(tag for tag in (tag.strip() for tag in row["Tags"].split(",")) if tag)
    if kind not in KINDS:
        raise BadInputError(f"{place}: FunctionalCategory is {kind!r}, not one of {', '.join(KINDS)}", OTHER_FILE)
    for name in ("Behavior", "BehaviorID"):
        if not row[name].strip():
            raise BadInputError(f"{place}: {name} is empty", OTHER_FILE)
    if (kind == CONTEXTUAL) != bool(context.strip()):
        raise BadInputError(f"{place} is {kind} and has {'a' if context else 'no'} ContextString", OTHER_FILE)
    return Behavior(row["BehaviorID"].strip(), text, kind, row["SemanticCategory"].strip(), tags, context)


def first_by_hash(rows: Sequence[Behavior], limit: int | None) -> tuple[Behavior, ...]:
    """At most `limit` behaviours of each functional category, chosen by a hash of their ids, in the file's order."""
    if limit is None:
        return tuple(rows)
    chosen: set[str] = set()
    for kind in KINDS:
        ids = sorted((row.id for row in rows if row.kind == kind), key=lambda id: hashlib.sha256(id.encode()).digest())
        chosen.update(ids[:limit])
    return tuple(row for row in rows if row.id in chosen)


def safe_prompts(path: Path = SAFE_PROMPTS) -> tuple[SafePrompt, ...]:
    """The shipped prompts that only look harmful, in our own words."""
    rows = read_jsonl(path, repair=False)
    return tuple(SafePrompt(row["id"], row["prompt"], row["resembles"], row["family"]) for row in rows)
