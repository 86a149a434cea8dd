"""What a run starts from: how many pairs (--count, --add), which instructions (--mix, --exclude, --instructions)."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cai_experiment.errors import BadInputError
from cai_experiment.milestones import MILESTONES, Milestone
from cai_experiment.models.choice import ModelChoice, named_by_variable, resolve_model
from cai_experiment.models.hardware import Hardware, detect
from cai_experiment.nano import is_nano
from cai_experiment.pipeline.evaluation_sets import EvaluationSet, read_evaluation_set, shipped_sets
from cai_experiment.pipeline.instruct import SELF, Instruction
from cai_experiment.pipeline.mix import Part, parse_mix
from cai_experiment.pipeline.sources import load_instructions
from cai_experiment.records.files import read_json, show
from cai_experiment.records.manifest import Manifest

DRAWS_PER_PAIR = 3  # the house plan: at most three times as many instructions as pairs


def earlier(path: Path) -> Manifest | None:
    """The manifest of the sessions before, or None in a new folder."""
    place = path / "manifest.json"
    return Manifest.read(place) if place.exists() else None


# ---------------------------------------------------------------- how many


def target(args: argparse.Namespace, milestone: Milestone) -> tuple[int, int]:
    """(pairs to reach, instructions to draw at most). Raises BadInputError for an --add that has nothing to extend.

    Without --count and --add a run keeps the target that it has, if that is larger than the milestone's.
    """
    path = args.data_dir / args.run
    before = None if args.fresh else earlier(path)
    had = 0 if before is None else int(before.settings.get("pairs", 0))
    if args.add is not None:
        count: int | None = _extended(args, path, before, had)
    else:
        count = had if args.count is None and args.instructions is None and had > milestone.pairs else args.count
    if count is None:
        return milestone.pairs, milestone.max_draws
    return count, max(DRAWS_PER_PAIR * count, MILESTONES["single"].max_draws)


def _extended(args: argparse.Namespace, path: Path, before: Manifest | None, had: int) -> int:
    """The target of --add: N more than a finished run has; but the same --add again is the same extension.

    So a command that is repeated after a dropped line never buys pairs twice.
    """
    if args.count is not None:
        raise BadInputError("--add and --count both say how many pairs", "use one of them")
    if before is None:
        raise BadInputError(f"--add {args.add}: {show(path)} holds no run", "make one first, without --add")
    if before.extended and had - before.extended[-1] == args.add:
        return had
    if _is_finished(path, had):
        return had + args.add
    accepted = before.counts.get("accepted", 0)
    raise BadInputError(f"--add {args.add}: the run in {show(path)} is not finished ({accepted} of {had} pairs)",
                        "finish it with the same command without --add")  # fmt: skip


def extension_line(args: argparse.Namespace, pairs: int) -> str:
    """What --add comes to, for the terminal, before anything is made; "" without --add. `pairs` is the target."""
    if args.add is None:
        return ""
    path, before = args.data_dir / args.run, pairs - args.add
    if earlier(path).settings.get("pairs") == before:  # type: ignore[union-attr]
        return f"extends {show(path)}: {before:,} -> {pairs:,} pairs"
    if not _is_finished(path, pairs):
        return f"goes on extending {show(path)}: {before:,} -> {pairs:,} pairs"
    return (f"{show(path)} was extended already: {before:,} -> {pairs:,} pairs; "
            f"--count {pairs + args.add} makes {args.add:,} more")  # fmt: skip


def _is_finished(path: Path, pairs: int) -> bool:
    """True if the folder's report is of a run with this target: the report is the last thing that is written."""
    if not (path / "report.json").exists():
        return False
    settings = read_json(path / "report.json").get("settings", {})
    return settings.get("generation", {}).get("pairs") == pairs


# ---------------------------------------------------------------- which instructions


def rows_of(path: Path, field: str | None) -> tuple[tuple[Instruction, ...], str]:
    """(rows of an instruction file, its name and hash for the manifest)."""
    rows = tuple(load_instructions(path, field))
    return rows, f"{path.name} sha256:{_digest(f'{row.id} {row.text}' for row in rows)}"


def mix_of(args: argparse.Namespace) -> tuple[tuple[Part, ...], str]:
    """(the parts of --mix with their files read, what the manifest says of them); nothing without --mix."""
    if args.mix is None:
        return (), ""
    if args.instructions is not None:
        raise BadInputError("--mix and --instructions both say where instructions come from", "use one of them")
    parts, said = [], []
    for name, share in parse_mix(args.mix):
        rows, shown = ((), SELF) if name == SELF else rows_of(Path(name), args.field)
        parts.append(Part(name, share, rows))
        said.append(f"{shown} {share:g}")
    return tuple(parts), ", ".join(said)


def evaluation_sets(args: argparse.Namespace) -> tuple[EvaluationSet, ...]:
    """What must not be trained on: the sets shipped as hashes, those of --exclude, and the lab's own questions."""
    sets = [] if args.allow_evaluation_sets else [*shipped_sets()]
    sets += [read_evaluation_set(path) for path in args.exclude]
    if speaks_of_world(args):
        sets.append(EvaluationSet.of("held-out questions of the shipped model's world", held_out(args.seed)))
    return tuple(sets)


def held_out(seed: int) -> list[str]:
    """The questions that the trained shipped model will be measured on."""
    from cai_experiment.evaluation.measure import HELD_OUT
    from cai_experiment.nano.world import held_out_questions

    return held_out_questions(HELD_OUT, seed)


# ---------------------------------------------------------------- which model


class Named(NamedTuple):
    """A model by name (None: what the machine takes), and what named it, for messages."""

    model: str | None
    said: str


def named(args: argparse.Namespace) -> tuple[Named, Named]:
    """(generator, critic) as the flags name them.

    --generator alone is the critic as well, unless --model or a variable names one: what the machine would take by
    itself may be a download of 65 GB that nobody asked for. --critic alone leaves the generator to the machine.
    """
    roles = f"--roles {args.roles}:" if vars(args).get("roles") else ""
    other = Named(args.model, "--model")
    generator = Named(args.generator, roles or "--generator") if args.generator else other
    if args.critic:
        return generator, Named(args.critic, roles or "--critic")
    return generator, other if args.model or named_by_variable()[1] else generator


def chosen_model(args: argparse.Namespace, hardware: Hardware, critic: bool = False) -> ModelChoice:
    """The generator (or the critic) that the flags name. With --server a name is the server's business, and none means
    the model that it serves, never the one that this machine would take. Raises BadInputError for a name of nothing.
    """
    name, said = named(args)[1 if critic else 0]
    if args.server is None:
        return resolve_model(name, hardware, said, ensembles=not args.trains_after)
    from cai_experiment.engines.load import LoadSettings
    from cai_experiment.engines.server_load import served_model

    settings = LoadSettings(name, random_weights=args.random_weights, server_url=args.server, said=said)
    return served_model(settings, hardware)


def speaks_of_world(args: argparse.Namespace) -> bool:
    """True if the generator is the shipped model, whose world has a truth, and which knows its own prompts only."""
    if args.random_weights is not None:
        return False
    place = chosen_model(args, detect()).path_or_id
    return place != "" and is_nano(place)


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
