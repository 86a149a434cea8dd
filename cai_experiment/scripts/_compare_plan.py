"""What compare_models.py --plan prints: engine, memory, starts, tokens and hours of every model; nothing is loaded."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from cai_experiment.evaluation.harm.labelled import shipped_sets
from cai_experiment.evaluation.harm_model import QUESTIONS_A_TEXT
from cai_experiment.milestones import SHORTLIST
from cai_experiment.models.choice import ModelChoice, numbers_of
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.memory import GB, kv_bytes_per_token, weights_gb
from cai_experiment.models.plan import Part, in_words, memory_gb, rows_of, start_hours, tokens_per_second
from cai_experiment.models.recommend import recommend
from cai_experiment.models.serving import LIVE_ROW_TOKENS, auto_engine
from cai_experiment.pipeline.stages import StageSettings
from cai_experiment.scripts._compare_wanted import Wanted, hardware_of
from cai_experiment.scripts._plan_parts import cost_of, download_gb_of, in_block, in_line

# Tokens read, assumed, every prompt from its beginning: of a verdict in a conversation, of one on a labelled text,
# and of a spoken turn. A prefix that is kept is not read again, so this is the upper end.
VERDICT, OF_A_TEXT, TURN = 600, 200, 700
OF_A_CELL = 6  # verdicts beside the choice of a principle: meaningful, after, preferred, each in two orders


def plan(args: argparse.Namespace, wanted: Wanted) -> list[str]:
    """Memory and hours; raises as `numbers_of`, before anything is loaded."""
    hardware, stages = hardware_of(args), StageSettings()
    count, models = len(wanted.instructions), len(wanted.names)
    written = count * (stages.max_tokens_answer * (1 + models) + stages.max_tokens_critique * models)
    verdicts = count * models * (len(wanted.constitution.principles) + SHORTLIST + OF_A_CELL)
    texts = sum(map(len, shipped_sets().values()))
    read = verdicts * VERDICT + texts * QUESTIONS_A_TEXT * OF_A_TEXT + count * (1 + 2 * models) * TURN
    loads = 1 if models == 1 else 3
    lines = [in_line("work", f"{count} instructions, {models * models} cells of generator and critic"), *in_block("", [
        f"each model writes at most {written:,} tokens, reads about {read:,}, and is started {loads} "
        f"time{'s' if loads > 1 else ''} at most;",
        f"about {verdicts:,} verdicts in the cells and {QUESTIONS_A_TEXT * texts:,} in detection ({texts} texts)",
    ])]  # fmt: skip
    parts = [_part(args, choice, hardware, written, read, loads) for choice in wanted.choices.values()]
    for label, part in zip(wanted.names, parts, strict=True):
        lines.append(in_line("model", f"{label}: {_words(args, part, hardware)}"))
    if args.judge is not None:
        cells = count * models * models
        lines.append(in_line("judge", f"{args.judge}: at most {6 * cells:,} verdicts on top, not in the hours below"))
    if not all(part.fits for part in parts):
        return [*lines, in_line("time", "none: a model does not fit")]
    hours = None if any(part.hours is None for part in parts) else sum(part.hours or 0.0 for part in parts)
    words = in_words(hours, (hours or 0.0) * args.price_per_hour)
    return [*lines, in_line("time", f"{words}, with starts and downloads; by arithmetic, at the upper end")]


def _part(
    args: argparse.Namespace, choice: ModelChoice, hardware: Hardware, written: int, read: int, loads: int
) -> Part:
    """One model in the engine that it will be loaded with."""
    engine, quantization = _engine(args, choice, hardware)
    numbers = numbers_of(choice)
    weights = weights_gb(numbers, quantization)
    least = weights + LIVE_ROW_TOKENS * kv_bytes_per_token(numbers, quantization) / GB
    rows = args.batch_size or rows_of(engine, numbers, hardware, quantization)
    speeds = tokens_per_second(numbers, hardware, rows, quantization, engine)
    hours = None
    if speeds is not None:
        download = download_gb_of(args, choice, engine, quantization)
        starts = start_hours(hardware, download) + (loads - 1) * start_hours(hardware, 0.0)
        hours = starts + (written / speeds[0] + read / speeds[1]) / 3600
    return Part(engine, quantization, weights, least, memory_gb(numbers, hardware, engine), rows, written, read, hours)


def _engine(args: argparse.Namespace, choice: ModelChoice, hardware: Hardware) -> tuple[str, str]:
    if args.engine != "auto":
        own = "bf16" if args.engine == "vllm" else hardware.training_quantization
        return args.engine, args.quantization or own
    found = auto_engine(choice, hardware, args.quantization, False, False,
                        lambda package: bool(args.hardware) or find_spec(package) is not None,
                        not args.hardware)  # fmt: skip
    return found.engine, found.quantization


def _words(args: argparse.Namespace, part: Part, hardware: Hardware) -> str:
    said = f"{part.engine}, {part.quantization}: {part.weights_gb:.1f} GB of weights"
    if not part.fits:
        return (f"{said}, {part.memory_gb:.1f} GB with a row, DOES NOT FIT into {part.have_gb:.0f} GB; "
                f"{recommend(hardware).preset.key} does")  # fmt: skip
    return f"{said} of {part.have_gb:.0f} GB, {part.rows} rows at a time: {cost_of(part, args.price_per_hour)}"
