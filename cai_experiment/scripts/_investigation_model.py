"""Which model run_investigation.py takes, in which precision, and what --plan says of it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from cai_experiment.errors import BadInputError
from cai_experiment.investigations.compare import COMPARED_TURNS, model_folder
from cai_experiment.investigations.conditions import CONDITIONS
from cai_experiment.investigations.session import SessionSettings
from cai_experiment.investigations.tasks import MOST_QUESTIONS, tasks_of
from cai_experiment.models.choice import ModelChoice, named_by_variable, numbers_of, resolve_model
from cai_experiment.models.hardware import Hardware, detect, profile
from cai_experiment.models.memory import CONTEXT_GB, allowance_gb, vram_gb
from cai_experiment.models.plan import in_words, tokens_per_second
from cai_experiment.scripts._models_fit import have_gb

USUAL, LARGER = "Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-7B-Instruct"
NANO, SECOND_NANO = "nano", "nano-b"
IN_PROCESS = "reads the weights in this process"
HEADROOM = 1.15  # times the need in bf16: introspection runs passes of its own beside the conversation


def chosen_model(args: argparse.Namespace, hardware: Hardware) -> tuple[str | None, str]:
    """(name for `resolve_model`, why): --model, else a variable, else the 3B on a GPU, else the shipped model."""
    if args.model is not None or named_by_variable()[1]:
        return args.model, ""
    if hardware.kind == "cuda":
        return USUAL, f"no --model: investigations use {USUAL} on a GPU"
    return None, ""


def named_by(args: argparse.Namespace) -> str:
    """What named the model, for reasons and errors: a flag, or the default of a machine with a GPU."""
    if args.compare is not None:
        return "--compare" if args.compare else "default of --compare:"
    return "--model" if args.model is not None else "default of investigations on a GPU:"


def compared_models(args: argparse.Namespace, hardware: Hardware) -> list[str]:
    """The two models of --compare. Raises BadInputError if they are one."""
    if not args.compare:
        return [USUAL, LARGER] if hardware.kind == "cuda" else [NANO, SECOND_NANO]
    first, second = args.compare
    if first == second or model_folder(Path(), first) == model_folder(Path(), second):
        raise BadInputError(f"--compare {first} {second}: one model twice", "name two")
    return [first, second]


def precision_of(args: argparse.Namespace, choice: ModelChoice, hardware: Hardware) -> str | None:
    """bf16 on a GPU that holds it, so that introspection reads the model's own weights; else the machine's."""
    if args.quantization is not None or hardware.kind != "cuda" or args.engine == "unsloth" or choice.preset is None:
        return args.quantization
    if hardware.compute != "bfloat16":  # a T4 only emulates it
        return None
    return "bf16" if need_gb(args, choice, "bf16", hardware)[0] * HEADROOM <= have_gb(hardware) else None


def need_gb(args: argparse.Namespace, choice: ModelChoice, precision: str, hardware: Hardware) -> tuple[float, int]:
    """(GB with one conversation, its tokens), by the arithmetic of `models.py --fit --length`."""
    if choice.preset is not None:
        context = min(args.max_tokens, choice.preset.context)
        return choice.preset.vram_gb(precision, context, device=hardware.kind), context
    numbers, context = numbers_of(choice), args.max_tokens
    need = vram_gb(numbers, precision, context) + allowance_gb(numbers, precision, context)
    return need if hardware.kind == "cuda" else need - CONTEXT_GB, context


def load(args: argparse.Namespace, name: str | None, hardware: Hardware) -> Any:
    """The engine; prints what it will be before minutes of loading. Raises BadInputError, EngineError, DiskError."""
    from cai_experiment.engines.load import LoadSettings, engine_over, load_model, make_plan

    precision = args.quantization
    if args.random_weights is None:
        precision = precision_of(args, resolve_model(name, hardware, named_by(args)), hardware)
    settings = LoadSettings(
        model=name, layout=args.format, quantization=precision, batch_size=args.batch_size or 1,
        engine="hf" if args.engine == "auto" else args.engine, seed=args.seed, random_weights=args.random_weights,
        max_length=args.max_tokens, trains_after=False, said=named_by(args),
    )  # fmt: skip
    plan = make_plan(settings, hardware)
    if args.engine == "auto":  # which may then fall back to `generate`
        plan, settings = replace(plan, why=IN_PROCESS), replace(settings, engine="auto")
    print(plan.first_line, flush=True)
    engine = engine_over(plan, settings, *load_model(plan, settings))
    if engine.first_line != plan.first_line:
        print(engine.first_line, flush=True)
    return engine


def turns_of(args: argparse.Namespace) -> int:
    """Replies a task, at most."""
    return int(args.turns or (COMPARED_TURNS if args.compare is not None else SessionSettings().task_turns))


# ---------------------------------------------------------------- the plan


def plan(args: argparse.Namespace) -> list[str]:
    """Memory, tokens at most and hours, for this machine or the --hardware named; nothing is loaded."""
    hardware = profile(args.hardware) if args.hardware else detect()
    names = compared_models(args, hardware) if args.compare is not None else [chosen_model(args, hardware)[0]]
    sessions, replies = _size(args)
    lines = [_line("sessions", f"{sessions} a model, at most {replies} replies of {args.reply_tokens} tokens")]
    hours: float | None = 0.0
    for name in names:
        choice = resolve_model(name, hardware, named_by(args))
        numbers, precision = numbers_of(choice), precision_of(args, choice, hardware) or hardware.training_quantization
        fits = _fits(*need_gb(args, choice, precision, hardware), have_gb(hardware))
        lines.append(_line("model", f"{choice.name} ({choice.reason}), {precision}: {fits}"))
        speed = tokens_per_second(numbers, hardware, 1, precision, "hf")
        hours = None if hours is None or speed is None else hours + replies * args.reply_tokens / speed[0] / 3600
    words = in_words(hours, (hours or 0.0) * args.price_per_hour)
    return [*lines, _line("time", f"{words} at most, by arithmetic; loading, download and the code come on top")]


def _fits(need: float, context: int, have: float) -> str:
    said = f"{need:.1f} GB with a conversation of {context:,} tokens"
    if need <= have:
        return f"{said}, fits into {have:.1f} GB ({have - need:.1f} GB to spare)"
    return f"{said}, DOES NOT FIT into {have:.1f} GB, by {need - have:.1f} GB; next: models.py --fit --length {context}"


def _size(args: argparse.Namespace) -> tuple[int, int]:
    """(sessions, replies at most) of one model."""
    if args.compare is not None:
        return 1, turns_of(args)
    conditions = CONDITIONS if args.condition == "all" else (args.condition,)
    tasks = len(tasks_of(args.style)) + (MOST_QUESTIONS if args.style != "guided" else 0)
    per_seed = len(conditions) * tasks + ("delayed" in conditions)  # which has one task more
    return args.repeats * len(conditions), args.repeats * per_seed * turns_of(args)


def _line(name: str, text: str) -> str:
    return f"{name:<12}{text}"
