"""Instructions written by the model itself: asked for in a seeded order, near-duplicates and malformed ones refused."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cai_experiment.constitution.grid import draw
from cai_experiment.constitution.prompts import ask_for_instruction
from cai_experiment.engines.base import Completion, Prompt, Sampling
from cai_experiment.milestones import MAX_TOKENS_INSTRUCTION, TEMPERATURE_ANSWER

if TYPE_CHECKING:
    from datasketch import MinHash

SHINGLE_WORDS = 3
MAX_JACCARD = 0.7  # two questions that share this much of their word triples ask the same thing
LSH_THRESHOLD = 0.5  # below MAX_JACCARD, so that the hash index misses under 1% of what the exact check would refuse
PERMUTATIONS = 128


@dataclass(frozen=True, slots=True)
class Instruction:
    """One row of the work list. `source` says where it is from: "self:topic/kind", or file name and row."""

    id: str
    text: str
    source: str


def example_id(index: int) -> str:
    """The id of the example at `index` (from 0): sorts as text in instruction order."""
    return f"{index:06d}"


def normalised_words(text: str) -> tuple[str, ...]:
    """The words of `text` without case, punctuation or spacing: what counts when two texts are compared."""
    return tuple(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """The set of runs of SHINGLE_WORDS words in `text`; a shorter text is one shingle."""
    words = normalised_words(text)
    last = max(len(words) - SHINGLE_WORDS, 0)
    return frozenset(words[i : i + SHINGLE_WORDS] for i in range(last + 1))


class KnownTexts:
    """Texts seen so far. MinHash LSH (Broder 1997) proposes near ones, the exact Jaccard index decides."""

    def __init__(self) -> None:
        from datasketch import MinHashLSH

        self._index = MinHashLSH(threshold=LSH_THRESHOLD, num_perm=PERMUTATIONS)
        self._shingles: list[frozenset[tuple[str, ...]]] = []
        self._words: set[tuple[str, ...]] = set()

    def add(self, text: str) -> str:
        """Remember `text` if it is new. Returns "", or why it is not: "duplicate" or "near_duplicate"."""
        words, mine = normalised_words(text), shingles(text)
        if words in self._words:
            return "duplicate"
        sketch = _sketch(mine)
        for key in self._index.query(sketch):
            other = self._shingles[int(key)]
            if len(mine & other) / len(mine | other) >= MAX_JACCARD:
                return "near_duplicate"
        self._index.insert(str(len(self._shingles)), sketch)
        self._shingles.append(mine)
        self._words.add(words)
        return ""


def _sketch(items: frozenset[tuple[str, ...]]) -> MinHash:
    from datasketch import MinHash

    sketch = MinHash(num_perm=PERMUTATIONS)
    sketch.update_batch([" ".join(words).encode() for words in items])
    return sketch


def malformed(completion: Completion) -> str:
    """Why a written instruction cannot be used ("empty", "too_long", "paragraphs", "engine_error"), or ""."""
    text = completion.text.strip()
    if completion.finish == "error":
        return "engine_error"
    if completion.finish == "length":
        return "too_long"
    if not normalised_words(text):
        return "empty"
    return "paragraphs" if "\n" in text else ""


class InstructionWriter:
    """Asks for candidates 0, 1, 2 ... and decides on them strictly in that order, however late each arrives.

    So the list of instructions depends on the seed and the model alone, and a longer run begins with a shorter
    one's list. At most `max_candidates` are asked for.
    """

    def __init__(self, seed: int, max_candidates: int) -> None:
        self.seed = seed
        self.max_candidates = max_candidates
        self.asked = 0
        self.decided = 0
        self.accepted = 0
        self.refused: Counter[str] = Counter()
        self._known = KnownTexts()
        self._waiting: dict[int, Completion] = {}

    @property
    def undecided(self) -> int:
        """How many candidates were asked for and not yet decided on."""
        return self.asked - self.decided

    @property
    def exhausted(self) -> bool:
        """True if no further candidate may be asked for."""
        return self.asked >= self.max_candidates

    def next_prompt(self) -> Prompt:
        """The prompt of the next candidate."""
        key = f"instruction/{self.asked}"
        turns = ask_for_instruction(*draw(self.seed, self.asked))
        self.asked += 1
        sampling = Sampling(TEMPERATURE_ANSWER, MAX_TOKENS_INSTRUCTION, self.seed, key)
        return Prompt(key, turns, "written_instruction", sampling)

    def take(self, completion: Completion) -> list[Instruction]:
        """Take one candidate's text; give back the instructions that can now be decided on, in order."""
        self._waiting[int(completion.id.rpartition("/")[2])] = completion
        ready: list[Instruction] = []
        while self.decided in self._waiting:
            instruction = self._decide(self.decided, self._waiting.pop(self.decided))
            self.decided += 1
            if instruction is not None:
                ready.append(instruction)
        return ready

    def _decide(self, candidate: int, completion: Completion) -> Instruction | None:
        reason = malformed(completion) or self._known.add(completion.text)
        if reason:
            self.refused[reason] += 1
            return None
        topic, kind = draw(self.seed, candidate)
        instruction = Instruction(example_id(self.accepted), completion.text.strip(), f"self:{topic}/{kind}")
        self.accepted += 1
        return instruction
