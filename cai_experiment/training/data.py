"""Preference pairs: read and checked line by line, split by instruction, turned into token ids without truncation.

Three shapes are read, and one file holds one shape only:
- the project's own lines, by their field `preference_pair`;
- TRL's plain rows {prompt, chosen, rejected}; {chosen, rejected} alone where both are "\\n\\nHuman: ..." transcripts;
- TRL's conversational rows: lists of {role, content}, with `prompt` or with the shared beginning as the prompt.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.constitution.prompts import Turn, ask_for_answer
from cai_experiment.errors import BadInputError
from cai_experiment.records.files import show
from cai_experiment.training.rows import bad, from_messages, from_transcripts, id_of, rows_of, text_of

if TYPE_CHECKING:
    from cai_experiment.engines.render import Renderer

HELD_OUT_SHARE = 0.2
UNLIMITED = 10**9
LAB, PLAIN, CONVERSATIONAL = "a line of this project", "plain text", "a list of messages"


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference. `turns` ends with the person's turn; `chosen` and `rejected` answer it; `place` is file:line."""

    id: str
    turns: tuple[Turn, ...]
    chosen: str
    rejected: str
    place: str = ""

    @property
    def instruction(self) -> str:
        """The whole prompt as one text: what the held-out split goes by."""
        return "\n\n".join(turn.text for turn in self.turns)


# ---------------------------------------------------------------- reading


def read_pairs(path: Path) -> list[Pair]:
    """Read every pair of a .jsonl file, or of a .json file that holds one list.

    Raises BadInputError (exit code 2) naming file and line: unreadable, no JSON, missing or empty field, text where
    messages belong, chosen equal to rejected, two shapes in one file, no pairs at all.
    """
    pairs: list[Pair] = []
    first: tuple[str, str] | None = None
    for place, row in rows_of(Path(path), "generate pairs first, or name a file with --pairs"):
        shape, pair = _pair(row, place, f"pair-{len(pairs) + 1}")
        if first is None:
            first = (shape, place)
        elif shape != first[0]:
            raise bad(place, f"is {shape}, but {first[1]} is {first[0]}: one file holds one format")
        pairs.append(pair)
    if not pairs:
        raise BadInputError(f"{show(path)} holds no preference pairs", "generate some first, e.g. with test_single.py")
    return pairs


def _pair(row: Any, place: str, default_id: str) -> tuple[str, Pair]:
    """The shape of one row, and the pair in it."""
    if not isinstance(row, dict):
        raise bad(place, f"is {type(row).__name__}, not an object with prompt, chosen and rejected")
    row_id = id_of(row, default_id, place)
    fields, shape = row, PLAIN
    if "preference_pair" in row:
        fields, shape = row["preference_pair"], LAB
        if not isinstance(fields, dict):
            raise bad(place, 'has a "preference_pair" that is not an object')
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise bad(place, f'has no "{name}"')
    if shape != LAB and isinstance(fields["chosen"], list):
        shape = CONVERSATIONAL
        turns, chosen, rejected = from_messages(fields, place)
    elif "prompt" not in fields and shape != LAB:
        turns, chosen, rejected = from_transcripts(fields, place)
    else:
        prompt, chosen, rejected = (text_of(fields, name, place) for name in ("prompt", "chosen", "rejected"))
        turns = ask_for_answer(prompt)
    if chosen.strip() == rejected.strip():
        raise bad(place, 'has "chosen" equal to "rejected": nothing to prefer')
    return shape, Pair(row_id, turns, chosen, rejected, place)


# ---------------------------------------------------------------- held-out split


def normalized(instruction: str) -> str:
    """An instruction without differences that do not matter: Unicode form, case, blanks."""
    return " ".join(unicodedata.normalize("NFKC", instruction).casefold().split())


def split_by_instruction(
    pairs: Sequence[Pair], seed: int, share: float = HELD_OUT_SHARE
) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, held-out pairs), both in file order; all pairs of one instruction fall on one side.

    Held out are the instructions with the lowest seeded hashes: `share` of them, rounded, but at least one and never
    all. So a side depends on the instructions and the seed, not on the order of the file. A file with a single
    instruction cannot be split, and `share` 0 does not split.
    """
    instructions = {normalized(pair.instruction) for pair in pairs}
    if share == 0 or len(instructions) < 2:
        return list(pairs), []
    count = min(max(round(share * len(instructions)), 1), len(instructions) - 1)
    held_out = set(sorted(instructions, key=lambda text: seeded_hash(text, seed))[:count])
    return (
        [pair for pair in pairs if normalized(pair.instruction) not in held_out],
        [pair for pair in pairs if normalized(pair.instruction) in held_out],
    )


def seeded_hash(text: str, seed: int) -> bytes:
    """What a seeded choice among texts goes by."""
    return hashlib.sha256(f"{seed}\n{text}".encode()).digest()


def pairs_sha256(pairs: Sequence[Pair]) -> str:
    """Hash of what is trained on, in order: ids, prompts and answers."""
    digest = hashlib.sha256()
    for pair in pairs:
        texts = [pair.id, *(f"{turn.kind}:{turn.text}" for turn in pair.turns), pair.chosen, pair.rejected]
        digest.update(json.dumps(texts, ensure_ascii=False).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- token ids


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A pair as token ids: `prompt_ids` ends where the answer begins, both answers end in the end token."""

    id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def length(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def tokenize_pairs(
    pairs: Sequence[Pair], renderer: Renderer, max_length: int
) -> tuple[list[TokenPair], list[str]]:
    """(pairs as token ids, ids of dropped pairs). A pair longer than `max_length` tokens is dropped, never cut:
    a cut answer would lose its end token, and the model would unlearn to stop.

    The renderer encodes text without special tokens, so no row can smuggle in a control token.
    Raises BadInputError if nothing is left.
    """
    kept: list[TokenPair] = []
    dropped: list[str] = []
    for pair in pairs:
        ids = TokenPair(
            pair.id,
            _prompt_ids(pair, renderer),
            renderer.completion_ids(pair.chosen),
            renderer.completion_ids(pair.rejected),
        )
        if ids.length > max_length:
            dropped.append(pair.id)
        else:
            kept.append(ids)
    if not kept:
        message = f"all {len(pairs)} pairs are longer than {max_length} tokens (first: {pairs[0].place or pairs[0].id})"
        raise BadInputError(message, "use shorter pairs, a model with a longer context, or a larger --max-length")
    return kept, dropped


def _prompt_ids(pair: Pair, renderer: Renderer) -> list[int]:
    """The bare prompt, as evaluation, demo and export use it too; longer conversations without worked examples."""
    if len(pair.turns) == 1:
        return renderer.bare_prompt_ids(pair.turns[0].text)
    # with unlimited room no turn is left out: a pair that is too long is dropped as a whole
    return renderer.prompt_ids(pair.turns, "answer", examples=0, max_tokens=-UNLIMITED)
