"""`--plan` with two models: the memory of both together, and each one's own share of the tokens by its own size."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from cai_experiment.errors import BadInputError
from cai_experiment.models.choice import ModelChoice, is_ensemble, numbers_of, resolve_model
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.memory import GB, weights_gb
from cai_experiment.models.plan import HF_WORK_GB, Part, generation, start_hours, tokens_per_second
from cai_experiment.models.roles import generators_share, need_gb, smaller_preset, tokens_by_role, vllm_shares
from cai_experiment.models.serving import VLLM_SHARE, auto_engine, known_numbers
from cai_experiment.models.workload import Tokens, Workload
from cai_experiment.scripts._inputs import named
from cai_experiment.scripts._plan_parts import Need, cost_of, download_gb_of, engine_line, in_block

USABLE = 0.93  # of a GPU's nominal memory; the rest is CUDA's context and fragmentation
SLOWER = 1.1  # times as long as one model in both roles: that is said


def second_model(args: argparse.Namespace, hardware: Hardware, generator: ModelChoice) -> ModelChoice | None:
    """The critic, if the flags name another model for it in this process; else None."""
    first, second = named(args)
    if args.server or args.random_weights is not None or first.model == second.model:
        return None
    critic = resolve_model(second.model, hardware, second.said, ensembles=not args.trains_after)
    return None if critic.path_or_id == generator.path_or_id else critic


def both(
    args: argparse.Namespace, hardware: Hardware, generator: ModelChoice, critic: ModelChoice, work: Workload,
    made: Part,
) -> tuple[list[Part], list[Need], list[str]]:  # fmt: skip
    """([generator's part, critic's part], [the critic's download], lines); `made` is one model's part of it all.

    The lines are those of the engines that serve the pair, in place of the ones of `made`. With --ray, and for a critic
    of unknown size, one part, and a line that says so. Raises BadInputError for two vLLMs that were asked for and do
    not fit, as the run does.
    """
    if args.ray is not None:
        return [made], [], in_block("critic", [f"{critic.name} has half of the GPUs; its share is reckoned as if "
                                                 f"{generator.name} had it"])  # fmt: skip
    if known_numbers(critic) is None:
        return _of_unknown(args, hardware, generator, critic, work, made)
    if is_ensemble(generator) or is_ensemble(critic):
        return _with_ensemble(args, hardware, (generator, critic), work)
    served = _served(args, hardware, generator, critic, made)
    parts = [
        _part(args, choice, machine, served.engine, served.quantization, work, tokens)
        for choice, machine, tokens in zip((generator, critic), served.seen, tokens_by_role(generator, work),
                                           strict=True)
    ]  # fmt: skip
    needs = [Need("critic", download_gb_of(args, critic, served.engine, served.quantization))]
    lines = [served.said, *_lines(args, (generator, critic), parts), *served.offers]
    lines += _slower(args, generator, parts, made)
    return parts, needs, in_block("generation", [*lines, "the total counts these two, one after the other"])


def _with_ensemble(
    args: argparse.Namespace, hardware: Hardware, pair: tuple[ModelChoice, ModelChoice], work: Workload
) -> tuple[list[Part], list[Need], list[str]]:
    """As `both`, each by itself in this process (engines/pair.py): an ensemble in its own engine, the other in hf."""
    own = args.quantization or ("4bit" if hardware.kind == "cuda" else hardware.quantization)
    arms = [
        auto_engine(one, hardware, args.quantization, False, False, bool)[:2] if is_ensemble(one) else ("hf", own)
        for one in pair
    ]
    seen = (hardware, hardware) if hardware.kind != "cuda" else _split(hardware, *pair, arms[0][1])
    shares = zip(pair, seen, arms, tokens_by_role(pair[0], work), strict=True)
    parts = [_part(args, choice, machine, *arm, work, tokens) for choice, machine, arm, tokens in shares]
    words = " and ".join(f"{engine}, {quantization}" for engine, quantization in arms)
    needs = [Need("critic", download_gb_of(args, pair[1], *arms[1]))]
    lines = [f"{words}, in one process", *_lines(args, pair, parts), "the total counts these two, one after the other"]
    return parts, needs, in_block("generation", lines)


def _of_unknown(
    args: argparse.Namespace, hardware: Hardware, generator: ModelChoice, critic: ModelChoice, work: Workload,
    made: Part,
) -> tuple[list[Part], list[Need], list[str]]:  # fmt: skip
    """What vLLM does not take before its size is known: both in one process, each reckoned as the generator."""
    engine, quantization = _in_one_process(args, hardware, made)
    half = replace(hardware, vram_gb=hardware.vram_gb / 2)
    download = download_gb_of(args, generator, engine, quantization)
    part = generation(generator, half, engine, quantization, work, download, args.batch_size)
    return [part], [], [
        *in_block("generation", [f"both models in one process: {engine_line(part, args.price_per_hour)}"]),
        *in_block("critic", [f"{critic.name}: its size is not known, so its share is reckoned as if {generator.name} "
                             "had it"]),
    ]  # fmt: skip


class _Serving(NamedTuple):
    """How two models are served: what each sees of the machine, in words, and flags that would help."""

    seen: tuple[Hardware, Hardware]
    engine: str
    quantization: str
    said: str
    offers: tuple[str, ...] = ()


def _served(
    args: argparse.Namespace, hardware: Hardware, generator: ModelChoice, critic: ModelChoice, made: Part
) -> _Serving:
    """As engines/pair.py decides it."""
    refused = ""
    if made.engine == "vllm":
        shares = vllm_shares(generator, critic, hardware, made.quantization)
        if not shares.refused:
            first, second = (
                replace(hardware, vram_gb=hardware.vram_gb * s / VLLM_SHARE) for s in (shares.generator, shares.critic)
            )
            return _Serving((first, second), "vllm", made.quantization,
                f"two vLLMs, {made.quantization}: {shares.generator:.0%} of the GPU's memory and {shares.critic:.0%}",
            )  # fmt: skip
        if args.engine == "vllm":
            raise BadInputError(f"--engine vllm: {shares.refused}",
                                "use --engine hf --quantization 4bit, or one model for both")  # fmt: skip
        refused = f"; {shares.refused}"
    engine, quantization = _in_one_process(args, hardware, made)
    needs = [need_gb(numbers_of(choice), quantization, hardware.kind) for choice in (generator, critic)]
    cuda, ram = hardware.kind == "cuda", hardware.ram_gb * 2**30 / GB
    have = hardware.vram_gb * 2**30 / GB * USABLE if cuda else ram
    told = f"{engine} in one process, {quantization}: {needs[0]:.1f} + {needs[1]:.1f} of {have:.0f} GB at least"
    told += refused
    if not cuda:
        return _Serving((hardware, hardware), engine, quantization, told)
    if sum(needs) <= have:
        return _Serving(_split(hardware, generator, critic, quantization), engine, quantization, told)
    cpu = replace(hardware, kind="cpu", gpu_name="", vram_gb=0, gpus=1)
    least = need_gb(numbers_of(critic), args.quantization or _on_cpu(critic, cpu), "cpu")
    lacks = f", whose memory lacks {least - ram:.1f} GB as well: DOES NOT FIT" if least > ram else ""
    told += f": {sum(needs) - have:.1f} GB too little, so the critic is on the CPU{lacks}"
    offers = _offers(args, generator, critic, quantization, have, needs[0])
    return _Serving((hardware, cpu), engine, quantization, told, offers)


def _in_one_process(args: argparse.Namespace, hardware: Hardware, made: Part) -> tuple[str, str]:
    """(engine, quantisation) of two models that are not two vLLMs."""
    if args.engine not in ("auto", "vllm"):
        return made.engine, args.quantization or made.quantization
    return "hf", args.quantization or ("4bit" if hardware.kind == "cuda" else hardware.quantization)


def _split(
    hardware: Hardware, generator: ModelChoice, critic: ModelChoice, quantization: str
) -> tuple[Hardware, Hardware]:
    """What each sees of a GPU: its weights, a pass, and its share of the rest, as engines/manager.py gives it."""
    numbers = numbers_of(generator), numbers_of(critic)
    weights = [weights_gb(known, quantization) for known in numbers]
    left, most = hardware.vram_gb - sum(weights), generators_share(*numbers)
    work = min(HF_WORK_GB, left / 2)  # of each one's pass
    seen = [w + work + (left - 2 * work) * s for w, s in zip(weights, (most, 1 - most), strict=True)]
    return replace(hardware, vram_gb=seen[0]), replace(hardware, vram_gb=seen[1])


def _offers(
    args: argparse.Namespace, generator: ModelChoice, critic: ModelChoice, quantization: str, have: float, taken: float
) -> tuple[str, ...]:
    """Smaller models that fit, by the flags that named these; of a generator that does not fit alone only its own."""
    if taken > have:
        smaller = smaller_preset(numbers_of(generator), {"cuda": (quantization, have)}, args.trains_after)
        flag = "--generator" if args.generator else "--model"
        there = f"{generator.name} alone does not fit"
    else:
        smaller = smaller_preset(numbers_of(critic), {"cuda": (quantization, have - taken)}, False)
        flag = "--model" if args.model and not args.critic else "--critic"
        there = f"fits the GPU beside {generator.name}"
    if smaller is None or smaller.is_local:
        return () if taken > have else ("   no smaller critic fits beside it: take one model for both",)
    said = f"{flag} {smaller.key}"
    if args.roles:
        other = f"--critic {critic.name}" if taken > have else f"--generator {generator.name}"
        said += f" {other} in place of --roles {args.roles}"
    return (f"   or {said}: {there}",)


def _slower(args: argparse.Namespace, generator: ModelChoice, parts: Sequence[Part], made: Part) -> list[str]:
    """A line where one model in both roles takes less time: it has the memory alone, and perhaps another engine."""
    hours = [part.hours or 0.0 for part in parts]
    fits = all(part.fits for part in (*parts, made))
    if made.hours is None or not fits or not all(hours) or sum(hours) <= SLOWER * made.hours:
        return []
    shared = "share the memory" if made.have_gb > parts[0].have_gb else "are loaded one after the other"
    why = (
        f"the two {shared}, and each reads what the other wrote"
        if made.engine == parts[0].engine
        else f"{made.engine} does not serve these two"
    )
    return [f"   {sum(hours) / made.hours:.1f} times as long as {generator.name} in both roles, which takes "
            f"{cost_of(made, args.price_per_hour)} in {made.engine}, {made.quantization}: {why}"]  # fmt: skip


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
        f"{role} {choice.name} ({choice.kind or 'unknown kind'}): {part.written:,} tokens written, {part.read:,} read, "
        + (f"{part.weights_gb:.1f} GB of weights, {part.rows} row{'s' if part.rows > 1 else ''} at a time: "
           f"{cost_of(part, args.price_per_hour)}" if part.fits else f"DOES NOT FIT into {part.have_gb:.0f} GB")
        for role, choice, part in zip(("generator", "critic"), choices, parts, strict=True)
    ]  # fmt: skip
