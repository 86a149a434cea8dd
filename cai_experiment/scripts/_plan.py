"""`--plan`: what a milestone needs, part by part, on this machine or on the --hardware named. Nothing is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace

from cai_experiment.constitution.principles import load_constitution
from cai_experiment.constitution.prompts import ask_for_answer
from cai_experiment.engines.guard_models import AUTO, is_shipped
from cai_experiment.milestones import MILESTONES, Milestone
from cai_experiment.models.choice import ModelChoice, is_ensemble, members_of, numbers_of, resolve_model
from cai_experiment.models.disk import checkpoints_gb
from cai_experiment.models.hardware import Hardware, detect, profile
from cai_experiment.models.plan import Part, in_words
from cai_experiment.models.presets import NANO_DIR
from cai_experiment.models.workload import Tokens, Workload
from cai_experiment.pipeline.guarding import EXPECTED, spare_for
from cai_experiment.pipeline.length_matching import BLOCK, KEEP
from cai_experiment.pipeline.settings import RunSettings
from cai_experiment.scripts._generation import WITH_TRAINING
from cai_experiment.scripts._inputs import chosen_model, earlier, extension_line
from cai_experiment.scripts._plan_parts import (
    Need,
    disk_lines,
    download_gb_of,
    generation_lines,
    guard_pass,
    in_block,
    in_line,
    server_lines,
)
from cai_experiment.scripts._plan_roles import both, second_model, trained_by
from cai_experiment.scripts._plan_training import dpo_lines, evaluation_lines, training_after
from cai_experiment.scripts._training_work import backend_of
from cai_experiment.training.data import Pair
from cai_experiment.training.settings import DPOSettings, total_steps

ROW_KB = {"targeted": 30, "random": 22}  # an example's lines in all files of a run (docs/SCALING.md)
SOURCE = "all by arithmetic on data sheets and one published step time, not measured here (bench.py measures)"
FOR_THE_POD = "for the pod: --plan --hardware a100-80gb"


def machine(args: argparse.Namespace) -> Hardware:
    """The machine to plan for: --hardware, else this one. BadInputError: see `profile`."""
    return profile(args.hardware) if args.hardware else detect()


def model_of(args: argparse.Namespace, hardware: Hardware) -> ModelChoice:
    """The model that makes the pairs there; with --random-weights that preset."""
    return chosen_model(args, hardware) if args.server else drawn(args, chosen_model(args, hardware), hardware)


def drawn(args: argparse.Namespace, choice: ModelChoice, hardware: Hardware) -> ModelChoice:
    """`choice`, or the preset of --random-weights in its place."""
    if args.random_weights is None:
        return choice
    preset = resolve_model(args.random_weights, hardware)
    return replace(preset, name=f"random:{preset.name}", reason="random weights: nothing to download")


# ---------------------------------------------------------------- the milestones' plans


def milestone_lines(args: argparse.Namespace, milestone: Milestone, settings: RunSettings) -> list[str]:
    """The plan of a script that makes pairs: generation, guard, training, disk, total, budget."""
    hardware = machine(args)
    choice = model_of(args, hardware)
    spare = _spare(args, settings, choice)
    work = _workload(args, settings, spare)
    if not work.pairs:
        return [*heading(args, hardware, choice), in_line("size", f"none: {extension_line(args, settings.pairs)}")]
    lines = [*heading(args, hardware, choice), *_size(choice, work, spare)]
    parts: list[Part] = []
    needs: list[Need] = []
    engine = "server"
    if args.server:
        lines += server_lines(args.server, Tokens.of(choice, work))
    else:
        engine, made, said = generation_lines(args, choice, hardware, work, milestone.name in WITH_TRAINING)
        critic, own = second_model(args, hardware, choice), [made]
        if critic is None or args.ray is not None:
            lines += said
        if critic is not None:
            own, downloads, said = both(args, hardware, choice, critic, work, made)
            engine, lines, needs = own[0].engine, [*lines, *said], [*needs, *downloads]
            args = trained_by(args, engine, hardware)
        parts += own
        needs.append(Need("generator", download_gb_of(args, choice, engine, own[0].quantization)))
    trained = members_of(choice)[0] if is_ensemble(choice) else choice  # whose experts are frozen
    later = [training_after(args, milestone, trained, hardware, settings.pairs, work.rows, engine)]
    if settings.guard:
        later.insert(0, guard_pass(args, settings.guard, choice, hardware, work.pairs))
    for part, need, said in later:
        parts += part
        needs += need
        lines += said
    needs.append(Need("records", work.rows * ROW_KB[args.principles] / 1e6, download=False))
    end = [_total(args, parts), _budget(hardware, milestone, parts), *_notes(args, hardware)]
    return [*lines, *disk_lines(args, needs), *end]


def training_lines(
    args: argparse.Namespace, milestone: Milestone, trainings: Sequence[DPOSettings], held_out: int,
    choice: ModelChoice, hardware: Hardware,
) -> list[str]:  # fmt: skip
    """The plan of train_dpo.py alone, behind its heading: SFT, DPO or both, in one load."""
    choice, quantization = drawn(args, choice, hardware), args.quantization or hardware.training_quantization
    download = download_gb_of(args, choice, backend_of(args, choice, hardware, quantization), quantization)
    parts: list[Part] = []
    lines: list[str] = []
    for settings in trainings:
        pairs = (len(settings.pairs), len(settings.held_out))
        steps = total_steps(settings, pairs[0])
        part, said = dpo_lines(args, choice, hardware, pairs, steps, settings, download, loaded=bool(parts))
        parts, lines = [*parts, part], [*lines, *said]
    if not args.no_eval and milestone.name not in WITH_TRAINING:
        tried, said = evaluation_lines(args, choice, hardware, held_out, milestone.pairs)
        parts, lines = [*parts, *tried], [*lines, *said]
    needs = [Need("model", download), Need("checkpoints", checkpoints_gb(numbers_of(choice)), download=False)]
    return [*lines, *disk_lines(args, needs), *ending(args, hardware, milestone, parts)]


def ending(args: argparse.Namespace, hardware: Hardware, milestone: Milestone, parts: Sequence[Part]) -> list[str]:
    """The last lines of a plan of a part of a milestone: total, budget, where the figures come from."""
    return [_total(args, parts), _budget(hardware, milestone, []), *_notes(args, hardware)]


def stand_ins(milestone: Milestone) -> list[Pair]:
    """As many pairs as a milestone makes, to plan its training before they are made."""
    return [Pair(f"{i:06d}", ask_for_answer(f"{i}"), "", "") for i in range(milestone.pairs)]


# ---------------------------------------------------------------- what is asked for


def _pairs(args: argparse.Namespace, settings: RunSettings) -> int:
    """How many pairs are wanted; of an --add those that the run has not got yet."""
    before = earlier(args.data_dir / args.run) if args.add else None
    return settings.pairs if before is None else max(0, settings.pairs - before.counts.get("accepted", 0))


def _spare(args: argparse.Namespace, settings: RunSettings, choice: ModelChoice) -> int:
    """How many pairs more, since a guard will turn some down (the rule of `_turns._spare`)."""
    if not settings.guard or args.server or settings.instructions is not None:
        return 0
    own_world = args.random_weights is None and choice.path_or_id == str(NANO_DIR)
    stays = own_world and (settings.guard.lower() == AUTO or is_shipped(settings.guard))
    return 0 if stays else spare_for(_pairs(args, settings), EXPECTED[0] / EXPECTED[1])


def _workload(args: argparse.Namespace, settings: RunSettings, spare: int) -> Workload:
    """What is to be made; with --match-lengths more than is wanted, since some are left out."""
    pairs = _pairs(args, settings) + spare
    pairs = math.ceil(pairs * BLOCK / KEEP) if settings.match_lengths else pairs
    weighed = len(load_constitution(args.constitution).principles) if args.principles == "targeted" else 1
    drawn = None if settings.instructions is None else len(settings.instructions)
    return Workload(pairs, settings.stages.rounds, weighed, drawn, settings.stages.critique)


def heading(args: argparse.Namespace, hardware: Hardware, choice: ModelChoice) -> list[str]:
    """The first lines of a plan: which model, why, on what, for what price."""
    choice = choice if vars(args).get("server") else drawn(args, choice, hardware)
    kind = f" ({choice.kind})" if choice.kind else ""
    many = f"{hardware.gpus} x " if hardware.gpus > 1 else ""
    where = f"{hardware.gpu_name}, {hardware.vram_gb:g} GB" if hardware.gpu_name else f"{hardware.cores} CPU cores"
    where += "" if hardware.kind == "cuda" else f", {hardware.ram_gb:g} GB of memory"
    name = f"--hardware {args.hardware}" if args.hardware else "this machine"
    listed = f" ({hardware.price_from})" if args.price_per_hour == hardware.dollars_per_hour else ""
    whole = f" for all {hardware.gpus} GPUs" if hardware.gpus > 1 else ""
    told = f"${args.price_per_hour:.2f} an hour{whole}{listed}"
    price = told if args.price_per_hour else "no price (--price-per-hour)"
    return [in_line("model", f"{choice.name}{kind} | {choice.reason}"),
            in_line("hardware", f"{many}{where} ({name}); {price}")]  # fmt: skip


def _size(choice: ModelChoice, work: Workload, spare: int) -> list[str]:
    tokens, plural = Tokens.of(choice, work), "s" if work.pairs > 1 else ""
    source = f"{work.rows:,} instructions" if work.drawn is not None else f"about {work.rows:,} instructions"
    rounds = f"{work.rounds} round{'s' if work.rounds > 1 else ''}, {work.weighed} principles weighed"
    guarded = f", {spare:,} of them to spare for the guard," if spare else ""
    return [
        in_line("size", f"{work.pairs:,} pair{plural}{guarded} from {source} (the gate passes half); {rounds}"),
        in_line("tokens", f"{tokens.written:,} to write, {tokens.read:,} of prompts to read if none is read twice"),
    ]


# ---------------------------------------------------------------- total and budget


def _total(args: argparse.Namespace, parts: Sequence[Part]) -> str:
    """The sum of all parts."""
    if not all(part.fits for part in parts):
        total = "none: it does not fit"
    else:
        dollars = sum(part.machine_hours or 0.0 for part in parts) * args.price_per_hour
        total = in_words(_hours(parts), dollars)
        total += ", and the server's share" if vars(args).get("server") else ""
    return in_line("total", total)


def _notes(args: argparse.Namespace, hardware: Hardware) -> list[str]:
    """Where the figures come from; on a laptop, how to ask about the pod."""
    return in_block("", [SOURCE] if args.hardware or hardware.kind == "cuda" else [SOURCE, FOR_THE_POD])


def _budget(hardware: Hardware, milestone: Milestone, parts: Sequence[Part]) -> str:
    """What the spec gives the whole milestone on its pod, and by how much `parts` are over it."""
    number, hours = list(MILESTONES).index(milestone.name), _hours(parts) or 0.0
    said = f"{milestone.budget} for milestone {number} on the pod, with training and evaluation"
    over = hours - milestone.budget_hours
    fits = hardware.kind == "cuda" and all(part.fits for part in parts)
    return in_line("budget", f"{said}; this plan is {over:.1f} hours over it" if fits and over > 0 else said)


def _hours(parts: Sequence[Part]) -> float | None:
    """Hours of all parts, one after the other; None if one of them is not known."""
    return None if any(part.hours is None for part in parts) else sum(part.hours or 0.0 for part in parts)
