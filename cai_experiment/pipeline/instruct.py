"""Instructions written by the model itself: asked for in a seeded order, malformed ones refused."""

from __future__ import annotations

from dataclasses import dataclass

from cai_experiment.constitution.grid import LENGTHS, draw, draw_length
from cai_experiment.constitution.prompts import ask_for_instruction
from cai_experiment.engines.base import Completion, Prompt, Sampling
from cai_experiment.milestones import MAX_TOKENS_INSTRUCTION, TEMPERATURE_ANSWER
from cai_experiment.pipeline.known import normalised_words

SELF = "self"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One row of the work list. `source` says where it is from: "self:topic/kind/length", or file name and row."""

    id: str
    text: str
    source: str


def example_id(index: int) -> str:
    """The id of the example at `index` (from 0): sorts as text in instruction order."""
    return f"{index:06d}"


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
    """Asks for candidates 0, 1, 2 ... and gives their texts back strictly in that order, however late each arrives.

    At most `max_candidates` are asked for. `lengths` puts a length into each prompt, beside topic and kind.
    """

    def __init__(self, seed: int, max_candidates: int, lengths: bool = False) -> None:
        self.seed = seed
        self.max_candidates = max_candidates
        self.lengths = lengths
        self.asked = 0
        self.decided = 0
        self._waiting: dict[int, Completion] = {}

    @property
    def undecided(self) -> int:
        """How many candidates were asked for and not yet given back."""
        return self.asked - self.decided

    @property
    def dry(self) -> bool:
        """True if every candidate that may be asked for was given back."""
        return self.decided >= self.max_candidates

    def next_prompts(self, most: int) -> list[Prompt]:
        """The prompts of the next candidates, `most` of them or as many as may still be asked for."""
        first, self.asked = self.asked, min(self.asked + max(0, most), self.max_candidates)
        return [self._prompt(candidate) for candidate in range(first, self.asked)]

    def _prompt(self, candidate: int) -> Prompt:
        key = f"instruction/{candidate}"
        length = LENGTHS[draw_length(self.seed, candidate)] if self.lengths else ""
        turns = ask_for_instruction(*draw(self.seed, candidate), length)
        sampling = Sampling(TEMPERATURE_ANSWER, MAX_TOKENS_INSTRUCTION, self.seed, key)
        return Prompt(key, turns, "written_instruction", sampling)

    def take(self, completion: Completion) -> None:
        """Take one candidate's completion."""
        self._waiting[int(completion.id.rpartition("/")[2])] = completion

    def next(self) -> tuple[Completion, str] | None:
        """The next candidate in order with its source ("self:garden/fix"), or None while it has not arrived."""
        completion = self._waiting.pop(self.decided, None)
        if completion is None:
            return None
        names = [*draw(self.seed, self.decided), *([draw_length(self.seed, self.decided)] if self.lengths else [])]
        self.decided += 1
        return completion, f"{SELF}:{'/'.join(names)}"
