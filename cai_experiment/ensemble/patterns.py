"""Who spoke: each expert's share of the tokens by task, how often the speaker changes, and answers by speaker."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from cai_experiment.ensemble.score import ALL, ratio
from cai_experiment.judging.result import Result

TENTHS = 10  # an answer's tokens, from its first to its last tenth
BROKEN = "\ufffd"  # what a tokenizer shows for bytes that are no whole character yet


class Decoder(Protocol):
    """The one thing that is asked of a tokenizer here."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str: ...


@dataclass(frozen=True, slots=True)
class Turns:
    """One answer as it was spoken: the expert of each token, and the heads' weights of each token (or none)."""

    experts: tuple[int, ...]
    pi: tuple[tuple[float, ...], ...] = ()

    @property
    def switches(self) -> int:
        """How often the speaker changes within the answer."""
        return sum(one != other for one, other in pairwise(self.experts))


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of an answer that one expert spoke."""

    expert: int
    text: str


def letter(expert: int) -> str:
    """An expert's letter, by which it can be told without colours: A, B, C ... then E26, E27 ..."""
    return string.ascii_uppercase[expert] if expert < 26 else f"E{expert}"


def short_names(names: Sequence[str]) -> list[str]:
    """Names without what stands before their last "/", where those differ; else as they are."""
    short = [name.rstrip("/").rsplit("/", 1)[-1] for name in names]
    return short if len(set(short)) == len(short) else list(names)


def patterns(
    turns: Sequence[Turns], datasets: Sequence[str], names: Sequence[str], seed: int = 0
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """{"all" or dataset: {"answers", "tokens", "share", "weight", "switches", "switches_per_100_tokens", "tenths"}}.

    `share` {expert: share of tokens, with the bootstrap interval over answers}; `weight` {expert: the heads' mean
    weight}; `switches` of an answer, mean with interval; `tenths` {expert: share in each tenth of the answers}.
    Answers without a token count as answers, and say nothing else.
    """
    groups = {ALL: list(turns)}
    for dataset in dict.fromkeys(datasets):
        groups[dataset] = [one for one, of in zip(turns, datasets, strict=True) if of == dataset]
    return {group: _pattern(own, names, seed) for group, own in groups.items()}


def _pattern(turns: Sequence[Turns], names: Sequence[str], seed: int) -> dict[str, Any]:
    spoken = [one for one in turns if one.experts]
    tokens = [float(len(one.experts)) for one in spoken]
    switches = [float(one.switches) for one in spoken]
    places = range(len(names))
    return {
        "answers": len(turns),
        "tokens": int(sum(tokens)),
        "share": {
            names[m]: ratio([float(one.experts.count(m)) for one in spoken], tokens, seed).to_json() for m in places
        },
        "weight": {names[m]: weight for m, weight in enumerate(_weights(spoken, len(names)))},
        "switches": Result.mean(switches, seed=seed).to_json(),
        "switches_per_100_tokens": 100 * sum(switches) / sum(tokens) if tokens else None,
        "tenths": {names[m]: [row[m] for row in _tenths(spoken, len(names))] for m in places},
    }


def _weights(turns: Sequence[Turns], experts: int) -> list[float | None]:
    """The mean weight that the heads gave each expert, over all tokens."""
    rows = [row for one in turns for row in one.pi]
    return [sum(row[m] for row in rows) / len(rows) if rows else None for m in range(experts)]


def _tenths(turns: Sequence[Turns], experts: int) -> list[list[float]]:
    """Each expert's share of the tokens in each tenth of the answers, [TENTHS][experts]; 0 where no token is."""
    counts = [[0.0] * experts for _ in range(TENTHS)]
    for one in turns:
        for place, expert in enumerate(one.experts):
            counts[place * TENTHS // len(one.experts)][expert] += 1
    return [[count / max(sum(row), 1) for count in row] for row in counts]


def pieces(tokenizer: Decoder, ids: Sequence[int], experts: Sequence[int], text: str | None = None) -> list[Piece]:
    """An answer in stretches of one speaker; joined again they are its text. `text`, if given, is where to end (an
    answer is cut at a stop string).

    A character whose bytes came in several tokens belongs to the token that completed it.
    """
    found: list[Piece] = []
    shown = 0
    for place, expert in enumerate(experts, 1):
        whole = tokenizer.decode(list(ids[:place]), skip_special_tokens=True)
        last = place == len(experts)
        if whole.endswith(BROKEN) and not last:
            continue
        new, shown = whole[shown:], max(shown, len(whole))
        if found and found[-1].expert == expert:
            found[-1] = Piece(expert, found[-1].text + new)
        elif new:
            found.append(Piece(expert, new))
    return found if text is None else _cut(found, len(text))


def _cut(found: Sequence[Piece], length: int) -> list[Piece]:
    kept = []
    for piece in found:
        if length > 0:
            kept.append(Piece(piece.expert, piece.text[:length]))
        length -= len(piece.text)
    return kept


def examples(
    marks: Mapping[str, Sequence[bool]], rivals: Sequence[str], ensemble: str, places: Sequence[int], count: int
) -> list[int]:
    """Places of the questions to show, in order: won against the rivals, lost, and others, by turns."""

    def kind(place: int) -> int:
        any_rival = any(marks[arm][place] for arm in rivals)
        return 0 if marks[ensemble][place] and not any_rival else 1 if any_rival and not marks[ensemble][place] else 2

    piles = [[place for place in places if kind(place) == one] for one in range(3)]
    taken: list[int] = []
    while len(taken) < min(count, len(places)):
        for pile in piles:
            if pile and len(taken) < count:
                taken.append(pile.pop(0))
    return sorted(taken)
