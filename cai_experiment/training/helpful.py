"""Helpful answers that are mixed into SFT, so that a warm start on revisions does not cost helpfulness.

One JSON object a line (.jsonl, or a .json list of them), in one of three shapes, and one file holds one shape only:
- {instruction, answer}: text;
- {prompt, completion}: text, as TRL's SFTTrainer reads it;
- {prompt, completion}: lists of {role, content}, TRL's conversational form.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from cai_experiment.constitution.prompts import ask_for_answer
from cai_experiment.errors import BadInputError
from cai_experiment.records.files import show
from cai_experiment.training.data import CONVERSATIONAL, Pair, normalized, seeded_hash
from cai_experiment.training.rows import answer_of, bad, id_of, messages_of, rows_of, text_of, turns_of

SHAPES = (("instruction", "answer"), ("prompt", "completion"))


def read_helpful(path: Path) -> list[Pair]:
    """The rows of a file, each as a pair with the answer on both sides (see sft.py).

    Raises BadInputError (exit code 2) naming file and line: unreadable, no JSON, a missing or empty field, text where
    messages belong, two shapes in one file, no rows at all.
    """
    rows: list[Pair] = []
    first: tuple[str, str] | None = None
    for place, row in rows_of(Path(path), "name a file of instructions and answers with --helpful"):
        shape, pair = _row(row, place, f"helpful-{len(rows) + 1}")
        if first is None:
            first = (shape, place)
        elif shape != first[0]:
            raise bad(place, f"has {shape}, but {first[1]} has {first[0]}: one file holds one format")
        rows.append(pair)
    if not rows:
        raise BadInputError(f"{show(path)} holds no rows", "name a file of instructions and answers with --helpful")
    return rows


def _row(row: Any, place: str, default_id: str) -> tuple[str, Pair]:
    """The shape of one row, and the row as a pair."""
    if not isinstance(row, dict):
        raise bad(place, f"is {type(row).__name__}, not an object with instruction and answer")
    asked, answered = next((names for names in SHAPES if names[0] in row), SHAPES[0])
    row_id = id_of(row, default_id, place)
    if asked == "prompt" and isinstance(row["prompt"], list):
        if answered not in row:
            raise bad(place, f'has no "{answered}"')
        turns = turns_of(messages_of(row, asked, place), place)
        answer = answer_of(messages_of(row, answered, place), answered, place)
        return CONVERSATIONAL, Pair(row_id, turns, answer, answer, place)
    prompt, answer = (text_of(row, name, place) for name in (asked, answered))
    return f"{asked} and {answered}", Pair(row_id, ask_for_answer(prompt), answer, answer, place)


def choose_helpful(
    rows: Sequence[Pair], revisions: int, share: float, known: Collection[str], seed: int
) -> list[Pair]:  # fmt: skip
    """So many rows that `share` of `revisions` and these are helpful, or all there are; in the order of their hashes.

    Taken are the instructions with the lowest seeded hashes, so the choice does not depend on the file's order. Left
    out are those in `known` (normalized: a preference pair's, trained on or held out) and repetitions.
    """
    fresh: dict[str, Pair] = {}
    for row in rows:
        text = normalized(row.instruction)
        if text not in known:
            fresh.setdefault(text, row)
    order = sorted(fresh, key=lambda text: seeded_hash(text, seed))
    return [fresh[text] for text in order[: round(revisions * share / (1 - share))]]
