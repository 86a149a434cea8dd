"""One cell of the matrix for one instruction: a generator answers and revises, a critic criticises and judges.

A cell is the pipeline's own state machine (pipeline/stages.py), with its prompts and its keys of randomness. All
generators draw with the same random numbers, and an answer is the same whoever criticises it, so it is asked for once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cai_experiment.constitution.principles import Principle
from cai_experiment.constitution.prompts import abstains
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.judging.judge import Verdict, preferred_prompts, read_verdict
from cai_experiment.nano.flaws import BREACHES
from cai_experiment.nano.truth import critique_right, find_flaws, is_flawed, repaired
from cai_experiment.pipeline.instruct import Instruction
from cai_experiment.pipeline.stages import Draft, ExampleStages, StageSettings, role_of

Known = Callable[[str, Prompt], Completion | None]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Something that a model has not said yet."""

    model: str
    prompt: Prompt


class Cell:
    """One instruction through one generator and one critic. After a revision the critic also compares both answers."""

    def __init__(
        self, generator: str, critic: str, instruction: Instruction, principles: Sequence[Principle],
        settings: StageSettings,
    ) -> None:  # fmt: skip
        self.generator, self.critic, self.instruction = generator, critic, instruction
        self._stages = ExampleStages(instruction, principles, settings)
        self._steps = self._stages.steps()
        self._waiting: list[Prompt] = next(self._steps)
        self._ended = False
        self.preferred: Verdict | None = None

    @property
    def draft(self) -> Draft:
        """The example as far as it came."""
        return self._stages.draft

    def advance(self, known: Known) -> list[Wanted]:
        """Go on as far as what was said allows; gives what is missing, nothing when the cell is finished."""
        while not self._ended:
            said, missing = self._look(self._waiting, known)
            if missing:
                return missing
            try:
                self._waiting = self._steps.send(said)
            except StopIteration:
                self._ended = True
        return self._compare(known)

    def _look(self, prompts: Sequence[Prompt], known: Known) -> tuple[dict[str, Completion], list[Wanted]]:
        said: dict[str, Completion] = {}
        missing = []
        for prompt in prompts:
            who = self.generator if role_of(prompt) == "generator" else self.critic
            if (completion := known(who, prompt)) is None:
                missing.append(Wanted(who, prompt))
            else:
                said[prompt.id] = completion
        return said, missing

    def _compare(self, known: Known) -> list[Wanted]:
        """Does the critic call the revision better than the first answer? Not asked where nothing was revised."""
        draft = self.draft
        if self.preferred is not None or draft.fault or draft.answer == draft.initial_answer:
            return []
        pair = preferred_prompts(f"{self.instruction.id}/preferred", self.instruction.text, draft.answer,
                                 draft.initial_answer)  # fmt: skip
        said, missing = self._look(pair, known)
        if not missing:
            self.preferred = read_verdict(*(said[prompt.id] for prompt in pair))
        return missing

    def row(self, truth: bool) -> Row:
        """The cell as a row of cells.jsonl; what did not come to pass is null. `truth`: the world knows every flaw."""
        draft = self.draft
        found: Row = {
            "id": f"{self.instruction.id}/{self.generator}/{self.critic}", "instruction_id": self.instruction.id,
            "instruction": self.instruction.text, "generator": self.generator, "critic": self.critic,
            "answer": draft.initial_answer, "fault": draft.fault, "fault_in": fault_in(draft), "error": draft.error,
            "principle": None,
            "flaw_seen": None, "broken_before": None, "critique": None, "abstained": None, "meaningful": None,
            "revision": None, "broken_after": None, "preferred": None, "truth": None, "judge": None,
        }  # fmt: skip
        for one in draft.rounds:
            seen = [verdict.answer for verdict in one.judged_before.values()]
            found |= {
                "principle": one.principle.id, "broken_before": one.verdict_before.answer,
                "flaw_seen": None if not seen or set(seen) == {"unparsed"} else "yes" in seen,
                "critique": one.critique or None, "abstained": abstains(one.critique) if one.critique else None,
                "meaningful": one.meaningful.answer if one.meaningful else None,
                "revision": one.revised_answer or None,
                "broken_after": one.verdict_after.answer if one.verdict_after else None,
                "preferred": self.preferred.answer if self.preferred else None,
            }  # fmt: skip
        return found | ({"truth": truth_of(found)} if truth and draft.initial_answer else {})


def fault_in(draft: Draft) -> str:
    """The turn with which a draft ended early: "answer", "critique", "verdict" or "revision"; "" if it did not.

    The revision and what the critic says of its critique are asked for together: an error in either is the revision's.
    """
    if not draft.fault:
        return ""
    spoken = draft.fault in ("too_long", "empty")
    if not draft.rounds:
        return "answer" if spoken or not draft.initial_answer else "verdict"
    one = draft.rounds[-1]
    if one.revised_answer:
        return "revision" if spoken else "verdict"
    if not one.critique:
        return "critique"
    return "critique" if spoken and one.meaningful is None else "revision"


def truth_of(row: Row) -> Row:
    """What the written world says of a cell (nano/truth.py); null where there is nothing to be said."""
    answer, principle, revision = row["answer"], row["principle"], row["revision"]
    known = principle in BREACHES
    broken = known and any(flaw.principle_id == principle for flaw in find_flaws(answer))
    spoke = bool(row["critique"]) and not row["abstained"]
    return {
        "flawed": is_flawed(answer),
        "broken": broken if known else None,
        "right": critique_right(principle, answer, row["critique"]) if known and spoke else None,
        "repaired": repaired(principle, answer, revision) if revision and broken else None,
        "flawed_after": is_flawed(revision or answer),
    }
