"""What --suite harmbench takes: both arms' answers, then the classifier's pass, with hours and dollars (--plan)."""

from __future__ import annotations

import argparse

from cai_experiment.models.choice import ModelChoice, numbers_of
from cai_experiment.models.disk import downloaded_gb
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.memory import weights_gb
from cai_experiment.models.plan import Part, memory_gb, rows_of, start_hours, tokens_per_second
from cai_experiment.scripts._judge import is_url
from cai_experiment.scripts._plan_parts import cost_of, in_line
from cai_experiment.scripts._suite_harmbench import JUDGE

# For the plan. Tokens of the real files in Qwen2's vocabulary, means; what is written is assumed.
BEHAVIORS, JUDGED, ASKED, SAFE, ASKED_SAFE = 400, 300, 100, 100, 17
KNOWN, KNOWN_TEXT = 84, 150  # calls by which a judge is tried first, and a comparison's tokens
ANSWER, MARKUP, CLASSIFIER_PROMPT = 400, 20, 330  # the last in Llama-2's vocabulary, reckoned from 285 in Qwen2's


def plan_lines(
    args: argparse.Namespace, choice: ModelChoice, hardware: Hardware, engine: str, quantization: str
) -> tuple[list[Part], list[str]]:
    """(parts, lines): both arms' answers, then the classifier's pass, with hours and dollars."""
    count = BEHAVIORS if args.limit is None else min(BEHAVIORS, 3 * args.limit)
    judged = JUDGED if args.limit is None else min(JUDGED, 2 * args.limit)
    target = _answering(choice, hardware, engine, quantization, count)
    said = (f"base and trained answer {count} behaviours and {SAFE} safe prompts ({engine}, {quantization}), "
            f"{target.written:,} tokens written: {cost_of(target, args.price_per_hour)}")  # fmt: skip
    part, line = _judging(args, hardware, judged)
    return [target, *part], [in_line("HarmBench", said), in_line("", line)]


def _judging(args: argparse.Namespace, hardware: Hardware, count: int) -> tuple[list[Part], str]:
    """Who says whether `count` behaviours are complied with, as `_suite_harmbench.read` will decide it."""
    if is_url(args.classifier):
        read_ = 2 * count * (CLASSIFIER_PROMPT + ASKED + ANSWER)
        return [], f"its classifier's endpoint, {2 * count:,} calls: about {read_:,} tokens read, one written each"
    of_judge = args.classifier is None and args.judge is not None and hardware.kind == "cpu"
    part = None if args.classifier == JUDGE or of_judge else _classifying(hardware, count)
    if part is not None:
        line = f"its classifier ({part.quantization}, {part.weights_gb:.0f} GB) reads {part.read:,} tokens: "
        return [part], line + cost_of(part, args.price_per_hour)
    if args.judge is None and args.classifier != JUDGE:
        return [], "its classifier takes a GPU: or name a --judge"
    calls = 4 * count + KNOWN
    read_ = 4 * count * (ASKED + ANSWER + 100) + KNOWN * KNOWN_TEXT
    return [], f"a judge, {calls:,} calls: about {read_:,} tokens read, one written each"


def _answering(choice: ModelChoice, hardware: Hardware, engine: str, quantization: str, count: int) -> Part:
    numbers = numbers_of(choice)
    written = 2 * (count + SAFE) * ANSWER
    read_ = 2 * (count * (ASKED + MARKUP) + SAFE * (ASKED_SAFE + MARKUP))
    rows = min(rows_of(engine, numbers, hardware, quantization), count + SAFE)
    speeds = tokens_per_second(numbers, hardware, rows, quantization, engine)
    hours = None if speeds is None else (written / speeds[0] + read_ / speeds[1]) / 3600
    return Part(engine, quantization, 0.0, 0.0, memory_gb(numbers, hardware, ""), rows, written, read_, hours)


def _classifying(hardware: Hardware, count: int) -> Part | None:
    """The official classifier's pass: a download, a start, and reading; None where it does not fit."""
    from cai_experiment.errors import EngineError
    from cai_experiment.evaluation.benchmarks.harmbench_classifier import CLASSIFIER
    from cai_experiment.evaluation.benchmarks.harmbench_load import NUMBERS, fitting

    try:
        chosen = fitting(CLASSIFIER, NUMBERS, hardware)
    except EngineError:
        return None
    read_, written = 2 * count * (CLASSIFIER_PROMPT + ASKED + ANSWER), 2 * count
    weights = weights_gb(NUMBERS, chosen.quantization)
    missing = max(0.0, weights_gb(NUMBERS, "bf16") - downloaded_gb(CLASSIFIER))
    speeds = tokens_per_second(NUMBERS, hardware, chosen.slots, chosen.quantization, "hf")
    hours = (
        None if speeds is None else start_hours(hardware, missing) + (written / speeds[0] + read_ / speeds[1]) / 3600
    )
    have = memory_gb(NUMBERS, hardware, "")
    return Part("hf", chosen.quantization, weights, weights, have, chosen.slots, written, read_, hours)
