"""eval_model.py --suite mtbench: its files, both arms' answers, the judge's grades, and what it takes (--plan)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.models.choice import ModelChoice, numbers_of
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.plan import Part, memory_gb, rows_of, tokens_per_second
from cai_experiment.scripts._plan_parts import cost_of, in_line

if TYPE_CHECKING:
    from cai_experiment.evaluation.benchmarks.mtbench_grades import TextJudge
    from cai_experiment.evaluation.benchmarks.mtbench_rows import JudgePrompts, Question
    from cai_experiment.evaluation.found import Evaluation
    from cai_experiment.evaluation.mtbench import Answered

GATED = "full"  # the milestone that asks for it

# For the plan. Tokens of the real files in Qwen2's vocabulary, means; what is written is assumed.
QUESTIONS, FIRST, SECOND, REFERENCE, WITH_REFERENCE = 80, 68, 23, 209, 30
JUDGE_PROMPT = {("single", 1): 152, ("single", 2): 204, ("pair", 1): 240, ("pair", 2): 337}
ANSWER, JUDGEMENT, MARKUP = 400, 250, 20
KNOWN, KNOWN_TEXT = 84, 40  # known answers, graded first; a question with its answer


def add_flags(parser: argparse.ArgumentParser) -> None:
    """MT-Bench's own flags; --judge is eval_model.py's."""
    group = parser.add_argument_group("MT-Bench (default: FastChat's files, fetched at a pinned revision)")
    group.add_argument("--questions", type=Path, metavar="FILE", help="questions of two turns (.jsonl)")
    group.add_argument("--references", type=Path, metavar="FILE", help="reference answers (.jsonl)")
    group.add_argument("--judge-prompts", type=Path, metavar="FILE", help="the judge's prompts (.jsonl)")


def read(args: argparse.Namespace) -> tuple[list[Question], JudgePrompts]:
    """The questions with their reference answers, and the judge's prompts: the user's files, or fetched ones.

    Raises BadInputError (a file that is wrong) and EngineError (no network).
    """
    from cai_experiment.evaluation.benchmarks import mtbench_rows as rows
    from cai_experiment.evaluation.benchmarks.fetch import fetch

    questions = args.questions or fetch(rows.QUESTIONS)
    references = args.references or fetch(rows.REFERENCES)
    prompts = args.judge_prompts or fetch(rows.JUDGE_PROMPTS)
    return rows.read_questions(questions, references), rows.read_judge_prompts(prompts)


def run(args: argparse.Namespace, wanted: tuple[list[Question], JudgePrompts], target: Any, folder: Path) -> Evaluation:
    """Both arms' answers, then the judge's grades. `target` is a `_target.Target`, whose judge remembers what it said;
    `folder` is the run's.
    """
    from cai_experiment.evaluation.benchmarks.mtbench_grades import JUDGE_CONTEXT

    questions, prompts = wanted
    answered = answer(args, questions, target)
    return grade(args, answered, prompts, target.judge(JUDGE_CONTEXT))


def answer(args: argparse.Namespace, questions: list[Question], target: Any) -> list[Answered]:
    """The first step: both arms' answers; after it the target may be freed."""
    from cai_experiment.evaluation.arms import BothArms
    from cai_experiment.evaluation.benchmarks.mtbench_rows import TURNS
    from cai_experiment.evaluation.mtbench import generate, max_tokens_for
    from cai_experiment.observe.progress import Progress

    speakers = target.speakers()
    with Progress(2 * TURNS * len(questions), "MT-Bench answers", args.verbosity) as progress:
        arms = BothArms(speakers.bare(), speakers.model, args.seed, progress, target.remembered())
        return generate(arms, questions, max_tokens_for(speakers.renderer.max_length))


def grade(args: argparse.Namespace, answered: list[Answered], prompts: JudgePrompts, judge: TextJudge) -> Evaluation:
    """The second step: the judge's grades. Load a judge with `max_length=JUDGE_CONTEXT`."""
    from cai_experiment.evaluation.benchmarks.mtbench_grades import JUDGE_CONTEXT, renderer_of
    from cai_experiment.evaluation.benchmarks.mtbench_results import grade as grade_answers

    found = grade_answers(answered, prompts, judge, args.seed, args.milestone == GATED, args.verbosity)
    renderer = renderer_of(judge.engine)
    if renderer is not None and renderer.max_length < JUDGE_CONTEXT and not found.alarms:
        found.notes.append(
            f"MT-Bench: {judge.name} reads {renderer.max_length:,} tokens, and a comparison takes up to "
            f"{JUDGE_CONTEXT:,}: what left it too little room to write was not graded"
        )
    return found


# ---------------------------------------------------------------- what it takes


def plan_lines(
    args: argparse.Namespace, choice: ModelChoice, hardware: Hardware, engine: str, quantization: str
) -> tuple[list[Part], list[str]]:
    """(part, lines): the target's answers with hours and dollars, the judge's reading and writing in tokens."""
    part = answering(choice, hardware, engine, quantization)
    calls, read_, written = judging()
    said = f"base and trained answer {QUESTIONS} questions of two turns ({engine}, {quantization}), "
    said += f"{part.written:,} tokens written: {cost_of(part, args.price_per_hour)}"
    judge = f"a judge, {calls} calls at most: about {read_:,} tokens read, {written:,} written"
    return [part], [in_line("MT-Bench", said), in_line("", judge)]


def answering(choice: ModelChoice, hardware: Hardware, engine: str, quantization: str) -> Part:
    """The target's part: two arms, two turns; the second reads the first."""
    numbers = numbers_of(choice)
    written = 2 * 2 * QUESTIONS * ANSWER
    read_ = 2 * QUESTIONS * (2 * (FIRST + MARKUP) + ANSWER + SECOND + MARKUP)
    rows = min(rows_of(engine, numbers, hardware, quantization), QUESTIONS)
    speeds = tokens_per_second(numbers, hardware, rows, quantization, engine)
    hours = None if speeds is None else (written / speeds[0] + read_ / speeds[1]) / 3600
    return Part(engine, quantization, 0.0, 0.0, memory_gb(numbers, hardware, ""), rows, written, read_, hours)


def judging() -> tuple[int, int, int]:
    """(calls, tokens read, tokens written) of a judge, if no two answers are equal."""
    read_ = 0
    for (kind, turn), prompt in JUDGE_PROMPT.items():
        sides = 1 if kind == "single" else 2
        question = FIRST if turn == 1 else sides * (FIRST + SECOND)
        shown = prompt + question + sides * turn * ANSWER
        read_ += 2 * (QUESTIONS * shown + WITH_REFERENCE * turn * REFERENCE)
    read_ += KNOWN * (JUDGE_PROMPT["single", 1] + KNOWN_TEXT)
    calls = 2 * QUESTIONS * len(JUDGE_PROMPT) + KNOWN
    return calls, read_, calls * JUDGEMENT
