"""MT-Bench: 80 questions of two turns, answered by the base and the trained model, graded by a judge.

`generate` needs the target, `mtbench_results.grade` the judge; between the two the target can be freed. With an
`arms.Remembered` each goes on after a kill where it was: nothing is generated or paid for twice. What is compared is
the trained model with its own base, by one and the same judge: a score by another judge than GPT-4 says nothing beside
published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines.base import Completion, Prompt, Sampling
from cai_experiment.evaluation.arms import BothArms
from cai_experiment.evaluation.benchmarks.mtbench_rows import Question

MAX_TOKENS = 1024  # FastChat's gen_model_answer.py, --max-new-token
TEMPERATURES = {  # FastChat's llm_judge/common.py, temperature_config
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7  # of a category that is not there, as in gen_model_answer.py
SHARE_OF_CONTEXT = 4  # two questions, the first answer and the second: a short context leaves each a quarter

Arm = Literal["base", "trained"]
Both = tuple[Completion, Completion]  # of the first turn and of the second


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with both turns' answers of each arm; one that never came has finish "error"."""

    question: Question
    base: Both
    trained: Both

    def texts(self, arm: Arm, turn: int) -> tuple[str, ...] | None:
        """The arm's answers up to turn 1 or 2; None if one of them never came."""
        completions = (self.base if arm == "base" else self.trained)[:turn]
        return None if any(c.finish == "error" for c in completions) else tuple(c.text for c in completions)


def max_tokens_for(context: int) -> int:
    """New tokens a turn: MAX_TOKENS, or a quarter of a context (in tokens) that is shorter than four times that."""
    return min(MAX_TOKENS, context // SHARE_OF_CONTEXT)


def generate(arms: BothArms, questions: Sequence[Question], max_tokens: int = MAX_TOKENS) -> list[Answered]:
    """Both arms' answers to both turns, four passes. The second turn is asked after the arm's own first answer."""
    base = _both_turns(arms, "base", questions, max_tokens)
    trained = _both_turns(arms, "trained", questions, max_tokens)
    return [Answered(*three) for three in zip(questions, base, trained, strict=True)]


def _both_turns(arms: BothArms, arm: Arm, questions: Sequence[Question], max_tokens: int) -> list[Both]:
    speak = arms.base if arm == "base" else arms.trained
    firsts = speak([_prompt(arm, q, (), max_tokens, arms.seed) for q in questions])
    going_on = [(q, first) for q, first in zip(questions, firsts, strict=True) if first.finish != "error"]
    prompts = [_prompt(arm, q, (first.text,), max_tokens, arms.seed) for q, first in going_on]
    seconds = {q.id: second for (q, _), second in zip(going_on, speak(prompts), strict=True)}
    return [(first, seconds.get(q.id) or _unasked(first)) for q, first in zip(questions, firsts, strict=True)]


def _prompt(arm: Arm, question: Question, said: tuple[str, ...], max_tokens: int, seed: int) -> Prompt:
    """The next turn's prompt, after what the arm has `said`. Both arms share the key, so the same random numbers."""
    key = f"mt_bench/{question.id}/{len(said) + 1}"
    turns = [Turn("instruction", question.turns[0])]
    for answer, after in zip(said, question.turns[1:], strict=False):
        turns += [Turn("answer", answer), Turn("instruction", after)]
    temperature = TEMPERATURES.get(question.category, OTHER_TEMPERATURE)
    return Prompt(f"{arm}/{key}", tuple(turns), "answer", Sampling(temperature, max_tokens, seed, key))


def _unasked(first: Completion) -> Completion:
    return Completion(first.id, "", "error", error=f"the first turn was not answered: {first.error}")
