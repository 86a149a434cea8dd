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
from typing import Literal, Protocol

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines.base import Completion, Engine, Prompt, Sampling
from cai_experiment.evaluation.arms import Remembered
from cai_experiment.evaluation.benchmarks.mtbench_rows import TURNS, JudgePrompts, Kind, prompt_name
from cai_experiment.evaluation.mtbench import Answered, Arm
from cai_experiment.observe.progress import Progress

MAX_TOKENS = 2048  # FastChat's, at temperature 0
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
    answered: Sequence[Answered], prompts: JudgePrompts, judge: TextJudge, remembered: Remembered | None = None,
    verbosity: int = 1,
) -> list[Graded]:  # fmt: skip
    """Every turn of every question graded, in their order. Equal prompts (equal answers) are asked once.

    `remembered` holds earlier judgements of this judge: one that is paid for is not asked twice after a kill.
    """
    asked = _Asked(prompts)
    for one in answered:
        for turn in range(1, TURNS + 1):
            for text in (*_singles(asked, one, turn), *_pairs(asked, one, turn)):
                asked.ask(text)
    with Progress(len(asked.prompts), "judgements", verbosity) as progress:
        asked.collect(judge.engine, remembered, progress)
    return [_graded(asked, one, turn) for one in answered for turn in range(1, TURNS + 1)]


# ---------------------------------------------------------------- what is asked


class _Asked:
    """The judge's prompts by their text, and what it said to each, by id."""

    def __init__(self, prompts: JudgePrompts) -> None:
        self.by_name = prompts.by_name
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
            self.prompts[text] = Prompt(f"mt_bench/judge/{id}", turns, "answer", Sampling(0.0, MAX_TOKENS))

    def collect(self, engine: Engine, remembered: Remembered | None, progress: Progress) -> None:
        """Ask what is not remembered."""
        keys = {p.id: remembered.key("judge", p) for p in self.prompts.values()} if remembered is not None else {}
        if remembered is not None:
            self.said = {id: remembered.found[key] for id, key in keys.items() if key in remembered.found}
            progress.update(len(self.said))
        for completion in engine.stream([p for p in self.prompts.values() if p.id not in self.said]):
            self.said[completion.id] = completion
            if remembered is not None:
                remembered.keep(keys[completion.id], completion)
            progress.update(progress.done + 1, progress.tokens + completion.completion_tokens)

    def reply(self, text: str | None) -> tuple[str | None, str]:
        """(what the judge concluded, or None where it failed; its words, or why there are none)."""
        if text is None:
            return None, "not asked: an answer is missing"
        completion = self.said.get(self.prompts[text].id)
        if completion is None or completion.finish == "error":
            return None, f"the judge did not answer: {completion.error if completion else 'nothing came back'}"
        return completion.text, completion.text


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
