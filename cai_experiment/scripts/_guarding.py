"""The guard's part in a milestone: chosen and checked before the first token, run when the generator has left."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cai_experiment.engines.guard import GuardChoice, GuardSettings, GuardVerdict, check_guard, load_guard
from cai_experiment.errors import BadInputError
from cai_experiment.models.hardware import detect
from cai_experiment.observe.progress import Progress
from cai_experiment.pipeline.guarding import GuardCounts, guard_pass
from cai_experiment.pipeline.length_matching import SURPLUS
from cai_experiment.records.files import ExampleFile
from cai_experiment.records.manifest import Manifest
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts._generation import load_settings
from cai_experiment.scripts._inputs import chosen_model, earlier, named


def choose_guard(args: argparse.Namespace, path: Path) -> GuardChoice | None:
    """The guard that the flags ask for, sure to load; None without one. Prints its line.

    "auto" keeps the guard that an earlier session used. Raises BadInputError if another one's verdicts stand in the
    journal already, and what `check_guard` raises.
    """
    if args.guard is None:
        return None
    before = None if args.fresh else earlier(path)
    used = "" if before is None else str(before.guard.get("name", ""))
    wanted = used if used and args.guard == "auto" else args.guard
    hardware = detect()
    settings = GuardSettings(wanted, chosen_model(args, hardware).path_or_id, still_to_download(args), shares_gpu(args))
    choice = check_guard(settings, hardware)
    if used and choice.name != used:
        raise BadInputError(f"--guard {choice.name}: {used} has judged pairs of this run already",
                            f"use --guard {used}, or --fresh")  # fmt: skip
    print(choice.line, flush=True)
    return choice


def still_to_download(args: argparse.Namespace) -> float:
    """GB that generator and critic will still take of the disk, in the files that their engine loads.

    0 where a size is not known. Raises what `make_plan` raises of flags that no engine can serve.
    """
    from cai_experiment.engines.load import make_plan
    from cai_experiment.scripts._plan_parts import download_gb_of

    if args.server:
        return 0.0
    plans = [make_plan(load_settings(args, *one), detect()) for one in {one.model: one for one in named(args)}.values()]
    return sum(download_gb_of(args, plan.choice, plan.engine, plan.quantization) for plan in plans)


def shares_gpu(args: argparse.Namespace) -> bool:
    """True if --server is on this machine, so that it keeps its GPU memory while the guard reads."""
    from cai_experiment.engines.server_address import is_loopback

    return args.server is not None and is_loopback(args.server)


def shares(choice: GuardChoice | None, generator: Any) -> bool:
    """True if the guard speaks through the generator's engine (the shipped model), which then stays open."""
    return choice is not None and choice.family == "nano" and generator.describe().get("model") == "nano"


def guard_pairs(args: argparse.Namespace, folder: RunFolder, choice: GuardChoice, generator: Any | None) -> GuardCounts:
    """Have the guard read every accepted pair of the run that it has not read yet; verdicts go into the journal."""
    started = time.monotonic()
    guard = load_guard(choice, detect(), generator)
    try:
        print(guard.first_line, flush=True)
        facts = {"name": choice.name, **guard.describe()}
        _note(folder.path, facts, 0.0, args.price_per_hour)  # whose verdicts they are, also if the pass is killed
        with Progress(len(ExampleFile(folder.path / "pairs.jsonl")), "guarded", args.verbosity) as progress:
            judged = itertools.count(1)

            def seen(verdict: GuardVerdict) -> None:
                progress.update(next(judged))

            counts = guard_pass(pairs_to_read(folder.path), guard, folder.journal, seen)
    finally:
        guard.close()
    _note(folder.path, facts, time.monotonic() - started, args.price_per_hour)
    return counts


def pairs_to_read(path: Path) -> Iterator[tuple[str, str, str]]:
    """(id, instruction, chosen) of every pair that passed the gate, also of those left out to match lengths."""
    for name in ("pairs.jsonl", "rejected.jsonl"):
        for example in ExampleFile(path / name):
            if example.reject_reasons in ((), (SURPLUS,)):
                yield example.id, example.instruction, example.revised_answer


def _note(path: Path, facts: dict[str, Any], seconds: float, price_per_hour: float) -> None:
    """Put the guard and its time into the manifest."""
    place = path / "manifest.json"
    before = Manifest.read(place)
    spent = round(float(before.guard.get("seconds", 0.0)) + seconds, 3)
    cost = round(before.cost_dollars + seconds / 3600 * price_per_hour, 6)
    dataclasses.replace(before, guard={**facts, "seconds": spent}, cost_dollars=cost).write(place)


def said(counts: GuardCounts) -> str:
    """One line for the terminal."""
    what = ", ".join(f"{category} {count}" for category, count in counts.categories.most_common())
    return (f"guard: {counts.safe} safe, {counts.unsafe} unsafe{f' ({what})' if what else ''}, "
            f"{counts.unparsed} unparsed (unsafe and unparsed pairs are rejected)")  # fmt: skip
