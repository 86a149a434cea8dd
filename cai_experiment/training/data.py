"""Preference pairs: read and checked line by line, split by instruction, turned into token ids without truncation.

Three shapes are read, and one file holds one shape only:
- the project's own lines, by their field `preference_pair`;
- TRL's plain rows {prompt, chosen, rejected}; {chosen, rejected} alone where both are "\\n\\nHuman: ..." transcripts;
- TRL's conversational rows: lists of {role, content}, with `prompt` or with the shared beginning as the prompt.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.constitution.prompts import Turn, ask_for_answer
from cai_experiment.errors import BadInputError
from cai_experiment.records.files import parse_line, show

if TYPE_CHECKING:
    from cai_experiment.engines.render import Renderer

HELD_OUT_SHARE = 0.2
UNLIMITED = 10**9
LINE_BYTES = 10_000_000  # of one pair: a thousand times the longest that fits a context of 4,096 tokens
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
    for place, row in _rows(Path(path)):
        shape, pair = _pair(row, place, f"pair-{len(pairs) + 1}")
        if first is None:
            first = (shape, place)
        elif shape != first[0]:
            raise _bad(place, f"is {shape}, but {first[1]} is {first[0]}: one file holds one format")
        pairs.append(pair)
    if not pairs:
        raise BadInputError(f"{show(path)} holds no preference pairs", "generate some first, e.g. with test_single.py")
    return pairs


def _bad(place: str, what: str) -> BadInputError:
    return BadInputError(f"{place} {what}", "correct or remove that line and run the same command again")


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) for every line of a .jsonl file, or for every element of a .json list."""
    try:
        if path.suffix == ".json":
            yield from _list_rows(path)
            return
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), 1):
                place = f"{show(path)}:{number}"
                if len(line) > LINE_BYTES:
                    raise _bad(place, f"is over {LINE_BYTES / 1e6:.0f} MB long: no pair is")
                if line.strip():
                    yield place, _checked(parse_line, line, place)
    except OSError as error:
        next_step = "generate pairs first, or name a file with --pairs"
        raise BadInputError(f"cannot read {show(path)}: {error.strerror}", next_step) from None


def _list_rows(path: Path) -> Iterator[tuple[str, Any]]:
    rows = _checked(json.loads, path.read_bytes(), show(path))
    if not isinstance(rows, list):
        raise _bad(show(path), "holds one JSON value, not a list of pairs")
    yield from ((f"{show(path)}, row {number}", row) for number, row in enumerate(rows, 1))


def _checked(parse: Callable[[bytes], Any], data: bytes, place: str) -> Any:
    try:
        return parse(data)
    except (ValueError, RecursionError) as error:
        raise _bad(place, str(error) if parse is parse_line else f"is no JSON ({error})") from None


def _pair(row: Any, place: str, default_id: str) -> tuple[str, Pair]:
    """The shape of one row, and the pair in it."""
    if not isinstance(row, dict):
        raise _bad(place, f"is {type(row).__name__}, not an object with prompt, chosen and rejected")
    row_id = str(row["id"]) if isinstance(row.get("id"), (str, int)) else default_id
    fields, shape = row, PLAIN
    if "preference_pair" in row:
        fields, shape = row["preference_pair"], LAB
        if not isinstance(fields, dict):
            raise _bad(place, 'has a "preference_pair" that is not an object')
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise _bad(place, f'has no "{name}"')
    if shape != LAB and isinstance(fields["chosen"], list):
        shape = CONVERSATIONAL
        turns, chosen, rejected = _from_messages(fields, place)
    elif "prompt" not in fields and shape != LAB:
        turns, chosen, rejected = _from_transcripts(fields, place)
    else:
        prompt, chosen, rejected = (_text(fields, name, place) for name in ("prompt", "chosen", "rejected"))
        turns = ask_for_answer(prompt)
    if chosen.strip() == rejected.strip():
        raise _bad(place, 'has "chosen" equal to "rejected": nothing to prefer')
    return shape, Pair(row_id, turns, chosen, rejected, place)


def _text(fields: Mapping[str, Any], name: str, place: str) -> str:
    if name not in fields:
        raise _bad(place, f'has no "{name}"')
    value = fields[name]
    if not isinstance(value, str):
        raise _bad(place, f'has a "{name}" that is {type(value).__name__}, not text')
    if not value.strip():
        raise _bad(place, f'has an empty "{name}"')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _bad(place, f'has a "{name}" with half a surrogate pair (character {error.start + 1})') from None
    return value


# ---------------------------------------------------------------- conversations

_SPEAKERS = {"user": "instruction", "assistant": "answer"}
_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")


def _from_messages(fields: Mapping[str, Any], place: str) -> tuple[tuple[Turn, ...], str, str]:
    """Turns, chosen and rejected of a conversational row."""
    chosen, rejected = (_messages(fields, name, place) for name in ("chosen", "rejected"))
    if "prompt" in fields:
        prompt = _messages(fields, "prompt", place)
    else:
        prompt = []
        for one, other in zip(chosen, rejected, strict=False):
            if one != other:
                break
            prompt.append(one)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return _turns(prompt, place), _answer(chosen, "chosen", place), _answer(rejected, "rejected", place)


def _messages(fields: Mapping[str, Any], name: str, place: str) -> list[tuple[str, str]]:
    """(role, content) of every message in a field."""
    value = fields[name]
    if not isinstance(value, list):
        raise _bad(place, f'has a "{name}" that is {type(value).__name__}, not a list of messages')
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise _bad(place, f'has a "{name}" whose message {number} lacks role or content')
        role = message["role"]
        if role not in ("system", *_SPEAKERS):
            raise _bad(place, f'has a "{name}" with the role {role!r} (known: system, user, assistant)')
        messages.append((role, _text(message, "content", place)))
    return messages


def _turns(messages: Sequence[tuple[str, str]], place: str) -> tuple[Turn, ...]:
    """The prompt's turns. A system message stands before the first user message: base models know no such role."""
    system = "\n\n".join(text for role, text in messages if role == "system")
    spoken = [(role, text) for role, text in messages if role != "system"]
    if not spoken or spoken[-1][0] != "user":
        raise _bad(place, "has a prompt that does not end with a user message")
    if any(one == other for (one, _), (other, _) in pairwise(spoken)) or spoken[0][0] != "user":
        raise _bad(place, "has a prompt in which user and assistant do not take turns")
    if system:
        spoken[0] = ("user", f"{system}\n\n{spoken[0][1]}")
    return tuple(Turn(_SPEAKERS[role], text) for role, text in spoken)


def _answer(messages: Sequence[tuple[str, str]], name: str, place: str) -> str:
    if len(messages) != 1 or messages[0][0] != "assistant":
        raise _bad(place, f'has a "{name}" that is not exactly one assistant message after the prompt')
    return messages[0][1]


def _from_transcripts(fields: Mapping[str, Any], place: str) -> tuple[tuple[Turn, ...], str, str]:
    """Turns, chosen and rejected of two "\\n\\nHuman: ...\\n\\nAssistant: ..." texts with one beginning."""
    as_messages: dict[str, list[dict[str, str]]] = {}
    for name in ("chosen", "rejected"):
        text = _text(fields, name, place)
        parts = _TRANSCRIPT_TURN.split(text)
        if parts[0].strip() or len(parts) < 5:
            raise _bad(place, 'has no "prompt", and its "chosen" is no "Human: ... Assistant: ..." transcript')
        if not all(turn.strip() for turn in parts[2::2]):
            raise _bad(place, f'has a "{name}" with an empty turn')
        roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[1::2]]
        as_messages[name] = [{"role": r, "content": t.strip()} for r, t in zip(roles, parts[2::2], strict=True)]
    return _from_messages(as_messages, place)


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
    held_out = set(sorted(instructions, key=lambda text: _seeded_hash(text, seed))[:count])
    return (
        [pair for pair in pairs if normalized(pair.instruction) not in held_out],
        [pair for pair in pairs if normalized(pair.instruction) in held_out],
    )


def _seeded_hash(text: str, seed: int) -> bytes:
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
