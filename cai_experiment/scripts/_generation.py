"""What every script that makes pairs shares: its flags, its settings, loading the models, running the pipeline."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.constitution.principles import load_constitution
from cai_experiment.milestones import MILESTONES, Milestone
from cai_experiment.observe.content_logger import ContentLogger
from cai_experiment.observe.progress import Progress
from cai_experiment.pipeline.gate import CANNOT_SKIP, REASONS, GateSettings
from cai_experiment.pipeline.runner import run_pipeline
from cai_experiment.pipeline.settings import RunResult, RunSettings
from cai_experiment.pipeline.sources import load_instructions
from cai_experiment.pipeline.stages import StageSettings
from cai_experiment.records.manifest import Manifest
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts._common import add_generation_flags, base_parser

if TYPE_CHECKING:
    from cai_experiment.engines.load import LoadSettings

DRAWS_PER_PAIR = 3  # the house plan: at most three times as many instructions as pairs


def generation_parser(doc: str | None, milestone: str) -> argparse.ArgumentParser:
    """The flags of a script that makes pairs, the gate's thresholds among them."""
    parser = base_parser(doc, milestone)
    add_generation_flags(parser)
    defaults = GateSettings()
    group = parser.add_argument_group("gate")
    group.add_argument(
        "--max-similarity",
        type=float,
        default=defaults.max_similarity,
        metavar="SHARE",
        help="of words in the same order; above it a revision is near-identical",
    )
    group.add_argument(
        "--min-length-ratio",
        type=float,
        default=defaults.min_length_ratio,
        metavar="RATIO",
        help="characters of the revision over those of the first answer",
    )
    group.add_argument("--max-length-ratio", type=float, default=defaults.max_length_ratio, metavar="RATIO")
    group.add_argument(
        "--max-refusal-words",
        type=int,
        default=defaults.max_refusal_words,
        metavar="N",
        help="a refusal with more words goes on to help, and may pass",
    )
    group.add_argument(
        "--skip-gate",
        action="append",
        default=[],
        metavar="REASON",
        choices=sorted(set(REASONS) - CANNOT_SKIP),
        help="do not reject for this reason (repeatable)",
    )
    return parser  # fmt: skip


def run_settings(args: argparse.Namespace, milestone: Milestone) -> RunSettings:
    """The settings that the flags ask for; reads the instruction file, if there is one.

    With `--instructions` every row is used once, or the first `--count` rows.
    """
    pairs = args.count or milestone.pairs
    max_draws = milestone.max_draws
    if args.count is not None:
        max_draws = max(DRAWS_PER_PAIR * args.count, MILESTONES["single"].max_draws)
    instructions, name = None, ""
    if args.instructions is not None:
        rows = load_instructions(args.instructions, args.field)
        digest = hashlib.sha256("\n".join(f"{row.id} {row.text}" for row in rows).encode()).hexdigest()
        instructions, name = tuple(rows[: args.count]), f"{args.instructions.name} sha256:{digest}"
        pairs, max_draws = min(pairs, len(instructions)), len(instructions)
    return RunSettings(
        pairs=pairs,
        max_draws=max_draws,
        stages=StageSettings(args.rounds or milestone.rounds, args.principles, args.seed),
        gate=GateSettings(
            args.max_similarity, args.min_length_ratio, args.max_length_ratio, args.max_refusal_words,
            tuple(sorted(set(args.skip_gate))),
        ),
        instructions=instructions,
        instructions_name=name,
        seed=args.seed,
        price_per_hour=args.price_per_hour,
    )  # fmt: skip


def load_settings(args: argparse.Namespace, model: str | None) -> LoadSettings:
    """How to load `model` (None: what the hardware allows)."""
    from cai_experiment.engines.load import LoadSettings

    return LoadSettings(
        model=model, layout=args.format, quantization=args.quantization, batch_size=args.batch_size,
        engine=args.engine, seed=args.seed, random_weights=args.random_weights,
    )  # fmt: skip


def load_engines(args: argparse.Namespace) -> tuple[Any, Any]:
    """(generator, critic), one engine for both unless the flags name two models; prints each one's first line."""
    from cai_experiment.engines.load import load_engine

    names = args.generator or args.model, args.critic or args.model
    generator = load_engine(load_settings(args, names[0]))
    print(generator.first_line, flush=True)
    if names[0] == names[1]:
        return generator, generator
    critic = load_engine(load_settings(args, names[1]))
    print(f"critic: {critic.first_line}", flush=True)
    return generator, critic


def generate(
    args: argparse.Namespace, settings: RunSettings, folder: RunFolder, generator: Any, critic: Any
) -> RunResult:
    """Run or resume the pipeline in `folder` (entered), with the content log and the bar."""
    constitution = load_constitution(args.constitution)
    before = earlier(folder.path)
    rows = settings.instructions is not None
    total, noun = (settings.max_draws, "rows") if rows else (settings.pairs, "pairs")
    done, seconds = 0, 0.0
    if before is not None:
        done = before.counts.get("accepted", 0) + (before.counts.get("rejected", 0) if rows else 0)
        seconds = before.wall_seconds
    with (
        ContentLogger(args.verbosity, folder.path / "content_log.jsonl") as logger,
        Progress(total, noun, args.verbosity, args.price_per_hour, min(done, total), seconds) as progress,
    ):
        return run_pipeline(settings, folder, generator, critic, constitution, logger, progress)


def earlier(path: Path) -> Manifest | None:
    """The manifest of the sessions before, or None in a new folder."""
    place = path / "manifest.json"
    return Manifest.read(place) if place.exists() else None


def summary(result: RunResult, settings: RunSettings) -> list[str]:
    """Lines for the terminal: how many instructions it took, and what was refused and why."""
    what = "rows of the file" if settings.instructions is not None else "instructions"
    lines = [f"{result.accepted} of {result.drawn} {what} gave a pair that passed the gate"]
    if settings.instructions is None and not result.complete:
        lines.append(f"stopped at {result.drawn} instructions ({result.candidates} written) without reaching "
                     f"{settings.pairs} pairs")  # fmt: skip
    for title, counts in (("rejected", result.reasons), ("instructions refused", result.refused)):
        if counts:
            lines.append(f"{title}: " + ", ".join(f"{reason} {count}" for reason, count in counts.items()))
    return lines
