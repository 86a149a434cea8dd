"""--plan of train_ensemble.py: rows, tokens, memory, disk, hours, dollars. No model is loaded, nothing written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cai_experiment.ensemble.experts import RANDOM, SHIPPED, architecture, default_precision, whole_model
from cai_experiment.models.disk import downloaded_gb, free_gb, hub_cache
from cai_experiment.models.hardware import Hardware, detect, gpu_speed
from cai_experiment.models.memory import Architecture, weights_gb
from cai_experiment.models.plan import CPU_FLOPS_PER_CORE, READING_EFFICIENCY, in_words, start_hours
from cai_experiment.scripts._plan_parts import in_line
from cai_experiment.scripts._train_ensemble import STATES, Work
from cai_experiment.scripts._train_ensemble_words import size as in_bytes

if TYPE_CHECKING:
    from cai_experiment.ensemble.data import Row

CHARACTERS_A_TOKEN = 4.0  # of English under a large vocabulary, where no tokenizer is at hand
STEP_SECONDS = 0.005  # of a step at the least: some hundred small kernels, and Python between them
HALF, SINGLE = 2, 4  # bytes, as in state_cache.py


@dataclass(frozen=True, slots=True)
class Size:
    """Tokens that every expert reads once, tokens that count, steps an epoch; `exact` if they were counted."""

    tokens: int
    counted: int
    rows: int
    exact: bool


def lines(args: argparse.Namespace, work: Work) -> list[str]:
    """The plan's lines. Figures are estimates: GPU speeds are arithmetic on data sheets."""
    hardware, numbers = detect(), [architecture(name) for name in work.names]
    precision = args.precision or default_precision(work.names, args.device)
    size = _size(args, work, [*work.training, *work.held_out])
    about = "" if size.exact else "about "
    need = size.counted * sum(HALF * one.hidden + SINGLE for one in numbers)
    weights = sum(weights_gb(one, precision) for one in numbers)
    where = hardware.gpu_name or f"{hardware.cores} CPU cores"
    found = [
        in_line("hardware", f"{where}; ${args.price_per_hour:.2f} an hour" if args.price_per_hour else where),
        in_line("memory", f"{in_bytes(weights * 1e9)} of experts in {precision}"),
        in_line("tokens", f"{about}{size.tokens:,} that each expert reads once; {about}{size.counted:,} count"),
        in_line("disk", _disk(args, need, about)),
        *_downloads(work.names, numbers),
    ]
    return found + _time(args, hardware, numbers, size)


def _size(args: argparse.Namespace, work: Work, rows: Sequence[Row]) -> Size:
    """Counted with the first expert's tokenizer where it is at hand, else by characters."""
    tokenizer = _tokenizer(work.names[0], args.tokenizer)
    if tokenizer is not None:
        from cai_experiment.ensemble.encoding import encode_rows

        encoded, _ = encode_rows(rows, tokenizer, args.max_length, args.train_on_prompt)
        return Size(sum(len(row.ids) for row in encoded), sum(row.counted for row in encoded), len(encoded), True)
    prompts = sum(int(len(row.prompt) / CHARACTERS_A_TOKEN) for row in rows)
    answers = sum(int(len(row.answer) / CHARACTERS_A_TOKEN) + 1 for row in rows)
    return Size(prompts + answers, answers + (prompts if args.train_on_prompt else 0), len(rows), False)


def _tokenizer(name: str, given: str | None) -> Any:
    """An expert's tokenizer, or None if it is not on this machine: a plan fetches nothing."""
    from transformers import AutoTokenizer

    place = given if name.startswith(RANDOM) else str(SHIPPED.get(name, name))
    if place is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError):
        return None


def _disk(args: argparse.Namespace, need: int, about: str) -> str:
    if args.no_cache:
        return f"none for states (--no_cache; {about}{in_bytes(need)} would make further epochs nearly free)"
    place = args.cache_dir or args.output_dir / STATES
    free = free_gb(place)
    fits = "enough" if free * 1e9 > need else "NOT ENOUGH: name another disk with --cache_dir, or use --no_cache"
    return f"{about}{in_bytes(need)} of states at {place}; {free:.0f} GB free: {fits}"


def _downloads(names: Sequence[str], numbers: Sequence[Architecture]) -> list[str]:
    """Of hub models, what is not in the cache yet; their files are 16-bit, whatever they are loaded in.

    Of an adapter the model that it is put on counts; its own weights are a hundredth of that.
    """
    hub = [(name, one) for name, one in zip(names, numbers, strict=True) if not name.startswith(("/", RANDOM))]
    wanted = {whole_model(name): one for name, one in hub if name not in SHIPPED}  # each once
    todo = sum(max(0.0, weights_gb(one, "bf16") - downloaded_gb(name)) for name, one in wanted.items() if "/" in name)
    return [in_line("download", f"{todo:.1f} GB to {hub_cache()}")] if todo >= 0.05 else []


def _time(
    args: argparse.Namespace, hardware: Hardware, numbers: Sequence[Architecture], size: Size
) -> list[str]:  # fmt: skip
    """Hours of the first epoch, of each further one, of all."""
    flops = _flops(hardware)
    if flops is None:
        return [in_line("time", "unknown for this GPU: the first minute's progress line says it")]
    reading = 2 * sum(one.parameters for one in numbers) * size.tokens / flops
    heads = sum(one.hidden * args.head_hidden_dim + args.head_hidden_dim**2 // 2 for one in numbers)
    steps = size.rows * (1 - args.validation_share) / args.batch_size
    training = max(steps * STEP_SECONDS, 6 * heads * size.counted / flops)
    first, later = reading + training, training + (reading if args.no_cache else 0.0)
    whole = start_hours(hardware, 0.0) + (first + later * (args.num_epochs - 1)) / 3600
    return [
        in_line("time", f"epoch 1 {_said(first)}, of which {_said(reading)} are the experts'; each further one "
                        f"{_said(later)}"),
        in_line("total", f"{in_words(whole, whole * args.price_per_hour)}, loading included, downloads not"),
        in_line("", "speeds are estimates: of a GPU arithmetic on its data sheet, of a CPU 37 GFLOP/s a core"),
    ]  # fmt: skip


def _flops(hardware: Hardware) -> float | None:
    """Floating-point operations a second while prompts are read."""
    if hardware.kind != "cuda":
        return CPU_FLOPS_PER_CORE * hardware.cores
    speed = gpu_speed(hardware.gpu_name)
    return None if speed is None else READING_EFFICIENCY * speed[1] * 1e12


def _said(seconds: float) -> str:
    from cai_experiment.observe.progress import duration

    return f"about {duration(max(1.0, seconds))}"
