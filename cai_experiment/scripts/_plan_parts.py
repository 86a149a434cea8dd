"""The parts of a plan, in words: generation engine by engine, the guard's pass, disk. See _plan.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from cai_experiment.errors import BadInputError
from cai_experiment.models.choice import ModelChoice, experts_numbers, is_ensemble, members_of
from cai_experiment.models.disk import downloaded_gb, hub_cache, room
from cai_experiment.models.ensembles import RANDOM
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.memory import Architecture, weights_gb
from cai_experiment.models.plan import Part, floor_hours, generation, guarding, in_words
from cai_experiment.models.presets import NANO_DIR
from cai_experiment.models.serving import actor_gpus, auto_engine, files_for, here_gb, missing_gb
from cai_experiment.models.workload import Tokens, Workload, answer_tokens

MUCH = 1.5  # times as long as another engine takes: that is said


class Need(NamedTuple):
    """GB of disk: what for, what is still to come, and whether it lies among the downloads."""

    what: str
    gb: float
    download: bool = True


def generation_lines(
    args: argparse.Namespace, choice: ModelChoice, hardware: Hardware, work: Workload, trains_after: bool
) -> tuple[str, Part, list[str]]:
    """(engine, its part, lines): first the engine that the run takes, then the others that it could."""
    arms, why = _engines(args, choice, hardware, trains_after)
    parts: list[Part] = []
    lines: list[str] = []
    for engine, quantization in arms:
        seen, actors, machines = _ray_share(args, choice, hardware, engine)
        download = download_gb_of(args, choice, engine, quantization)
        part = generation(choice, seen, engine, quantization, work, download, args.batch_size, actors, machines)
        parts.append(part)
        lines.append(f"{'or ' if lines else ''}{engine_line(part, args.price_per_hour)}")
    lines += _faster(arms, parts)
    floor, machines = floor_hours(choice, hardware, work), parts[0].machines
    if floor is not None:
        least = in_words(floor / machines, floor * args.price_per_hour)
        lines.append(f"the floor, all at the data sheet's FLOP/s: {least}")
    if why:
        lines.insert(1, f"   taken by auto: {why}")
    return arms[0][0], parts[0], in_block("generation", lines)


def _faster(arms: Sequence[tuple[str, str]], parts: Sequence[Part]) -> list[str]:
    """The flags of the fastest engine, if the one that the run takes needs more than half as long again."""
    able = [(part.hours, arm) for arm, part in zip(arms, parts, strict=True) if part.fits and part.hours is not None]
    if not parts[0].fits or parts[0].hours is None or parts[0].hours < MUCH * min(able)[0]:
        return []
    engine, quantization = min(able)[1]
    return [f"   much faster by this plan: --engine {engine} --quantization {quantization}"]


def _ray_share(
    args: argparse.Namespace, choice: ModelChoice, hardware: Hardware, engine: str
) -> tuple[Hardware, int, int]:
    """(what one engine sees, how many engines, on how many machines like `hardware`): as pipeline.distributed does it.

    Without --ray one engine, which sees all GPUs (vLLM alone uses more than one of them).
    """
    if args.ray is None:
        return hardware, 1, 1
    if hardware.kind != "cuda" or choice.path_or_id == str(NANO_DIR):  # an actor for each core
        seen, most = replace(hardware, cores=1), hardware.cores
    else:
        random = args.random_weights is not None
        each, _ = actor_gpus(engine, choice, hardware, args.quantization, random, _installed(args), hardware.gpus,
                             not args.hardware)  # fmt: skip
        seen, most = replace(hardware, gpus=each), max(1, hardware.gpus // each)
    actors = args.ray_actors or most
    return seen, actors, -(-actors // most)


def _engines(
    args: argparse.Namespace, choice: ModelChoice, hardware: Hardware, trains_after: bool
) -> tuple[list[tuple[str, str]], str]:
    """([(engine, quantization)], the first the one that the run takes, and why)."""
    random = args.random_weights is not None
    if args.engine != "auto":
        own = "bf16" if args.engine == "vllm" else hardware.training_quantization
        return [(args.engine, args.quantization or own)], ""
    seen = hardware if args.ray is None else _ray_share(args, choice, hardware, "auto")[0]
    found = auto_engine(choice, seen, args.quantization, trains_after, random, _installed(args), not args.hardware)
    chosen = found.engine, found.quantization
    several = hardware.kind == "cuda" and not is_ensemble(choice)
    others = [("vllm", "bf16"), ("unsloth", "4bit"), ("hf", "4bit")] if several else []
    barred = {"vllm"} if trains_after else set()
    barred |= {"unsloth"} if random or (choice.preset is not None and not choice.preset.unsloth) else set()
    others = [(e, q) for e, q in others if e not in barred and args.quantization in (None, q)]
    return [chosen, *(arm for arm in others if arm != chosen)], found.why


def _installed(args: argparse.Namespace) -> Callable[[str], bool]:
    """Whether a package is there; on a machine that is only planned for, setup_runpod.sh has put all there."""
    return lambda package: bool(args.hardware) or find_spec(package) is not None


def engine_line(part: Part, price: float) -> str:
    """One engine's part in a line: weights, rows, tokens read, hours; or that it does not fit."""
    text = f"{part.engine}, {part.quantization}: {part.weights_gb:.1f} GB of weights"
    if not part.fits:
        return f"{text}, DOES NOT FIT into {part.have_gb:.0f} GB"
    rows = f"{part.rows} row{'s' if part.rows > 1 else ''} at a time"
    many = f" on each of {part.actors} actors" if part.actors > 1 else ""
    many += f" on {part.machines} machines" if part.machines > 1 else ""
    return f"{text}, {rows}{many}, {part.read:,} tokens read: {cost_of(part, price)}"


def server_lines(url: str, tokens: Tokens) -> list[str]:
    """What a server is asked for: tokens alone, since how fast they come and what they cost is its own."""
    from cai_experiment.engines.server_address import read_address

    return in_block("generation", [
        f"{read_address(url)[0]}: speed and price are the server's",
        f"{tokens.prompts:,} requests, {tokens.sent:,} prompt tokens sent, of which a server that keeps prefixes reads "
        f"{tokens.read:,}; {tokens.written:,} written; make 10 pairs (--count 10) and multiply",
    ])  # fmt: skip


def guard_pass(
    args: argparse.Namespace, name: str, choice: ModelChoice, hardware: Hardware, pairs: int
) -> tuple[list[Part], list[Need], list[str]]:
    """(part, disk, line) of the guard's pass; the shipped model guards its own world, in the generator's engine."""
    from cai_experiment.engines.guard_models import AUTO, GUARDS, LLAMA_GUARD, QWEN_SMALL, is_shipped

    generator = args.generator or args.model or choice.name
    if is_shipped(name) or (name.lower() == AUTO and is_shipped(generator)):
        return [], [], [in_line("guard", f"{name}: the shipped model reads its own pairs, in a minute or two")]
    auto = LLAMA_GUARD if hardware.kind == "cuda" else QWEN_SMALL
    guards = {guard.hub_id.lower(): guard for guard in GUARDS} | {AUTO: auto}
    if (guard := guards.get(name.lower())) is not None:
        shown, numbers, download = f"{name}, {guard.hub_id}" if name == AUTO else name, guard.numbers, guard.download_gb
        download -= 0 if args.hardware else min(download, downloaded_gb(guard.hub_id))
    elif Path(name).expanduser().is_dir():
        shown, numbers, download = name, Architecture.from_config(Path(name).expanduser()), 0.0
    else:
        raise BadInputError(f"--guard {name}: no such guard", f"use auto, nano, {', '.join(g.hub_id for g in GUARDS)}")
    part = guarding(numbers, hardware, pairs, answer_tokens(choice), download)
    return [part], [Need("guard", download)], [in_line("guard", f"{shown}, {engine_line(part, args.price_per_hour)}")]


def download_gb_of(args: argparse.Namespace, choice: ModelChoice, engine: str, quantization: str) -> float:
    """GB that are still to be fetched (see `files_for`)."""
    if is_ensemble(choice):
        return _experts_download_gb(choice, quantization, not args.hardware)
    if choice.preset is None or choice.preset.is_local or args.random_weights is not None:
        return 0.0
    _, precision = files_for(choice, engine, quantization, not args.hardware)
    if args.hardware:
        return weights_gb(choice.preset.architecture, precision)
    return missing_gb(choice, precision)


def _experts_download_gb(choice: ModelChoice, quantization: str, here: bool) -> float:
    """GB of an ensemble's experts that are still to be fetched; 0 of one whose size is not known."""
    whole = 0.0
    for member, numbers in zip(members_of(choice), experts_numbers(choice, fetch=False), strict=True):
        local = Path(member.path_or_id).is_dir() or member.name.startswith(RANDOM)
        if numbers is None or local:
            continue
        _, precision = files_for(member, "hf", quantization, here)
        whole += max(0.0, weights_gb(numbers, precision) - (here_gb(member, precision) if here else 0.0))
    return whole


def disk_lines(args: argparse.Namespace, needs: Sequence[Need]) -> list[str]:
    """What will be written; on this machine also whether there is room."""
    needs = [need for need in needs if need.gb >= 0.05]
    whole = sum(need.gb for need in needs)
    parts = " + ".join(f"{need.gb:.1f} {need.what}" for need in needs)
    lines = [f"{whole:.1f} GB: {parts}" if needs else "less than 0.1 GB"]
    if not args.hardware:
        downloads = sum(need.gb for need in needs if need.download)
        folders = [(args.data_dir, whole - downloads), *([(hub_cache(), downloads)] if downloads else [])]
        for place, gb, free in room(folders):
            lines.append(f"{free:.0f} GB free at {place}: {'enough' if free >= gb else f'NOT ENOUGH for {gb:.0f} GB'}")
    return in_block("disk", lines)


def cost_of(part: Part, price: float) -> str:
    """Hours and dollars of a part in words; `price` is a machine's, all its GPUs, at work or not."""
    dollars = None if part.machine_hours is None else part.machine_hours * price
    return in_words(part.hours, dollars)


def in_line(name: str, text: str) -> str:
    """A line of the plan: twelve columns of name."""
    return f"{name:<12}{text}"


def in_block(name: str, lines: Sequence[str]) -> list[str]:
    """Lines under one name."""
    return [in_line("" if i else name, text) for i, text in enumerate(lines)]
