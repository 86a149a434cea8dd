"""The instructions of a run, drawn strictly in order: written by the model, read from files, or both by shares.

What is drawn depends on the seed, the model and the files alone, never on the order in which completions arrive; and a
longer run begins with a shorter one's list.
"""

from __future__ import annotations

import math
from collections import Counter, deque

from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.pipeline.evaluation_sets import EvaluationTexts
from cai_experiment.pipeline.instruct import SELF, Instruction, InstructionWriter, example_id, malformed
from cai_experiment.pipeline.known import KnownTexts, fingerprint
from cai_experiment.pipeline.mix import Part, Turns, shuffled
from cai_experiment.pipeline.settings import RunSettings

CANDIDATES_PER_DRAW = 10  # a model that writes fewer new instructions than one in ten has run dry
IN_EVALUATION_SET = "in_evaluation_set"


class WorkList:
    """Instructions one by one, until `max_draws` were drawn or every source has run out.

    `refused` counts by reason what was not used: malformed and repeated texts, and those of an evaluation set.
    `ran_out` says after how many instructions a source of a mix had no more.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.refused: Counter[str] = Counter()
        self.ran_out: dict[str, int] = {}
        self.drawn = 0
        self.max_draws = settings.max_draws
        self._evaluation = EvaluationTexts(settings.evaluation_sets)
        self._known = KnownTexts()
        self._every_row = settings.instructions is not None
        parts = settings.mix or (Part(SELF, 1.0),)
        if settings.instructions is not None:
            parts = (Part(settings.instructions_name, 1.0, settings.instructions),)
        self._turns = Turns(parts)
        self._rows = {
            part.name: deque(part.rows if self._every_row else shuffled(part, settings.seed))
            for part in parts
            if part.name != SELF
        }
        speaks = any(part.name == SELF for part in parts)
        self.writer = InstructionWriter(
            settings.seed, CANDIDATES_PER_DRAW * settings.max_draws if speaks else 0, settings.grid
        )

    def prompts(self, wanted: int) -> list[Prompt]:
        """What to ask the model, so that `wanted` more instructions can be drawn soon."""
        own = math.ceil(min(wanted, self.max_draws - self.drawn) * self._turns.share(SELF))
        return self.writer.next_prompts(own - self.writer.undecided)

    def take(self, completion: Completion) -> None:
        """Take a completion of one of `prompts`."""
        self.writer.take(completion)

    def next(self) -> Instruction | None:
        """The next instruction; None if it is not here yet, or if there are no more."""
        while self.drawn < self.max_draws and (name := self._turns.next()) is not None:
            found = self._written() if name == SELF else self._read(name)
            if found is not None:
                self._turns.took(name)
                self.drawn += 1
                return found
            if name == SELF and not self.writer.dry:
                return None  # it is on its way, or was not asked for yet
            self._turns.leave(name)
            self.ran_out[name] = self.drawn
        return None

    @property
    def ended(self) -> bool:
        """True if there will be no more."""
        return self.drawn >= self.max_draws or self._turns.next() is None

    def _written(self) -> Instruction | None:
        while (candidate := self.writer.next()) is not None:
            completion, source = candidate
            if self._is_new(completion.text, malformed(completion, self.writer.grid_name)):
                return Instruction(example_id(self.drawn), completion.text.strip(), source)
        return None

    def _read(self, name: str) -> Instruction | None:
        rows = self._rows[name]
        while rows:
            row = rows.popleft()
            if self._is_new(row.text):
                return row if self._every_row else Instruction(example_id(self.drawn), row.text, row.source)
        return None

    def _is_new(self, text: str, reason: str = "") -> bool:
        """True if the text may be used; else it is counted under its reason."""
        reason = reason or self._seen(text)
        if reason:
            self.refused[reason] += 1
        return not reason

    def _seen(self, text: str) -> str:
        """Where the text, or one near it, was met before: in an evaluation set or in this run; "" if nowhere."""
        if self._every_row and not len(self._evaluation):
            return ""
        one = fingerprint(text)
        if self._evaluation.holds(one):
            return IN_EVALUATION_SET
        if self._every_row:
            return ""
        reason = self._known.find(one)
        if not reason:
            self._known.remember(one)
        return reason
