"""`--plan` with two models: the memory of both together, and each one's own share of the tokens by its own size."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from cai_experiment.errors import UserError
from cai_experiment.models.choice import ModelChoice, numbers_of, resolve_model
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.memory import GB
from cai_experiment.models.plan import Part, generation, in_words, start_hours, tokens_per_second
from cai_experiment.models.roles import need_gb, tokens_by_role, vllm_shares
from cai_experiment.models.serving import VLLM_SHARE
from cai_experiment.models.workload import Tokens, Workload
from cai_experiment.scripts._inputs import named
from cai_experiment.scripts._plan_parts import Need, download_gb_of, in_block

USABLE = 0.93  # of a GPU's nominal memory; the rest is CUDA's context and fragmentation
EACH = {"vllm": "bf16"}  # else 4 bit on CUDA, as engines/pair.py loads two models


def second_model(args: argparse.Namespace, hardware: Hardware, generator: ModelChoice) -> ModelChoice | None:
    """The critic, if the flags name another model for it in this process; else None."""
    first, second = named(args)
    if args.server or args.random_weights is not None or first.model == second.model:
        return None
    critic = resolve_model(second.model, hardware, second.said)
    return None if critic.path_or_id == generator.path_or_id else critic


def both(
    args: argparse.Namespace, hardware: Hardware, generator: ModelChoice, critic: ModelChoice, work: Workload,
    made: Part,
) -> tuple[list[Part], list[Need], list[str]]:  # fmt: skip
    """([generator's part, critic's part], [the critic's download], lines); `made` is one model's part of it all.

    With --ray, and for a critic of unknown size, [made] alone, and a line that says so.
    """
    try:
        numbers_of(critic)
    except UserError:
        return [made], [], in_block("critic", [f"{critic.name}: its size is not known, so its share is reckoned as "
                                                 f"if {generator.name} had it"])  # fmt: skip
    if args.ray is not None:
        return [made], [], in_block("critic", [f"{critic.name} has half of the GPUs; its share is reckoned as if "
                                                 f"{generator.name} had it"])  # fmt: skip
    seen, engine, quantization, said = _served(args, hardware, generator, critic, made)
    parts = [
        _part(args, choice, machine, engine, quantization, work, tokens)
        for choice, machine, tokens in zip((generator, critic), seen, tokens_by_role(generator, work), strict=True)
    ]
    needs = [Need("critic", download_gb_of(args, critic, engine, quantization))]
    return parts, needs, in_block("critic", [f"{critic.name} ({critic.kind or 'unknown kind'}): {said}",
                                            *_lines(args, (generator, critic), parts)])  # fmt: skip


def _served(
    args: argparse.Namespace, hardware: Hardware, generator: ModelChoice, critic: ModelChoice, made: Part
) -> tuple[tuple[Hardware, Hardware], str, str, str]:
    """(what each sees of the machine, engine, quantisation, how in words)."""
    refused = ""
    if made.engine == "vllm":
        shares = vllm_shares(generator, critic, hardware, made.quantization)
        if not shares.refused:
            seen = [
                replace(hardware, vram_gb=hardware.vram_gb * s / VLLM_SHARE) for s in (shares.generator, shares.critic)
            ]
            return (seen[0], seen[1]), "vllm", made.quantization, (
                f"two vLLMs, {shares.generator:.0%} of the GPU's memory and {shares.critic:.0%}")  # fmt: skip
        refused = f"; {shares.refused}"
    auto = args.engine in ("auto", "vllm")
    engine = "hf" if auto else made.engine
    own = "4bit" if hardware.kind == "cuda" else hardware.quantization
    quantization = args.quantization or (own if auto else made.quantization)
    needs = [need_gb(numbers_of(choice), quantization, hardware.kind) for choice in (generator, critic)]
    have = hardware.vram_gb * 2**30 / GB * USABLE if hardware.kind == "cuda" else hardware.ram_gb * 2**30 / GB
    told = f"{engine} in one process, {needs[0]:.1f} + {needs[1]:.1f} of {have:.0f} GB at least{refused}"
    if sum(needs) <= have or hardware.kind != "cuda":
        half = replace(hardware, vram_gb=hardware.vram_gb / 2) if hardware.kind == "cuda" else hardware
        return (half, half), engine, quantization, told
    cpu = replace(hardware, kind="cpu", gpu_name="", vram_gb=0, gpus=1)
    least = need_gb(numbers_of(critic), args.quantization or _on_cpu(critic, cpu), "cpu")
    ram = hardware.ram_gb * 2**30 / GB
    lacks = f", whose memory lacks {least - ram:.1f} GB as well: DOES NOT FIT" if least > ram else ""
    return (hardware, cpu), engine, quantization, (
        f"{told}: {sum(needs) - have:.1f} GB too little, so the critic is on the CPU{lacks}")  # fmt: skip


def _on_cpu(choice: ModelChoice, hardware: Hardware) -> str:
    """float32, or where it does not fit bfloat16, as engines/placing.py chooses."""
    fits = need_gb(numbers_of(choice), "fp32", "cpu") <= hardware.ram_gb * 2**30 / GB
    return "fp32" if fits else "bf16"


def trained_by(args: argparse.Namespace, engine: str, hardware: Hardware) -> argparse.Namespace:
    """The flags for the plan of a training in the same load: what hf loaded, TRL trains on a GPU."""
    trl = engine == "hf" and hardware.kind == "cuda" and args.trains_after
    return argparse.Namespace(**{**vars(args), "backend": "trl"}) if trl else args


def _part(
    args: argparse.Namespace, choice: ModelChoice, hardware: Hardware, engine: str, quantization: str, work: Workload,
    tokens: tuple[int, int],
) -> Part:  # fmt: skip
    """One role's part: rows and memory as of a model alone on what it sees, time by its own tokens."""
    precision = _on_cpu(choice, hardware) if hardware.kind == "cpu" and args.quantization is None else quantization
    download = download_gb_of(args, choice, engine, precision)
    alone = generation(choice, hardware, engine, precision, work, download, args.batch_size)
    written, once = tokens
    whole = Tokens.of(choice, work)
    read = once * whole.read_by(engine) // whole.read  # an engine without prefixes reads as many times more
    speeds = tokens_per_second(numbers_of(choice), hardware, alone.rows, precision, engine)
    hours = None
    if speeds is not None:
        hours = start_hours(hardware, download) + (written / speeds[0] + read / speeds[1]) / 3600
    return replace(alone, written=written, read=read, hours=hours)


def _lines(args: argparse.Namespace, choices: Sequence[ModelChoice], parts: Sequence[Part]) -> list[str]:
    return [
        f"{choice.name}: {part.written:,} tokens written, {part.read:,} read, {part.weights_gb:.1f} GB of weights, "
        + in_words(part.hours, None if part.hours is None else part.hours * args.price_per_hour)
        for choice, part in zip(choices, parts, strict=True)
    ] + ["the total counts these two, one after the other; the lines above are of the generator in both roles"]
