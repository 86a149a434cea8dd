"""Instructions written by the model itself: asked for in a seeded order, malformed ones refused."""

from __future__ import annotations

from dataclasses import dataclass

from cai_experiment.constitution import broad_grid, grid
from cai_experiment.constitution.prompts import Turn, ask_for_instruction, ask_for_message
from cai_experiment.engines.base import Completion, Prompt, Sampling
from cai_experiment.milestones import MAX_TOKENS_INSTRUCTION, MAX_TOKENS_MESSAGE, TEMPERATURE_ANSWER
from cai_experiment.pipeline.known import normalised_words
from cai_experiment.pipeline.run_on import runs_on

SELF = "self"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One row of the work list. `source` says where it is from: "self:topic/kind", or file name and row."""

    id: str
    text: str
    source: str


def example_id(index: int) -> str:
    """The id of the example at `index` (from 0): sorts as text in instruction order."""
    return f"{index:06d}"


def malformed(completion: Completion, grid_name: str) -> str:
    """Why an instruction written for a cell of that grid cannot be used, or "".

    "empty", "too_long", "engine_error"; "paragraphs": more than one line (household); "runs_on" (broad, see `runs_on`).
    """
    text = completion.text.strip()
    if completion.finish == "error":
        return "engine_error"
    if completion.finish == "length":
        return "too_long"
    if not normalised_words(text):
        return "empty"
    if grid_name == grid.HOUSEHOLD:
        return "paragraphs" if "\n" in text else ""
    return "runs_on" if runs_on(text) else ""


def drawn(grid_name: str, seed: int, candidate: int) -> tuple[tuple[str, ...], tuple[Turn, ...], int]:
    """(names of the cell, prompt, tokens to write at most) of a candidate by the grid of that name."""
    if grid_name == grid.HOUSEHOLD:
        topic, kind = grid.draw(seed, candidate)
        return (topic, kind), ask_for_instruction(topic, kind), MAX_TOKENS_INSTRUCTION
    cell = broad_grid.draw(seed, candidate)
    return cell, ask_for_message(*cell), MAX_TOKENS_MESSAGE


class InstructionWriter:
    """Asks for candidates 0, 1, 2 ... and gives their texts back strictly in that order, however late each arrives.

    At most `max_candidates` are asked for, each for a cell of the grid of that name.
    """

    def __init__(self, seed: int, max_candidates: int, grid_name: str = grid.HOUSEHOLD) -> None:
        self.seed = seed
        self.max_candidates = max_candidates
        self.grid_name = grid_name
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
        _, turns, max_tokens = drawn(self.grid_name, self.seed, candidate)
        return Prompt(key, turns, "written_instruction", Sampling(TEMPERATURE_ANSWER, max_tokens, self.seed, key))

    def take(self, completion: Completion) -> None:
        """Take one candidate's completion."""
        self._waiting[int(completion.id.rpartition("/")[2])] = completion

    def next(self) -> tuple[Completion, str] | None:
        """The next candidate in order with its source ("self:garden/fix"), or None while it has not arrived."""
        completion = self._waiting.pop(self.decided, None)
        if completion is None:
            return None
        names, _, _ = drawn(self.grid_name, self.seed, self.decided)
        self.decided += 1
        return completion, f"{SELF}:{'/'.join(names)}"
