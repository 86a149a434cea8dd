"""How many tokens a generation takes: written, read by an engine that keeps prefixes, read by one that does not.

Lengths of what is written are assumed; those of our own prompts are counted in Qwen2's vocabulary. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from cai_experiment.models.choice import ModelChoice
from cai_experiment.models.presets import NANO_DIR

ANSWER_TOKENS, CRITIQUE_TOKENS = 250, 100  # about half of what the spec allows (500, 300)
NANO_ANSWER_TOKENS, NANO_CRITIQUE_TOKENS = 60, 30  # the shipped model's world is three sentences an answer
DRAWS_PER_PAIR = 2  # the gate passes about half of the drawn instructions
SHORTLIST = 3  # milestones.SHORTLIST, which stands on this floor and must not be imported

# Prompt lengths in Qwen2's tokens, counted over our constitution and examples (tests/test_models.py counts them again).
INSTRUCTION_PROMPT, CRITIQUE_REQUEST, REVISION_REQUEST, WORKED_EXAMPLES = 30, 55, 30, 540
VERDICT_QUESTION = 45  # all of it; of this
VERDICT_OWN = 17  # is the principle, which comes last, and the heading of the reply; the rest is shared:
VERDICT_STEMS = 43  # by all verdicts about one answer, 28 in one order of the options and 15 more in the other
MEANINGFUL = 52  # both orders of the question about a critique, which share 18
KV_BLOCK = 16  # vLLM keeps keys and values in blocks of 16 tokens: half a block is computed anew at each branch
BATCH = 16  # rows of engines.generate, which Unsloth's engine is


@dataclass(frozen=True, slots=True)
class Workload:
    """The size of a generation: pairs made, critique rounds each.

    `weighed`: the principles that the critic weighs before the first critique, 15 when they are targeted, 1 at random.
    `drawn`: the instructions, where it is known how many there are (a file's). `critique`: False in a run that revises
    directly from the principle.
    """

    pairs: int
    rounds: int
    weighed: int = 15
    drawn: int | None = None
    critique: bool = True

    @property
    def rows(self) -> int:
        """Instructions that go through the chain."""
        return self.pairs * DRAWS_PER_PAIR if self.drawn is None else self.drawn


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a generation: `written` by the model; `read` of its `prompts` by an engine that reads none twice.

    `again_spoken` and `again_verdicts` are what an engine without prefix reuse reads beyond that, `again_groups` what
    one reads that reads the stem of verdicts asked at once but once a batch. The instructions that the model writes are
    not counted (some 30 to 100 tokens each, beside 950 of an example).
    """

    written: int
    read: int
    again_spoken: int
    again_verdicts: int
    again_groups: int
    prompts: int

    @classmethod
    def of(cls, choice: ModelChoice, work: Workload) -> Tokens:
        """Count them for `work` with the chosen model; two rounds mean two critiques and two revisions."""
        answer, critique = answer_tokens(choice), NANO_CRITIQUE_TOKENS if _is_nano(choice) else CRITIQUE_TOKENS
        rounds, rows = work.rounds, work.rows
        critiques = rounds if work.critique else 0
        written = answer + critiques * critique + rounds * answer
        weighed = [max(work.weighed - r, 1) for r in range(rounds)]
        finally_ = 2 * (rounds - 1)  # the last answer by each earlier principle, in both orders
        questions = finally_ + sum(w + min(w, SHORTLIST) + 2 for w in weighed)  # 2: better? likewise
        asked = (rounds + 1) * VERDICT_STEMS + questions * VERDICT_OWN + critiques * MEANINGFUL
        verdicts = questions + 2 * critiques
        groups = sum(-(-w // BATCH) + 4 for w in weighed)  # one of 15 lies in two batches of 16
        requests = REVISION_REQUEST + (CRITIQUE_REQUEST if work.critique else VERDICT_OWN)  # which holds the principle
        turns = INSTRUCTION_PROMPT + rounds * requests
        before = (0 if choice.kind == "chat" else WORKED_EXAMPLES) + (written + turns) // 2  # tokens before a prompt
        spoken = 1 + rounds + critiques
        return cls(
            rows * written, rows * (turns + asked), rows * spoken * before,
            rows * (verdicts * (before + VERDICT_QUESTION) - asked), rows * groups * before, rows * (spoken + verdicts),
        )  # fmt: skip

    @property
    def sent(self) -> int:
        """Tokens of all prompts, each whole: what a server is sent, and bills if it caches no prefixes."""
        return self.read + self.again_spoken + self.again_verdicts

    def read_by(self, engine: str) -> int:
        """Prompt tokens that an engine computes; Unsloth's and an ensemble's read a group of verdicts' stem once."""
        if engine == "vllm":
            return self.read + self.prompts * KV_BLOCK // 2
        if engine in ("unsloth", "ensemble"):
            return self.read + self.again_spoken + self.again_groups
        return self.sent if engine == "generate" else self.read


def answer_tokens(choice: ModelChoice) -> int:
    """Tokens of an answer, on average."""
    return NANO_ANSWER_TOKENS if _is_nano(choice) else ANSWER_TOKENS


def _is_nano(choice: ModelChoice) -> bool:
    return choice.path_or_id == str(NANO_DIR)
