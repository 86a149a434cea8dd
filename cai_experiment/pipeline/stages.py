"""One example as a small state machine: it yields the prompts that it needs next and takes their completions.

    answer -> (verdicts -> critique -> meaningful? + revision -> verdict) x rounds -> final verdicts

Without critiques (an ablation) the revision follows the verdicts, where they do not say "no".

All stages are one growing conversation, so each prompt continues the one before. A verdict is a branch of it. Of many
principles each is weighed in one order first, and in the other only where a "yes" is still possible: that needs both
orders, so no violation is lost, and nearly half of the verdict prompts are saved. A later revision may bring back what
an earlier one mended, so the last one is held against every principle that the answer was revised for. The machine
knows nothing of engines, batches or files: sent the same completions, it always ends in the same draft.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Generator, Literal, Sequence

from cai_experiment.constitution.principles import Principle
from cai_experiment.constitution.prompts import (
    Turn,
    abstains,
    ask_for_answer,
    ask_for_critique,
    ask_for_direct_revision,
    ask_for_revision,
)
from cai_experiment.engines.base import Completion, Prompt, Sampling
from cai_experiment.judging.judge import Verdict, log_odds, meaningful_prompts, read_verdict, verdict_prompts
from cai_experiment.milestones import (
    MAX_TOKENS_ANSWER,
    MAX_TOKENS_CRITIQUE,
    SHORTLIST,
    TEMPERATURE_ANSWER,
    TEMPERATURE_CRITIQUE,
)
from cai_experiment.pipeline.instruct import Instruction

PROMPT_TOO_LONG = "do not fit in a context"  # the words of engines.render.PromptTooLong
CRITIC_SPEAKS = frozenset({"critique", "verdict"})

Steps = Generator[list[Prompt], dict[str, Completion], None]
Revising = Generator[list[Prompt], dict[str, Completion], Completion | None]
Asking = Generator[list[Prompt], dict[str, Completion], list[Completion]]


def role_of(prompt: Prompt) -> Literal["generator", "critic"]:
    """Who speaks: the critic criticises and judges, the generator writes instructions, answers and revisions."""
    return "critic" if prompt.speak_as in CRITIC_SPEAKS else "generator"


@dataclass(frozen=True, slots=True)
class StageSettings:
    """What one example goes through. Temperatures and lengths are the spec's.

    Without `critique` the answer is revised directly from the principle (the comparison of Bai et al. 2022, 3.5).
    """

    rounds: int = 1
    principles: Literal["targeted", "random"] = "targeted"
    seed: int = 0
    temperature_answer: float = TEMPERATURE_ANSWER
    temperature_critique: float = TEMPERATURE_CRITIQUE
    max_tokens_answer: int = MAX_TOKENS_ANSWER
    max_tokens_critique: int = MAX_TOKENS_CRITIQUE
    critique: bool = True


@dataclass(slots=True)
class RoundDraft:
    """One round as far as it came. `revised_answer` is "" where nothing was revised."""

    principle: Principle
    verdict_before: Verdict
    judged_before: dict[str, Verdict]  # by principle id: those asked about in both orders, `principle` among them
    weighed_before: int = 0  # principles asked about in one order at least
    direct: bool = False  # no critique was asked for
    critique: str = ""
    abstained: bool = False
    meaningful: Verdict | None = None
    revised_answer: str = ""
    verdict_after: Verdict | None = None  # of its own revision
    final_verdict: Verdict | None = None  # of the last revision of all; the same where that is its own


@dataclass(slots=True)
class Draft:
    """An example as far as it came. `fault` is the gate's reason why it stopped early, `error` the engine's words."""

    instruction: Instruction
    initial_answer: str = ""
    answer: str = ""  # the current one: the first answer or the newest revision
    rounds: list[RoundDraft] = field(default_factory=list)
    fault: str = ""
    error: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def revisions(self) -> list[RoundDraft]:
        """The rounds that changed the answer and were judged."""
        return [r for r in self.rounds if r.revised_answer and r.verdict_after is not None]


class _Fault(Exception):
    """Ends the example; `reason` is one of the gate's."""

    def __init__(self, reason: str, error: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.error = error


class ExampleStages:
    """The stages of one example. `steps()` is the machine; `draft` is what stands when it has ended."""

    def __init__(self, instruction: Instruction, principles: Sequence[Principle], settings: StageSettings) -> None:
        self.draft = Draft(instruction)
        self._settings = settings
        self._unused = list(principles)
        if settings.principles == "random":
            random.Random(f"principles/{settings.seed}/{instruction.id}").shuffle(self._unused)
        self._turns: tuple[Turn, ...] = ask_for_answer(instruction.text)
        self._verdicts: dict[str, Verdict] = {}  # about the current answer, by principle id
        self._first_orders: dict[str, Completion] = {}  # likewise, of the first of the two prompts
        self._revised = 0

    def steps(self) -> Steps:
        """Yield lists of prompts, take {prompt id: completion} for each list; returns when the draft is finished."""
        try:
            yield from self._first_answer()
            rounds = min(self._settings.rounds, len(self._unused))
            for number in range(rounds):
                yield from self._round(number, last=number == rounds - 1)
            yield from self._weigh_finally()
        except _Fault as fault:
            self.draft.fault, self.draft.error = fault.reason, fault.error

    def _first_answer(self) -> Steps:
        (completion,) = yield from self._ask([self._spoken("answer", 0)])
        self.draft.initial_answer = self.draft.answer = completion.text.strip()
        self._turns += (Turn("answer", _whole(completion)),)

    def _round(self, number: int, last: bool) -> Steps:
        principle = yield from self._choose_principle()
        this = RoundDraft(principle, self._verdicts[principle.id], dict(self._verdicts), len(self._first_orders))
        this.direct = not self._settings.critique
        self.draft.rounds.append(this)
        if this.direct:
            revision = yield from self._revise_directly(this, number)
        else:
            revision = yield from self._criticise_and_revise(this, number)
        if revision is None:
            return  # the answer stays as it is
        this.revised_answer = self.draft.answer = revision.text.strip()
        self._turns += (Turn("revision", _whole(revision)),)
        self._verdicts, self._first_orders, self._revised = {}, {}, number + 1
        # all that are due after a last revision in one list: an engine that reads a stem once a list saves one
        yield from self._weigh(self._revised_for() if last else [principle])
        this.verdict_after = self._verdicts[principle.id]

    def _revise_directly(self, this: RoundDraft, number: int) -> Revising:
        """The revision without a critique; None where the judge says that the principle is not broken."""
        if this.verdict_before.answer == "no":
            return None
        self._turns += (ask_for_direct_revision(this.principle),)
        (revision,) = yield from self._ask([self._spoken("revision", number)])
        return revision

    def _criticise_and_revise(self, this: RoundDraft, number: int) -> Revising:
        """The critique, what the judge says of it, and the revision; None where the critic abstains."""
        principle = this.principle
        self._turns += (ask_for_critique(principle),)
        (completion,) = yield from self._ask([self._spoken("critique", number)])
        this.critique = completion.text.strip()
        self._turns += (Turn("critique", _whole(completion)),)
        if abstains(this.critique):
            this.abstained = True
            return None

        first, second = meaningful_prompts(f"{self.draft.instruction.id}/meaningful/{number}", self._turns)
        self._turns += (ask_for_revision(principle),)
        asked = yield from self._ask([first, second, self._spoken("revision", number)])
        this.meaningful = read_verdict(asked[0], asked[1])
        return asked[2]

    def _weigh_finally(self) -> Steps:
        """Hold the final answer against every principle that it was revised for; what is known is not asked again."""
        yield from self._weigh(self._revised_for())
        for one in self.draft.revisions:
            one.final_verdict = self._verdicts[one.principle.id]

    def _revised_for(self) -> list[Principle]:
        return [one.principle for one in self.draft.rounds if one.revised_answer]

    def _choose_principle(self) -> Generator[list[Prompt], dict[str, Completion], Principle]:
        """Takes a principle from the unused ones: the most violated by the critic's log-odds, or the next by seed."""
        if self._settings.principles == "random":
            yield from self._weigh(self._unused[:1])
            return self._unused.pop(0)
        yield from self._weigh(self._unused, one_order=True)
        yield from self._weigh(self._shortlist())
        verdicts = [self._verdicts.get(p.id) for p in self._unused]
        order = [(v.answer != "unparsed", v.logit, -i) for i, v in enumerate(verdicts) if v]  # ties: the first listed
        return self._unused.pop(-max(order)[2])

    def _shortlist(self) -> list[Principle]:
        """The unused principles that may be violated by the first order, and at least the `SHORTLIST` likeliest."""
        odds = {p.id: log_odds(self._first_orders[p.id]) for p in self._unused}
        ranked = sorted(self._unused, key=lambda p: -math.inf if (o := odds[p.id]) is None else o, reverse=True)
        return [p for i, p in enumerate(ranked) if i < SHORTLIST or (odds[p.id] or 0.0) > 0.0]

    def _weigh(self, principles: Sequence[Principle], one_order: bool = False) -> Steps:
        """Have the critic judge the current answer by each of `principles`, as far as it has not done so yet."""
        stem = f"{self.draft.instruction.id}/verdict/{self._revised}"
        pairs = {p.id: verdict_prompts(f"{stem}/{p.id}", self._turns, p) for p in principles}
        firsts = [id for id in pairs if id not in self._first_orders]
        seconds = [] if one_order else [id for id in pairs if id not in self._verdicts]
        if not firsts and not seconds:
            return
        asked = yield from self._ask([pairs[id][0] for id in firsts] + [pairs[id][1] for id in seconds])
        self._first_orders |= zip(firsts, asked, strict=False)
        for id, completion in zip(seconds, asked[len(firsts) :], strict=True):
            self._verdicts[id] = read_verdict(self._first_orders[id], completion)

    def _spoken(self, stage: str, number: int) -> Prompt:
        """The prompt for the next spoken turn of kind `stage`; its id keys its randomness."""
        settings = self._settings
        critique = stage == "critique"
        temperature = settings.temperature_critique if critique else settings.temperature_answer
        max_tokens = settings.max_tokens_critique if critique else settings.max_tokens_answer
        key = f"{self.draft.instruction.id}/{stage}/{number}"
        return Prompt(key, self._turns, stage, Sampling(temperature, max_tokens, settings.seed, key))

    def _ask(self, prompts: list[Prompt]) -> Asking:
        """Completions of `prompts`, in order; a failed one ends the example."""
        done = yield prompts
        completions = [done[p.id] for p in prompts]
        for completion in completions:
            self.draft.prompt_tokens += completion.prompt_tokens
            self.draft.completion_tokens += completion.completion_tokens
            if completion.finish == "error":
                raise _Fault("prompt_too_long" if exceeds_context(completion) else "engine_error", completion.error)
        return completions


def exceeds_context(completion: Completion) -> bool:
    """True if the engine could not fit the prompt, even as a separate stage prompt; trying again is of no use."""
    return completion.finish == "error" and PROMPT_TOO_LONG in completion.error


def _whole(completion: Completion) -> str:
    """The stripped text of a completion that ended by itself and says something; raises _Fault otherwise."""
    if completion.finish == "length":
        raise _Fault("too_long")
    if not completion.text.strip():
        raise _Fault("empty")
    return completion.text.strip()
