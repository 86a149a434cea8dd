"""What --suite harmbench takes: both arms' answers, then the classifier's pass, with hours and dollars (--plan)."""

from __future__ import annotations

import argparse

from cai_experiment.models.disk import downloaded_gb
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.memory import weights_gb
from cai_experiment.models.plan import Part, memory_gb, rows_of, start_hours, tokens_per_second
from cai_experiment.models.presets import ModelChoice, numbers_of
from cai_experiment.scripts._plan_parts import cost_of, in_line

# For the plan. Tokens of the real files in Qwen2's vocabulary, means; what is written is assumed.
BEHAVIORS, ASKED, SAFE, ASKED_SAFE = 400, 100, 100, 17
ANSWER, MARKUP, CLASSIFIER_PROMPT = 400, 20, 330  # the last in Llama-2's vocabulary, reckoned from 285 in Qwen2's


def plan_lines(
    args: argparse.Namespace, choice: ModelChoice, hardware: Hardware, engine: str, quantization: str
) -> tuple[list[Part], list[str]]:
    """(parts, lines): both arms' answers, then the classifier's pass, with hours and dollars."""
    count = BEHAVIORS if args.limit is None else min(BEHAVIORS, 3 * args.limit)
    target = _answering(choice, hardware, engine, quantization, count)
    said = (f"base and trained answer {count} behaviours and {SAFE} safe prompts ({engine}, {quantization}), "
            f"{target.written:,} tokens written: {cost_of(target, args.price_per_hour)}")  # fmt: skip
    if args.judge is not None and args.classifier is None:
        asked = (
            f"a judge, {4 * count:,} calls: about {4 * count * (ASKED + ANSWER + 100):,} tokens read, one written each"
        )
        return [target], [in_line("HarmBench", said), in_line("", asked)]
    judging = _classifying(hardware, count)
    if judging is None:
        return [target], [in_line("HarmBench", said), in_line("", "its classifier takes a GPU: or name a --judge")]
    line = (f"its classifier ({judging.quantization}, {judging.weights_gb:.0f} GB) reads {judging.read:,} tokens: "
            f"{cost_of(judging, args.price_per_hour)}")  # fmt: skip
    return [target, judging], [in_line("HarmBench", said), in_line("", line)]


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
