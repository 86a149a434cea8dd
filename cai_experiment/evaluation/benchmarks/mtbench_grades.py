"""MT-Bench's judge: one grade for each answer, `[[n]]`, and both arms compared in both orders, `[[A]]`, `[[B]]` or
`[[C]]` for a tie.

Prompts, fields and formats are FastChat's (llm_judge/common.py). Three things differ, so that nothing is mistaken for a
grade: of several verdicts the last counts, since the prompt wants it after the explanation (FastChat takes the first);
a grade in single brackets counts where it stands as a rating, not in `list[1]` or `see [2]`; what lies outside 1 to 10
is a failure. The system's words stand before the question in the same turn, as FastChat itself does it for a judge
without a system message (run_judge_pair, Claude): not every chat template takes one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines.base import Completion, Engine, Prompt, Sampling
from cai_experiment.engines.render import PromptTooLong, Renderer
from cai_experiment.evaluation.benchmarks.mtbench_rows import TURNS, JudgePrompts, Kind, prompt_name
from cai_experiment.evaluation.mtbench import Answered, Arm
from cai_experiment.observe.progress import Progress

MAX_TOKENS = 2048  # FastChat's, at temperature 0
LEAST_TOKENS = 512  # where a judge's context leaves no more; under that a judgement would seldom come to its grade
JUDGE_CONTEXT = 8192  # tokens: the longest comparison of answers of 1,024 tokens and its judgement are 7,902 of Qwen2's
LOWEST, HIGHEST = 1.0, 10.0
PLAIN_SYSTEM = "You are a helpful assistant."  # says nothing: left out, as FastChat does

_NUMBER = r"(\d+(?:\.\d+)?)(?:\s*/\s*10)?"
_GRADES = (  # the first that stands in a judgement: as asked for; single brackets after the word, or alone on a line
    re.compile(rf"\[\[\s*{_NUMBER}\s*\]\]"),
    re.compile(rf"\b(?:rating|score|grade)\b[^\n\[\]]{{0,30}}(?<!\w)\[{_NUMBER}\](?!\])", re.IGNORECASE),
    re.compile(rf"^[^\w\n\[]*\[{_NUMBER}\][^\w\n]*$", re.MULTILINE),
)
_VERDICT = re.compile(r"\[\[([ABC])\]\]")

Winner = Literal["trained", "base", "tie", "undecided", "unparsed"]


class TextJudge(Protocol):
    """What is needed of `judging.judge.Judge`: an engine that writes, and what it is called."""

    @property
    def engine(self) -> Engine: ...
    @property
    def name(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Grade:
    """One judgement of one answer. `value` is None if it was not to be had; `text` is the judgement, or why not.

    `spoken` is False if the judge said nothing at all.
    """

    value: float | None
    text: str
    spoken: bool = True


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both arms side by side; "undecided" if the orders disagree. `texts`: the judgements, base as A and then as B."""

    winner: Winner
    texts: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Graded:
    """One turn of one question, graded."""

    answered: Answered
    turn: int
    base: Grade
    trained: Grade
    comparison: Comparison

    @property
    def change(self) -> float | None:
        """The trained model's grade less the base's; None if either is missing."""
        return None if self.base.value is None or self.trained.value is None else self.trained.value - self.base.value


def judge_answers(
    answered: Sequence[Answered], prompts: JudgePrompts, judge: TextJudge, verbosity: int = 1
) -> list[Graded]:
    """Every turn of every question graded, in their order. Equal prompts (equal answers) are asked once."""
    asked = _Asked(prompts, judge.engine)
    for one in answered:
        for turn in range(1, TURNS + 1):
            for text in (*_singles(asked, one, turn), *_pairs(asked, one, turn)):
                asked.ask(text)
    asked.collect(Progress(len(asked.prompts), "judgements", verbosity))
    return [_graded(asked, one, turn) for one in answered for turn in range(1, TURNS + 1)]


def grade_firsts(
    answered: Sequence[Answered], prompts: JudgePrompts, judge: TextJudge, verbosity: int = 1
) -> list[tuple[Grade, Grade]]:
    """The grades of the base's and of the trained model's first turn, and nothing else."""
    asked = _Asked(prompts, judge.engine)
    texts = [_singles(asked, one, 1) for one in answered]
    for both in texts:
        for text in both:
            asked.ask(text)
    asked.collect(Progress(len(asked.prompts), "judgements of known answers", verbosity))
    return [(_grade(asked, base), _grade(asked, trained)) for base, trained in texts]


def ungraded(answered: Sequence[Answered], why: str) -> list[Graded]:
    """Every turn as if the judge had been silent."""
    grade, comparison = Grade(None, why, False), Comparison("unparsed", (why, why))
    return [Graded(one, turn, grade, grade, comparison) for one in answered for turn in range(1, TURNS + 1)]


# ---------------------------------------------------------------- what is asked


class _Asked:
    """The judge's prompts by their text, and what it said to each, by id."""

    def __init__(self, prompts: JudgePrompts, engine: Engine) -> None:
        self.by_name, self.engine, self.renderer = prompts.by_name, engine, renderer_of(engine)
        self.prompts: dict[str, Prompt] = {}
        self.said: dict[str, Completion] = {}

    def fill(self, kind: Kind, one: Answered, turn: int, answers: dict[str, tuple[str, ...]]) -> str:
        """The text of a prompt; `answers` by the name of their field ("answer", "answer_a").

        One str.format with the texts as arguments: braces in them stay as they are.
        """
        prompt = self.by_name[prompt_name(kind, one.question.reference is not None, turn)]
        texts = {"question": one.question.turns, **answers}
        fields = {name if turn == 1 else f"{name}_{i + 1}": texts[name][i] for name in texts for i in range(turn)}
        fields |= {f"ref_answer_{i + 1}": text for i, text in enumerate(one.question.reference or ())}
        shown = prompt.template.format(**fields)
        return shown if prompt.system == PLAIN_SYSTEM else f"[Instruction]\n{prompt.system.strip()}\n\n{shown}"

    def ask(self, text: str | None) -> None:
        """Have a prompt asked; None is what cannot be asked, since an answer is missing."""
        if text is not None and text not in self.prompts:
            id = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
            turns = (Turn("instruction", text),)
            sampling = Sampling(0.0, tokens_for(self.renderer, turns))
            self.prompts[text] = Prompt(f"mt_bench/judge/{id}", turns, "answer", sampling)

    def collect(self, progress: Progress) -> None:
        """Ask them all."""
        with progress:
            for completion in self.engine.stream(list(self.prompts.values())):
                self.said[completion.id] = completion
                progress.update(progress.done + 1, progress.tokens + completion.completion_tokens)

    def reply(self, text: str | None) -> tuple[str | None, str]:
        """(what the judge concluded, or None where it failed; its words, or why there are none)."""
        if text is None:
            return None, "not asked: an answer is missing"
        completion = self.said.get(self.prompts[text].id)
        if completion is None or completion.finish == "error":
            return None, f"the judge did not answer: {completion.error if completion else 'nothing came back'}"
        return completion.text, completion.text


def renderer_of(engine: Any) -> Renderer | None:
    """The renderer of an engine, or of the one that it wraps; None of a server that is sent texts."""
    found = getattr(engine, "renderer", None)
    return found if found is not None else getattr(getattr(engine, "engine", None), "renderer", None)


def tokens_for(renderer: Renderer | None, turns: Sequence[Turn]) -> int:
    """New tokens for a judgement: MAX_TOKENS, or what the judge's context leaves beside the prompt.

    Under LEAST_TOKENS (a quarter of a context shorter than four times that) it is MAX_TOKENS all the same, so that
    the judgement fails and says why.
    """
    if renderer is None:
        return MAX_TOKENS
    try:
        left = renderer.max_length - len(renderer.prompt_ids(turns, "answer", 0))
    except PromptTooLong:
        return MAX_TOKENS
    return min(MAX_TOKENS, left) if left >= min(LEAST_TOKENS, renderer.max_length // 4) else MAX_TOKENS


def _singles(asked: _Asked, one: Answered, turn: int) -> list[str | None]:
    """The prompts that grade the base's answer and the trained model's."""
    arms: tuple[Arm, ...] = ("base", "trained")
    said = [one.texts(arm, turn) for arm in arms]
    return [None if texts is None else asked.fill("single", one, turn, {"answer": texts}) for texts in said]


def _pairs(asked: _Asked, one: Answered, turn: int) -> list[str | None]:
    """The prompts that compare them, base as A first; none for equal answers, which are a tie."""
    base, trained = one.texts("base", turn), one.texts("trained", turn)
    if base is None or trained is None or base == trained:
        return [None, None]
    orders = ((base, trained), (trained, base))
    return [asked.fill("pair", one, turn, {"answer_a": a, "answer_b": b}) for a, b in orders]


# ---------------------------------------------------------------- what comes back


def _graded(asked: _Asked, one: Answered, turn: int) -> Graded:
    base, trained = (_grade(asked, text) for text in _singles(asked, one, turn))
    return Graded(one, turn, base, trained, _compare(asked, one, turn))


def _grade(asked: _Asked, text: str | None) -> Grade:
    spoken, words = asked.reply(text)
    return Grade(None, words, False) if spoken is None else Grade(read_grade(spoken), words)


def _compare(asked: _Asked, one: Answered, turn: int) -> Comparison:
    base = one.texts("base", turn)
    if base is not None and base == one.texts("trained", turn):
        return Comparison("tie", ("equal answers: not asked",) * 2)
    (first, first_words), (second, second_words) = (asked.reply(text) for text in _pairs(asked, one, turn))
    letters = tuple(None if spoken is None else read_letter(spoken) for spoken in (first, second))
    return Comparison(winner_of(*letters), (first_words, second_words))


def read_grade(judgement: str) -> float | None:
    """The last `[[n]]` of a judgement, else the last rating in single brackets; None if it is not from 1 to 10."""
    text = _conclusion(judgement)
    found = next((numbers for pattern in _GRADES if (numbers := pattern.findall(text))), None)
    return float(found[-1]) if found and LOWEST <= float(found[-1]) <= HIGHEST else None


def read_letter(judgement: str) -> str | None:
    """The last of `[[A]]`, `[[B]]` and `[[C]]` in a judgement, or None."""
    found = _VERDICT.findall(_conclusion(judgement))
    return found[-1] if found else None


def _conclusion(judgement: str) -> str:
    """What follows a reasoning model's thoughts; nothing if it was cut off in the middle of them."""
    _, mark, rest = judgement.rpartition("</think>")
    return rest if mark or "<think>" not in judgement else ""


def winner_of(first: str | None, second: str | None) -> Winner:
    """What both orders say together: `first` is the letter with the base as A, `second` with the base as B."""
    if first is None or second is None:
        return "unparsed"
    one = {"A": "base", "B": "trained", "C": "tie"}[first]
    other = {"A": "trained", "B": "base", "C": "tie"}[second]
    return one if one == other else "undecided"  # type: ignore[return-value]
